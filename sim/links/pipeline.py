"""A pipeline on a virtual clock: what a schedule makes of given compute times, message sizes and links.

The schedule is the one that nodes execute (`protocol.schedule`), action by action: an action starts when its stage is
free and what it waits for has arrived, its result takes the wire when that is free, and arrives one latency after its
last bit left. Nothing is averaged, so bubbles, waits for gradients and links that starve come out by themselves. Why
not a formula: those for 1F1B assume links that are instant, or never the bottleneck, and between the two lies what we
want to know.

Two rules for links:
- `duplex`: each direction of a boundary is a wire of its own, taken for bits/rate; latency occupies nothing. This is
  what `sim.links.shaper` does at each sender.
- `shared`: all that comes into a stage, activations and gradients, shares one wire, and latency occupies it too, as in
  Protocol NanoGPT's simulated links (its published figures are reproduced in tests/test_pipeline.py).

What is left out: bounded buffers between stages, a bucket's burst, and codec work unless it is part of the times given.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...protocol.paired import partner
from ...protocol.schedule import (
    Action,
    Backward,
    BroadcastNorm,
    Evaluate,
    Forward,
    InputGradient,
    ReduceNorm,
    Schedule,
    Step,
    Upward,
    WeightGradient,
    prerequisites,
    receiver,
)
from ...protocol.step_orders import DelayedOrder, overlapping_peak
from .shaper import LinkProfile

MEAN_OF_STEPS = 4  # that overlap: their lengths may alternate
Rule = Literal["duplex", "shared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTimes:
    """Of two microbatches that are computed in turns: until the first is done, and from then until the second is."""

    forward_s: tuple[float, float]
    backward_s: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of compute of one stage: of one microbatch forward and backward, and of a step's end.

    weight_s: the part of backward_s that is for weight gradients; unless it is known, half, as for matrices alone.
    pair: under a schedule of pairs; None: two take twice as long as one.
    """

    forward_s: float
    backward_s: float
    weight_s: float | None = None
    step_s: float = 0.0
    pair: PairTimes | None = None

    @property
    def mean_forward_s(self) -> float:
        """Of a microbatch, in a pair where there is one."""
        return sum(self.pair.forward_s) / 2 if self.pair else self.forward_s

    @property
    def mean_backward_s(self) -> float:
        return sum(self.pair.backward_s) / 2 if self.pair else self.backward_s

    def in_pair(self, action: Forward | Upward) -> float:
        """Of one action of two that are done together."""
        if not self.pair:
            return self.of(action)
        which = action.microbatch % 2
        if isinstance(action, Forward):
            return self.pair.forward_s[which]
        whole_s = sum(self.pair.backward_s)
        later_s = 2 * self.weight_gradient_s if isinstance(action, InputGradient) else 0.0
        return self.pair.backward_s[which] * (1 - later_s / whole_s) if whole_s else 0.0

    @property
    def weight_gradient_s(self) -> float:
        return self.backward_s / 2 if self.weight_s is None else self.weight_s

    def of(self, action: Action) -> float:
        match action:
            case Forward() | Evaluate():
                return self.forward_s
            case Backward():
                return self.backward_s
            case InputGradient():
                return self.backward_s - self.weight_gradient_s
            case WeightGradient():
                return self.weight_gradient_s
            case Step():
                return self.step_s
            case ReduceNorm() | BroadcastNorm():
                return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """What crosses between two stages for each microbatch, in framed bytes, and the link, alike in both directions.

    norm_bytes: what crosses once a step and direction where stages agree on a gradient norm (`protocol.global_norm`).
    """

    forward_bytes: int
    backward_bytes: int
    link: LinkProfile
    norm_bytes: int = 0

    def bytes_of(self, action: Action) -> int:
        if isinstance(action, ReduceNorm | BroadcastNorm):
            return self.norm_bytes
        return self.backward_bytes if isinstance(action, Upward) else self.forward_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of work: of a stage (action), or of the wire into `stage` from its neighbour `sender`."""

    stage: int
    sender: int | None  # None: compute
    step: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """step_s: seconds from the beginning of the last step but one to the last one's, at the stage where that takes
    longest: the others may run ahead of a slow one for a few steps, as weight gradients that wait let them. Earlier
    steps fill the pipeline. Shares are of that time: of compute by stage, and of the wire by (sender, receiver)."""

    step_s: float
    compute_share: list[float]
    wire_share: dict[tuple[int, int], float]
    peak_in_flight: list[int]
    spans: list[Span]

    @property
    def bottleneck(self) -> str:
        """What is busiest, in words."""
        stage = max(range(len(self.compute_share)), key=self.compute_share.__getitem__)
        wire = max(self.wire_share, key=self.wire_share.__getitem__, default=None)
        if wire is None or self.compute_share[stage] >= self.wire_share[wire]:
            return f"compute of stage {stage}"
        return f"the link from stage {wire[0]} to stage {wire[1]}"


class Wires:
    """When each wire is free again, and when what it carries arrives."""

    def __init__(self, boundaries: Sequence[Boundary], rule: Rule) -> None:
        self._boundaries, self._rule = boundaries, rule
        self._free_s: dict[object, float] = defaultdict(float)

    def send(self, sender: int, receiver: int, action: Action, now_s: float) -> tuple[float, float, float]:
        """When the message takes the wire, when it leaves it, and when it has arrived."""
        boundary = self._boundaries[min(sender, receiver)]
        rate = boundary.link.rate_bits_per_s
        bits_s = 0.0 if rate is None else boundary.bytes_of(action) * 8 / rate
        wire = receiver if self._rule == "shared" else (sender, receiver)
        start_s = max(self._free_s[wire], now_s)
        arrive_s = start_s + bits_s + boundary.link.latency_s
        self._free_s[wire] = arrive_s if self._rule == "shared" else start_s + bits_s
        return start_s, self._free_s[wire], arrive_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """One action of a stage, as it recurs in every step; actions have numbers because those hash faster."""

    action: Action
    number: int
    seconds: float
    needs: tuple[tuple[int, int], ...]  # whose action, its number
    receiver: int | None


class _Pipeline:
    """Events in order of time; of equal times, in order of cause."""

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[StageTimes],
        boundaries: Sequence[Boundary],
        microbatches: int,
        steps: int,
        rule: Rule,
        hold: Hold | None = None,
        delay: int = 0,
    ) -> None:
        self._wires = Wires(boundaries, rule)
        self._hold = hold
        self._held = [-1] * len(stages)  # the newest step whose hold is over
        self._streams = _planned(schedule, stages, microbatches, steps, delay)
        self._at = [0] * len(stages)  # the next action, counted over all steps
        self._idle = [True] * len(stages)
        self._here: list[set[tuple[int, int, int]]] = [set() for _ in stages]  # what has arrived: step, whose, number
        # When, order, at stage, step, whose, what; None for what: the stage was held, and may go on.
        self._events: list[tuple[float, int, int, int, int, _Planned | None]] = []
        self._order = itertools.count()
        self.spans: list[Span] = []

    def run(self) -> None:
        for stage in range(len(self._streams)):
            self._begin(stage, 0.0)
        while self._events:
            now_s, _, stage, step, whose, planned = heapq.heappop(self._events)
            if planned is not None:
                self._here[stage].add((step, whose, planned.number))
            if whose == stage:
                self._idle[stage] = True
                if planned is not None:
                    self._send(stage, step, planned, now_s)
            self._begin(stage, now_s)

    def _begin(self, stage: int, now_s: float) -> None:
        """Start the next action if it can start now."""
        stream = self._streams[stage]
        if not self._idle[stage] or self._at[stage] == len(stream):
            return
        (step, planned), here = stream[self._at[stage]], self._here[stage]
        if self._hold and self._held[stage] < step and self._hold.before(planned.action):
            self._held[stage] = step
            until_s = self._hold.until_s(stage, step, now_s)
            if until_s > now_s:
                self._idle[stage] = False
                self._push(until_s, stage, step, stage, None)
                return
        needed = [(step, whose, number) for whose, number in planned.needs]
        if not here.issuperset(needed):
            return
        here.difference_update(needed)
        self._idle[stage] = False
        self._at[stage] += 1
        end_s = now_s + planned.seconds
        self.spans.append(Span(stage=stage, sender=None, step=step, action=planned.action, start_s=now_s, end_s=end_s))
        self._push(end_s, stage, step, stage, planned)

    def _send(self, stage: int, step: int, planned: _Planned, now_s: float) -> None:
        if (receiver := planned.receiver) is None:
            return
        action = planned.action
        start_s, end_s, arrive_s = self._wires.send(stage, receiver, action, now_s)
        self.spans.append(Span(stage=receiver, sender=stage, step=step, action=action, start_s=start_s, end_s=end_s))
        self._push(arrive_s, receiver, step, stage, planned)

    def _push(self, when_s: float, stage: int, step: int, whose: int, planned: _Planned | None) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), stage, step, whose, planned))


class Hold(Protocol):
    """What stages wait for besides one another, once in each step."""

    def before(self, action: Action) -> bool:
        """Whether it is in front of this action, or of the step's first such action."""
        ...

    def until_s(self, stage: int, step: int, now_s: float) -> float:
        """When the stage, which comes to it now, may go on."""
        ...


def _planned(
    schedule: Schedule, stages: Sequence[StageTimes], microbatches: int, steps: int, delay: int
) -> list[list[tuple[int, _Planned]]]:
    """Every stage's stream: (step, action)."""
    count, numbers = len(stages), defaultdict[Action, int](itertools.count().__next__)
    streams: list[list[tuple[int, _Planned]]] = []
    for stage, times in enumerate(stages):
        shape = {"stage": stage, "stages": count, "microbatches": microbatches}
        known: dict[Action, _Planned] = {}
        for action in schedule.actions(**shape):
            needs, seconds = prerequisites(action, stage=stage, stages=count), times.of(action)
            if isinstance(action, Forward | Upward) and (other := partner(schedule, action, microbatches)):
                # Both begin when what both need is here.
                first = action.microbatch < other.microbatch
                needs = (*needs, *prerequisites(other, stage=stage, stages=count)) if first else ()
                seconds = times.in_pair(action)
            known[action] = _Planned(
                action=action,
                number=numbers[action],
                seconds=seconds,
                needs=tuple((whose, numbers[what]) for whose, what in needs),
                receiver=receiver(action, stage=stage, stages=count),
            )
        order = DelayedOrder(schedule, **shape, end=steps) if delay else itertools.product(range(steps), known)
        streams.append([(step, known[action]) for step, action in order])
    return streams


def simulate(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    boundaries: Sequence[Boundary],
    *,
    microbatches: int,
    steps: int | None = None,
    rule: Rule = "duplex",
    delay: int = 0,
) -> Simulation:
    """`steps` training steps (default: 3, or as many as it takes to settle) without a barrier between them, as nodes
    run them; figures are of the last one but one, which has neighbours on both sides. delay: of gradients, in steps; 1:
    steps overlap, figures are the mean of the last four but one, and what an evaluation or a checkpoint costs by
    emptying the pipeline is left out. Raises ValueError for counts that make no pipeline, and ScheduleError for an
    order whose steps cannot overlap."""
    steps = steps or (3 * MEAN_OF_STEPS if delay else 3)
    if len(boundaries) != len(stages) - 1 or steps < 3:
        raise ValueError(
            f"{len(stages)} stages, {len(boundaries)} boundaries and {steps} steps: wanted one boundary "
            "fewer than stages, and 3 steps or more"
        )
    pipeline = _Pipeline(schedule, stages, boundaries, microbatches, steps, rule, delay=delay)
    pipeline.run()
    begins, over = _begins(pipeline.spans), MEAN_OF_STEPS if delay else 1
    first = steps - 1 - over
    step_s = max(begins[stage, steps - 1] - begins[stage, first] for stage in range(len(stages))) / over
    busy: dict[object, float] = defaultdict(float)
    for span in pipeline.spans:
        if first <= span.step < steps - 1:
            key = span.stage if span.sender is None else (span.sender, span.stage)
            busy[key] += (span.end_s - span.start_s) / over
    in_flight = functools.partial(overlapping_peak, schedule) if delay else schedule.peak_in_flight
    pairs = [pair for stage in range(len(stages) - 1) for pair in ((stage, stage + 1), (stage + 1, stage))]
    return Simulation(
        step_s=step_s,
        compute_share=[busy[stage] / step_s for stage in range(len(stages))],
        wire_share={pair: busy[pair] / step_s for pair in pairs},
        peak_in_flight=[in_flight(stage, len(stages), microbatches) for stage in range(len(stages))],
        spans=pipeline.spans,
    )


def step_begins(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    boundaries: Sequence[Boundary],
    *,
    microbatches: int,
    steps: int,
    rule: Rule,
    hold: Hold,
) -> dict[tuple[int, int], float]:
    """When each (stage, step) begins to compute, of `steps` steps in which stages are held."""
    pipeline = _Pipeline(schedule, stages, boundaries, microbatches, steps, rule, hold)
    pipeline.run()
    return _begins(pipeline.spans)


def _begins(spans: Sequence[Span]) -> dict[tuple[int, int], float]:
    begins: dict[tuple[int, int], float] = {}
    for span in spans:  # in order of time
        if span.sender is None:
            begins.setdefault((span.stage, span.step), span.start_s)
    return begins
