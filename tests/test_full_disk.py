"""Records and words are not worth a run: a full disk and a reader that goes away cost it nothing."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console
from thinpipe.node import run_records
from thinpipe.node.config_file import dump_config
from thinpipe.node.run_records import MetricsWriter
from thinpipe.sim.launch.disk_space import DiskSpace
from thinpipe.sim.launch.lasting_output import LastingStream
from thinpipe.sim.reports.figures import StageFigures
from thinpipe.sim.reports.run_display import RunDisplay
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .real_node import until
from .test_cli import start

DEADLINE_S = 120.0


@contextmanager
def room(nbytes: int) -> Iterator[None]:
    """No file may grow beyond it: EFBIG for ENOSPC, which only a disk of its own could bring about."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# -- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", range(100, 200, 9))
def test_records_wait_for_room(nbytes: int, tmp_path: Path) -> None:
    """Wherever in a record the disk ends."""
    path, said, seen = tmp_path / "stage-0.jsonl", list[str](), list[dict[str, Any]]()
    writer = MetricsWriter(path, view=seen.append, say=said.append)
    with room(nbytes):
        for number in range(9):
            writer.write("step", step=number)
        assert path.stat().st_size == nbytes
    writer.write("end", steps=9)
    assert [found.get("step") for found in read_records(path)] == [*range(9), None]
    writer.close()
    assert len(seen) == 10  # who looks is not kept waiting
    first, last = said
    assert first.startswith(f"warning: cannot write records to {path}: File too large; training goes on")
    assert last == f"records are written to {path} again"


def test_what_is_kept_is_bounded_and_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_records, "WAITING_MOST", 5)
    path, said = tmp_path / "stage-0.jsonl", list[str]()
    writer = MetricsWriter(path, say=said.append)
    with room(10):
        for number in range(20):
            writer.write("step", step=number)
    writer.close()
    assert [found["step"] for found in read_records(path)] == [0, 16, 17, 18, 19]  # the first stood there in part
    assert said[1] == f"records are written to {path} again, but for 15 that were too many to keep"


def test_what_is_never_written_is_said(tmp_path: Path) -> None:
    path, said = tmp_path / "stage-0.jsonl", list[str]()
    writer = MetricsWriter(path, say=said.append)
    with room(10):
        writer.write("step", step=0)
        writer.close()
    assert said[1:] == [f"1 records could not be written to {path}"]


def test_a_launcher_sees_that_a_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, blocks = [0.0], [0]
    found = os.statvfs(tmp_path)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*found[:4], blocks[0], *found[5:])))
    space = DiskSpace(tmp_path)
    assert space.look() == f"the disk of {tmp_path} is full: nothing can be recorded there; training goes on, make room"
    assert space.look() is None
    now[0], blocks[0] = 10.0, 5
    assert space.look() == f"there is room on the disk of {tmp_path} again"


# -- words ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[TextIO]:
    """A file on a disk that is full."""
    stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    yield stream
    with suppress(OSError):
        stream.close()


def test_words_that_cannot_be_written_are_left_out(full: TextIO) -> None:
    other = io.StringIO()
    stream = LastingStream(full, "stdout", other)
    for _ in range(3):
        print("step 1", file=stream, flush=True)  # pyright: ignore[reportArgumentType]
        Console(file=stream).print("step 2")  # pyright: ignore[reportArgumentType]
    said = "thinpipe: warning: stdout cannot be written (No space left on device); the run goes on without\n"
    assert other.getvalue() == said


def test_where_nothing_can_be_written_nothing_is_said(full: TextIO) -> None:
    print("step 1", file=LastingStream(full, "stdout", full), flush=True)  # pyright: ignore[reportArgumentType]


def test_the_first_checkpoint_that_fails_is_said() -> None:
    console = Console(file=io.StringIO(), width=80)
    display = RunDisplay(console, steps=9)
    stages = [StageFigures(0), StageFigures(1)]
    for reason in ("cannot write the checkpoint /data/step-2: No space left on device; " + "x" * 80, "another"):
        stages[1].take({"event": "fault", "time_s": 1.0, "code": "checkpoint", "reason": reason})
        display.update(stages)
    assert isinstance(console.file, io.StringIO)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("warning: stage 1: cannot write the checkpoint /data/step-2: No space left on device; x")
    stages[1].take({"event": "checkpoint", "time_s": 2.0, "completed": 4})
    assert stages[1].unsaved == ""


# -- real processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny: TinyConfig, tmp_path: Path) -> Callable[..., Path]:
    def write(**overrides: Any) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(dump_config(tiny({name.replace("__", "."): value for name, value in overrides.items()})))
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--one-process"], ["--stages", "2"]], ids=["one process", "a swarm"])
def test_a_reader_that_goes_away_ends_no_run(options: list[str], settings: Callable[..., Path], tmp_path: Path) -> None:
    run = start(settings(run__steps=20), tmp_path / "run", *options)
    assert run.process.stdout
    assert any(line.startswith("step ") for line in iter(run.process.stdout.readline, ""))
    run.process.stdout.close()
    assert run.process.stderr
    with run.process.stderr as stderr:
        said = stderr.read()
    assert run.process.wait(DEADLINE_S) == 0, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
    assert said == "thinpipe: warning: stdout cannot be written (Broken pipe); the run goes on without\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_swarm_trains_on_while_its_disk_is_full(
    settings: Callable[..., Path], small_disk: Path, tmp_path: Path
) -> None:
    """Records and logs find no room for forty steps; nothing is missing in the end."""
    steps = 130
    path = settings(run__steps=steps, pipeline__stages=2, checkpoint__every=10)
    run = start(path, small_disk / "run", "--set", f"checkpoint.directory={tmp_path / 'saved'}")

    def saved() -> int:
        return max((int(path.name[5:]) for path in (tmp_path / "saved" / "stage-0").glob("step-*")), default=0)

    until(lambda: saved() or run.process.poll() is not None, "the first checkpoint")
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = saved()
    until(lambda: saved() >= before + 40 or run.process.poll() is not None, "forty steps")
    recorded = run.steps(0)
    filler.unlink()
    code, shown, errors = run.end()
    assert code == 0, errors
    assert recorded < before + 40  # it was full
    assert f"warning: the disk of {small_disk / 'run'} is full: nothing can be recorded there" in shown
    for stage in range(2):
        steps_done = [found["step"] for found in read_records(run.out / f"stage-{stage}.jsonl") if "loss" in found]
        assert steps_done == list(range(steps))


@pytest.mark.slow
def test_checkpoints_that_fail_are_in_the_end_table(
    settings: Callable[..., Path], tmp_path: Path, small_disk: Path
) -> None:
    path = settings(run__steps=6, pipeline__stages=2, checkpoint__every=2)
    (small_disk / "filler").write_bytes(bytes(2**20 - 3 * 4096))
    run = start(path, tmp_path / "run", "--set", f"checkpoint.directory={small_disk / 'saved'}")
    code, shown, errors = run.end()
    assert code == 0, errors
    (said,) = [line for line in shown.splitlines() if line.startswith("warning: stage ")]
    assert f"cannot write {small_disk}" in said  # the tokenizer's directory, or a checkpoint
    assert "faults, newest last" in shown
    assert any("faults of checkpoints, the last: cannot write" in line for line in errors)
    summary = subprocess.run(
        [sys.executable, "-m", "thinpipe.cli", "summary", str(run.out)], capture_output=True, text=True, check=True
    )
    assert "faults, newest last" in summary.stdout
    assert "faults of checkpoints, the last: cannot write" in summary.stderr
