"""Faults of real processes, from outside: signals, limits and damaged files, at moments that their records tell of.

What is done is `tests/faults.py`'s vocabulary, as far as it can be done to a process that knows nothing of it: a phase
of a step is over before anybody outside has heard of it, so a moment is a number of steps (`Done`), or one of the two
records that a rollback writes (`Phase.STOPPED`, `Phase.RESTORE`). Who starts a killed stage again is the
launcher's affair.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from thinpipe.sim.reports.summary import read_records

from .faults import At, DiskFull, Done, During, Fault, Kill, Pause, Phase, TornCheckpoint
from .real_node import until

RECORD_OF = {Phase.STOPPED: "view_change", Phase.RESTORE: "rollback"}
ROOM_BYTES = 2**17  # for one file on a full disk: more than all records, less than any checkpoint


def records(run: Path, stage: int, event: str) -> list[dict[str, Any]]:
    """Those of one kind; none of a stage that has said nothing yet."""
    path = run / f"stage-{stage}.jsonl"
    return [record for record in read_records(path) if record["event"] == event] if path.exists() else []


def carry_out(run: Path, faults: Sequence[Fault]) -> None:
    """One after the other, each when its moment has come; a moment of a rollback is one that the fault before it
    brought
    about."""
    reached: Callable[[], bool] = _moment(run, faults[0].at)
    for fault, following in pairwise([*faults, None]):
        assert fault
        until(reached, str(fault))
        if following:
            reached = _moment(run, following.at)
        _inject(run, fault)


def _moment(run: Path, at: At) -> Callable[[], bool]:
    match at:
        case Done():
            return lambda: len(records(run, at.stage, "step")) >= at.steps
        case During() if event := RECORD_OF.get(at.phase):
            before = len(records(run, at.stage, event))
            return lambda: len(records(run, at.stage, event)) > before
        case _:
            raise ValueError(f"nobody outside can tell when a process is at {at}")


def _inject(run: Path, fault: Fault) -> None:
    match fault:
        case Kill():
            os.kill(_process(run, fault.stage), signal.SIGKILL)
        case TornCheckpoint():  # before its successor, which is still to import torch, looks at it
            process = psutil.Process(_process(run, fault.stage))
            process.kill()
            process.wait()
            _tear(run, fault.stage)
        case Pause(replaced=False):
            process = _process(run, fault.stage)
            os.kill(process, signal.SIGSTOP)
            time.sleep(fault.seconds)  # the length of the fault, and no wait for anything
            os.kill(process, signal.SIGCONT)
        case DiskFull():
            _fill(run, fault)
        case _:
            raise ValueError(f"{fault} is for the tier in memory")


def _process(run: Path, stage: int) -> int:
    return records(run, stage, "start")[-1]["process"]


def _tear(run: Path, stage: int) -> None:
    newest = max((run / "checkpoints" / f"stage-{stage}").glob("step-*/state.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def _fill(run: Path, fault: DiskFull) -> None:
    """No file of the process may grow past a limit until `writes` checkpoints have failed of it: EFBIG for ENOSPC,
    which only a disk of its own could bring about."""
    process = psutil.Process(_process(run, fault.stage))
    _, hard = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    until(lambda: len(unwritten(run, fault.stage)) >= fault.writes, "a checkpoint that finds no space")
    process.rlimit(resource.RLIMIT_FSIZE, (hard, hard))


def unwritten(run: Path, stage: int) -> list[dict[str, Any]]:
    """What the stage has said of checkpoints that it could not write."""
    return [record for record in records(run, stage, "fault") if "cannot write the checkpoint" in record["reason"]]
