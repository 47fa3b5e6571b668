"""The model of a run whose lanes hold chunks, taken out of it: it computes what the lanes computed together."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from thinpipe.cli import app
from thinpipe.node.checkpoints.assemble import assemble
from thinpipe.node.checkpoints.plain_projections import is_plain
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.context.stage_tokens import StageTokens
from thinpipe.node.lane_in_process import LaneInProcess
from thinpipe.node.one_process import OneProcess
from thinpipe.node.stage import Stage
from thinpipe.sim.reports.summary import read_records
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from .conftest import TinyConfig
from .trained_run import shake, train, write_checkpoints

STEPS, LANES, TOKENS = 4, 2, 32
EXACT = 1e-8  # of float64
MIXED, FOLDED = "mos:k=0.25,v=0.5,warm=1", "mos:k=0.25,v=0.5,warm=1,fold=0.25"


def configure(tiny: TinyConfig, method: str, **more: Any) -> RunConfig:
    return tiny(
        {
            "run.steps": STEPS,
            "model.layers": 2,
            "compute.dtype": "float64",
            "codec.codec": "fp64",
            "pipeline.stages": 1,
            "pipeline.batch_size": 4,
            "pipeline.microbatches": 2,
            "data.sequence_length": TOKENS,
            "lanes.count": LANES,
            "lanes.average": "gradients:format=fp64",
            "context.method": method,
            **{name.replace("__", "."): value for name, value in more.items()},
        }
    )


def shaken(stages: list[Stage]) -> None:
    """All that learns far from where it began, and frames as they were."""
    frames = {name: each.detach().clone() for stage in stages for name, each in stage.trained if "frame" in name}
    shake(stages)
    with torch.no_grad():
        for stage in stages:
            for name, each in stage.trained:
                if name in frames:
                    each.copy_(frames[name])


def lanes_compute(config: RunConfig, run: Path, ids_BT: Tensor) -> Tensor:
    """Logits (B, T, V) as an evaluation of the run has them: each lane those of its chunk, in threads that exchange
    keys and values."""
    layout = config.chunk_layout
    ids_BS = np.pad(ids_BT.numpy(), ((0, 0), (0, 1)))
    logits_BTV = torch.zeros(*ids_BT.shape, 512, dtype=torch.float64)

    @torch.no_grad()  # of each thread
    def work(lane: LaneInProcess) -> None:
        (stage,) = lane.stages
        stage._begin(STEPS - 1, 0, evaluation=True)
        tokens = StageTokens.of(layout.apart(layout.take(ids_BS, lane.lane), lane.lane), stage.device)
        logits_BTV[:, layout.lane_positions(lane.lane)] = stage._computed(tokens.inputs_BT, None, tokens.known)

    with closing(OneProcess(config)) as process:
        for lane in process.lanes:
            for stage, snapshot in zip(
                lane.stages, assemble(run / f"lane-{lane.lane}", config=config).snapshots, strict=True
            ):
                stage.restore(snapshot)
        process._each(work, process.lanes)
    return logits_BTV


def done(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr


@pytest.fixture(scope="module")
def of_float32(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, ended in its fold, as people have them."""
    run = tmp_path_factory.mktemp("folded")
    more = {"compute__dtype": "float32", "codec__codec": "mapl:r=16,context=3,ce=6,ch=10", "pipeline__stages": 2}
    train(configure(tiny, FOLDED, lanes__average="gradients", **more), run)
    return run


@pytest.fixture(scope="module")
def mixed(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended with angles."""
    run = tmp_path_factory.mktemp("mixed")
    train(configure(tiny, MIXED), run, after=shaken)
    return run


@pytest.mark.parametrize("method", ["full", FOLDED, "mos:k=0.25,v=0.5,mixture=none", "mos:k=0.3,v=0.3,fold=0.5"])
def test_what_is_exported_computes_what_the_lanes_do(tiny: TinyConfig, tmp_path: Path, method: str) -> None:
    config = configure(tiny, method)
    train(config, tmp_path / "run", after=shaken)
    written = json.loads(done("export", tmp_path / "run", "--out", tmp_path / "out", "--json"))
    ids_BT = torch.from_numpy(np.random.default_rng(3).integers(0, 512, (2, TOKENS)))
    wanted_BTV = lanes_compute(config, tmp_path / "run", ids_BT)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        assert (model(ids_BT).logits - wanted_BTV).abs().max() <= EXACT * wanted_BTV.abs().max()
    assert (written["architecture"], written["context"], written["angles_left_out"]) == ("llama", method, False)
    assert not [
        name for name in load_file(tmp_path / "out" / "model.safetensors") if "frame" in name or "angle" in name
    ]


def test_the_held_out_loss_is_that_of_all_lanes(tiny: TinyConfig, tmp_path: Path) -> None:
    """Each has computed a part of each sequence; and two stages are one model."""
    train(configure(tiny, FOLDED, pipeline__stages=2), tmp_path / "run")
    written = json.loads(done("export", tmp_path / "run", "--out", tmp_path / "out", "--json"))
    held_out = written["held_out"]
    assert held_out["loss"] == pytest.approx(held_out["loss_recorded"], rel=1e-7)  # transformers loads it in float32
    lane = [json.loads(line) for line in (tmp_path / "run" / "lane-0" / "stage-0.jsonl").read_text().splitlines()]
    (own,) = [record["val_loss"] for record in lane if record["event"] == "evaluation"]
    assert own != pytest.approx(held_out["loss"], rel=1e-4)
    (evaluated,) = [
        each["loss"]
        for each in json.loads(done("eval", tmp_path / "run", "--json"))["text"]
        if each["boundaries"] == "without rounding"
    ]
    assert evaluated == pytest.approx(held_out["loss_recorded"], rel=1e-12)


def test_what_its_lanes_computed_is_known_without_their_waits(of_float32: Path) -> None:
    """In one process, too, where they are threads; so `plan` can carry the run over."""
    for stage in range(2):
        for lane in range(LANES):
            records = read_records(of_float32 / f"lane-{lane}" / f"stage-{stage}.jsonl")
            assert all(each["wait_s"] > 0 < each["compute_s"] for each in records if each["event"] == "step")
    found = json.loads(done("plan", "--from", of_float32, "--json"))
    assert found["chunks"]["count"] == LANES


def test_angles_are_no_part_of_a_plain_model(mixed: Path, tmp_path: Path) -> None:
    line = (
        "context method 'mos': after step 4 keys and values lie in subspaces that turn by angles, which no plain "
        "projection does (fold=0: they stay); thinpipe export RUN --out OUT --plain leaves them out, and says what "
        "that costs"
    )
    for command in (
        ["export", mixed, "--out", tmp_path / "out"],
        ["eval", mixed],
        ["generate", mixed, "def "],
        ["up", "--from", mixed, "--out", tmp_path / "new", "--one-process"],
    ):
        assert line in refused(*command)
    assert not list(tmp_path.iterdir())
    told = done("export", mixed, "--out", tmp_path / "out", "--plain")
    assert f"without the angles of {MIXED}, which no plain projection computes" in told
    ids_BT = torch.from_numpy(np.random.default_rng(3).integers(0, 512, (2, TOKENS)))
    wanted_BTV = lanes_compute(load_config(mixed / "run.toml"), mixed, ids_BT)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():  # the angles were worth something
        assert (model(ids_BT).logits - wanted_BTV).abs().max() > 1e-3 * wanted_BTV.abs().max()


def test_when_a_model_is_plain(tiny: TinyConfig) -> None:
    def steps(method: str) -> list[int]:
        return [done for done in range(STEPS + 1) if is_plain(configure(tiny, method), done)]

    assert steps("full") == [0, 1, 2, 3, 4]
    assert steps(MIXED) == [0, 1]  # warm in the first step, after which its subspaces are chosen
    assert steps(FOLDED) == [0, 1, 4]
    assert steps("mos:k=0.25,v=0.5,mixture=none") == [0, 1, 2, 3, 4]
    assert steps("mos:k=0.25,v=0.5,mixture=random,fold=0.5") == [3, 4]


def test_a_run_that_is_warm_has_plain_projections(tiny: TinyConfig, tmp_path: Path) -> None:
    """Also once its subspaces are chosen, with which nothing was computed yet."""
    config = configure(tiny, "mos:k=0.25,v=0.5,warm=3")
    with closing(OneProcess(config, tmp_path)) as process:
        (tmp_path / "run.toml").write_text(dump_config(config))
        for step in range(3):
            process._step(step)
        for lane in process.lanes:
            write_checkpoints(config, tmp_path, lane.stages, lane.lane)
        loss = sum(process._each(lambda lane: lane.evaluate(2), process.lanes)) / LANES
    written = json.loads(done("export", tmp_path, "--out", tmp_path / "out", "--json"))
    assert written["held_out"]["loss"] == pytest.approx(loss, rel=1e-7)
    weights = assemble(tmp_path / "lane-0", config=config).weights
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], weights[name])


def test_lanes_that_differ_are_no_parts_of_one_model(of_float32: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(of_float32, run)
    config = load_config(run / "run.toml")
    with closing(OneProcess(config)) as process:
        lane = process.lanes[1]
        found = assemble(run / "lane-1", config=config)
        for stage, snapshot in zip(lane.stages, found.snapshots, strict=True):
            name = next(
                name for name in snapshot.tensors if name.startswith("weight/") and name.endswith("v_proj.weight")
            )
            other = replace(snapshot, tensors={**snapshot.tensors, name: snapshot.tensors[name] + 1e-3})
            stage.restore(other)
        write_checkpoints(config, run, lane.stages, 1)
    said = refused("export", run, "--out", tmp_path / "out")
    assert "lanes 0 and 1 differ after 4 steps, in 'model.layers.0.self_attn.v_proj.weight'" in said
    assert "take a step after which they had averaged (--step)" in said
    shutil.rmtree(run / "lane-1" / "checkpoints")
    result = CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "lane 1 is not compared with lane 0: there is no checkpoint in " in result.stderr


def test_a_run_of_chunks_is_evaluated_written_with_and_gone_on_from(of_float32: Path, tmp_path: Path) -> None:
    rounded, exact = json.loads(done("eval", of_float32, "--json"))["text"]
    written = json.loads(done("export", of_float32, "--out", tmp_path / "out", "--json"))
    assert written["boundaries"] == 1
    assert exact["loss"] == pytest.approx(written["held_out"]["loss"], rel=1e-5)
    assert rounded["loss"] == pytest.approx(written["held_out"]["loss_recorded"], rel=5e-3)  # other rounding
    assert done("generate", of_float32, "def ", "--max-tokens", "3", "--temperature", "0").startswith("def ")
    for more in ([], ["--context", "full", "--chunks", "4"], ["--chunks", "1", "--context", ""]):
        done("up", "--from", of_float32, "--out", tmp_path / "new", "--one-process", "--overwrite", *more)
        new = load_config(tmp_path / "new" / "run.toml")
        assert (new.run.steps, new.model.pretrained) == (STEPS, True)
