"""What the state machine `protocol.rollback` asks the node to do after an input, as frozen dataclasses.

It neither sends nor stops anything itself: it returns a list of these, and the node carries them out in
order. Why not callbacks: a list can be compared in a test, and nothing calls into the state machine while it is in
the middle of a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .control_messages import ControlFrame, Failed

Side = Literal["above", "below"]
SIDES: tuple[Side, Side] = ("above", "below")


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Tell the neighbour on that side."""

    side: Side
    frame: ControlFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Break off the step under way, and say `stopped` when that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Go on in `generation` after `completed` steps. `members`: the process of each stage."""

    generation: int
    completed: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """All stages have finished: the process may end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseEnd:
    """Say, with `end_after`, how many steps will be completed when the one under way is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAfter:
    """Begin no step after so many are completed."""

    completed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Another stage has failed, and the run ends: leave, and say why."""

    failure: Failed


Effect = Send | Stop | Start | Leave | ChooseEnd | EndAfter | End
