"""A peer of benchmarks/averaging.py that averages by hivemind's DecentralizedAverager, with one of its compressions.

As hivemind's own optimizer does it: a group is looked for before the round is due (`require_trigger`), so that what is
timed is the all-reduce alone. That search is a part of `give` here; its bytes are counted, its seconds stand apart.

Peers end with the mean of what each *reducer* had added up by then, in the order in which parts came, and each adds to
its own tensors the difference that the reducer says, which is compressed once more.
"""

from __future__ import annotations

import time
from typing import Any

import hivemind
import torch
from averaging_peer import Place, Tool, serve
from hivemind import compression as compressions
from hivemind.averaging.control import AveragingStage
from hivemind.compression import quantization
from torch import Tensor

COMPRESSIONS: dict[str, tuple[type[compressions.CompressionBase], float]] = {  # and bytes a number, without tables
    "float32": (compressions.NoCompression, 4.0),
    "float16": (compressions.Float16Compression, 2.0),
    "uniform8": (compressions.Uniform8BitQuantization, 1.0),
    "blockwise8": (compressions.BlockwiseQuantization, 1.0),  # needs bitsandbytes
}
SEARCH_S = 20.0  # for a group; hivemind waits five for one that could be larger
# hivemind 1.1.12 reads the length of a table by int() of an array of one number, which numpy 2.4 refuses.
quantization.__dict__["int"] = lambda value: value.item()


class Hivemind(Tool):
    """One DHT for the whole process, and an averager for each group."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._averager: Any = None

    def start(self, boot: str) -> str:
        self._dht = hivemind.DHT(
            initial_peers=[boot] if boot else None,
            start=True,
            host_maddrs=[f"/ip4/{self.place.addresses[self.place.lane]}/tcp/0"],
            nat_port_map=False,
            auto_nat=False,
            use_relay=False,
        )
        return str(self._dht.get_visible_maddrs()[0])

    def open(self, spec: str, shapes: list[tuple[int, ...]], group: int) -> float:
        if self._averager:
            self._averager.shutdown()
        compression, number_bytes = COMPRESSIONS[spec]
        tensors = [torch.zeros(shape) for shape in shapes]
        self._averager = hivemind.DecentralizedAverager(
            tensors,
            self._dht,
            start=True,
            prefix=f"group{group}",
            target_group_size=self.place.lanes,
            compression=compression(),
            next_chunk_timeout=self.place.patience_s,
            allow_state_sharing=False,
        )
        others = (self.place.lanes - 1) / self.place.lanes
        return 2 * others * number_bytes * sum(tensor.numel() for tensor in tensors)

    def give(self, tensors: list[Tensor]) -> None:
        with self._averager.get_tensors() as own:
            for mine, given in zip(own, tensors, strict=True):
                mine.copy_(given)
        self._step = self._averager.step(wait=False, require_trigger=True, timeout=SEARCH_S)
        while self._step.stage is not AveragingStage.AWAITING_TRIGGER and not self._step.done():
            time.sleep(0.005)

    def hold(self) -> int:
        self._step.allow_allreduce()
        return len(self._step.result())

    def taken(self) -> list[Tensor]:
        with self._averager.get_tensors() as own:
            return [tensor.clone() for tensor in own]

    def close(self) -> None:
        if self._averager:
            self._averager.shutdown()
        self._dht.shutdown()


def make(place: Place) -> Tool:
    return Hivemind(place)


if __name__ == "__main__":
    serve(make)
