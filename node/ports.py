"""Between a stage's tensors and its links' messages: each node's own half of the codec at each of its boundaries.

`DownstreamPort` is the sender's half of the boundary below this stage (it encodes activations and decodes gradients),
`UpstreamPort` the receiver's half of the boundary above (the reverse). They are separate classes because no process
may hold both halves of a boundary: the receiver knows only what arrived in a message.

What a message contains is a function of (seed, boundary, direction, step, microbatch) and the tensor, never of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..compress.bits import bit_width, pack_bits, packed_bytes, unpack_bits
from ..compress.boundary import (
    BoundaryCodec,
    BoundaryContext,
    ByteFormat,
    CodecError,
    Direction,
    Key,
    LearnedTable,
    Payload,
)
from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.messages import Kind, Limits, Message
from .tables import TableReceiver, TableSender, dictionary_of, gradient_bytes

# Evaluation happens at a step too; its random keys (codecs that use any) must not repeat those of training.
EVALUATION_MICROBATCH_OFFSET = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryShape:
    """What both ends know of a boundary from the configuration alone."""

    boundary: int
    seed: int
    microbatch_size: int
    sequence_length: int
    wire_width: int
    vocab_size: int
    forward: ByteFormat
    backward: ByteFormat
    table: LearnedTable | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, codec: BoundaryCodec, context: BoundaryContext, *, microbatch_size: int, sequence_length: int
    ) -> BoundaryShape:
        return cls(
            boundary=context.boundary,
            seed=context.seed,
            microbatch_size=microbatch_size,
            sequence_length=sequence_length,
            wire_width=codec.codec.wire_width(context.width),
            vocab_size=context.vocab_size,
            forward=codec.forward,
            backward=codec.backward,
            table=codec.codec.table(context.width),
            dtype=context.dtype,
        )

    @property
    def z_shape(self) -> tuple[int, int, int]:
        return (self.microbatch_size, self.sequence_length, self.wire_width)

    @property
    def token_id_bits(self) -> int:
        return bit_width(self.vocab_size)

    @property
    def token_ids(self) -> int:
        """Ids that travel with one microbatch: the inputs and, one further, the last target."""
        return self.microbatch_size * (self.sequence_length + 1)

    @property
    def limits(self) -> Limits:
        """The largest message that may come from the neighbour, in either direction."""
        ids_bytes = packed_bytes(self.token_ids, self.token_id_bits)
        body_bytes = max(self.forward.body_bytes(self.z_shape), self.backward.body_bytes(self.z_shape))
        delta_bytes = dictionary_of(self.table, self.dtype).delta_bytes_max if self.table else 0
        return Limits(message_bytes=max(ids_bytes + delta_bytes + body_bytes, gradient_bytes(self.table)))

    def key(self, direction: Direction, step: int, microbatch: int) -> Key:
        return Key(seed=self.seed, boundary=self.boundary, direction=direction, step=step, microbatch=microbatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a stage gives the one below: z, the version of the table that coded it, the change that leads to it."""

    z_BTW: Tensor
    coded_with: dict[str, Any] = field(default_factory=dict)
    delta: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What a stage has from the one above: z, and the learned table if it changed with this message."""

    z_BTW: Tensor
    table: Tensor | None = None


class DownstreamPort:
    """The sender's half: activations go out, gradients come in."""

    def __init__(self, shape: BoundaryShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._dtype, self._device = dtype, device
        self.table = _table_end(TableSender, shape, device)

    def pack_activation(self, out: Encoded, ids_BS: np.ndarray, step: int, microbatch: int, kind: Kind) -> Message:
        """An ACTIVATION or EVALUATION message. Raises CodecError for a value that must not be sent."""
        offset = EVALUATION_MICROBATCH_OFFSET if kind is Kind.EVALUATION else 0
        payload = self.shape.forward.pack(out.z_BTW, self.shape.key(Direction.FORWARD, step, microbatch + offset))
        return Message(
            kind=kind,
            step=step,
            microbatch=microbatch,
            codec=payload.codec,
            codec_header={**payload.header, **out.coded_with},
            token_ids=pack_bits(ids_BS.reshape(-1), self.shape.token_id_bits),
            dictionary=out.delta,
            body=payload.body,
        )

    def unpack_gradient(self, message: Message) -> Tensor:
        """dL/dz (B, T, W). Raises RemoteProtocolError for a payload that is not what was agreed."""
        return _unpack(message, self.shape.backward, self.shape, self._dtype, self._device)


class UpstreamPort:
    """The receiver's half: activations come in, gradients go out."""

    def __init__(self, shape: BoundaryShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._dtype, self._device = dtype, device
        self.table = _table_end(TableReceiver, shape, device)

    def unpack_activation(self, message: Message) -> tuple[np.ndarray, Received]:
        """Token ids (B, T+1), and z (B, T, W) with the table that it needs. Raises RemoteProtocolError.

        Messages have to come in order: each may bring a change of the table.
        """
        shape = self.shape
        try:
            ids = unpack_bits(bytes(message.token_ids), shape.token_id_bits, shape.token_ids, shape.vocab_size)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{_where(message, shape)}: token ids: {error}") from None
        z_BTW = _unpack(message, shape.forward, shape, self._dtype, self._device)
        if self.table is None and len(message.dictionary):
            raise RemoteProtocolError(
                Fault.UNEXPECTED, f"{_where(message, shape)}: a change of a table, but none is here"
            )
        table = self.table.follow(message) if self.table else None
        return ids.reshape(shape.microbatch_size, shape.sequence_length + 1), Received(z_BTW=z_BTW, table=table)

    def pack_gradient(self, dz_BTW: Tensor, step: int, microbatch: int, loss_sum: float) -> Message:
        """A GRADIENT message, with the microbatch's loss beside it. Raises CodecError."""
        payload = self.shape.backward.pack(dz_BTW, self.shape.key(Direction.BACKWARD, step, microbatch))
        return Message(
            kind=Kind.GRADIENT,
            step=step,
            microbatch=microbatch,
            codec=payload.codec,
            codec_header=payload.header,
            body=payload.body,
            loss_sum=loss_sum,
        )


_End = TypeVar("_End", TableSender, TableReceiver)


def _table_end(end: type[_End], shape: BoundaryShape, device: torch.device) -> _End | None:
    if shape.table is None:
        return None
    return end(shape.table, epoch=0, seed=shape.seed, boundary=shape.boundary, dtype=shape.dtype, device=device)


def _where(message: Message, shape: BoundaryShape) -> str:
    kind = message.kind.name.lower()
    return f"{kind} of step {message.step}, microbatch {message.microbatch} at boundary {shape.boundary}"


def _unpack(
    message: Message, byte_format: ByteFormat, shape: BoundaryShape, dtype: torch.dtype, device: torch.device
) -> Tensor:
    payload = Payload(codec=message.codec, header=message.codec_header, body=bytes(message.body))
    try:
        return byte_format.unpack(payload, shape=shape.z_shape, dtype=dtype, device=device)
    except CodecError as error:
        raise RemoteProtocolError(Fault.PAYLOAD, f"{_where(message, shape)}: {error}") from None
