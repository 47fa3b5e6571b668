"""The records of a node: JSON lines on disk, and on request a trace of which thread did what when.

Progress bar, summary and report all read these records. A record is one line, written
and flushed at once, so a run that is killed leaves everything up to its last step. Why not a metrics library: a reader
needs nothing but `json`, and the records outlive the processes.

Record kinds (`event`): start, preparing, data, ready, step, evaluation, checkpoint, copy, view_change, rollback, fault,
end, failed, exit. Units are in the names. Views of a running node (`node.watching.views`) get the same records.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO


class MetricsWriter:
    """Appends records to `stage-<n>.jsonl`."""

    def __init__(
        self, path: Path, *, append: bool = False, view: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """append: after the records of the process whose place this one takes, less the one that it broke off in.
        view: is given each record once it is written."""
        self._view = view
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1 if append else 0)
        self._file: TextIO = path.open("a", encoding="utf-8")  # always: one that was replaced may wake up and write

    def write(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time_s": time.time(), **fields}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._view:
            self._view(record)

    def close(self) -> None:
        self._file.close()


class Tracer:
    """Spans in the Chrome trace format (open it at ui.perfetto.dev); does nothing unless enabled.

    Times are `time.monotonic` seconds, one clock for all processes of a machine, so the traces of a local swarm merge.
    """

    def __init__(self, *, stage: int, enabled: bool) -> None:
        self.stage = stage
        self.enabled = enabled
        self.events: list[dict[str, Any]] = []

    def span(self, name: str, lane: str, start_s: float, end_s: float, **args: Any) -> None:
        if self.enabled:
            self.events.append(
                {
                    "name": name,
                    "ph": "X",
                    "pid": self.stage,
                    "tid": lane,
                    "ts": start_s * 1e6,
                    "dur": (end_s - start_s) * 1e6,
                    "args": args,
                }
            )

    def instant(self, name: str, lane: str) -> None:
        if self.enabled:
            now = time.monotonic() * 1e6
            self.events.append({"name": name, "ph": "i", "s": "t", "pid": self.stage, "tid": lane, "ts": now})

    def save(self, path: Path) -> None:
        if self.enabled:
            path.write_text(json.dumps({"traceEvents": self.events}))


class Lap:
    """Seconds since it was made: of the wall, of all this process's threads, and of the thread that asks."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._thread = time.perf_counter(), time.process_time(), time.thread_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._cpu

    @property
    def thread_cpu_s(self) -> float:
        return time.thread_time() - self._thread


class Stopwatch:
    """Adds up what each activity took: seconds of the wall (`compute_s`, `codec_s`, `wait_s`), and of the CPU by the
    thread that did it (`compute_cpu_s`, `codec_cpu_s`), which other processes on the same cores do not lengthen."""

    def __init__(self) -> None:
        names: list[str] = ["compute_s", "codec_s", "wait_s", "compute_cpu_s", "codec_cpu_s"]
        self._spent = dict.fromkeys(names, 0.0)
        self._total = dict(self._spent)

    @contextmanager
    def measure(self, activity: Literal["compute", "codec"]) -> Iterator[None]:
        """The calling thread works."""
        lap = Lap()
        try:
            yield
        finally:
            self._spent[f"{activity}_s"] += lap.seconds
            self._spent[f"{activity}_cpu_s"] += lap.thread_cpu_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        lap = Lap()
        try:
            yield
        finally:
            self._spent["wait_s"] += lap.seconds

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        for name, value in self._spent.items():
            self._total[name] += value
        taken, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return {name: round(value, 6) for name, value in taken.items()}

    @property
    def total(self) -> dict[str, float]:
        """The sum of all that was taken."""
        return {name: round(value, 6) for name, value in self._total.items()}


def peak_rss_bytes() -> int:
    """The most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """What this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss
