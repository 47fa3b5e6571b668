"""`thinpipe plan --chunks`: sizes and operations against arithmetic, times against the rest of the plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, merge, parse_config
from thinpipe.node.context.context_parts import message_of
from thinpipe.node.context.exchange import ContextKey
from thinpipe.node.measuring.chunks_plan import FREE, SETTLED, StageExchange
from thinpipe.node.measuring.context_plan import context_sizes, framed, stored_bytes
from thinpipe.node.measuring.emulated_machine import VOCABULARY, times_at
from thinpipe.node.measuring.message_sizes import accounted
from thinpipe.node.model import resolve_model
from typer.testing import CliRunner

from .conftest import TinyConfig
from .test_dense_comparison import MICROBATCH_S, recorded
from .test_plan import planned

TOKENS = 131072 // 16  # of a segment
PUBLISHED = (
    *("--emulate", "800m@1x121.11tflops", "--chunks", "8", "--sequence-length", "131072", "--batch-size", "1"),
    *("--microbatches", "1", "--link", "300mbit,25ms", "--set", "compute.dtype=bfloat16"),
)
SMALL = (
    *("--emulate", "tiny@2x0.5tflops", "--chunks", "4", "--sequence-length", "2048", "--batch-size", "8"),
    *("--microbatches", "4", "--link", "20mbit,5ms"),
)


def config_of(method: str = "mos", **changed: Any) -> RunConfig:
    settings = {
        "model.preset": "800m",
        "pipeline.stages": 1,
        "pipeline.batch_size": 1,
        "pipeline.microbatches": 1,
        "data.sequence_length": 131072,
        "lanes.count": 8,
        "context.method": method,
        "link.link": "300mbit,25ms",
        "compute.dtype": "bfloat16",
    }
    return parse_config(merge({}, {**settings, **{key.replace("__", "."): value for key, value in changed.items()}}))


def architecture_of(config: RunConfig) -> Any:
    return resolve_model(config.model, vocab_size=VOCABULARY, sequence_length=config.data.sequence_length)


def sizes_of(config: RunConfig, step: int = SETTLED) -> Any:
    return context_sizes(config, architecture_of(config), step=step)


def chunks(*arguments: str, machine: Sequence[str] = PUBLISHED) -> dict[str, Any]:
    return planned(*machine, *arguments)["chunks"]


def test_sizes_are_those_of_the_numbers_and_a_little_framing() -> None:
    """`mos` as published: 41 of 2,048 numbers of keys, 102 of values, and two angles."""
    sizes = sizes_of(config_of())
    exact = TOKENS * 143 * 2 + 2 * 4
    assert sizes.tokens == TOKENS
    assert exact < sizes.forward_bytes == sizes.backward_bytes < 1.003 * exact
    assert sizes.stored_bytes == exact
    assert stored_bytes(config_of(), sizes, layers=8, in_flight=3) == 14 * exact * 24
    packed = sizes_of(config_of("full:format=int4,backward=int8"))
    assert packed.forward_bytes == pytest.approx(TOKENS * 4096 * (0.5 + 2 / 128), rel=0.01)  # a scale for 128 numbers
    assert packed.backward_bytes == pytest.approx(TOKENS * 4096 * (1 + 2 / 128), rel=0.01)
    assert sizes_of(config_of(compute__dtype="float32")).forward_bytes > 1.99 * exact
    warm = config_of("mos:warm=300")
    assert sizes_of(warm) == sizes
    assert sizes_of(warm, step=299).forward_bytes == pytest.approx(TOKENS * 4096 * 2, rel=0.003)


@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_lanes_do_together_what_one_machine_would(order: str) -> None:
    """The operations of all lanes are those that the emulated machine counts."""
    config = config_of(context__order=order)
    architecture = architecture_of(config)
    times = times_at(config, architecture, 100.0)
    exchange = StageExchange(config, architecture, times, [8])
    (one,), (free,) = times, exchange.over(FREE)
    if order == "zigzag":
        assert (free.forward_s, free.backward_s) == pytest.approx((one.forward_s, one.backward_s))
    else:
        assert free.forward_s > 1.5 * one.forward_s  # its last lane has nearly twice the attention
    assert exchange.exposed_s(exchange.instant) == [(0, 0)]
    assert free.weight_gradient_s == one.weight_gradient_s


def test_narrow_keys_and_values_are_less_waited_for() -> None:
    """The published case: 800M parameters, 131,072 tokens over 8 chunks, 300 Mb/s and 25 ms. At 121 TFLOP/s each, eight
    machines do 56,000 tokens/s where links are instant; keys and values in bf16 leave them 2,200."""
    full, mos = chunks("--context", "full"), chunks("--context", "mos")
    assert full["uncapped_tokens_per_s"] == mos["uncapped_tokens_per_s"] == pytest.approx(56_000, rel=0.001)
    assert full["tokens_per_s"] == pytest.approx(2_235, rel=0.01)
    assert mos["tokens_per_s"] == pytest.approx(35_800, rel=0.01)  # of 55,000 published
    assert (full["ratio"], mos["ratio"]) == pytest.approx((1, 28.6), rel=0.01)
    assert mos["tokens_per_s"] < mos["no_latency_tokens_per_s"] < mos["no_cap_tokens_per_s"] < 56_000
    assert full["bounded_before_averaging_by"] == "keys and values of stage 0, by the rate of their links"
    assert mos["bounded_before_averaging_by"] == "compute of stage 0"
    assert mos["bounded_by"] == "averaging of stage 0"  # 1.6 GB of gradients, for one sequence


def test_two_microbatches_in_flight_hide_what_one_waits_for() -> None:
    """The published case, with two sequences: latency costs nothing any more, and in eight bits keys and values hide
    behind the other sequence."""
    two = ("--batch-size", "2", "--microbatches", "2")
    narrow = "mos:format=int8,backward=int8"
    whole = planned(*PUBLISHED, *two, "--context", narrow)
    found = whole["chunks"]
    assert (found["in_flight"], found["uncapped_tokens_per_s"]) == (2, pytest.approx(56_000, rel=0.001))
    assert found["tokens_per_s"] == pytest.approx(55_210, rel=0.01)
    assert found["otherwise_tokens_per_s"] == pytest.approx(chunks("--context", narrow)["tokens_per_s"])
    assert chunks("--context", "mos", *two)["no_cap_tokens_per_s"] > 0.999 * 56_000
    one = planned(*PUBLISHED, *two, "--context", narrow, "--set", "context.in_flight=1")
    assert one["chunks"]["tokens_per_s"] == pytest.approx(found["otherwise_tokens_per_s"])
    assert one["chunks"]["otherwise_tokens_per_s"] == pytest.approx(found["tokens_per_s"])
    (held,), (single,) = whole["stages"], one["stages"]
    assert held["activation_bytes_in_flight"] == 2 * single["activation_bytes_in_flight"]
    assert (held["microbatches_in_flight"], single["microbatches_in_flight"]) == (2, 1)
    assert chunks("--context", "mos")["otherwise_tokens_per_s"] is None


def test_pairs_in_a_pipeline_are_simulated_as_stages_do_them() -> None:
    """Two stages, five microbatches: two pairs and one alone. Nothing is on the way for long, and nothing waits: a
    stage has done all when the other one has filled it, twice a microbatch later than without pairs."""
    settings = ("--link", "none", "--batch-size", "10", "--microbatches", "5", "--set", "context.in_flight=2")
    found = planned("--emulate", "tiny@2x10ms+20ms", *SMALL[2:6], *settings, "--schedule", "gpipe")
    assert found["chunks"]["in_flight"] == 2
    assert found["step_s"] == pytest.approx(0.15 + 0.02 + 0.04, rel=0.01)
    assert found["chunks"]["otherwise_tokens_per_s"] > found["chunks"]["tokens_per_s"]


def test_figures_agree_with_one_another() -> None:
    whole = planned(*SMALL, "--context", "full:format=int8")
    found, lanes = whole["chunks"], whole["lanes"]
    assert found["tokens_per_s"] == pytest.approx(4 * whole["tokens_per_s"])
    assert found["uncapped_tokens_per_s"] == pytest.approx(4 * whole["uncapped_tokens_per_s"])
    goes_to = found["step_goes_to_s"]
    assert sum(goes_to.values()) == pytest.approx(lanes["step_s"])
    assert min(goes_to.values()) >= 0
    assert found["tokens_per_s"] * lanes["share"] == pytest.approx(lanes["tokens_per_s"])
    direct = next(way for way in found["ways"] if way["route"] == "direct" and way["links"].startswith("each"))
    assert direct["tokens_per_s"] == pytest.approx(found["tokens_per_s"])
    assert direct["exposed_forward_s"] == max(stage["exposed_forward_s"] for stage in found["stages"])
    for stage, whole_stage in zip(found["stages"], whole["stages"], strict=True):
        passes_s = whole_stage["forward_s"] + whole_stage["backward_s"]
        exposed_s = whole_stage["layers"] * (stage["exposed_forward_s"] + stage["exposed_backward_s"])
        assert stage["waiting_share"] == pytest.approx(exposed_s / passes_s)
        assert whole_stage["activation_bytes_in_flight"] > stage["stored_bytes_in_flight"] > 0
    # Four lanes in zigzag order: of 8 segments each lane's early one has 3 users, and its late one as many as are
    # before it; gradients come back from as many.
    parts = sum(3 + lane for lane in range(4))
    sizes = found["bytes_per_token"]
    assert found["sent_bytes_per_token"] == pytest.approx(4 * parts / 8 * (sizes["forward"] + sizes["backward"]))


def test_a_part_is_framed_as_nodes_send_it() -> None:
    """Chunk by chunk, however many there are."""
    key = ContextKey(step=1000, evaluation=False, microbatch=1, layer=1, segment=1)
    for nbytes in (0, 1, 999, 1000, 2999, 3000, 3001, 12_345):
        message = message_of(key, bytes(nbytes))
        assert framed(key, nbytes, 1000) == pytest.approx(sum(accounted(message, 1000).values()), abs=2)


def test_a_node_that_cannot_queue_all_is_told_of() -> None:
    """It stands still before it has given all, and the plan does not know for how long."""
    for more, told in (((), False), (("--set", "link.send_buffer_bytes=1048576"), True)):
        result = CliRunner().invoke(app, ["plan", *SMALL, *more])
        assert ("link.send_buffer_bytes" in result.output) == told, result.output


def test_without_a_cap_nothing_waits() -> None:
    whole = planned(*SMALL, "--link", "none")
    found = whole["chunks"]
    assert found["tokens_per_s"] == pytest.approx(found["uncapped_tokens_per_s"])
    assert found["bounded_by"].startswith("compute of stage")
    assert found["at_first"] is None
    assert all(way["tokens_per_s"] == pytest.approx(found["tokens_per_s"]) for way in found["ways"])
    assert all(stage["waiting_share"] == pytest.approx(0, abs=1e-9) for stage in found["stages"])


def test_an_interface_that_is_capped_is_shared() -> None:
    own, capped = planned(*SMALL), planned(*SMALL, "--link", "20mbit,5ms,kernel=rate")
    shared = next(way for way in own["chunks"]["ways"] if way["links"].startswith("all") and way["route"] == "direct")
    assert capped["chunks"]["tokens_per_s"] == pytest.approx(shared["tokens_per_s"])
    assert shared["tokens_per_s"] < own["chunks"]["tokens_per_s"]
    assert capped["bottleneck"].startswith("keys and values of stage")


def test_what_latency_costs_is_said() -> None:
    found = chunks("--context", "mos", "--link", "1000000mbit,500ms", machine=SMALL)
    assert found["bounded_before_averaging_by"].endswith("by the latency of their links")
    assert found["no_latency_tokens_per_s"] > 5 * found["tokens_per_s"]


def test_a_stage_without_layers_exchanges_nothing() -> None:
    whole = planned(*SMALL, "--cut", "4,0", "--codec", "bf16")
    first, last = whole["chunks"]["stages"]
    assert first["waiting_share"] > 0
    nothing = {"exposed_forward_s": 0, "exposed_backward_s": 0, "waiting_share": 0}
    assert last == {**nothing, "sent_bytes_per_microbatch": 0, "stored_bytes_in_flight": 0}


def test_a_depth_is_chosen_for_stages_that_wait() -> None:
    """`rtt_ratio=auto`, stages that stated their seconds, and such of a longer pipeline."""
    for machine in ("tiny@4x1ms+2ms", "tiny@2of4x0.5tflops"):
        found = planned("--emulate", machine, *SMALL[2:], "--schedule", "1f1b:rtt_ratio=auto")
        assert 0 < found["chunks"]["tokens_per_s"] < found["chunks"]["uncapped_tokens_per_s"]


def test_lanes_of_their_own_sequences_have_no_chunks() -> None:
    assert planned("--emulate", "tiny@2x0.5tflops", "--lanes", "2")["chunks"] is None


def test_a_run_of_one_lane_is_carried_over(tiny: TinyConfig, tmp_path: Path) -> None:
    """Its times, for as many tokens as a chunk has, and the mean attention."""
    ran = tiny({"pipeline.stages": 2, "data.sequence_length": 64})
    run = recorded(tmp_path / "run", ran)
    (run / "run.toml").write_text(dump_config(ran))
    whole = planned("--from", str(run), "--link", "none")
    found = planned("--from", str(run), "--link", "none", "--chunks", "2")
    forward_s = [[stage["forward_s"] for stage in each["stages"]] for each in (whole, found)]
    assert forward_s[1] == pytest.approx([each / 2 for each in forward_s[0]])
    held = planned("--from", str(run), "--link", "100mbit,5ms", "--chunks", "2")["chunks"]
    assert held["stages"][0]["exposed_forward_s"] > 0.005


def test_a_run_in_chunks_is_carried_over(tiny: TinyConfig, tmp_path: Path) -> None:
    """Its lanes' mean, as their attention is unlike; what they waited for one another is the planned link's affair."""
    ran = tiny({"pipeline.stages": 2, "data.sequence_length": 64, "lanes.count": 2, "context.method": "full"})
    (tmp_path / "run.toml").write_text(dump_config(ran))
    for lane, factor in enumerate((0.5, 1.5)):
        records = recorded(tmp_path / f"lane-{lane}", ran, microbatch_s=factor * MICROBATCH_S)
        assert "wait_s" not in (records / "stage-0.jsonl").read_text()
    found = planned("--from", str(tmp_path), "--link", "none")
    forward_s = [stage["forward_s"] for stage in found["stages"]]
    assert forward_s == pytest.approx([MICROBATCH_S / 3] * 2, rel=0.02)  # and segments' bytes over no latency at all
    held = planned("--from", str(tmp_path), "--link", "100mbit,5ms")["chunks"]
    assert held["stages"][0]["exposed_forward_s"] > 0.005
    whole = planned("--from", str(tmp_path), "--link", "none", "--set", "lanes.count=1", "--set", "context.method=")
    assert [stage["forward_s"] for stage in whole["stages"]] == pytest.approx([2 * each for each in forward_s])


def test_people_see_it() -> None:
    result = CliRunner().invoke(app, ["plan", *SMALL, "--context", "mos:k=0.1,v=0.1,warm=300"])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    for part in ("4 chunks, mos:k=0.1,v=0.1,warm=300, zigzag order", "ring", "a step of", "bounded by averaging of"):
        assert part in told
    assert "in its first steps the method sends 2,0" in told


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--context", "fool"), r"context\.method: unknown context method 'fool'; .*'full'"),
        (("--context", "full:format=rvq"), r"format 'rvq' learns from what it packed before; choose one without that"),
        (("--context", "mos:k=2"), r"k=2 is no share of the keys' width; give one above 0"),
        (("--chunks", "1"), r"is for several chunks, and lanes\.count = 1; set .* --chunks 2"),
        (("--chunks", "6"), r"2048 tokens is not 12 equal segments, .*; choose a length such as 2052"),
        (("--lanes", "2"), r"--chunks are lanes of the same sequences, --lanes of different ones; omit one"),
        (("--codec", "ssn:k=16"), r"codec 'ssn' does not go with chunks"),
        (
            ("--set", "context.in_flight=2", "--write-schedule", "no-such-directory/orders.csv"),
            r"--write-schedule: this plan computes two microbatches in turns, .*; say --set context\.in_flight=1",
        ),
        (("--set", "context.in_flight=2", "--microbatches", "1"), r"context\.in_flight = 2: a step has one microbatch"),
        (("--rule", "shared"), r"--rule shared is for the links of one chain, .*kernel=rate"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: Sequence[str], fault: str) -> None:
    given = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = CliRunner().invoke(app, ["plan", *(word for pair in given.items() for word in pair)])
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert re.search(fault, told), told
