"""Microbatches by twos: a schedule's order, of pairs of neighbouring microbatches in the place of single ones.

A stage that waits in the middle of a forward or backward, as lanes with chunks of a sequence do for each other's keys
and values, has nothing to do meanwhile but another microbatch. So two of them are computed together, in turns
(`node.context.turns`): where the one has to wait, the other computes. Which microbatches these are is the schedule's
business, since neighbours have to agree on what comes next: 0 and 1, then 2 and 3, and where their number is odd, the
last one alone. All else stays as it is: what is first is first, so gradients add up in the order of microbatches.

The two actions of a pair are neighbours in the stream, and `partner` tells the one of the other; who executes the
stream does both when it comes to the second. A stage begins with a pair when both microbatches are here, so pairs cost
a pipeline what half as many microbatches would: a longer way to fill it, and twice the memory at the same depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from .actions import Action, Backward, Forward, InputGradient, Schedule, WeightGradient


class Paired(Schedule):
    """`schedule`, of pairs."""

    name: ClassVar[str] = "in pairs"
    pairs = True

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.splits = schedule.splits

    def check(self, stage: int, stages: int, microbatches: int) -> None:
        self._schedule.check(stage, stages, _pairs(microbatches))

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        return min(microbatches, 2 * self._schedule.peak_in_flight(stage, stages, _pairs(microbatches)))

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        for action in self._schedule.actions(stage=stage, stages=stages, microbatches=_pairs(microbatches)):
            if not isinstance(action, Forward | Backward | InputGradient | WeightGradient):
                yield action
                continue
            first = 2 * action.microbatch
            for microbatch in range(first, min(first + 2, microbatches)):
                yield replace(action, microbatch=microbatch)


def _pairs(microbatches: int) -> int:
    return (microbatches + 1) // 2


def partner(schedule: Schedule, action: Action, microbatches: int) -> Forward | Backward | InputGradient | None:
    """Of a step with so many microbatches, what is computed together with `action`; None: it is computed alone."""
    if not schedule.pairs or not isinstance(action, Forward | Backward | InputGradient):
        return None
    other = action.microbatch ^ 1
    return replace(action, microbatch=other) if other < microbatches else None


def computed_now(schedule: Schedule, action: Forward | Backward | InputGradient, microbatches: int) -> tuple[int, ...]:
    """The microbatches that are computed when a stage has come to `action`: its own, with the second of a pair both,
    with the first none."""
    other = partner(schedule, action, microbatches)
    if other is None:
        return (action.microbatch,)
    return (other.microbatch, action.microbatch) if other.microbatch < action.microbatch else ()
