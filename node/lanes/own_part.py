"""What a log of members says of one lane's own steps: which of them count, and from where it goes on.

Pure: a function of the log, of who is admitted, and of when rounds are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.membership_log import Entry, MembershipLog
from ..averaging.round_plan import RoundPlan
from .state_taking import State


@dataclass(frozen=True, slots=True)
class OwnPart:
    """Of lane `lane`."""

    lane: int
    log: MembershipLog
    admitted: tuple[Entry, ...]
    plan: RoundPlan

    @property
    def entries(self) -> list[Entry]:
        """How it came back, and how it is to, in order."""
        return self.log.expecting(self.admitted).entries_of(self.lane)

    @property
    def left(self) -> int | None:
        """The round that the others go on with, without this lane; None: it is a member, or admitted."""
        return self.log.expecting(self.admitted).left_at(self.lane)

    def entry(self, copied: int) -> Entry | None:
        """With which it comes back, having followed from `copied` steps on."""
        return next((each for each in reversed(self.entries) if each.copied == copied), None)

    @property
    def waits_after(self) -> int:
        """The steps up to which a lane follows that is not admitted yet: from no earlier ones it may have to train.
        Should all others go, it goes on by itself from where the last decided round was made."""
        decided = self.log.decided
        return self.plan.steps if decided == self.plan.count else self.plan.round(max(0, decided - 1)).made

    def may_follow(self, copied: int, completed: int, used: Sequence[int], *, admitted: bool) -> bool:
        """Whether a lane that follows from `copied` steps on may do the step with which so many are completed, and
        these rounds used. Not before they are decided, nor where it has a part in one that was made since: that takes
        training. It gets there if it goes back too far, and waits for the state of another lane."""
        for number in used:
            if number >= self.log.decided:
                return False
            if self.plan.round(number).made > copied and self.lane in self.log.members_of(number):
                return False
        return admitted or completed <= self.waits_after

    def entered_before(self, round: int, completed: int) -> bool:
        """Whether it is no member of that round and uses it all the same, because it came when that was under way."""
        return any(each.begins <= completed and round < each.first for each in self.entries)

    def has_made_all(self, completed: int) -> bool:
        """Whether by then it has contributed to all rounds that it is a member of, and nothing of it is in vain."""
        return self.valid(completed, None) and self.plan.made_by(completed) == self.left

    def valid(self, completed: int, taken: State | None) -> bool:
        """Whether what this lane had after so many steps is a part of the run. taken: the state that it has taken up,
        if it has not come back with that."""
        if taken and (completed < taken[1] or self.entry(taken[1]) is None):
            return completed == taken[1]  # whatever is older lacks rounds that nobody has
        if self.left is not None and self.left < self.plan.count and completed >= self.plan.round(self.left).made:
            return False
        expected = self.log.expecting(self.admitted)
        for entry in self.entries:
            made = self.plan.round(expected.left_before(entry)).made
            if entry.copied < completed < entry.begins or made <= completed < entry.copied:
                return False
        return True

    def differs_at(self, other: OwnPart) -> int | None:
        """The first round in which this lane has another part by the other log; None: in none."""
        return self.log.expecting(self.admitted).parts_from(other.log.expecting(other.admitted), self.lane)
