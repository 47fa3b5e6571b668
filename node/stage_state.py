"""A stage's state: everything that training changes, collected by name from the parts that hold it, copied, and
restored.

A state is two things. Tensors by name: weights, the optimizer's buffers, the codec's halves, their tables; their digest
is a function of training alone. And what a rollback changes: the versions of the dictionaries, kept beside the tensors
so that no digest sees them. Whatever comes from a disk or another machine is compared with the layout that this stage
has itself before one number is changed.

Why not `Module.state_dict`: it knows nothing of optimizers, of error feedback, of tables that belong to a boundary, nor
of what is frozen and need not be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.byte_format import CodecError
from ..compress.codec_interface import Decoder, Encoder
from ..protocol.errors import LocalProtocolError
from .averaging.averager import Averager
from .boundary.pack_memory import PackMemory
from .boundary.table_snapshot import DictionaryEnd, TableSnapshot
from .optim import StageOptimizer
from .weight_versions import WeightVersions


class StateError(RuntimeError):
    """A state that cannot be taken now, or that is not one of this stage; one line names what, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageSnapshot:
    """Everything that training has changed in one stage after `completed` steps; its memory is its own.

    tensors: on the CPU, contiguous, by name. dictionaries: what must not enter a digest of the state because a rollback
    changes it: for each (`ports` names them) {"version": [generation, step, microbatch, index] or None, "digest": hex}.
    """

    completed: int
    tensors: dict[str, Tensor]
    dictionaries: dict[str, Any]


class StageState:
    """All that training changes in stage `stage`: its parts, as they are, under names.

    trained: what the optimizer moves. tokens: what the codec knows of tokens, parts of which may be frozen. The halves
    of the two boundaries. ends: of the dictionaries at both, of which "table_above" and "table_below" are what those
    halves work with. memories: of byte formats, of what they packed. averager: of rounds with the other
    lanes, if there are any. versions: of weights and the table below, where gradients are applied late; then the
    `trained` are its masters.
    """

    def __init__(
        self,
        *,
        stage: int,
        trained: list[tuple[str, nn.Parameter]],
        optimizer: StageOptimizer,
        averager: Averager | None,
        tokens: nn.Module | None,
        receiver: Decoder | None,
        sender: Encoder | None,
        ends: dict[str, DictionaryEnd],
        memories: dict[str, PackMemory],
        versions: WeightVersions | None = None,
    ) -> None:
        self._stage = stage
        self._trained, self._optimizer, self._tokens = trained, optimizer, tokens
        self._averager = averager
        self._receiver, self._sender = receiver, sender
        self._ends, self._memories = ends, memories
        self._versions = versions

    def tensors(self, completed: int) -> dict[str, Tensor]:
        """The parts themselves, not copies, by name; meaningful between steps, after `completed` of them."""
        parts = {name: half.state_tensors() for name, half in self._halves.items()}
        parts |= {name: end.state_tensors(completed) for name, end in self._ends.items()}
        parts |= {name: memory.state_tensors() for name, memory in self._memories.items()}
        rounds = self._averager.state_tensors() if self._averager else {}
        late: dict[str, Tensor] = {}
        if self._versions:
            late = self._versions.state_tensors(completed)
            parts[_TABLES] = self._versions.table_state(completed)
        return self._model() | late | _joined(parts | {"tokens": self._frozen_tokens()}) | _of_rounds(rounds)

    def layout(self, completed: int, *, unsent: Collection[str] = ()) -> dict[str, Tensor]:
        """What `tensors` has after `completed` steps: names, shapes and dtypes; the numbers mean nothing. unsent: the
        dictionaries of boundaries that were made after some steps, of which nothing was sent yet."""
        all_parts = self._halves | self._ends | self._memories
        parts = {name: part.state_layout(0 if name in unsent else completed) for name, part in all_parts.items()}
        rounds = self._averager.state_layout(completed) if self._averager else {}
        late: dict[str, Tensor] = {}
        if self._versions:
            late = self._versions.state_layout()
            parts[_TABLES] = self._versions.table_layout()
        return self._model() | late | _joined(parts | {"tokens": self._frozen_tokens()}) | _of_rounds(rounds)

    def untrained(self, completed: int) -> StageSnapshot:
        """The state after `completed` steps in which this stage, as it was built, had no part: its moments are zero,
        what its boundaries gathered too, and none of its dictionaries was sent."""
        return self.moved(0, completed)

    def moved(self, completed: int, to: int) -> StageSnapshot:
        """The state after `completed` steps, as it is when `to` are without more training: what is gathered over some
        steps is there or not as the number of steps says, empty where it was not."""
        own = self.tensors(completed)
        dictionaries = {name: end.dictionary_state(completed) for name, end in self._ends.items()}
        unsent = [name for name, held in dictionaries.items() if held["version"] is None]
        tensors = {
            name: own[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            if name in own
            else torch.zeros(like.shape, dtype=like.dtype)
            for name, like in self.layout(to, unsent=unsent).items()
        }
        return StageSnapshot(completed=to, tensors=tensors, dictionaries=dictionaries)

    def snapshot(self, completed: int) -> StageSnapshot:
        """A copy after `completed` steps."""
        dictionaries = {name: end.dictionary_state(completed) for name, end in self._ends.items()}
        tensors = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in self.tensors(completed).items()
        }
        return StageSnapshot(completed=completed, tensors=tensors, dictionaries=dictionaries)

    def restore(self, snapshot: StageSnapshot) -> None:
        """Put `snapshot` back into the parts. Raises StateError, before anything is changed, for one that does not
        fit."""
        self._check(snapshot)
        held = self._read_tables(snapshot)
        tensors = snapshot.tensors
        with torch.no_grad():
            for name, parameter in self._trained:
                parameter.grad = None
                parameter.copy_(tensors[f"weight/{name}"])
            for name, frozen in self._frozen_tokens().items():
                frozen.copy_(tensors[f"codec/tokens/{name}"])
        self._optimizer.load_state_tensors({name: tensors[name] for name in self._optimizer.state_tensors()})
        if self._averager:
            names = {name for name in tensors if name.startswith(_ROUNDS)}
            rounds = {name.removeprefix(_ROUNDS): tensors[name] for name in names}
            self._averager.load_state_tensors(rounds, snapshot.completed)
        tables = {name: end.restore(held[name], _part(tensors, name)) for name, end in self._ends.items()}
        for name, memory in self._memories.items():
            memory.restore(_part(tensors, name))
        if self._receiver:
            self._receiver.load_state_tensors(_part(tensors, "receiver"), tables.get("table_above"))
        if self._sender:
            self._sender.load_state_tensors(_part(tensors, "sender"), tables.get("table_below"))
        if self._versions:  # last: they begin with what the others have now
            self._versions.load_state_tensors(snapshot.completed, tensors, _part(tensors, _TABLES))

    def _model(self) -> dict[str, Tensor]:
        weights = {f"weight/{name}": parameter.detach() for name, parameter in self._trained}
        return {**weights, **self._optimizer.state_tensors()}

    def _frozen_tokens(self) -> dict[str, Tensor]:
        """What is frozen but drawn by this machine's own arithmetic."""
        if self._tokens is None:
            return {}
        trained = dict(self._tokens.named_parameters())
        return {name: tensor for name, tensor in self._tokens.state_dict().items() if name not in trained}

    @property
    def _halves(self) -> dict[str, Decoder | Encoder]:
        halves = {"receiver": self._receiver, "sender": self._sender}
        return {name: half for name, half in halves.items() if half is not None}

    def _check(self, snapshot: StageSnapshot) -> None:
        where = f"stage {self._stage} after {snapshot.completed} steps"
        remedy = "restore a checkpoint of the same stage, run.toml and version"
        if snapshot.completed < 0:
            raise StateError(f"stage {self._stage}: a state after {snapshot.completed} steps cannot be; {remedy}")
        said = {name: held for name, held in snapshot.dictionaries.items() if isinstance(held, dict)}
        unsent = [name for name, held in said.items() if held.get("version", "") is None]
        layout, found = self.layout(snapshot.completed, unsent=unsent), snapshot.tensors
        if missing := sorted(layout.keys() - found.keys()):
            wanted = _shown(layout[missing[0]])
            raise StateError(f"{where}: the state lacks '{missing[0]}', wanted {wanted}; {remedy}")
        if foreign := sorted(found.keys() - layout.keys()):
            raise StateError(
                f"{where}: the state has '{foreign[0]}' ({_shown(found[foreign[0]])}), wanted no such; {remedy}"
            )
        for name, wanted in layout.items():
            if (found[name].shape, found[name].dtype) != (wanted.shape, wanted.dtype):
                raise StateError(f"{where}: '{name}' is {_shown(found[name])}, wanted {_shown(wanted)}; {remedy}")

    def _read_tables(self, snapshot: StageSnapshot) -> dict[str, TableSnapshot | None]:
        ends = self._ends
        if sorted(snapshot.dictionaries) != sorted(ends):
            raise StateError(
                f"stage {self._stage}: the state has the dictionaries {sorted(snapshot.dictionaries)}, wanted "
                f"{sorted(ends)}; restore a checkpoint of the same stage and run.toml"
            )
        try:
            for name, memory in self._memories.items():
                memory.check(_part(snapshot.tensors, name))
            return {
                name: end.read_state(_part(snapshot.tensors, name), snapshot.dictionaries[name])
                for name, end in ends.items()
            }
        except (LocalProtocolError, CodecError, TypeError) as error:
            reason = f"its dictionary is no table: {error}" if isinstance(error, TypeError) else str(error)
            raise StateError(f"stage {self._stage}: {reason}; restore an older checkpoint") from None


def sha256_of(tensors: dict[str, Tensor]) -> str:
    """Digest of names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_ROUNDS = "lanes/"
_TABLES = "table_versions_below"


def _of_rounds(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{_ROUNDS}{name}": tensor for name, tensor in tensors.items()}


def _joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"codec/{owner}/{name}": tensor for owner, part in parts.items() for name, tensor in part.items()}


def _part(tensors: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    prefix = f"codec/{owner}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
