"""A run's directory: one program at a time, whole paths, and no resumption of what is not there."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.checkpoints.manifest import CheckpointError, Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.measuring.dense_comparison import add_comparison
from thinpipe.node.preparation import resolve_architecture, state_digest
from thinpipe.node.resuming import interrupted, newest_common, newest_of_each
from thinpipe.node.run_directory import (
    LOCK,
    LocalRunError,
    anchored,
    await_unserved,
    check_no_checkpoints,
    claimed,
    clear,
)
from thinpipe.sim.launch.end_signals import draining_signals
from thinpipe.sim.reports.progress import Progress
from thinpipe.sim.reports.run_console import closing_lines, summary_tables
from thinpipe.sim.reports.summary import checkpoint_lines, read_records, summarise
from typer.testing import CliRunner

from .conftest import TinyConfig
from .test_checkpoint import small

STAGES = 2


@pytest.fixture
def run(tiny: TinyConfig, tmp_path: Path) -> Path:
    """Of two stages, begun."""
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": STAGES, "run.steps": 9})))
    return tmp_path


def record(run: Path, stage: int, *events: dict[str, Any]) -> None:
    with (run / f"stage-{stage}.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"time_s": time.time(), **event}) + "\n")


def step(number: int) -> dict[str, Any]:
    spent = dict.fromkeys(("seconds", "compute_s", "codec_s", "wait_s"), 1.0)
    return {"event": "step", "step": number, "loss": 9.0 - number, "tokens": 10, "sent_bytes": {}, **spent}


def up(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["up", *options])
    return result.exit_code, result.stderr


def checkpoint(directory: Path, stage: int, *steps: int, of: RunConfig, table: str = "") -> None:
    """As a run of these settings leaves them. table: digest of the token table that the stage generated."""
    written = state_digest(of, resolve_architecture(of), table)
    store = CheckpointStore(
        directory, stage=stage, fingerprint=Fingerprint(run="run", stages=STAGES, configuration=written)
    )
    for completed in steps:
        store.write(small(completed), generation=0, written_s=0)


# -- one at a time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--resume", "{run}"], ["--overwrite", "--out", "{run}"]])
def test_a_run_that_somebody_trains_is_refused(run: Path, options: list[str]) -> None:
    before = sorted(run.iterdir())
    with claimed(run / LOCK):
        code, said = up(*(option.format(run=run) for option in options))
    assert code == 2
    assert said == (
        f"thinpipe: error: {run} is in use by process {os.getpid()}; choose another --out, or wait until that has "
        "ended\n"
    )
    assert sorted(run.iterdir()) == [run / LOCK, *before]


def test_who_is_second_in_a_new_directory_is_refused_too(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(dump_config(tiny()))
    with claimed(tmp_path / "run" / LOCK):
        code, said = up("--config", str(tmp_path / "settings.toml"), "--out", str(tmp_path / "run"), "--one-process")
    assert (code, "in use by process" in said) == (2, True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_lock_that_was_passed_on_is_held(tiny: TinyConfig, tmp_path: Path) -> None:
    """As `thinpipe compare` passes it on to the runs that it makes."""
    (tmp_path / "settings.toml").write_text(dump_config(tiny({"run.steps": 1})))
    with claimed(tmp_path / "run" / LOCK) as lock:
        options = ["--config", str(tmp_path / "settings.toml"), "--out", str(tmp_path / "run"), "--one-process"]
        assert up(*options, "--lock", str(lock)) == (0, "")
        assert "1 step of 256 tokens (one-process)" in shown(
            json.loads((tmp_path / "run" / "summary.json").read_text())
        )
        with pytest.raises(LocalRunError), claimed(tmp_path / "run" / LOCK):
            pass  # it is still this one's


def shown(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(*summary_tables(summary), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_nodes_that_nobody_launched_are_seen(run: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record(run, 1, {"event": "start", "stages": STAGES, "host": socket.gethostname(), "process": sleeper.pid})
    with pytest.raises(LocalRunError, match=rf"in use: stage 1 by process {sleeper.pid}, still after 0 s; end that"):
        await_unserved(run, wait_s=0)
    sleeper.kill()
    sleeper.wait()
    await_unserved(run, wait_s=0)


# -- what there is to go on from -------------------------------------------------------------------------------------


def test_steps_without_a_checkpoint_are_not_begun_again(run: Path) -> None:
    for stage in range(STAGES):
        record(run, stage, step(0), step(1))
    before = {path: path.read_bytes() for path in run.iterdir()}
    checkpoint(run / "checkpoints", 0, 2, of=load_config(run / "run.toml"))  # and the other stage has none
    code, said = up("--resume", str(run))
    assert code == 2
    assert f"--resume {run}: 2 steps done are on record, but {run / 'checkpoints'} has no checkpoint that all" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_copy_of_a_neighbour_is_something_to_go_on_from(run: Path) -> None:
    config = load_config(run / "run.toml")
    checkpoint(run / "checkpoints", 0, 2, 4, of=config)
    assert newest_common(config, run) is None
    checkpoint(run / "checkpoints" / "copies", 1, 2, of=config)
    assert newest_common(config, run) == 2
    checkpoint(run / "checkpoints", 1, 4, of=config)
    assert newest_common(config, run) == 4


def test_checkpoints_of_other_settings_are_no_common_step(run: Path, tiny: TinyConfig) -> None:
    """Whoever is resumed takes its own settings' alone; so stages that have others are not taken as one run."""
    config = load_config(run / "run.toml")
    other = tiny({"pipeline.stages": STAGES, "run.steps": 9, "run.seed": 2})
    saved = run / "checkpoints"
    checkpoint(saved, 0, 2, 4, of=config)
    checkpoint(saved, 1, 2, of=config)
    checkpoint(saved / "copies", 1, 4, of=other)
    assert newest_common(config, run) == 2
    checkpoint(saved, 1, 4, of=config)  # its own is right, and the copy does not matter
    assert newest_common(config, run) == 4
    longer = tiny({"pipeline.stages": STAGES, "run.steps": 90})
    assert newest_common(longer, run) == 4
    for each in (saved, saved / "copies"):
        shutil.rmtree(each / "stage-1")
    checkpoint(saved, 1, 2, 4, of=other)
    words = "that of stage 1 of other settings, configuration hash .{12}… there, .{12}… here; use the run.toml"
    with pytest.raises(CheckpointError, match=f"after 4 steps in {saved} cannot be gone on from: {words}"):
        newest_common(config, run)
    with pytest.raises(CheckpointError, match="that of stage 0 of other settings"):
        newest_common(other, run)
    with pytest.raises(CheckpointError, match="all of other settings"):
        newest_common(tiny({"pipeline.stages": STAGES, "run.seed": 3}), run)
    shutil.rmtree(saved / "stage-1")
    checkpoint(saved, 1, 4, of=config, table="beef")
    with pytest.raises(CheckpointError, match="the stages' token tables differ"):
        newest_common(config, run)


def test_lanes_that_hold_chunks_go_on_from_a_step_that_all_of_them_have(tmp_path: Path, tiny: TinyConfig) -> None:
    """Others go on from one each."""
    settings = {"pipeline.stages": STAGES, "lanes.count": 2, "lanes.average": "gradients"}
    chunks, lanes = tiny({**settings, "context.method": "full"}), tiny(settings)
    for config, run in ((chunks, tmp_path / "chunks"), (lanes, tmp_path / "lanes")):
        for stage in range(STAGES):
            checkpoint(run / "lane-0" / "checkpoints", stage, 2, 4, 6, of=config)
            checkpoint(run / "lane-1" / "checkpoints", stage, *((2, 4) if stage else (2, 4, 6)), of=config)
    assert newest_of_each(chunks, tmp_path / "chunks") == [4]
    assert newest_of_each(lanes, tmp_path / "lanes") == [6, 4]
    (tmp_path / "chunks" / "run.toml").write_text(dump_config(chunks))
    assert "goes on after step 4" in interrupted("interrupted", chunks, tmp_path / "chunks", begun=True)
    shutil.rmtree(tmp_path / "chunks" / "lane-1")
    assert newest_of_each(chunks, tmp_path / "chunks") == [None]
    assert newest_of_each(lanes, tmp_path / "lanes") == [6, 4]


def test_a_run_whose_settings_were_changed_by_hand_does_not_begin_anew(run: Path) -> None:
    """Its stages would all refuse their checkpoints, and agree on step 0."""
    for stage in range(STAGES):
        record(run, stage, step(0), step(1))
        checkpoint(run / "checkpoints", stage, 2, of=load_config(run / "run.toml"))
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace("seed = 1\n", "seed = 2\n"))
    code, said = up("--resume", str(run))
    assert (code, said.count("\n")) == (2, 1)
    assert "the checkpoints after 2 steps in" in said
    assert "all of other settings" in said
    said = interrupted("interrupted", load_config(run / "run.toml"), run, begun=True)
    assert "after 2 of 9 steps; all stages are stopped; the checkpoints after 2 steps in" in said


@pytest.mark.parametrize("options", [["--overwrite"], []])
def test_a_new_run_finds_no_checkpoints_of_another(tmp_path: Path, tiny: TinyConfig, options: list[str]) -> None:
    """Where they are not in --out nobody knows whose they are, so they are not removed, either."""
    saved, run = tmp_path / "saved", tmp_path / "run"
    run.mkdir()
    config = tiny({"pipeline.stages": STAGES, "checkpoint.directory": str(saved)})
    (tmp_path / "settings.toml").write_text(dump_config(config))
    if options:
        (run / "run.toml").write_text(dump_config(config))
        record(run, 0, step(0))
    checkpoint(saved / "copies", 1, 2, of=config)
    before = sorted(tmp_path.rglob("*"))
    code, said = up("--config", str(tmp_path / "settings.toml"), "--out", str(run), *options)
    assert (code, said.count("\n")) == (2, 1), said
    assert f"checkpoint.directory {saved} holds another run's checkpoints, such as copies; a new run" in said
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != LOCK] == before


def test_another_run_of_lanes_finds_no_contributions_of_the_one_before(run: Path) -> None:
    kept = run / "lane-1" / "rounds" / "stage-0" / "own"
    kept.mkdir(parents=True)
    (kept / "0-0123456789abcdef").touch()
    clear(run)
    assert not kept.parent.parent.exists()


@pytest.mark.parametrize("directory", ["saved", ".", "{run}/deep/saved", None])
def test_another_run_removes_all_checkpoints_in_its_directory(
    run: Path, tiny: TinyConfig, directory: str | None
) -> None:
    name = directory and directory.format(run=run)
    config = tiny({"pipeline.stages": STAGES, "checkpoint.directory": name})
    (run / "run.toml").write_text(dump_config(config))
    saved = config.checkpoint.path(run)
    checkpoint(saved, 0, 2, of=config)
    checkpoint(saved / "copies", 1, 2, of=config)
    (saved / "mine").mkdir()
    check_no_checkpoints(config, run)
    clear(run)
    assert not list(run.rglob("step-*"))
    assert (saved / "mine").exists()
    checkpoint(saved, 0, 2, of=config)
    with pytest.raises(LocalRunError, match="holds another run's"):
        check_no_checkpoints(tiny({"checkpoint.directory": str(saved)}), run / "elsewhere")


def test_checkpoints_are_where_the_run_is(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny({"checkpoint.directory": "saved"})
    monkeypatch.chdir(tmp_path)
    assert config.checkpoint.path(Path("runs/a")) == Path("runs/a/saved")
    assert tiny({"checkpoint.directory": "/saved"}).checkpoint.path(Path("runs/a")) == Path("/saved")


def test_paths_are_whole(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    relative = tiny({"data.source": "text.txt", "data.tokenizer": "t.json", "data.cache": "c", "model.path": "m"})
    whole = anchored(relative)
    assert whole.data.source == str(tmp_path / "text.txt")
    assert (whole.data.tokenizer, whole.data.cache) == (tmp_path / "t.json", tmp_path / "c")
    assert whole.model.path == tmp_path / "m"
    assert whole.digest() == relative.digest()
    for source, anchor in {
        "stdlib": "stdlib",
        "hf:owner/name": "hf:owner/name",
        "hf:rows": f"hf:{tmp_path}/rows",
        "hf:rows:part": f"hf:{tmp_path}/rows:part",
    }.items():
        assert anchored(tiny({"data.source": source})).data.source == anchor


# -- words ---------------------------------------------------------------------------------------------------------


def test_an_end_says_how_far_and_how_it_goes_on(run: Path) -> None:
    config = load_config(run / "run.toml")
    for stage in range(STAGES):
        record(run, stage, step(0), step(1), step(2))
    said = interrupted("stopped by SIGTERM", config, run, begun=True)
    assert said.startswith("stopped by SIGTERM after 3 of 9 steps; all stages are stopped, and there is no checkpoint")
    for stage in range(STAGES):
        checkpoint(run / "checkpoints", stage, 2, of=config)
    said = interrupted("interrupted", config, run, begun=True)
    assert said == (
        f"interrupted after 3 of 9 steps; all stages are stopped; thinpipe up --resume {run} goes on after step 2"
    )
    said = interrupted("interrupted", config, run, begun=True, one_process=True)
    assert f"thinpipe up --resume {run} --one-process goes on after step 2" in said
    assert "before the run began; nothing was changed" in interrupted("no", config, run, begun=False)


def test_the_tables_say_what_was_in_vain_and_what_went_wrong(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(dump_config(tiny({"run.steps": 2, "pipeline.stages": 2})))
    options = ["--config", str(tmp_path / "settings.toml"), "--out", str(tmp_path / "run"), "--one-process"]
    assert up(*options) == (0, "")
    for name, again in (("step", {"step": 1}), ("rollback", {"generation": 1, "completed": 1})):
        kept = [found for found in read_records(tmp_path / "run" / "stage-0.jsonl") if found["event"] == "step"][-1]
        record(tmp_path / "run", 0, {**(kept if name == "step" else {}), **again, "event": name})
    faults = [{"event": "fault", "code": "checkpoint", "reason": f"no space {number}\x1b[2J"} for number in range(7)]
    record(tmp_path / "run", 1, *faults)
    end = [found for found in read_records(tmp_path / "run" / "stage-0.jsonl") if found["event"] == "end"][-1]
    record(tmp_path / "run", 0, end)
    summary = summarise(tmp_path / "run", stages=2, width=64, mode="swarm", of_steps=5)
    add_comparison(summary, tmp_path / "run", tiny({"run.steps": 2, "pipeline.stages": 2}))
    text = shown(summary)
    assert "2 of 5 steps of 256 tokens (swarm)" in text
    assert "count what was sent in vain too: 1 rewind or resumes, 1 step done again" in " ".join(text.split())
    assert "faults, newest last (of 7 checkpoint)" in text
    assert "no space 6?[2J" in text
    assert "no space 1" not in text
    assert checkpoint_lines(summary) == ["stage 1: 7 faults of checkpoints, the last: no space 6\x1b[2J"]
    assert closing_lines(summary, tmp_path / "a run")[0] == (
        f"this run ended after 2 of 5 steps; thinpipe up --resume '{tmp_path}/a run' goes on"
    )


def test_a_converted_run_has_steps_before_its_records(tiny: TinyConfig, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny({"run.steps": 2, "pipeline.stages": 2})
    (tmp_path / "settings.toml").write_text(dump_config(config))
    assert up("--config", str(tmp_path / "settings.toml"), "--out", str(run), "--one-process") == (0, "")
    for path in run.glob("stage-*.jsonl"):
        moved = {"step": lambda found: {"step": found["step"] + 3}, "end": lambda found: {"steps": found["steps"] + 3}}
        found = [json.loads(line) for line in path.read_text().splitlines()]
        later = [each | moved.get(each["event"], lambda _: {})(each) for each in found]
        path.write_text("".join(f"{json.dumps(each)}\n" for each in later))
    for of_steps, title, early in ((5, "2 steps of 256 tokens", False), (9, "5 of 9 steps of 256 tokens", True)):
        summary = summarise(run, stages=2, width=64, mode="swarm", of_steps=of_steps)
        add_comparison(summary, run, config)
        assert title in shown(summary)
        assert closing_lines(summary, run)[0].startswith("this run ended after 5 of 9 steps") == early


def test_old_progress_is_not_shown(run: Path) -> None:
    record(run, 0, step(0), step(1))
    with (run / "stage-0.jsonl").open("a") as file:
        file.write('{"event": "st')  # broken off, and cut off by who goes on
    progress = Progress(run, stages=STAGES, from_now=True)
    assert progress.look()[0].loss is None
    text = (run / "stage-0.jsonl").read_text()
    (run / "stage-0.jsonl").write_text(text[: text.rfind("\n") + 1])
    record(run, 0, step(2))
    assert (progress.look()[0].completed, progress.look()[0].loss) == (3, 7.0)


def test_who_tells_a_process_and_its_group_is_not_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with draining_signals() as told:
        for now[0] in (0.0, 0.1):
            signal.raise_signal(signal.SIGTERM)
        assert told.name == "SIGTERM"
        now[0] = 3.0
        for number in (signal.SIGUSR1, signal.SIGHUP):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
