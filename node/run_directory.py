"""A run's directory: what a run keeps there, who may write in it, and what is removed for another run.

One program at a time trains the run of a directory. It holds `run.lock`, which the kernel frees when its holder dies
(`sim.launch.file_lock`); who comes second is refused by name. Nodes do not hold it: those of a launcher that was
killed live for a moment longer, and those that were started by hand have no launcher. So whoever has the lock also
looks for processes that the records name, and waits a little for them to end. Why not the records alone: two programs
that start together would both find none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..sim.launch import file_lock
from ..sim.reports.liveness import served_here
from .config import ConfigError, RunConfig
from .config_file import dump_config, load_config

LOCK = "run.lock"
START = "first-weights"  # of a run that begins from another one (`node.origin`)
RECORDS = ("run.toml", "summary.json", "stage-*.jsonl", "stage-*.log", "checkpoints/stage-*", "checkpoints/copies")
RECORDS += ("disks/stage-*", "trace-stage-*.json", "trace.json", "trace.png", "tensorboard/stage-*")
RECORDS += ("corpus.json", START)
ORPHANS_S = 10.0  # nodes look for their launcher twice a second, and end after what they compute
POLL_S = 0.1


class LocalRunError(RuntimeError):
    """The run cannot start or did not finish; one line says why."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def writable(directory: Path) -> Path:
    """Create `directory` and make sure that files can be written in it. Raises LocalRunError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LocalRunError(f"cannot write in {directory}: {error.strerror}; choose another --out", 2) from None
    return directory


@contextmanager
def claimed(lock: Path) -> Iterator[int]:
    """Hold this lock, in a directory that is made if it is not there; gives its descriptor. Raises LocalRunError, which
    says who has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        taken = file_lock.take(lock)
    except file_lock.LockError as error:
        raise LocalRunError(str(error), 2) from None
    if taken is None:
        line = (
            f"{lock.parent} is in use by {file_lock.holder(lock)}; choose another --out, or wait until that has ended"
        )
        raise LocalRunError(line, 2)
    try:
        with suppress(OSError):  # a full disk: then nobody learns who it is
            file_lock.sign(taken)
        yield taken
    finally:
        os.close(taken)


def await_unserved(run: Path, wait_s: float = ORPHANS_S) -> None:
    """Return once no process of this machine serves a stage of the run. Raises LocalRunError for one that does after
    `wait_s`."""
    deadline = time.monotonic() + wait_s
    while serving := served_here(run, time.time()):
        if time.monotonic() >= deadline:
            told = ", ".join(f"stage {stage} by process {process}" for stage, process in serving.items())
            line = f"{run} is in use: {told}, still after {wait_s:g} s; end that first, or choose another --out"
            raise LocalRunError(line, 2)
        time.sleep(POLL_S)


def clear(out: Path, *, keep: Path | None = None) -> None:
    """Remove what a run leaves in its directory, and nothing else; nor `keep`, if that is in it."""
    for path in _left(out, keep):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_outlives(config: RunConfig, out: Path) -> None:
    """Raises ConfigError for a tokenizer that `clear` would remove before the run that it is for begins."""
    named = config.data.tokenizer
    for path in _left(out, config.model.path):
        if named and named.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                f"data.tokenizer = {named} is a part of the run that would be replaced; copy it to another place first"
            )


def _left(out: Path, keep: Path | None) -> list[Path]:
    found = [path for pattern in RECORDS for path in out.glob(pattern)]
    return [path for path in found if not (keep and path.resolve() == keep.resolve())]


def write_settings(config: RunConfig, path: Path) -> None:
    """Whole or not at all: a run cannot be gone on with without them."""
    if path.exists() and load_config(path) == config:
        return
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.replace(path)


def anchored(config: RunConfig) -> RunConfig:
    """The same with whole paths, so that the run can be gone on with from any directory. (Where checkpoints are is
    relative to the run's own directory, which may be moved.)"""
    data: dict[str, Any] = {"source": _anchored_source(config.data.source)}
    for name in ("tokenizer", "cache"):
        if (path := getattr(config.data, name)) is not None:
            data[name] = path.expanduser().absolute()
    found: dict[str, Any] = {"data": config.data.model_copy(update=data)}
    if config.model.path is not None:
        found["model"] = config.model.model_copy(update={"path": config.model.path.expanduser().absolute()})
    return config.model_copy(update=found)


def _anchored_source(source: str) -> str:
    if source == "stdlib":
        return source
    prefix = "hf:" if source.startswith("hf:") else ""
    name, colon, rest = source.removeprefix(prefix).partition(":") if prefix else (source, "", "")
    path = Path(name).expanduser()
    if prefix and not path.is_dir():  # of a hub
        return source
    return f"{prefix}{path.absolute()}{colon}{rest}"
