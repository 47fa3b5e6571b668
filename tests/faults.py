"""What can go wrong, and when, in one vocabulary for both tiers.

A fault says what happens to which stage or boundary; its `at` says in which moment. `tests/cluster.py` carries out all
of them in one process on a clock that jumps, at exactly that moment; `tests/real_faults.py` those that a process can be
subjected to from outside, at the moments that its records tell of. A list of them is a schedule.

The moments are named after what is then half done, because that is what a loss may leave behind; `Frame` counts frames
instead, which reaches places that nobody thought of.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Phase(Enum):
    """What is half done."""

    BEFORE_SEND = "before-send"  # the step's first activation is packed, and no frame of it is written
    MID_SEND = "mid-send"  # some frames of an activation are written, and some are not
    MID_BACKWARD = "mid-backward"  # gradients are added up in part
    BEFORE_NORM = "before-norm"  # the step's gradients are there; the norm of all stages' is due, where it is wanted
    BEFORE_COMMIT = "before-commit"  # the step's gradients are there; the optimizers' steps are due
    SNAPSHOT = "snapshot"  # state and tables are being copied
    DELTA = "delta"  # some frames of a change of the projector's table are written, and some are not
    CHECKPOINT = "checkpoint"  # it is being written: `point` counts what was flushed to the disk
    # Of a rollback, so that it needs another fault before it:
    STOPPED = "rollback-halted"  # the step is broken off, and nothing is offered yet
    COMMIT = "rollback-commit"  # the new generation is agreed here and not passed on; at the last stage: not agreed yet
    RESTORE = "rollback-restore"  # the state is about to be replaced


TRAINING = (Phase.BEFORE_SEND, Phase.MID_SEND, Phase.MID_BACKWARD, Phase.BEFORE_COMMIT, Phase.SNAPSHOT)
TRAINING += (Phase.DELTA, Phase.CHECKPOINT)
SENDING = (Phase.BEFORE_SEND, Phase.MID_SEND, Phase.DELTA)  # the last stage has nobody to send an activation to
ROLLBACK = (Phase.STOPPED, Phase.COMMIT, Phase.RESTORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class During:
    """When stage `stage` is, for the `point`-th time, in this phase of `step`: the one under way, or the one that has
    just ended (None: of any)."""

    stage: int
    phase: Phase
    step: int | None = None
    point: int = 1

    def __str__(self) -> str:
        where = self.phase.value if self.step is None else f"{self.phase.value}-of-{self.step}"
        return f"{where}-{self.point}-at-{self.stage}" if self.point > 1 else f"{where}-at-{self.stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """When so many frames were written, over all streams."""

    number: int

    def __str__(self) -> str:
        return f"frame-{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """When stage `stage` has recorded `steps` steps. A moment that a process tells of itself."""

    stage: int
    steps: int

    def __str__(self) -> str:
        return f"after-{self.steps}-at-{self.stage}"


At = During | Frame | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to `stage`; another process takes its place `away_s` later."""

    at: At
    stage: int
    away_s: float = 0.3

    def __str__(self) -> str:
        return f"kill-{self.stage}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """SIGSTOP to `stage`, and SIGCONT `seconds` later.

    replaced: another process takes its place meanwhile, and the first one wakes up once that has restored its state.
    """

    at: At
    stage: int
    seconds: float = 2.0
    replaced: bool = False

    def __str__(self) -> str:
        name = "replace" if self.replaced else f"pause-{self.seconds:g}s"
        return f"{name}-{self.stage}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Every connection across `boundary` is reset. half: only the upper end notices."""

    at: At
    boundary: int
    half: bool = False

    def __str__(self) -> str:
        return f"{'half-cut' if self.half else 'cut'}-{self.boundary}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """`boundary` carries no more than so many bits a second in each direction, for `seconds`, all streams
    together."""

    at: At
    boundary: int
    bits_per_s: float
    seconds: float = 20.0

    def __str__(self) -> str:
        return f"slow-{self.boundary}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupt:
    """One bit of the `frame`-th part of a tensor that crosses `boundary` from then on, in either direction, is flipped
    under way. control: of the `frame`-th control frame, which is cut short (it has no checksum of its own)."""

    at: At
    boundary: int
    frame: int = 1
    control: bool = False

    def __str__(self) -> str:
        return f"corrupt-{'control-' if self.control else ''}{self.boundary}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TornCheckpoint:
    """`stage` is killed, and the newest checkpoint on its disk damaged before another process takes its place.

    how: a flipped bit in the tensors, a file that ends too early, a manifest that is none.
    """

    at: At
    stage: int
    how: Literal["bit", "short", "manifest"] = "bit"
    away_s: float = 0.3

    def __str__(self) -> str:
        return f"torn-{self.how}-{self.stage}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFull:
    """The next `writes` checkpoints of `stage` find no space on its disk, whichever process writes them."""

    at: At
    stage: int
    writes: int = 2

    def __str__(self) -> str:
        return f"disk-full-{self.stage}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """SIGTERM to `stage`: the run ends, for now, after the step under way."""

    at: At
    stage: int

    def __str__(self) -> str:
        return f"drain-{self.stage}-{self.at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The code of `stage` raises `error` in a phase of its computation. It ends the run, so it is never drawn."""

    at: During
    stage: int
    error: Exception

    def __str__(self) -> str:
        return f"fail-{type(self.error).__name__}-{self.at}"


Fault = Kill | Pause | Cut | Slow | Corrupt | TornCheckpoint | DiskFull | Drain | Fail


def fail(stage: int, step: int | None, phase: Phase, error: Exception) -> Fail:
    """In that phase of its own."""
    return Fail(at=During(stage=stage, phase=phase, step=step), stage=stage, error=error)


def kill(stage: int, step: int | None, phase: Phase, *, point: int = 1, away_s: float = 0.3) -> Kill:
    """In that phase of its own."""
    return Kill(at=During(stage=stage, phase=phase, step=step, point=point), stage=stage, away_s=away_s)


def pause(
    stage: int, step: int | None, phase: Phase, *, point: int = 1, seconds: float = 2.0, replaced: bool = False
) -> Pause:
    """In that phase of its own."""
    at = During(stage=stage, phase=phase, step=step, point=point)
    return Pause(at=at, stage=stage, seconds=seconds, replaced=replaced)


def cut(boundary: int, step: int | None, phase: Phase, *, half: bool = False) -> Cut:
    """In that phase of the stage above it."""
    return Cut(at=During(stage=boundary, phase=phase, step=step), boundary=boundary, half=half)


def slow(boundary: int, step: int | None, phase: Phase, *, bits_per_s: float, seconds: float = 20.0) -> Slow:
    """In that phase of the stage above it."""
    at = During(stage=boundary, phase=phase, step=step)
    return Slow(at=at, boundary=boundary, bits_per_s=bits_per_s, seconds=seconds)


def corrupt(boundary: int, step: int | None, phase: Phase, *, frame: int = 1, control: bool = False) -> Corrupt:
    """In that phase of the stage above it."""
    at = During(stage=boundary, phase=phase, step=step)
    return Corrupt(at=at, boundary=boundary, frame=frame, control=control)


def torn_checkpoint(
    stage: int, step: int | None, phase: Phase, *, point: int = 1, how: Literal["bit", "short", "manifest"] = "bit"
) -> TornCheckpoint:
    """In that phase of its own."""
    return TornCheckpoint(at=During(stage=stage, phase=phase, step=step, point=point), stage=stage, how=how)


def disk_full(stage: int, step: int | None, phase: Phase, *, writes: int = 2) -> DiskFull:
    """In that phase of its own."""
    return DiskFull(at=During(stage=stage, phase=phase, step=step), stage=stage, writes=writes)


# -- at random ----------------------------------------------------------------------------------------------------


def draw(seed: int, *, stages: int, steps: int, frames: int, count: int) -> list[Fault]:
    """`count` faults of all kinds, half of them in a phase and half at a frame; the same ones for the same seed."""
    chance = random.Random(seed)
    return [_one(chance, stages=stages, steps=steps, frames=frames) for _ in range(count)]


def _one(chance: random.Random, *, stages: int, steps: int, frames: int) -> Fault:
    stage, boundary = chance.randrange(stages), chance.randrange(stages - 1)
    at = _moment(chance, stages=stages, steps=steps, frames=frames)
    away_s = chance.choice((0.0, 0.3, 5.0))
    kind = chance.choice(("kill", "kill", "kill", "pause", "replace", "cut", "half", "slow", "corrupt", "torn", "full"))
    match kind:
        case "kill":
            return Kill(at=at, stage=stage, away_s=away_s)
        case "pause":
            return Pause(at=at, stage=stage, seconds=chance.choice((0.5, 5.0, 9.0, 30.0)))
        case "replace":
            return Pause(at=at, stage=stage, replaced=True)
        case "cut" | "half":
            return Cut(at=at, boundary=boundary, half=kind == "half")
        case "slow":
            return Slow(at=at, boundary=boundary, bits_per_s=10 ** chance.uniform(3.3, 5), seconds=20.0)
        case "corrupt":
            return Corrupt(at=at, boundary=boundary, frame=chance.randrange(1, 6), control=chance.random() < 0.25)
        case "torn":
            how: Literal["bit", "short", "manifest"] = chance.choice(("bit", "short", "manifest"))  # pyright: ignore
            return TornCheckpoint(at=at, stage=stage, how=how, away_s=away_s)
        case _:
            return DiskFull(at=at, stage=stage, writes=chance.randrange(1, 4))


def _moment(chance: random.Random, *, stages: int, steps: int, frames: int) -> At:
    if chance.random() < 0.5:
        return Frame(number=chance.randrange(5, frames))
    phase = chance.choice((*TRAINING, *ROLLBACK, *ROLLBACK))
    stage = chance.randrange(stages - 1 if phase in SENDING else stages)
    if phase in ROLLBACK:
        return During(stage=stage, phase=phase, point=chance.randrange(1, 3))
    point = chance.randrange(1, 5) if phase is Phase.CHECKPOINT else 1
    return During(stage=stage, phase=phase, step=chance.randrange(steps), point=point)
