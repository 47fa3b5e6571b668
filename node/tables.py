"""Both ends of a boundary's learned table: codec tensors on one side, the dictionary protocol on the other.

`TableSender` turns the sender's master into versioned changes and says what the receiver holds once they have arrived;
`TableReceiver` follows them, and returns the receiver's half of the gradient. `compress` knows nothing of versions and
`protocol` nothing of tensors; this is where they meet. Tables are numpy arrays on the CPU, and each version that
reaches a device is a fresh copy: the backward pass may still need the one before.

Messages are unpacked ahead of the stage's compute and packed behind it, so a receiver's mirror may know the next step's
table while the stage still finishes this one, and a gradient that was taken may not be packed yet. A checkpoint must
depend on neither: the receiver keeps the version before its newest one, and packs what it owes before it tells its
state.

A run that was rewound counts a new epoch, and both ends then name the tables that they hold with it, by the same
arithmetic (`_reissued`). Why not leave the old names: a replayed step may be written to disk in two epochs, and ends
that restored one of each would hold the same table under two names.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compress.boundary import ByteFormat, CodecError, Direction, Key, LearnedTable, Payload
from ..compress.registry import parse_format
from ..protocol.delta import Delta, DictionarySpec, Version, decode_delta, encode_delta
from ..protocol.dictionary import Mirror, Publisher
from ..protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from ..protocol.messages import Kind, Message

_EPOCHS = 2**64  # an epoch is an unsigned number of 64 bits


def dictionary_of(table: LearnedTable, dtype: torch.dtype) -> DictionarySpec:
    """What the dictionary protocol needs to know of a codec's table."""
    return DictionarySpec(
        name=table.name,
        entries=table.entries,
        width=table.width,
        dtype="float64" if dtype is torch.float64 else "float32",
        encoding=table.delta,  # pyright: ignore[reportArgumentType] (its constructor checks the name)
    )


def gradient_due(table: LearnedTable | None, step: int) -> bool:
    """Whether the receiver's half of the gradient crosses at the end of `step`."""
    return table is not None and table.gradient is not None and moves_after(table, step)


def moves_after(table: LearnedTable, step: int) -> bool:
    """Whether the table takes a step at the end of `step`."""
    return table.every > 0 and (step + 1) % table.every == 0


class Held(NamedTuple):
    """A table as both ends know it: which version it is, the digest of that, its numbers (entries, width)."""

    version: Version
    digest: bytes
    table: np.ndarray


class TableSender:
    """The owner's side of one table."""

    def __init__(
        self, table: LearnedTable, *, epoch: int, seed: int, boundary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.table = table
        self.spec = dictionary_of(table, dtype)
        self._publisher = Publisher(self.spec, epoch)
        self._coder = _GradientCoder(table, seed=seed, boundary=boundary, dtype=dtype)
        self._device = device

    def publish(self, master: Tensor, step: int) -> tuple[bytes, Tensor] | None:
        """At a step's start: the change that goes with its first activation, and the table as the receiver will have
        it; None where the table rests."""
        first = self._publisher.version is None
        if not first and not moves_after(self.table, step - 1):
            return None
        delta = self._publisher.publish(master.cpu().numpy(), step=step, microbatch=0)
        return encode_delta(delta), _on_device(self._publisher.shipped, self._device)

    @property
    def coded_with(self) -> dict[str, Any]:
        """For the header of each tensor message: which version the table has."""
        return {self.table.name: [*self._publisher.version, self._publisher.digest]}  # pyright: ignore

    def unpack_gradient(self, message: Message) -> Tensor:
        """The receiver's half of the gradient (entries, width). Raises RemoteProtocolError."""
        return self._coder.unpack(message).to(self._device)

    def set_epoch(self, epoch: int) -> None:
        """The run's new epoch: later changes carry it, and so does the name of what is held. Both ends of the boundary
        have to be told, at the same step. Raises LocalProtocolError for an earlier one."""
        _check_epoch(self.spec, self._publisher.epoch, epoch)
        if epoch > self._publisher.epoch:
            self._publisher, _ = _reissued(self.spec, epoch, self._held)

    @property
    def _held(self) -> Held | None:
        book = self._publisher
        return None if book.version is None else Held(book.version, book.digest, book.table)

    def state_tensors(self) -> dict[str, Tensor]:
        """What both ends agree on, by the place in the training and not by the epoch: see `dictionary_state`."""
        return _tensors("shipped", self._held)

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps, as meta tensors."""
        return _layout("shipped", self.spec) if completed else {}

    def dictionary_state(self) -> dict[str, Any]:
        """The version's name with its epoch, and its digest: values that JSON can hold."""
        return _described(self._held)

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> Held | None:
        """What `restore` takes, of tensors that fit `state_layout`. Raises LocalProtocolError; changes nothing."""
        return _read("shipped", self.spec, tensors, dictionary)

    def restore(self, held: Held | None) -> Tensor | None:
        """Go on from there; the table that codes (entries, width), on the device, None before the first step."""
        epoch = max(self._publisher.epoch, held.version.epoch if held else 0)
        self._publisher, _ = _reissued(self.spec, epoch, held)
        return None if held is None else _on_device(held.table, self._device)


class TableReceiver:
    """The follower's side: the table as it arrived, and the error of what it sent back."""

    def __init__(
        self, table: LearnedTable, *, epoch: int, seed: int, boundary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.table = table
        self.spec = dictionary_of(table, dtype)
        self._epoch, self._device = epoch, device
        self._coder = _GradientCoder(table, seed=seed, boundary=boundary, dtype=dtype)
        self._lock = threading.Lock()  # of the two below: one thread packs, another one asks for the state
        self._owed: tuple[Tensor, int] | None = None  # a gradient that was taken and is not packed yet, its step
        self._packed: Message | None = None
        self._start_from(None)

    def _start_from(self, held: Held | None) -> None:
        self._origin = held
        self._mirror = _mirroring(self.spec, self._epoch, held)
        # Replaced as a whole and never changed: one thread unpacks, another one asks for the state.
        self._latest: tuple[Held, ...] = () if held is None else (_held(self._mirror),)

    def forget(self) -> None:
        """What came since the last `restore`, or ever, was another process's, and nothing of it was used."""
        self._start_from(self._origin)

    def set_epoch(self, epoch: int) -> None:
        """The run's new epoch: only changes that carry it are followed from now on, and what is held is named with it.
        Both ends of the boundary have to be told, at the same step. Raises LocalProtocolError for an earlier one."""
        _check_epoch(self.spec, self._epoch, epoch)
        if epoch > self._epoch:
            self._epoch = epoch
            self._start_from(self._latest[-1] if self._latest else None)

    def follow(self, message: Message) -> Tensor | None:
        """The new table (entries, width) if this message brings one. Raises RemoteProtocolError, by name, for a change
        that does not follow, and for a tensor that was coded with another version than the one that is here."""
        version, digest = _named_version(message, self.table.name)
        if not len(message.dictionary):
            self._mirror.check(version, digest)
            return None
        if message.kind is not Kind.ACTIVATION:
            what = f"a change of '{self.table.name}' with a {message.kind.name.lower()} message"
            raise RemoteProtocolError(Fault.UNEXPECTED, what)
        delta = decode_delta(bytes(message.dictionary), self.spec)
        due = self._mirror.version is None or moves_after(self.table, message.step - 1)
        if delta.version[1:] != (message.step, message.microbatch, 0) or message.microbatch or not due:
            what = f"a change of '{self.table.name}' to {delta.version} with microbatch {message.microbatch} of step "
            raise RemoteProtocolError(Fault.UNEXPECTED, f"{what}{message.step}, where none is due")
        if (delta.version, delta.digest) != (version, digest):  # seen before anything is changed
            raise RemoteProtocolError(
                Fault.PAYLOAD,
                f"a tensor coded with {version} of '{self.table.name}' brings the change to {delta.version}",
            )
        after = self._mirror.apply(delta)
        self._latest = (*self._latest[-1:], _held(self._mirror))
        return _on_device(after, self._device)

    def owe(self, gradient: Tensor, step: int) -> None:
        """`gradient` was taken from the receiver; `pack_gradient` will follow, now or when the link has room."""
        with self._lock:
            self._owed, self._packed = (gradient, step), None

    def pack_gradient(self, gradient: Tensor, step: int) -> Message:
        """The PROJECTOR_GRADIENT message of a step; what rounding takes from it is in the next one."""
        with self._lock:
            packed, self._owed, self._packed = self._packed, None, None
            return packed if packed and packed.step == step else self._coder.pack(gradient, step)

    def _settled_error(self) -> Tensor:
        """What rounding took, after all that was taken: whoever comes first packs, and the other finds it done."""
        with self._lock:
            if self._owed:
                self._packed, self._owed = self._coder.pack(*self._owed), None
            return self._coder.error

    def _held_after(self, completed: int | None) -> Held | None:
        known = [held for held in self._latest if completed is None or held.version.step < completed]
        return known[-1] if known else None

    def state_tensors(self, completed: int | None = None) -> dict[str, Tensor]:
        """The mirror as it was after `completed` steps, whatever came since then (None: as it is now), named by its
        place in the training and not by the epoch; and what rounding took from gradients so far."""
        error = {"error": self._settled_error()} if self.table.gradient else {}
        return error | _tensors("mirror", self._held_after(completed))

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps, as meta tensors."""
        error = {"error": self._coder.error.to("meta")} if self.table.gradient else {}
        return error | (_layout("mirror", self.spec) if completed else {})

    def dictionary_state(self, completed: int | None = None) -> dict[str, Any]:
        """The version's name with its epoch, and its digest: values that JSON can hold."""
        return _described(self._held_after(completed))

    def read_state(self, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> Held | None:
        """What `restore` takes, of tensors that fit `state_layout`. Raises LocalProtocolError; changes nothing."""
        return _read("mirror", self.spec, tensors, dictionary)

    def restore(self, held: Held | None, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Go on from there; the table to decode with (entries, width), on the device, None before the first step."""
        self._epoch = max(self._epoch, held.version.epoch if held else 0)
        self._start_from(held)
        with self._lock:
            self._owed = self._packed = None
            if self.table.gradient:
                self._coder.error = tensors["error"].clone()
        return None if held is None else _on_device(held.table, self._device)


class _GradientCoder:
    """The receiver's half of the gradient, coded directly with error feedback.

    A fresh, noisy quantity each step: the difference to the last one is larger than itself, and a subset of its rows
    points elsewhere. Rounding to nearest, because the error is not lost but comes with the next step's.
    """

    def __init__(self, table: LearnedTable, *, seed: int, boundary: int, dtype: torch.dtype) -> None:
        self._shape = (table.entries, table.width)
        self._seed, self._boundary, self._dtype = seed, boundary, dtype
        self._format: ByteFormat | None = parse_format(table.gradient) if table.gradient else None
        self.error = torch.zeros(self._shape if table.gradient else (0, 0), dtype=dtype)

    def pack(self, gradient: Tensor, step: int) -> Message:
        assert self._format
        wanted = self.error + gradient.cpu()
        # FORWARD rounds to nearest; the direction of travel is in the message's kind.
        key = Key(seed=self._seed, boundary=self._boundary, direction=Direction.FORWARD, step=step, microbatch=0)
        try:
            payload = self._format.pack(wanted, key)
        except CodecError as error:
            raise CodecError(f"projector gradient of step {step} at boundary {self._boundary}: {error}") from None
        self.error = wanted - self._format.unpack(payload, shape=self._shape, dtype=self._dtype)
        return Message(
            kind=Kind.PROJECTOR_GRADIENT,
            step=step,
            microbatch=0,
            codec=payload.codec,
            codec_header=payload.header,
            body=payload.body,
        )

    def unpack(self, message: Message) -> Tensor:
        where = f"projector gradient of step {message.step} at boundary {self._boundary}"
        if self._format is None:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"{where}: none was agreed")
        payload = Payload(codec=message.codec, header=message.codec_header, body=bytes(message.body))
        try:
            return self._format.unpack(payload, shape=self._shape, dtype=self._dtype)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{where}: {error}") from None


def gradient_bytes(table: LearnedTable | None) -> int:
    """Body bytes of one PROJECTOR_GRADIENT message."""
    if table is None or table.gradient is None:
        return 0
    return parse_format(table.gradient).body_bytes((table.entries, table.width))


def _named_version(message: Message, name: str) -> tuple[Version, bytes]:
    named = message.codec_header.get(name)
    match named:
        case [int(epoch), int(step), int(microbatch), int(index), bytes(digest)]:
            return Version(epoch, step, microbatch, index), digest
        case _:
            raise RemoteProtocolError(
                Fault.PAYLOAD,
                f"{message.kind.name.lower()} of step {message.step}, microbatch {message.microbatch} names no version "
                f"of '{name}' that it was coded with",
            )


def _reissued(spec: DictionarySpec, epoch: int, held: Held | None) -> tuple[Publisher, Delta | None]:
    """A publisher that has just shipped this very table, as of the same step, in `epoch`; and how it did.

    The first change of a dictionary is a snapshot without rounding, so not a bit of the table changes.
    """
    publisher = Publisher(spec, epoch)
    if held is None:
        return publisher, None
    return publisher, publisher.publish(held.table, step=held.version.step, microbatch=held.version.microbatch)


def _mirroring(spec: DictionarySpec, epoch: int, held: Held | None) -> Mirror:
    mirror = Mirror(spec, epoch)
    _, delta = _reissued(spec, epoch, held)
    if delta is not None:
        mirror.apply(delta)
    return mirror


def _held(mirror: Mirror) -> Held:
    assert mirror.version is not None
    return Held(mirror.version, mirror.digest, mirror.table)


def _check_epoch(spec: DictionarySpec, old: int, new: int) -> None:
    if not old <= new < _EPOCHS:
        what = f"table '{spec.name}' is in epoch {old} and cannot go to {new}"
        raise LocalProtocolError(Fault.EPOCH, f"{what}; each rewind of a run raises its epoch")


def _tensors(name: str, held: Held | None) -> dict[str, Tensor]:
    if held is None:
        return {}
    return {name: torch.tensor(held.table), "version": torch.tensor(held.version[1:])}


def _layout(name: str, spec: DictionarySpec) -> dict[str, Tensor]:
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    table = torch.empty((spec.entries, spec.width), dtype=dtype, device="meta")
    return {name: table, "version": torch.empty(3, dtype=torch.int64, device="meta")}


def _described(held: Held | None) -> dict[str, Any]:
    return {"version": held and list(held.version), "digest": held.digest.hex() if held else ""}


def _read(name: str, spec: DictionarySpec, tensors: Mapping[str, Tensor], dictionary: Mapping[str, Any]) -> Held | None:
    table = tensors[name].numpy() if name in tensors else np.empty((0, spec.width), spec.dtype)
    reader = Mirror(spec, _EPOCHS - 1)  # checks names, shapes and the digest
    reader.load_state({**dictionary, "table": table})
    if reader.version is None:
        return None
    if (place := tensors["version"].tolist()) != [*reader.version[1:]]:
        what = f"the state of table '{spec.name}' is as of {place} and says {[*reader.version[1:]]}"
        raise LocalProtocolError(Fault.RESUME, f"{what} (step, microbatch, number)")
    return _held(reader)


def _on_device(table: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(table.copy()).to(device)
