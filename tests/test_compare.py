"""`thinpipe compare`: recipes, steps to a loss, which runs are made again, the page, and what is refused."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.comparing import recipe_runs
from thinpipe.node.comparing.compare import Comparison, compare, worst
from thinpipe.node.comparing.loss_curve import Point, interval, mean_curve, over_first, steps_to
from thinpipe.node.comparing.recipe import Recipe, check_names
from thinpipe.node.comparing.recipe_runs import RecipeRun, claimed, run_all
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import load_config
from thinpipe.node.run_directory import LocalRunError
from thinpipe.sim.launch import file_lock
from thinpipe.sim.reports.compare_console import CompareDisplay, compare_lines, compare_table, duration
from thinpipe.sim.reports.compare_page import compare_page
from thinpipe.sim.reports.lanes import lane_path
from typer.testing import CliRunner

# Recipes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense=bf16", Recipe(name="dense", codec="bf16")),
        ("m=mapl:r=8,context=4 int4", Recipe(name="m", codec="mapl:r=8,context=4", formats=("int4",))),
        (
            "r.v_q+1=mapl rvq:groups=4,delta=drift/16 rvq optim.muon_lr=0.04 run.steps=9",
            Recipe(
                name="r.v_q+1",
                codec="mapl",
                formats=("rvq:groups=4,delta=drift/16", "rvq"),
                settings=("optim.muon_lr=0.04", "run.steps=9"),
            ),
        ),
        ("own=int8 optim.clip=0.5", Recipe(name="own", codec="int8", settings=("optim.clip=0.5",))),
    ],
)
def test_a_recipe_is_taken_apart(text: str, expected: Recipe) -> None:
    assert Recipe.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "bf16", "=bf16", "a=", "a= ", "a=mapl int4 int3 int8", "a=mapl optim.clip=1 int4", "a=b c d e=1 f"]
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a recipe is NAME=CODEC .*, got '"):
        Recipe.parse(text)


@pytest.mark.parametrize("name", ["a/b", "..", "-a", "a b", "ä", "a" * 65])
def test_a_name_is_one_that_a_directory_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"its runs are kept under this name; use letters"):
        Recipe.parse(f"{name}=bf16")


def test_two_of_one_name_are_refused() -> None:
    check_names([Recipe.parse("a=bf16"), Recipe.parse("b=bf16")])
    with pytest.raises(ConfigError, match="two recipes are called 'a'"):
        check_names([Recipe.parse("a=bf16"), Recipe.parse("b=bf16"), Recipe.parse("a=int8")])


def test_settings_of_a_recipe_win_and_rates_are_the_codecs_own() -> None:
    shared = {"run.steps": 5, "optim.clip": 0.5}
    own = Recipe.parse("a=mapl:r=8 int8 optim.clip=2").config(shared, 7)
    assert (own.run.steps, own.run.seed, own.optim.clip, own.optim.muon_lr) == (5, 7, 2, 0.01)
    assert (own.codec.codec, own.codec.forward, own.codec.backward) == ("mapl:r=8", "int8", None)
    assert Recipe.parse("b=bf16").config(shared, 7).optim.muon_lr == 0.02
    with pytest.raises(ConfigError, match=r"recipe 'c': unknown setting 'optim.clipp'; the nearest known one is"):
        Recipe.parse("c=bf16 optim.clipp=1").config(shared, 7)


# Steps to a loss

LOSSES = st.lists(st.floats(0.1, 10) | st.just(math.nan), min_size=1, max_size=8)


def curve(losses: list[float], every: int = 10) -> list[Point]:
    return [
        Point(step=every * count, tokens=100 * every * count, sent_bytes=7.0 * count, loss=loss)
        for count, loss in enumerate(losses, start=1)
    ]


def test_steps_lie_on_straight_lines_between_evaluations() -> None:
    falling = curve([5.0, 4.0, 2.0])
    assert [steps_to(falling, loss) for loss in (9.0, 5.0, 4.5, 4.0, 3.0, 2.0)] == [10, 10, 15, 20, 25, 30]
    assert steps_to(falling, 1.9) is None
    assert steps_to(curve([5.0, 3.0, 4.0]), 4.0) == 15  # where it is first there
    assert steps_to(curve([math.nan, 3.0]), 4.0) == 20  # nothing is known of the way there
    assert steps_to(curve([5.0, math.nan]), 4.0) is None


@given(LOSSES, st.floats(0.1, 10), st.floats(0.1, 10))
def test_steps_to_a_loss_are_monotone_and_within_what_was_evaluated(
    losses: list[float], one: float, other: float
) -> None:
    points = curve(losses)
    low, high = sorted((one, other))
    late, soon = steps_to(points, low), steps_to(points, high)
    known = [loss for loss in losses if not math.isnan(loss)]
    assert (late is None) == (min(known, default=math.inf) > low)
    if late is not None:
        assert soon is not None
        assert points[0].step <= soon <= late <= points[-1].step


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_worst_recipes_last_loss_is_reached_by_all(recipes: list[list[float]]) -> None:
    means = {Recipe(name=f"r{index}", codec="bf16"): curve(losses) for index, losses in enumerate(recipes)}
    target, said = worst(means)
    assert target == max(losses[-1] for losses in recipes)
    assert all(steps_to(points, target or 0) is not None for points in means.values())
    assert said.endswith("so all reach it")


def test_a_recipe_that_diverged_is_no_target() -> None:
    means = {Recipe.parse("a=bf16"): curve([5, 4]), Recipe.parse("b=bf16"): curve([5, math.nan])}
    assert worst(means) == (4, "the last one of a, the worst recipe")
    assert worst({Recipe.parse("b=bf16"): curve([math.inf])})[0] is None


def test_means_and_paired_differences() -> None:
    mean = mean_curve([curve([5, 4]), curve([4, 2])])
    assert [(point.step, point.loss) for point in mean] == [(10, 4.5), (20, 3)]
    assert over_first([1.1, 2.2], [1, 2]) == pytest.approx([10, 10])
    assert interval([1, 2, 3]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0]))
    assert interval([0.0, 1.0] * 40) > 0  # more than the table has


# Runs, without training


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def start_by(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    """`made` in the place of what starts runs, and of nothing else: matplotlib, too, starts a program, once on each
    machine."""
    monkeypatch.setattr(recipe_runs, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": made}))


class Trainer:
    """In place of subprocess.Popen: writes at once what a run of that run.toml would leave behind."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fails = ""

    def __call__(self, command: list[str], *, stderr: Any, **_: Any) -> Ended:
        out = Path(command[command.index("--out") + 1])
        self.started.append(out.name)
        if self.fails and out.name.startswith(self.fails):
            stderr.write(b"noise\nthinpipe: error: no memory is left\n")
            return Ended(1)
        config = load_config(out / "run.toml")
        every, steps = config.run.eval_every, config.run.steps
        sizes = {"bf16": 400, "int8": 200}
        sent, lower = sizes.get(config.codec.codec, 20), 0.1 * (config.codec.codec == "bf16") + config.run.seed / 50
        lanes = config.lanes.count
        for lane, stage in itertools.product(range(lanes), range(config.pipeline.stages)):
            lateral = {f"lateral {stage}: lane 0-1": {"averaging": 70}} if lanes > 1 else {}
            records: list[dict[str, Any]] = [
                {
                    "event": "step",
                    "step": step,
                    "sent_bytes": {"boundary 0-1": {"activation": sent * (step + 1)}, **lateral},
                }
                for step in range(steps)
            ]
            records.append({"event": "end", "steps": steps})
            place = lane_path(out, lane, lanes)
            place.mkdir(exist_ok=True)
            (place / f"stage-{stage}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        done = [step for step in range(1, steps + 1) if (every and step % every == 0) or step == steps]
        summary = {
            "evaluations": [[step, 5 - step / steps - lower] for step in done],
            "tokens_per_step": lanes * config.tokens_per_step,
            "bytes_per_token": sent / config.tokens_per_step,
            **({"averaging": {"bytes_per_token": 2.5}} if lanes > 1 else {}),
            **({"context": {"bytes_per_token": 37.5}} if config.context.method else {}),
            "ratio": 400 / sent,
            "train_s": 1.5,
            "val_loss": 4 - lower,
        }
        (out / "summary.json").write_text(json.dumps(summary))
        return Ended(0)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    start_by(monkeypatch, made)
    monkeypatch.setattr(recipe_runs, "POLL_S", 0)
    return made


def runs_of(settings: dict[str, Any], out: Path, *seeds: int) -> list[RecipeRun]:
    recipes = [Recipe.parse("a=bf16"), Recipe.parse("b=int8 optim.clip=2")]
    return [RecipeRun.of(recipe, seed, settings, out) for recipe in recipes for seed in seeds]


def test_a_run_is_made_once(trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    ended: list[str] = []
    run_all(runs_of(tiny_settings, tmp_path, 1), 1, on_end=lambda run, *_: ended.append(run.title))
    assert trainer.started == ["a-seed1", "b-seed1"]
    assert ended == ["a, seed 1", "b, seed 1"]
    run_all(runs_of(tiny_settings, tmp_path, 1), 1)
    assert [run.ended()["train_s"] for run in runs_of(tiny_settings, tmp_path, 1)] == [1.5, 1.5]
    assert trainer.started == ["a-seed1", "b-seed1"]
    run_all(runs_of(tiny_settings, tmp_path, 1, 2), 2)  # one seed more
    assert trainer.started[2:] == ["a-seed2", "b-seed2"]


def test_what_was_changed_or_broken_off_is_made_again(
    trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    a, b = runs_of(tiny_settings, tmp_path, 1)
    run_all([a, b], 1)
    trainer.started.clear()
    (b.directory / "summary.json").unlink()  # interrupted
    run_all([a, b], 1)
    assert trainer.started == ["b-seed1"]
    (a.directory / "summary.json").write_text('{"evaluat')  # while it was written
    (b.directory / "stage-1.jsonl").unlink()
    trainer.started.clear()
    run_all([a, b], 1)
    assert trainer.started == ["a-seed1", "b-seed1"]
    trainer.started.clear()
    again = runs_of({**tiny_settings, "optim.clip": 0.25}, tmp_path, 1)
    run_all(again, 1)
    assert trainer.started == ["a-seed1"]  # b has a setting of its own, which is as it was
    (a.directory / "run.toml").write_text("[run]\nstepps = 3\n")  # of another version
    assert again[0].summary() is None


def test_a_run_that_fails_says_why_and_the_others_stay(
    trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer.fails = "b"
    with pytest.raises(LocalRunError, match="b, seed 1: no memory is left"):
        run_all(runs_of(tiny_settings, tmp_path, 1), 1)
    a, b = runs_of(tiny_settings, tmp_path, 1)
    assert run_all([b, a], 1, keep_going=True) == {b: "no memory is left"}
    trainer.fails = ""
    trainer.started.clear()
    assert run_all([a, b], 1) == {}
    assert trainer.started == ["b-seed1"]


def test_an_interruption_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    popen, started = subprocess.Popen, []

    def sleeper(_: list[str], **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], **how))
        return started[-1]

    def interrupt(standings: Any) -> None:
        assert [each.run.title for each in standings] == ["a, seed 1", "b, seed 1"]
        raise KeyboardInterrupt

    start_by(monkeypatch, sleeper)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs_of(tiny_settings, tmp_path, 1), 2, on_look=interrupt)
    assert [process.poll() for process in started] == [-15, -15]


@pytest.fixture
def as_by_default() -> Iterator[None]:
    """Signals as a terminal's command finds them, whatever whoever runs the tests ignores (nohup)."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    assert {number: signal.signal(number, handler) for number, handler in before.items()} == handlers


def deaf(monkeypatch: pytest.MonkeyPatch, told: signal.Signals) -> list[subprocess.Popen[bytes]]:
    """Runs that ignore SIGTERM; `told` comes between the start of each and the line that remembers it."""
    popen, started = subprocess.Popen, []
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"

    def start(_: list[str], **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-S", "-c", program], **{**how, "stdout": subprocess.PIPE}))
        assert started[-1].stdout.read(1)
        started[-1].stdout.close()
        os.kill(os.getpid(), told)
        return started[-1]

    start_by(monkeypatch, start)
    return started


@pytest.mark.usefixtures("as_by_default")
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_is_told_to_end_forgets_nobody_and_insists(
    told: signal.Signals, monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    started = deaf(monkeypatch, told)
    monkeypatch.setattr(recipe_runs, "STOP_GRACE_S", 0.3)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        run_all(runs_of(tiny_settings, tmp_path, 1), 2)
    assert str(interrupted.value) == ("" if told == signal.SIGINT else f"stopped by {told.name}")
    assert [process.returncode for process in started] == [-9]  # and the second was not begun


@pytest.mark.usefixtures("as_by_default")
def test_who_is_told_twice_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    started = deaf(monkeypatch, signal.SIGINT)
    monkeypatch.setattr(recipe_runs, "STOP_GRACE_S", 50.0)
    monkeypatch.setattr(recipe_runs.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run_all(runs_of(tiny_settings, tmp_path, 1), 2)
    assert [process.returncode for process in started] == [-9]


@pytest.mark.usefixtures("as_by_default", "trainer")
def test_a_signal_after_the_last_run_is_not_lost(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Or a sweep would go on with the next runs."""
    runs = runs_of(tiny_settings, tmp_path, 1)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
        run_all(runs, 2, on_end=lambda run, *_: os.kill(os.getpid(), signal.SIGTERM) if run is runs[-1] else None)
    assert all(run.summary() for run in runs)


# Who trains a run, and who writes the result


def test_a_run_is_trained_by_one_at_a_time(trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    runs = runs_of(tiny_settings, tmp_path, 1)
    lock = runs[1].directory / "run.lock"
    with claimed(lock), pytest.raises(LocalRunError) as refused:
        run_all(runs, 1, keep_going=True)
    assert str(refused.value) == (
        f"{runs[1].directory} is in use by process {os.getpid()}; choose another --out, or wait until that has ended"
    )
    assert (refused.value.exit_code, trainer.started) == (2, [])
    with claimed(lock):  # others in the same directory are nobody else's
        run_all(runs[:1], 1)
    run_all(runs, 1)
    assert trainer.started == ["a-seed1", "b-seed1"]
    with claimed(lock):  # there is nothing left to train
        run_all(runs, 1)


def test_what_another_has_just_trained_is_not_trained_again(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    """It ends, and lets go, between the look at a run and the lock."""
    take, runs = file_lock.take, runs_of(tiny_settings, tmp_path, 1)

    def take_late(path: Path) -> int | None:
        with monkeypatch.context() as other:
            other.setattr(file_lock, "take", take)
            run_all([run for run in runs if run.directory == path.parent], 1)
        return take(path)

    monkeypatch.setattr(file_lock, "take", take_late)
    run_all(runs, 1)
    assert trainer.started == ["a-seed1", "b-seed1"]


def test_a_run_is_locked_as_long_as_its_process_lives(
    monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    """Also where whoever started it is gone."""
    popen, started = subprocess.Popen, []

    def sleeper(_: list[str], **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], **how))
        return started[-1]

    def leave(_: Any) -> None:
        raise KeyboardInterrupt

    runs = runs_of(tiny_settings, tmp_path, 1)[:1]
    start_by(monkeypatch, sleeper)
    with monkeypatch.context() as lost:
        lost.setattr(recipe_runs, "_stop", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run_all(runs, 1, on_look=leave)
    with pytest.raises(LocalRunError, match="is in use by process"):
        run_all(runs, 1)
    started[0].kill()
    started[0].wait()
    os.close(file_lock.take(runs[0].directory / "run.lock") or -1)


def test_a_lock_that_nobody_can_take_is_refused(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    def without_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (run, _) = runs_of(tiny_settings, tmp_path, 1)
    (run.directory / "run.lock").mkdir(parents=True)
    with pytest.raises(LocalRunError, match=r"cannot open .*run.lock: Is a directory"):
        run_all([run], 1)
    monkeypatch.setattr(file_lock.fcntl, "flock", without_locks)
    (run.directory / "run.lock").rmdir()
    with pytest.raises(LocalRunError, match=r"cannot lock .*: No locks available; choose a directory on another disk"):
        run_all([run], 1)
    assert trainer.started == []


def test_the_second_comparison_in_one_place_is_refused_at_once(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from thinpipe.node.comparing import compare as comparing

    monkeypatch.setattr(comparing, "_planned", pytest.fail)  # it takes seconds
    with claimed(tmp_path / "compare.lock"):
        before = sorted(tmp_path.iterdir())
        result = CliRunner().invoke(app, ["compare", "--out", str(tmp_path), "--recipe", "another=int4"])
    assert result.exit_code == 2, result.output
    assert result.stderr == (
        f"thinpipe: error: {tmp_path} is in use by process {os.getpid()}; choose another --out, or wait until that has "
        "ended\n"
    )
    assert (trainer.started, sorted(tmp_path.iterdir())) == ([], before)


# The whole, and the page

ASKED = ("dense=bf16", "byte=int8", "thin=mapl:r=8 optim.muon_lr=0.01")
PACE = "tiny@2x10ms+20ms"


def comparison(settings: dict[str, Any], seeds: int = 2, target: float | None = None) -> Comparison:
    return Comparison(
        recipes=tuple(map(Recipe.parse, ASKED)),
        seeds=range(1, 1 + seeds),
        settings={**settings, "run.steps": 16, "pipeline.stages": 2},
        links=("10mbit,25ms", "none"),
        pace=PACE,
        schedule="1f1b",
        target=target,
    )


def test_losses_bytes_and_times_are_joined(trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    found = compare(comparison(tiny_settings), tmp_path, jobs=2, quiet=True)
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    dense, byte, thin = found["recipes"]
    assert len(trainer.started) == 6
    assert [point["step"] for point in dense["curve"]] == [2, 4, 6, 8, 10, 12, 14, 16]  # every eighth
    assert dense["curve"][-1]["bytes"] == 2 * 400 * 16  # two stages
    assert found["target_loss"] == pytest.approx(5 - 1 - 0.03)  # of the worst, the mean of its seeds
    assert found["target_from"] == "the last one of byte, the worst recipe, so all reach it"
    assert (byte["steps_to_target"], dense["steps_to_target"]) == (16, pytest.approx(14.4))
    assert thin["over_first_percent"] == pytest.approx(100 * (3.97 / 3.87 - 1), abs=0.01)
    assert thin["over_first_interval"] == pytest.approx(0.0848, abs=1e-3)  # of 2.577 and 2.591
    for recipe in (dense, byte, thin):
        for link in recipe["links"].values():
            assert link["time_to_target_s"] == pytest.approx(recipe["steps_to_target"] * link["step_s"])
    assert dense["links"]["10mbit,25ms"]["step_s"] > 2 * thin["links"]["10mbit,25ms"]["step_s"]
    assert dense["links"]["none"]["step_s"] == pytest.approx(64 * 0.03, rel=0.1)  # compute alone
    assert (found["pace"]["width"], dense["width"]) == (256, 64)
    compare(comparison(tiny_settings), tmp_path, jobs=2, quiet=True)
    assert len(trainer.started) == 6


@pytest.mark.usefixtures("trainer")
def test_seconds_a_step_are_what_plan_says(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    found = compare(comparison(tiny_settings, seeds=1), tmp_path, jobs=2, quiet=True)
    options = ["--emulate", PACE, "--codec", "mapl:r=8", "--link", "10mbit,25ms", "--schedule", "1f1b"]
    planned = json.loads(CliRunner().invoke(app, ["plan", "--json", *options]).stdout)
    there = found["recipes"][2]["links"]["10mbit,25ms"]
    assert {name: planned[name] for name in there if name in planned} == {
        name: value for name, value in there.items() if name != "time_to_target_s"
    }


LANES = "lanes.count=2 lanes.average=outer:every=2 pipeline.batch_size=4 pipeline.microbatches=2"


def test_lanes_are_a_row_with_their_averaging(trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Half of a step's tokens in each lane, here and on the stated machine, and the round beside."""
    asked = comparison(tiny_settings, seeds=1)
    asked = replace(asked, recipes=(Recipe.parse("one=mapl:r=8"), Recipe.parse(f"two=mapl:r=8 {LANES}")))
    found = compare(asked, tmp_path, jobs=2, quiet=True)
    assert trainer.started == ["one-seed1", "two-seed1"]
    one, two = found["recipes"]
    assert (one["lanes"], one["averaging_bytes_per_token"]) == (1, None)
    assert (two["lanes"], two["averaging_bytes_per_token"]) == (2, 2.5)
    assert found["tokens_per_step"] == 8 * 32
    assert two["curve"][-1]["tokens"] == one["curve"][-1]["tokens"]
    assert two["curve"][-1]["bytes"] == 2 * one["curve"][-1]["bytes"]  # of two lanes; no averaging
    machine = ["--emulate", PACE, "--codec", "mapl:r=8", "--link", "10mbit,25ms", "--schedule", "1f1b"]
    machine += ["--batch-size", "128", "--microbatches", "32", "--lanes", "2", "--average", "outer:every=2"]
    planned = json.loads(CliRunner().invoke(app, ["plan", "--json", *machine]).stdout)["lanes"]
    there = two["links"]["10mbit,25ms"]
    assert there["step_s"] == planned["step_s"]
    assert there["bottleneck"] == f"averaging of stage {planned['bottleneck']}"
    assert two["links"]["none"]["step_s"] < 0.6 * one["links"]["none"]["step_s"]
    assert any(line.startswith("two has 2 lanes: 2 times the machines") for line in compare_lines(found))
    with (tmp_path / "shown").open("w") as file:
        console = Console(width=100, record=True, file=file)
        console.print(compare_table(found))
        assert re.search(r"one .*x +- .*\n.* two .*x +2\.5 ", console.export_text())
    assert "averaging, bytes/token" in (tmp_path / "compare.html").read_text()
    assert Page((tmp_path / "compare.html").read_text()).open == []
    compare(asked, tmp_path, jobs=2, quiet=True)
    assert len(trainer.started) == 2  # lanes are found again
    (tmp_path / "two-seed1" / "lane-1" / "stage-1.jsonl").unlink()
    compare(asked, tmp_path, jobs=2, quiet=True)
    assert trainer.started[2:] == ["two-seed1"]


@pytest.mark.usefixtures("trainer")
def test_chunks_are_a_row_with_their_keys_and_values(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Half of each sequence in each lane, there too, and what waits in every layer is part of a step's seconds."""
    chunks, method = "lanes.count=2 lanes.average=gradients context.method=", "full:format=int8"
    asked = comparison(tiny_settings, seeds=1)
    asked = replace(asked, recipes=(Recipe.parse("one=mapl:r=8"), Recipe.parse(f"two=mapl:r=8 {chunks}{method}")))
    found = compare(asked, tmp_path, jobs=2, quiet=True)
    two = found["recipes"][1]
    assert (two["chunks"], two["averaging_bytes_per_token"], two["context_bytes_per_token"]) == (2, 2.5, 37.5)
    machine = ["--emulate", PACE, "--codec", "mapl:r=8", "--link", "10mbit,25ms", "--schedule", "1f1b"]
    machine += ["--chunks", "2", "--context", method]
    planned = json.loads(CliRunner().invoke(app, ["plan", "--json", *machine]).stdout)
    there = two["links"]["10mbit,25ms"]
    assert there["step_s"] == planned["lanes"]["step_s"]
    assert there["bottleneck"] == planned["chunks"]["bounded_by"]
    assert any(line.startswith("two has 2 chunks of each sequence: 2 times") for line in compare_lines(found))
    assert "keys, values, bytes/token" in (tmp_path / "compare.html").read_text()
    with (tmp_path / "shown").open("w") as file:
        console = Console(width=120, record=True, file=file)
        console.print(compare_table(found))
        assert re.search(r"one .*x +- +- .*\n.* two .*x +2\.5 +37\.5 ", console.export_text())


@pytest.mark.usefixtures("trainer")
def test_a_loss_that_is_not_reached_is_said(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    found = compare(comparison(tiny_settings, seeds=1, target=3.9), tmp_path, jobs=2, quiet=True)
    console = Console(width=100, record=True, file=(tmp_path / "shown").open("w"))
    console.print(compare_table(found))
    console.file.close()
    shown = console.export_text()
    assert re.search(r"dense .* [0-9.]+ min +[0-9.]+ s", shown), shown
    assert re.search(r"byte .* not reached +not reached", shown), shown
    assert found["recipes"][1]["links"]["none"]["time_to_target_s"] is None
    said = "\n".join(compare_lines(found))
    assert "steps to a held-out loss of 3.9000 (--target)" in said
    assert "width 256, 262,144 tokens a step, schedule 1f1b" in said
    assert "one seed has no interval" in said
    assert "not reached" in (tmp_path / "compare.html").read_text()


def test_the_bar_leaves_room_for_itself(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as file:
        console = Console(width=100, file=file, force_terminal=True)
        with CompareDisplay(console, steps=90, runs=9) as display:
            display.update([(f"recipe{index}, seed 1", index, 5.0) for index in range(9)])
            display.ended("recipe0, seed 1", 10, "1.02 min")
    shown = (tmp_path / "shown").read_text()
    assert "36/90" in shown
    assert "recipe0, seed 1: loss 5.000; and 8 more" in shown
    assert "run 1 of 9: recipe0, seed 1: 1.02 min" in shown


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.5, "0.50 s"), (59.94, "59.9 s"), (60, "1.00 min"), (5400, "1.50 h"), (9e6, "104 d"), (None, "not reached")],
)
def test_times_have_three_digits(seconds: float | None, expected: str) -> None:
    assert duration(seconds) == expected


class Page(HTMLParser):
    """Elements that are opened and not closed, all attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.usefixtures("trainer")
def test_the_page_has_everything_and_needs_nothing(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    found = compare(comparison(tiny_settings), tmp_path, jobs=2, quiet=True)
    found["recipes"][0]["own_settings"] = ["data.source=<b>&amp;$x$"]
    found["recipes"][0]["name"] = "de$n<se$"
    text = compare_page(found)
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image", "b"}
    assert not re.search(r"https?:|//|@import|url\((?!#)", text)
    ids = {value for name, value in page.attributes if name == "id"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name.endswith("href"):
            assert value[1:] in ids
    assert set(re.findall(r"url\(#(\w+)\)", text)) <= ids
    shown = " ".join(page.texts)
    assert text.count("<svg") == 5  # bytes a token; tokens, bytes, and each link
    assert text.count("<details>") == 6
    for word in ("de$n<se$", "<b>&amp;$x$", "10mbit,25ms", "none", "simulated", "mapl:r=8", "optim.muon_lr = 0.01"):
        assert word in shown, word
    for run in ("dense-seed1", "thin-seed2"):
        assert run in shown
    assert "#010203" not in text  # it is the text's colour


@pytest.mark.usefixtures("trainer")
def test_a_page_of_runs_that_diverged_is_drawn(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    asked = comparison(tiny_settings, seeds=1)
    compare(asked, tmp_path, jobs=2, quiet=True)
    for name in ("dense", "byte", "thin"):
        path = tmp_path / f"{name}-seed1" / "summary.json"
        summary = json.loads(path.read_text())
        summary["evaluations"] = [[step, math.nan] for step, _ in summary["evaluations"]]
        path.write_text(json.dumps(summary))
        found = compare(asked, tmp_path, jobs=2, quiet=True)
        json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    assert found["target_loss"] is None
    assert "held-out loss none after 16 steps" in (tmp_path / "compare.html").read_text()
    assert any("no recipe ended with a finite loss" in line for line in compare_lines(found))


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", ["dense", "thin"])
def test_a_recipe_that_fails_is_shown_beside_the_others(
    name: str, seeds: int, trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer.fails = f"{name}-seed1"
    found = compare(comparison(tiny_settings, seeds=seeds), tmp_path, jobs=2, quiet=True)
    json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    (row,) = (recipe for recipe in found["recipes"] if recipe["name"] == name)
    assert (row["loss"], row["steps_to_target"], row["curve"]) == (None, None, [])
    assert [run["failed"] for run in row["runs"]] == ["no memory is left", None][:seeds]
    assert (row["bytes_per_token"] is None) == (seeds == 1)
    assert found["target_from"] == "the last one of byte, the worst recipe"
    assert any(f"{name}, seed 1, failed" in line for line in compare_lines(found))
    text = (tmp_path / "compare.html").read_text()
    assert "failed: no memory is left" in text
    assert Page(text).open == []


# What is refused

REFUSED: list[tuple[list[str], str]] = [
    (["--recipe", "a=bf16", "--recipe", "a=int8"], "two recipes are called 'a'; their runs would share a directory"),
    (["--recipe", "a=int9"], "recipe 'a': unknown codec 'int9'; the nearest known one is 'int8'"),
    (["--recipe", "bf16"], "a recipe is NAME=CODEC"),
    (["--recipe", "a=mapl:r=999"], "recipe 'a': .*r=999 is above the model's width 256"),
    (["--recipe", "a=bf16", "--recipe", "b=bf16 pipeline.batch_size=32"], "recipe 'b' has 4096 tokens a step"),
    (["--recipe", "a=bf16", "--recipe", "b=bf16 data.heldout_sequences=9"], "recipe 'b' has data of its own"),
    (
        ["--recipe", "a=bf16", "--recipe", "b=bf16 lanes.count=2"],
        r"recipe 'b' has 4096 tokens a step, the first one 2048: .*; they are those of all lanes, so give",
    ),
    (["--set", "lanes.count=2", "--set", "lanes.average=gossip"], r"recipe 'bf16': lanes\.average: unknown averaging"),
    (["--set", "lanes.count=3"], r"recipe 'bf16': 3 lanes do not divide the 256 of pipeline\.batch_size that a step"),
    (
        ["--set", "lanes.count=2", "--set", "lanes.average=outer:every=90000,fragments=90000"],
        r"recipe 'bf16': lanes\.average: fragments=90000 are more than the",
    ),
    (["--recipe", "a=bf16 run.seed=4"], "run.seed differs from run to run here; say --first-seed"),
    (["--link", "80mbps"], "unknown unit 'mbps'"),
    (["--pace", "150m@4"], "an emulated machine is PRESET@STAGES"),
    (["--pace", "tiny@64x1tflops"], "64 stages, but the model has 4 layers"),
    (["--schedule", "2f2b"], "unknown schedule '2f2b'"),
    (["--seeds", "0"], "--seeds"),
    (["--jobs", "0"], "--jobs"),
    (["--target", "nan"], "--target: a held-out loss is a number above 0, got nan"),
    (["--steps", "0"], "run.steps"),
    (["--set", "pipeline.stages=1"], "pipeline.stages = 1 has no boundary"),
    (["--set", "optim.moun_lr=1"], "unknown setting 'optim.moun_lr'"),
    (["--set", "pipeline.stages=9"], "9 stages, but the model has 4 layers"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    arguments: list[str], expected: str, trainer: Trainer, tmp_path: Path
) -> None:
    out = tmp_path / "compare"
    result = CliRunner().invoke(app, ["compare", "--out", str(out), *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert re.search(expected, line), line
    assert not out.exists()
    assert trainer.started == []


def test_a_place_where_nothing_can_be_written_is_refused(
    trainer: Trainer, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalRunError, match=r"cannot write in .*; choose another --out"):
        compare(comparison(tiny_settings), tmp_path / "file", jobs=1, quiet=True)
    assert trainer.started == []


@pytest.mark.slow
def test_two_codecs_are_really_trained(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny_settings, "pipeline.stages": 2, "model.layers": 2}
    for name in ("codec.codec", "optim.muon_lr", "optim.adamw_lr", "run.steps"):
        del settings[name]
    arguments = ["--steps", "6", "--recipe", "dense=bf16", "--recipe", "thin=mapl:r=8", "--link", "1mbit,5ms"]
    hot = ["--recipe", "hot=bf16 optim.muon_lr=1e30 optim.adamw_lr=1e30"]
    arguments += ["--recipe", f"two=mapl:r=8 {LANES}", "--pace", PACE, "--schedule", "1f1b", "--out", str(tmp_path)]
    arguments += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    first = CliRunner().invoke(app, ["compare", *arguments])
    assert first.exit_code == 0, first.output
    assert first.stdout.rstrip().splitlines()[-1] == f"open {tmp_path / 'compare.html'}"
    assert "run 3 of 3: " in first.stdout
    again = CliRunner().invoke(app, ["compare", "--json", *arguments, *hot])
    found = json.loads(again.stdout)
    assert (again.exit_code, again.stderr.count("trained before")) == (1, 3)
    dense, thin, two, diverged = found["recipes"]
    assert "lower the learning rate or clip" in diverged["runs"][0]["failed"]
    assert [point["step"] for point in dense["curve"]] == [1, 2, 3, 4, 5, 6]
    assert dense["loss"] < dense["curve"][0]["loss"]
    assert dense["bytes_per_token"] == pytest.approx(dense["curve"][-1]["bytes"] / dense["curve"][-1]["tokens"])
    assert thin["bytes_per_token"] < 0.3 * dense["bytes_per_token"]
    assert two["curve"][-1]["tokens"] == thin["curve"][-1]["tokens"]
    assert two["averaging_bytes_per_token"] > 10
    assert two["loss"] < two["curve"][0]["loss"]
