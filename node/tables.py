"""Both ends of a boundary's learned table: codec tensors on one side, the dictionary protocol on the other.

`TableSender` turns the sender's master into versioned changes and says what the receiver holds once they have arrived;
`TableReceiver` follows them, and returns the receiver's half of the gradient. `compress` knows nothing of versions and
`protocol` nothing of tensors; this is where they meet. Tables are numpy arrays on the CPU, and each version that
reaches a device is a fresh copy: the backward pass may still need the one before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compress.boundary import ByteFormat, CodecError, Direction, Key, LearnedTable, Payload
from ..compress.registry import parse_format
from ..protocol.dictionary import (
    DictionarySpec,
    Mirror,
    Publisher,
    Version,
    decode_delta,
    encode_delta,
)
from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.messages import Kind, Message


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


class TableSender:
    """The owner's side of one table."""

    def __init__(
        self, table: LearnedTable, *, epoch: int, seed: int, boundary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.table = table
        self._publisher = Publisher(dictionary_of(table, dtype), epoch)
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

    def state_tensors(self) -> dict[str, Tensor]:
        if self._publisher.version is None:
            return {}
        return {"shipped": torch.tensor(self._publisher.shipped), "version": torch.tensor(self._publisher.version)}


class TableReceiver:
    """The follower's side: the table as it arrived, and the error of what it sent back."""

    def __init__(
        self, table: LearnedTable, *, epoch: int, seed: int, boundary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.table = table
        self.spec = dictionary_of(table, dtype)
        self._epoch, self._device = epoch, device
        self._coder = _GradientCoder(table, seed=seed, boundary=boundary, dtype=dtype)
        self.forget()

    def forget(self) -> None:
        """What came so far was another process's, and nothing of it was used."""
        self._mirror = Mirror(self.spec, self._epoch)

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
        return _on_device(self._mirror.apply(delta), self._device)

    def pack_gradient(self, gradient: Tensor, step: int) -> Message:
        """The PROJECTOR_GRADIENT message of a step; what rounding takes from it is in the next one."""
        return self._coder.pack(gradient, step)

    def state_tensors(self) -> dict[str, Tensor]:
        tensors = {"error": self._coder.error} if self.table.gradient else {}
        if self._mirror.version is not None:
            tensors |= {"mirror": torch.tensor(self._mirror.table), "version": torch.tensor(self._mirror.version)}
        return tensors


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


def _on_device(table: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(table.copy()).to(device)
