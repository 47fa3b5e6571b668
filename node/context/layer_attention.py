"""Attention of one layer over chunks: what a node gives, takes and computes, forward and backward.

A node's queries attend to its own segments first, while those of the others are on their way, then to theirs in a fixed
order, each as soon as it is here. What is kept for the backward pass is what came over the wire, and not the keys and
values that were made of it: those are made again, so memory follows the wire and not the sequence. The gradient of each
part goes back to its owner as soon as it is there, before the node's own part of the work; last, what others have sent
back for this node's keys and values is waited for and added.

One autograd function does all of it, since the engine must not go on below this layer before the others' gradients are
in. No node waits for something that another one sends only after something of this node: in each layer, and each way,
all give before they wait. Between the two, another microbatch has its turn, if one is in flight (`turns`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...compress.context_method import ContextLayer, Rotate
from . import segment_attention
from .context_exchange import ContextExchange
from .exchange import ContextKey


class Moment(threading.local):
    """Which microbatch of a stage the calling thread computes now; one object for all its layers."""

    step: int = 0
    microbatch: int = 0
    evaluation: bool = False


class LayerAttention:
    """Attention of layer `layer`, numbered in the whole model, on one node. rotations: by segment, what gives keys the
    rotary embedding of their positions. hand_over: is called where parts of other lanes are waited for next."""

    def __init__(
        self,
        layer: int,
        method: ContextLayer,
        exchange: ContextExchange,
        moment: Moment,
        rotations: list[Rotate],
        hand_over: Callable[[], None],
    ) -> None:
        self.layer, self.method, self.exchange, self._moment = layer, method, exchange, moment
        self._rotations, self.hand_over = rotations, hand_over

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Queries (B, H, T, D), keys and values (B, G, T, D) of all of the node's segments, one after the other, to
        (B, H, T, D)."""
        own = self.exchange.layout.of_lane(self.exchange.lane)
        inputs: list[Tensor] = []
        for index, (k_own, v_own) in enumerate(zip(k.chunk(len(own), 2), v.chunk(len(own), 2), strict=True)):
            with torch.autocast(q.device.type, enabled=False):
                z, s = self.method.encode(index, k_own, v_own)
            inputs += [k_own, v_own, z, s]
        moment = self._moment
        at = {"step": moment.step, "microbatch": moment.microbatch, "evaluation": moment.evaluation}
        return _Attention.apply(self, at, scale, q, *inputs)  # pyright: ignore[reportReturnType]

    def key(self, at: dict[str, Any], segment: int, *, gradient: bool = False) -> ContextKey:
        return ContextKey(layer=self.layer, segment=segment, gradient=gradient, **at)

    def decode(self, segment: int, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of another node's segment, the same forward and backward."""
        with torch.autocast(z.device.type, enabled=False):
            k, v = self.method.decode(z, s, self._rotations[segment])
        return k.to(z.dtype), v.to(z.dtype)


class _Attention(torch.autograd.Function):
    """Inputs: queries, and for each own segment keys, values, z and s."""

    @staticmethod
    def forward(
        ctx: Any, layer: LayerAttention, at: dict[str, Any], scale: float, q: Tensor, *inputs: Tensor
    ) -> Tensor:
        exchange = layer.exchange
        own, needed = exchange.layout.of_lane(exchange.lane), exchange.layout.needed_by(exchange.lane)
        k_own, v_own, z_own, s_own = (inputs[each::4] for each in range(4))
        for segment, z, s in zip(own, z_own, s_own, strict=True):
            exchange.give(layer.key(at, segment), (z, s))
        queries = q.chunk(len(own), 2)
        merged: list[segment_attention.Part | None] = [None] * len(own)

        def attend(index: int, k: Tensor, v: Tensor, *, causal: bool) -> None:
            part = segment_attention.forward(queries[index], k, v, causal=causal, scale=scale)
            merged[index] = segment_attention.merge(merged[index], part)

        for index in range(len(own)):
            for earlier in range(index + 1):
                attend(index, k_own[earlier], v_own[earlier], causal=earlier == index)
        layer.hand_over()
        taken: list[Tensor] = []
        for segment in needed:
            z, s = exchange.take(layer.key(at, segment))
            k, v = layer.decode(segment, z, s)
            for index, mine in enumerate(own):
                if mine > segment:
                    attend(index, k, v, causal=False)
            taken += [z, s]
        parts = [part for part in merged if part is not None]
        o = torch.cat([part[0] for part in parts], dim=2).to(q.dtype)
        lse = torch.cat([part[1] for part in parts], dim=2)
        ctx.layer, ctx.at, ctx.scale, ctx.segments = layer, at, scale, (own, needed)
        ctx.save_for_backward(q, o, lse, *inputs, *taken)
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        layer, at, scale, (own, needed) = ctx.layer, ctx.at, ctx.scale, ctx.segments
        exchange, count = layer.exchange, len(own)
        q, o, lse, *rest = ctx.saved_tensors
        inputs, taken = rest[: 4 * count], rest[4 * count :]
        k_own, v_own = inputs[0::4], inputs[1::4]
        by_query = [each.chunk(count, 2) for each in (gradients[0], q, o, lse)]
        dq: list[Tensor] = [torch.zeros_like(each, dtype=lse.dtype) for each in by_query[1]]

        def back(index: int, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
            mine = [each[index].contiguous() for each in by_query]
            through, dk, dv = segment_attention.backward(
                mine[0], mine[1], k, v, mine[2], mine[3], causal=causal, scale=scale
            )
            dq[index] += through
            return dk, dv

        for segment, z, s in zip(needed, taken[0::2], taken[1::2], strict=True):
            z, s = z.detach().requires_grad_(), s.detach().requires_grad_()
            with torch.enable_grad():
                k, v = layer.decode(segment, z, s)
            found = [back(i, k.detach(), v.detach(), causal=False) for i, mine in enumerate(own) if mine > segment]
            dk, dv = _total([each[0] for each in found]), _total([each[1] for each in found])
            dz, ds = torch.autograd.grad((k, v), (z, s), (dk, dv), allow_unused=True)
            ds = torch.zeros_like(s) if ds is None else ds
            exchange.give_gradient(layer.key(at, segment, gradient=True), (dz, ds))
        mine: list[list[tuple[Tensor, Tensor]]] = [[] for _ in own]
        for index in range(count):
            for earlier in range(index + 1):
                found = back(index, k_own[earlier], v_own[earlier], causal=earlier == index)
                mine[earlier].append(found)
        layer.hand_over()
        answer: list[Tensor | None] = []
        for segment, found in zip(own, mine, strict=True):
            answer += [_total([each[0] for each in found]), _total([each[1] for each in found])]
            answer += exchange.take_gradients(layer.key(at, segment, gradient=True)) or (None, None)
        return None, None, None, torch.cat(dq, dim=2).to(q.dtype), *answer


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
