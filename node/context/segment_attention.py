"""Attention of a segment's queries over the keys of one segment at a time, and how such parts become one.

The softmax of a query needs all of its keys. But what some of the keys give, `o` with the logarithm `lse` of the sum
of its exponentials, can be merged with what the others give, one part after the other (online softmax: Milakov and
Gimelshein, arXiv 1805.02867; over machines: Ring Attention, Liu et al., arXiv 2310.01889). In the backward pass the
parts stay apart: with the *merged* o and lse, the gradient through one part's keys needs nothing of the others.

torch has the parts: its fused kernels return lse, and their backward takes o and lse from outside. They are what
torch's own context parallelism calls, under names with an underscore. `plain_forward` and `plain_backward` are the same
in ordinary operations, for devices and dtypes without a kernel, and for tests to compare.

Shapes: q, o (B, H, T, D); k, v (B, G, S, D) with H a multiple of G: H/G query heads share a key head; lse (B, H, T),
float32, or float64 with float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # o, lse


def spread(k_BGSD: Tensor, heads: int) -> Tensor:
    """Keys or values with a head for each head of the queries."""
    groups = k_BGSD.shape[1]
    return k_BGSD if groups == heads else k_BGSD.repeat_interleave(heads // groups, dim=1)


def gathered(dk_BHSD: Tensor, groups: int) -> Tensor:
    """The gradient of what `spread` was given, from that of what it gave."""
    heads = dk_BHSD.shape[1]
    return dk_BHSD if groups == heads else dk_BHSD.unflatten(1, (groups, heads // groups)).sum(dim=2)


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Part:
    """o and lse over these keys alone. causal: they are the queries' own segment, of which each sees those up to
    itself; else all are seen."""
    k, v = spread(k, q.shape[1]), spread(v, q.shape[1])
    if _has_kernel(q):
        o, lse = _cpu.default(q, k, v, 0.0, causal, attn_mask=None, scale=scale)
        return o, lse
    return plain_forward(q, k, v, causal=causal, scale=scale)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq through these keys, and their dk and dv; o and lse are the merged ones, in the dtypes that `forward` gives."""
    groups = k.shape[1]
    k, v = spread(k, q.shape[1]), spread(v, q.shape[1])
    if _has_kernel(q):
        dq, dk, dv = _cpu_backward.default(do, q, k, v, o, lse, 0.0, causal, attn_mask=None, scale=scale)
    else:
        dq, dk, dv = plain_backward(do, q, k, v, o, lse, causal=causal, scale=scale)
    return dq, gathered(dk, groups), gathered(dv, groups)


def merge(first: Part | None, second: Part) -> Part:
    """What both together give. Numbers are those of lse's dtype: o becomes that too."""
    o, lse = second
    if first is None:
        return o.to(lse.dtype), lse
    before, lse_before = first
    both = torch.logaddexp(lse_before, lse)
    weight, weight_before = (lse - both).exp().unsqueeze(-1), (lse_before - both).exp().unsqueeze(-1)
    return before * weight_before + o.to(both.dtype) * weight, both


# -- in ordinary operations -------------------------------------------------------------------------------------------


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Part:
    """As `forward`, with as many heads of keys as of queries."""
    wide = _wide(q)
    scores = _scores(q, k, causal=causal, scale=scale)
    lse = torch.logsumexp(scores, dim=-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(wide)).to(q.dtype), lse


def plain_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, with as many heads of keys as of queries."""
    wide = _wide(q)
    do_wide = do.to(wide)
    weights = (_scores(q, k, causal=causal, scale=scale) - lse.unsqueeze(-1)).exp()
    dv = weights.mT @ do_wide
    through = (do_wide * o.to(wide)).sum(dim=-1, keepdim=True)
    dscores = weights * (do_wide @ v.to(wide).mT - through) * scale
    return (dscores @ k.to(wide)).to(q.dtype), (dscores.mT @ q.to(wide)).to(k.dtype), dv.to(v.dtype)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor, *, causal: bool, scale: float) -> Tensor:
    wide = _wide(q)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


# -- torch's own ------------------------------------------------------------------------------------------------------

_ops: Any = torch.ops.aten
_cpu = _ops._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = _ops._scaled_dot_product_flash_attention_for_cpu_backward


def _has_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.float64, torch.float32, torch.bfloat16)
