"""The messages of the control stream, except greetings, as frozen dataclasses, and their encoding in a frame.

`protocol.rollback` defines what the first of them mean, `protocol.heartbeat_figures` what Heartbeat says of other
stages, and `protocol.copy_transfer` those on copies of checkpoints. `protocol.messages` wraps them into frames, with
the same bounds for what is accepted: no frame names more than `LISTED_MAX` stages or steps or holds more than
`PART_BYTES_MAX` of a file; no step, generation or offset is past `STEP_MAX`.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from . import stage_pb2 as pb
from .envelope import around_data
from .errors import Fault, RemoteProtocolError
from .header import check_text

STEP_MAX = 2**48
LISTED_MAX = 1024  # stages, or steps, that one frame names
PART_BYTES_MAX = 256 * 1024  # of a part of a state
FLAGS = ("replays",)  # 0 or 1
BYTES_MAX = {"data": PART_BYTES_MAX, "manifest": 64 * 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """I am in this generation and have completed so many steps of it.

    missing: 1 + the stage, on my other side, that nobody serves at present, so that who waits knows for whom; 0: all
    are there. copied_steps: the least, over me and all on my other side, of the newest state that a neighbour has a
    copy of, so that all keep what would go with it; 0: somebody has none. preparing: 1 + the nearest stage, me or one
    on my other side, that still prepares its data, so that the others wait for it; 0: none.
    """

    generation: int
    completed_steps: int
    missing: int = 0
    copied_steps: int = 0
    preparing: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartViewChange:
    """The generation is over."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DoViewChange:
    """Who has stopped, from the sender down to the last stage, and after which steps all of these could go on."""

    generation: int
    incarnations: tuple[int, ...]
    steps: tuple[int, ...]  # numbers of completed steps, falling


@dataclass(frozen=True, slots=True, kw_only=True)
class StartView:
    """The new generation, its members, and how many steps are completed in it."""

    generation: int
    completed_steps: int
    incarnations: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All stages from the sender down are through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllFinished:
    """All stages are through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Let all end after the step under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStep:
    """All end when so many steps are completed."""

    completed_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """That stage has failed after so many completed steps, and so the run ends: all leave, and can say why.

    replays: the computation failed, so whoever comes to that step again fails so, too; else what is around it did (a
    disk, a source of data), which may pass.
    """

    stage: int
    completed_steps: int
    reason: str
    replays: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesHeld:
    """Of the states of `stage` I have those after so many steps."""

    stage: int
    steps: tuple[int, ...]  # falling


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOffer:
    """I would send you this state."""

    stage: int
    completed_steps: int
    manifest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgress:
    """I have got so many bytes of it."""

    stage: int
    completed_steps: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPart:
    """Here are more of its bytes."""

    stage: int
    completed_steps: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyWanted:
    """I take that stage's place and need this state back."""

    stage: int
    completed_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDeclined:
    """I do not take it, or cannot send it."""

    stage: int
    completed_steps: int
    reason: str


CopyFrame = CopiesHeld | CopyOffer | CopyProgress | CopyPart | CopyWanted | CopyDeclined
ControlFrame = (
    Heartbeat
    | StartViewChange
    | DoViewChange
    | StartView
    | Finished
    | AllFinished
    | Drain
    | LastStep
    | Failed
    | CopyFrame
)
LAST_WORDS = (AllFinished, Failed)  # after either its sender says no more

CONTROL: dict[str, tuple[type[ControlFrame], type[Any]]] = {
    "heartbeat": (Heartbeat, pb.Heartbeat),
    "start_view_change": (StartViewChange, pb.StartViewChange),
    "do_view_change": (DoViewChange, pb.DoViewChange),
    "start_view": (StartView, pb.StartView),
    "finished": (Finished, pb.Finished),
    "all_finished": (AllFinished, pb.AllFinished),
    "drain": (Drain, pb.Drain),
    "last_step": (LastStep, pb.LastStep),
    "failed": (Failed, pb.Failed),
    "copies_held": (CopiesHeld, pb.CopiesHeld),
    "copy_offer": (CopyOffer, pb.CopyOffer),
    "copy_progress": (CopyProgress, pb.CopyProgress),
    "copy_part": (CopyPart, pb.CopyPart),
    "copy_wanted": (CopyWanted, pb.CopyWanted),
    "copy_declined": (CopyDeclined, pb.CopyDeclined),
}
_NAMES = {frame: name for name, (frame, _) in CONTROL.items()}


def encode_control(frame: ControlFrame) -> bytes:
    """The bytes of the frame that says it."""
    if isinstance(frame, CopyPart):
        before = pb.CopyPart(stage=frame.stage, completed_steps=frame.completed_steps, offset=frame.offset)
        return around_data("copy_part", before, frame.data, pb.CopyPart(xxh3=part_checksum(frame)))
    name = _NAMES[type(frame)]
    values = {field.name: getattr(frame, field.name) for field in fields(frame)}
    body = CONTROL[name][1](**{each: int(value) if each in FLAGS else value for each, value in values.items()})
    return pb.Frame(**{name: body}).SerializeToString()


def part_checksum(part: CopyPart) -> int:
    """XXH3 of all of a part: at a wrong offset its bytes do as much harm as wrong ones. Over values, as that of a
    chunk is."""
    checksum = xxhash.xxh3_64(struct.pack("<3Q", part.stage, part.completed_steps, part.offset))
    checksum.update(part.data)
    return checksum.intdigest()


def control_from_pb(name: str, body: Any) -> ControlFrame:
    """Raises RemoteProtocolError for numbers, lists or bytes that are out of bounds, and for a part that is not what
    its checksum says."""
    values = {field.name: _bounded(field.name, getattr(body, field.name)) for field in body.DESCRIPTOR.fields}
    steps = values.get("steps")
    if steps is not None:
        ends_well = name == "copies_held" or (steps and steps[-1] == 0)
        if not ends_well or any(a <= b for a, b in itertools.pairwise(steps)):
            goal = "falling" if name == "copies_held" else "falling to 0"
            raise RemoteProtocolError(Fault.MALFORMED, f"steps in a frame are {steps[:8]}, not {goal}")
    xxh3 = values.pop("xxh3", None)
    frame = CONTROL[name][0](**values)
    if isinstance(frame, CopyPart) and part_checksum(frame) != xxh3:
        line = f"bytes from {frame.offset} of the copy of stage {frame.stage} after {frame.completed_steps} steps"
        raise RemoteProtocolError(Fault.CORRUPT, f"{line} do not match their checksum")
    return frame


def _bounded(name: str, value: Any) -> Any:
    """A field's value, lists as tuples."""
    if isinstance(value, str):
        check_text(name, value)
        return value
    if isinstance(value, bytes):
        if len(value) > BYTES_MAX[name]:
            raise RemoteProtocolError(Fault.OVERSIZED, f"{len(value)} bytes of {name}, at most {BYTES_MAX[name]}")
        return value
    if name in FLAGS:
        if value > 1:
            raise RemoteProtocolError(Fault.MALFORMED, f"{name} is {value}, and can be 0 or 1")
        return bool(value)
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if len(numbers) > LISTED_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"{len(numbers)} {name} in a frame, at most {LISTED_MAX}")
    if name not in ("incarnations", "xxh3") and any(number >= STEP_MAX for number in numbers):
        raise RemoteProtocolError(Fault.MALFORMED, f"{name} {max(numbers)} is out of range")
    return value if isinstance(value, int) else numbers
