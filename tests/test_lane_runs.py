"""A run of several lanes from `thinpipe up` to what is made of it: its directory, summary, checkpoints, export,
evaluation, a new run; and what takes one lane only says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.export.heldout_loss import recorded_loss
from thinpipe.node.resuming import check_checkpoints, interrupted
from thinpipe.node.run_directory import LocalRunError, check_no_checkpoints, clear
from thinpipe.node.run_lanes import all_lanes
from thinpipe.node.run_length import steps_done
from thinpipe.sim.reports.summary import read_records
from typer.testing import CliRunner

from .conftest import TinyConfig
from .manifests import as_format_1
from .trained_run import train

STAGES, STEPS = 2, 4
LANES = {"lanes.count": 2, "lanes.average": "outer:every=2"}


@pytest.fixture(scope="module")
def trained(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two lanes, with checkpoints after the last step."""
    out = tmp_path_factory.mktemp("lanes") / "run"
    train(tiny({"pipeline.stages": STAGES, "run.steps": STEPS, "codec.codec": "mapl:r=8,context=0", **LANES}), out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def done(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path, code: int = 2) -> str:
    """The line on stderr."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("thinpipe: error: ")


# -- thinpipe up ------------------------------------------------------------------------------------------------------


def test_lanes_in_one_process_from_the_command_line(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": STAGES, "run.steps": STEPS})))
    out = tmp_path / "out"
    up = ["up", "--config", tmp_path / "run.toml", "--one-process", "--out", out]
    found = json.loads(done(*up, "--lanes", "2", "--average", "outer:every=2", "--json"))
    assert found == json.loads((out / "summary.json").read_text())
    lanes = [path.name for path in sorted(out.iterdir()) if path.is_dir()]
    assert lanes == ["lane-0", "lane-1"]
    assert sorted(path.name for path in (out / "lane-1").iterdir()) == ["checkpoints", "stage-0.jsonl", "stage-1.jsonl"]
    assert {"run.toml", "summary.json", "corpus.json", "run.lock"} <= {path.name for path in out.iterdir()}
    assert load_config(out / "run.toml").lanes.count == 2
    config = load_config(out / "run.toml")
    assert found["tokens"] == 2 * STEPS * config.tokens_per_step
    assert found["averaging"]["rounds"] == 2
    assert found["averaging"]["bytes"] == found["bytes"]["averaging"] > 0
    assert found["averaging"]["disagreements"] == []
    for lane in range(2):
        records = read_records(out / f"lane-{lane}" / "stage-1.jsonl")
        assert [record["number"] for record in records if record["event"] == "round"] == [0, 1]
        names = [record["sent_bytes"].keys() for record in records if record["event"] == "step"]
        assert {"boundary 0-1", "lateral 1: lane 0-1"} == set(names[-1])
    told = done("summary", out)
    assert "averaging between lanes" in told
    assert json.loads(done("summary", out, "--json"))["lanes"] == found["lanes"]
    assert "2 lanes  loss" in done("top", out, "--once")

    plain = json.loads(done(*up, "--overwrite", "--json"))  # a run of one lane in its place
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoints"]
    assert "lanes" not in plain
    assert "averaging" not in plain["bytes"]


def test_each_lane_serves_its_figures_at_its_own_port(tiny: TinyConfig) -> None:
    from thinpipe.sim.reports.metrics_address import MetricsAddress

    del tiny
    first = MetricsAddress.parse("9100")
    assert [first.of_node(stage, lane, 3).port for lane in range(2) for stage in range(3)] == list(range(9100, 9106))


# -- what is made of a run --------------------------------------------------------------------------------------------


def evaluated(*arguments: str | Path) -> float:
    return json.loads(done("eval", *arguments, "--json"))["text"][0]["loss"]


def test_a_lane_is_evaluated_in_the_bits_that_it_wrote_down(trained: Path) -> None:
    own = [recorded_loss(load_config(trained / "run.toml"), trained, lane, STEPS) for lane in range(2)]
    assert own[0] != own[1]  # codebooks and rounding are each lane's own
    assert [evaluated(trained, "--lane", str(lane)) for lane in range(2)] == own
    assert evaluated(trained) == own[0]
    assert evaluated(trained / "lane-1") == own[1]


def test_without_a_word_it_is_the_first_whole_lane(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "lane-0" / "checkpoints" / "stage-1")
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "export"), "--json"])
    assert result.exit_code == 0, result.output
    assert f"lane 1 of 2 is taken; {run}/lane-N names another" in result.stderr
    written = json.loads(result.stdout)
    assert written["lane"] == 1
    assert written["held_out"]["loss_recorded"] == recorded_loss(load_config(run / "run.toml"), run, 1, STEPS)
    assert f"{run}, lane 1, after step {STEPS} on the held-out part" in " ".join(done("eval", run).split())
    assert "stage 1 has no checkpoint" in refused("export", run, "--lane", "0", "--out", tmp_path / "other")


def test_a_lane_writes_text(trained: Path) -> None:
    assert done("generate", trained, "def ", "--lane", "1", "--max-tokens", "3", "--temperature", "0").startswith(
        "def "
    )


def test_checkpoints_are_listed_by_lane(run: Path) -> None:
    told = done("checkpoint", "ls", run)
    assert "checkpoints of lane 0" in told
    assert "checkpoints of lane 1" in told
    found = json.loads(done("checkpoint", "ls", run, "--json"))
    assert [lane["lane"] for lane in found["lanes"]] == [0, 1]
    assert all(row["resumable"] for lane in found["lanes"] for row in lane["checkpoints"])
    assert "lane 0" not in done("checkpoint", "ls", run, "--lane", "1").partition("the run")[0]
    done("checkpoint", "verify", run)
    (path,) = (run / "lane-1" / "checkpoints" / "stage-0").glob("step-*/state.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(run)])
    assert (result.exit_code, str(run / "lane-1") in result.stderr) == (1, True)
    done("checkpoint", "verify", run, "--lane", "0")


@pytest.mark.parametrize("lane", ["", "lane-1"])
def test_a_new_run_begins_with_a_lane(trained: Path, tmp_path: Path, lane: str) -> None:
    out = tmp_path / "new"
    done("up", "--from", trained / lane, "--one-process", "--lanes", "1", "--steps", "1", "--out", out)
    config = load_config(out / "run.toml")
    assert config.run.origin == f"{trained / (lane or 'lane-0')} after {STEPS} steps"
    assert config.lanes.count == 1


def test_a_lane_is_no_place_for_a_run_from_it(trained: Path) -> None:
    assert "the new run would replace it" in refused("up", "--from", trained / "lane-1", "--out", trained)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_is_gone_on_with_when_all_lanes_can(run: Path) -> None:
    config = load_config(run / "run.toml")
    assert steps_done(config, run) == STEPS
    check_checkpoints(config, run)
    assert f"--resume {run} goes on after step {STEPS}" in interrupted("Ctrl-C", config, run, begun=True)
    manifests = list((run / "lane-1" / "checkpoints").rglob("manifest.json"))
    for each in manifests:
        as_format_1(each)
    with pytest.raises(LocalRunError, match=r"lane-1/.* is of format 1, and this version reads format 2 only: another"):
        check_checkpoints(config, run)
    shutil.rmtree(run / "lane-1" / "checkpoints")
    with pytest.raises(LocalRunError, match=r"lane-1/checkpoints has no checkpoint that all stages have"):
        check_checkpoints(config, run)


def test_another_number_of_lanes_is_another_run(run: Path) -> None:
    assert "lanes.count is 3 here and 2 there" in refused("up", "--resume", run, "--lanes", "3")


def test_a_directory_for_checkpoints_elsewhere_is_not_shared_by_lanes(trained: Path, tmp_path: Path) -> None:
    config = load_config(trained / "run.toml")
    checkpoint = config.checkpoint.model_copy(update={"directory": tmp_path / "disk"})
    elsewhere = config.model_copy(update={"checkpoint": checkpoint})
    paths = [own.checkpoint.path(place) for own, place in all_lanes(elsewhere, trained)]
    assert paths == [tmp_path / "disk" / "lane-0", tmp_path / "disk" / "lane-1"]
    shutil.copytree(trained / "lane-1" / "checkpoints", paths[1])
    with pytest.raises(LocalRunError, match=r"disk/lane-1 holds another run's checkpoints"):
        check_no_checkpoints(elsewhere, tmp_path / "new")


def test_what_a_run_leaves_is_removed_and_nothing_else(run: Path) -> None:
    (run / "lane-1" / "mine.txt").write_text("precious")
    clear(run)
    assert [path.relative_to(run).as_posix() for path in sorted(run.rglob("*"))] == ["lane-1", "lane-1/mine.txt"]


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[list[str], str]] = [
    (["export", "{run}", "--lane", "2", "--out", "{new}"], "--lane 2: the run has 2 lanes, so 0 to 1"),
    (["eval", "{run}", "--lane", "2"], "--lane 2: the run has 2 lanes"),
    (["generate", "{run}", "x", "--lane", "2"], "--lane 2: the run has 2 lanes"),
    (["checkpoint", "ls", "{run}", "--lane", "2"], "--lane 2: the run has 2 lanes"),
    (["eval", "{run}/lane-1", "--lane", "0"], "--lane 0, but {run}/lane-1 is lane 1; omit one of the two"),
    (["summary", "{run}/lane-1"], "that is one lane of the run in {run}; give that"),
    (["up", "--resume", "{run}/lane-1"], "that is one lane of the run in {run}; give that"),
    (
        ["checkpoint", "convert", "{run}", "--stages", "1", "--out", "{new}"],
        "checkpoint convert takes runs of one lane, and this one has 2; a new run takes its weights to other stages, "
        "with fresh moments: thinpipe up --from {run} --lanes 2 --stages 1 --out {new}",
    ),
    (["chaos", "--kinds", "join", "--out", "{new}"], "--kinds: join needs at least 2 lanes; say --lanes 2, or omit it"),
    (
        ["chaos", "--lanes", "2", "--stages", "1", "--kinds", "kill,cut", "--out", "{new}"],
        "--kinds: cut needs at least 2 stages; say --stages 2, or omit it",
    ),
    (["chaos", "--stages", "1", "--out", "{new}"], "chaos needs at least 2 stages, because neighbours notice a fault"),
    (
        ["chaos", "--lanes", "2", "--schedule", "zb:rtt_ratio=auto", "--out", "{new}"],
        "--schedule with rtt_ratio=auto finds its depth in a first run",
    ),
    (["chaos", "--lanes", "2", "--kinds", "flood", "--out", "{new}"], "--kinds: no fault is called 'flood'"),
]


def test_lanes_go_to_other_stages_as_a_new_run(trained: Path, tmp_path: Path) -> None:
    """As the refusal of `checkpoint convert` says."""
    new = tmp_path / "new"
    options = ["--from", str(trained), "--lanes", "2", "--stages", "1", "--out", str(new)]
    done = CliRunner().invoke(app, ["up", "--one-process", "--steps", "1", *options])
    assert done.exit_code == 0, done.output
    config = load_config(new / "run.toml")
    assert (config.lanes.count, config.pipeline.stages) == (2, 1)


@pytest.mark.parametrize(("arguments", "expected"), REFUSALS, ids=lambda value: value[0] if value else "")
def test_what_cannot_be_done_with_lanes_is_said(
    arguments: list[str], expected: str, trained: Path, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"run": trained, "new": tmp_path / "new"}
    assert expected.format(**where) in refused(*(each.format(**where) for each in arguments))
    assert not (tmp_path / "new").exists()
