"""The step between a stage's tensors and its links' messages: each node's own half of the codec at each of its
boundaries.

`DownstreamEndpoint` is the sender's half of the boundary below this stage (it encodes activations and decodes
gradients), `UpstreamEndpoint` the receiver's half of the boundary above (the reverse). They are separate classes
because no process may hold both halves of a boundary: the receiver knows only what arrived in a message.

What a message contains is a function of (seed, boundary, direction, step, microbatch) and the tensor, never of time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...compress.bit_packing import bit_width, pack_bits, packed_bytes, unpack_bits
from ...compress.byte_format import ByteFormat, CodecError, Direction, Key, LearnedTable, Payload
from ...compress.codec_interface import BoundaryCodec, BoundaryContext
from ...protocol.dictionary_delta import join_deltas, joined_bytes_max, split_deltas
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.global_norm import NORM
from ...protocol.messages import Kind, Limits, Message
from .codebook_tables import CodebookOwner, CodebookReplica, Packed
from .learned_tables import TableOwner, TableReplica, dictionary_of
from .pack_memory import PackMemory
from .pack_queue import PackQueue
from .projector_gradient import gradient_bytes
from .table_snapshot import DictionaryEnd

# Evaluation happens at a step too; its random keys (codecs that use any) must not repeat those of training.
EVALUATION_MICROBATCH_OFFSET = 2**31
# What people call the tables whose ends a checkpoint keeps under these names, and `_above` or `_below`.
NAMES = {"table": "projector", "activation_codebook": "activations", "gradient_codebook": "gradients"}


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
    microbatches: int  # of one step
    ids_length: int = 0  # ids of one sequence that travel; 0: the inputs and, one further, the last target

    @classmethod
    def of(
        cls,
        codec: BoundaryCodec,
        context: BoundaryContext,
        *,
        microbatch_size: int,
        sequence_length: int,
        microbatches: int,
        seed: int,
        ids_length: int = 0,
        delay: int = 0,
    ) -> BoundaryShape:
        """delay: of gradients, in steps."""
        table = codec.codec.table(context.width)
        return cls(
            boundary=context.boundary,
            seed=seed,
            microbatch_size=microbatch_size,
            sequence_length=sequence_length,
            wire_width=codec.codec.wire_width(context.width),
            vocab_size=context.vocab_size,
            forward=codec.forward,
            backward=codec.backward,
            table=table and replace(table, delay=delay),
            dtype=context.dtype,
            microbatches=microbatches,
            ids_length=ids_length,
        )

    @property
    def z_shape(self) -> tuple[int, int, int]:
        return (self.microbatch_size, self.sequence_length, self.wire_width)

    @property
    def tokens(self) -> int:
        """Of one microbatch."""
        return self.microbatch_size * self.sequence_length

    @property
    def token_id_bits(self) -> int:
        return bit_width(self.vocab_size)

    @property
    def token_ids(self) -> int:
        """Ids that travel with one microbatch."""
        return self.microbatch_size * (self.ids_length or self.sequence_length + 1)

    @property
    def limits(self) -> Limits:
        """The largest message that may come from the neighbour, in either direction."""
        ids_bytes = packed_bytes(self.token_ids, self.token_id_bits)
        downstream = ids_bytes + self._changes_bytes(self.table, self._book(self.forward))
        upstream = self._changes_bytes(self._book(self.backward))
        sizes = (
            downstream + self.forward.body_bytes(self.z_shape),
            upstream + self.backward.body_bytes(self.z_shape),
            gradient_bytes(self.table),
            NORM.size,
        )
        return Limits(message_bytes=max(sizes))

    def _book(self, fmt: ByteFormat) -> LearnedTable | None:
        return fmt.table(self.wire_width)

    def _changes_bytes(self, *tables: LearnedTable | None) -> int:
        return joined_bytes_max(dictionary_of(table, self.dtype) for table in tables if table)

    def codebook_owner(self, fmt: ByteFormat, device: torch.device) -> CodebookOwner | None:
        if (table := self._book(fmt)) is None:
            return None
        return CodebookOwner(
            fmt,
            table,
            shape=self.z_shape,
            seed=self.seed,
            boundary=self.boundary,
            microbatches=self.microbatches,
            device=device,
        )

    def codebook_replica(self, fmt: ByteFormat, device: torch.device) -> CodebookReplica | None:
        table = self._book(fmt)
        return table and CodebookReplica(fmt, table, seed=self.seed, boundary=self.boundary, device=device)

    def memory(self, fmt: ByteFormat) -> PackMemory | None:
        return PackMemory(fmt, self.z_shape) if fmt.remembers else None

    def key(self, kind: Kind, step: int, microbatch: int) -> Key:
        """The key of a message's tensor, at both ends."""
        return Key(
            seed=self.seed,
            boundary=self.boundary,
            direction=Direction.BACKWARD if kind is Kind.GRADIENT else Direction.FORWARD,
            step=step,
            microbatch=microbatch + (EVALUATION_MICROBATCH_OFFSET if kind is Kind.EVALUATION else 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a stage gives the one below: z, the version of the table that coded it, the change that leads to it."""

    z_BTW: Tensor
    coded_with: dict[str, Any] = field(default_factory=dict)
    delta: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedTensor:
    """What a stage has from the one above: z, and the learned table if it changed with this message."""

    z_BTW: Tensor
    table: Tensor | None = None


class _Endpoint:
    """What both halves have: the order in which they pack, and the dictionaries of which they hold an end."""

    def __init__(self, shape: BoundaryShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.pack_queue = PackQueue()
        self.ends: dict[str, DictionaryEnd] = {}  # under the names that a checkpoint has, as the next ones
        self.memories: dict[str, PackMemory] = {}
        self._dtype, self._device = dtype, device

    def _own(self, **ends: DictionaryEnd | None) -> None:
        self.ends = {name: end for name, end in ends.items() if end is not None}

    def _packed(self, fmt: ByteFormat, book: CodebookOwner | None, z: Tensor, key: Key, *, training: bool) -> Packed:
        if book:
            return book.pack(z, key, training=training)
        return Packed(fmt.pack_training(z, key) if training else fmt.pack(z, key), {}, b"")

    def _unpacked(self, fmt: ByteFormat, message: Message) -> Tensor:
        """Raises RemoteProtocolError for a payload that is not what was agreed."""
        payload = Payload(codec=message.codec, header=message.codec_header, body=memoryview(message.body).toreadonly())
        key = self.shape.key(message.kind, message.step, message.microbatch)
        try:
            return fmt.unpack(payload, shape=self.shape.z_shape, dtype=self._dtype, device=self._device, key=key)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{self._where(message)}: {error}") from None

    def _followed(self, message: Message, *followers: TableReplica | None) -> list[Tensor | None]:
        """The new table of each follower that the message changes. Raises RemoteProtocolError, and changes nothing, if
        one of them refuses it."""
        names = [follower.table.name for follower in followers if follower]
        try:
            changes = split_deltas(message.dictionary, names)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(error.fault, f"{self._where(message)}: {error.reason}") from None
        adopt = [
            follower.follow(message, changes.get(follower.table.name)) if follower else lambda: None
            for follower in followers
        ]
        return [take() for take in adopt]

    def dictionaries(self) -> list[dict[str, Any]]:
        """Of which table an end is here, which end, and its version (generation, step, microbatch, number), for
        records."""
        return [
            {
                "boundary": self.shape.boundary,
                "dictionary": NAMES[name.rpartition("_")[0]],
                "end": "owner" if isinstance(end, TableOwner) else "replica",
                "version": end.version and list(end.version),
            }
            for name, end in self.ends.items()
            if isinstance(end, TableOwner | TableReplica)
        ]

    def forget(self) -> None:
        """What came since the last restored state, or ever, was another process's, and nothing of it was used."""
        for end in self.ends.values():
            if isinstance(end, TableReplica):
                end.forget()

    def _where(self, message: Message) -> str:
        kind = message.kind.name.lower()
        return f"{kind} of step {message.step}, microbatch {message.microbatch} at boundary {self.shape.boundary}"


class DownstreamEndpoint(_Endpoint):
    """The sender's half: activations go out, gradients come in."""

    def __init__(self, shape: BoundaryShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype=dtype, device=device)
        self.table = _table_end(TableOwner, shape, device)
        self._activations = self.codebook = shape.codebook_owner(shape.forward, device)
        self._gradients = shape.codebook_replica(shape.backward, device)
        self._own(
            table_below=self.table,
            activation_codebook_below=self._activations,
            gradient_codebook_below=self._gradients,
        )
        if memory := shape.memory(shape.forward):
            self.memories["activation_memory_below"] = memory

    def pack_activation(self, out: Encoded, ids_BS: np.ndarray, step: int, microbatch: int, kind: Kind) -> Message:
        """An ACTIVATION or EVALUATION message. Raises CodecError for a value that must not be sent."""
        training = kind is Kind.ACTIVATION
        key = self.shape.key(kind, step, microbatch)
        packed = self._packed(self.shape.forward, self._activations, out.z_BTW, key, training=training)
        return Message(
            kind=kind,
            step=step,
            microbatch=microbatch,
            codec=packed.payload.codec,
            codec_header={**packed.payload.header, **out.coded_with, **packed.coded_with},
            token_ids=pack_bits(ids_BS.reshape(-1), self.shape.token_id_bits),
            dictionary=join_deltas(change for change in (out.delta, packed.change) if change),
            body=packed.payload.body,
        )

    def unpack_gradient(self, message: Message) -> Tensor:
        """dL/dz (B, T, W). Raises RemoteProtocolError for a payload that is not what was agreed.

        Messages have to come in order: each may bring a change of the codebook.
        """
        self._followed(message, self._gradients)
        return self._unpacked(self.shape.backward, message)

    def measures(self) -> dict[str, float]:
        """Figures of what was learned for activations since the last call."""
        return self.pack_queue.while_idle(self.shape.forward.measures)


class UpstreamEndpoint(_Endpoint):
    """The receiver's half: activations come in, gradients go out."""

    def __init__(self, shape: BoundaryShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype=dtype, device=device)
        self.table = _table_end(TableReplica, shape, device)
        self._activations = shape.codebook_replica(shape.forward, device)
        self._gradients = self.codebook = shape.codebook_owner(shape.backward, device)
        self._own(
            table_above=self.table,
            activation_codebook_above=self._activations,
            gradient_codebook_above=self._gradients,
        )
        if memory := shape.memory(shape.backward):
            self.memories["gradient_memory_above"] = memory

    def unpack_activation(self, message: Message) -> tuple[np.ndarray, ReceivedTensor]:
        """Token ids (B, S), S = T+1 but for chunks, and z (B, T, W) with the table that it needs. Raises
        RemoteProtocolError.

        Messages have to come in order: each may bring a change of a table.
        """
        shape = self.shape
        try:
            ids = unpack_bits(message.token_ids, shape.token_id_bits, shape.token_ids, shape.vocab_size)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{self._where(message)}: token ids: {error}") from None
        table, _ = self._followed(message, self.table, self._activations)
        z_BTW = self._unpacked(shape.forward, message)
        return ids.reshape(shape.microbatch_size, -1), ReceivedTensor(z_BTW=z_BTW, table=table)

    def pack_gradient(self, dz_BTW: Tensor, step: int, microbatch: int, loss_sum: float) -> Message:
        """A GRADIENT message, with the microbatch's loss beside it. Raises CodecError."""
        key = self.shape.key(Kind.GRADIENT, step, microbatch)
        packed = self._packed(self.shape.backward, self._gradients, dz_BTW, key, training=True)
        return Message(
            kind=Kind.GRADIENT,
            step=step,
            microbatch=microbatch,
            codec=packed.payload.codec,
            codec_header={**packed.payload.header, **packed.coded_with},
            dictionary=join_deltas([packed.change] if packed.change else []),
            body=packed.payload.body,
            loss_sum=loss_sum,
        )

    def measures(self) -> dict[str, float]:
        """Figures of what was learned for gradients since the last call."""
        return self.pack_queue.while_idle(self.shape.backward.measures)


_End = TypeVar("_End", TableOwner, TableReplica)


def _table_end(end: type[_End], shape: BoundaryShape, device: torch.device) -> _End | None:
    if shape.table is None:
        return None
    return end(shape.table, generation=0, seed=shape.seed, boundary=shape.boundary, dtype=shape.dtype, device=device)
