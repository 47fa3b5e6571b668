"""Schedules: in which order one pipeline stage works through the microbatches of a training step.

A schedule is a pure stream of actions (`protocol.actions`). It contains no time, threads or links: the runtime executes
the stream, the simulator charges it to a virtual clock, and the one-process reference walks the merged streams of all
stages, so all three do the same arithmetic in the same order.

Backwards and both their halves run in microbatch order under every schedule, so gradients accumulate in one order and
the choice of schedule cannot change a bit of the result. GPipe's paper runs them last-in first-out; for a flushing
schedule that saves neither memory nor time.

A flushing schedule is one number per stage, the depth: run `depth` forwards, then alternate one backward, one forward.
- GPipe (Huang et al., arXiv 1811.06965): depth M, all microbatches; memory grows with the batch.
- 1F1B (PipeDream-Flush, Narayanan et al., arXiv 2006.09503): depth P - s, the same bubble with memory bounded by P.
- 1F1B over links that take time, `1f1b:rtt_ratio=1.8`: a microbatch comes back from the stage below after t_F + t_B and
  two hops, each a message's bits and the latency; so that a stage does not stand idle meanwhile it needs a depth of `1
  + ceil((P-1-s)(1 + rtt_ratio))`, where rtt_ratio is the time of those two hops in units of t_F + t_B. More than needed
  costs memory, and where a link is the bottleneck time too: the schedule nears GPipe, under which directions take
  turns.
- ZB-H1 (zero bubble, Qi et al., arXiv 2401.10241), `zb` or `zb:rtt_ratio=1.8`: 1F1B of the same depths whose Backward
  is cut in two. The stage above waits for the input gradient alone, so the weight gradient moves to where a stage would
  stand idle: behind by as many microbatches as the stage is less deep than stage 0. So no stage holds more microbatches
  than stage 0 does under 1F1B, and the bubble of the flush is (P-1)(t_F + t_B - t_W), a third of 1F1B's when all three
  are alike. Its further variants need twice the memory, or optimizer steps that can be taken back.
Any other order is written down, stage by stage (`protocol.stage_orders`).

When does no stage wait for ever? Compare two neighbours at each backward: how many forwards has either done before it?
The upper one must have done as many as the lower one or more, else the upper one waits for a gradient of a microbatch
that it has not sent. Depths that never rise downstream do this. And as links are bounded, the boundary must hold the
difference, `messages_ahead`: a node's receive buffer has room for it. 1F1B is ahead by one, GPipe by none, `rtt_ratio`
by as much more. With that, one gradient at a time is enough upwards: a stage that cannot hand over its gradient has
taken all forwards that the stage above must get rid of before it takes the next one.

How deep pays: in the steady state, the round trip of one boundary at a time, and rtt_ratio is what it says. But a step
begins with an empty pipeline, and its first gradient comes back to stage 0 after the round trips of all boundaries. A
stage that has forwards left until then does not stand idle, so zb over slow links gains up to rtt_ratio times as many
as there are boundaries (docs/results/throughput.md, "Stages cut by speed": 0.82 of the machines at 6, 0.91 at 15), for
memory.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import re
from abc import abstractmethod
from collections.abc import Iterator

from .actions import (
    Action,
    Backward,
    BroadcastNorm,
    Evaluate,
    Forward,
    InputGradient,
    ReduceNorm,
    Schedule,
    ScheduleDeadlock,
    ScheduleError,
    Step,
    Upward,
    WeightGradient,
    check_shape,
    prerequisites,
    receiver,
)
from .stage_orders import PREFIX, StageOrders

__all__ = [  # with the actions, so that who works with schedules finds all of it here
    "Action",
    "Backward",
    "BroadcastNorm",
    "Evaluate",
    "Evaluation",
    "FlushingSchedule",
    "Forward",
    "GPipe",
    "InputGradient",
    "OneFOneB",
    "ReduceNorm",
    "Schedule",
    "ScheduleDeadlock",
    "ScheduleError",
    "StageOrders",
    "Step",
    "Upward",
    "WeightGradient",
    "ZeroBubble",
    "get_schedule",
    "interleave",
    "messages_ahead",
    "prerequisites",
    "receiver",
    "schedule_title",
]

RTT_RATIO_MAX = 24.0


class FlushingSchedule(Schedule):
    """Fill to the depth `peak_in_flight`, alternate one backward and one forward, drain, step."""

    @abstractmethod
    def depth(self, stage: int, stages: int) -> float:
        """How many forwards a stage would do ahead of its backwards if a step had as many microbatches."""

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        depth = self.peak_in_flight(stage, stages, microbatches)
        for microbatch in range(depth):
            yield Forward(microbatch=microbatch)
        for microbatch in range(microbatches):
            yield Backward(microbatch=microbatch)
            if microbatch + depth < microbatches:
                yield Forward(microbatch=microbatch + depth)
        yield Step()


class GPipe(FlushingSchedule):
    """All forwards, then all backwards."""

    name = "gpipe"

    def depth(self, stage: int, stages: int) -> float:
        del stage, stages
        return math.inf

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        check_shape(stage, stages, microbatches)
        return microbatches


class OneFOneB(FlushingSchedule):
    """The fewest microbatches in flight that keep a pipeline busy. `rtt_ratio` is the time that a link takes, there and
    back, in units of one microbatch's forward and backward; with instant links the depth is P - s. Raises
    ScheduleError for an rtt_ratio out of range."""

    name = "1f1b"

    def __init__(self, rtt_ratio: float = 0.0) -> None:
        if not 0 <= rtt_ratio <= RTT_RATIO_MAX:
            raise ScheduleError(
                f"schedule '{self.name}': rtt_ratio={rtt_ratio:g} has to be from 0 (instant links) to {RTT_RATIO_MAX:g}"
            )
        self.rtt_ratio = rtt_ratio

    def depth(self, stage: int, stages: int) -> int:
        return 1 + math.ceil((stages - 1 - stage) * (1 + self.rtt_ratio))

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        check_shape(stage, stages, microbatches)
        return min(microbatches, self.depth(stage, stages))


class ZeroBubble(OneFOneB):
    """ZB-H1: as deep as 1F1B, each weight gradient as many microbatches behind its input gradient as the stage is less
    deep than stage 0. Raises ScheduleError for an rtt_ratio out of range."""

    name = "zb"
    splits = True

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        check_shape(stage, stages, microbatches)
        return super().peak_in_flight(0, stages, microbatches)

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        depth = super().peak_in_flight(stage, stages, microbatches)
        delay = self.peak_in_flight(stage, stages, microbatches) - depth
        for microbatch in range(depth):
            yield Forward(microbatch=microbatch)
        for microbatch in range(microbatches):
            yield InputGradient(microbatch=microbatch)
            if microbatch >= delay:
                yield WeightGradient(microbatch=microbatch - delay)
            if microbatch + depth < microbatches:
                yield Forward(microbatch=microbatch + depth)
        for microbatch in range(microbatches - delay, microbatches):
            yield WeightGradient(microbatch=microbatch)
        yield Step()


class Evaluation(Schedule):
    """Forward only. The loss's way back to stage 0 is a message of the runtime, not an action."""

    name = "evaluation"

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        check_shape(stage, stages, microbatches)
        return 0

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        del stage, stages  # every stage does the same
        for microbatch in range(microbatches):
            yield Evaluate(microbatch=microbatch)


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule for schedule in (GPipe(), OneFOneB(), ZeroBubble(), Evaluation())
}
_WITH_RTT_RATIO: dict[str, type[OneFOneB]] = {kind.name: kind for kind in (OneFOneB, ZeroBubble)}


def get_schedule(spec: str) -> Schedule:
    """The schedule of that name, or `1f1b:rtt_ratio=1.8`, or written orders, `order:FFBB/FBFB`. Raises ScheduleError
    that names the nearest known one."""
    if spec.startswith(PREFIX):
        return StageOrders.parse(spec)
    name, colon, option = spec.partition(":")
    if name in SCHEDULES and not colon:
        return SCHEDULES[name]
    if name in _WITH_RTT_RATIO:
        if rtt_ratio := re.fullmatch(r"rtt_ratio=([0-9]*\.?[0-9]+)", option):
            return _WITH_RTT_RATIO[name](float(rtt_ratio[1]))
        raise ScheduleError(f"schedule '{spec}': {name} has one option, as in {name}:rtt_ratio=1.8")
    nearest = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.4)
    remedy = f"the nearest known one is '{nearest[0]}'" if nearest else f"known: {', '.join(SCHEDULES)}"
    raise ScheduleError(f"unknown schedule '{spec}'; {remedy}")


def schedule_title(spec: str) -> str:
    """A spec for people: written orders, which are long, by their shape and the beginning of their SHA-256."""
    if not spec.startswith(PREFIX):
        return spec
    orders, digest = StageOrders.parse(spec), hashlib.sha256(spec.encode()).hexdigest()
    return f"orders of {len(orders.rows)} stages, {orders.microbatches} microbatches ({digest[:8]})"


def messages_ahead(schedule: Schedule, stages: int, microbatches: int) -> int:
    """The most activations that a boundary has to hold lest both its stages wait for ever: how many forwards the stage
    above has done at a backward, beyond those that the stage below has done at the same one."""
    done = [
        _forwards_at_backwards(schedule.actions(stage=stage, stages=stages, microbatches=microbatches))
        for stage in range(stages)
    ]
    return max(
        (upper - lower for above, below in itertools.pairwise(done) for upper, lower in zip(above, below, strict=True)),
        default=0,
    )


def _forwards_at_backwards(actions: Iterator[Action]) -> list[int]:
    """How many forwards are done at each backward, or first half of one."""
    forwards, found = 0, list[int]()
    for action in actions:
        if isinstance(action, Forward):
            forwards += 1
        elif isinstance(action, Upward):
            found.append(forwards)
    return found


def interleave(schedule: Schedule, stages: int, microbatches: int) -> Iterator[tuple[int, Action]]:
    """One valid global order of all stages' actions, always the same: the one-process reference run.

    Goes round the stages, upstream first, and takes one action from each whose prerequisites are done.
    Raises ScheduleDeadlock when a whole round takes none and work is left.
    """
    check_shape(0, stages, microbatches)
    streams = [schedule.actions(stage=stage, stages=stages, microbatches=microbatches) for stage in range(stages)]
    waiting = [next(stream, None) for stream in streams]
    done: set[tuple[int, Action]] = set()
    while any(action is not None for action in waiting):
        advanced = False
        for stage, stream in enumerate(streams):
            action = waiting[stage]
            if action is None or not done.issuperset(prerequisites(action, stage=stage, stages=stages)):
                continue
            advanced = True
            done.add((stage, action))
            waiting[stage] = next(stream, None)
            yield stage, action
        if not advanced:
            raise ScheduleDeadlock(_describe_deadlock(schedule, waiting, done, stages, microbatches))


def _describe_deadlock(
    schedule: Schedule,
    waiting: list[Action | None],
    done: set[tuple[int, Action]],
    stages: int,
    microbatches: int,
) -> str:
    stuck = [
        f"stage {stage} waits with {action} for {missing[1]} of stage {missing[0]}"
        for stage, action in enumerate(waiting)
        if action is not None
        for missing in prerequisites(action, stage=stage, stages=stages)
        if missing not in done
    ]
    return (
        f"schedule '{schedule.name}' deadlocks with {stages} stages and {microbatches} microbatches: "
        f"{'; '.join(stuck)}; reorder its actions so that each comes after what it waits for"
    )
