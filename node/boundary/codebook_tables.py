"""Both ends of the codebook that the byte format of one direction uses.

The node that packs owns the codebook and learns it: the upstream node that of activations, the downstream node that of
gradients. Every tensor of training brings a change of it, of a fixed number of entries
(`protocol.dictionary_selection`), or only the first one of some steps, where a table has to go whole. A tensor is coded
with the table that its change leads to; then the owner learns from it. From the first tensor of all the table is made
before it is packed, and it brings the whole table. Tensors of an evaluation are only packed: they name the version in
use, change nothing, and the owner does not learn from them.

Why a change with each tensor and not the whole codebook each step: with 4,096 entries of 8 numbers the latter is 8 to
32 bytes a token at 4,096 tokens a step, as much as the tensors themselves (MAPL, arXiv 2606.05484, streams for that
reason; its subset is random, ours may go by drift and use).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...compress.byte_format import ByteFormat, Key, LearnedTable, Payload
from ...protocol.dictionary_delta import Delta
from ...protocol.dictionary_selection import select
from .learned_tables import TableOwner, TableReplica, change_due
from .table_snapshot import TableSnapshot

_SELECT = 0x52565132  # stream of a key's generator; the format itself draws from others


class Packed(NamedTuple):
    """A tensor's bytes, the versions that they were coded with (for the header), and the change that leads there."""

    payload: Payload
    coded_with: dict[str, Any]
    change: bytes


class CodebookOwner(TableOwner):
    """The end that packs. `shape`: of a tensor; `microbatches`: of one step, to number the changes."""

    def __init__(
        self,
        fmt: ByteFormat,
        table: LearnedTable,
        *,
        shape: tuple[int, ...],
        seed: int,
        boundary: int,
        microbatches: int,
        device: torch.device,
    ) -> None:
        super().__init__(table, generation=0, seed=seed, boundary=boundary, dtype=torch.float32, device=device)
        self._format, self._shape, self._microbatches = fmt, shape, microbatches
        self._learned_before: dict[str, Tensor] = {}  # by an earlier run

    def learned_before(self, state: Mapping[str, Tensor], shipped: Tensor, *, times: float) -> None:
        """Begin with what an earlier run had learned, and had shipped, in a format that has the same table. times: how
        many times as many tokens a microbatch has now. Raises CodecError for a state that is none."""
        self._learned_before = self._format.for_tensors_of(state, times)
        self._format.load_state_tensors(self._learned_before)
        self.begin_with(shipped)

    def pack(self, z: Tensor, key: Key, *, training: bool) -> Packed:
        """Raises CodecError for a value that must not be sent."""
        fmt, change, has_started = self._format, b"", self._format.has_started
        if training:
            if not has_started:
                fmt.learn(z, key)
            change = self._change(key)
        payload = fmt.pack(z, key)
        if training and has_started:
            fmt.learn(z, key)
        return Packed(payload, self.coded_with, change)

    def _change(self, key: Key) -> bytes:
        """What leads to the table that codes this tensor; from now on it is the one in use. Nothing where it stays."""
        if not change_due(self.table, key.step, key.microbatch, has_started=self.has_started):
            return b""
        fmt, table, master, entries = self._format, self.table, self._format.master, None
        if self.has_started:
            entries = select(
                table.policy,
                table.divisor,
                entries=table.entries,
                cursor=key.step * self._microbatches + key.microbatch,
                draw=key.generator(_SELECT),
                drift=master.numpy() - self.shipped,
                usage=fmt.usage.numpy(),
            )
        published = self.publish(master, key.step, key.microbatch, entries=entries)
        assert published is not None
        change, shipped = published
        fmt.use_table(shipped)
        return change

    def state_tensors(self, completed: int | None = None) -> dict[str, Tensor]:
        """Before anything was published there is nothing but what this end began with."""
        learned = self._format.state_tensors() if self.has_started else {}
        return learned | super().state_tensors(completed)

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        return self._format.state_layout(self._shape, completed) | super().state_layout(completed)

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> TableSnapshot | None:
        self._format.check_state_tensors(self._learned(tensors))
        return super().read_state(tensors, dictionary)

    def restore(self, held: TableSnapshot | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        self._format.load_state_tensors(self._learned_before if held is None else self._learned(tensors))
        shipped = super().restore(held, tensors)
        if shipped is not None:
            self._format.use_table(shipped)
        return shipped

    def _learned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without what is the dictionary's."""
        ours = super().state_layout(1)
        return {name: tensor for name, tensor in tensors.items() if name not in ours}


class CodebookReplica(TableReplica):
    """The end that unpacks."""

    def __init__(self, fmt: ByteFormat, table: LearnedTable, *, seed: int, boundary: int, device: torch.device) -> None:
        super().__init__(table, generation=0, seed=seed, boundary=boundary, dtype=torch.float32, device=device)
        self._format = fmt

    def _adopt(self, delta: Delta, table: np.ndarray) -> Tensor:
        after = super()._adopt(delta, table)
        self._format.use_table(after)
        return after

    def forget(self) -> Tensor | None:
        return self._use(super().forget())

    def restore(self, held: TableSnapshot | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self._use(super().restore(held, tensors))

    def _use(self, table: Tensor | None) -> Tensor | None:
        self._format.load_state_tensors({})  # then none is in use
        if table is not None:
            self._format.use_table(table)
        return table
