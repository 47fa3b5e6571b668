"""`thinpipe plan`: message sizes are those that nodes send, times those of a run, and figures follow from both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.measuring.emulated_machine import VOCABULARY, EmulatedMachine, times_at
from thinpipe.node.measuring.message_sizes import Sizes
from thinpipe.node.measuring.schedule_search import with_schedule
from thinpipe.node.measuring.stage_times import times_calibrated
from thinpipe.node.model import ModelError, resolve_model
from thinpipe.node.preparation import resolve_architecture
from thinpipe.node.stage_costs import operations
from typer.testing import CliRunner

from .conftest import TinyConfig
from .in_memory import run_reference
from .test_dense_comparison import MICROBATCH_S, recorded

CODECS: dict[str, dict[str, str]] = {
    "dense": {"codec.codec": "bf16"},
    "ssn": {"codec.codec": "ssn:k=8", "codec.forward": "int8", "codec.backward": "int4"},
    "resbm": {"codec.codec": "resbm:b=8", "codec.forward": "int4", "codec.backward": "int3"},
    "mapl, seldom": {"codec.codec": "mapl:r=8,anchors=full,every=4", "codec.forward": "int4", "codec.backward": "int3"},
    "mapl, always": {"codec.codec": "mapl:r=8,anchors=full,every=1", "codec.forward": "int8", "codec.backward": "int4"},
    "codebooks": {
        "codec.codec": "mapl:r=8,anchors=full,every=4",
        "codec.forward": "rvq:groups=2,codes=16,delta=random/4",
        "codec.backward": "rvq:groups=2,codes=8,delta=full",
    },
    "what is kept": {"codec.codec": "identity", "codec.forward": "columns:k=9", "codec.backward": "topk:k=5"},
    "what is drawn": {"codec.codec": "mask:k=9", "codec.backward": "int2:hadamard=true,centre=true"},
}


@pytest.mark.pairwise(1, slow=3)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_messages_have_the_bytes_that_a_run_sends(codec: dict[str, str], tiny: TinyConfig, tmp_path: Path) -> None:
    """The first step apart, which brings snapshots."""
    sent = {}
    for steps in (8, 16):
        config: RunConfig = tiny({"pipeline.stages": 2, "run.steps": steps, **codec})
        outcome = run_reference(config, tmp_path / str(steps))
        sent[steps] = sum(nbytes for row, nbytes in outcome.sent_bytes.items() if row != "evaluation")
    config = tiny({"pipeline.stages": 2, **codec})
    architecture = resolve_model(config.model, vocab_size=512, sequence_length=config.data.sequence_length)
    boundary = Sizes(config, architecture).boundary()
    planned = 8 * config.pipeline.microbatches * (boundary.forward_bytes + boundary.backward_bytes)
    assert planned == pytest.approx(sent[16] - sent[8], rel=0.02)


def test_a_gradient_norm_has_the_bytes_that_a_run_sends(tiny: TinyConfig, tmp_path: Path) -> None:
    """What the wire carries more than without one, framing and all."""
    sent = {
        norm: run_reference(config, tmp_path / norm).sent_bytes
        for norm in ("stage", "global")
        for config in [tiny({"pipeline.stages": 2, "codec.codec": "bf16", "optim.clip_norm": norm})]
    }
    config = tiny({"pipeline.stages": 2, "optim.clip_norm": "global"})
    architecture = resolve_model(config.model, vocab_size=512, sequence_length=config.data.sequence_length)
    more = sent["global"].total() - sent["stage"].total()
    assert more == pytest.approx(2 * config.run.steps * Sizes(config, architecture).boundary().norm_bytes, abs=12)


def test_work_grows_as_the_model_does(tiny: TinyConfig) -> None:
    def seconds(**settings: Any) -> list[float]:
        config = tiny({name.replace("__", "."): value for name, value in settings.items()})
        length = config.data.sequence_length
        architecture = resolve_model(config.model, vocab_size=512, sequence_length=length)
        return [times.forward_s for times in times_at(config, architecture, 1.0)]

    two = seconds(pipeline__stages=2, model__layers=4)
    four = seconds(pipeline__stages=4, model__layers=4)
    assert two[0] == pytest.approx(2 * four[0])
    assert four[-1] > four[0] == four[1]  # the head
    wide = seconds(pipeline__stages=4, model__layers=4, model__width=128)
    assert 3 < wide[0] / four[0] < 4.1  # matrices four times as large, attention twice


def test_a_layer_has_the_multiplications_of_its_matrices(tiny: TinyConfig) -> None:
    config = tiny({"pipeline.stages": 2, "model.layers": 2, "model.width": 64})
    architecture = resolve_model(config.model, vocab_size=512, sequence_length=config.data.sequence_length)
    tokens = config.microbatch_size * config.data.sequence_length
    matrices = 4 * 64 * 64 + 3 * 64 * architecture.intermediate_size
    expected = tokens * (2 * matrices + 2 * config.data.sequence_length * 64) / 1e12
    assert times_at(config, architecture, 1.0)[0].forward_s == pytest.approx(expected)
    assert times_at(config, architecture, 2.0)[0].backward_s == pytest.approx(expected)  # twice the work and the rate


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_link_that_is_wide_enough_changes_nothing() -> None:
    figures = planned("--emulate", "tiny@4x1tflops", "--codec", "mapl", "--microbatches", "8")
    assert figures["tokens_per_s"] == pytest.approx(figures["uncapped_tokens_per_s"])
    assert [boundary["compute_bound_at_ratio"] for boundary in figures["boundaries"]] == [None] * 3
    assert figures["bottleneck"] == "compute of stage 3"


def test_a_ratio_makes_a_boundary_compute_bound() -> None:
    """At the ratio that the plan names for dense training, the wires are no longer the bottleneck."""
    machine = ("--emulate", "tiny@2x0.05tflops", "--link", "5mbit", "--set", "model.vocab_size=1024")
    dense = planned(*machine, "--codec", "bf16")
    ratio = dense["boundaries"][0]["compute_bound_at_ratio"]
    assert dense["bottleneck"].startswith("the link")
    assert 1 < ratio < 30
    codec = f"mapl:r={int(256 / ratio) - 1},every=64"
    narrow = planned(*machine, "--codec", codec, "--forward", "bf16", "--backward", "bf16")
    assert narrow["bottleneck"].startswith("compute")
    wide = planned(
        *machine, "--codec", f"mapl:r={int(512 / ratio)},every=64", "--forward", "bf16", "--backward", "bf16"
    )
    assert wide["bottleneck"].startswith("the link")


def test_a_budget_of_bits_is_what_links_carry_while_stages_compute() -> None:
    machine = ("--emulate", "tiny@2x0.05tflops", "--link", "1mbit", "--set", "model.vocab_size=1024")
    bits = planned(*machine, "--codec", "mapl:r=auto,bits=270")["boundaries"][0]["budget_bits"]
    assert 200 < bits < 350
    for given, bottleneck in ((bits - 8, "compute"), (bits + 8, "the link")):
        figures = planned(*machine, "--codec", f"mapl:r=auto,bits={given}")
        assert figures["bottleneck"].startswith(bottleneck)
    assert planned(*machine[:2], "--codec", "mapl")["boundaries"][0]["budget_bits"] is None
    assert planned(*machine[:2], "--link", "1kbit", "--codec", "mapl")["boundaries"][0]["budget_bits"] == 0


def test_a_deeper_schedule_hides_the_latency() -> None:
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--link", "300mbit,25ms", "--batch-size", "512")
    machine += ("--sequence-length", "2048", "--set", "pipeline.cut=equal")
    plain, deep = (planned(*machine, "--schedule", schedule) for schedule in ("1f1b", "1f1b:rtt_ratio=1"))
    shares = [figures["tokens_per_s"] / figures["uncapped_tokens_per_s"] for figures in (plain, deep)]
    assert shares[0] < 0.9
    assert shares[1] > 0.95


def test_zero_bubble_hides_some_of_the_latency() -> None:
    """The depth of 1F1B; messages up leave earlier, and weight gradients fill the wait."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--link", "300mbit,25ms", "--batch-size", "512")
    machine += ("--sequence-length", "2048")
    whole, split = (planned(*machine, "--schedule", schedule) for schedule in ("1f1b", "zb"))
    assert whole["tokens_per_s"] < 0.95 * split["tokens_per_s"]
    assert [stage["microbatches_in_flight"] for stage in split["stages"]] == [4] * 4
    first, *_, last = split["stages"]
    assert first["weight_gradient_s"] < first["forward_s"] == first["backward_s"] / 2  # attention has no weights
    assert last["weight_gradient_s"] / last["forward_s"] > first["weight_gradient_s"] / first["forward_s"]  # the head


def test_a_norm_over_all_stages_costs_time_where_weight_gradients_are_put_off() -> None:
    """Stage 0 waits for the others' and for three hops; and some eighty bytes a step, boundary and direction."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--link", "80mbit,25ms")
    for schedule in ("1f1b", "zb:rtt_ratio=6"):
        by_stage, by_all = (
            planned(*machine, "--schedule", schedule, "--set", f"optim.clip_norm={norm}")
            for norm in ("stage", "global")
        )
        later_s = by_all["step_s"] - by_stage["step_s"]
        if schedule == "1f1b":
            assert later_s == pytest.approx(0, abs=1e-4)
        else:
            assert later_s > 3 * 0.025
        assert 0.99 < by_all["ratio"] / by_stage["ratio"] < 1


@pytest.mark.slow
def test_people_see_it_and_may_have_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    arguments = [
        "--emulate",
        "tiny@3x1tflops",
        "--link",
        "10mbit,5ms",
        "--microbatches",
        "8",
        "--timeline",
        str(picture),
    ]
    arguments += ["--schedule", "zb"]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    assert "simulated, not measured" in result.stdout
    assert "compute-bound from" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


REFUSED: list[tuple[list[str], str]] = [
    ([], "say how fast stages compute: --emulate 150m@4x66tflops, or --from a run"),
    (["--emulate", "tiny@4x1tflops", "--from", "runs"], "say how fast stages compute"),
    (
        ["--emulate", "tiny@4"],
        r"an emulated machine is PRESET@STAGESxRATEtflops such as 150m@4x66tflops, .*; got 'tiny@4'",
    ),
    (["--emulate", "tiny@4x0tflops"], r"the emulated speed or times have to be above zero"),
    (["--emulate", "tiny@4x5ms+0ms"], r"the emulated speed or times have to be above zero"),
    (["--emulate", "tiny@4x5min+1ms"], r"an emulated machine is"),
    (["--emulate", "8b@8of4x66tflops"], r"an emulated machine cannot have 8 of 4 stages"),
    (["--emulate", "huge@4x1tflops"], r"unknown model.preset 'huge'"),
    (["--emulate", "tiny@64x1tflops"], r"64 stages, but the model has 4 layers"),
    (["--emulate", "tiny@4x1tflops", "--link", "300"], r"link '300'"),
    (
        ["--emulate", "tiny@4x5ms+10ms", "--set", "pipeline.stages=2"],
        r"pipeline\.stages is 2, but the emulated machine has 4; omit it",
    ),
    (
        ["--emulate", "tiny@2of4x1tflops", "--cut", "3,1"],
        r"pipeline\.cut = 3,1: 2 of 4 stages are emulated as equal inner ones; omit it",
    ),
    (
        ["--emulate", "tiny@4x1tflops", "--schedule", "gpipe:rtt_ratio=auto"],
        r"schedule 'gpipe:rtt_ratio=auto': there is no depth to choose for gpipe; say .* or gpipe$",
    ),
    (["--emulate", "tiny@4x1tflops", "--codec", "mapl:r=999"], r"r=999"),
    (["--emulate", "tiny@4x1tflops", "--rule", "none"], r"--rule: there is no 'none'; choose duplex or shared"),
    (["--from", "nowhere"], r"--from nowhere: there is no run.toml"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_what_cannot_be_planned_is_refused(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert re.search(expected, line), line


def test_a_pace_is_spelled_one_way() -> None:
    assert EmulatedMachine.parse("150m@4x66.5tflops") == EmulatedMachine(preset="150m", stages=4, whole=4, tflops=66.5)
    assert EmulatedMachine.parse("8b@8of32x66tflops") == EmulatedMachine(preset="8b", stages=8, whole=32, tflops=66)
    assert EmulatedMachine.parse("1b@4x5ms+0.01s") == EmulatedMachine(
        preset="1b", stages=4, whole=4, seconds=(0.005, 0.01)
    )
    for text in ("", "150m", "150m@4x66", "150m@0x66tflops", "150M@4x66tflops", "150m@4x-1tflops", "150m@4x5ms"):
        with pytest.raises(ConfigError, match="an emulated machine is"):
            EmulatedMachine.parse(text)


@pytest.mark.slow
def test_a_part_of_a_pipeline_has_inner_stages_only() -> None:
    whole = planned("--emulate", "8b@32x66tflops")["stages"]
    part = planned("--emulate", "8b@8of32x66tflops")["stages"]
    assert [stage["forward_s"] for stage in part] == pytest.approx([whole[1]["forward_s"]] * 8)
    assert planned("--emulate", "8b@8of32x5ms+10ms")["stages"][3]["backward_s"] == 0.01


@pytest.mark.slow
def test_the_depth_is_found_by_simulation() -> None:
    """Deep where links take long, plain where they do not; never deeper than helps."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--batch-size", "512", "--sequence-length", "2048")
    machine += ("--set", "pipeline.cut=equal")
    auto = ("--schedule", "1f1b:rtt_ratio=auto")
    assert planned(*machine, *auto)["schedule"] == "1f1b"
    found = planned(*machine, *auto, "--link", "80mbit,25ms")
    deepest = planned(*machine, "--schedule", "1f1b:rtt_ratio=24", "--link", "80mbit,25ms")
    assert found["schedule"].startswith("1f1b:rtt_ratio=")
    assert found["step_s"] <= 1.003 * deepest["step_s"]
    in_flight = [sum(stage["microbatches_in_flight"] for stage in each["stages"]) for each in (found, deepest)]
    assert in_flight[0] < in_flight[1]


def test_a_calibrated_stage_takes_what_its_part_of_the_work_takes(tiny: TinyConfig) -> None:
    """An embedding alone takes next to nothing; the middle is as long as its layers are many."""
    config = tiny({"pipeline.stages": 3, "pipeline.cut": "0,3,1", "codec.codec": "bf16"})
    first, middle, last = times_calibrated(config, resolve_architecture(config))
    assert first.forward_s == 0
    assert 0 < last.forward_s < middle.forward_s
    assert middle.backward_s == 2 * middle.forward_s


def test_a_run_finds_its_depth_before_the_first_step(tiny: TinyConfig) -> None:
    config = tiny({"pipeline.stages": 2, "link.link": "100mbit,200ms"})
    assert with_schedule(config, "1f1b:rtt_ratio=auto").pipeline.schedule.startswith("1f1b:rtt_ratio=")
    assert with_schedule(tiny({"pipeline.stages": 2}), "1f1b:rtt_ratio=auto").pipeline.schedule == "1f1b"


def test_a_depth_is_not_sought_with_a_model_that_does_not_compute(odd_heads: Path, tiny: TinyConfig) -> None:
    with pytest.raises(ModelError, match=r"a layer and the head of architecture 'llama' do not compute: .*; choose"):
        with_schedule(tiny({"pipeline.stages": 2, "model.path": str(odd_heads)}), "1f1b:rtt_ratio=auto")
    with pytest.raises(ConfigError, match="there is no depth to choose for gpipe"):  # nor anything timed in vain
        with_schedule(tiny({"pipeline.stages": 2, "model.path": str(odd_heads)}), "gpipe:rtt_ratio=auto")


def test_stages_as_fast_as_stated_differ_by_their_machines_alone() -> None:
    """What stages compute, over what their machines could: all compute the same, and the speeds' sum is 2.75."""
    machine = ("--emulate", "150m@4x5ms+10ms", "--microbatches", "8", "--speeds", "1,1,0.5,0.25")
    found = planned(*machine)
    assert [stage["forward_s"] for stage in found["stages"]] == pytest.approx([0.005, 0.005, 0.01, 0.02])
    assert [stage["backward_s"] for stage in found["stages"]] == pytest.approx([0.01, 0.01, 0.02, 0.04])
    assert found["machines_used"] == pytest.approx(8 * 4 * 0.015 / 2.75 / found["step_s"])
    assert found["gain_over_equal_cut"] is None  # the seconds are the same for any cut


def test_each_cut_has_the_depth_that_it_needs() -> None:
    """And what one gains over stages of equal length is told by what either would be planned to do."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--microbatches", "16", "--batch-size", "64")
    machine += ("--link", "80mbit,25ms", "--schedule", "1f1b:rtt_ratio=auto")
    found, equal = planned(*machine), planned(*machine, "--cut", "equal")
    assert found["schedule"] != equal["schedule"]
    assert found["gain_over_equal_cut"] == pytest.approx(found["tokens_per_s"] / equal["tokens_per_s"])


def test_times_of_a_run_are_carried_over_to_another_cut_batch_and_model(tiny: TinyConfig, tmp_path: Path) -> None:
    ran = tiny({"pipeline.stages": 2, "pipeline.cut": "equal"})
    run = recorded(tmp_path / "run", ran)
    (run / "run.toml").write_text(dump_config(ran))
    costs = operations(ran, resolve_architecture(ran))

    def forward_s(*arguments: str) -> list[float]:
        found = planned("--from", str(run), *arguments)
        return [stage["forward_s"] / (MICROBATCH_S / 3) for stage in found["stages"]]

    found = planned("--from", str(run), "--cut", "3,1")
    assert [stage["layers"] for stage in found["stages"]] == [3, 1]
    behind = (costs.layer + costs.head) / (2 * costs.layer + costs.head)
    assert forward_s("--cut", "3,1") == pytest.approx([3 / 2, behind])
    assert forward_s() == pytest.approx([1, 1])
    assert forward_s("--codec", "mapl:r=8", "--cut", "equal") == pytest.approx([1, 1])
    assert forward_s("--microbatches", "8") == pytest.approx([1 / 2, 1 / 2])
    assert forward_s("--batch-size", "16") == pytest.approx([2, 2])
    long, attention = forward_s("--sequence-length", "64"), costs.attention / costs.layer
    assert long[0] == pytest.approx(2 * (1 + attention))
    assert 2 < long[1] < long[0]
    assert 3 < forward_s("--set", "model.width=128")[0] < 4.1
    for stages in ("1", "3"):
        result = CliRunner().invoke(app, ["plan", "--from", str(run), "--set", f"pipeline.stages={stages}"])
        assert result.exit_code == 2
        assert f"times of 2 stages say nothing of {stages}; keep pipeline.stages" in result.stderr


def test_an_emulated_run_on_record_has_the_model_that_it_emulated(tiny: TinyConfig, tmp_path: Path) -> None:
    """With the vocabulary that no text of this machine has."""
    settings = {"pipeline.stages": 2, "compute.emulate": "tiny@2x1tflops", "checkpoint.every": 0}
    ran = tiny({**settings, "model.vocab_size": None})
    run = recorded(tmp_path / "run", ran)
    (run / "run.toml").write_text(dump_config(ran))
    found = planned("--from", str(run), "--cut", "auto")
    assert [stage["layers"] for stage in found["stages"]] == [4, 0]  # 32,768 rows are as much as forty layers of these
    told = planned("--from", str(run), "--cut", "2,2")
    forward_s = [stage["forward_s"] / (MICROBATCH_S / 3) for stage in told["stages"]]
    layer, head = operations(ran, resolve_architecture(ran)).layer, 2 * VOCABULARY * 64
    assert forward_s == pytest.approx([1 / 2, 1 + 2 * layer / head])


def test_the_cut_and_what_it_gains_are_said() -> None:
    """150m: the head is as much work as three of its eight layers."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "int8", "--schedule", "zb", "--microbatches", "32")
    found = planned(*machine)
    assert [stage["layers"] for stage in found["stages"]] == [3, 3, 2, 0]
    assert found["gain_over_equal_cut"] > 1.5
    assert found["machines_used"] > 0.8
    equal = planned(*machine, "--cut", "equal")
    assert equal["gain_over_equal_cut"] is None
    assert found["gain_over_equal_cut"] == pytest.approx(found["tokens_per_s"] / equal["tokens_per_s"])
    mixed = planned(*machine, "--speeds", "1,1,0.5,0.25")
    assert [stage["layers"] for stage in mixed["stages"]] == [4, 3, 1, 0]
    head_s = [each["stages"][3]["forward_s"] for each in (found, mixed)]
    assert head_s[1] == pytest.approx(4 * head_s[0])
    told = CliRunner().invoke(app, ["plan", *machine, "--cut", "2,2,2,2"], env={"COLUMNS": "120"})
    assert told.stdout.splitlines()[-1] == "layers of the stages: 2,2,2,2"


@pytest.mark.parametrize(
    ("link", "schedule", "said"),
    [
        ("300mbit,25ms", "1f1b", True),
        ("300mbit,25ms", "1f1b:rtt_ratio=10", False),
        ("2mbit,5ms", "1f1b", False),  # a deeper schedule makes no wire wider
        ("none", "1f1b", False),
    ],
)
def test_a_deeper_schedule_is_named_where_only_delay_costs(link: str, schedule: str, said: bool) -> None:
    machine = ("--emulate", "150m@4x66tflops", "--link", link, "--schedule", schedule)
    told = CliRunner().invoke(app, ["plan", *machine], env={"COLUMNS": "120"})
    assert told.exit_code == 0, told.output
    assert ("--schedule 1f1b:rtt_ratio=auto" in told.stdout) == said


def test_an_order_of_the_machines_that_is_faster_is_said() -> None:
    """The head and a layer that a narrow boundary needs are on the last machine."""
    machine = ("--emulate", "150m@4x66tflops", "--codec", "mapl", "--schedule", "zb:rtt_ratio=2")
    found = planned(*machine, "--speeds", "1,1,0.5,0.25")
    assert [stage["layers"] for stage in found["stages"]][-1] == 1
    better = found["better_order"]
    assert better["speeds"][-1] == 1
    assert better["gain"] > 3
    order = ",".join(map(str, better["speeds"]))
    as_said = planned(*machine, "--speeds", order)
    assert as_said["better_order"] is None
    assert as_said["tokens_per_s"] == pytest.approx(better["gain"] * found["tokens_per_s"])
    told = CliRunner().invoke(app, ["plan", *machine, "--speeds", "1,1,0.5,0.25"], env={"COLUMNS": "200"})
    assert told.stdout.splitlines()[-1].startswith("the same machines in another order, --speeds ")
    assert planned(*machine, "--speeds", "1,1,0.5,0.25", "--cut", "2,2,2,2")["better_order"] is None


def test_steps_that_overlap_are_planned_and_proposed() -> None:
    """Where a depth has been found and stages wait still, the plan says what is left to do."""
    asked = ["plan", "--emulate", "150m@4x66tflops", "--link", "80mbit,50ms", "--batch-size", "64", "--microbatches"]
    asked += ["8", "--schedule", "1f1b:rtt_ratio=auto"]
    flushed, late = (CliRunner().invoke(app, [*asked, *more]) for more in ([], ["--set", "pipeline.delay=1"]))
    assert "--set pipeline.delay=1 does the next step's microbatches meanwhile" in " ".join(flushed.stdout.split())
    assert "steps overlap, over 80mbit,50ms" in " ".join(late.stdout.split())
    assert "pipeline.delay" not in late.stdout
    figures = [
        json.loads(CliRunner().invoke(app, [*asked, "--json", "--set", f"pipeline.delay={delay}"]).stdout)
        for delay in (0, 1)
    ]
    assert [each["delay"] for each in figures] == [0, 1]
    assert figures[1]["tokens_per_s"] > 1.5 * figures[0]["tokens_per_s"]
    assert max(stage["microbatches_in_flight"] for stage in figures[1]["stages"]) <= 16
