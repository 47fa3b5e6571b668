"""`thinpipe plan --lanes`: what averaging costs, against arithmetic, real runs and figures that were measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config
from thinpipe.node.links.outgoing import part_bytes_for
from thinpipe.node.measuring.contribution_sizes import framed_contribution, sized_averager
from thinpipe.node.measuring.lanes_plan import with_options
from thinpipe.node.preparation import resolve_architecture
from thinpipe.node.stage_costs import stage_layers
from thinpipe.protocol.messages import encode_frame
from thinpipe.protocol.round_messages import RoundPart
from thinpipe.protocol.wire_size import framed_bytes
from thinpipe.sim.links.shaper import LinkProfile
from typer.testing import CliRunner

from .conftest import TinyConfig
from .real_faults import records
from .real_up import Up, ended
from .test_plan import planned

MACHINE = ("--emulate", "150m@4x22tflops", "--schedule", "zb:rtt_ratio=6", "--codec", "mapl", "--link", "80mbit,25ms")
SMALL = ("--emulate", "tiny@2x0.05tflops", "--codec", "mapl:r=8", "--link", "8mbit,20ms", "--microbatches", "8")


def lanes(*arguments: str, machine: tuple[str, ...] = SMALL, count: int = 2) -> dict[str, Any]:
    return planned(*machine, "--lanes", str(count), *arguments)["lanes"]


MEASURED = {  # docs/results/lanes-and-chunks.md: share of two lanes, bytes of averaging a token
    "outer:every=12,fragments=4,delay=2": (0.989, None),
    "outer:every=12,delay=3": (0.996, None),
    "outer:every=12": (0.866, None),
    "gradients:format=int4": (0.372, 571),
}


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("average", MEASURED)
def test_what_was_measured_is_what_is_planned(average: str) -> None:
    share, bytes_per_token = MEASURED[average]
    found = lanes("--average", average, machine=MACHINE)
    assert found["share"] == pytest.approx(share, rel=0.05)
    if bytes_per_token:
        assert found["bytes_per_token"] == pytest.approx(bytes_per_token, abs=0.5)
    sizes = [each["contribution_bytes"] * found["fragments"] / 1e6 for each in found["stages"]]
    assert sizes == pytest.approx([51, 29, 29, 41], abs=0.6)
    assert found["bottleneck"] == 0
    assert all(each["hidden"] for each in found["stages"]) == (found["share"] > 0.99)


def test_the_figures_follow_from_the_sizes() -> None:
    whole = planned(*SMALL, "--lanes", "3", "--average", "outer:every=8,fragments=2,delay=2")
    found, step_s, tokens = whole["lanes"], whole["step_s"], 256 * 1024
    for stage in found["stages"]:
        assert stage["bytes_per_step"] == pytest.approx(2 * stage["framed_bytes"] / 4, rel=0.01)
        assert stage["bytes_per_token"] == stage["bytes_per_step"] / tokens
        assert stage["round_s"] == pytest.approx(stage["framed_bytes"] * 8 / 8e6 + 0.02)
        assert stage["mean_bits_per_s"] == pytest.approx(stage["framed_bytes"] * 8 / (4 * step_s), rel=0.01)
        assert stage["peak_bits_per_s"] == pytest.approx(stage["framed_bytes"] * 8 / (2 * step_s - 0.02))
        assert stage["hidden"]
        assert stage["wait_s"] == 0
    assert found["bytes_per_token"] == pytest.approx(sum(stage["bytes_per_token"] for stage in found["stages"]))
    assert found["tokens_per_s"] == pytest.approx(3 * whole["tokens_per_s"])
    assert found["share"] == pytest.approx(1)
    assert found["advice"] is None


def test_more_lanes_send_more_and_wait_no_longer() -> None:
    """Each lateral link has the rate for itself."""
    two, four = (lanes("--average", "outer:every=2", count=count) for count in (2, 4))
    assert four["bytes_per_token"] == pytest.approx(3 * two["bytes_per_token"])
    assert four["step_s"] == pytest.approx(two["step_s"])
    assert four["tokens_per_s"] == pytest.approx(2 * two["tokens_per_s"])


def test_a_cap_of_the_kernel_is_shared() -> None:
    """By the links to all other lanes, and what crosses boundaries."""
    link = ("--link", "8mbit,20ms,kernel=rate", "--average", "outer:every=2")
    alone, two, four = lanes("--average", "outer:every=2"), lanes(*link), lanes(*link, count=4)
    assert alone["stages"][0]["round_s"] < two["stages"][0]["round_s"]
    assert four["stages"][0]["round_s"] == pytest.approx(3 * two["stages"][0]["round_s"], rel=0.01)
    assert four["share"] < two["share"] < alone["share"]


def test_without_a_cap_nothing_waits() -> None:
    found = lanes("--average", "gradients", "--link", "none")
    assert found["share"] == pytest.approx(1)
    assert found["stages"][0]["round_s"] == found["last_round_s"] == 0


@pytest.mark.pairwise(2)
@pytest.mark.parametrize(
    "average",
    [
        "gradients:format=int4",
        "outer:every=4,format=int4:hadamard=true",
        "outer:every=2,fragments=2",
        "sparta:p=0.5,every=1",
    ],
)
def test_what_is_advised_makes_nobody_wait(average: str) -> None:
    found = lanes("--average", average, machine=MACHINE)
    assert found["share"] < 0.95
    spec = re.fullmatch(r"nobody waits with --average (\S+)", found["advice"])
    assert spec
    after = lanes("--average", spec[1], machine=MACHINE)
    assert after["share"] > 0.995
    assert after["advice"] is None


def test_options_are_changed_in_their_place() -> None:
    changed = {"every": 3, "delay": 1}
    assert with_options("outer", changed) == "outer:every=3,delay=1"
    assert with_options("outer:lr=1,every=9", changed) == "outer:lr=1,every=3,delay=1"
    found = with_options("outer:format=int4:hadamard=true,every=9", changed)
    assert found == "outer:delay=1,format=int4:hadamard=true,every=3"


@given(total=st.integers(1, 400_000), part_bytes=st.integers(1000, 70_000), round_=st.sampled_from([1, 127, 128]))
def test_a_contribution_takes_the_frames_that_its_parts_take(total: int, part_bytes: int, round_: int) -> None:
    sent = 0
    for offset in range(0, total, part_bytes):
        data = bytes(min(part_bytes, total - offset))
        part = RoundPart(round=round_, offset=offset, total_bytes=total, contribution_xxh3=7, data=data)
        sent += framed_bytes(len(encode_frame(part)))
    assert framed_contribution(total, round=round_, part_bytes=part_bytes) == sent


def test_one_lane_has_no_rounds() -> None:
    assert planned(*SMALL)["lanes"] is None
    assert planned(*SMALL, "--average", "outer:every=4")["lanes"] is None


def test_people_see_it() -> None:
    result = CliRunner().invoke(app, ["plan", *SMALL, "--lanes", "2", "--average", "outer:every=1"])
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "2 lanes, outer:every=1" in told
    assert "the round at the run's end, of all weights, takes" in told
    assert re.search(r"stage \d waits [\d.]+ s a step for other lanes: nobody waits with --average outer:every=", told)


REFUSED = [
    ("outer:every=twelve", "lanes.average: .*every"),
    ("outer:every=5,fragments=2", r"lanes.average: averaging 'outer': fragments=2 has to divide every=5"),
    ("gossip", r"lanes.average: unknown averaging 'gossip'"),
    ("outer:every=5000,fragments=5000", r"lanes.average: fragments=5000 are more than the \d+ rows"),
    ("outer:format=rvq:groups=2,codes=16", r"lanes.average: .* learned table"),
]


@pytest.mark.parametrize(("average", "expected"), REFUSED)
def test_what_lanes_cannot_do_is_refused(average: str, expected: str) -> None:
    small = ("--set", "model.width=64", "--set", "model.vocab_size=512")
    result = CliRunner().invoke(app, ["plan", *SMALL, *small, "--lanes", "2", "--average", average])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert re.search(expected, line), line


@pytest.mark.slow
@pytest.mark.parametrize("average", ["outer:every=3", "outer:every=4,fragments=2,delay=3", "gradients:format=int8"])
def test_a_real_run_sends_what_is_planned(up: Up, tiny: TinyConfig, tmp_path: Path, average: str) -> None:
    """To the byte. Who ends first has not counted its last parts yet, so of two nodes the one that ends last counts."""
    config = tiny(
        {
            "lanes.count": 2,
            "lanes.average": average,
            "pipeline.stages": 2,
            "run.steps": 9,
            "codec.codec": "mapl:r=8,every=2",
            "link.link": "50mbit,2ms",
        }
    )
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    ended(up("--config", str(tmp_path / "run.toml"), "--out", str(run)))
    architecture, part_bytes = resolve_architecture(config), part_bytes_for(LinkProfile.parse(config.link.link))
    for index, layers in enumerate(stage_layers(config, architecture)):
        averager = sized_averager(config, architecture, index, layers)
        rounds = [averager.plan.round(number) for number in range(averager.plan.count)]
        used = {record["number"] for record in records(run / "lane-0", index, "round")}
        assert used == {round_.number for round_ in rounds}
        sizes = [
            framed_contribution(averager.contribution_bytes(each), round=each.number, part_bytes=part_bytes)
            for each in rounds
        ]
        sent = [
            link["sent_bytes"]["averaging"]
            for lane in range(2)
            for link in records(run / f"lane-{lane}", index, "end")[-1]["links"]
            if "peer_lane" in link
        ]
        assert max(sent) == sum(sizes)
    found = planned("--from", str(run))
    assert found["lanes"]["average"] == average
