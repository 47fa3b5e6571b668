"""Whose contribution to which round is expected, and which one: what a node's links go by.

A contribution follows from what its lane has used before, so a lane that had used what does not count makes another one
once it goes by the right log. `stay_of` is a number for that history (`MembershipLog.history_of`): who keeps a
contribution keeps the number with it, and both ends of a link name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.membership_log import Entry, MembershipLog, Stretch


@dataclass(frozen=True, slots=True)
class Stays:
    """By a log, and by who is to enter. used_before: for a round, how many rounds a lane has used when it contributes
    to it."""

    log: MembershipLog
    lanes: int
    admitted: tuple[Entry, ...]
    used_before: Callable[[int], int]

    def stay_of(self, lane: int, round: int) -> int | None:
        """The history from which the lane's contribution to that round follows; None: it is no member."""
        expected = self.expected  # and not the log: who is admitted moves into that, and no history changes by it
        if expected.joined_at(lane, round) is None:
            return None
        return expected.history_of(lane, round, self.used_before(round), lanes=self.lanes)

    def next_stay(self, lane: int, round: int) -> int | None:
        """The first round from `round` on to which that lane contributes; None: to none, as far as is known."""
        return self.expected.next_stay(lane, round)

    @property
    def expected(self) -> MembershipLog:
        """The log, if all who are admitted come."""
        return self.log.expecting(self.admitted)


def all_stay(lanes: int) -> Stays:
    """Of a run that begins: all lanes are members of all rounds."""
    return Stays(MembershipLog.begin(lanes), lanes, (), lambda round: round)


def none_known(lanes: int) -> Stays:
    """Before it is known which log counts: nothing is given to anybody, nor asked for."""
    return Stays(MembershipLog((Stretch(first=0, members=()),)), lanes, (), lambda round: round)
