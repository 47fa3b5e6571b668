"""Invariant 1: whatever the codec, schedule and number of stages, a swarm is one process, bit for bit.

Two kinds of swarm: real processes joined by gRPC, few because each costs seconds to start, and nodes in this process
joined by queues (`in_memory`), many. What is compared: the loss and gradient norm of every step on every stage, every
held-out loss, and the digest of all weights and optimizer state of every stage. Where two runs ought to differ, a test
says that they do, so that the comparison is known to be able to fail.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.local import run_local
from thinpipe.sim.launch.node_launch import node_environment

from .conftest import TinyConfig
from .in_memory import Cut, Outcome, read_outcome, run_in_memory, run_reference
from .preloaded import forks

CAPPED = "20mbit,5ms"

# stages, schedule, forward format, backward format, compute dtype, microbatches, link
MATRIX = [
    (2, "gpipe", "fp32", "fp32", "float32", 4, "none"),
    (4, "1f1b", "fp32", "fp32", "bfloat16", 1, CAPPED),
    (2, "1f1b", "bf16", "bf16", "float32", 4, CAPPED),
    (4, "gpipe", "bf16", "bf16", "bfloat16", 1, "none"),
    (2, "gpipe", "int8", "int8", "bfloat16", 1, CAPPED),
    (4, "1f1b", "int8", "int8", "float32", 4, "none"),
    (2, "1f1b", "int4", "int4", "bfloat16", 1, "none"),
    (4, "gpipe", "int4", "int4", "float32", 4, CAPPED),
    (2, "1f1b", "int8", "int4", "float32", 1, "none"),
    (4, "gpipe", "int8", "int4", "bfloat16", 4, CAPPED),
    (2, "gpipe", "bf16", "int8", "bfloat16", 4, CAPPED),
    (4, "1f1b", "bf16", "int8", "float32", 1, "none"),
    (1, "gpipe", "fp32", "fp32", "bfloat16", 4, "none"),
    (1, "1f1b", "fp32", "fp32", "float32", 1, "none"),
]


def in_matrix(row: tuple[Any, ...]) -> dict[str, Any]:
    stages, schedule, forward, backward, dtype, microbatches, link = row
    return {
        "pipeline.stages": stages,
        "pipeline.schedule": schedule,
        "codec.codec": "identity",
        "codec.forward": forward,
        "codec.backward": backward,
        "compute.dtype": dtype,
        "pipeline.microbatches": microbatches,
        "link.link": link,
        "run.eval_every": 2,
    }


def both(config: RunConfig, directory: Path) -> tuple[Outcome, Outcome]:
    """(one process, swarm in memory)"""
    return run_reference(config, directory / "reference"), run_in_memory(config, directory / "swarm")


def test_the_matrix_has_every_pair_of_settings() -> None:
    """But for a single stage, which has no link and no format."""
    rows = [(stages, schedule, (forward, backward), *rest) for stages, schedule, forward, backward, *rest in MATRIX]
    rows = [row for row in rows if row[0] > 1]
    for (i, these), (j, those) in itertools.combinations(enumerate(zip(*rows, strict=True)), 2):
        missing = set(itertools.product(these, those)) - {(row[i], row[j]) for row in rows}
        assert not missing


@pytest.mark.pairwise(5)
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: "-".join(map(str, row)))
def test_a_swarm_is_one_process(row: tuple[Any, ...], tiny: TinyConfig, tmp_path: Path) -> None:
    reference, swarm = both(tiny(in_matrix(row)), tmp_path)
    assert swarm == reference
    assert len(swarm.losses) == row[0]
    assert [len(of_stage) for of_stage in swarm.val_losses] == [2] * row[0]  # after step 2 and after the last


FURTHER = {
    "uneven stages": {"pipeline.stages": 3, "codec.codec": "int8"},
    "messages of several chunks": {
        "pipeline.stages": 2,
        "pipeline.batch_size": 4,
        "pipeline.microbatches": 1,
        "data.sequence_length": 128,
        "model.width": 128,
        "link.chunk_bytes": 64 * 1024,
        "codec.codec": "fp32",
    },
    "activation checkpointing": {"pipeline.stages": 2, "compute.activation_checkpointing": True},
    "float64": {"pipeline.stages": 2, "compute.dtype": "float64", "codec.codec": "fp64"},
    "eager attention": {"pipeline.stages": 2, "model.attention": "eager"},
}


# formats that draw something from the key at both ends, choose what to send, or carry what they lost
DRAWN = {
    "top-k": {"pipeline.stages": 3, "codec.codec": "topk:k=8"},
    "masks": {"pipeline.stages": 3, "codec.codec": "mask:k=16", "codec.backward": "mask:k=8"},
    "columns": {"pipeline.stages": 2, "codec.codec": "columns:k=16", "compute.dtype": "bfloat16"},
    "rotations": {
        "pipeline.stages": 3,
        "codec.codec": "int4:hadamard=true,centre=true",
        "codec.backward": "int2:hadamard=true",
        "link.link": CAPPED,
    },
    "carried errors": {
        "pipeline.stages": 3,
        "codec.codec": "identity",
        "codec.forward": "int4:centre=true,feedback=true",
        "codec.backward": "topk:k=8,values=int8,feedback=true",
    },
}


@pytest.mark.pairwise(5)
@pytest.mark.parametrize("settings", DRAWN.values(), ids=DRAWN)
def test_a_swarm_is_one_process_whatever_is_drawn_or_carried(
    settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path
) -> None:
    reference, swarm = both(tiny({**settings, "run.eval_every": 2}), tmp_path)
    assert swarm == reference


@pytest.mark.pairwise(3)
@pytest.mark.parametrize("settings", FURTHER.values(), ids=FURTHER)
def test_a_swarm_is_one_process_also_with(settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    reference, swarm = both(tiny(settings), tmp_path)
    assert swarm == reference


CUTS = {
    "embedding and head alone, projectors that learn": {
        "pipeline.stages": 4,
        "pipeline.cut": "0,3,1,0",
        "codec.codec": "mapl:r=8,every=1",
        "compute.dtype": "bfloat16",
    },
    "two stages, no layer in the last": {"pipeline.stages": 2, "pipeline.cut": "4,0", "pipeline.schedule": "zb"},
    "two stages, no layer in the first": {"pipeline.stages": 2, "pipeline.cut": "0,4", "codec.codec": "resbm:b=8"},
    "a slow machine in the middle": {"pipeline.stages": 3, "pipeline.speeds": "1,0.2,1", "codec.codec": "ssn:k=16"},
}


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS)
def test_a_swarm_is_one_process_however_it_is_cut(settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    reference, swarm = both(tiny({**settings, "run.eval_every": 2}), tmp_path)
    assert swarm == reference


ZERO_BUBBLE = {
    "zb, 2 stages": (2, "zb", {"codec.codec": "int8"}),
    "zb, 3 stages, codebooks": (
        3,
        "zb",
        {
            "codec.codec": "mapl:r=8,every=2",
            "codec.forward": "rvq:groups=2,codes=16",
            "codec.backward": "rvq:groups=2,codes=8",
            "compute.dtype": "bfloat16",
        },
    ),
    "zb, 4 stages, bf16": (4, "zb", {"compute.dtype": "bfloat16"}),
    "zb:rtt_ratio=1.3, 4 stages, recomputed": (
        4,
        "zb:rtt_ratio=1.3",
        {"codec.codec": "mapl:r=8,every=1", "compute.activation_checkpointing": True},
    ),
    "zb, 1 stage": (1, "zb", {}),
}


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(("stages", "schedule", "settings"), ZERO_BUBBLE.values(), ids=ZERO_BUBBLE)
def test_a_split_backward_changes_no_bit(
    stages: int, schedule: str, settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path
) -> None:
    """The swarm is one process, and both are what whole backwards come to."""
    settings = {"pipeline.stages": stages, "pipeline.microbatches": 8, "run.eval_every": 2, **settings}
    reference, swarm = both(tiny({**settings, "pipeline.schedule": schedule}), tmp_path)
    assert swarm == reference
    assert swarm == run_in_memory(tiny({**settings, "pipeline.schedule": "1f1b"}), tmp_path / "1f1b")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # as in test_model
def test_a_compiled_swarm_that_splits_is_one_process(tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {"pipeline.stages": 2, "pipeline.schedule": "zb", "compute.compile": True}
    torch.compiler.reset()
    reference, swarm = both(tiny(settings), tmp_path)
    assert swarm == reference


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_gpipe_and_1f1b_are_equal(codec: str, tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {"pipeline.stages": 4, "codec.codec": codec}
    gpipe, one_f_one_b, deeper = (
        run_in_memory(tiny({**settings, "pipeline.schedule": schedule}), tmp_path / schedule)
        for schedule in ("gpipe", "1f1b", "1f1b:rtt_ratio=0.7")
    )
    assert gpipe == one_f_one_b == deeper


@pytest.mark.slow
def test_a_capped_link_changes_no_bit(tiny: TinyConfig, tmp_path: Path) -> None:
    settings = {"pipeline.stages": 4, "codec.codec": "int8"}
    free, capped = (
        run_in_memory(tiny({**settings, "link.link": link}), tmp_path / link[:4]) for link in ("none", CAPPED)
    )
    assert free == capped


DIFFERENT = {
    "seed": ({"run.seed": 1}, {"run.seed": 2}),
    "forward format": ({"codec.forward": "int8"}, {"codec.forward": "int4"}),
    "backward format": ({"codec.backward": "int8"}, {"codec.backward": "int4"}),
    "compute dtype": ({"compute.dtype": "float32"}, {"compute.dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_seen(one: dict[str, Any], other: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    a, b = (
        run_in_memory(tiny({"pipeline.stages": 2, **settings}), tmp_path / name)
        for name, settings in (("one", one), ("other", other))
    )
    assert a.losses[0] != b.losses[0]
    assert a.val_losses != b.val_losses
    assert all(x != y for x, y in zip(a.state_sha256, b.state_sha256, strict=True))


def with_stages(tiny: TinyConfig, directory: Path, settings: dict[str, Any]) -> list[Outcome]:
    return [
        run_in_memory(tiny({"pipeline.stages": stages, **settings}), directory / str(stages)) for stages in (1, 2, 4)
    ]


def test_the_number_of_stages_changes_nothing_else(tiny: TinyConfig, tmp_path: Path) -> None:
    """Without rounding on the wire, and without the clipping whose groups are the stages."""
    exact = {"codec.codec": "fp32", "optim.clip": 0.0}
    whole, *cut = with_stages(tiny, tmp_path, exact)
    ends = {**exact, "pipeline.stages": 3, "pipeline.cut": "0,4,0"}
    for outcome in (*cut, run_in_memory(tiny(ends), tmp_path / "ends")):
        assert outcome.losses[0] == whole.losses[0]
        assert outcome.val_losses[0] == whole.val_losses[0]
        assert outcome.weights.keys() == whole.weights.keys()
        assert all(torch.equal(outcome.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize("settings", [{"codec.codec": "fp32", "optim.clip": 0.1}, {"codec.codec": "bf16"}])
def test_clipping_and_rounding_do_depend_on_the_stages(
    settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path
) -> None:
    losses = [tuple(outcome.losses[0]) for outcome in with_stages(tiny, tmp_path, settings)]
    assert len(set(losses)) == 3


# -- connections that break -------------------------------------------------------------------------------------------

# Each boundary carries 29 tensor frames in a tiny run, so cuts whose frames sum up to 28 all come before its end.
FRAMES_BEFORE_THE_END = 28


def random_frames(seed: int) -> list[int]:
    draw, frames = random.Random(seed), []
    while (frame := draw.randint(1, 8)) + sum(frames) <= FRAMES_BEFORE_THE_END:
        frames.append(frame)
    return frames


CUT_FRAMES = {
    "in every greeting": [1, 2] * 9,
    "right after the greetings": [3] * 9,
    "later and later": [4, 5, 6, 7],
    **{f"random {seed}": random_frames(seed) for seed in range(2)},
}


@pytest.mark.pairwise(3)
@pytest.mark.parametrize("at", ["read", "write"])
@pytest.mark.parametrize("frames", CUT_FRAMES.values(), ids=CUT_FRAMES)
def test_broken_connections_change_no_bit(frames: list[int], at: Any, tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 3, "codec.codec": "int8"})
    cuts = {0: [Cut(frame=frame, at=at) for frame in frames], 1: [Cut(frame=frame, at=at) for frame in frames[::-1]]}
    disturbed = run_in_memory(config, tmp_path / "swarm", cuts=cuts)
    assert disturbed.connections == {0: len(frames) + 1, 1: len(frames) + 1}
    assert disturbed == run_reference(config, tmp_path / "reference")


def test_a_message_that_is_cut_in_half_arrives_whole(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(FURTHER["messages of several chunks"])
    assert 3 * config.link.chunk_bytes < 4 * 128 * 128 * 4  # four sequences in fp32
    cuts = [Cut(frame=frame, at=at) for frame in (4, 5, 6) for at in ("read", "write")]
    disturbed = run_in_memory(config, tmp_path / "swarm", cuts={0: cuts})
    assert disturbed.connections == {0: len(cuts) + 1}
    assert disturbed.sent_bytes["retransmission"] > config.link.chunk_bytes
    assert disturbed == run_reference(config, tmp_path / "reference")


# -- real processes ---------------------------------------------------------------------------------------------------

PROCESSES = {
    "one stage": {"pipeline.stages": 1},
    "four stages, 1f1b, int8 and int4": {
        "pipeline.stages": 4,
        "pipeline.schedule": "1f1b",
        "codec.forward": "int8",
        "codec.backward": "int4",
        "run.eval_every": 2,
    },
    "three stages whose steps overlap": {
        "pipeline.stages": 3,
        "pipeline.schedule": "zb:rtt_ratio=1",
        "pipeline.delay": 1,
        "codec.codec": "mapl:r=8,every=2",
        "link.link": CAPPED,
        "run.steps": 8,
        "checkpoint.every": 5,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", PROCESSES.values(), ids=PROCESSES)
def test_a_swarm_of_processes_is_one_process(settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(settings)
    run_local(config, tmp_path / "swarm", quiet=True, forks=config.pipeline.stages > 1 and forks())
    swarm = read_outcome(tmp_path / "swarm", config.pipeline.stages)
    assert swarm == run_reference(config, tmp_path / "reference")


@pytest.mark.slow
def test_the_command_line_says_the_same_of_both(tiny: TinyConfig, tmp_path: Path) -> None:
    """Two stages, gpipe, bf16 autocast, bf16 on a capped link, started as a user would."""
    (tmp_path / "run.toml").write_text(dump_config(tiny({"compute.dtype": "bfloat16", "run.eval_every": 1})))
    options = ["--stages", "2", "--schedule", "gpipe", "--codec", "bf16", "--link", CAPPED, "--json"]

    def up(name: str, *more: str) -> tuple[dict[str, Any], Outcome]:
        command = [sys.executable, "-m", "thinpipe.cli", "up", "--config", str(tmp_path / "run.toml"), *options]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name), *more],
            env=node_environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), read_outcome(tmp_path / name, 2)

    (swarm, swarm_outcome), (reference, reference_outcome) = up("swarm"), up("reference", "--one-process")
    assert swarm_outcome == reference_outcome
    assert (swarm["mode"], reference["mode"]) == ("swarm", "one-process")
    for key in ("first_loss", "train_loss", "val_loss"):
        assert swarm[key] == reference[key]
    assert [stage["state_sha256"] for stage in swarm["stages"]] == reference_outcome.state_sha256
