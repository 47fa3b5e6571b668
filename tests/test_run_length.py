"""A run that is given more steps: its checkpoints are taken, and its rates are a function of what run.toml says."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.checkpoints.manifest import Fingerprint
from thinpipe.node.checkpoints.store import STATE, CheckpointStore
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.config_file import dump_config, load_config, parse_config
from thinpipe.node.learning_rate import RateSchedule
from thinpipe.node.preparation import resolve_architecture, state_digest
from thinpipe.node.run_length import length_line, steps_done, with_length
from thinpipe.node.stage_state import StageSnapshot
from thinpipe.sim.reports.figures import StageFigures
from thinpipe.sim.reports.run_display import RunDisplay
from typer.testing import CliRunner

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults import Drain, Frame, Kill
from .faults_reference import SETTINGS, STAGES, assert_equal
from .in_memory import run_reference
from .preloaded import ran
from .real_faults import records

RATES = {"optim.warmup_steps": 2, "optim.decay_fraction": 0.5}


def rates(config: RunConfig) -> list[float]:
    schedule = RateSchedule(config.optim, config.run.steps, config.run.extended)
    return [schedule.factor(step) for step in range(config.run.steps)]


def of_steps(steps: int, **run: Any) -> RunConfig:
    return parse_config({"run": {"steps": steps, **run}, "optim": {"warmup_steps": 2, "decay_fraction": 0.5}})


def test_a_run_whose_rates_have_not_fallen_is_one_of_the_new_length() -> None:
    config = of_steps(8)
    assert with_length(config, 4, 20) == of_steps(20)
    assert with_length(config, 0, 20) == of_steps(20)
    assert length_line(config, of_steps(20)) == (
        "20 steps instead of 8: learning rates are those of a run that had so many from the start; they fall from step "
        "11 to step 20"
    )


def test_a_finished_run_goes_on_at_the_rates_of_the_new_length() -> None:
    config = of_steps(8)
    longer = with_length(config, 8, 20)
    assert longer.run.extended == ((8, 8),)
    assert rates(longer) == rates(config) + rates(of_steps(20))[8:]
    assert length_line(config, longer) == (
        "20 steps instead of 8: learning rates were 0.25 of their peak in step 8 and are 1 of it in step 9; they fall "
        "from step 11 to step 20"
    )
    again = with_length(longer, 20, 24)
    assert again.run.extended == ((8, 8), (20, 20))
    assert rates(again) == rates(longer) + rates(of_steps(24))[20:]
    assert length_line(again, again) is None


def test_lanes_keep_the_length_that_their_rounds_are_planned_for() -> None:
    config = parse_config({"run": {"steps": 8}, "lanes": {"count": 2}})
    assert with_length(config, 4, 8) == config
    with pytest.raises(ConfigError, match="a run of 2 lanes keeps its 8 steps; begin a new one from it"):
        with_length(config, 8, 20)


def test_who_has_lost_what_came_after_a_change_changes_it_anew() -> None:
    longer = with_length(of_steps(8), 8, 20)
    other = with_length(longer, 6, 30)
    assert other.run.extended == ((6, 8),)
    assert rates(other) == rates(longer)[:6] + rates(of_steps(30))[6:]


def test_a_run_may_end_sooner() -> None:
    shorter = with_length(of_steps(20), 5, 6)
    assert shorter.run.extended == ((5, 20),)
    assert rates(shorter) == [0.5, 1, 1, 1, 1, 1 / 3]


@pytest.mark.parametrize(
    ("done", "steps", "said"),
    [
        (8, 8, "all 8 steps are done, and 8 are no more; give more than 8"),
        (8, 5, "8 steps are done, and 5 are fewer; give more than 8"),
        (6, 6, "all 6 steps are done, and 6 are no more; give more than 6"),
    ],
)
def test_lengths_that_cannot_be(done: int, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_length(of_steps(8), done, steps)


@pytest.mark.parametrize(
    ("extended", "said"),
    [([[3, 3], [2, 4]], "ascending"), ([[5, 3]], "never above"), ([[0, 3]], "ascending"), ([[9, 9]], "9 are done")],
)
def test_changes_that_cannot_have_been(extended: list[list[int]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        of_steps(8, extended=extended)


def test_neighbours_compare_all_of_it() -> None:
    longer = with_length(of_steps(8), 8, 20)
    assert len({of_steps(8).digest(), of_steps(20).digest(), longer.digest()}) == 3
    assert len({each.of_any_length().digest() for each in (of_steps(8), of_steps(20), longer)}) == 1
    assert of_steps(8, eval_every=3).of_any_length().digest() != of_steps(8).of_any_length().digest()


# -- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny: TinyConfig) -> RunConfig:
    return tiny(SETTINGS | RATES)


def test_a_finished_run_that_goes_on_has_the_bits_of_one_process(config: RunConfig, tmp_path: Path) -> None:
    """With the same run.toml; whoever is lost in what was added."""
    done = config.run.steps
    longer = with_length(config, done, done + 3)
    run_cluster(config, tmp_path / "run", [], hurry=True)
    shutil.copytree(tmp_path / "run", tmp_path / "disturbed")
    reference = run_reference(longer, tmp_path / "reference")
    assert_equal(run_cluster(longer, tmp_path / "run", [], resume=True), reference)
    faults = [Kill(at=Frame(number=60), stage=1)]
    disturbed = run_cluster(longer, tmp_path / "disturbed", list(faults), resume=True)
    assert disturbed.happened == faults
    assert_equal(disturbed, reference)


def test_a_stage_that_lacks_the_last_checkpoint_computes_what_it_computed(config: RunConfig, tmp_path: Path) -> None:
    """The steps that are done again, of the earlier length, have its rates."""
    done = config.run.steps
    longer = with_length(config, done, done + 2)
    run_cluster(config, tmp_path / "run", [], hurry=True)
    for step in (done - 1, done):
        file = tmp_path / "run" / "checkpoints" / "stage-1" / f"step-{step:08d}" / STATE
        file.write_bytes(b"\0" * file.stat().st_size)
    ended = run_cluster(longer, tmp_path / "run", [], resume=True)
    assert ended.rollbacks[-1]["completed"] == done - 2
    assert_equal(ended, run_reference(longer, tmp_path / "reference"))


def test_a_run_that_was_stopped_early_is_one_of_the_new_length(tiny: TinyConfig, tmp_path: Path) -> None:
    config, longer = (tiny(SETTINGS | RATES | {"run.steps": steps}) for steps in (10, 14))
    run_cluster(config, tmp_path / "run", [Drain(at=Frame(number=70), stage=0)])
    done = steps_done(config, tmp_path / "run")
    assert 0 < done <= 5
    checkpoints = config.checkpoint.path(tmp_path / "run")
    (checkpoints / "stage-1").rename(tmp_path / "lost")
    copies = checkpoints / "copies" / "stage-1"
    kept = copies.exists()
    if not kept:
        shutil.copytree(tmp_path / "lost", copies)
    assert steps_done(config, tmp_path / "run") == done  # a neighbour has a copy
    if not kept:
        shutil.rmtree(copies)
    (tmp_path / "lost").rename(checkpoints / "stage-1")
    assert with_length(config, done, 14) == longer
    ended = run_cluster(longer, tmp_path / "run", [], resume=True)
    assert ended.rollbacks[-1]["completed"] == done
    assert_equal(ended, run_reference(longer, tmp_path / "reference"))


def test_nodes_go_on_with_whatever_length_their_run_toml_has(config: RunConfig, tmp_path: Path) -> None:
    """Edited by hand, without a word of what it was: the checkpoints are taken all the same."""
    done = config.run.steps
    run_cluster(config, tmp_path, [], hurry=True)
    edited = dump_config(config).replace(f"steps = {done}", f"steps = {done + 2}")
    (tmp_path / "run.toml").write_text(edited)
    ended = run_cluster(load_config(tmp_path / "run.toml"), tmp_path, [], resume=True)
    assert ended.rollbacks[-1]["completed"] == done
    assert [len(losses) for losses in ended.losses] == [done + 2] * STAGES


# -- the command ----------------------------------------------------------------------------------------------------


def has_done(config: RunConfig, run: Path, steps: list[int]) -> None:
    """`run` with run.toml, and checkpoints of all its stages that look whole."""
    (run / "run.toml").write_text(dump_config(config))
    written = state_digest(config, resolve_architecture(config))
    fingerprint = Fingerprint(run=config.run.name, stages=config.pipeline.stages, configuration=written)
    for stage in range(config.pipeline.stages):
        store = CheckpointStore(run / "checkpoints", stage=stage, fingerprint=fingerprint)
        for step in steps:
            store.write(StageSnapshot(completed=step, tensors={}, dictionaries={}), generation=0, written_s=0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "5"], "6 steps are done, and 5 are fewer; give more than 6"),
        (["--steps", "6"], "all 6 steps are done, and 6 are no more; give more than 6"),
        (["--set", "run.steps=0"], "run.steps: Input should be greater than or equal to 1"),
        (["--steps", "9", "--seed", "7"], "run.seed is 7 here and 1 there"),
    ],
)
def test_what_is_refused(options: list[str], said: str, config: RunConfig, tmp_path: Path) -> None:
    has_done(config, tmp_path, [4, 6])
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["up", "--resume", str(tmp_path), *options])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert load_config(tmp_path / "run.toml") == config
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_run_printed_before_is_not_printed_again() -> None:
    """It says first after which step it goes on, and that as soon as a process of its own knows."""
    figures, shown = StageFigures(0), io.StringIO()
    step = {"time_s": 0.0, "event": "step", "loss": 5.0, "tokens": 64, "seconds": 1.0, "sent_bytes": {}}
    step |= {"compute_s": 0.0, "codec_s": 0.0, "wait_s": 0.0}
    start = {"time_s": 0.0, "event": "start"}
    went_on = {"time_s": 0.0, "event": "rollback", "generation": 1, "completed": 4, "source": "disk"}
    for record in (start, {**went_on, "completed": 2}, step | {"step": 3}):
        figures.take(record)
    display = RunDisplay(Console(file=shown, width=120), steps=6, resumes=figures.lives)
    with display:
        display.update([figures])
        for record in (start, went_on, step | {"step": 4}, {**went_on, "completed": 3}, step | {"step": 5}):
            figures.take(record)
            display.update([figures])
    lines = shown.getvalue().splitlines()
    assert lines[0] == "resumes after step 4 of 6"
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 5/6", "step 6/6"]


@pytest.mark.slow
def test_real_processes_go_on_past_the_end(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text(dump_config(tiny({"pipeline.stages": 2, **RATES})))
    run = tmp_path / "run"

    def up(*options: str) -> Any:
        done = ran("up", *options)
        assert done.exit_code == 0, done
        return done

    up("--config", str(tmp_path / "short.toml"), "--out", str(run))
    said = up("--resume", str(run), "--steps", "6").stdout
    assert "6 steps instead of 3: learning rates were 0.5 of their peak in step 3 and are 1 of it in step 4" in said
    assert "resumes after step 3 of 6" in said
    assert load_config(run / "run.toml").run.extended == ((3, 3),)
    assert [record["step"] for record in records(run, 0, "step")] == [*range(6)]
    up("--config", str(run / "run.toml"), "--one-process", "--out", str(tmp_path / "reference"))
    swarm, reference = (json.loads((each / "summary.json").read_text()) for each in (run, tmp_path / "reference"))
    assert [stage["state_sha256"] for stage in swarm["stages"]] == [
        stage["state_sha256"] for stage in reference["stages"]
    ]
    assert "nothing is left to do: more --steps go on" in up("--resume", str(run)).stdout
