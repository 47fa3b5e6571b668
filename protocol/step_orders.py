"""The order of work of one stage over training steps: each step by itself, or steps that overlap, without a flush
between two of them.

With gradients that are applied one step late (`pipeline.delay = 1`, 2BW: arXiv 2006.09503) the forwards of step k + 1
need nothing of step k's, so the alternation of one backward and one forward goes on over the step's edge:

    flushing     F0 F1 B0 F2 B1 F3 B2 B3 S | F0 F1 B0 F2 B1 F3 B2 B3 S        two stages, the upper one, 1F1B
    overlapping  F0 F1 B0 F2 B1 F3 B2 F0 B3 F1 S B0 F2 B1 F3 B2 B3 S

Each backward, and what goes with it, is followed by the forward that is `depth` microbatches further on, whichever step
that is of. What keeps this right:

- A forward of step k + 2 comes after `Step` of k, which makes its weights, so two versions are enough. A depth of more
  than one step's microbatches waits there, and goes on with several forwards at once; more than two steps' there is
  none.
- `Step` of k, and all weight gradients that the schedule has put off, come before the first backward of step k + 1:
  gradients add up for one step at a time. A forward that follows the step's last backward, and is not of step k + 2,
  comes before what is only there because a step ends, so that the stage below is not kept waiting by an optimizer.
- Nobody waits for ever, since depths do not rise downstream, and buffers have to hold what they differ by: to stages
  this is one long step (`protocol.schedule` says why that is enough).

A stage and the one below it have, between them, as many microbatches on the way as their depths differ by, and nothing
runs empty any more that would let them catch up: two stages of one depth do their work by turns. So where two steps
have fewer microbatches than a schedule would like to hold at stage 0, depths fall evenly from all of them to one, and
do not stop at all of them in several stages, as they may before a flush. GPipe, which holds all, overlaps so.

PipeDream-2BW has no more microbatches in flight than a step has, and so two versions without a rule of its own. Over
links that take time twice as many are worth their memory (docs/results/plans.md, "Steps that overlap").

A span ends with the pipeline empty (a *drain*), before an evaluation, a checkpoint or the run's end: only then is a
stage's state that of so many steps and of nothing else. All stages have to know where.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from .actions import (
    Action,
    Backward,
    Forward,
    InputGradient,
    Schedule,
    ScheduleError,
    Step,
    WeightGradient,
    check_shape,
    prerequisites,
)
from .schedule import FlushingSchedule

VERSIONS = 2  # of weights, and so the most steps whose microbatches are under way
SETTLED_STEPS = 4  # after which one is like the one before


class StepOrder(ABC):
    """(step, action) of one stage, from step `first` on and without those from step `end` on.

    `end` may be brought forward as long as no forward of the steps that fall away is done."""

    def __init__(self, *, first: int, end: int) -> None:
        self.first, self.end = first, end

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Action]]: ...


class OneStep(StepOrder):
    """Step `first` of a schedule, by itself: it begins and ends with an empty pipeline."""

    def __init__(self, schedule: Schedule, *, stage: int, stages: int, microbatches: int, first: int) -> None:
        super().__init__(first=first, end=first + 1)
        self._actions = list(schedule.actions(stage=stage, stages=stages, microbatches=microbatches))

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        return ((self.first, action) for action in self._actions)


class DelayedOrder(StepOrder):
    """Steps that overlap. Raises ScheduleError for a schedule that does not fill to a depth and then alternate."""

    def __init__(
        self, schedule: Schedule, *, stage: int, stages: int, microbatches: int, first: int = 0, end: int
    ) -> None:
        super().__init__(first=first, end=end)
        self._microbatches = microbatches
        self._depth = overlapping_depth(schedule, stage, stages, microbatches)
        behind = min(microbatches, overlapping_depth(schedule, 0, stages, microbatches) - self._depth)
        self._units: list[list[Action]] = []  # each followed by a forward
        for each in range(microbatches):
            unit: list[Action] = [InputGradient(microbatch=each) if schedule.splits else Backward(microbatch=each)]
            if schedule.splits and each >= behind:
                unit.append(WeightGradient(microbatch=each - behind))
            self._units.append(unit)
        owed = range(microbatches - behind, microbatches) if schedule.splits else ()
        self._ending: list[Action] = [*(WeightGradient(microbatch=each) for each in owed), Step()]

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        forwards = self._forwards()
        yield from forwards(self._depth, self.first + 1)
        done, step = 0, self.first
        while step < self.end:
            for unit in self._units:
                yield from ((step, action) for action in unit)
                done += 1
                yield from forwards(done + self._depth, step + 1)
            yield from ((step, action) for action in self._ending)
            step += 1
            yield from forwards(done + self._depth, step + 1)

    def _forwards(self) -> Callable[[int, int], Iterator[tuple[int, Action]]]:
        """Gives those that are left up to so many, of steps up to that one and of the span."""
        given = 0

        def up_to(count: int, newest: int) -> Iterator[tuple[int, Action]]:
            nonlocal given
            while given < count:
                ahead, microbatch = divmod(given, self._microbatches)
                if self.first + ahead > newest or self.first + ahead >= self.end:
                    return
                given += 1
                yield self.first + ahead, Forward(microbatch=microbatch)

        return up_to


def overlapping_depth(schedule: Schedule, stage: int, stages: int, microbatches: int) -> int:
    """How many forwards a stage does ahead of its backwards while steps overlap. Raises ScheduleError for a schedule
    without a depth, or a stage that does not exist."""
    check_shape(stage, stages, microbatches)
    if not isinstance(schedule, FlushingSchedule):
        raise ScheduleError(
            f"steps of schedule '{schedule.name}' cannot overlap: it does not alternate from a depth on; say gpipe, "
            "1f1b or zb"
        )
    most = VERSIONS * microbatches
    if stages == 1:
        return 1
    if schedule.depth(0, stages) <= most:
        return int(schedule.depth(stage, stages))
    return 1 + (most - 1) * (stages - 1 - stage) // (stages - 1)


def overlapping_peak(schedule: Schedule, stage: int, stages: int, microbatches: int) -> int:
    """As `Schedule.peak_in_flight`, of steps that overlap."""
    order = DelayedOrder(schedule, stage=stage, stages=stages, microbatches=microbatches, end=SETTLED_STEPS)
    frees = WeightGradient if schedule.splits else Backward
    steps = (isinstance(action, Forward) - isinstance(action, frees) for _, action in order)
    return max(itertools.accumulate(steps))


def overlapping_ahead(schedule: Schedule, stages: int, microbatches: int) -> int:
    """As `schedule.messages_ahead`, of steps that overlap."""
    depths = [overlapping_depth(schedule, stage, stages, microbatches) for stage in range(stages)]
    return max((upper - lower for upper, lower in itertools.pairwise(depths)), default=0)


def interleave_steps(orders: Sequence[StepOrder]) -> Iterator[tuple[int, int, Action]]:
    """(stage, step, action): one valid global order of the streams of all stages, always the same. Raises ScheduleError
    where they wait for one another for ever."""
    stages = len(orders)
    streams = [iter(order) for order in orders]
    waiting = [next(stream, None) for stream in streams]
    done: set[tuple[int, int, Action]] = set()
    while any(entry is not None for entry in waiting):
        advanced = False
        for stage, entry in enumerate(waiting):
            if entry is None:
                continue
            step, action = entry
            needs = prerequisites(action, stage=stage, stages=stages)
            if not done.issuperset((whose, step, what) for whose, what in needs):
                continue
            advanced = True
            done.add((stage, step, action))
            waiting[stage] = next(streams[stage], None)
            yield stage, step, action
        if not advanced:
            raise ScheduleError(f"steps that overlap wait for one another for ever: {waiting}")
