"""What a fragment is: a stretch of all that a stage averages, as rows of numbers to pack and to write back.

All tensors, end to end, are cut at even distances, whatever tensor that goes through, so that fragments are equally
long where one tensor is most of a stage (an embedding). The mean of weights is taken number by number, so it does not
matter to which tensor a number belongs. Only a tensor with a constraint of its own, such as a projector on the Stiefel
manifold, stays whole: part of one and part of another is neither. Why not a layer as a fragment, as Streaming DiLoCo
does: a stage has few layers, and some have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compress.byte_format import CodecError
from .modes import ROW


def row_shape(numbers: int) -> tuple[int, int]:
    """Of so many numbers in rows."""
    return (-(-numbers // ROW), ROW)


class Rows:
    """Tensors of one dtype, end to end, in rows of `ROW` numbers (N, ROW); what fills up the last row is zero."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._parts = [each.detach() for each in tensors]  # of any layout: an orthonormal factor may be a transpose
        self.numbers = sum(part.numel() for part in self._parts)
        self.shape = row_shape(self.numbers)

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].dtype

    def read(self) -> Tensor:
        """A copy (N, ROW)."""
        like = self._parts[0]
        rows = like.new_zeros(self.shape)
        torch.cat([part.reshape(-1) for part in self._parts], out=rows.view(-1)[: self.numbers])
        return rows

    @torch.no_grad()
    def write(self, rows: Tensor) -> None:
        for part, values in self._matched(rows):
            part.copy_(values.view(part.shape))

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        for part, values in self._matched(rows):
            part.add_(values.view(part.shape))

    def _matched(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        values = rows.reshape(-1)[: self.numbers].split([part.numel() for part in self._parts])
        return list(zip(self._parts, values, strict=True))


def fragments_of(tensors: list[Tensor], whole: list[Tensor], count: int) -> list[Rows]:
    """`tensors` cut into `count` fragments, the `whole` ones at the end of the last. Raises CodecError for more
    fragments than rows."""
    flat = [each.detach().view(-1) for each in tensors]
    numbers = sum(each.numel() for each in flat)
    rows, _ = row_shape(numbers)
    if count > rows:
        raise CodecError(f"fragments={count} are more than the {rows} rows of {ROW} weights of a stage; lower it")
    bounds = [min(numbers, place * rows // count * ROW) for place in range(count)] + [numbers]
    fragments: list[list[Tensor]] = [[] for _ in range(count)]
    begin = 0
    for each in flat:
        for place in range(count):
            first, last = max(bounds[place], begin), min(bounds[place + 1], begin + each.numel())
            if first < last:
                fragments[place].append(each[first - begin : last - begin])
        begin += each.numel()
    fragments[-1] += whole
    return [Rows(each) for each in fragments]
