"""Rounds between lanes on the virtual clock: what they add to steps, and that a short simulation stands for a long
one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.node.averaging.modes import parse_averaging
from thinpipe.node.averaging.round_plan import RoundPlan
from thinpipe.protocol.schedule import get_schedule
from thinpipe.sim.links import lane_rounds
from thinpipe.sim.links.lane_rounds import HeldPipeline, LaneRounds, RoundsOnWires, simulate_rounds
from thinpipe.sim.links.pipeline import Boundary, StageTimes, simulate
from thinpipe.sim.links.shaper import LinkProfile

MICROBATCHES = 4
BOUNDARY = Boundary(forward_bytes=10**5, backward_bytes=10**5, link=LinkProfile(rate_bits_per_s=8e6, latency_s=0.05))


def held(stages: int = 2, schedule: str = "1f1b", **rounds: Any) -> tuple[float, HeldPipeline]:
    """Seconds of a step without averaging, and what comes of averaging."""
    times = [StageTimes(forward_s=1.0, backward_s=2.0)] * stages
    every = (get_schedule(schedule), times, [BOUNDARY] * (stages - 1))
    step_s = simulate(*every, microbatches=MICROBATCHES).step_s
    of = LaneRounds(**{"latency_s": 0.05, **rounds})
    return step_s, simulate_rounds(*every, of, microbatches=MICROBATCHES, step_s=step_s)


def test_nobody_waits_for_what_arrives_in_time() -> None:
    step_s, found = held(stride=6, delay=1, wire_s=(10.0, 14.0))
    assert step_s == pytest.approx(15.6)
    assert found.period_s == pytest.approx(6 * step_s)
    assert found.waited_s == (0, 0)


def test_one_stage_waits_for_all_of_a_round_that_nothing_hides() -> None:
    step_s, found = held(stages=1, stride=6, delay=0, wire_s=(10.0,))
    assert found.period_s == pytest.approx(6 * step_s + 10.05)
    assert found.waited_s == pytest.approx((10.05,))


def test_one_stage_waits_for_the_rest_of_a_round() -> None:
    """A step is 12 s, in which the rest of the round travels."""
    step_s, found = held(stages=1, stride=6, delay=2, wire_s=(30.0,))
    assert step_s == 12
    assert found.period_s == pytest.approx(6 * step_s + 30.05 - 24)


def test_a_chain_waits_for_its_slowest_stage() -> None:
    """And not for the sum: contributions of all stages travel at the same time."""
    step_s, found = held(stages=4, stride=5, delay=0, wire_s=(40.0, 10.0, 10.0, 20.0))
    assert 5 * step_s + 35 < found.period_s < 5 * step_s + 45


def test_a_link_that_is_never_idle_sets_the_pace() -> None:
    """Two rounds are under way at once, and one takes longer than the steps from one to the next."""
    _, found = held(stages=2, stride=1, delay=2, wire_s=(40.0, 20.0))
    assert found.period_s == pytest.approx(40)


def test_gradients_wait_in_every_step() -> None:
    step_s, found = held(stages=1, stride=1, delay=0, wire_s=(7.0,), of_gradients=True)
    assert found.period_s == pytest.approx(step_s + 7.05)
    assert found.waited_s == pytest.approx((7.05,))


@settings(deadline=None, max_examples=40)
@given(
    fragments=st.integers(1, 3),
    times=st.integers(1, 12),
    delay=st.integers(0, 40),
    wire_s=st.tuples(st.floats(0, 300), st.floats(0, 300)),
    schedule=st.sampled_from(["1f1b", "zb:rtt_ratio=2"]),
)
def test_steps_that_are_left_out_change_nothing(
    fragments: int, times: int, delay: int, wire_s: tuple[float, float], schedule: str
) -> None:
    """Against the simulation of every step."""
    delay = min(delay, fragments * times - 1)
    of: dict[str, Any] = {"stride": times, "delay": delay, "wire_s": wire_s, "schedule": schedule}
    _, short = held(**of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_rounds, "_kept_steps", lambda _, last: list(range(last + 1)))
        _, long = held(**of)
    assert short.period_s == pytest.approx(long.period_s, rel=2e-3)


@pytest.mark.parametrize("spec", ["outer:every=6,fragments=3,delay=4", "sparta:every=5,delay=2", "outer:every=4"])
def test_rounds_are_made_and_used_as_in_a_run(spec: str) -> None:
    mode = parse_averaging(spec)
    plan = RoundPlan(mode, 10**6)
    rounds = LaneRounds(stride=mode.every // mode.fragments, delay=mode.delay, wire_s=(1.0,), latency_s=0.0)
    hold = RoundsOnWires(rounds, range(60), 1.0)
    for completed in range(60):
        hold.until_s(0, completed, float(completed))
        assert list(hold.arrives_s[0]) == [each.number for each in plan.under_way(completed)]
