"""Messages and frames as frozen dataclasses, and their bytes.

A *message* is what one stage tells its neighbour: an activation, a gradient, a loss. It is cut into *frames* of at
most `Limits.chunk_bytes` so that a small control frame can pass between two parts of a large tensor. Where no cap asks
for that, a message is one frame: each frame is work for both ends, and eight of them cost twice as much as one.
Protobuf is the envelope (its parser is fuzzed and bounded); codec headers are msgpack, because their content depends on
the codec. Why not one protobuf message with the tensor inside: serialising it would copy the tensor twice more, and a
receiver would allocate what the sender claims. Here the receiver knows the most a message may hold from its own
configuration (`Limits.message_bytes`) and refuses more before it allocates.

`decode_frame` never raises anything but RemoteProtocolError, whatever the bytes. What it refuses in a message's head,
`split` and `encode_frame` refuse as this node's own fault: a frame that only the peer refuses would be kept, sent again
after the reconnect, and refused for ever. Protobuf alone is too lenient: it ignores what it does not know and takes
the last of several bodies, so one flipped bit can turn a chunk into a goodbye. So a frame must have exactly the bytes
of its fields. Only a greeting of another version may hold more, or it could not be refused for its version.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import xxhash
from google.protobuf.message import DecodeError

from . import stage_pb2 as pb
from .control_messages import CONTROL, STEP_MAX, ControlFrame, control_from_pb, encode_control
from .envelope import Data, Gathered, around_data, buffers_of, without_data
from .errors import Fault, LocalProtocolError, RemoteProtocolError
from .grid_place import LANES_MAX
from .header import HEADER_BYTES_MAX, TEXT_CHARACTERS_MAX, check_text, decode_header, encode_header, printable
from .round_messages import (
    ROUNDS,
    RoundFrame,
    RoundPart,
    RoundsReceived,
    RoundStatus,
    RoundsWanted,
    encode_round,
    round_from_pb,
)

PROTOCOL_VERSION = 1
# Everything in a frame beside chunk data: a codec's header and id (UTF-8: 4 bytes a character), 20 numbers, lengths.
ENVELOPE_BYTES_MAX = HEADER_BYTES_MAX + 4 * TEXT_CHARACTERS_MAX + 256
MICROBATCH_MAX = 2**32
LAYERS_MAX = 2**16
SEGMENTS_MAX = 2 * LANES_MAX  # each lane holds two at most
# Data of one chunk. Each chunk is work for both event loops and for gRPC's threads, whatever it holds, so this is more
# than most messages have; where a control frame must not wait so long, the sender cuts finer (node/links/outgoing.py).
CHUNK_BYTES_MAX = 4 * 2**20


class Kind(IntEnum):
    """What a message carries. The byte accounting has one row for each."""

    ACTIVATION = 1
    GRADIENT = 2
    EVALUATION = 3
    EVALUATION_LOSS = 4
    PROJECTOR_GRADIENT = 6  # the receiver's half of the gradient of a learned projector, once a step
    PROBE = 5  # filler that measures the link; the receiver drops it
    GRADIENT_NORM = 7  # a sum of squares on its way up, or the total on its way down (protocol/global_norm.py)
    CONTEXT = 8  # keys and values of a layer, to another chunk of the same sequences
    CONTEXT_GRADIENT = 9  # what comes back for them
    CONTEXT_EVALUATION = 10  # the same as CONTEXT, of held-out text
    CONTEXT_GRAM = 11  # what a layer's subspaces are chosen from, of the sender's tokens, to lane 0
    CONTEXT_SUBSPACE = 12  # what lane 0 has chosen


OF_CONTEXT = frozenset(
    {Kind.CONTEXT, Kind.CONTEXT_GRADIENT, Kind.CONTEXT_EVALUATION, Kind.CONTEXT_GRAM, Kind.CONTEXT_SUBSPACE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that this node accepts, from its own configuration and never from the peer's header."""

    message_bytes: int
    chunk_bytes: int = CHUNK_BYTES_MAX

    @property
    def frame_bytes(self) -> int:
        return self.chunk_bytes + ENVELOPE_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """All of a message but its data."""

    kind: Kind
    step: int
    microbatch: int
    codec: str = ""
    codec_header: dict[str, Any] = field(default_factory=dict)
    token_ids_bytes: int = 0
    dictionary_bytes: int = 0
    body_bytes: int = 0
    loss_sum: float = 0.0
    layer: int = 0
    segment: int = 0

    @property
    def data_bytes(self) -> int:
        return self.token_ids_bytes + self.dictionary_bytes + self.body_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one stage tells its neighbour about one microbatch.

    token_ids: bit-packed ids (forward only, else empty). dictionary: the change of the decoder's dictionary that leads
    to the version with which the tensor was coded (`protocol.dictionary`), mostly empty. body: the tensor as `codec`
    packed it. loss_sum: sum of the microbatch's token losses, which travels upstream beside the gradient so that every
    stage knows it. layer, segment: of keys and values (`OF_CONTEXT`), and 0 in all else.
    """

    kind: Kind
    step: int
    microbatch: int
    codec: str = ""
    codec_header: dict[str, Any] = field(default_factory=dict)
    token_ids: bytes | memoryview = b""
    dictionary: bytes | memoryview = b""
    body: bytes | memoryview = b""
    loss_sum: float = 0.0
    layer: int = 0
    segment: int = 0

    @property
    def head(self) -> Head:
        return Head(
            kind=self.kind,
            step=self.step,
            microbatch=self.microbatch,
            codec=self.codec,
            codec_header=self.codec_header,
            token_ids_bytes=memoryview(self.token_ids).nbytes,
            dictionary_bytes=memoryview(self.dictionary).nbytes,
            body_bytes=memoryview(self.body).nbytes,
            loss_sum=self.loss_sum,
            layer=self.layer,
            segment=self.segment,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """First frame in both directions; see stage.proto."""

    run_id: str
    configuration: str
    stage: int
    stages: int
    incarnation: int
    next_sequence: int
    granted_bytes: int
    generation: int = 0
    completed_steps: int = 0
    joining: bool = False
    lane: int = 0
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of a message; `head` on the first part only."""

    sequence: int
    generation: int
    data: Data  # as it was received: bytes or a view
    head: Head | None = None
    next_sequence: int = 0
    granted_bytes: int = 0
    acknowledge: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    next_sequence: int
    granted_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    pass


Frame = Greeting | Refusal | Chunk | Credit | Goodbye | ControlFrame | RoundFrame


def split(message: Message, chunk_bytes: int) -> Iterator[tuple[Head | None, Data]]:
    """The parts of a message, each at most `chunk_bytes` of data; the first one carries the head.

    Token ids, dictionary and body share a part only where the whole message is one, so that no part is copied twice.
    Raises LocalProtocolError, before the first part, for a head that the peer would refuse.
    """
    head: Head | None = message.head
    _head_to_pb(message.head)
    sections = [
        memoryview(part).cast("B") for part in (message.token_ids, message.dictionary, message.body) if len(part)
    ]
    if sum(map(len, sections)) <= chunk_bytes:
        yield head, sections[0] if len(sections) == 1 else Gathered(tuple(sections))
        return
    for section in sections:
        for start in range(0, len(section), chunk_bytes):
            yield head, section[start : start + chunk_bytes]
            head = None


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame. Raises LocalProtocolError for a head that the peer would refuse."""
    match frame:
        case Chunk():
            chunk = pb.Chunk(
                sequence=frame.sequence,
                generation=frame.generation,
                head=None if frame.head is None else _head_to_pb(frame.head),
                next_sequence=frame.next_sequence,
                granted_bytes=frame.granted_bytes,
                acknowledge=int(frame.acknowledge),
            )
            chunk.xxh3 = _checksum(chunk, frame.data)
            after = pb.Chunk()
            for name in ("next_sequence", "granted_bytes", "acknowledge"):
                setattr(after, name, getattr(chunk, name))
                chunk.ClearField(name)
            return around_data("chunk", chunk, frame.data, after)
        case Credit():
            credit = pb.Credit(next_sequence=frame.next_sequence, granted_bytes=frame.granted_bytes)
            return pb.Frame(credit=credit).SerializeToString()
        case Greeting():
            values = {name: getattr(frame, name) for name in _GREETING_FIELDS}
            greeting = pb.Greeting(**{**values, "joining": int(frame.joining)})
            return pb.Frame(greeting=greeting).SerializeToString()
        case Refusal():
            refusal = pb.Refusal(code=printable(frame.code), reason=printable(frame.reason))
            return pb.Frame(refusal=refusal).SerializeToString()
        case Goodbye():
            return pb.Frame(goodbye=pb.Goodbye()).SerializeToString()
        case RoundsWanted() | RoundStatus() | RoundPart() | RoundsReceived():
            return encode_round(frame)
        case _:
            return encode_control(frame)


_GREETING_FIELDS = [field.name for field in pb.Greeting.DESCRIPTOR.fields]


def _head_to_pb(head: Head) -> pb.MessageHead:
    try:
        _check_head(head.kind, head)
    except RemoteProtocolError as error:  # the same rules, broken here
        raise LocalProtocolError(error.fault, error.reason) from None
    return pb.MessageHead(
        kind=int(head.kind),
        step=head.step,
        microbatch=head.microbatch,
        codec=head.codec,
        codec_header=encode_header(head.codec, head.codec_header),
        token_ids_bytes=head.token_ids_bytes,
        dictionary_bytes=head.dictionary_bytes,
        body_bytes=head.body_bytes,
        loss_sum=head.loss_sum,
        layer=head.layer,
        segment=head.segment,
    )


def _checksum(chunk: pb.Chunk, data: Data) -> int:
    """XXH3 of all of a chunk: a flipped bit in the step or the loss does as much harm as one in the data."""
    # Over values and not over serialised bytes, which protobuf does not promise to be the same everywhere.
    head = chunk.head
    codec = head.codec.encode()
    flags = [head.kind, head.microbatch, len(codec), len(head.codec_header), chunk.HasField("head"), chunk.acknowledge]
    flags += [head.layer, head.segment]
    numbers = [chunk.sequence, chunk.generation, head.step, head.token_ids_bytes, head.body_bytes]
    numbers += [head.dictionary_bytes, chunk.next_sequence, chunk.granted_bytes]
    envelope = struct.pack("<8I8Qd", *flags, *numbers, head.loss_sum)
    checksum = xxhash.xxh3_64(envelope + codec + head.codec_header)
    for buffer in buffers_of(data):
        checksum.update(buffer)
    return checksum.intdigest()


def decode_frame(raw: bytes, limits: Limits) -> Frame:
    """Parse one frame. Raises RemoteProtocolError (malformed, oversized, corrupt) and nothing else."""
    if len(raw) > limits.frame_bytes:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a frame of {len(raw)} bytes, at most {limits.frame_bytes} here")
    if parted := without_data("chunk", pb.Chunk, raw):
        chunk, (rest, data) = pb.Chunk(), parted
        with suppress(DecodeError):  # then it is none as a whole either
            chunk.ParseFromString(rest)
            chunk.DiscardUnknownFields()
            if chunk.ByteSize() == len(rest) and not chunk.data:
                return _chunk_from_pb(chunk, data, limits)
    return _decode_whole(raw, limits)


def _decode_whole(raw: bytes, limits: Limits) -> Frame:
    """The same by protobuf alone, which copies the data several times."""
    frame = pb.Frame()
    try:
        frame.ParseFromString(raw)
    except DecodeError:
        raise RemoteProtocolError(Fault.MALFORMED, f"{len(raw)} bytes are not a frame: {raw[:16].hex()}…") from None
    other_version = frame.HasField("greeting") and frame.greeting.protocol_version != PROTOCOL_VERSION
    frame.DiscardUnknownFields()
    if frame.ByteSize() != len(raw) and not other_version:
        raise RemoteProtocolError(Fault.MALFORMED, f"{len(raw)} bytes, of which one frame takes {frame.ByteSize()}")
    match frame.WhichOneof("body"):
        case "chunk":
            return _chunk_from_pb(frame.chunk, frame.chunk.data, limits)
        case "credit":
            return Credit(next_sequence=frame.credit.next_sequence, granted_bytes=frame.credit.granted_bytes)
        case "greeting":
            check_text("run id", frame.greeting.run_id)
            check_text("configuration hash", frame.greeting.configuration)
            if frame.greeting.joining > 1:
                raise RemoteProtocolError(Fault.MALFORMED, f"a greeting that is {frame.greeting.joining} times joining")
            values = {name: getattr(frame.greeting, name) for name in _GREETING_FIELDS}
            return Greeting(**{**values, "joining": bool(values["joining"])})
        case "refusal":
            check_text("code", frame.refusal.code)
            check_text("reason", frame.refusal.reason)
            return Refusal(code=frame.refusal.code, reason=frame.refusal.reason)
        case "goodbye":
            return Goodbye()
        case str(name) if name in CONTROL:
            return control_from_pb(name, getattr(frame, name))
        case str(name) if name in ROUNDS:
            return round_from_pb(name, getattr(frame, name))
        case _:
            raise RemoteProtocolError(Fault.MALFORMED, f"a frame of {len(raw)} bytes with no known body")


def _chunk_from_pb(chunk: pb.Chunk, data: bytes | memoryview, limits: Limits) -> Chunk:
    if len(data) > limits.chunk_bytes:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a chunk of {len(data)} bytes, at most {limits.chunk_bytes} here")
    if _checksum(chunk, data) != chunk.xxh3:
        raise RemoteProtocolError(Fault.CORRUPT, f"chunk {chunk.sequence} does not match its checksum")
    if chunk.acknowledge > 1:
        raise RemoteProtocolError(Fault.MALFORMED, f"a chunk that asks {chunk.acknowledge} times for an answer")
    head = _head_from_pb(chunk.head, limits) if chunk.HasField("head") else None
    return Chunk(
        sequence=chunk.sequence,
        generation=chunk.generation,
        data=data,
        head=head,
        next_sequence=chunk.next_sequence,
        granted_bytes=chunk.granted_bytes,
        acknowledge=bool(chunk.acknowledge),
    )


def _head_from_pb(head: pb.MessageHead, limits: Limits) -> Head:
    if head.kind not in Kind._value2member_map_:
        raise RemoteProtocolError(Fault.MALFORMED, f"message kind {head.kind} is unknown")
    _check_head(Kind(head.kind), head)
    if (total := head.token_ids_bytes + head.dictionary_bytes + head.body_bytes) > limits.message_bytes:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a message of {total} bytes, at most {limits.message_bytes} here")
    return Head(
        kind=Kind(head.kind),
        step=head.step,
        microbatch=head.microbatch,
        codec=head.codec,
        codec_header=decode_header(head.codec_header),
        token_ids_bytes=head.token_ids_bytes,
        dictionary_bytes=head.dictionary_bytes,
        body_bytes=head.body_bytes,
        loss_sum=head.loss_sum,
        layer=head.layer,
        segment=head.segment,
    )


def _check_head(kind: Kind, head: Head | pb.MessageHead) -> None:
    """The rules that both ends hold a head to. Raises RemoteProtocolError."""
    step, microbatch = head.step, head.microbatch
    if not (0 <= step < STEP_MAX and 0 <= microbatch < MICROBATCH_MAX):
        raise RemoteProtocolError(Fault.MALFORMED, f"step {step}, microbatch {microbatch} is out of range")
    if not math.isfinite(head.loss_sum):
        raise RemoteProtocolError(
            Fault.PAYLOAD,
            f"{kind.name.lower()} of step {step}, microbatch {microbatch}: its loss is {head.loss_sum}; training "
            "diverged",
        )
    layers, segments = (LAYERS_MAX, SEGMENTS_MAX) if kind in OF_CONTEXT else (1, 1)
    if not (0 <= head.layer < layers and 0 <= head.segment < segments):
        where = f"layer {head.layer}, segment {head.segment} of {kind.name.lower()}"
        raise RemoteProtocolError(Fault.MALFORMED, f"{where} is out of range")
    check_text("codec id", head.codec)
