"""The records of a node: JSON lines on disk, and on request a trace of which thread did what when.

Progress bar, summary and report all read these records. A record is one line, written
and flushed at once, so a run that is killed leaves everything up to its last step. Why not a metrics library: a reader
needs nothing but `json`, and the records outlive the processes.

A disk that is full is not worth a run: what cannot be written waits in memory, up to a limit, and is written in its
place once there is room. Why not leave it out and go on: the record of the end, without which there is no summary,
would be the first to be missed.

Record kinds (`event`): start, costs, preparing, data, ready, step, evaluation, checkpoint, copy, view_change, rollback,
fault, stop, end, failed, exit. Units are in the names. Views of a running node (`node.watching.views`) get the same
records.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

WAITING_MOST = 10_000  # records that a full disk holds up: some 10 MB


class MetricsWriter:
    """Appends records to `stage-<n>.jsonl`. Raises OSError where that cannot be opened, and never later."""

    def __init__(
        self,
        path: Path,
        *,
        append: bool = False,
        view: Callable[[dict[str, Any]], None] | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        """append: after the records of the process whose place this one takes, less the one that it broke off in.
        view: is given each record once it is written. say: is told when records cannot be written, and when they
        can."""
        self._path, self._view, self._say = path, view, say
        self._waiting: deque[bytes] = deque()  # lines; of the first one a part may be written already
        self._lost = 0
        self._told = False
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1 if append else 0)
        # Always appended: a process that was replaced may wake up and write. Not buffered: what a full disk left in a
        # buffer would be known to nobody.
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time_s": time.time(), **fields}
        self._waiting.append((json.dumps(record) + "\n").encode())
        self._write_out()
        if self._view:
            self._view(record)

    def close(self) -> None:
        self._write_out()
        if self._waiting:
            self._say(f"{len(self._waiting) + self._lost} records could not be written to {self._path}")
        self._file.close()

    def _write_out(self) -> None:
        """All that waits, or as much as there is room for."""
        try:
            while self._waiting:
                written = self._file.write(self._waiting[0]) or 0
                self._waiting[0] = self._waiting[0][written:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except OSError as error:
            self._wait(error)
            return
        if self._told:
            self._told = False
            lost = f", but for {self._lost} that were too many to keep" if self._lost else ""
            self._say(f"records are written to {self._path} again{lost}")

    def _wait(self, error: OSError) -> None:
        while len(self._waiting) > WAITING_MOST:
            del self._waiting[1]  # not the first, which may stand there in part, and the newest say most
            self._lost += 1
        if not self._told:
            self._told = True
            self._say(
                f"warning: cannot write records to {self._path}: {error.strerror}; training goes on, and the newest "
                f"{WAITING_MOST} are kept until there is room"
            )


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

    def add_cpu(self, activity: Literal["compute", "codec"], seconds: float) -> None:
        """What another thread took of the CPU for work that is measured where it was waited for."""
        self._spent[f"{activity}_cpu_s"] += seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        lap = Lap()
        try:
            yield
        finally:
            self._spent["wait_s"] += lap.seconds

    @contextmanager
    def waiting_within(self, activity: Literal["compute", "codec"]) -> Iterator[None]:
        """The calling thread waits in the middle of its work, which has not taken that long then."""
        lap = Lap()
        try:
            yield
        finally:
            self._spent["wait_s"] += lap.seconds
            self._spent[f"{activity}_s"] -= lap.seconds

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
