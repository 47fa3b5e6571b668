"""For how long a lane that follows waits while nothing happens anywhere: a deadline for many waits at once.

It may wait for hours, as long as the others train: rounds are seldom, and so are checkpoints that it could take up.
Each of these waits by itself would need to know how long the others take. What it must not do is to wait for lanes that
are through and have nothing for it, that never come, or that wait for it. So it looks at all that could matter to it,
and gives up when none of that changes any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from .waited_peer import WaitedPeer

THROUGH_S = 120.0  # where all others are through: nothing can come of them but what they have


class Standstill:
    """peers: this stage in the other lanes. deadline_s: that a round waits for a lane, and this one no shorter than
    that; lost_s: that somebody who was lost is waited for."""

    def __init__(self, peers: Sequence[WaitedPeer], *, deadline_s: float, lost_s: float) -> None:
        self._peers, self._deadline_s, self._lost_s = peers, deadline_s, lost_s
        self._known: object = None
        self._since_s = 0.0

    def check(self, following: int, mine: object, now_s: float, *, paused_ago_s: float) -> None:
        """Of a lane that follows from so many steps on; mine: what is known of itself. now_s: by any clock.
        paused_ago_s: how long ago this process was stopped for a while. Raises TimeoutError, which says what is lacking
        and how the others are."""
        others = [(each.connected, each.heartbeat and each.heartbeat.completed_steps) for each in self._peers]
        if (known := (following, mine, others)) != self._known:
            self._known, self._since_s = known, now_s
        through = all(each.done for each in self._peers)
        most_s = max(THROUGH_S if through else self._lost_s, self._deadline_s)
        if min(now_s - self._since_s, paused_ago_s) < most_s:
            return
        raise TimeoutError(
            f"this lane follows the others, from {following} steps on; for {most_s:g} s nothing has come that it "
            f"lacks, and no lane has a state that it could take up ({'; '.join(each.state for each in self._peers)}); "
            "start all lanes again with --resume"
        )
