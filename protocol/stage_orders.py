"""Written orders: a schedule as data, one word for each stage, such as `order:FFBFBB/FBFBFB`.

A letter is an action: `F` a forward, `B` a whole backward, `I` the input gradient that the stage above waits for, `W`
the weight gradient that is left of it. Each kind takes the microbatches in their order (schedules may not change a bit
of the result, so gradients have to add up in one order), and so the numbers need not be written: in `FFBB`, `F` is
microbatch 0, then 1.

The words come from a file that torch.distributed.pipelining reads and writes too (`protocol.schedule_csv`). Why not
keep the file's own text: it has idle cells and spaces that mean nothing to who runs it, and nodes compare what they run
by its digest. Why not a path: another machine has another file there.

What is checked when orders are read, so that no run can hang on them: each microbatch goes forward once and back once,
what is needed comes first on the stage itself, weight gradients add up in order, and no two neighbours wait for each
other. For the last one it is enough to compare the numbers of forwards at each backward (`protocol.schedule` says why).
Words with an `I` or a `W` split all backwards: what a stage sends up is then one kind of message, and `B` means `IW`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

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
)

PREFIX = "order:"
KINDS: dict[str, type[Forward | Backward | InputGradient | WeightGradient]] = {
    "F": Forward,
    "B": Backward,
    "I": InputGradient,
    "W": WeightGradient,
}


class OrderError(ScheduleError):
    """Orders that cannot be run: `fault` and remedy, with the stage and the place in its word (None: its end)."""

    def __init__(self, stage: int, place: int | None, fault: str) -> None:
        where = "at its end" if place is None else f"action {place + 1}"
        super().__init__(f"stage {stage}, {where}: {fault}")
        self.stage, self.place, self.fault = stage, place, fault


class StageOrders(Schedule):
    """These orders, a word for each stage. Raises OrderError."""

    name: ClassVar[str] = "order"

    def __init__(self, rows: Sequence[str]) -> None:
        check_orders(rows)
        self.splits = any(letter in row for row in rows for letter in "IW")
        self.rows = tuple(row.replace("B", "IW") if self.splits else row for row in rows)
        self.microbatches = rows[0].count("F")

    @classmethod
    def parse(cls, spec: str) -> StageOrders:
        """`order:FFBB/FBFB`. Raises ScheduleError."""
        return _parsed(spec)

    @classmethod
    def of(cls, schedule: Schedule, stages: int, microbatches: int) -> StageOrders:
        """What another schedule does in a pipeline of that shape."""
        streams = (schedule.actions(stage=stage, stages=stages, microbatches=microbatches) for stage in range(stages))
        return cls(["".join(map(_letter, stream)) for stream in streams])

    @property
    def spec(self) -> str:
        return PREFIX + "/".join(self.rows)

    def check(self, stage: int, stages: int, microbatches: int) -> None:
        check_shape(stage, stages, microbatches)
        if (stages, microbatches) != (len(self.rows), self.microbatches):
            raise ScheduleError(
                f"these orders are for pipeline.stages = {len(self.rows)} and pipeline.microbatches = "
                f"{self.microbatches}, but there are {stages} and {microbatches}; set those, or say gpipe, 1f1b or zb"
            )

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        self.check(stage, stages, microbatches)
        steps = ((letter == "F") - (letter == "BW"[self.splits]) for letter in self.rows[stage])
        return max(itertools.accumulate(steps))

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        del stages, microbatches  # checked
        done = dict.fromkeys(KINDS, 0)
        for letter in self.rows[stage]:
            yield KINDS[letter](microbatch=done[letter])
            done[letter] += 1
        yield Step()


def _letter(action: Action) -> str:
    """Nothing for what ends a step, which needs no order."""
    return next((letter for letter, kind in KINDS.items() if isinstance(action, kind)), "")


@functools.lru_cache(maxsize=16)  # who reads settings asks several times
def _parsed(spec: str) -> StageOrders:
    try:
        return StageOrders(spec.removeprefix(PREFIX).split("/"))
    except OrderError as error:
        raise ScheduleError(f"schedule '{PREFIX}...': {error}") from None


def check_orders(rows: Sequence[str]) -> None:
    """Raises OrderError for the first thing that cannot be run."""
    count = rows[0].count("F")
    at_backwards = [_checked(stage, row) for stage, row in enumerate(rows)]
    for stage, row in enumerate(rows):
        if (found := row.count("F")) != count or not count:
            fault = f"its microbatches are {found}, and stage 0 has {count}; give every stage the same, 1 or more"
            raise OrderError(stage, None, fault)
    for stage, (above, below) in enumerate(itertools.pairwise(at_backwards)):
        for microbatch, ((place, upper), (_, lower)) in enumerate(zip(above, below, strict=True)):
            if upper < lower:
                fault = (
                    f"deadlock: it waits for the gradient of microbatch {microbatch}, before which stage {stage + 1} "
                    f"waits for microbatch {lower - 1}; put the forward of {lower - 1} first here, or later there"
                )
                raise OrderError(stage, place, fault)


def _checked(stage: int, row: str) -> list[tuple[int, int]]:
    """The laws of one stage's word. Returns the place of each backward and how many forwards are before it."""
    forwards = backwards = weights = 0
    found: list[tuple[int, int]] = []
    for place, letter in enumerate(row):
        if letter not in KINDS:
            raise OrderError(stage, place, f"'{letter}' is no action; say F, B, I or W")
        if letter == "F":
            forwards += 1
            continue
        if letter == "B" and weights < backwards:
            fault = f"the whole backward of microbatch {backwards} before the weight gradient of {weights}"
            raise OrderError(stage, place, f"{fault}; they add up in order: put that first, or split this one, I and W")
        if letter != "W":
            if backwards == forwards:
                fault = f"the backward of microbatch {backwards} before its forward"
                raise OrderError(stage, place, f"{fault}; put the forward first")
            found.append((place, forwards))
            backwards += 1
        if letter != "I":
            if weights == backwards:
                fault = f"the weight gradient of microbatch {weights} before its input gradient"
                raise OrderError(stage, place, f"{fault}; put that first")
            weights += 1
    for done, what in ((backwards, "backward"), (weights, "weight gradient")):
        if done < forwards:
            fault = f"no {what} of microbatch {done}; each goes forward once and back once"
            raise OrderError(stage, None, fault)
    return found
