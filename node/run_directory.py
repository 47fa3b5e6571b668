"""A run's directory: what a run keeps there, who may write in it, and what is removed for another run.

One program at a time trains the run of a directory. It holds `run.lock`, which the kernel frees when its holder dies
(`sim.launch.file_lock`); who comes second is refused by name. Nodes do not hold it: those of a launcher that was
killed live for a moment longer, and those that were started by hand have no launcher. So whoever has the lock also
looks for processes that the records name, and waits a little for them to end. Why not the records alone: two programs
that start together would both find none.

Checkpoints may be elsewhere (`checkpoint.directory`). A run that begins must find none there: a stage that is started
again goes on from the newest, whosever it is. Only what is in the run's directory is removed for another run, because
what is elsewhere may be all that is left of one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..sim.launch import file_lock
from ..sim.reports.lanes import lane_path
from ..sim.reports.liveness import served_here
from .checkpoints.manifest import COPIES
from .config import ConfigError, RunConfig
from .config_file import dump_config, load_config
from .run_lanes import all_lanes

LOCK = "run.lock"
START = "first-weights"  # of a run that begins from another one (`node.origin`)
RECORDS = ("run.toml", "summary.json", "stage-*.jsonl", "stage-*.log", "checkpoints/stage-*", "checkpoints/copies")
RECORDS += ("disks/stage-*", "trace-stage-*.json", "trace.json", "trace.png", "tensorboard/stage-*")
RECORDS += ("corpus.json", START)
RECORDS += tuple(f"lane-*/{records}" for records in (*RECORDS, "rounds"))
ORPHANS_S = 10.0  # nodes look for their launcher twice a second, and end after what they compute
POLL_S = 0.1


class LocalRunError(RuntimeError):
    """The run cannot start or did not finish; one line says why."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def lane_directory(out: Path, lane: int, lanes: int) -> Path:
    """Where a lane keeps what a run of one lane keeps in `out`; made if it is not there."""
    directory = lane_path(out, lane, lanes)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


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
            told = ", ".join(f"{name} by process {process}" for name, process in serving.items())
            line = f"{run} is in use: {told}, still after {wait_s:g} s; end that first, or choose another --out"
            raise LocalRunError(line, 2)
        time.sleep(POLL_S)


def clear(out: Path, *, keep: Path | None = None) -> None:
    """Remove what a run leaves in its directory, and nothing else; nor `keep`, if that is in it."""
    for path in _left_in(out):
        if keep and path.resolve() == keep.resolve():
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for lane in out.glob("lane-*"):
        for directory in (*lane.glob("*"), lane):  # such as `checkpoints`
            with suppress(OSError):  # it holds something else too
                directory.rmdir()


def check_outlives(config: RunConfig, out: Path) -> None:
    """Raises ConfigError for a tokenizer that `clear` would remove before the run that it is for begins."""
    named, keep = config.data.tokenizer, config.model.path
    for path in _left_in(out) if named else ():
        if named and named.resolve().is_relative_to(path.resolve()) and not (keep and path.resolve() == keep.resolve()):
            raise ConfigError(
                f"data.tokenizer = {named} is a part of the run that would be replaced; copy it to another place first"
            )


def _left_in(out: Path) -> list[Path]:
    found = [path for pattern in RECORDS for path in out.glob(pattern)]
    with suppress(ConfigError):  # there is none, or it is another version's
        for config, place in all_lanes(load_config(out / "run.toml"), out):
            saved = config.checkpoint.path(place)
            if Path(os.path.abspath(saved)).is_relative_to(os.path.abspath(out)):
                found += _checkpoints(saved)
    return found


def _checkpoints(saved: Path) -> list[Path]:
    return [path for path in (*sorted(saved.glob("stage-*")), saved / COPIES) if path.is_dir()]


def check_no_checkpoints(config: RunConfig, out: Path) -> None:
    """Raises LocalRunError where a new run in `out` would find another one's, after `clear`."""
    removed = {path.resolve() for path in _left_in(out)}
    for own, place in all_lanes(config, out):
        saved = own.checkpoint.path(place)
        for path in _checkpoints(saved):
            if path.resolve() not in removed and any(path.rglob("step-*")):
                line = (
                    f"checkpoint.directory {saved} holds another run's checkpoints, such as {path.name}; a new run "
                    "would go on from them, and none but those in --out are removed for it: choose another directory, "
                    "or remove them"
                )
                raise LocalRunError(line, 2)


def hold_aside(directory: Path) -> int:
    """Make the directory, in which something large is written before it gets its name, and hold it as one that is in
    use; returns the descriptor, which the kernel closes for who is killed. Raises LocalRunError."""
    try:
        directory.mkdir(parents=True)
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalRunError(f"cannot write in {directory}: {error.strerror}; choose another --out", 2) from None
    with suppress(OSError):  # a disk that cannot lock a directory: there nothing is swept either
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def sweep(out: Path) -> None:
    """Remove what `up --from` made aside in `out` and was killed before it had its name."""
    for left in out.glob(f".{START}-*"):
        with suppress(OSError):
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


def with_start(config: RunConfig, run: Path) -> RunConfig:
    """The settings of the run in `run`, which name its first weights where they are now: in that directory, if it was
    moved. Raises ConfigError where they are gone."""
    named = config.model.path
    if named is None or not config.model.pretrained or (named / "config.json").is_file():
        return config
    if named.name == START and (run / START / "config.json").is_file():
        return _started_from(config, run / START)
    began = f" from {config.run.origin}" if config.run.origin else ""
    raise ConfigError(
        f"{named} is not there, and the run in {run} began{began} with what it held; bring it back, or set model.path "
        f"in {run}/run.toml to where it is now"
    )


def carry_start(config: RunConfig, run: Path, out: Path) -> RunConfig:
    """What the run in `run` began with is in `out` too, for the same run in another form; returns its settings there.
    Weights that lie outside of `run` stay where they are. Raises ConfigError for a disk that does not take them."""
    named = config.model.path
    if named is None or not config.model.pretrained or named.resolve() != (run / START).resolve():
        return config
    try:
        shutil.copytree(named, out / START)
    except (OSError, shutil.Error) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot write {out / START}: {cause}; make room there, or choose another --out") from None
    return _started_from(config, out / START)


def _started_from(config: RunConfig, start: Path) -> RunConfig:
    """The same with its first weights there, and its tokenizer if that was among them."""
    data, named = config.data, config.model.path
    if data.tokenizer is not None and data.tokenizer.parent == named:
        data = data.model_copy(update={"tokenizer": start.resolve() / data.tokenizer.name})
    return config.model_copy(update={"model": config.model.model_copy(update={"path": start.resolve()}), "data": data})


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
