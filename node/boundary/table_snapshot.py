"""A learned table in a checkpoint, and giving it a version of the new generation after a rollback.

After a rollback the run is in a new generation, and both ends give the tables that they hold new versions with its
number, by the same arithmetic (`reissued`). Why not keep the old versions: a replayed step may be written to disk in
two generations, and two ends that restored one of each would hold the same table under two versions.

The digest of the training's state covers the table and the step in which it was made. The generation, and the table's
own digest, which covers the generation, are kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...protocol.dictionary import Publisher, Replica
from ...protocol.dictionary_delta import Delta, DictionarySpec, Version
from ...protocol.errors import Fault, LocalProtocolError

GENERATIONS = 2**64  # a generation is an unsigned number of 64 bits


class TableSnapshot(NamedTuple):
    """A table as both ends know it: which version it is, the digest of that, its numbers (entries, width)."""

    version: Version
    digest: bytes
    table: np.ndarray


def republished(spec: DictionarySpec, generation: int, held: TableSnapshot | None) -> tuple[Publisher, Delta | None]:
    """A publisher that has just shipped this very table, as of the same step, in `generation`; and how it did.

    The first change of a dictionary is a snapshot without rounding, so not a bit of the table changes.
    """
    publisher = Publisher(spec, generation)
    if held is None:
        return publisher, None
    return publisher, publisher.publish(held.table, step=held.version.step, microbatch=held.version.microbatch)


def replica_of(spec: DictionarySpec, generation: int, held: TableSnapshot | None) -> Replica:
    replica = Replica(spec, generation)
    _, delta = republished(spec, generation, held)
    if delta is not None:
        replica.apply(delta)
    return replica


def snapshot_of(replica: Replica) -> TableSnapshot:
    assert replica.version is not None
    return TableSnapshot(replica.version, replica.digest, replica.table)


class DictionaryEnd(Protocol):
    """One node's end of a dictionary, whichever end that is: what its checkpoint holds, and how it goes on from one.

    `completed` of the states: as it was after so many steps, whatever came since then (None: as it is now).
    """

    def state_tensors(self, completed: int | None = None) -> dict[str, Tensor]:
        """What training has changed, named by its place in the training and not by the generation."""
        ...

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps, as meta tensors."""
        ...

    def dictionary_state(self, completed: int | None = None) -> dict[str, Any]:
        """The version's name with its generation, and its digest: values that JSON can hold."""
        ...

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> TableSnapshot | None:
        """What `restore` takes, of tensors that fit `state_layout`. Raises LocalProtocolError or CodecError for what no
        such end can have held; changes nothing."""
        ...

    def restore(self, held: TableSnapshot | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Go on from there; the table in use (entries, width), on the device, None before there was one."""
        ...

    def set_generation(self, generation: int) -> None:
        """The run's new generation: later changes carry it, and so does the name of what is held. Both ends of the
        boundary
        have to be told, at the same step. Raises LocalProtocolError for an earlier one."""
        ...


def check_generation(spec: DictionarySpec, old: int, new: int) -> None:
    if not old <= new < GENERATIONS:
        what = f"table '{spec.name}' is in generation {old} and cannot go to {new}"
        raise LocalProtocolError(Fault.GENERATION, f"{what}; each rollback of a run raises its generation")


def snapshot_tensors(name: str, held: TableSnapshot | None) -> dict[str, Tensor]:
    if held is None:
        return {}
    return {name: torch.tensor(held.table), "version": torch.tensor(held.version[1:])}


def snapshot_layout(name: str, spec: DictionarySpec) -> dict[str, Tensor]:
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    table = torch.empty((spec.entries, spec.width), dtype=dtype, device="meta")
    return {name: table, "version": torch.empty(3, dtype=torch.int64, device="meta")}


def described(held: TableSnapshot | None) -> dict[str, Any]:
    return {"version": held and list(held.version), "digest": held.digest.hex() if held else ""}


def read_snapshot(
    name: str, spec: DictionarySpec, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]
) -> TableSnapshot | None:
    table = tensors[name].numpy() if name in tensors else np.empty((0, spec.width), spec.dtype)
    reader = Replica(spec, GENERATIONS - 1)  # checks names, shapes and the digest
    reader.load_state({**dictionary, "table": table})
    if reader.version is None:
        return None
    if (place := tensors["version"].tolist()) != [*reader.version[1:]]:
        what = f"the state of table '{spec.name}' is as of {place} and says {[*reader.version[1:]]}"
        raise LocalProtocolError(Fault.RESUME, f"{what} (step, microbatch, number)")
    return snapshot_of(reader)


def on_device(table: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(table.copy()).to(device)
