"""What a pipeline stage does in a training step, one action after the other, and what a schedule is: their order.

An action is a plain value: no time, no thread, no link. What it waits for follows from what it is (`prerequisites`),
and so does where its result goes (`receiver`): `Forward(m)` at stage s waits for the activation of m from s-1,
`Backward(m)` or `InputGradient(m)` for its gradient from s+1. So transfers are no actions, and an order of compute
alone says all.

Why streams and not a table of ticks: a table fixes when a stage acts, and on an uneven link that is a global barrier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar


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
    """One order of work for every stage of a pipeline."""

    name: ClassVar[str]
    splits: bool = False  # whether stages compute input and weight gradients apart
    pairs: bool = False  # whether they compute two microbatches in turns (`protocol.paired`)

    def actions(self, *, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        """The actions of one stage (0-based) in one training step. Raises ScheduleError at once, not when iterated."""
        self.check(stage, stages, microbatches)
        return self._order(stage, stages, microbatches)

    def check(self, stage: int, stages: int, microbatches: int) -> None:
        """Raises ScheduleError for a stage that does not exist, or a pipeline that this schedule is not for."""
        check_shape(stage, stages, microbatches)

    @abstractmethod
    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        """Most microbatches at once whose forward has run on this stage and whose backward, or the last half of it, has
        not: its memory."""

    @abstractmethod
    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]: ...


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


def check_shape(stage: int, stages: int, microbatches: int) -> None:
    """Raises ScheduleError for a stage that does not exist."""
    if stages < 1 or microbatches < 1:
        raise ScheduleError(f"{stages} stages and {microbatches} microbatches make no pipeline; both must be 1 or more")
    if not 0 <= stage < stages:
        raise ScheduleError(f"there is no stage {stage} in a pipeline of {stages}; stages count from 0 to {stages - 1}")
