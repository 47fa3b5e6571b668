"""What is said on the control stream beside greetings, as frozen dataclasses, and how it lies in a frame.

`protocol.rewind` gives these sentences their meaning; `protocol.messages` wraps them into frames, with the same bounds
for what may come: no frame names more than `LISTED_MAX` stages or steps, and no step or epoch is past `STEP_MAX`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

from . import stage_pb2 as pb
from .errors import Fault, RemoteProtocolError

STEP_MAX = 2**48
LISTED_MAX = 1024  # stages, or steps, that one frame names


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """I am in this epoch and have completed so many steps of it."""

    epoch: int
    completed_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """The epoch is over."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Who has stopped, from the sender down to the last stage, and after which steps all of these could go on."""

    epoch: int
    incarnations: tuple[int, ...]
    steps: tuple[int, ...]  # numbers of completed steps, falling


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The new epoch, its members, and how many steps are completed in it."""

    epoch: int
    completed_steps: int
    incarnations: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All stages from the sender down are through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismissed:
    """All stages are through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Let all end after the step under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStep:
    """All end when so many steps are completed."""

    completed_steps: int


ControlFrame = Alive | Halt | Offer | Commit | Finished | Dismissed | Drain | LastStep

CONTROL: dict[str, tuple[type[ControlFrame], type[Any]]] = {
    "alive": (Alive, pb.Alive),
    "halt": (Halt, pb.Halt),
    "offer": (Offer, pb.Offer),
    "commit": (Commit, pb.Commit),
    "finished": (Finished, pb.Finished),
    "dismissed": (Dismissed, pb.Dismissed),
    "drain": (Drain, pb.Drain),
    "last_step": (LastStep, pb.LastStep),
}
_NAMES = {frame: name for name, (frame, _) in CONTROL.items()}


def control_to_pb(frame: ControlFrame) -> pb.Frame:
    """The frame that says it."""
    name = _NAMES[type(frame)]
    body = CONTROL[name][1](**{field.name: getattr(frame, field.name) for field in fields(frame)})
    return pb.Frame(**{name: body})


def control_from_pb(name: str, body: Any) -> ControlFrame:
    """Raises RemoteProtocolError for numbers that are out of bounds."""
    values: dict[str, Any] = {}
    for each in body.DESCRIPTOR.fields:
        value = getattr(body, each.name)
        values[each.name] = value if isinstance(value, int) else tuple(value)
        numbers = (value,) if isinstance(value, int) else value
        if len(numbers) > LISTED_MAX:
            raise RemoteProtocolError(Fault.OVERSIZED, f"{len(numbers)} {each.name} in a frame, at most {LISTED_MAX}")
        if each.name != "incarnations" and any(number >= STEP_MAX for number in numbers):
            raise RemoteProtocolError(Fault.MALFORMED, f"{each.name} {max(numbers)} is out of range")
    steps = values.get("steps")
    if steps is not None and (not steps or steps[-1] != 0 or any(a <= b for a, b in itertools.pairwise(steps))):
        raise RemoteProtocolError(Fault.MALFORMED, f"steps offered are {steps[:8]}, not falling to 0")
    return CONTROL[name][0](**values)
