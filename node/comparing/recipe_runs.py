"""Runs of recipes: a process each, some side by side, and none that was made before.

A run is what `thinpipe up --one-process` does with a run.toml that is whole, in a directory of its own: one process
computes bit for bit what a swarm does, and counts the same bytes but acknowledgements. **The resume law**: a run is not
made again if its directory has a summary, which is written last, and a run.toml with the same settings. What was broken
off has no summary, and what has other settings is of no use; both are made anew. Settings are compared as they are
resolved, so a run is found again however they were given.

Why processes and not threads: torch computes on one thread in each, whatever the other runs do, and a run that is
killed for its memory takes no other with it. None outlives this process: it is ended with it, and killed when it is.

**Who trains a run holds its lock**, and so does the run's process, so the lock is free once nobody writes there. It
belongs to the run and not to the directory of all: what must not happen is that two write the same records, and two
programs that share a directory, each with recipes of its own, do not. `thinpipe compare` holds the whole of its --out
besides, for its result replaces the one that is there. All runs are locked before the first begins, so who is refused
has trained nothing in vain.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sim.launch.end_signals import EndSignals, end_signals
from ...sim.launch.node_ends import ERROR_PREFIX
from ...sim.launch.node_launch import STOP_GRACE_S, node_environment
from ...sim.reports.lanes import lane_path
from ...sim.reports.progress import Progress
from ..config import RunConfig
from ..config_file import dump_config, load_config
from ..run_directory import LOCK, LocalRunError, anchored, claimed, clear
from .recipe import Recipe

POLL_S = 0.1
LOG = "up.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRun:
    """A recipe with one seed. `directory` is its own."""

    recipe: Recipe
    seed: int
    config: RunConfig
    directory: Path

    @classmethod
    def of(cls, recipe: Recipe, seed: int, shared: dict[str, Any], out: Path) -> RecipeRun:
        """Raises ConfigError."""
        config = anchored(recipe.config(shared, seed))
        return cls(recipe=recipe, seed=seed, config=config, directory=out / f"{recipe.name}-seed{seed}")

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, seed {self.seed}"

    def summary(self) -> dict[str, Any] | None:
        """Of a run that is on disk, whole, with the same settings; else None."""
        lanes, stages = self.config.lanes.count, range(self.config.pipeline.stages)
        places = [lane_path(self.directory, lane, lanes) for lane in range(lanes)]
        records = [place / f"stage-{stage}.jsonl" for place in places for stage in stages]
        try:
            before = load_config(self.directory / "run.toml")
            summary = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, cut off while it was written, or of another version
            return None
        same = before.model_dump() == self.config.model_dump()
        return summary if same and all(path.exists() for path in records) else None

    def ended(self) -> dict[str, Any]:
        """The summary of a run that was made. Raises LocalRunError."""
        if (summary := self.summary()) is None:
            line = f"{self.title}: {self.directory} was changed by another program; choose another --out"
            raise LocalRunError(line, 1)
        return summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run is that is under way. loss: of the last step, once there is one."""

    run: RecipeRun
    completed: int
    loss: float | None


class _Process:
    """A run under way. lock: of its directory, which is there."""

    def __init__(self, run: RecipeRun, lock: int) -> None:
        self.run, self.began_s = run, time.monotonic()
        clear(run.directory)  # before the settings are there: an old summary must never stand beside new ones
        settings, log = run.directory / "run.toml", run.directory / LOG
        settings.write_text(dump_config(run.config), encoding="utf-8")
        command = [sys.executable, "-m", "thinpipe.cli", "up", "--one-process", "--json", "--overwrite"]
        command += ["--config", str(settings), "--out", str(run.directory), "--parent", str(os.getpid())]
        command += ["--lock", str(lock)]
        lanes = run.config.lanes.count
        self._progress = Progress(run.directory, stages=run.config.pipeline.stages, lanes=lanes)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                env=node_environment(),
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches it through `_stop` alone, so it is said once
            )

    def standing(self) -> Standing:
        head = self._progress.look()[0]
        return Standing(run=self.run, completed=head.completed, loss=head.loss)

    def why(self, code: int) -> str:
        """The last words of a run that failed."""
        log = self.run.directory / LOG
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}{', by hand or because memory ran out' if name == 'SIGKILL' else ''}"
        words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = next((line for line in reversed(words) if line.startswith(ERROR_PREFIX)), None)
        return last.removeprefix(ERROR_PREFIX) if last else f"ended with exit code {code}; see {log}"


def run_all(
    runs: Sequence[RecipeRun],
    jobs: int,
    *,
    keep_going: bool = False,
    on_look: Callable[[Sequence[Standing]], None] | None = None,
    on_end: Callable[[RecipeRun, float, str | None], None] | None = None,
) -> dict[RecipeRun, str]:
    """Make the runs that are not on disk, `jobs` side by side. Returns why those failed that did.

    keep_going: with the others if one fails, as a recipe that diverges does; else LocalRunError is raised for the first
    that fails. on_look: those under way, about ten times a second. on_end: a run that was made now, its seconds, and
    why it failed, if it did. Raises LocalRunError, before anything starts, if somebody else trains one of them;
    KeyboardInterrupt for Ctrl-C, SIGTERM and a closed terminal. No process is left running either way, and runs that
    have ended are kept.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} runs side by side; wanted 1 or more")
    waiting, locks = deque[RecipeRun](), dict[RecipeRun, int]()
    working: list[_Process] = []
    failed: dict[RecipeRun, str] = {}
    # Signals are noted, and not raised between the start of a process and its place in `working`.
    with ExitStack() as held, end_signals() as told:
        for run in runs:
            if run.summary() is None:
                locks[run] = held.enter_context(claimed(run.directory / LOCK))
                if run.summary() is None:  # still: somebody may just have made it
                    waiting.append(run)
        try:
            while waiting or working:
                told.check()
                while waiting and len(working) < jobs:
                    told.check()
                    run = waiting.popleft()
                    working.append(_Process(run, locks[run]))
                for each in list(working):
                    if (code := each.process.poll()) is None:
                        continue
                    why = each.why(code) if code else None
                    if why and (code == 2 or not keep_going):
                        raise LocalRunError(f"{each.run.title}: {why}", 2 if code == 2 else 1)
                    if why:
                        failed[each.run] = why
                    working.remove(each)
                    if on_end:
                        on_end(each.run, time.monotonic() - each.began_s, why)
                if on_look:
                    on_look([each.standing() for each in working])
                time.sleep(POLL_S if working else 0)
        finally:
            _stop(working, told)
    return failed


def _stop(working: Sequence[_Process], told: EndSignals) -> None:
    """Ask politely, then insist; at once, if told a second time. Their runs have no summary, so they are made again."""
    alive = [each.process for each in working if each.process.poll() is None]
    for process in alive:
        process.terminate()
    deadline, asked = time.monotonic() + STOP_GRACE_S, told.count
    while any(process.poll() is None for process in alive) and told.count == asked and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in alive:
        process.kill()  # nothing happens to one that has ended
    for process in alive:
        with suppress(subprocess.TimeoutExpired):  # in the kernel, which ends it when it returns
            process.wait(STOP_GRACE_S)
