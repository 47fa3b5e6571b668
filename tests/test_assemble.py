"""A run's whole model out of its stages' checkpoints: which step, what is damaged, what does not belong together."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from thinpipe.node.checkpoints.assemble import AssembleError, assemble
from thinpipe.node.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    Fingerprint,
    ForeignCheckpoint,
    read_manifest,
)
from thinpipe.node.checkpoints.store import STATE, CheckpointStore
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.stage import Stage

from .conftest import TinyConfig
from .trained_run import train, write_checkpoints

STAGES, STEPS = 3, 4
MAPL = "mapl:r=8,context=2,ce=4,ch=6,anchors=factorized,every=2,table=1"


@pytest.fixture(scope="module")
def trained(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Stage]]:
    """Checkpoints after 4 steps and, as if it had gone on, after 5."""
    config = tiny({"pipeline.stages": STAGES, "run.steps": STEPS, "codec.codec": MAPL})
    out = tmp_path_factory.mktemp("trained") / "run"
    stages = train(config, out)
    for stage in stages:
        stage.completed += 1
    write_checkpoints(config, out, stages)
    return out, stages


@pytest.fixture
def run(trained: tuple[Path, list[Stage]], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def place(run: Path, stage: int, completed: int) -> Path:
    return run / "checkpoints" / f"stage-{stage}" / f"step-{completed:08d}"


def spoil(directory: Path) -> None:
    file = directory / STATE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_union_of_the_stages(trained: tuple[Path, list[Stage]]) -> None:
    run, stages = trained
    found, config = assemble(run, step=STEPS), load_config(run / "run.toml")
    own = {name: each for stage in stages for name, each in stage.model.full_names()}
    assert (found.completed, found.config, found.weights.keys()) == (STEPS, config, own.keys())
    assert all(torch.equal(found.weights[name], own[name]) for name in own)
    assert found.architecture.num_hidden_layers == 4

    for known, stage in zip(found.tokens, stages, strict=True):
        assert stage.tokens is not None
        state = stage.tokens.state_dict()  # without the table, which every node generates
        assert known.keys() == state.keys() == {"weight", "projection", *(name for name in state if "context" in name)}
        assert all(torch.equal(known[name], state[name]) for name in state)
    for held, (above, below) in zip(found.boundaries, itertools.pairwise(stages), strict=True):
        assert torch.equal(held.table, above.sender.shipped)
        assert torch.equal(held.table, below.receiver.table)
        assert torch.equal(held.master, above.sender.master)
    names = {name.partition("/")[2] for name in found.optimizer}
    trained = {name for stage in stages for name, _ in stage.trained}
    assert names == trained >= own.keys()
    stages[1].restore(found.snapshots[1])  # as a stage of the same cut takes it


def test_trained_halves(tiny: TinyConfig, tmp_path: Path) -> None:
    stages = train(tiny({"pipeline.stages": 2, "codec.codec": "resbm:b=8"}), tmp_path / "run")
    (held,) = assemble(tmp_path / "run").boundaries
    assert held.table is held.master is None
    for found, half in ((held.sender, stages[0].sender), (held.receiver, stages[1].receiver)):
        state = dict(half.named_parameters())
        assert found.keys() == state.keys() == {"layers.0.weight", "layers.2.weight"}
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_newest_that_all_have(run: Path) -> None:
    assert assemble(run).completed == STEPS + 1
    assert assemble(run, step=STEPS).completed == STEPS
    shutil.rmtree(place(run, 1, STEPS + 1))
    assert assemble(run).completed == STEPS


def test_a_damaged_one_is_said_and_the_one_before_is_taken(run: Path) -> None:
    spoil(place(run, 2, STEPS + 1))
    said: list[str] = []
    assert assemble(run, report=said.append).completed == STEPS
    (line,) = said
    assert str(place(run, 2, STEPS + 1)) in line
    assert "is damaged: it has the digest" in line
    with pytest.raises(CheckpointError, match="is damaged: it has the digest"):
        assemble(run, step=STEPS + 1)
    spoil(place(run, 0, STEPS))
    with pytest.raises(CheckpointError, match="is damaged: it has the digest"):
        assemble(run)


def test_a_neighbours_copy_will_do(run: Path) -> None:
    """Of a stage whose own machine is gone."""
    directory = run / "checkpoints"
    whole = assemble(run)
    (directory / "copies").mkdir()
    (directory / "stage-1").rename(directory / "copies" / "stage-1")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(assemble(run).weights[name], whole.weights[name])


def test_a_copy_takes_the_place_of_what_is_damaged(run: Path) -> None:
    """Its own was looked at first, and hid the copy."""
    directory = run / "checkpoints"
    whole = {name: each.clone() for name, each in assemble(run).weights.items()}
    shutil.copytree(directory / "stage-1", directory / "copies" / "stage-1")
    own, copy = place(run, 1, STEPS + 1), directory / "copies" / "stage-1" / f"step-{STEPS + 1:08d}"
    spoil(own)
    said: list[str] = []
    found = assemble(run, report=said.append)
    assert found.completed == STEPS + 1
    assert all(torch.equal(found.weights[name], whole[name]) for name in whole)
    (line,) = said
    assert line.startswith(f"{own / STATE} is damaged: it has the digest ")
    assert line.endswith(f" was written; the copy {copy} is taken instead")
    (own / MANIFEST).write_text("{}")
    assert assemble(run, step=STEPS + 1, report=said.append).completed == STEPS + 1
    assert said[1].startswith(f"{own / MANIFEST} is damaged: ")
    spoil(copy)
    with pytest.raises(CheckpointError, match=rf"{own / MANIFEST} is damaged"):  # what is its own is named
        assemble(run, step=STEPS + 1)
    assert assemble(run, report=said.append).completed == STEPS


def test_what_is_missing_is_named(run: Path) -> None:
    with pytest.raises(AssembleError, match=r"stage 0 has no checkpoint after 3 steps in .*; all stages have 4, 5"):
        assemble(run, step=3)
    shutil.rmtree(place(run, 1, STEPS + 1))
    with pytest.raises(AssembleError, match=r"stage 1 has no checkpoint after 5 steps in .*; all stages have 4$"):
        assemble(run, step=5)
    shutil.rmtree(place(run, 0, STEPS))
    with pytest.raises(AssembleError, match=r"no step in common in .*: stage 0 has 5; stage 1 has 4; stage 2 has 4, 5"):
        assemble(run)
    shutil.rmtree(run / "checkpoints" / "stage-1")
    with pytest.raises(AssembleError, match=r"stage 1 has no checkpoint in .*; copy its directory stage-1 there"):
        assemble(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(AssembleError, match=r"there is no checkpoint in .*run/checkpoints; a run writes them"):
        assemble(run)


def test_a_run_toml_of_other_settings_is_refused(run: Path, tiny: TinyConfig) -> None:
    """Other settings may make another model of the same tensors: what is generated from the seed is not in them."""
    (run / "run.toml").write_text(
        dump_config(tiny({"pipeline.stages": STAGES, "run.steps": STEPS, "codec.codec": MAPL, "run.seed": 2}))
    )
    with pytest.raises(AssembleError, match=r"is of other settings: configuration hash .{12}… there, .{12}… here"):
        assemble(run, step=STEPS)
    (run / "run.toml").write_text(dump_config(load_config(run / "run.toml", {"run.seed": 1, "run.name": "other"})))
    with pytest.raises(ForeignCheckpoint, match="its run is 'run', here 'other'"):
        assemble(run, step=STEPS)


def test_two_ends_that_do_not_hold_the_same_are_refused(run: Path) -> None:
    """Both checkpoints are whole, and the boundary would be two functions."""
    store = CheckpointStore(
        run / "checkpoints",
        stage=0,
        fingerprint=Fingerprint(
            run="run", stages=STAGES, configuration=read_manifest(place(run, 0, STEPS)).configuration
        ),
    )
    held = store.load(STEPS)
    turned = {name: -each if name.endswith("/shipped") else each.clone() for name, each in held.tensors.items()}
    store.write(replace(held, tensors=turned), generation=0, written_s=0)
    with pytest.raises(AssembleError, match="the two ends of boundary 0 hold different tables after 4 steps"):
        assemble(run, step=STEPS)
