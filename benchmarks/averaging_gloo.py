"""A peer of benchmarks/averaging.py that averages by torch.distributed's all-reduce over gloo, in float32 or bf16.

What a user of torch would do: all tensors as one flat one, in the wire's dtype, `all_reduce`, divide. The sum is taken
in that dtype, so bf16 rounds after every addition.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from averaging_peer import Place, Tool, serve
from torch import Tensor, distributed

PORT = 7300
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class Gloo(Tool):
    """Its one process group is made anew for each group."""

    def open(self, spec: str, shapes: list[tuple[int, ...]], group: int) -> float:
        self.close()
        self._dtype = DTYPES[spec]
        place = self.place
        distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{place.addresses[0]}:{PORT + group}",
            rank=place.lane,
            world_size=place.lanes,
            timeout=timedelta(seconds=place.patience_s),
        )
        self._tensors = [torch.zeros(shape) for shape in shapes]
        numbers = sum(tensor.numel() for tensor in self._tensors)
        distributed.barrier()
        # Each number is sent to whoever adds it up, and the sum of as many comes from there: a ring.
        return 2 * (place.lanes - 1) / place.lanes * numbers * self._dtype.itemsize

    def give(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def hold(self) -> int:
        flat = torch.cat([tensor.flatten() for tensor in self._tensors]).to(self._dtype)
        distributed.all_reduce(flat)
        mean = flat.float().div_(self.place.lanes)
        parts = mean.split([tensor.numel() for tensor in self._tensors])
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return self.place.lanes

    def taken(self) -> list[Tensor]:
        return self._tensors

    def close(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def make(place: Place) -> Tool:
    return Gloo(place)


if __name__ == "__main__":
    serve(make)
