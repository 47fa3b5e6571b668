"""The search for an order: it keeps to its bound, is the same every time, and never loses to zero bubble."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.config import RunConfig
from thinpipe.node.measuring.schedule_search import with_schedule
from thinpipe.protocol.schedule import OneFOneB, ZeroBubble
from thinpipe.protocol.sought_schedule import may_stand_for
from thinpipe.sim.links.order_search import best_orders
from thinpipe.sim.links.pipeline import Boundary, StageTimes, simulate
from thinpipe.sim.links.shaper import LinkProfile
from typer.testing import CliRunner

from .conftest import TinyConfig

MS = st.integers(1, 9).map(lambda count: count / 1000)


@given(
    times=st.lists(st.tuples(MS, MS, st.floats(0.1, 0.9)), min_size=1, max_size=4),
    link=st.sampled_from(["none", "300mbit,25ms", "2mbit,1ms"]),
    microbatches=st.integers(1, 6),
    in_flight=st.integers(1, 8),
    norm_bytes=st.sampled_from([0, 40]),
)
@settings(deadline=None, max_examples=30)
def test_what_is_found_keeps_to_the_bound_and_is_always_the_same(
    times: list[tuple[float, float, float]], link: str, microbatches: int, in_flight: int, norm_bytes: int
) -> None:
    """That it can be run at all is checked as it is made (`StageOrders`)."""
    stages = [StageTimes(forward_s=f, backward_s=b, weight_s=b * share, step_s=0.001) for f, b, share in times]
    of = Boundary(forward_bytes=4000, backward_bytes=3000, norm_bytes=norm_bytes, link=LinkProfile.parse(link))
    boundaries = [of] * (len(stages) - 1)
    orders, step_s = best_orders(stages, boundaries, microbatches=microbatches, in_flight=in_flight)
    for stage in range(len(stages)):
        assert orders.peak_in_flight(stage, len(stages), microbatches) <= in_flight
    assert step_s >= microbatches * max(each.forward_s + each.backward_s for each in stages)
    again, same_s = best_orders(stages, boundaries, microbatches=microbatches, in_flight=in_flight)
    assert (again.rows, same_s) == (orders.rows, step_s)
    if not norm_bytes:
        assert step_s == simulate(orders, stages, boundaries, microbatches=microbatches).step_s


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="in_flight=0 leaves nothing to compute; say 1 or more"):
        best_orders([StageTimes(forward_s=1, backward_s=2)], [], microbatches=2, in_flight=0)


@pytest.mark.parametrize(("in_flight", "gain"), [(4, 1.1), (8, 1.15)])
def test_a_bound_is_spent_where_it_helps(in_flight: int, gain: float) -> None:
    """Four equal stages over 25 ms: quicker than 1F1B and zero bubble at any depth that fits, by so much."""
    stages = [StageTimes(forward_s=0.003, backward_s=0.006, step_s=0.001)] * 4
    boundaries = [Boundary(forward_bytes=50_000, backward_bytes=40_000, link=LinkProfile.parse("300mbit,25ms"))] * 3
    _, found_s = best_orders(stages, boundaries, microbatches=16, in_flight=in_flight)
    fitting = [
        simulate(schedule, stages, boundaries, microbatches=16).step_s
        for ratio in range(40)
        for schedule in (OneFOneB(ratio / 20), ZeroBubble(ratio / 20))
        if max(schedule.peak_in_flight(stage, 4, 16) for stage in range(4)) <= in_flight
    ]
    assert fitting
    assert min(fitting) >= gain * found_s


MACHINES = {
    "equal stages": ["--emulate", "150m@4x66tflops", "--cut", "equal", "--link", "80mbit,25ms"],
    "by speed": ["--emulate", "150m@3x66tflops", "--speeds", "1,0.5,2", "--link", "300mbit,25ms"],
    "instant links": ["--emulate", "tiny@2x1tflops"],
    "a norm": ["--emulate", "tiny@3x1tflops", "--link", "20mbit,5ms", "--set", "optim.clip_norm=global"],
    "a shared wire": ["--emulate", "tiny@3x1tflops", "--link", "20mbit,5ms", "--rule", "shared"],
}


def planned(*arguments: str) -> dict[str, Any]:
    shape = ["--microbatches", "8", "--batch-size", "16", "--sequence-length", "256"]
    result = CliRunner().invoke(app, ["plan", "--json", *shape, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_best_is_never_worse_than_zero_bubble(machine: list[str]) -> None:
    deep, best = (planned(*machine, "--schedule", spec) for spec in ("zb:rtt_ratio=auto", "best"))
    assert best["step_s"] <= deep["step_s"]
    held, most = (max(stage["microbatches_in_flight"] for stage in plan["stages"]) for plan in (best, deep))
    assert held <= most
    few = planned(*machine, "--schedule", "best:in_flight=1")
    assert [stage["microbatches_in_flight"] for stage in few["stages"]] == [1] * len(few["stages"])
    assert few["step_s"] >= best["step_s"]


def test_a_run_has_what_was_found_before_its_first_step(tiny: TinyConfig) -> None:
    config: RunConfig = tiny({"pipeline.stages": 3, "link.link": "80mbit,25ms"})
    found = with_schedule(config, "best:in_flight=2")
    assert (
        tiny({"pipeline.stages": 3, "link.link": "80mbit,25ms", "pipeline.schedule": found.pipeline.schedule}) == found
    )
    schedule = found.training_schedule
    assert max(schedule.peak_in_flight(stage, 3, config.pipeline.microbatches) for stage in range(3)) <= 2
    assert may_stand_for("best:in_flight=2", found.pipeline.schedule)
    assert not may_stand_for("best", "gpipe")
    assert may_stand_for("zb:rtt_ratio=auto", "zb:rtt_ratio=2")
    assert not may_stand_for("zb:rtt_ratio=auto", "1f1b")
