"""How the lanes of a group come to have the same subspaces: all give what they have added up to lane 0, which chooses.

A method may choose what keys and values are written in by what all tokens of a step were like
(`ContextMethod.gathers`). Sums of all lanes are the same in whatever order they come, since they are added in lane
order; what is computed of them is not, where two machines round differently. So one lane computes, and the others take
its numbers as they are.

One layer after the other: so no more than one layer's matrices are under way, and nobody who is still sending keeps
another from being read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...compress.byte_format import CodecError
from ...compress.context_method import ContextLayer
from .exchange import ContextKey, ContextTransport, What

CHOOSES = 0  # the lane that does


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Of these in one message."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SubspaceChoice:
    """Of the node in lane `lane` of so many."""

    def __init__(self, transport: ContextTransport, lane: int, lanes: int) -> None:
        self._transport, self._lane = transport, lane
        self._others = [other for other in range(lanes) if other != lane]

    def hold(self, step: int, layers: Mapping[int, ContextLayer]) -> None:
        """Behind that step, in all lanes alike. Raises what the transport raises, and CodecError for numbers that are
        not finite."""
        for layer, method in layers.items():
            grams, like = [gram.clone() for gram in method.grams()], method.subspaces()
            if self._lane == CHOOSES:
                for other in self._others:
                    for total, more in zip(
                        grams, self._take(other, choice_key(step, layer, "gram"), grams), strict=True
                    ):
                        total += more
                chosen = method.choose(*grams)
                body = b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in chosen)
                for other in self._others:
                    self._transport.send(other, choice_key(step, layer, "subspace"), body)
            else:
                body = b"".join(gram.cpu().contiguous().numpy().tobytes() for gram in grams)
                self._transport.send(CHOOSES, choice_key(step, layer, "gram"), body)
                chosen = self._take(CHOOSES, choice_key(step, layer, "subspace"), like)
            method.use_subspaces(*chosen)

    def _take(self, lane: int, key: ContextKey, like: Sequence[Tensor]) -> list[Tensor]:
        body, found, at = self._transport.receive(lane, key), list[Tensor](), 0
        for tensor in like:
            numbers = np.frombuffer(body, _DTYPES[tensor.dtype], count=tensor.numel(), offset=at)
            if not np.isfinite(numbers).all():
                raise CodecError(f"lane {lane}: {key}: a number is not finite")
            found.append(torch.from_numpy(numbers.reshape(tensor.shape).copy()).to(tensor.device))
            at += numbers.nbytes
        return found


_DTYPES = {torch.float64: np.float64, torch.float32: np.float32}


def choice_key(step: int, layer: int, what: What) -> ContextKey:
    return ContextKey(step=step, evaluation=False, microbatch=0, layer=layer, segment=0, what=what)
