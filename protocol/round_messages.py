"""What is said on the stream between two lanes, beside greetings and heartbeats, and its encoding in a frame.

`protocol.round_transfer` defines what these frames mean, and `protocol.messages` wraps them, with the same bounds as
those of the control stream: no round, offset or length is past `STEP_MAX`, no part holds more than `PART_BYTES_MAX`.
What contradicts itself is refused here; whether a number fits what was said before is the session's to judge.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from . import stage_pb2 as pb
from .control_messages import PART_BYTES_MAX, STEP_MAX
from .envelope import around_data
from .errors import Fault, RemoteProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsWanted:
    """Send me your contributions from that byte of that round on, as far as the rounds before `granted_before`; I shall
    never ask for one before `forget_before` again."""

    round: int
    offset: int
    granted_before: int
    forget_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPart:
    """Here are bytes of my contribution to that round, which has `total_bytes` and that checksum in all."""

    round: int
    offset: int
    total_bytes: int
    contribution_xxh3: int
    data: bytes | memoryview  # as it was received: bytes

    @property
    def end(self) -> int:
        """Where in the contribution the next part begins."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsReceived:
    """I have everything before that byte of that round; the rest as in RoundsWanted."""

    round: int
    offset: int
    granted_before: int
    forget_before: int


RoundFrame = RoundsWanted | RoundPart | RoundsReceived

ROUNDS: dict[str, tuple[type[RoundFrame], type[Any]]] = {
    "rounds_wanted": (RoundsWanted, pb.RoundsWanted),
    "round_part": (RoundPart, pb.RoundPart),
    "rounds_received": (RoundsReceived, pb.RoundsReceived),
}


def encode_round(frame: RoundFrame) -> bytes:
    """The bytes of the frame that says it."""
    if isinstance(frame, RoundPart):
        values = {each.name: getattr(frame, each.name) for each in fields(frame) if each.name != "data"}
        return around_data(
            "round_part", pb.RoundPart(**values), frame.data, pb.RoundPart(xxh3=round_part_checksum(frame))
        )
    values = {each.name: getattr(frame, each.name) for each in fields(frame)}
    if isinstance(frame, RoundsWanted):
        return pb.Frame(rounds_wanted=pb.RoundsWanted(**values)).SerializeToString()
    return pb.Frame(rounds_received=pb.RoundsReceived(**values)).SerializeToString()


def round_part_checksum(part: RoundPart) -> int:
    """XXH3 of all of a part, over values as that of a chunk is."""
    numbers = (part.round, part.offset, part.total_bytes, part.contribution_xxh3)
    checksum = xxhash.xxh3_64(struct.pack("<4Q", *numbers))
    checksum.update(part.data)
    return checksum.intdigest()


def round_from_pb(name: str, body: Any) -> RoundFrame:
    """Raises RemoteProtocolError for numbers that are out of bounds or contradict each other, for too many bytes, and
    for a part that is not what its checksum says."""
    values = {field.name: getattr(body, field.name) for field in body.DESCRIPTOR.fields}
    for field, value in values.items():
        if isinstance(value, int) and "xxh3" not in field and value >= STEP_MAX:
            raise RemoteProtocolError(Fault.MALFORMED, f"{field} {value} is out of range")
    if name == "round_part":
        return _part(values)
    frame = RoundsWanted(**values) if name == "rounds_wanted" else RoundsReceived(**values)
    # Who has forgotten a round does not ask for it, and what has begun to arrive was granted.
    if not frame.forget_before <= frame.round <= frame.granted_before - bool(frame.offset):
        granted = f"rounds from {frame.forget_before} to before {frame.granted_before} are granted"
        raise RemoteProtocolError(Fault.MALFORMED, f"byte {frame.offset} of round {frame.round}, where {granted}")
    return frame


def _part(values: dict[str, Any]) -> RoundPart:
    if (length := len(values["data"])) > PART_BYTES_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"{length} bytes of data, at most {PART_BYTES_MAX}")
    xxh3 = values.pop("xxh3")
    part = RoundPart(**values)
    where = f"bytes {part.offset} to {part.end} of a contribution of {part.total_bytes} to round {part.round}"
    if round_part_checksum(part) != xxh3:
        raise RemoteProtocolError(Fault.CORRUPT, f"{where} do not match their checksum")
    if not 0 < length <= part.total_bytes - part.offset:
        raise RemoteProtocolError(Fault.MALFORMED, where)
    return part
