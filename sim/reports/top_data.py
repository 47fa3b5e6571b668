"""The data of `thinpipe top`: the records of runs on this machine's disks, and nodes elsewhere over HTTP.

A directory is read as it grows (`sim.reports.record_tail`); a node is asked for its figures, each by a thread of its
own, so that one that does not answer delays no other. Both end in the same `StageFigures`. A swarm whose stages are
spread over several directories or nodes is put together again: what has the same run's name, lane and number of stages,
and no stage twice, is one swarm. So each lane of a run of several is one.

The answer of a node is not trusted: it is read up to a limit, under a deadline, and drawn as plain text.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from .cut_advice import advise
from .figures import StageFigures
from .lanes import lane_path, lanes_of
from .metrics_address import MetricsAddress, MetricsAddressError
from .prometheus_metrics import MetricsFormatError, read_figures
from .quantities import STAGES_MAX, stage_count, whole
from .record_tail import RecordTail

ANSWER_BYTES_MAX = 4 * 2**20
ANSWER_S = 3.0  # for a node's whole answer
ASK_EVERY_S = 1.0
SILENT_STEPS = 5  # as long as so many steps took, and SILENT_S at least
SILENT_S = 15.0
CLOCKS_S = 60.0  # a clock that was set meanwhile is off by less
OVER = ("ended", "stopped", "failed", "gone")


class TopError(ValueError):
    """There is nothing to look at; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """A stage, and whether its node is there. state: as its records say, or gone. note: why it may not be as it says
    ("" if nothing is wrong). here: its process was looked for on this machine, and found."""

    figures: StageFigures
    state: str
    note: str = ""
    here: bool = False


@dataclass(slots=True)
class SwarmView:
    """Stages that belong together, of one lane. notes: what could not be read. run: its directory, where it can go on
    at another cut: that of a run of one lane."""

    name: str
    stages: dict[int, StageView] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lane: int = 0
    lanes: int = 1
    run: Path | None = None

    @property
    def size(self) -> int:
        """Stages of the run, as far as anybody knows."""
        known = [seen.figures.stages or 0 for seen in self.stages.values()]
        return max([*known, *(stage + 1 for stage in self.stages)], default=0)

    @property
    def advice(self) -> str | None:
        """Which cut of the model would be faster, from the last steps of all stages; None where none would be, or
        nobody knows. Nodes that are asked over HTTP do not say what the model costs."""
        figures = [self.stages[stage].figures for stage in range(self.size) if stage in self.stages]
        costs = next((of.costs for of in figures if of.costs), None)
        shares = [of.compute_share or 0.0 for of in figures]
        found = advise(costs, [of.recent_work_s for of in figures], shares, self.run)
        return found["line"] if found else None

    @property
    def over(self) -> bool:
        """Nobody will write any more."""
        return len(self.stages) == self.size > 0 and all(seen.state in OVER for seen in self.stages.values())


class MetricsSource(Protocol):
    """Something to look at."""

    def look(self, now_s: float) -> SwarmView:
        """What is there at the moment; now_s: seconds since 1970."""
        ...


class Directory:
    """The records of a run, or of one of its lanes, in one directory. Raises TopError for what holds none of a run."""

    def __init__(self, run: Path, *, lane: int = 0, lanes: int = 1) -> None:
        self._run, self._lane, self._lanes = run, lane, lanes
        self._records = lane_path(run, lane, lanes)
        if not run.is_dir():
            raise TopError(f"{run}: there is no such directory; name the --out of a run")
        self._stages, self._steps = _settings(run)
        self._tails: dict[int, RecordTail] = {}
        self._figures: dict[int, tuple[int, StageFigures]] = {}  # with the tail's `replacements`
        self._refused: dict[int, int] = {}
        if self._stages is None and not self._paths():
            raise TopError(f"{run} holds neither run.toml nor stage-N.jsonl, so no run; name the --out of one")

    def _paths(self) -> dict[int, Path]:
        found = {}
        for path in self._records.glob("stage-*.jsonl"):
            number = path.stem.removeprefix("stage-")
            if number.isascii() and number.isdecimal() and int(number) < STAGES_MAX:
                found[int(number)] = path
        return found

    def look(self, now_s: float) -> SwarmView:
        run = self._run if self._lanes == 1 and _has_checkpoints(self._run) else None
        swarm = SwarmView(str(self._records), lane=self._lane, lanes=self._lanes, run=run)
        for stage, path in sorted(self._paths().items()):
            figures = self._fold(stage, path)
            swarm.stages[stage] = _seen(figures, now_s)
            bad = self._tails[stage].unreadable + self._refused.get(stage, 0)
            if bad:
                swarm.notes.append(f"{path.name}: {bad} lines are no records and are passed over")
            swarm.lane, swarm.lanes = figures.lane, figures.lanes  # of a lane's directory by itself, they say it alone
        return swarm

    def _fold(self, stage: int, path: Path) -> StageFigures:
        tail = self._tails.setdefault(stage, RecordTail(path))
        replacements, figures = self._figures.get(stage, (-1, self._unknown(stage)))
        for record in tail.read():
            if tail.replacements != replacements:  # another run has taken its place
                replacements, figures = tail.replacements, self._unknown(stage)
                self._stages, self._steps = _settings(self._run)
                self._refused[stage] = 0
            try:
                figures.take(record)
            except (KeyError, TypeError, ValueError, AttributeError):
                self._refused[stage] = self._refused.get(stage, 0) + 1
        figures.stages = figures.stages or self._stages
        figures.steps = figures.steps or self._steps
        self._figures[stage] = (replacements, figures)
        return figures

    def _unknown(self, stage: int) -> StageFigures:
        return StageFigures(stage, lane=self._lane, lanes=self._lanes)


def directories(run: Path) -> list[Directory]:
    """One for each lane of the run in `run`. Raises TopError for what holds none."""
    lanes = lanes_of(run)
    return [Directory(run, lane=lane, lanes=lanes) for lane in range(lanes)]


def _settings(run: Path) -> tuple[int | None, int | None]:
    """Stages and steps of run.toml, if it is there and says them."""
    try:
        tree = tomllib.loads((run / "run.toml").read_text(encoding="utf-8"))
        return stage_count(tree["pipeline"]["stages"]), whole(tree["run"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _has_checkpoints(run: Path) -> bool:
    """Whether run.toml asks for any."""
    try:
        return tomllib.loads((run / "run.toml").read_text(encoding="utf-8"))["checkpoint"]["every"] != 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seen(figures: StageFigures, now_s: float) -> StageView:
    """A process that was killed writes nothing of it; if it was on this machine, whether it is there can be seen."""
    here = figures.process is not None and figures.host == socket.gethostname()
    if here and figures.state not in OVER and not _alive(figures.process, figures.last_record_s):
        return StageView(figures=figures, state="gone", note="its process is gone, without a word")
    return StageView(figures=figures, state=figures.state, note=_silence(figures, now_s), here=here)


def _silence(figures: StageFigures, now_s: float) -> str:
    if figures.last_record_s is None or figures.state in ("starting", *OVER):
        return ""
    step_s = figures.train_s / figures.completed if figures.completed else 0.0
    silent_s = now_s - figures.last_record_s
    return f"silent for {silent_s:.0f} s" if silent_s > max(SILENT_S, SILENT_STEPS * step_s) else ""


def _alive(process: int | None, wrote_s: float | None) -> bool:
    """Whether that process is there, and not another one with its number: one that began after the last record was
    written did not write it."""
    if process is None or process <= 0:
        return False
    try:
        there = psutil.Process(process)
        if there.status() == psutil.STATUS_ZOMBIE:
            return False
        return wrote_s is None or there.create_time() <= wrote_s + CLOCKS_S
    except (psutil.NoSuchProcess, OverflowError):  # OverflowError: no process has such a number
        return False
    except psutil.AccessDenied:
        return True


class ScrapedNode:
    """One node's figures over HTTP, asked for by a thread in the background."""

    def __init__(self, endpoint: MetricsAddress) -> None:
        self._endpoint = endpoint
        self._figures: list[StageFigures] = []
        self._problem = "was not reached yet"
        self._asked = threading.Event()
        threading.Thread(target=self._run, name=f"asks {endpoint}", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._figures, self._problem = read_figures(fetch(self._endpoint)), ""
            except (OSError, MetricsFormatError, http.client.HTTPException) as error:
                self._problem = str(error) or type(error).__name__
            self._asked.set()
            time.sleep(ASK_EVERY_S)

    def wait(self, timeout_s: float) -> None:
        """Until it was asked once, or so long."""
        self._asked.wait(timeout_s)

    def look(self, now_s: float) -> SwarmView:
        swarm = SwarmView(str(self._endpoint))
        figures, problem = self._figures, self._problem
        for each in figures:
            note = "does not answer any more" if problem else _silence(each, now_s)
            swarm.lane, swarm.lanes = each.lane, each.lanes
            swarm.stages[each.stage] = StageView(figures=each, state=each.state, note=note)
        if problem:
            swarm.notes.append(f"{self._endpoint}: {problem}")
        return swarm


def fetch(endpoint: MetricsAddress) -> str:
    """What is served at /metrics there. Raises OSError, http.client.HTTPException or MetricsFormatError, in
    `ANSWER_S`."""
    deadline = time.monotonic() + ANSWER_S
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=ANSWER_S)
    connection.connect()
    wire = connection.sock
    # A peer that drips keeps each single read short of its timeout.
    over = threading.Timer(ANSWER_S, _hang_up, [wire])
    over.daemon = True
    over.start()
    answer = None
    try:
        connection.request("GET", "/metrics", headers={"Accept": "text/plain"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise MetricsFormatError(f"HTTP status {answer.status}; is that a node's --prometheus?")
        text = answer.read(ANSWER_BYTES_MAX + 1)
    except (http.client.HTTPException, OSError):  # a peer that sends too slowly was cut off: an end, or a reset
        if time.monotonic() < deadline:
            raise
        text = b""
    finally:
        over.cancel()
        if answer is not None:
            answer.close()
        connection.close()
    if time.monotonic() >= deadline:
        raise TimeoutError(f"no whole answer within {ANSWER_S:g} s")
    if len(text) > ANSWER_BYTES_MAX:
        raise MetricsFormatError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return text.decode("utf-8", errors="replace")


def _hang_up(wire: socket.socket) -> None:
    with suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)


def sources(runs: Iterable[Path], addresses: Iterable[str]) -> list[MetricsSource]:
    """Raises TopError for a directory or an address that cannot be one."""
    try:
        endpoints = [MetricsAddress.parse(address) for address in addresses]
    except MetricsAddressError as error:
        raise TopError(f"--prometheus: {error}") from None
    on_disk: list[MetricsSource] = [directory for run in runs for directory in directories(run)]
    nodes = [ScrapedNode(endpoint) for endpoint in endpoints]
    deadline = time.monotonic() + ANSWER_S
    for node in nodes:
        node.wait(max(0.0, deadline - time.monotonic()))
    return [*on_disk, *nodes]


def look(watched: Iterable[MetricsSource], now_s: float) -> list[SwarmView]:
    """The swarms that these make up, in their order."""
    swarms: list[SwarmView] = []
    for source in watched:
        part = source.look(now_s)
        home = next((swarm for swarm in swarms if _belongs(part, swarm)), None)
        if home is None:
            swarms.append(part)
        else:
            home.name = f"{home.name}, {part.name}"
            home.stages |= part.stages
            home.notes += part.notes
    return swarms


def _belongs(part: SwarmView, swarm: SwarmView) -> bool:
    if not (part.stages and swarm.stages):
        return False
    of = [{(seen.figures.run, seen.figures.stages) for seen in each.stages.values()} for each in (part, swarm)]
    return of[0] == of[1] and part.lane == swarm.lane and not part.stages.keys() & swarm.stages.keys()
