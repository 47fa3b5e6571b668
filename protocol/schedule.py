"""Schedules: in which order one pipeline stage works through the microbatches of a training step.

A schedule is a pure stream of actions. It contains no time, threads or links: the runtime executes the stream, the
simulator charges it to a virtual clock, and the one-process reference walks the merged streams of all stages, so all
three do the same arithmetic in the same order. Transfers are implied: `Forward(m)` at stage s waits for the activation
of m from s-1, `Backward(m)` or `InputGradient(m)` for its gradient from s+1 (see `prerequisites`), and each result
leaves right after the action. On a first or last stage there is nothing to wait for or to send.

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

Bounded links stay free of deadlock while depths never rise downstream and fall between neighbours by at most the
messages that both directions of their boundary can hold together: the downstream stage then works off enough forwards,
and stores enough gradients, for the upstream one to reach its first backward. 1F1B falls by one, GPipe by none, and
`rtt_ratio` by as much more: `messages_ahead`, for which a node's receive buffer has room.

How deep pays: in the steady state, the round trip of one boundary at a time, and rtt_ratio is what it says. But a step
begins with an empty pipeline, and its first gradient comes back to stage 0 after the round trips of all boundaries. A
stage that has forwards left until then does not stand idle, so zb over slow links gains up to rtt_ratio times as many
as there are boundaries (docs/results.md, "Stages cut by speed": 0.82 of the machines at 6, 0.91 at 15), for memory.

Why streams and not a table of ticks: a table fixes when a stage acts, and on an uneven link that is a global barrier.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

RTT_RATIO_MAX = 24.0


class ScheduleError(ValueError):
    """A schedule is unknown or asked for a stage that does not exist."""


class ScheduleDeadlock(ScheduleError):
    """The stages' streams wait for one another for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Compute one microbatch's output and keep what its backward needs."""

    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """Compute the input gradient and add to the weight gradients; frees what the forward kept."""

    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGradient:
    """The half of a backward that the stage above waits for; keeps what the other half needs."""

    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGradient:
    """The half that nobody waits for before the optimizer step; frees what its microbatch still held."""

    microbatch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceNorm:
    """Add the squares of this stage's gradients, which are all there now, to the sum from below, and send it up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastNorm:
    """Take the total from above and send it on down; the first stage has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The optimizer step: the last action of a training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Compute one microbatch's output for an evaluation; nothing is kept and no backward follows."""

    microbatch: int


Action = Forward | Backward | InputGradient | WeightGradient | ReduceNorm | BroadcastNorm | Step | Evaluate
Upward = Backward | InputGradient  # what waits for a gradient from below and sends one up


class Schedule(ABC):
    """One order of work, for every stage of a pipeline of any length."""

    name: ClassVar[str]

    def actions(self, *, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        """The actions of one stage (0-based) in one training step. Raises ScheduleError at once, not when iterated."""
        _check_shape(stage, stages, microbatches)
        return self._order(stage, stages, microbatches)

    @abstractmethod
    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        """Most microbatches at once whose forward has run on this stage and whose backward, or the last half of it, has
        not: its memory."""

    @abstractmethod
    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]: ...


class FlushingSchedule(Schedule):
    """Fill to the depth `peak_in_flight`, alternate one backward and one forward, drain, step."""

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

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        _check_shape(stage, stages, microbatches)
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

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        _check_shape(stage, stages, microbatches)
        return min(microbatches, 1 + math.ceil((stages - 1 - stage) * (1 + self.rtt_ratio)))


class ZeroBubble(OneFOneB):
    """ZB-H1: as deep as 1F1B, each weight gradient as many microbatches behind its input gradient as the stage is less
    deep than stage 0. Raises ScheduleError for an rtt_ratio out of range."""

    name = "zb"

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        _check_shape(stage, stages, microbatches)
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
        _check_shape(stage, stages, microbatches)
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
    """The schedule of that name, or `1f1b:rtt_ratio=1.8`. Raises ScheduleError that names the nearest known one."""
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


def splits_backward(schedule: Schedule) -> bool:
    """Whether its stages compute input and weight gradients apart."""
    return any(isinstance(action, WeightGradient) for action in schedule.actions(stage=0, stages=1, microbatches=1))


def messages_ahead(schedule: Schedule, stages: int, microbatches: int) -> int:
    """The most activations that a stage sends before its first backward, beyond those that the stage below works off
    before its own: what a boundary has to hold lest both wait for ever."""
    depths = [
        sum(
            1
            for _ in itertools.takewhile(
                _is_forward, schedule.actions(stage=s, stages=stages, microbatches=microbatches)
            )
        )
        for s in range(stages)
    ]
    return max((above - below for above, below in itertools.pairwise(depths)), default=0)


def _is_forward(action: Action) -> bool:
    return isinstance(action, Forward | Evaluate)


def prerequisites(action: Action, *, stage: int, stages: int) -> tuple[tuple[int, Action], ...]:
    """The (stage, action) pairs that must be done before `action` at `stage`; one at another stage is a transfer."""
    match action:
        case Forward() | Evaluate():
            return ((stage - 1, action),) if stage > 0 else ()
        case Backward(microbatch=microbatch) | InputGradient(microbatch=microbatch):
            own = (stage, Forward(microbatch=microbatch))
            return (own, (stage + 1, action)) if stage < stages - 1 else (own,)
        case WeightGradient(microbatch=microbatch):
            return ((stage, InputGradient(microbatch=microbatch)),)
        case ReduceNorm():
            return ((stage + 1, action),) if stage < stages - 1 else ()
        case BroadcastNorm():
            own = (stage, ReduceNorm())
            return (own, (stage - 1, action)) if stage > 0 else (own,)
        case Step():
            return ()


def receiver(action: Action, *, stage: int, stages: int) -> int | None:
    """The stage that the result of `action` at `stage` is sent to; None: it stays."""
    match action:
        case Forward() | Evaluate() | BroadcastNorm():
            to = stage + 1
        case Backward() | InputGradient() | ReduceNorm():
            to = stage - 1
        case WeightGradient() | Step():
            return None
    return to if 0 <= to < stages else None


def interleave(schedule: Schedule, stages: int, microbatches: int) -> Iterator[tuple[int, Action]]:
    """One valid global order of all stages' actions, always the same: the one-process reference run.

    Goes round the stages, upstream first, and takes one action from each whose prerequisites are done.
    Raises ScheduleDeadlock when a whole round takes none and work is left.
    """
    _check_shape(0, stages, microbatches)
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


def _check_shape(stage: int, stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise ScheduleError(f"{stages} stages and {microbatches} microbatches make no pipeline; both must be 1 or more")
    if not 0 <= stage < stages:
        raise ScheduleError(f"there is no stage {stage} in a pipeline of {stages}; stages count from 0 to {stages - 1}")
