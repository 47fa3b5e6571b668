"""What byte formats have in common that keep k of a token's W numbers and send nothing of the others: `topk`, `mask`
and `columns`.

They differ in who chooses, and for how long a choice holds. In all of them a number that was dropped is 0 at the other
end, the kept ones lie in ascending order of their place in the token, so that a choice has one spelling, and k is
checked against the width before anything is built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .byte_format import ByteFormat, CodecError, Key, LearnedTable, is_finite
from .float_formats import refusal


class KeepsSome(ByteFormat):
    """k of W, in every token."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise CodecError(f"byte format '{self.id}': k={k} has to be at least 1")
        self.k = k

    def table(self, width: int) -> LearnedTable | None:
        if width < self.k:
            remedy = f"say k={width} or less" if width > 0 else "choose a width above 0"
            raise CodecError(f"format '{self.id}': k={self.k} numbers of a token of {width} cannot be kept; {remedy}")
        return None

    def tokens(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """N and W. Raises CodecError for a shape that cannot be packed."""
        if not shape:
            raise CodecError(f"format '{self.id}' codes tokens (..., W), and not a number alone")
        self.table(shape[-1])
        return math.prod(shape[:-1]), shape[-1]

    def rounded(self, z: Tensor, dtype: torch.dtype, key: Key, gain: float = 1.0) -> Tensor:
        """The tokens (N, W) in float32, times `gain`, then in `dtype`. Raises CodecError for a value that is not
        finite, or not in `dtype`, whether it is kept or not: what a node refuses must not depend on a draw."""
        given = z.detach()
        flat_NW = given.to(torch.float32).reshape(self.tokens(tuple(z.shape)))
        if gain != 1.0:
            flat_NW = flat_NW * gain
        sent_NW = flat_NW.to(dtype)
        if not is_finite(sent_NW):
            raise refusal(self, given, sent_NW, key)
        return sent_NW

    def spread(
        self, values_NK: Tensor, places: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Zeros of `shape`, with the values at `places` (N, K), or (K,) for all tokens alike."""
        values_NK = values_NK.to(device=device, dtype=dtype)
        if not is_finite(values_NK):
            token, kept = (int(i) for i in (~values_NK.isfinite()).nonzero()[0])
            raise CodecError(f"{self.id} payload is not finite in {dtype} at value {kept} of token {token}")
        z_NW = torch.zeros(self.tokens(shape), dtype=dtype, device=device)
        z_NW.scatter_(1, places.to(device).expand_as(values_NK), values_NK)
        return z_NW.view(shape)


def largest(ranks_NW: Tensor, k: int) -> Tensor:
    """Places (N, k), ascending, of the k largest ranks of each row; of equal ones those of the lower place.

    Ranks are whole, int64, at least 0 and below 2^63 / W. Each is made unequal to all others by its place, because
    neither `topk` nor an unstable sort says which of two equal numbers it takes, and devices differ in it.
    """
    width = ranks_NW.shape[1]
    behind_W = torch.arange(width - 1, -1, -1, device=ranks_NW.device)
    return (ranks_NW * width + behind_W).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
