"""Whether what a lane has missed can still be had from those who made it, sans-IO.

A lane that was left out follows the others with their contributions, which each keeps for a while. So it may come too
late, and must notice: it takes up the state of another lane instead. Each lane says with its status before which round
it has none of its own any more (`LaneStatus.kept`). That is remembered when the connection breaks: connections begin
anew whenever members change, and who forgot what is gone for as long as that takes would ask to be admitted, be waited
for, and not come.

Of who is not there it is not known what it keeps. It may be there again soon, and is waited for as a round waits for a
lane; a member however long, since it comes back or is left out, unless it has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .membership_log import MembershipLog


class MissedRounds:
    """Of lane `lane`. deadline_s: for who is not there; ended_s: if it had said that it needs nothing more. Times are
    in seconds of one clock."""

    def __init__(self, lane: int, *, deadline_s: float, ended_s: float) -> None:
        self._lane, self._deadline_s, self._ended_s = lane, deadline_s, ended_s
        self._kept: dict[int, int] = {}  # by lane, by its last word
        self._away_s: dict[int, float] = {}  # by lane that is not connected: since when

    def hear(self, lane: int, kept: int) -> None:
        """That lane has no contributions of its own any more from before round `kept`."""
        self._kept[lane] = kept

    def look(self, away: Collection[int], now_s: float) -> None:
        """Which lanes are not connected now."""
        self._away_s = {lane: self._away_s.get(lane, now_s) for lane in away}

    def paused(self) -> None:
        """This process did not run for a while: who is away is waited for anew."""
        self._away_s.clear()

    def forget(self) -> None:
        """Another log counts: lanes have made other contributions than those that they spoke of."""
        self._kept.clear()

    def are_gone(self, log: MembershipLog, held: Sequence[int], now_s: float, *, ended: Collection[int] = ()) -> bool:
        """Whether this lane lacks decided rounds of `log` that who made them can give no more. held: by lane, so many
        rounds of it are held, or needed by nobody. ended: who said that it needs nothing more."""
        gone = self._gone(log.members, now_s, ended)
        return any(
            lane != self._lane and held[lane] < needed and (held[lane] < self._kept.get(lane, 0) or lane in gone)
            for lane, needed in log.contributed_before().items()
        )

    def _gone(self, members: Collection[int], now_s: float, ended: Collection[int]) -> set[int]:
        """Who is not there, and not waited for any more."""
        patience_s: Mapping[int, float] = {
            lane: min(self._ended_s, self._deadline_s) if lane in ended else self._deadline_s
            for lane in self._away_s
            if lane not in members or lane in ended
        }
        return {lane for lane, most_s in patience_s.items() if now_s >= self._away_s[lane] + most_s}
