"""A keyed mask as a byte format: both ends draw which k of the W channels cross, so nothing says it. `mask:k=16`.

Body, for N tokens: N k values in bf16, in the order of tokens and, within one, of channels. A value is the number times
W/k, so that over keys the mean of what arrives is what was sent; channels that were not drawn are 0. The factor is
applied before rounding, which leaves the receiver nothing to compute.

The channels are the same for all tokens of a tensor, and for both directions of one boundary, step and microbatch: the
gradient of a channel that was masked away *is* zero, so the mask of the gradient is not a second loss but the exact
derivative of the first. With another k in each direction the smaller set is a part of the larger one. W random numbers
come from the key's generator (as if its direction were FORWARD); the channels of the k smallest are drawn.

Dropping at random and scaling up is the unbiased sparsification of Wangni et al. (arXiv 1710.09854). What it has over
top-k: no indices, no bias, and no choice to compute. What it costs is variance, (W/k - 1) times the square of each
number, in evaluations too.

Why the receiver is told the key (`unpack(..., key=...)`) and no seed is in the payload's header: both ends know the key
already (seed and boundary from the configuration, direction, step and microbatch from the message), so it costs no
byte, the message's size stays what `body_bytes` and a plan say, and no peer can choose the mask.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .byte_format import Direction, Key, Payload
from .float_formats import Bf16
from .kept_values import KeepsSome
from .registry import register_format

_MASK = 0x4D41534B  # stream of a key's generator


@register_format
class Mask(KeepsSome):
    """`mask:k=16`: 2 k bytes a token. k: channels that cross."""

    id = "mask"

    def __init__(self, k: int = 16) -> None:
        super().__init__(k)
        self._values = Bf16()
        self._values.id = self.id

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        tokens, _ = self.tokens(shape)
        return self._values.body_bytes((tokens, self.k))

    def pack(self, z: Tensor, key: Key) -> Payload:
        _, width = self.tokens(tuple(z.shape))
        sent_NW = self.rounded(z, torch.bfloat16, key, gain=width / self.k)
        values_NK = sent_NW[:, drawn(key, width, self.k).to(sent_NW.device)]
        body = self._values.pack(values_NK, key).body
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=body)

    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        self.check(payload, shape)
        tokens, width = self.tokens(shape)
        channels_K = drawn(self.needed(key), width, self.k)
        kept = Payload(codec=self.id, header={"shape": [tokens, self.k]}, body=payload.body)
        values_NK = self._values.unpack(kept, shape=(tokens, self.k), dtype=dtype)
        return self.spread(values_NK, channels_K, shape, dtype, device)


def drawn(key: Key, width: int, k: int) -> Tensor:
    """The k channels (k,) of `width` that cross in either direction, ascending, on the CPU."""
    draws_W = replace(key, direction=Direction.FORWARD).generator(_MASK).random_raw(width)
    return torch.from_numpy(np.sort(np.argsort(draws_W, kind="stable")[:k]))
