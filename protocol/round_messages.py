"""What is said on the stream between two lanes, beside greetings and heartbeats, and its encoding in a frame.

`protocol.round_transfer` defines what these frames mean, and `protocol.messages` wraps them, with the same bounds as
those of the control stream: no round, offset or length is past `STEP_MAX`, no part holds more than `PART_BYTES_MAX`.
What contradicts itself is refused here; whether a number fits what was said before is the session's to judge.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from . import stage_pb2 as pb
from .control_messages import PART_BYTES_MAX, STEP_MAX
from .envelope import around_data
from .errors import Fault, RemoteProtocolError
from .membership_log import STRETCHES_MAX, Entry, Stretch


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsWanted:
    """Send me your contributions from that byte of that round on, as far as the rounds before `granted_before`; I shall
    never ask for one before `forget_before` again. stay: of those that you may have made, the ones that follow from
    this history of yours (`MembershipLog.history_of`), by what I know."""

    round: int
    offset: int
    granted_before: int
    forget_before: int
    stay: int = 0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """So far is my lane, and these rounds are decided (`protocol.round_membership.LaneStatus`). stretches: none: as I
    said last on this connection."""

    held: tuple[int, ...]
    decided: int
    stretches: tuple[Stretch, ...] = ()
    admitted: tuple[Entry, ...] = ()
    returning: int = 0
    source: int = 0
    saved: int = 0
    kept: int = 0
    forgot: int = 0
    there: tuple[int, ...] = ()


RoundFrame = RoundsWanted | RoundPart | RoundsReceived | RoundStatus
LANES_MAX = 64

ROUNDS: dict[str, tuple[type[RoundFrame], type[Any]]] = {
    "rounds_wanted": (RoundsWanted, pb.RoundsWanted),
    "round_part": (RoundPart, pb.RoundPart),
    "rounds_received": (RoundsReceived, pb.RoundsReceived),
    "round_status": (RoundStatus, pb.RoundStatus),
}


def encode_round(frame: RoundFrame) -> bytes:
    """The bytes of the frame that says it."""
    if isinstance(frame, RoundPart):
        values = {each.name: getattr(frame, each.name) for each in fields(frame) if each.name != "data"}
        return around_data(
            "round_part", pb.RoundPart(**values), frame.data, pb.RoundPart(xxh3=round_part_checksum(frame))
        )
    if isinstance(frame, RoundStatus):
        return pb.Frame(round_status=_status_to_pb(frame)).SerializeToString()
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
    if name == "round_status":
        return _status(body)
    values = {field.name: getattr(body, field.name) for field in body.DESCRIPTOR.fields}
    for field, value in values.items():
        _check_range(field, value)
    if name == "round_part":
        return _part(values)
    frame = RoundsWanted(**values) if name == "rounds_wanted" else RoundsReceived(**values)
    # Who has forgotten a round does not ask for it, and what has begun to arrive was granted.
    if not frame.forget_before <= frame.round <= frame.granted_before - bool(frame.offset):
        granted = f"rounds from {frame.forget_before} to before {frame.granted_before} are granted"
        raise RemoteProtocolError(Fault.MALFORMED, f"byte {frame.offset} of round {frame.round}, where {granted}")
    return frame


def _check_range(field: str, value: Any) -> None:
    if isinstance(value, int) and "xxh3" not in field and value >= STEP_MAX:
        raise RemoteProtocolError(Fault.MALFORMED, f"{field} {value} is out of range")


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


def _status_to_pb(frame: RoundStatus) -> pb.RoundStatus:
    stretches = [
        pb.RoundStretch(first=each.first, members=each.members, entered=[_entry_to_pb(entry) for entry in each.entered])
        for each in frame.stretches
    ]
    admitted = [_entry_to_pb(entry) for entry in frame.admitted]
    known = {each: getattr(frame, each) for each in ("held", "decided", *STATUS_NUMBERS)}
    return pb.RoundStatus(**known, stretches=stretches, admitted=admitted, there=frame.there)


STATUS_NUMBERS = ("returning", "source", "saved", "kept", "forgot")


def _entry_to_pb(entry: Entry) -> pb.RoundEntry:
    return pb.RoundEntry(**{each.name: getattr(entry, each.name) for each in fields(Entry)})


def _status(body: pb.RoundStatus) -> RoundStatus:
    if len(body.stretches) > STRETCHES_MAX or max(len(body.held), len(body.admitted), len(body.there)) > LANES_MAX:
        raise RemoteProtocolError(
            Fault.OVERSIZED, "a status of more lanes, or more stretches of rounds, than there can be"
        )
    for field in ("decided", *STATUS_NUMBERS):
        _check_range(field, getattr(body, field))
    for count in body.held:
        _check_range("held", count)
    stretches = tuple(_stretch(each) for each in body.stretches)
    firsts = [each.first for each in stretches]
    if any(a.members == b.members and not b.entered for a, b in itertools.pairwise(stretches)):
        raise RemoteProtocolError(Fault.MALFORMED, "two stretches of rounds with the same members, of whom none is new")
    if stretches and (firsts[0] != 0 or not _rising(firsts) or firsts[-1] > max(0, body.decided - 1)):
        raise RemoteProtocolError(
            Fault.MALFORMED, f"stretches from rounds {firsts[:8]}, of {body.decided} decided ones"
        )
    there = tuple(body.there)
    if not _rising(there) or max(there, default=0) >= LANES_MAX:
        raise RemoteProtocolError(Fault.MALFORMED, f"lanes {there[:8]} cannot be there")
    return RoundStatus(
        held=tuple(body.held),
        decided=body.decided,
        stretches=stretches,
        admitted=_entries(body.admitted),
        there=there,
        **{each: getattr(body, each) for each in STATUS_NUMBERS},
    )


def _stretch(body: pb.RoundStretch) -> Stretch:
    _check_range("first", body.first)
    members, entered = tuple(body.members), _entries(body.entered)
    if not members or len(members) > LANES_MAX or not _rising(members) or members[-1] >= LANES_MAX:
        raise RemoteProtocolError(Fault.MALFORMED, f"members {members[:8]} of round {body.first}")
    if any(entry.first != body.first or entry.lane not in members for entry in entered):
        raise RemoteProtocolError(
            Fault.MALFORMED, f"who enters at round {body.first} is no member of it, or enters later"
        )
    return Stretch(first=body.first, members=members, entered=entered)


def _entries(bodies: Iterable[pb.RoundEntry]) -> tuple[Entry, ...]:
    entries = tuple(Entry(**{each.name: getattr(body, each.name) for each in fields(Entry)}) for body in bodies)
    for entry in entries:
        for each in fields(Entry):
            _check_range(each.name, getattr(entry, each.name))
        if max(entry.lane, entry.source) >= LANES_MAX or entry.copied > entry.begins:
            raise RemoteProtocolError(Fault.MALFORMED, f"lane {entry.lane} cannot enter so: {entry}")
    if not _rising([entry.lane for entry in entries]):
        raise RemoteProtocolError(Fault.MALFORMED, "lanes enter twice, or in no order")
    return entries


def _rising(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))
