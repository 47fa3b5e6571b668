"""How far a lane is in rounds, as it says it: to other lanes, and within a lane from stage to stage.

The same frame (`RoundStatus`) carries it on both streams. What it means is `protocol.round_membership`'s; here is what
of it is said when, and what of a peer's is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from .control_messages import STEP_MAX
from .errors import Fault, RemoteProtocolError
from .membership_log import Entry, MembershipLog, Stretch
from .round_messages import STATUS_NUMBERS, RoundStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStatus:
    """What one lane says of itself, or a stage of it and all below that stage.

    held: by lane, so many rounds of that lane's contributions, counted from the first, are held by all stages of this
    one, or needed by none; of its own, made. log: the one that counts for it. admitted: who is to enter. returning: 1 +
    the steps from which this lane goes on, having been left out; 0: it was not. source: 1 + the lane whose state after
    them it takes up; 0: its own. saved: steps after which all its stages have a checkpoint. kept: its contributions
    before this round are gone. forgot: a stage of it has promised never to ask for a round before this one. there:
    within a lane, the others to which one of its stages is connected, whatever has become of their other stages.
    """

    held: tuple[int, ...]
    log: MembershipLog
    admitted: tuple[Entry, ...] = ()
    returning: int = 0
    source: int = 0
    saved: int = 0
    kept: int = 0
    forgot: int = 0
    there: tuple[int, ...] = ()


class StatusExchange:
    """Statuses over one connection, both ways: what seldom changes, the stretches of the log, is said when it does."""

    def __init__(self, lanes: int, rounds: int = STEP_MAX) -> None:
        self._lanes, self._rounds = lanes, rounds
        self._said: tuple[Stretch, ...] = ()
        self._heard: tuple[Stretch, ...] = ()

    def say(self, status: LaneStatus) -> RoundStatus:
        """The frame for it."""
        stretches = () if status.log.stretches == self._said else status.log.stretches
        self._said = status.log.stretches
        numbers = {each: getattr(status, each) for each in STATUS_NUMBERS}
        known = {"held": status.held, "decided": status.log.decided, "admitted": status.admitted}
        known |= {"there": status.there}
        return RoundStatus(**known, stretches=stretches, **numbers)

    def hear(self, frame: RoundStatus) -> LaneStatus:
        """What the peer says. Raises RemoteProtocolError for lanes and rounds that the run does not have, and for a log
        that contradicts itself."""
        stretches = frame.stretches or self._heard
        lanes = [lane for each in stretches for lane in each.members]
        lanes += [lane for each in frame.admitted for lane in (each.lane, each.source)]
        lanes += [entry.source for each in stretches for entry in each.entered]
        lanes += [frame.source - 1] if frame.source else []
        lanes += frame.there
        if len(frame.held) != self._lanes or max(lanes, default=0) >= self._lanes:
            line = f"a status of {len(frame.held)} lanes and members {sorted(set(lanes))}, this run has {self._lanes}"
            raise RemoteProtocolError(Fault.MALFORMED, line)
        if (most := max(frame.decided, *frame.held)) > self._rounds:
            raise RemoteProtocolError(Fault.MALFORMED, f"a status of {most} rounds, this run has {self._rounds}")
        if not stretches or stretches[-1].first > max(0, frame.decided - 1):
            line = f"{frame.decided} rounds are decided, by a log that goes further, or is not known"
            raise RemoteProtocolError(Fault.MALFORMED, line)
        self._heard = stretches
        log = MembershipLog(stretches, frame.decided)
        numbers = {each: getattr(frame, each) for each in STATUS_NUMBERS}
        return LaneStatus(held=frame.held, log=log, admitted=frame.admitted, there=frame.there, **numbers)
