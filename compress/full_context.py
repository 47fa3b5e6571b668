"""Keys and values cross to other chunks as they are, in a byte format: exact without one, and the baseline with one.

This is what context parallelism inside of a data centre does (Ring Attention, arXiv 2310.01889; Llama 3, arXiv
2407.21783): 2 H D numbers a token and layer. Keys cross with their rotary embedding, so whoever takes them needs to
know nothing of positions, and architectures that normalise keys need no case of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .context_method import ContextLayer, ContextMethod, ContextShape, Rotate


class FullContext(ContextMethod):
    """`full:format=int8,backward=int8`; without formats what the stage computes with."""

    name = "full"

    def __init__(self, *, format: str = "", backward: str = "") -> None:
        self.format, self.backward = format, backward or format

    @property
    def exact_spec(self) -> str:
        return self.name

    def wire_width(self, shape: ContextShape) -> int:
        return 2 * shape.heads * shape.head_width

    def scalars(self, shape: ContextShape) -> int:
        del shape
        return 0

    def attach(self, attention: nn.Module, shape: ContextShape) -> ContextLayer:
        del attention
        return _FullLayer(shape)


class _FullLayer(ContextLayer):
    """z is each token's keys of all heads, then its values."""

    def __init__(self, shape: ContextShape) -> None:
        self._heads = (shape.heads, shape.head_width)

    def encode(self, segment: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        del segment
        z_BTW = torch.cat([_by_token(k_BHTD), _by_token(v_BHTD)], dim=2)
        return z_BTW, z_BTW.new_empty(len(z_BTW), 0)

    def decode(self, z_BTW: Tensor, s_BN: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        del s_BN, rotate  # the keys have been rotated
        k_BTW, v_BTW = z_BTW.chunk(2, dim=2)
        return k_BTW.unflatten(2, self._heads).transpose(1, 2), v_BTW.unflatten(2, self._heads).transpose(1, 2)


def _by_token(k_BHTD: Tensor) -> Tensor:
    return k_BHTD.transpose(1, 2).flatten(2)
