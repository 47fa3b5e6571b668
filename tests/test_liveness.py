"""Under way, ended, or broken off: what `thinpipe summary` and `thinpipe checkpoint ls` say of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.sim.reports.liveness import STARTING_S, liveness
from typer.testing import CliRunner

HERE = socket.gethostname()
NOW_S = 1e9
START = {"event": "start", "run": "run", "stages": 2, "steps": 50, "resume": False}


def has_started(at_s: float, process: int | None = None, host: str = HERE) -> dict[str, Any]:
    return {**START, "time_s": at_s, "host": host, "process": process}


def step(at_s: float, number: int) -> dict[str, Any]:
    spent = dict.fromkeys(("seconds", "compute_s", "codec_s", "wait_s"), 0.1)
    return {"event": "step", "time_s": at_s, "step": number, "loss": 5.0, "tokens": 10, "sent_bytes": {}, **spent}


def ended(at_s: float, steps: int = 50) -> list[dict[str, Any]]:
    return [{"event": "end", "time_s": at_s, "steps": steps}, {"event": "exit", "time_s": at_s, "exit_code": 0}]


def records(run: Path, stage: int, *lines: dict[str, Any]) -> None:
    (run / f"stage-{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text("[run]\nsteps = 50\n[pipeline]\nstages = 2\n[model]\nvocab_size = 512\n")
    return tmp_path


@pytest.fixture
def gone() -> int:
    """The number of a process that was."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def alive() -> Iterator[int]:
    """A process that is there, and is not this one."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def test_a_run_without_records_has_not_begun(run: Path) -> None:
    found = liveness(run, NOW_S)
    assert (found.state, found.stages) == ("not begun", [])
    assert found.line() == "has not begun: no stage has records here"


def test_a_process_that_is_there_is_under_way_however_long_it_is_silent(run: Path, alive: int) -> None:
    now_s = time.time()
    records(run, 0, has_started(now_s, alive), step(now_s, 0), step(now_s, 1))
    for later_s in (0.0, 9999.0):
        found = liveness(run, now_s + later_s)
        assert (found.state, found.completed, found.steps) == ("under way", 0, 50)  # stage 1 has done nothing yet
    assert [row["state"] for row in found.stages] == ["training", "no records"]
    assert "stage 0 training: silent for 9999 s, stage 1 no records" in found.line()


def test_a_process_that_was_killed_has_not_ended_the_run(run: Path, gone: int) -> None:
    for stage in (0, 1):
        records(run, stage, has_started(NOW_S, gone), step(NOW_S, 0), step(NOW_S, 1))
    found = liveness(run, NOW_S)
    assert (found.state, found.completed) == ("not ended", 2)
    assert (
        "has not ended, and nobody works on it, after 2 of 50 steps (stage 0 gone: its process is gone" in found.line()
    )


def test_another_process_with_its_number_is_not_taken_for_it(run: Path) -> None:
    """This one began long after the last record was written."""
    for stage in (0, 1):
        records(run, stage, has_started(NOW_S, os.getpid()), step(NOW_S, 0))
    assert liveness(run, NOW_S).state == "not ended"


def test_records_of_another_machine_are_believed_while_they_are_recent(run: Path) -> None:
    for stage in (0, 1):
        records(run, stage, has_started(NOW_S, 7, "elsewhere"), step(NOW_S, 0), step(NOW_S, 1))
    assert liveness(run, NOW_S + 10).state == "under way"
    assert liveness(run, NOW_S + 100).state == "not ended"
    for stage in (0, 1):
        records(run, stage, has_started(NOW_S, 7, "elsewhere"))
    assert liveness(run, NOW_S + STARTING_S).state == "under way"
    assert liveness(run, NOW_S + STARTING_S + 1).state == "not ended"


def test_a_run_ends_with_its_last_stage(run: Path, gone: int, alive: int) -> None:
    now_s = time.time()
    records(run, 0, has_started(now_s, gone), step(now_s, 49), *ended(now_s))
    records(run, 1, has_started(now_s, alive), step(now_s, 48))
    assert liveness(run, now_s).state == "under way"
    records(run, 1, has_started(now_s, alive), step(now_s, 49), *ended(now_s))
    assert liveness(run, now_s).state == "ended"
    records(run, 1, has_started(now_s, gone), step(now_s, 49), *ended(now_s), has_started(now_s, alive))
    assert liveness(run, now_s).state == "under way"  # it goes on
    failed = {"event": "exit", "time_s": now_s, "exit_code": 1}
    records(run, 1, has_started(now_s, gone), failed)
    assert liveness(run, now_s).state == "not ended"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_summary_and_ls_say_of_it(run: Path, gone: int, alive: int, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    now_s = time.time()
    for process, state, words, remedy in (
        (alive, "under way", "is under way, after 2 of 50 steps", f"thinpipe top {run} watches it"),
        (gone, "not ended", "has not ended, and nobody works on it, after 2 of 50 steps", f"up --resume {run} goes on"),
    ):
        for stage in (0, 1):
            records(run, stage, has_started(now_s, process), step(now_s, 0), step(now_s, 1))
        summary = CliRunner().invoke(app, ["summary", str(run), *options])
        assert summary.exit_code == 1
        (line,) = summary.stderr.splitlines()
        assert line.startswith(f"thinpipe: error: {run} {words} (stage 0 ")
        assert remedy in line
        ls = CliRunner().invoke(app, ["checkpoint", "ls", str(run), *options])
        assert (ls.exit_code, ls.stderr) == (0, "")
        if as_json:
            told = json.loads(summary.stdout)
            assert (told["state"], told["completed"], told["steps"], len(told["stages"])) == (state, 2, 50, 2)
            assert json.loads(ls.stdout)["run"]["state"] == state
        else:
            assert summary.stdout == ""
            assert f"the run {words}" in ls.stdout
