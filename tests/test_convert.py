"""The same run at another cut: what moves with its layers, what stays at its boundary, and what is said of the rest."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.cli import app
from thinpipe.node.checkpoints.assemble import assemble
from thinpipe.node.checkpoints.kept_boundaries import kept_boundaries
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.model.stage_cut import layer_ranges
from thinpipe.node.stage import Stage
from typer.testing import CliRunner

from .cluster import Ended, run_cluster
from .conftest import TinyConfig
from .faults import Frame, Kill
from .faults_reference import MAPL
from .in_memory import run_reference

STEPS, DONE, LAYERS = 7, 4, 4
SMALL: dict[str, Any] = {
    "run.steps": STEPS,
    "run.eval_every": 4,
    "model.width": 32,
    "model.layers": LAYERS,
    "data.sequence_length": 16,
    "data.heldout_sequences": 4,
    "pipeline.batch_size": 4,
    "pipeline.microbatches": 2,
    "pipeline.stages": 2,
    "pipeline.cut": "2,2",
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
    "optim.warmup_steps": 2,
}
EXACT = {"codec.codec": "fp32", "optim.clip": 0.0}
CODECS: dict[str, dict[str, Any]] = {
    "mapl, every 3": {**MAPL, "codec.codec": "mapl:r=8,anchors=full,every=3,context=2,ce=4,ch=8"},
    "resbm": {"codec.codec": "resbm:b=8", "codec.backward": "int4:feedback=true"},
    "mapl, factorized": {**MAPL, "codec.codec": "mapl:r=8,anchors=factorized,pairs=16,every=2,table=1"},
    "ssn": {"codec.codec": "ssn:k=8"},
    "late gradients": {"codec.codec": "mapl:r=8,anchors=full,every=3", "pipeline.delay": 1},
}


def ended_run(config: RunConfig, run: Path) -> Ended:
    """A run of it to its end, in `run`, of which only what it had after DONE steps is left."""
    ended = run_cluster(config, run, [], hurry=True)
    (run / "run.toml").write_text(dump_config(config))
    for later in range(DONE + 1, STEPS + 1):
        for checkpoint in run.glob(f"checkpoints/**/step-{later:08d}"):
            shutil.rmtree(checkpoint)
    return ended


@pytest.fixture(scope="module")
def exact(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    run = tmp_path_factory.mktemp("exact")
    return run, ended_run(tiny(SMALL | EXACT), run)


@pytest.fixture(scope="module", params=CODECS)
def learned(
    request: pytest.FixtureRequest, tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ended]:
    run = tmp_path_factory.mktemp("learned")
    return run, ended_run(tiny(SMALL | CODECS[request.param]), run)


def converted(run: Path, out: Path, *options: str) -> str:
    """What is said."""
    done = CliRunner().invoke(app, ["checkpoint", "convert", str(run), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def go_on(run: Path, *faults: Any) -> Ended:
    return run_cluster(load_config(run / "run.toml"), run, list(faults), resume=True)


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept(old: list[int], new: list[int]) -> Any:
    return kept_boundaries(layer_ranges(old), layer_ranges(new))


@pytest.mark.parametrize(
    ("old", "new", "boundaries", "tokens", "mixed", "closed"),
    [
        ([2, 2], [1, 1, 2], [None, 0], [None, 0, 1], [], []),
        ([1, 1, 2], [2, 2], [1], [1, 2], [], [(0, 1)]),
        ([1, 1, 1, 1], [1, 2, 1], [0, 2], [0, 2, 3], [0], [(1, 2)]),
        ([2, 2], [4], [], [None], [], [(0, 2)]),
        ([4], [2, 2], [None], [None, None], [], []),
        ([0, 3, 1], [1, 2, 1], [None, 1], [None, 1, 2], [], [(0, 0)]),
        ([0, 4, 0], [0, 2, 2, 0], [0, None, 1], [0, 1, 1, 2], [], []),
    ],
)
def test_boundaries_are_where_they_are_in_the_model(
    old: list[int],
    new: list[int],
    boundaries: list[int | None],
    tokens: list[int | None],
    mixed: list[int],
    closed: list[tuple[int, int]],
) -> None:
    found = kept(old, new)
    assert (found.boundaries, found.tokens, found.mixed, found.closed) == (boundaries, tokens, mixed, closed)
    assert len(found.lines()) == len(new) - 1 + len(closed)


def test_what_becomes_of_each_boundary_is_said() -> None:
    assert kept([1, 1, 1, 1], [1, 2, 1]).lines() == [
        "boundary 0, after 1 layer: goes on as boundary 0 was, but stage 1 knows tokens as its lower boundary needs "
        "it: the loss rises at first",
        "boundary 1, after 3 layers: goes on as boundary 2 was",
        "boundary 1 of before, after 2 layers: is closed, what its codec learned is dropped",
    ]
    assert kept([2, 2], [3, 1]).lines()[0] == "boundary 0, after 3 layers: is new, its codec begins untrained"


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        ["--stages", "3"],
        ["--stages", "1", "--cut", "4"],
        ["--cut", "0,4,0"],
        ["--set", "pipeline.cut=[0,4,0]", "--set", "pipeline.schedule=1f1b:rtt_ratio=2"],
    ],
    ids=str,
)
def test_without_rounding_the_next_losses_are_those_of_the_run(
    cut: list[str], exact: tuple[Path, Ended], tmp_path: Path
) -> None:
    """Bit for bit, and the weights at the end: no tensor is summed in another order because of where a stage ends."""
    run, unconverted = exact
    said = converted(run, tmp_path / "other", *cut)
    assert f"after {DONE} steps: {tmp_path / 'other'}; go on: thinpipe up --resume" in " ".join(said.split())
    assert "boundary" not in said  # nothing is learned there
    assert "clipped" not in said
    ended = go_on(tmp_path / "other")
    assert ended.losses == [unconverted.losses[0][DONE:]] * len(ended.losses)
    assert set(ended.val_losses) == set(unconverted.val_losses)
    assert ended.rollbacks[-1]["completed"] == DONE
    found = assemble(tmp_path / "other")
    weights = run_reference(load_config(run / "run.toml"), tmp_path / "reference").weights
    assert found.completed == STEPS
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.weights.items())


@pytest.mark.parametrize("predict", ["none", "orthogonal"])
def test_both_versions_of_the_weights_go_with_their_layers(predict: str, tiny: TinyConfig, tmp_path: Path) -> None:
    late = {"pipeline.delay": 1, "pipeline.predict": predict}
    unconverted = ended_run(tiny(SMALL | EXACT | late), tmp_path / "run")
    converted(tmp_path / "run", tmp_path / "other", "--stages", "3")
    ended = go_on(tmp_path / "other")
    assert ended.losses == [unconverted.losses[0][DONE:]] * 3
    assert set(ended.val_losses) == set(unconverted.val_losses)


def test_clipped_by_one_norm_the_next_losses_are_those_of_the_run(tiny: TinyConfig, tmp_path: Path) -> None:
    """The norm of all stages does not ask where they end, so there is nothing to warn of."""
    clip = {"codec.codec": "fp32", "optim.clip": 0.1, "optim.clip_norm": "global"}
    unconverted = ended_run(tiny(SMALL | clip), tmp_path / "run")
    assert "gradients are clipped" not in converted(tmp_path / "run", tmp_path / "other", "--stages", "3")
    ended = go_on(tmp_path / "other")
    assert ended.losses == [unconverted.losses[0][DONE:]] * 3
    assert set(ended.val_losses) == set(unconverted.val_losses)


@pytest.mark.pairwise(2)
def test_there_and_back_again_is_the_run_itself(learned: tuple[Path, Ended], tmp_path: Path) -> None:
    """All that a boundary has stays with it, to the bit: momentum, tables, their versions, error feedback."""
    run, unconverted = learned
    said = converted(run, tmp_path / "other", "--cut", "1,1,2")
    assert "gradients are clipped by stage (optim.clip = 1)" in said
    if "ssn" not in load_config(run / "run.toml").codec.codec:
        assert "boundary 0, after 1 layer: is new, its codec begins untrained" in said
        assert "boundary 1, after 2 layers: goes on as boundary 0 was" in said
    converted(tmp_path / "other", tmp_path / "back", "--stages", "2", "--cut", "2,2")
    before, after = (assemble(each) for each in (run, tmp_path / "back"))
    assert after.completed == DONE
    for one, other in zip(before.snapshots, after.snapshots, strict=True):
        assert one.dictionaries == other.dictionaries
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    ended = go_on(tmp_path / "back")
    assert ended.losses == [losses[DONE:] for losses in unconverted.losses]
    assert ended.state_sha256 == unconverted.state_sha256


def test_what_was_converted_can_be_written_again_before_a_step(learned: tuple[Path, Ended], tmp_path: Path) -> None:
    """As a run does that is ended before its first step, or has none left."""
    run, _ = learned
    converted(run, tmp_path / "other", "--cut", "1,1,2")
    found = assemble(tmp_path / "other")
    for index, snapshot in enumerate(found.snapshots):
        stage = Stage(found.config, found.architecture, index)
        stage.restore(snapshot)
        again = stage.snapshot()
        assert again.dictionaries == snapshot.dictionaries
        assert again.tensors.keys() == snapshot.tensors.keys()
        assert all(torch.equal(tensor, snapshot.tensors[name]) for name, tensor in again.tensors.items())


def test_what_was_converted_can_be_evaluated_before_a_step(learned: tuple[Path, Ended], tmp_path: Path) -> None:
    """Without rounding: codebooks of the new boundary do not exist yet."""
    run, _ = learned
    converted(run, tmp_path / "other", "--cut", "1,1,2")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "other"), "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["boundaries"]: row["loss"] for row in json.loads(done.stdout)["text"]}
    assert 5.0 < rows["without rounding"] < 8.0
    learns = "mapl" in load_config(run / "run.toml").codec.codec
    assert ("as trained, rounded" in rows) == (not learns)
    assert ("nothing has been sent yet over what the conversion made (boundary 0)" in done.stderr) == learns


@pytest.mark.pairwise(2)
def test_a_run_with_a_new_boundary_trains_and_survives_a_loss(learned: tuple[Path, Ended], tmp_path: Path) -> None:
    """Its checkpoints are whole from the first on, though one boundary began later than the other."""
    run, _ = learned
    converted(run, tmp_path / "other", "--cut", "1,1,2")
    shutil.copytree(tmp_path / "other", tmp_path / "disturbed")
    ended = go_on(tmp_path / "other")
    fault = Kill(at=Frame(number=60), stage=1)
    disturbed = go_on(tmp_path / "disturbed", fault)
    assert disturbed.happened == [fault]
    assert disturbed.losses == ended.losses
    assert disturbed.state_sha256 == ended.state_sha256


def test_more_microbatches_train_on_the_same_sequences(exact: tuple[Path, Ended], tmp_path: Path) -> None:
    """So the losses are those of the run, but for the order in which they are summed."""
    run, unconverted = exact
    more = ("--set", "pipeline.microbatches=4", "--set", "pipeline.speeds=1,1,2")
    said = converted(run, tmp_path / "other", "--stages", "3", *more)
    assert "a step is computed in 4 parts and not in 2: what is summed is rounded otherwise" in said
    pipeline = load_config(tmp_path / "other" / "run.toml").pipeline
    assert (pipeline.microbatches, pipeline.speeds) == (4, (1.0, 1.0, 2.0))
    ended = go_on(tmp_path / "other")
    assert ended.losses[0] == pytest.approx(unconverted.losses[0][DONE:], rel=1e-3)
    assert ended.losses[0] != unconverted.losses[0][DONE:]


@pytest.mark.parametrize("cut", ["1,1,2", "1,3"])
def test_error_feedback_keeps_the_size_of_a_microbatch(cut: str, tiny: TinyConfig, tmp_path: Path) -> None:
    """Where a boundary goes on: a new one has nothing to carry."""
    ended_run(tiny(SMALL | CODECS["resbm"]), tmp_path / "run")
    options = ["checkpoint", "convert", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--cut", cut]
    done = CliRunner().invoke(app, [*options, "--set", "pipeline.microbatches=4"])
    if cut == "1,3":
        assert done.exit_code == 0, done.output
        go_on(tmp_path / "other")
        return
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert "byte format 'int4' carries what it left out of a microbatch of 2 sequences" in done.stderr
    assert "leave pipeline.microbatches = 2" in done.stderr
    assert not (tmp_path / "other").exists()


def test_what_stays_is_what_was_learned_there(tiny: TinyConfig, tmp_path: Path) -> None:
    settings = SMALL | CODECS["mapl, every 3"] | {"pipeline.stages": 3, "pipeline.cut": "1,1,2"}
    ended_run(tiny(settings), tmp_path / "run")
    said = converted(tmp_path / "run", tmp_path / "other", "--cut", "2,2")
    assert "boundary 0 of before, after 1 layer: is closed, what its codec learned is dropped" in said
    before, after = assemble(tmp_path / "run"), assemble(tmp_path / "other")
    (state,), was = after.boundaries, before.boundaries[1]
    assert state.master is not None
    assert was.master is not None
    assert torch.equal(state.master, was.master)
    for stage, source in ((0, 1), (1, 2)):
        assert after.tokens[stage].keys() == before.tokens[source].keys() != set()
        assert all(torch.equal(tensor, before.tokens[source][name]) for name, tensor in after.tokens[stage].items())
    go_on(tmp_path / "other")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say how many stages: --stages N, or --cut with the layers of each, such as --cut 3,3,2"),
        (["--stages", "9"], "9 stages, but the model has 4 layers; set pipeline.stages = 6 or fewer"),
        (["--cut", "3,2"], "pipeline.cut = 3,2 has 5 layers, but the model has 4"),
        (["--stages", "3", "--cut", "2,2"], "pipeline.cut = 2,2 is for 2 stages, but there are 3"),
        (["--stages", "3", "--cut", "half"], "pipeline.cut: 'half' is not a cut; say auto, equal"),
        (["--cut", "2,2"], "its 2 stages have 2,2 layers already; choose another --stages or --cut"),
        (["--stages", "3", "--step", "99"], "stage 0 has no checkpoint after 99 steps"),
        (["--stages", "3", "--speeds", "1,2"], "pipeline.speeds = 1,2 is for 2 stages, but pipeline.stages = 3"),
        (["--stages", "3", "--set", "pipeline.speeds=[1,2]"], "pipeline.speeds = 1,2 is for 2 stages, but"),
        (["--set", "pipeline.cut=auto"], "say how many stages: --stages N, or --cut with the layers of each"),
        (["--stages", "3", "--set", "pipeline.microbatches=3"], "pipeline.microbatches = 3 does not divide"),
        (["--stages", "3", "--set", "pipeline.schedule=2f2b"], "unknown schedule '2f2b'; the nearest known one is"),
        (["--stages", "3", "--set", "pipeline.batch_size=8"], "--set pipeline.batch_size: a converted run is the same"),
        (["--stages", "3", "--set", "link.link=80mbit"], "--set link.link: a converted run is the same run, so only"),
        (["--stages", "3", "--set", "optim.clip=2", "--set", "run.seed=2"], "--set optim.clip, run.seed: a converted"),
        (["--stages", "3", "--set", "pipeline.cuts=2"], "unknown setting 'pipeline.cuts'; the nearest known one is"),
        (["--stages", "3", "--set", "microbatches"], "--set wants section.key=value, got 'microbatches'"),
    ],
    ids=str,
)
def test_what_cannot_be_converted(options: list[str], said: str, exact: tuple[Path, Ended], tmp_path: Path) -> None:
    run, _ = exact
    before = sorted(run.rglob("*"))
    done = CliRunner().invoke(app, ["checkpoint", "convert", str(run), "--out", str(tmp_path / "a" / "b"), *options])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.rglob("*")) == before


def test_directories_that_cannot_be(exact: tuple[Path, Ended], tmp_path: Path) -> None:
    run, _ = exact
    (tmp_path / "precious").write_text("")
    for source, said in ((run, r"is there already, and not empty"), (tmp_path, r"is not the directory of a run")):
        done = CliRunner().invoke(app, ["checkpoint", "convert", str(source), "--out", str(tmp_path), "--stages", "3"])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert re.search(said, done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
