"""The receiver's half of a learned table's gradient, once a step: a message of its own, with error feedback.

It is a fresh, noisy quantity in each step: its difference to the last one is larger than itself, and a subset of its
rows points in another direction, so it is coded directly. It is rounded to nearest, because what rounding leaves out is
not lost but comes with the next step's (error feedback: Seide et al., Interspeech 2014; Karimireddy et al., arXiv
1901.09847).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compress.byte_format import ByteFormat, CodecError, Direction, Key, LearnedTable, Payload
from ...compress.registry import parse_format
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.messages import Kind, Message


def gradient_bytes(table: LearnedTable | None) -> int:
    """Body bytes of one PROJECTOR_GRADIENT message."""
    if table is None or table.gradient is None:
        return 0
    return parse_format(table.gradient).body_bytes((table.entries, table.width))


class GradientCoder:
    """Either end: the receiver of the table packs, its owner unpacks. `error`: what rounding took so far."""

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
        if len(message.dictionary):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"{where}: it brings a change of a dictionary")
        payload = Payload(codec=message.codec, header=message.codec_header, body=memoryview(message.body).toreadonly())
        try:
            return self._format.unpack(payload, shape=self._shape, dtype=self._dtype)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{where}: {error}") from None
