"""Why a node ended: the signal that killed it, its own last words, or the failure of another stage that ended all.

A stage that fails tells the others, and all end with its reason (node/stage_failure.py). Each writes it to its records,
so whoever started them finds in any of them which stage it was. Two ends with the same failure of the computation
(stage, step and reason) show that it comes again whenever the run comes to that place: runs are the same to the last
bit, and so are their failures. Then nothing is gained by starting the nodes once more. A failure of what is around it
(a source of data that is away, a disk, a neighbour that is late) may read the same twice and be gone the third time.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports.record_tail import RecordTail

ERROR_PREFIX = "thinpipe: error: "  # how a node begins the line with which it ends (cli.fail)
AGAIN = "it failed in the same way before, so it is not started again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Which stage failed, after how many steps, and why. told: the other stages were told, and end with it too.
    replays: the computation failed, so it will again; else what is around it did, which may pass. lane: of the stage,
    where it ended more than its own; else None."""

    stage: int
    completed_steps: int
    reason: str
    told: bool
    replays: bool
    lane: int | None = None

    def __str__(self) -> str:
        name = f"stage {self.stage}" if self.lane is None else f"stage {self.stage} of lane {self.lane}"
        return f"{name} failed after {self.completed_steps} steps: {self.reason}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Failure:
        """Of a record `failed`."""
        return cls(**{name: record[name] for name in cls.__slots__ if name in record})


def failure_in(records: Iterable[Mapping[str, Any]]) -> Failure | None:
    """The failure with which a node ended that wrote these; None if none is in them."""
    found = [record for record in records if record["event"] == "failed"]
    return Failure.of(found[-1]) if found else None


def failure_of(run: Path, stage: int, *, records_from: int) -> Failure | None:
    """The same of stage `stage`, in what its records hold from there on."""
    return failure_in(RecordTail(run / f"stage-{stage}.jsonl", offset=records_from).read())


def exit_reason(stage: int, code: int, log: Path, log_from: int) -> str:
    """Which node ended and why: the signal that killed it, or its own last words, in `log` from there on."""
    if code < 0:
        name = signal.Signals(-code).name
        why = ", by hand or because memory ran out" if name == "SIGKILL" else ""
        return f"stage {stage} was killed by {name}{why}; see {log}"
    try:
        text = log.read_bytes()[log_from:].decode(errors="replace")
    except OSError:  # a full disk had no room for it
        text = ""
    words = [line for line in text.splitlines() if line.strip()]
    last = next((line for line in reversed(words) if line.startswith(ERROR_PREFIX)), None)
    if last:
        return f"stage {stage} ended: {last.removeprefix(ERROR_PREFIX)}"
    return f"stage {stage} ended with exit code {code}: {words[-1] if words else 'no output'}; see {log}"
