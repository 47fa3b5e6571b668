"""What all lateral links of a node have in common: sizes, rates, deadlines, and whom they tell of what comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...protocol.control_messages import STEP_MAX, CopyFrame, Heartbeat
from ...protocol.lane_status import LaneStatus
from ...protocol.round_transfer import ContributionBytes
from ...sim.links.shaper import LinkProfile

Check = Callable[[int, int, bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LateralSettings:
    """contribution_bytes: of this stage's contribution to a round; any round, and 1 or more. check: of a round and a
    lane, raises CodecError for bytes that this lane cannot have contributed; called on threads, one at a time. profile:
    of each link. silence_s: without a frame, after which a peer counts as gone. deadline_s: without a sign of life,
    after which who waits for a peer gives up. heartbeat: what this node would say now. joining: whether it has yet to
    take its place in its lane. rounds: how many the run has. status: what this node says of its lane, if it speaks for
    it. on_status is told what peers say of theirs, with None where one is not connected any more; on_ended which of
    them needs nothing more; on_met who is connected; on_copy what is said on copies of states. generation: in which the
    nodes at both ends have to be; None: each lane has its own.
    """

    contribution_bytes: ContributionBytes
    profile: LinkProfile
    silence_s: float
    greeting_timeout_s: float
    deadline_s: float
    heartbeat: Callable[[], Heartbeat]
    joining: Callable[[], bool] = lambda: False
    seed: int = 0
    check: Check = lambda *_: None
    generation: Callable[[], int | None] = lambda: None
    rounds: Callable[[], int] = lambda: STEP_MAX
    status: Callable[[], LaneStatus | None] | None = None
    on_status: Callable[[int, LaneStatus | None], None] = lambda *_: None
    on_ended: Callable[[int], None] = lambda *_: None
    on_met: Callable[[int], None] = lambda *_: None
    on_copy: Callable[[int, CopyFrame], None] = lambda *_: None
