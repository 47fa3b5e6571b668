"""Which node serves which stage, agreed without a coordinator: rules over the records that every node can read.

A new node writes a claim, waits until the others' claims can have reached it, reads again, and keeps the stage if no
record for it is better than its own. `better` is one fixed order over what is written, so two nodes that see the same
two records agree on which of them yields. Each writes before it reads: of two claims at least one is seen by the other
node, and the later node sees the earlier one settled, if settling takes less than the wait. So the clocks of the two,
which nobody compares, decide at most between two nodes that came at once.

Why not a lock or an election: both need a holder, and its loss would be one loss more. If two nodes of one stage remain
after all, the neighbour refuses one of them (`protocol.rollback`), as it does without discovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .node_record import NodeRecord, NodeState, Seen

KEEPS_UP = 1.1  # times its own speed: what is measured twice differs by as much
CLAIM_WAIT_S = 2.0  # between a claim and the second look; longer than it takes to read and write once


def priority(record: NodeRecord) -> tuple[bool, int, float, int]:
    """The less, the better: who has settled before who only claims, of these the later generation (its members are the
    run), then the earlier claim, then the lower number."""
    return (record.state is NodeState.CLAIMING, -record.generation, record.claimed_at_s, record.incarnation)


def better(a: NodeRecord, b: NodeRecord) -> bool:
    return priority(a) < priority(b)


def of_stage(seen: Sequence[Seen], stage: int) -> list[Seen]:
    """The living records of a stage, the best first."""
    return sorted(
        (each for each in seen if each.living and each.record.stage == stage), key=lambda s: priority(s.record)
    )


def rival(seen: Sequence[Seen], mine: NodeRecord) -> NodeRecord | None:
    """Who has the stage that `mine` says, if that is somebody else."""
    others = [each.record for each in of_stage(seen, mine.stage) if each.record.incarnation != mine.incarnation]
    return next((other for other in others if better(other, mine)), None)


def neediest(seen: Sequence[Seen], stages: Iterable[int]) -> list[int]:
    """Those of `stages` that nobody serves or claims and that need a node most: never served, or the longest without.
    All of one need are named together, since it is nobody's order in which they are taken."""
    free = [stage for stage in stages if not of_stage(seen, stage)]
    last_s = {stage: min((s.age_s for s in seen if s.record.stage == stage), default=float("inf")) for stage in free}
    never = [stage for stage in free if last_s[stage] == float("inf")]
    return never or sorted(free, key=lambda stage: -last_s[stage])[:1]


def fitting(stages: Sequence[int], speeds: Sequence[float], own: float | None) -> list[int]:
    """Those of `stages`, which need a node alike, that were cut for a machine as fast as this one: of the fastest that
    it can keep up with, or of the slowest if it cannot keep up with any. speeds: one for each stage of the run, in the
    unit of `own`; none, or no `own`: all fit."""
    if not stages or not speeds or own is None:
        return list(stages)
    within = [speeds[stage] for stage in stages if speeds[stage] <= own * KEEPS_UP]
    wanted = max(within) if within else min(speeds[stage] for stage in stages)
    return [stage for stage in stages if speeds[stage] == wanted]


def choose(
    seen: Sequence[Seen],
    stages: Iterable[int],
    draw: Callable[[int], int],
    fits: Callable[[Sequence[int]], Sequence[int]] = list,
) -> int | None:
    """The stage to claim: one of the neediest that `fits` leaves, by draw(count) in 0..count-1, so that many who come
    at once seldom want the same; None: all are served."""
    wanted = fits(neediest(seen, stages))
    return wanted[draw(len(wanted))] if wanted else None


def has_started(seen: Sequence[Seen], stage: int) -> bool:
    """Whether a node that takes `stage` now takes it in a run that has begun, so that it must not begin afresh."""

    def shows(record: NodeRecord) -> bool:
        if record.state is NodeState.TRAINING or record.generation or record.completed_steps or record.committed_steps:
            return True
        return record.stage == stage and record.state in (NodeState.WAITING, NodeState.LEFT)

    return any(shows(each.record) for each in seen)


def is_finished(seen: Sequence[Seen], steps: int) -> bool:
    """Whether the run has done all its steps: one of its nodes left after the last."""
    return any(each.record.state is NodeState.LEFT and each.record.completed_steps >= steps for each in seen)
