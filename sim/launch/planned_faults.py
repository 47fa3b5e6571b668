"""Which faults happen to which node of a swarm, and when: drawn at random, and the same for the same seed.

    kill       SIGKILL to a node; it is started again and has to find its way back
    twice      a second SIGKILL, to another node, while the run recovers from the first loss
    pause      SIGSTOP for a moment: a machine that hangs, and comes back before it is missed
    sleeper    SIGSTOP, a replacement in its place, SIGCONT: the one that wakes up must be kept out
    disk       SIGKILL to a node, and its checkpoints are lost; it comes back from the copy that its neighbour kept
    cut        every connection of one boundary is reset
    half       the same, but only the upper end notices

and where there are lanes, which the others go on without once a round has waited for them long enough (of chunks, which
do not, `lateral` alone):

    lane       SIGKILL to all nodes of a lane; they are started again once the others have left it out
    absent     the same with one node of it
    hang       SIGSTOP to a node, and SIGCONT once its lane was left out
    lateral    every connection of one lateral link is reset
    outage     one lateral link is down for a while, shorter or longer than a round waits
    partition  all lateral links of a lane are down until it was left out: both sides go on by themselves
    join       a lane is not there from the start, and comes at that moment; once in a run

A node is (lane, stage), and numbered as in `local_swarm.Swarm`. The moment of a fault, a step and a part of it, is
drawn from the seed. What the machine does in that instant, and in which order it notices, differs from run to run.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

ChainKind = Literal["kill", "twice", "pause", "sleeper", "disk", "cut", "half"]
LaneKind = Literal["lane", "absent", "hang", "lateral", "outage", "partition", "join"]
Kind = ChainKind | LaneKind
CHAIN_KINDS: tuple[Kind, ...] = get_args(ChainKind)
LANE_KINDS: tuple[Kind, ...] = get_args(LaneKind)
KINDS = CHAIN_KINDS + LANE_KINDS
OF_BOUNDARY: tuple[Kind, ...] = ("sleeper", "disk", "cut", "half")  # who is in them has a stage below, or a neighbour
SHORT_AND_LONG = (0.4, 1.6)  # of an outage, in the time that a round waits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault: of stage `stage` of lane `lane` (for cuts: of the boundary below it; for links between lanes: towards
    lane `other`) once the run has done `step` steps, `part` of a step later; or, where `after_s` is given, so many
    seconds after the first step."""

    kind: Kind
    step: int
    part: float
    stage: int
    second: int  # another node, by its number, for `twice`
    after_s: float | None = None
    lane: int = 0
    other: int = 0
    length: float = SHORT_AND_LONG[0]  # of an outage

    def where(self, lanes: int, lane: int | None = None) -> str:
        """For people. lane: to which it happened, if not to its own."""
        lane = self.lane if lane is None else lane
        if self.kind in ("lane", "partition", "join"):
            return f"lane {lane}"
        if self.kind in ("lateral", "outage"):
            low, high = self.between(lane)
            return f"stage {self.stage}, lanes {low} and {high}"
        return f"stage {self.stage}" if lanes == 1 else f"stage {self.stage} of lane {lane}"

    def between(self, lane: int) -> tuple[int, int]:
        """The lanes at the ends of a lateral link of `lane`, the lower one first."""
        low, high = sorted((lane, self.other if self.other != lane else self.lane))
        return low, high


def kinds_for(*, stages: int, lanes: int, grouped: bool = False) -> tuple[Kind, ...]:
    """Those that can happen to such a grid. grouped: its lanes hold chunks of the same sequences, and cannot go on
    without one another."""
    of_lanes: tuple[Kind, ...] = (("lateral",) if grouped else LANE_KINDS) if lanes > 1 else ()
    of_chain: tuple[Kind, ...] = tuple(kind for kind in CHAIN_KINDS if stages > 1 or kind not in OF_BOUNDARY)
    return of_chain + of_lanes


def plan(
    seed: int, *, steps: int, stages: int, count: int, kinds: Sequence[Kind] = CHAIN_KINDS, lanes: int = 1
) -> list[PlannedFault]:
    """`count` faults, spread over the run so that the last ones still have steps before them. Kinds take turns."""
    chance = random.Random(seed)
    last = max(1, steps - 2)
    moments = sorted(chance.uniform(0, last) for _ in range(count))
    drawn = _draw(chance, stages, lanes, kinds)
    return [replace(fault, step=int(moment), part=moment % 1) for moment, fault in zip(moments, drawn, strict=False)]


def plan_every(
    every_s: float, seed: int, *, stages: int, kinds: Sequence[Kind] = CHAIN_KINDS, lanes: int = 1
) -> Iterator[PlannedFault]:
    """A fault every so many seconds, without end. Kinds take turns."""
    for number, fault in enumerate(_draw(random.Random(seed), stages, lanes, kinds), start=1):
        yield replace(fault, after_s=number * every_s)


def joining_lane(lanes: int, kinds: Sequence[Kind]) -> int | None:
    """The one that is not there from the start: the last; None: all are."""
    return lanes - 1 if "join" in kinds else None


def _draw(chance: random.Random, stages: int, lanes: int, kinds: Sequence[Kind]) -> Iterator[PlannedFault]:
    absent = joining_lane(lanes, kinds)  # nothing can happen to it before it has come
    outages = itertools.cycle(SHORT_AND_LONG)
    come = False
    for kind in itertools.cycle(kinds):
        if kind == "join" and come:
            if set(kinds) == {"join"}:
                return
            continue
        # A boundary has a stage above it; the last stage dials nobody, so nobody tells it that it was replaced.
        within = stages - 1 if kind in ("cut", "half", "sleeper") else stages
        stage = chance.randrange(within)
        present = lanes if absent is None or come else lanes - 1
        lane = chance.randrange(present) if lanes > 1 else 0
        node, nodes = lane * stages + stage, present * stages
        second = (node + chance.randrange(1, nodes)) % nodes if nodes > 1 else node
        fault = PlannedFault(kind=kind, step=0, part=0.0, lane=lane, stage=stage, second=second)
        if lanes > 1:
            among = present if present > 1 else lanes
            fault = replace(fault, other=(lane + chance.randrange(1, among)) % among)
        if kind == "outage":
            fault = replace(fault, length=next(outages))
        if kind == "join":
            assert absent is not None
            fault, come = replace(fault, lane=absent), True
        yield fault
