"""Three figures that every stage needs to know of all: which one is missing, which one prepares its data, and how
old the oldest copy is.

Every Heartbeat carries them, for its sender and all stages on the sender's other side. A stage combines what it last
heard from one side with its own state, and tells the other side. So all know after as many Heartbeats as there are
boundaries. Why not a table of all stages: of each figure only the least is of use, and on a chain a figure never
comes back to its sender, so one number for each side is enough, however long the chain is.

They differ when a neighbour is lost. What it said of missing stages is void, since it is missing itself, and so is what
it said of one that prepares. What it said of copies stays: the process that takes its place may have to begin from one
of them.
"""

from __future__ import annotations

from .control_messages import STEP_MAX, Heartbeat
from .errors import Fault, RemoteProtocolError
from .greeting import NodeIdentity
from .rollback_actions import Side


class HeartbeatAggregate:
    """What one stage has heard from each side, and tells the other."""

    def __init__(self, identity: NodeIdentity) -> None:
        self._stage, self._stages, self._name_of = identity.stage, identity.stages, identity.name_of
        self.preparing = False  # this stage is there, and its data is not
        self.copied = 0  # the newest of this stage's states that a neighbour has a copy of
        # 1 + the stage next to this one; 0: the chain ends here.
        self._nearest: dict[Side, int] = {
            "above": 0 if identity.first else identity.beside("above") + 1,
            "below": 0 if identity.last else identity.beside("below") + 1,
        }
        # On that side: 1 + the nearest that nobody serves, and the least that is copied; who is not there has no copy
        # that could be older.
        self._missing = dict(self._nearest)
        self._preparing: dict[Side, int] = {"above": 0, "below": 0}  # 1 + the nearest stage on that side
        self._copied: dict[Side, int] = {side: 0 if near else STEP_MAX - 1 for side, near in self._nearest.items()}

    @property
    def missing(self) -> int:
        """1 + the nearest stage that nobody serves, as far as is known here; 0: all are there."""
        return self._missing["above"] or self._missing["below"]

    @property
    def prepares(self) -> int:
        """1 + the nearest stage that prepares its data, be it this one; 0: none."""
        return self._own or self._preparing["above"] or self._preparing["below"]

    @property
    def _own(self) -> int:
        return self._stage + 1 if self.preparing else 0

    @property
    def copied_by_all(self) -> int:
        """The least, over all stages, of the newest state that a neighbour has a copy of; 0: somebody has none, or
        nobody knows."""
        return min(self.copied, *self._copied.values())

    def meet(self, side: Side) -> None:
        """A neighbour is connected, and has said nothing yet."""
        self._missing[side] = self._preparing[side] = 0

    def part(self, side: Side) -> None:
        """The neighbour on that side, if the chain has one there, is gone."""
        self._missing[side], self._preparing[side] = self._nearest[side], 0

    def hear(self, side: Side, heartbeat: Heartbeat) -> None:
        """Take what the neighbour on that side says. Raises RemoteProtocolError for a stage that there is not."""
        for named, what in ((heartbeat.missing, "be missing"), (heartbeat.preparing, "prepare its data")):
            if named > self._stages:
                raise RemoteProtocolError(Fault.MALFORMED, f"{self._name_of(named - 1)} cannot {what}")
        self._missing[side], self._copied[side] = heartbeat.missing, heartbeat.copied_steps
        self._preparing[side] = heartbeat.preparing

    def of_chain(self, *, generation: int, completed: int) -> Heartbeat:
        """What to say of all of it, to who is no part of it: another lane."""
        return Heartbeat(
            generation=generation, completed_steps=completed, missing=self.missing, preparing=self.prepares
        )

    def tell(self, side: Side, *, generation: int, completed: int) -> Heartbeat:
        """What to say to that side now and then."""
        other: Side = "below" if side == "above" else "above"
        return Heartbeat(
            generation=generation,
            completed_steps=completed,
            missing=self._missing[other],
            copied_steps=min(self.copied, self._copied[other]),
            preparing=self._own or self._preparing[other],
        )
