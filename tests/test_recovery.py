"""Losses of real processes, over gRPC: what the in-memory tier cannot show of starting, dying and coming back."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.sim.reports.summary import read_records, steps_of
from typer.testing import CliRunner

from .conftest import TinyConfig
from .faults import DiskFull, Done, During, Fault, Kill, Pause, Phase, TornCheckpoint
from .in_memory import Outcome, run_reference
from .real_faults import carry_out, records, unwritten
from .real_node import until
from .real_swarm import Process
from .real_up import END_S, Up, ended

STEPS = 60  # of 30 ms: the last fault comes after 24 and is over after about 36
SETTINGS = {
    "pipeline.stages": 3,
    "run.steps": STEPS,
    "checkpoint.every": 2,
    "codec.codec": "mapl:r=8,anchors=full,every=2",
    "codec.forward": "rvq:groups=2,codes=16,delta=drift/4",
    "codec.backward": "rvq:groups=4,codes=8,levels=1,delta=random/2",
}


@pytest.fixture(scope="module")
def config(tiny: TinyConfig) -> RunConfig:
    return tiny(SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_reference(config, tmp_path_factory.mktemp("reference"))


def states(summary: dict[str, Any]) -> list[str]:
    return [stage["state_sha256"] for stage in summary["stages"]]


def after_steps(run: Path, count: int) -> Callable[[], bool]:
    return lambda: len(records(run, 0, "step")) >= count


FROM_OUTSIDE: list[Fault] = [
    Kill(at=Done(stage=0, steps=4), stage=1),
    Kill(at=During(stage=0, phase=Phase.STOPPED), stage=0),  # the first one is not mended yet
    TornCheckpoint(at=Done(stage=0, steps=12), stage=2),
    Pause(at=Done(stage=0, steps=20), stage=1, seconds=1.0),
    DiskFull(at=Done(stage=0, steps=24), stage=1),
]


def test_a_killed_stage_comes_back(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """The quick one of these stories: the tail of two stages, which has the head alone, is killed, started again, and
    all go on from a common checkpoint."""
    short = tiny({**SETTINGS, "pipeline.stages": 2, "pipeline.cut": "4,0", "run.steps": 16})
    (tmp_path / "run.toml").write_text(dump_config(short))
    run = tmp_path / "run"
    process = up("--config", str(tmp_path / "run.toml"), "--out", str(run), "--restarts", "1")
    carry_out(run, [Kill(at=Done(stage=0, steps=4), stage=1)])
    summary = ended(process)
    assert states(summary) == run_reference(short, tmp_path / "reference").state_sha256
    assert [len(records(run, stage, "start")) for stage in range(2)] == [1, 2]
    assert len(summary["rollbacks"]) == 1


@pytest.mark.slow
def test_a_killed_stage_comes_back_where_gradients_are_clipped_by_one_norm(
    up: Up, tiny: TinyConfig, tmp_path: Path
) -> None:
    """What was agreed of a step that is broken off is agreed again: the middle of three is killed, then the head."""
    norm = {"optim.clip": 0.1, "optim.clip_norm": "global", "pipeline.schedule": "zb"}
    short = tiny({**SETTINGS, **norm, "run.steps": 24})
    (tmp_path / "run.toml").write_text(dump_config(short))
    run = tmp_path / "run"
    process = up("--config", str(tmp_path / "run.toml"), "--out", str(run), "--restarts", "2")
    carry_out(run, [Kill(at=Done(stage=0, steps=4), stage=1), Kill(at=Done(stage=0, steps=12), stage=0)])
    summary = ended(process)
    undisturbed = run_reference(short, tmp_path / "reference")
    assert states(summary) == undisturbed.state_sha256
    assert [len(records(run, stage, "start")) for stage in range(3)] == [2, 2, 1]
    assert undisturbed.sent_bytes["gradient_norm"] == 2 * 2 * 8 * 24


@pytest.mark.slow
def test_faults_from_outside(up: Up, config: RunConfig, undisturbed: Outcome, tmp_path: Path) -> None:
    """SIGKILL to the middle, to the head while that is being mended, and to the tail, whose newest checkpoint is
    damaged, each started again by the launcher; SIGSTOP for a moment; a disk that is full for a while."""
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    process = up("--config", str(tmp_path / "run.toml"), "--out", str(run), "--restarts", "3")
    carry_out(run, FROM_OUTSIDE)
    summary = ended(process)
    assert states(summary) == undisturbed.state_sha256
    assert summary["val_loss"] == undisturbed.val_losses[0][-1]
    assert summary["steps"] == STEPS
    assert [len(records(run, stage, "start")) for stage in range(3)] == [2, 2, 2]
    assert len(summary["rollbacks"]) >= 2
    assert any(r["code"] == "checkpoint" and "is damaged" in r["reason"] for r in records(run, 2, "fault"))
    full = unwritten(run, 1)
    assert len(full) >= 2
    assert any(record["time_s"] > full[-1]["time_s"] for record in records(run, 1, "checkpoint"))  # there is room again


# What a stage that is lost takes with it, by what crosses the boundaries: (codec, forward, backward).
CROSSING = {
    # A model that is made to lie in one subspace, which whoever comes back computes again for itself. What the last
    # gradient lost is in the packer's memory, and has to come back from its checkpoint; top-k keeps nothing.
    "ssn, topk, carried errors": ("ssn:k=8", "topk:k=4", "int3:feedback=true"),
    # Encoder and decoder are trained by the stages on either side, and each comes back from its own stage's checkpoint;
    # columns are chosen for each message, and masks drawn from its key, which has to be the same the second time.
    "resbm, columns, masks": ("resbm:b=8", "columns:k=4", "mask:k=4"),
    # Signs of a rotation are drawn from the key too, as is the rounding of gradients, here in four values.
    "identity, rotations": ("identity", "int4:hadamard=true", "int2"),
    # Most of all that can be lost: a projector and its versions, a network of the context at both ends, a codebook in
    # each direction, one of which learns of rotated tokens.
    "mapl, context, codebooks": (
        "mapl:r=8,context=4,every=2",
        "rvq:groups=2,codes=16,delta=drift/4",
        "rvq:groups=1,codes=16,levels=2,scale=log4,hadamard=true,delta=drift/4",
    ),
    # Which coordinates cross, and in how many bits, follows from averages that the packer has to have again, and from
    # the table that it had shipped some steps before.
    "mapl, axes and bits that follow": (
        "mapl:r=auto,bits=20",
        "transform:bits=20,every=3",
        "transform:bits=20,every=2",
    ),
}
# Who is killed, and when: once checkpoints are there, so that what they hold counts.
KILLED: dict[int, list[Fault]] = {
    # The tail, which packs gradients only, and then the head, which packs activations only.
    2: [Kill(at=Done(stage=0, steps=5), stage=1), Kill(at=Done(stage=0, steps=10), stage=0)],
    # One in the middle, which does both, and its neighbour while that is being mended.
    4: [Kill(at=Done(stage=0, steps=5), stage=2), Kill(at=During(stage=0, phase=Phase.STOPPED), stage=1)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "forward", "backward", "stages"),
    [(*crossing, stages) for crossing, stages in zip(CROSSING.values(), itertools.cycle(KILLED), strict=False)],
    ids=CROSSING,
)
def test_killed_stages_come_back_whatever_crosses(
    codec: str, forward: str, backward: str, stages: int, tiny: TinyConfig, tmp_path: Path
) -> None:
    config = tiny(
        {
            "pipeline.stages": stages,
            "pipeline.cut": "0,2,1,1" if stages == 4 else "equal",
            "pipeline.microbatches": 2,
            "run.steps": 24,  # of 30 ms: 14 or more after the last kill
            "run.eval_every": 6,
            "checkpoint.every": 2,
            "codec.codec": codec,
            "codec.forward": forward,
            "codec.backward": backward,
        }
    )
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    options = ["--config", str(tmp_path / "run.toml"), "--out", str(run), "--restarts", "2", "--json"]
    process = Process(tmp_path / "words", "up", *options)
    try:
        carry_out(run, KILLED[stages])
        process.ends(within_s=END_S)
    finally:
        process.close()  # the nodes watch it
    summary = json.loads((run / "summary.json").read_text())
    reference = run_reference(config, tmp_path / "reference")
    assert states(summary) == reference.state_sha256
    assert summary["val_loss"] == reference.val_losses[0][-1]
    for stage in range(stages):
        steps = steps_of(read_records(run / f"stage-{stage}.jsonl"))
        assert [record["loss"] for record in steps] == reference.losses[stage]
    assert sum(len(records(run, stage, "start")) for stage in range(stages)) == stages + 2
    assert max(rollback["completed"] for rollback in summary["rollbacks"]) > 0  # not from the first step alone


@pytest.mark.slow
def test_without_restarts_a_loss_ends_the_run(up: Up, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    process = up("--config", str(tmp_path / "run.toml"), "--out", str(run))
    until(after_steps(run, 2), "a step")
    os.kill(records(run, 1, "start")[-1]["process"], signal.SIGKILL)
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 1
    assert "stage 1 was killed by SIGKILL" in stderr.splitlines()[-1]


@pytest.mark.slow
def test_terminated_runs_go_on_with_resume(up: Up, config: RunConfig, undisturbed: Outcome, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    process = up("--config", str(tmp_path / "run.toml"), "--out", str(run))
    until(after_steps(run, 7), "a few steps")
    process.terminate()
    first = ended(process)
    assert 7 <= first["steps"] < STEPS
    listing = CliRunner().invoke(app, ["checkpoint", "ls", str(run), "--json"])
    assert str(first["steps"]) in listing.stdout
    summary = ended(up("--resume", str(run)))
    assert states(summary) == undisturbed.state_sha256
    assert summary["steps"] == STEPS
    assert summary["rollbacks"][-1]["completed"] == first["steps"]
    assert len(records(run, 0, "step")) == STEPS  # nothing was done twice


def test_resume_of_what_is_no_run(up: Up, tmp_path: Path) -> None:
    process = up("--resume", str(tmp_path))
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 2
    (line,) = stderr.splitlines()
    assert line.startswith(f"thinpipe: error: --resume {tmp_path}: there is no run.toml")


@pytest.mark.long
def test_chaos_of_every_kind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thinpipe.cli", "chaos", "--steps", "60", "--kills", "14", "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["faults"].values()) == 14
    assert found["fenced"] >= 1
    assert found["generations"] > 4
