"""Lanes in one process: the arithmetic of whole stages, codecs and optimizers, against one lane and a textbook loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.one_process import OneProcess
from thinpipe.node.stage import Stage
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .conftest import TinyConfig
from .test_float64_parity import norm_in_float64

STEPS = 6
EXACT = {
    "compute.dtype": "float64",
    "optim.msign_dtype": "float64",
    "codec.forward": "fp64",
    "codec.backward": "fp64",
    "pipeline.batch_size": 4,
    "pipeline.microbatches": 2,
    "run.steps": STEPS,
    "run.eval_every": 3,
}


def weights(stage: Stage) -> dict[str, Tensor]:
    """What is averaged: all that its optimizer moves, and its boundary's projector."""
    return {
        name: tensor.clone()
        for name, tensor in stage.state_tensors().items()
        if name.startswith("weight/") or name == "codec/sender/master"
    }


def train(config: RunConfig) -> OneProcess:
    run = OneProcess(config)
    run.train()
    return run


def furthest(run: OneProcess, other: OneProcess) -> float:
    """The largest distance of a weight, relative to the largest of its tensor."""
    worst = 0.0
    for one, two in zip(run.stages, other.stages, strict=True):
        found, wanted = weights(one), weights(two)
        assert found.keys() == wanted.keys()
        for name in found:
            gap = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
            worst = max(worst, float(gap))
    return worst


@pytest.mark.parametrize(
    ("codec", "lanes"),
    [("identity", 3), ("mapl:r=8,every=2,anchors=full,context=0,gradient=fp64,delta=fp64", 2), ("resbm:b=8", 2)],
)
def test_gradients_of_lanes_are_one_lane_with_all_their_batches(
    tiny: TinyConfig, codec: str, lanes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)  # its own rounds to float32 whatever its input is
    settings = {**EXACT, "codec.codec": codec, "pipeline.stages": 2}
    grid = train(tiny({**settings, "lanes.count": lanes, "lanes.average": "gradients:format=fp64"}))
    whole = {"pipeline.batch_size": 4 * lanes, "pipeline.microbatches": 2 * lanes}
    assert furthest(grid, train(tiny({**settings, **whole}))) <= 1e-8


def test_gradients_of_lanes_are_clipped_by_the_norm_of_their_sum_over_all_stages(
    tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch
):
    """Which is agreed after the lanes have averaged, and in each lane by itself."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    settings = {**EXACT, "codec.codec": "identity", "optim.clip": 0.1, "optim.clip_norm": "global"}
    grid = train(tiny({**settings, "pipeline.stages": 2, "lanes.count": 2, "lanes.average": "gradients:format=fp64"}))
    whole = {"pipeline.batch_size": 8, "pipeline.microbatches": 4}
    one = train(tiny({**settings, **whole, "pipeline.stages": 2}))
    assert furthest(grid, one) <= 1e-8
    by_stage = train(tiny({**settings, **whole, "pipeline.stages": 2, "optim.clip_norm": "stage"}))
    assert furthest(one, by_stage) > 1e-3


GRIDS = {
    "gradients": ("mapl:r=8,every=2 int4 int3", "gradients:format=int8", "1f1b"),
    "outer, codebooks": ("mapl:r=8,every=2", "outer:every=3", "1f1b"),
    "outer in fragments": ("mapl:r=8,every=2,start=shared int4 int3", "outer:every=4,fragments=2,delay=1", "zb"),
    "sparta": ("resbm:b=8,anchors=full int4 int4", "sparta:p=0.2,every=2,delay=1", "gpipe"),
    "a subspace": ("ssn:k=8 int4 int4", "outer:every=2,delay=1,format=topk:k=16", "1f1b"),
}


@pytest.mark.pairwise(3)
@pytest.mark.parametrize(("codec", "average", "schedule"), GRIDS.values(), ids=GRIDS)
def test_lanes_learn_different_text_and_end_as_one(tiny: TinyConfig, codec: str, average: str, schedule: str):
    spec, *formats = codec.split()
    settings: dict[str, Any] = {"codec.codec": spec, "lanes.average": average, "pipeline.schedule": schedule}
    settings |= dict(zip(("codec.forward", "codec.backward"), formats, strict=False))
    config = tiny({**settings, "lanes.count": 2, "pipeline.stages": 2, "run.steps": STEPS})
    run = OneProcess(config)
    begun = [weights(stage) for stage in run.stages]
    losses, _ = run.train()
    assert losses[0] != losses[-1]
    for place, before in enumerate(begun):
        first, second = (weights(lane.stages[place]) for lane in run.lanes)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], before[name]) for name in first)
    projector = run.lanes[1].stages[0].state_tensors().get("codec/sender/master")
    if projector is not None:
        error = (projector.mT @ projector - torch.eye(projector.shape[1])).norm()
        assert float(error) <= 1e-5


@pytest.mark.parametrize("average", ["outer:every=4,fragments=2,delay=3", "sparta:p=0.2,every=3,delay=2"])
def test_a_stage_is_restored_in_the_middle_of_a_round(tiny: TinyConfig, average: str):
    """What it contributed and began with comes back too, into a stage that was built anew."""
    config = tiny({"lanes.count": 2, "lanes.average": average, "pipeline.stages": 2, "run.steps": STEPS})
    run, taken = OneProcess(config), []

    def take(step: int, loss: float) -> None:
        del loss
        if run.stages[0].averager and run.stages[0].averager.under_way(step + 1):
            taken.append([lane.stages[1].snapshot() for lane in run.lanes])

    run.train(take)
    assert taken
    for snapshots in taken:
        for stage, snapshot in zip([lane.stages[1] for lane in OneProcess(config).lanes], snapshots, strict=True):
            assert any(name.startswith("lanes/own") for name in snapshot.tensors)
            stage.restore(snapshot)
            found = stage.snapshot().tensors
            assert found.keys() == snapshot.tensors.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in snapshot.tensors.items())


def test_lanes_share_the_text_and_read_none_of_it_twice(tiny: TinyConfig):
    config = tiny({"lanes.count": 2, "pipeline.stages": 1, "codec.codec": "identity"})
    run = OneProcess(config)
    seen: list[bytes] = []
    batch = run.corpus.batch
    run.corpus.batch = lambda *args, **named: (drawn := batch(*args, **named), seen.append(drawn.tobytes()))[0]
    run.train()
    assert len(seen) == len(set(seen)) == 2 * config.run.steps * config.pipeline.microbatches


def test_one_lane_is_a_run_without_lanes(tiny: TinyConfig):
    stages = OneProcess(tiny({"pipeline.stages": 2, "lanes.average": "gradients"})).stages
    assert all(stage.averager is None for stage in stages)
    assert not any(name.startswith("lanes/") for stage in stages for name in stage.state_tensors())


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ("outr", "lanes.average: unknown averaging 'outr'; the nearest known one is 'outer'"),
        ("outer:every=4000,fragments=4000", "lanes.average: fragments=4000 are more than the"),
    ],
)
def test_an_average_that_cannot_be_is_refused(tiny: TinyConfig, average: str, said: str):
    with pytest.raises(ConfigError) as refused:
        OneProcess(tiny({"lanes.count": 2, "lanes.average": average}))
    assert said in str(refused.value)
