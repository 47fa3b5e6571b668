"""A run whose compute is emulated sends what training sends, takes the time that it was told to, and says how late."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.config import ConfigError
from thinpipe.node.generation import context_parts_of
from thinpipe.node.preparation import prepare
from thinpipe.node.stage_state import StateError
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.messages import Kind, Message
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .in_memory import run_in_memory, run_reference
from .test_plan import CODECS

EMULATED = {"compute.emulate": "tiny@2x1ms+2ms", "checkpoint.every": 0, "pipeline.stages": 2}
CONTENT = ("activation", "gradient", "token_ids", "dictionary", "projector_gradient")


@pytest.mark.pairwise(2, slow=6)
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_the_bytes_are_those_of_training(codec: dict[str, str], delay: int, tiny: TinyConfig, tmp_path: Path) -> None:
    """To the byte, but for the first step, which brings whole dictionaries."""
    runs: dict[str, Any] = {"emulated": (run_in_memory, EMULATED), "trained": (run_reference, {"pipeline.stages": 2})}
    sent: dict[tuple[str, int], Counter[str]] = {}
    for name, (run, settings) in runs.items():
        for steps in (4, 8):
            more = {"model.vocab_size": 512, "run.steps": steps, "pipeline.delay": delay}
            config = tiny({**more, **codec, **settings})
            sent[name, steps] = run(config, tmp_path / f"{name}-{steps}").sent_bytes
    emulated, trained = (
        {row: sent[name, 8][row] - sent[name, 4][row] for row in CONTENT} for name in ("emulated", "trained")
    )
    assert trained["activation"] > 0
    assert emulated == trained


def test_compute_takes_its_time_and_says_how_late_it_was(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({**EMULATED, "run.steps": 3})
    run_in_memory(config, tmp_path)
    for stage in range(2):
        steps = [record for record in read_records(tmp_path / f"stage-{stage}.jsonl") if record["event"] == "step"]
        assert len(steps) == 3
        for step in steps:
            told = config.pipeline.microbatches * 0.003
            assert step["codec"]["emulated_s"] == pytest.approx(told)
            assert step["codec"]["late_s"] >= 0
            assert step["compute_s"] >= told
            assert step["seconds"] >= told


def test_a_stage_s_record_says_how_many_layers_it_has(tiny: TinyConfig, tmp_path: Path) -> None:
    run_in_memory(tiny({**EMULATED, "pipeline.cut": "3,1"}), tmp_path)
    ends = [read_records(tmp_path / f"stage-{stage}.jsonl")[-1] for stage in range(2)]
    assert [(end["event"], end["layers"]) for end in ends] == [("end", 3), ("end", 1)]


@pytest.mark.pairwise(6)
@pytest.mark.parametrize(
    "codec",
    ["mapl:r=8,anchors=none,context=2", "mapl:r=8,every=2", "identity:table=1", "resbm:b=8,anchors=full", "ssn:k=8"],
)
@pytest.mark.parametrize(
    "average", ["outer:every=4,fragments=2", "sparta:p=0.2,every=2", "gradients:format=int8", "outer:format=topk:k=16"]
)
def test_contributions_of_lanes_have_the_size_of_real_ones(tiny: TinyConfig, codec: str, average: str) -> None:
    """To the byte, whatever the codec trains of the model, of tokens and at boundaries; but for the last round, which
    is there for the weights."""
    lanes = {"lanes.count": 2, "lanes.average": average, "codec.codec": codec, "model.vocab_size": 512, "run.steps": 6}
    for stage in range(2):
        real = prepare(tiny({**lanes, "pipeline.stages": 2}), stage, 1)[0].averager
        emulated = prepare(tiny({**lanes, **EMULATED}), stage, 1)[0].averager
        assert real
        assert emulated
        for number in range(real.plan.count):
            round_ = real.plan.round(number)
            made = emulated.contribute(round_)
            left_out = round_.last and not average.startswith("gradients")
            size = 1 if left_out else real.contribution_bytes(round_)
            assert len(made) == emulated.contribution_bytes(round_) == size > 0
            assert emulated.use(round_, {0: made}).members == [0, 1]


def test_a_message_of_another_size_is_refused(tiny: TinyConfig) -> None:
    upper, _ = prepare(tiny(EMULATED), 0)
    lower, _ = prepare(tiny(EMULATED), 1)
    assert upper.downstream_endpoint
    assert lower.upstream_endpoint
    short = Message(kind=Kind.ACTIVATION, step=1, microbatch=0, body=b"short")
    with pytest.raises(RemoteProtocolError, match="activation of step 1, microbatch 0: 5 bytes"):
        lower.upstream_endpoint.unpack_activation(short)
    with pytest.raises(RemoteProtocolError, match="gradient of step 1, microbatch 0: 5 bytes"):
        upper.downstream_endpoint.unpack_gradient(Message(kind=Kind.GRADIENT, step=1, microbatch=0, body=b"short"))


def test_it_exchanges_nothing_with_other_lanes(tiny: TinyConfig) -> None:
    config = tiny(EMULATED)
    stage, _ = prepare(config, 0)
    assert context_parts_of(config, stage) is None


def test_there_is_no_state(tiny: TinyConfig) -> None:
    stage, _ = prepare(tiny(EMULATED), 0)
    with pytest.raises(StateError, match="computes nothing"):
        stage.snapshot()
    with pytest.raises(ConfigError, match=r"no state to keep; set checkpoint\.every = 0"):
        tiny({**EMULATED, "checkpoint.every": 5})
    with pytest.raises(ConfigError, match=r"pipeline\.stages is 3"):
        prepare(tiny({**EMULATED, "pipeline.stages": 3}), 0)
