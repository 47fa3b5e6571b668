"""What the stages of a lane tell each other of rounds, on control streams: up how far they are, down what counts.

A neighbour that connects knows nothing yet, and is told again. Otherwise only what is new is said.

When all stages are through, control streams end, while other lanes may need what this one has, and hear of it from
stage 0. So what was said last from below holds from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...protocol.errors import RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ...protocol.lane_status import LaneStatus, StatusExchange
from ...protocol.membership_log import MembershipLog
from ...protocol.rollback_actions import Side
from ...protocol.round_messages import RoundStatus


class ChainStatuses:
    """Of one stage, in a run of so many rounds. tell: says a frame to a neighbour, if it is there; refuse: ends the
    connection to it."""

    def __init__(
        self,
        identity: NodeIdentity,
        rounds: int,
        *,
        tell: Callable[[Side, RoundStatus], None],
        refuse: Callable[[Side, RemoteProtocolError], None],
    ) -> None:
        self._identity, self._rounds, self._tell, self._refuse = identity, rounds, tell, refuse
        self.below: LaneStatus | None = None  # what all stages below have said
        self._last_below: LaneStatus | None = None  # the same, though they may be gone
        self._is_through = False
        self._above: LaneStatus | None = None  # what came from above and was not taken
        self._said: dict[Side, LaneStatus | None] = {}
        self._exchanges: dict[Side, StatusExchange] = {side: self._exchange() for side in ("above", "below")}

    def _exchange(self) -> StatusExchange:
        return StatusExchange(self._identity.lanes, self._rounds)

    def met(self, side: Side) -> None:
        """A neighbour is connected, and knows nothing yet."""
        self._exchanges[side], self._said[side] = self._exchange(), None

    def parted(self, side: Side) -> None:
        """It is not any more."""
        if side == "below" and not self._is_through:
            self.below = None

    def through(self, saved: int) -> None:
        """All stages are, and have written a checkpoint after so many steps."""
        self._is_through = True
        if last := self.below or self._last_below:
            self.below = replace(last, saved=saved)

    def receive(self, side: Side, frame: RoundStatus) -> None:
        """A neighbour's."""
        try:
            status = self._exchanges[side].hear(frame)
        except RemoteProtocolError as error:
            self._refuse(side, error)
            return
        if side == "below":
            self.below = self._last_below = status
        else:
            self._above = status

    def take(self) -> LaneStatus | None:
        """What stage 0 says, if there is something new."""
        news, self._above = self._above, None
        return news

    def say(self, side: Side, status: LaneStatus) -> None:
        """Unless it was said."""
        there = not (self._identity.first if side == "above" else self._identity.last)
        if there and self._said.get(side) != status:
            self._said[side] = status
            self._tell(side, self._exchanges[side].say(status))

    # -- of all stages from this one down -----------------------------------------------------------------------------

    def follow(self, completed: int) -> bool:
        """Whether all stages below follow from that step."""
        return self._identity.last or (self.below is not None and self.below.returning == completed + 1)

    def is_agreed(self, log: MembershipLog) -> bool:
        """Whether all stages below go by that log, so that what they hold is what counts."""
        return self._identity.last or (self.below is not None and self.below.log.differs_from(log) is None)

    def joined(self, mine: LaneStatus) -> LaneStatus:
        """What this stage says of itself, and of all below it. These hold nothing as long as they go by another log;
        what all have to say is said when all do."""
        if self._identity.last:
            return mine
        if (below := self.below) is None:
            return replace(mine, held=(0,) * len(mine.held), admitted=(), returning=0, source=0, saved=0)
        agrees = self.is_agreed(mine.log)
        both_take = (mine.source, mine.returning) == (below.source, below.returning)
        if mine.source and not both_take:
            mine = replace(mine, source=0, returning=0)
        return replace(
            mine,
            held=tuple(min(pair) if agrees else 0 for pair in zip(mine.held, below.held, strict=True)),
            admitted=tuple(each for each in mine.admitted if each in below.admitted),
            returning=mine.returning if mine.returning == below.returning else 0,
            saved=min(mine.saved, below.saved),
            kept=max(mine.kept, below.kept),
            forgot=max(mine.forgot, below.forgot),
            there=tuple(sorted({*mine.there, *below.there})),
        )
