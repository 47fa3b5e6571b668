"""What a run's directory shows of its stages: which process serves one now, and how many steps it has done.

A lock (`file_lock`) is free once its holder is gone, whatever the cause. Its file holds the last message of a
supervisor that gave up. The steps of a stage are at the end of its records.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import file_lock

TAIL_BYTES = 2**18


class SupervisorError(RuntimeError):
    """The stage cannot be served; one line says why."""


def take_lock(run: Path, stage: int) -> int | None:
    """A descriptor that holds the lock of `stage`, for children too; None while somebody else serves it. Raises
    SupervisorError."""
    try:
        return file_lock.take(run / f"stage-{stage}.lock")
    except file_lock.LockError as error:
        raise SupervisorError(str(error)) from None


def gave_up(run: Path, stage: int) -> bool:
    """Whether the last supervisor of the stage ended without having done its part."""
    lock = run / f"stage-{stage}.lock"
    return lock.exists() and lock.stat().st_size > 0


def began(run: Path, stage: int) -> bool:
    """Whether the stage has been started before."""
    records = run / f"stage-{stage}.jsonl"
    return records.exists() and records.stat().st_size > 0


def ended_after(run: Path, stage: int) -> int | None:
    """The steps that the stage had done when its newest process ended the run; None while it has not."""
    return newest_life(run, stage)[0]


def newest_life(run: Path, stage: int) -> tuple[int | None, bool]:
    """`ended_after`, and whether that process has also left with exit code 0: nobody needs it any more then."""
    records, steps, left = run / f"stage-{stage}.jsonl", None, False
    if not records.exists():
        return None, False
    with records.open("rb") as file:
        cut = file.seek(0, os.SEEK_END) > TAIL_BYTES
        file.seek(-TAIL_BYTES if cut else 0, os.SEEK_END if cut else os.SEEK_SET)
        text = file.read()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    for line in lines[1:] if cut else lines:
        record = json.loads(line)
        if record["event"] in ("start", "end"):
            steps, left = record["steps"] if record["event"] == "end" else None, False
        elif record["event"] == "exit":
            left = record["exit_code"] == 0
    return steps, left
