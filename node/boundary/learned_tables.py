"""Both ends of a learned table: codec tensors on one side, the dictionary protocol on the other.

`TableOwner` turns the owner's master into versioned changes, and gives the table that the other end holds after them;
`TableReplica` follows them. `compress` knows nothing of versions and `protocol` nothing of tensors; this is where they
meet. Tables are numpy arrays on the CPU, and each version that reaches a device is a fresh copy: the backward pass may
still need the one before.

Messages are unpacked ahead of the stage's compute, so a receiver's replica may know the next step's table while the
stage still finishes this one, and that of the step after it where steps overlap. A checkpoint must not depend on that:
the receiver keeps the last version of each of as many earlier steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress.byte_format import LearnedTable
from ...protocol.dictionary import Publisher
from ...protocol.dictionary_delta import Delta, DictionarySpec, Version, decode_delta, encode_delta
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.messages import Kind, Message
from ...protocol.step_orders import VERSIONS
from .projector_gradient import GradientCoder
from .table_snapshot import (
    TableSnapshot,
    check_generation,
    described,
    on_device,
    read_snapshot,
    replica_of,
    republished,
    snapshot_layout,
    snapshot_of,
    snapshot_tensors,
)


def dictionary_of(table: LearnedTable, dtype: torch.dtype) -> DictionarySpec:
    """What the dictionary protocol needs to know of a codec's table. Codebooks are float32 whatever is trained."""
    return DictionarySpec(
        name=table.name,
        entries=table.entries,
        width=table.width,
        dtype="float64" if dtype is torch.float64 and not table.streamed else "float32",
        encoding=table.delta,  # pyright: ignore[reportArgumentType] (its constructor checks the name)
    )


def gradient_due(table: LearnedTable | None, step: int) -> bool:
    """Whether the receiver's half of the gradient crosses at the end of `step`."""
    return table is not None and table.gradient is not None and moves_after(table, step)


def moves_after(table: LearnedTable, step: int) -> bool:
    """Whether the table takes a step at the end of `step`."""
    return table.every > 0 and (step + 1) % table.every == 0


def change_due(table: LearnedTable, step: int, microbatch: int, *, has_started: bool) -> bool:
    """Whether this tensor of training brings a change of the table."""
    if table.streamed:
        return not has_started or table.every == 1 or (microbatch == 0 and step % table.every == 0)
    if microbatch or not has_started:
        return microbatch == 0
    shares_the_first = 0 < step <= table.delay  # nothing was learned for it
    return not shares_the_first and moves_after(table, max(step - table.delay, 0) - 1)


class TableOwner:
    """The owner's end of one table."""

    def __init__(
        self,
        table: LearnedTable,
        *,
        generation: int,
        seed: int,
        boundary: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.table = table
        self.spec = dictionary_of(table, dtype)
        self._publisher = Publisher(self.spec, generation)
        self._coder = GradientCoder(table, seed=seed, boundary=boundary, dtype=dtype)
        self._device = device
        self._first: np.ndarray | None = None  # published first, in the place of the master

    def begin_with(self, table: Tensor) -> None:
        """Have the other end begin with `table` (entries, width), which an earlier run had shipped, and not with what
        the master is by now: then the first tensor is coded as that run would have coded it."""
        self._first = table.to("cpu", torch.float64 if self.spec.dtype == "float64" else torch.float32).numpy().copy()

    @property
    def has_started(self) -> bool:
        return self._publisher.version is not None

    @property
    def version(self) -> Version | None:
        """Of what was published last."""
        return self._publisher.version

    @property
    def shipped(self) -> np.ndarray:
        """What the other end will hold (entries, width)."""
        return self._publisher.shipped

    def publish(
        self, master: Tensor, step: int, microbatch: int = 0, *, entries: np.ndarray | None = None
    ) -> tuple[bytes, Tensor] | None:
        """The change that goes with this tensor of training, of those entries (None: all), and the table as the other
        end will have it; None where the table rests."""
        if not change_due(self.table, step, microbatch, has_started=self.has_started):
            return None
        whole = master.cpu().numpy() if self._first is None or self.has_started else self._first
        delta = self._publisher.publish(whole, step=step, microbatch=microbatch, entries=entries)
        return encode_delta(delta), on_device(self._publisher.shipped, self._device)

    @property
    def coded_with(self) -> dict[str, Any]:
        """For the header of each tensor message: which version the table has. Nothing, before any was published."""
        version = self._publisher.version
        return {} if version is None else {self.table.name: [*version, self._publisher.digest]}

    def unpack_gradient(self, message: Message) -> Tensor:
        """The receiver's half of the gradient (entries, width). Raises RemoteProtocolError."""
        return self._coder.unpack(message).to(self._device)

    def set_generation(self, generation: int) -> None:
        check_generation(self.spec, self._publisher.generation, generation)
        if generation > self._publisher.generation:
            self._publisher, _ = republished(self.spec, generation, self._held)

    @property
    def _held(self) -> TableSnapshot | None:
        book = self._publisher
        return None if book.version is None else TableSnapshot(book.version, book.digest, book.table)

    def state_tensors(self, completed: int | None = None) -> dict[str, Tensor]:
        del completed  # nothing is published ahead of the step under way
        return snapshot_tensors("shipped", self._held)

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        return snapshot_layout("shipped", self.spec) if completed else {}

    def dictionary_state(self, completed: int | None = None) -> dict[str, Any]:
        del completed
        return described(self._held)

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> TableSnapshot | None:
        return read_snapshot("shipped", self.spec, tensors, dictionary)

    def restore(self, held: TableSnapshot | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        del tensors
        generation = max(self._publisher.generation, held.version.generation if held else 0)
        self._publisher, _ = republished(self.spec, generation, held)
        return None if held is None else on_device(held.table, self._device)


class TableReplica:
    """The follower's end: the table as it arrived, and the error of what it sent back."""

    def __init__(
        self,
        table: LearnedTable,
        *,
        generation: int,
        seed: int,
        boundary: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.table = table
        self.spec = dictionary_of(table, dtype)
        self._generation, self._device = generation, device
        self._coder = GradientCoder(table, seed=seed, boundary=boundary, dtype=dtype)
        self._start_from(None)

    def _start_from(self, held: TableSnapshot | None) -> None:
        self._origin = held
        self._replica = replica_of(self.spec, self._generation, held)
        # Replaced as a whole and never changed: one thread unpacks, another one asks for the state.
        self._latest: tuple[TableSnapshot, ...] = () if held is None else (snapshot_of(self._replica),)

    @property
    def version(self) -> Version | None:
        """Of what arrived last."""
        latest = self._latest
        return latest[-1].version if latest else None

    def forget(self) -> Tensor | None:
        """What came since the last `restore`, or ever, was another process's, and nothing of it was used. The table as
        it was then."""
        self._start_from(self._origin)
        return None if self._origin is None else on_device(self._origin.table, self._device)

    def set_generation(self, generation: int) -> None:
        check_generation(self.spec, self._generation, generation)
        if generation > self._generation:
            self._generation = generation
            self._start_from(self._latest[-1] if self._latest else None)

    def follow(self, message: Message, change: bytes | None) -> Callable[[], Tensor | None]:
        """What this message does to the table, if it brings a `change` of it: to be called once all that the message
        brings was looked at; gives the new table (entries, width). Raises RemoteProtocolError, by name, for a change
        that does not follow, for a tensor that was coded with another version, and for one that lacks its change."""
        version, digest = _named_version(message, name := self.table.name)
        training, place = message.kind in (Kind.ACTIVATION, Kind.GRADIENT), (message.step, message.microbatch)
        due = training and change_due(self.table, *place, has_started=self._replica.version is not None)
        if change is None:
            self._replica.check(version, digest)
            if due:
                what = f"{message.kind.name.lower()} of step {message.step}, microbatch {message.microbatch}"
                raise RemoteProtocolError(Fault.UNEXPECTED, f"{what} brings no change of '{name}', where one is due")
            return lambda: None
        if not training:
            kind = message.kind.name.lower()
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a change of '{name}' with an {kind} message")
        delta = decode_delta(change, self.spec)
        if delta.version[1:] != (*place, 0) or not due:
            what = f"a change of '{name}' to {delta.version} with microbatch {message.microbatch} of step "
            raise RemoteProtocolError(Fault.UNEXPECTED, f"{what}{message.step}, where none is due")
        if (delta.version, delta.digest) != (version, digest):
            raise RemoteProtocolError(
                Fault.PAYLOAD, f"a tensor coded with {version} of '{name}' brings the change to {delta.version}"
            )
        return partial(self._adopt, delta, self._replica.after(delta))

    def _adopt(self, delta: Delta, table: np.ndarray) -> Tensor:
        self._replica.adopt(delta, table)
        earlier = [held for held in self._latest if held.version.step < delta.version.step]
        self._latest = (*earlier[-VERSIONS:], snapshot_of(self._replica))
        return on_device(table, self._device)

    def pack_gradient(self, gradient: Tensor, step: int) -> Message:
        """The PROJECTOR_GRADIENT message of a step; what rounding takes from it is in the next one."""
        return self._coder.pack(gradient, step)

    def _held_after(self, completed: int | None) -> TableSnapshot | None:
        known = [held for held in self._latest if completed is None or held.version.step < completed]
        return known[-1] if known else None

    def state_tensors(self, completed: int | None = None) -> dict[str, Tensor]:
        error = {"error": self._coder.error} if self.table.gradient else {}
        return error | snapshot_tensors("replica", self._held_after(completed))

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        error = {"error": self._coder.error.to("meta")} if self.table.gradient else {}
        return error | (snapshot_layout("replica", self.spec) if completed else {})

    def dictionary_state(self, completed: int | None = None) -> dict[str, Any]:
        return described(self._held_after(completed))

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> TableSnapshot | None:
        return read_snapshot("replica", self.spec, tensors, dictionary)

    def restore(self, held: TableSnapshot | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        self._generation = max(self._generation, held.version.generation if held else 0)
        self._start_from(held)
        if self.table.gradient:
            self._coder.error = tensors["error"].clone()
        return None if held is None else on_device(held.table, self._device)


def _named_version(message: Message, name: str) -> tuple[Version, bytes]:
    named = message.codec_header.get(name)
    match named:
        case [int(generation), int(step), int(microbatch), int(index), bytes(digest)]:
            return Version(generation, step, microbatch, index), digest
        case _:
            raise RemoteProtocolError(
                Fault.PAYLOAD,
                f"{message.kind.name.lower()} of step {message.step}, microbatch {message.microbatch} names no version "
                f"of '{name}' that it was coded with",
            )
