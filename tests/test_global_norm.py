"""One gradient norm over all stages: what is agreed does not depend on the cut, on time, or on who was lost meanwhile.

That float64 runs are plain autograd with one clip is in `test_float64_parity`, the order of the two passes in
`test_schedules`, what they cost in `test_plan`, and a loss of real processes in `test_recovery`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.node.config import RunConfig
from thinpipe.node.preparation import prepare
from thinpipe.node.stage import Stage
from thinpipe.node.unpacking import Unpacking
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.global_norm import NORM, norm_message, sum_of_squares_in
from thinpipe.protocol.messages import Kind, Message

from .cluster import run_cluster, run_to_failure
from .conftest import TinyConfig
from .faults import Fault as Mishap
from .faults import Phase, cut, kill, pause
from .faults_reference import SETTINGS, STAGES, assert_equal
from .in_memory import Outcome, run_in_memory, run_reference

GLOBAL = {"optim.clip": 0.1, "optim.clip_norm": "global"}  # less than any norm of the runs here
SOON_S = 15.0

# -- the message ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 5e-324, 0.1, 1.7976931348623157e308])
def test_a_number_arrives_as_it_was(value: float) -> None:
    message = norm_message(7, value)
    assert (message.kind, message.step, message.microbatch, len(message.body)) == (Kind.GRADIENT_NORM, 7, 0, 8)
    assert sum_of_squares_in(replace(message, body=memoryview(bytes(message.body)))) == value


SPOILT: dict[str, tuple[dict[str, Any], Fault]] = {
    "not a number": ({"body": NORM.pack(math.nan)}, Fault.PAYLOAD),
    "infinite": ({"body": NORM.pack(math.inf)}, Fault.PAYLOAD),
    "negative": ({"body": NORM.pack(-1e-300)}, Fault.PAYLOAD),
    "short": ({"body": bytes(7)}, Fault.PAYLOAD),
    "nothing": ({"body": b""}, Fault.PAYLOAD),
    "two numbers": ({"body": bytes(16)}, Fault.PAYLOAD),
    "token ids": ({"token_ids": b"\0"}, Fault.UNEXPECTED),
    "a change of a dictionary": ({"dictionary": b"\0"}, Fault.UNEXPECTED),
    "a codec": ({"codec": "fp64"}, Fault.UNEXPECTED),
    "a header": ({"codec_header": {"shape": [1]}}, Fault.UNEXPECTED),
    "a loss": ({"loss_sum": 1.0}, Fault.UNEXPECTED),
}


@pytest.mark.parametrize(("spoilt", "fault"), SPOILT.values(), ids=SPOILT)
def test_anything_else_is_refused_by_name(spoilt: dict[str, Any], fault: Fault) -> None:
    with pytest.raises(RemoteProtocolError, match="gradient norm of step 7: ") as refused:
        sum_of_squares_in(replace(norm_message(7, 2.0), **spoilt))
    assert refused.value.fault is fault


@pytest.mark.parametrize("settings", [{"optim.clip_norm": "stage"}, {**GLOBAL, "optim.clip": 0.0}], ids=str)
def test_where_none_was_agreed_none_is_taken(settings: dict[str, Any], tiny: TinyConfig) -> None:
    config = tiny({"pipeline.stages": 3, **settings})
    unpacking = Unpacking(prepare(config, 1)[0])
    for take, side in ((unpacking.from_above, "upstream"), (unpacking.from_below, "downstream")):
        with pytest.raises(RemoteProtocolError, match=f"a gradient_norm message from {side}") as refused:
            take(norm_message(0, 1.0), 0)
        assert refused.value.fault is Fault.UNEXPECTED


# -- the same everywhere ----------------------------------------------------------------------------------------------

SWARMS: dict[str, dict[str, Any]] = {
    "2 stages, 1f1b": {"pipeline.stages": 2, "codec.codec": "int8"},
    "4 stages, 1f1b": {"pipeline.stages": 4},
    "2 stages, zb": {"pipeline.stages": 2, "pipeline.schedule": "zb", "compute.dtype": "bfloat16"},
    "4 stages, zb, projectors and codebooks that learn": {
        "pipeline.stages": 4,
        "pipeline.schedule": "zb",
        "pipeline.microbatches": 8,
        "codec.codec": "mapl:r=8,every=1",
        "codec.forward": "rvq:groups=2,codes=16",
        "codec.backward": "rvq:groups=2,codes=8",
    },
    "4 stages, deep zb": {
        "pipeline.stages": 4,
        "pipeline.schedule": "zb:rtt_ratio=1.3",
        "pipeline.microbatches": 8,
        "codec.codec": "mapl:r=8,every=2",
    },
    "3 stages, gpipe, a capped link": {"pipeline.stages": 3, "pipeline.schedule": "gpipe", "link.link": "20mbit,5ms"},
}


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("settings", SWARMS.values(), ids=SWARMS)
def test_a_swarm_is_one_process(settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({**settings, **GLOBAL, "run.eval_every": 2})
    reference, swarm = run_reference(config, tmp_path / "reference"), run_in_memory(config, tmp_path / "swarm")
    assert swarm == reference
    assert all(of_stage == swarm.grad_norms[0] for of_stage in swarm.grad_norms)
    assert min(swarm.grad_norms[0]) > config.optim.clip
    boundaries, steps = config.pipeline.stages - 1, config.run.steps
    assert reference.sent_bytes["gradient_norm"] == swarm.sent_bytes["gradient_norm"] == 2 * 8 * boundaries * steps


def of_stages(tiny: TinyConfig, directory: Path, settings: dict[str, Any]) -> list[Outcome]:
    directory.mkdir()
    return [
        run_in_memory(tiny({"pipeline.stages": stages, **settings}), directory / str(stages)) for stages in (1, 2, 4)
    ]


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_the_number_of_stages_changes_nothing(schedule: str, tiny: TinyConfig, tmp_path: Path) -> None:
    """Sums over other stages may differ in the last bit of a float64, which is far below one of the float32 by which
    gradients are multiplied."""
    exact = {"codec.codec": "fp32", "pipeline.schedule": schedule, "optim.clip": 0.1}
    alone, *cut_up = of_stages(tiny, tmp_path / "global", exact | GLOBAL)
    for outcome in cut_up:
        assert outcome.losses[0] == alone.losses[0]
        assert outcome.val_losses[0] == alone.val_losses[0]
        assert outcome.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-14)
        assert all(torch.equal(outcome.weights[name], weight) for name, weight in alone.weights.items())
    by_stage = of_stages(tiny, tmp_path / "stage", exact)
    assert by_stage[0] == alone  # a lone stage has the norm of the whole model
    assert "gradient_norm" not in alone.sent_bytes
    assert len({tuple(outcome.losses[0]) for outcome in by_stage}) == 3  # so it does bite


def test_where_nothing_is_clipped_nothing_is_sent(tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {"pipeline.stages": 2, "optim.clip": 0.0}
    by_stage, by_all = (
        run_in_memory(tiny({**settings, "optim.clip_norm": norm}), tmp_path / norm) for norm in ("stage", "global")
    )
    assert by_all == by_stage
    assert "gradient_norm" not in by_all.sent_bytes


def test_an_emulated_run_sends_as_much(tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {**GLOBAL, "compute.emulate": "tiny@3x1ms+2ms", "checkpoint.every": 0, "pipeline.stages": 3}
    outcome = run_in_memory(tiny(settings), tmp_path)
    assert outcome.sent_bytes["gradient_norm"] == 2 * 8 * 2 * 3


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clipped(tiny: TinyConfig) -> RunConfig:
    return tiny({**SETTINGS, **GLOBAL, "pipeline.schedule": "zb"})


@pytest.fixture(scope="module")
def undisturbed(clipped: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_reference(clipped, tmp_path_factory.mktemp("reference"))


# Before the sums go up from a stage, and when the total is there and not all know it.
MISHAPS: list[Mishap] = [
    kill(stage, 4, phase) for stage in range(STAGES) for phase in (Phase.BEFORE_NORM, Phase.BEFORE_COMMIT)
]
MISHAPS += [
    cut(boundary, 4, phase) for boundary in range(STAGES - 1) for phase in (Phase.BEFORE_NORM, Phase.BEFORE_COMMIT)
]
MISHAPS += [pause(1, 4, Phase.BEFORE_NORM, seconds=30.0), pause(1, 4, Phase.BEFORE_NORM, replaced=True)]


@pytest.mark.pairwise(3)
@pytest.mark.parametrize("mishap", MISHAPS, ids=str)
def test_losses_while_the_norm_is_agreed_change_no_bit(
    clipped: RunConfig, undisturbed: Outcome, tmp_path: Path, mishap: Mishap
) -> None:
    ended = run_cluster(clipped, tmp_path, [mishap])
    assert_equal(ended, undisturbed)
    assert ended.happened == [mishap]


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_gradient_that_is_not_finite_ends_all_with_its_name(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, schedule: str
) -> None:
    """It never becomes a part of a sum: the stage that has it fails, and the others wait for no deadline."""
    summed, at = Stage.sum_of_squares, stage

    def poisoned(self: Stage, step: int, below: float = 0.0) -> float:
        if (self.index, step) == (at, 2):
            _, last = self.model.full_names()[-1]
            assert last.grad is not None
            last.grad.view(-1)[-1] = math.nan
        return summed(self, step, below)

    monkeypatch.setattr(Stage, "sum_of_squares", poisoned)
    ended = run_to_failure(tiny({**SETTINGS, **GLOBAL, "pipeline.schedule": schedule}), tmp_path, [])
    own = ended.lines.pop(stage)
    assert own.startswith("step 2: the gradient of '")
    assert "is not finite (norm nan)" in own
    assert len(ended.lines) == STAGES - 1
    assert all(line == f"stage {stage} failed after 2 steps: {own}" for line in ended.lines)
    assert max(ended.seconds) < SOON_S


@pytest.mark.parametrize("spoilt", [{"body": NORM.pack(math.nan)}, {"kind": Kind.GRADIENT}, {"step": 3}], ids=str)
def test_a_neighbour_that_lies_about_it_is_refused(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: dict[str, Any]
) -> None:
    """Each end of that link says so, and the run ends: nobody waits for another number."""
    from thinpipe.node import training_loop

    def lies(step: int, squares: float) -> Message:
        message = norm_message(step, squares)
        return replace(message, **spoilt) if step == 2 else message

    monkeypatch.setattr(training_loop, "norm_message", lies)
    ended = run_to_failure(tiny({**SETTINGS, **GLOBAL}), tmp_path, [])
    assert all("bad-payload" in line or "out-of-order" in line for line in ended.lines), ended.lines
    assert max(ended.seconds) < SOON_S
