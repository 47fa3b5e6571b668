"""Which node serves which place, agreed without a coordinator: rules over the records that every node can read. A place
is a stage of a lane; where there is one lane, it is a stage.

A new node writes a claim, waits until the others' claims can have reached it, reads again, and keeps the place if no
record for it is better than its own. `better` is one fixed order over what is written, so two nodes that see the same
two records agree on which of them yields. Each writes before it reads: of two claims at least one is seen by the other
node, and the later node sees the earlier one settled, if settling takes less than the wait. So the clocks of the two,
which nobody compares, decide at most between two nodes that came at once.

A lane trains nothing until all its stages are served. So the lanes are filled one after the other: first a lane that
lacks a stage while others of its stages are served, and only then the next lane.

Why not a lock or an election: both need a holder, and its loss would be one loss more. If two nodes of one place remain
after all, the neighbour refuses one of them (`protocol.rollback`), as it does without discovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .grid_place import GridPlace
from .node_record import NodeRecord, NodeState, Seen

KEEPS_UP = 1.1  # times its own speed: what is measured twice differs by as much
CLAIM_WAIT_S = 2.0  # between a claim and the second look; longer than it takes to read and write once


def priority(record: NodeRecord) -> tuple[bool, int, float, int]:
    """The less, the better: who has settled before who only claims, of these the later generation (its members are the
    run), then the earlier claim, then the lower number."""
    return (record.state is NodeState.CLAIMING, -record.generation, record.claimed_at_s, record.incarnation)


def better(a: NodeRecord, b: NodeRecord) -> bool:
    return priority(a) < priority(b)


def of_place(seen: Sequence[Seen], place: GridPlace) -> list[Seen]:
    """The living records of a place, the best first."""
    return sorted(
        (each for each in seen if each.living and each.record.place == place), key=lambda s: priority(s.record)
    )


def rival(seen: Sequence[Seen], mine: NodeRecord) -> NodeRecord | None:
    """Who has the place that `mine` says, if that is somebody else."""
    others = [each.record for each in of_place(seen, mine.place) if each.record.incarnation != mine.incarnation]
    return next((other for other in others if better(other, mine)), None)


def neediest(seen: Sequence[Seen], places: Iterable[GridPlace]) -> list[GridPlace]:
    """Those of `places` that nobody serves or claims and that need a node most: of lanes that are served in part, or
    else of the first lane that is not served at all; and there never served, or the longest without. All of one need
    are named together, since it is nobody's order in which they are taken."""
    free = [place for place in places if not of_place(seen, place)]
    in_part = {each.record.lane for each in seen if each.living}
    first = min((place.lane for place in free), default=0)
    free = [place for place in free if place.lane in in_part] or [place for place in free if place.lane == first]
    last_s = {place: min((s.age_s for s in seen if s.record.place == place), default=float("inf")) for place in free}
    never = [place for place in free if last_s[place] == float("inf")]
    return never or sorted(free, key=lambda place: -last_s[place])[:1]


def fitting(places: Sequence[GridPlace], speeds: Sequence[float], own: float | None) -> list[GridPlace]:
    """Those of `places`, which need a node alike, whose stage was cut for a machine as fast as this one: of the fastest
    that it can keep up with, or of the slowest if it cannot keep up with any. speeds: one for each stage of the run, in
    the unit of `own`; none, or no `own`: all fit."""
    if not places or not speeds or own is None:
        return list(places)
    within = [speeds[place.stage] for place in places if speeds[place.stage] <= own * KEEPS_UP]
    wanted = max(within) if within else min(speeds[place.stage] for place in places)
    return [place for place in places if speeds[place.stage] == wanted]


def choose(
    seen: Sequence[Seen],
    places: Iterable[GridPlace],
    draw: Callable[[int], int],
    fits: Callable[[Sequence[GridPlace]], Sequence[GridPlace]] = list,
) -> GridPlace | None:
    """The place to claim: one of the neediest that `fits` leaves, by draw(count) in 0..count-1, so that many who come
    at once seldom want the same; None: all are served."""
    wanted = fits(neediest(seen, places))
    return wanted[draw(len(wanted))] if wanted else None


def has_started(seen: Sequence[Seen], place: GridPlace) -> bool:
    """Whether a node that takes `place` now takes it in a lane that has begun, so that it must not begin afresh. What
    other lanes have done says nothing of this one."""

    def shows(record: NodeRecord) -> bool:
        if record.state is NodeState.TRAINING or record.generation or record.completed_steps or record.committed_steps:
            return True
        return record.place == place and record.state in (NodeState.WAITING, NodeState.LEFT)

    return any(shows(each.record) for each in seen if each.record.lane == place.lane)


def finished_lanes(seen: Sequence[Seen], steps: int) -> set[int]:
    """Those that have done all steps: one of their nodes left after the last."""
    return {
        each.record.lane
        for each in seen
        if each.record.state is NodeState.LEFT and each.record.completed_steps >= steps
    }
