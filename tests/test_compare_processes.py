"""`thinpipe compare` as its user meets it: real processes that are asked to end, or killed, and what they leave."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from thinpipe.node.comparing.recipe_runs import claimed

from .real_faults import records
from .real_node import until
from .real_swarm import Process, all_gone

Compare = Callable[[], Process]


@pytest.fixture
def compare(tiny_settings: dict[str, Any], tmp_path: Path) -> Iterator[Compare]:
    """Starts it in tmp_path/out, always with the same settings: a recipe that is trained in a moment, and one that is
    not in days."""
    settings = {**tiny_settings, "pipeline.stages": 2, "model.layers": 2}
    for name in ("codec.codec", "optim.muon_lr", "optim.adamw_lr", "run.steps"):
        del settings[name]
    arguments = ["compare", "--recipe", "short=bf16 run.steps=1", "--recipe", "long=int8 run.steps=1000000"]
    arguments += ["--link", "1mbit,5ms", "--pace", "tiny@2x10ms+20ms", "--schedule", "1f1b", "--jobs", "2"]
    arguments += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(tmp_path / f"words-{len(started)}", *arguments, "--out", str(tmp_path / "out")))
        return started[-1]

    yield start
    for process in started:
        left = process.family()
        process.close()
        all_gone(left)


def training(process: Process, out: Path) -> list[psutil.Process]:
    """It and its runs, once the short one is on disk and the long one has done a step in this life."""
    run = out / "long-seed1"
    (run / "stage-0.jsonl").unlink(missing_ok=True)  # of an earlier life; this one has yet to import torch

    def trains() -> bool:
        assert process.popen.poll() is None, process.words
        return bool(records(run, 0, "step")) and (out / "short-seed1" / "summary.json").exists()

    until(trains, "a step of the long run, and the end of the short one")
    return process.family()


@pytest.mark.slow
def test_what_has_ended_stays_and_nobody_is_left(compare: Compare, tmp_path: Path) -> None:
    """One comparison that is told to end by SIGTERM, begun again and told to by Ctrl-C, begun again and killed."""
    out, made = tmp_path / "out", set[int]()
    for told, words in ((signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")):
        process = compare()
        family = training(process, out)
        made.add((out / "short-seed1" / "summary.json").stat().st_mtime_ns)
        assert len(family) >= 2
        process.popen.send_signal(told)
        last = process.ends(130, within_s=30).splitlines()[-1]
        assert last == (
            f"thinpipe: error: {words}; no run goes on. Those that have ended are kept in {out}, "
            "the same command goes on"
        )
        assert not [each for each in family[1:] if each.is_running()]  # it has waited for them
        assert "Traceback" not in process.words
    process = compare()
    training(process, out)
    said = f"{out} is in use by process {process.popen.pid}; choose another --out, or wait until that has ended"
    assert compare().ends(2) == f"thinpipe: error: {said}\n"
    done = len(records(out / "long-seed1", 0, "step"))
    until(lambda: len(records(out / "long-seed1", 0, "step")) > done, "a step of whom it leaves alone")
    assert "short, seed 1: trained before" in process.words
    made.add((out / "short-seed1" / "summary.json").stat().st_mtime_ns)
    assert len(made) == 1
    process.kill()  # and all of its runs, without a word to any
    for lock in (out / "compare.lock", out / "long-seed1" / "run.lock"):
        with claimed(lock):  # as whoever says the same again
            pass
