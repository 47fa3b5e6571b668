"""The order of work of one stage over training steps: each step by itself, or steps that overlap, without a flush
between two of them.

With gradients that are applied one step late (`pipeline.delay = 1`, 2BW: arXiv 2006.09503) the forwards of step k + 1
need nothing of step k's, so the alternation of one backward and one forward goes on over the step's edge:

    flushing     F0 F1 B0 F2 B1 F3 B2 B3 S | F0 F1 B0 F2 B1 F3 B2 B3 S        two stages, the upper one, 1F1B
    overlapping  F0 F1 B0 F2 B1 F3 B2 F0 B3 F1 S B0 F2 B1 F3 B2 B3 S

A stream is made from any schedule that fills to a depth and then alternates: with that depth, each backward, and what
goes with it, is followed by the forward that is `depth` microbatches further on, whichever step that is of. What keeps
this right:

- The depth is at most one step's microbatches, so a forward of step k + 1 comes after `Step` of k - 1, which made its
  weights: two versions are enough.
- `Step` of k, and all weight gradients that the schedule has put off, come before the first backward of step k + 1:
  gradients add up for one step at a time. The forward that follows the step's last backward comes before what is only
  there because a step ends, so that the stage below is not kept waiting by an optimizer.
- Nobody waits for ever, and no buffer has to be longer: to stages this is one long step of the same schedule.

A span ends with the pipeline empty (a *drain*), before an evaluation, a checkpoint or the run's end: only then is a
stage's state that of so many steps and of nothing else. All stages have to know where.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from .actions import Action, Forward, Schedule, ScheduleError, Upward, WeightGradient, prerequisites


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
        actions = list(schedule.actions(stage=stage, stages=stages, microbatches=microbatches))
        self._microbatches = microbatches
        self._forwards = 0  # that were given out
        starts = [place for place, action in enumerate(actions) if isinstance(action, Upward)]
        self._depth = starts[0]
        self._units = [
            [action for action in actions[start:stop] if not isinstance(action, Forward)]
            for start, stop in itertools.pairwise([*starts, len(actions)])
        ]
        # So many units later come the weight gradients; others of the last unit are there because the step ends.
        behind = next((number for number, unit in enumerate(self._units) if _paid(unit)), 0)
        self._usual = 1 + sum(paid < microbatches - behind for paid in _paid(self._units[-1]))
        if actions != list(self._alone()):
            raise ScheduleError(
                f"schedule '{schedule.name}' does not alternate from a depth on, and its steps cannot overlap; say "
                "gpipe, 1f1b or zb"
            )

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        self._forwards = 0
        for _ in range(self._depth):
            yield from self._forward()
        step = self.first
        while step < self.end:
            *units, last = self._units
            for unit in units:
                yield from ((step, action) for action in unit)
                yield from self._forward()
            yield from ((step, action) for action in last[: self._usual])
            yield from self._forward()
            yield from ((step, action) for action in last[self._usual :])
            step += 1

    def _forward(self) -> Iterator[tuple[int, Action]]:
        """The next one, unless the span has no more."""
        ahead, microbatch = divmod(self._forwards, self._microbatches)
        if self.first + ahead < self.end:
            self._forwards += 1
            yield self.first + ahead, Forward(microbatch=microbatch)

    def _alone(self) -> Iterator[Action]:
        """One step by itself: what the schedule has to be."""
        for microbatch in range(self._depth):
            yield Forward(microbatch=microbatch)
        for microbatch, unit in enumerate(self._units):
            yield from unit
            if microbatch + self._depth < self._microbatches:
                yield Forward(microbatch=microbatch + self._depth)


def _paid(unit: Sequence[Action]) -> list[int]:
    return [action.microbatch for action in unit if isinstance(action, WeightGradient)]


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
