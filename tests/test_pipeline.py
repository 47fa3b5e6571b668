"""The simulated pipeline: against formulas where there are any, against published figures, and against its own laws."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.protocol.global_norm import WithGlobalNorm
from thinpipe.protocol.schedule import SCHEDULES, InputGradient, Schedule, Step, WeightGradient, get_schedule
from thinpipe.sim.links.pipeline import Boundary, Rule, Simulation, StageTimes, simulate
from thinpipe.sim.links.shaper import LinkProfile

TRAINING = [SCHEDULES[name] for name in ("gpipe", "1f1b")]
EVERY = [*TRAINING, SCHEDULES["zb"]]
INSTANT = LinkProfile(rate_bits_per_s=None)
FREE = Boundary(forward_bytes=0, backward_bytes=0, link=INSTANT)


def uniform(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    *,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
    step_s: float = 0.0,
    nbytes: tuple[int, int] = (0, 0),
    link: LinkProfile = INSTANT,
    rule: Rule = "duplex",
    steps: int = 3,
) -> Simulation:
    times = StageTimes(forward_s=forward_s, backward_s=backward_s, step_s=step_s)
    boundary = Boundary(forward_bytes=nbytes[0], backward_bytes=nbytes[1], link=link)
    every = [times] * stages, [boundary] * (stages - 1)
    return simulate(schedule, *every, microbatches=microbatches, rule=rule, steps=steps)


@pytest.mark.parametrize("schedule", TRAINING, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (2, 1), (4, 8), (8, 3)])
def test_instant_links_have_the_textbook_bubble(schedule: Schedule, stages: int, microbatches: int) -> None:
    """(M + P - 1)(t_F + t_B), in which each stage computes for M (t_F + t_B)."""
    simulated = uniform(schedule, stages, microbatches, step_s=0.5)
    assert simulated.step_s == pytest.approx(3 * (microbatches + stages - 1) + 0.5)
    share = (3 * microbatches + 0.5) / simulated.step_s
    assert simulated.compute_share == pytest.approx([share] * stages)
    assert simulated.bottleneck.startswith("compute of stage")


@pytest.mark.parametrize(("schedule", "expected_s"), [("gpipe", 32), ("1f1b", 17)])
def test_a_link_that_is_short_sets_the_pace(schedule: str, expected_s: float) -> None:
    """1 MB at 8 Mb/s is a second, compute is nothing. Under GPipe 16 activations go down, then 16 gradients come up;
    1F1B has both ways busy at once, but for the first activation."""
    link = LinkProfile(rate_bits_per_s=8e6)
    nbytes = (10**6, 10**6)
    simulated = uniform(get_schedule(schedule), 2, 16, forward_s=1e-9, backward_s=1e-9, nbytes=nbytes, link=link)
    assert simulated.step_s == pytest.approx(expected_s, abs=0.01)
    assert simulated.bottleneck.startswith("the link from stage")


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 5), (2, 2), (4, 8), (8, 24)])
def test_zero_bubble_has_a_third_of_the_bubble(stages: int, microbatches: int) -> None:
    """(P-1)(t_F + t_B - t_W); the input gradient's message does not wait for the weight gradient."""
    simulated = uniform(get_schedule("zb"), stages, microbatches, step_s=0.5)
    assert simulated.step_s == pytest.approx(3 * microbatches + stages - 1 + 0.5)
    assert simulated.peak_in_flight == [min(stages, microbatches)] * stages


def test_the_weight_gradients_share_is_half_unless_it_is_known() -> None:
    split = [InputGradient(microbatch=0), WeightGradient(microbatch=0)]
    assert [StageTimes(forward_s=1, backward_s=2).of(action) for action in split] == [1, 1]
    assert [StageTimes(forward_s=1, backward_s=2, weight_s=0.5).of(action) for action in split] == [1.5, 0.5]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("schedule", TRAINING, ids=lambda schedule: schedule.name)
def test_a_norm_over_all_stages_rides_for_nothing_behind_whole_backwards(schedule: Schedule, stages: int) -> None:
    """Up with the last gradient, and down ahead of the next activation."""
    link = LinkProfile(rate_bits_per_s=None, latency_s=5.0)
    without, with_it = (
        uniform(each, stages, 8, step_s=0.5, link=link) for each in (schedule, WithGlobalNorm(schedule))
    )
    assert with_it.step_s == without.step_s


def test_a_norm_over_all_stages_waits_for_weight_gradients_that_others_have_put_off() -> None:
    """One microbatch, latency 5, weight gradients of 10 below: 1 and down, there at 6; 1 + 1 + 10 at stage 1; the sum
    has the wire for 2 s (16 bytes at 8 a second), and 5 to come up. Then the total has the wire down for 2 s, and the
    next activation, which is made in 1, waits for it."""
    above = StageTimes(forward_s=1.0, backward_s=2.0, weight_s=1.0)
    below = StageTimes(forward_s=1.0, backward_s=11.0, weight_s=10.0)
    link = LinkProfile(rate_bits_per_s=64.0, latency_s=5.0)
    boundary = Boundary(forward_bytes=0, backward_bytes=0, link=link, norm_bytes=16)
    schedule = WithGlobalNorm(get_schedule("zb"))
    simulated = simulate(schedule, [above, below], [boundary], microbatches=1)
    assert simulated.step_s == pytest.approx(6 + 12 + 2 + 5 + 1)
    assert simulated.wire_share == pytest.approx({(0, 1): 2 / 26, (1, 0): 2 / 26})
    passes = [(s.stage, s.sender) for s in simulated.spans if s.step == 1 and s.sender is not None][-2:]
    assert passes == [(0, 1), (1, 0)]


def test_latency_starves_a_shallow_schedule() -> None:
    """Two stages, a round trip of ten microbatches: 1F1B has two under way, GPipe all."""
    link = LinkProfile(rate_bits_per_s=None, latency_s=15.0)
    shallow, deep = (uniform(get_schedule(name), 2, 16, link=link).step_s for name in ("1f1b", "gpipe"))
    assert deep == pytest.approx(3 * 17 + 30)
    assert shallow > 3 * deep


def test_a_depth_for_the_hop_hides_latency() -> None:
    """Four stages, a round trip of two microbatches' compute: with the depth for it only the flush waits for links."""
    link = LinkProfile(rate_bits_per_s=None, latency_s=3.0)
    plain, deep = (uniform(get_schedule(name), 4, 64, link=link).step_s for name in ("1f1b", "1f1b:rtt_ratio=2"))
    assert deep == pytest.approx(3 * 67 + 6 * 3)  # the first microbatch down, the last one up
    assert plain > 2 * deep


@pytest.mark.parametrize("fitted_on", ["dense", "subspace"])
def test_published_step_times_of_protocol_nanogpt(fitted_on: str) -> None:
    """8 stages, 524,288 tokens a step, 200 Mb/s and 50 ms: 100.475 s with dense bf16 in 64 microbatches (4,096 bytes a
    token, round trip), 19.889 s with 644 bytes in 32. One compute time, fitted to one of them, gives the other."""
    runs = {"dense": (4096, 64, 100.475), "subspace": (644, 32, 19.889)}

    def step_s(run: str, compute_s: float) -> float:
        bytes_per_token, microbatches, _ = runs[run]
        tokens, share = 524_288 // microbatches, compute_s / microbatches
        nbytes = tokens * bytes_per_token // 2
        link = LinkProfile(rate_bits_per_s=200e6, latency_s=0.05)
        return uniform(
            get_schedule("1f1b"),
            8,
            microbatches,
            forward_s=share / 3,
            backward_s=share * 2 / 3,
            nbytes=(nbytes, nbytes),
            link=link,
            rule="shared",
        ).step_s

    low, high = 0.0, 10.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if step_s(fitted_on, middle) < runs[fitted_on][2] else (low, middle)
    for run, (_, _, published_s) in runs.items():
        assert step_s(run, low) == pytest.approx(published_s, rel=0.01)
    assert step_s("dense", 0.0) == pytest.approx(100.2, abs=0.05)
    assert step_s("subspace", 0.0) == pytest.approx(19.6, abs=0.05)


# -- laws ------------------------------------------------------------------------------------------------------------

seconds = st.floats(0.001, 2.0)
pipelines = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(EVERY),
        "microbatches": st.integers(1, 8),
        "times": st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=5),
        "nbytes": st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
        "rate": st.floats(1e5, 1e8),
        "latency_s": st.floats(0.0, 1.0),
    }
)


def run(pipeline: dict, rule: Rule, *, slower: float = 1.0) -> Simulation:
    stages = [StageTimes(forward_s=f, backward_s=b, step_s=s) for f, b, s in pipeline["times"]]
    link = LinkProfile(rate_bits_per_s=pipeline["rate"] / slower, latency_s=pipeline["latency_s"] * slower)
    boundary = Boundary(forward_bytes=pipeline["nbytes"][0], backward_bytes=pipeline["nbytes"][1], link=link)
    boundaries = [boundary] * (len(stages) - 1)
    return simulate(pipeline["schedule"], stages, boundaries, microbatches=pipeline["microbatches"], rule=rule)


@settings(deadline=None, max_examples=60)
@given(pipelines, st.sampled_from(["duplex", "shared"]))
def test_everything_happens_once_and_in_order(pipeline: dict, rule: Rule) -> None:
    simulated = run(pipeline, rule)
    stages, microbatches = len(pipeline["times"]), pipeline["microbatches"]
    lanes = defaultdict(list)
    for span in simulated.spans:
        lanes[span.sender, span.stage].append(span)
    for (sender, stage), spans in lanes.items():
        for before, after in pairwise(sorted(spans, key=lambda span: (span.start_s, span.end_s))):
            assert before.end_s <= after.start_s + 1e-9  # nobody does two things at once
        done = Counter((span.step, span.action) for span in spans)
        assert set(done.values()) == {1}
        if sender is None:
            each = pipeline["schedule"].actions(stage=stage, stages=stages, microbatches=microbatches)
            assert [span.action for span in spans if span.step == 1] == list(each)
    steps = [span for span in simulated.spans if isinstance(span.action, Step)]
    assert len(steps) == 3 * stages
    shares = [*simulated.compute_share, *simulated.wire_share.values()]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)


@settings(deadline=None, max_examples=40)
@given(pipelines, st.floats(1.0, 4.0))
def test_a_worse_link_is_never_faster(pipeline: dict, slower: float) -> None:
    assert run(pipeline, "duplex", slower=slower).step_s >= run(pipeline, "duplex").step_s - 1e-9


@settings(deadline=None, max_examples=40)
@given(pipelines)
def test_the_busiest_resource_bounds_the_step(pipeline: dict) -> None:
    simulated = run(pipeline, "duplex")
    busiest = max([*simulated.compute_share, *simulated.wire_share.values()])
    assert 0 < busiest <= 1 + 1e-9


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 5), (2, 2), (4, 8), (8, 24)])
def test_steps_that_overlap_have_no_bubble_over_instant_links(schedule: str, stages: int, microbatches: int) -> None:
    """Where two steps have as many microbatches as the pipeline holds, twice over."""
    times = [StageTimes(forward_s=1.0, backward_s=2.0, step_s=0.5)] * stages
    simulated = simulate(get_schedule(schedule), times, [FREE] * (stages - 1), microbatches=microbatches, delay=1)
    assert simulated.step_s == pytest.approx(3 * microbatches + 0.5)
    assert simulated.compute_share == pytest.approx([1.0] * stages)
    assert max(simulated.peak_in_flight) <= 2 * microbatches


def test_steps_that_overlap_hide_what_a_flush_waits_for() -> None:
    """A way there and back of 8 s beside 3 s of compute: a depth that covers it leaves nothing to wait for, where the
    flushing order waits for it once a step; and two steps' microbatches cover more than one step's."""
    times, link = [StageTimes(forward_s=1.0, backward_s=2.0)] * 2, LinkProfile(rate_bits_per_s=None, latency_s=4.0)
    boundary = [Boundary(forward_bytes=1, backward_bytes=1, link=link)]
    deep = get_schedule("1f1b:rtt_ratio=3")  # 5 microbatches at stage 0
    flushed, overlapping = (simulate(deep, times, boundary, microbatches=8, delay=delay).step_s for delay in (0, 1))
    assert overlapping == pytest.approx(8 * 3)
    assert flushed >= 8 * 3 + 8
    few = simulate(deep, times, boundary, microbatches=3, delay=1)
    assert few.peak_in_flight == [5, 1]
    assert few.step_s < simulate(deep, times, boundary, microbatches=3).step_s - 8


def test_counts_that_make_no_pipeline_are_refused() -> None:
    times, boundary = StageTimes(forward_s=1, backward_s=1), Boundary(forward_bytes=1, backward_bytes=1, link=INSTANT)
    with pytest.raises(ValueError, match="2 stages, 2 boundaries and 3 steps"):
        simulate(get_schedule("1f1b"), [times] * 2, [boundary] * 2, microbatches=1)
    with pytest.raises(ValueError, match="3 steps or more"):
        simulate(get_schedule("1f1b"), [times] * 2, [boundary], microbatches=1, steps=2)


def test_a_step_lasts_as_long_as_at_the_stage_where_it_is_longest() -> None:
    """The last of four stages takes a fifth longer than the others, and they run ahead of it."""
    times = [StageTimes(forward_s=1.0, backward_s=2.0)] * 3 + [StageTimes(forward_s=1.2, backward_s=2.4)]
    simulated = simulate(get_schedule("zb:rtt_ratio=24"), times, [FREE] * 3, microbatches=16)
    assert simulated.step_s >= 16 * 3.6 - 1e-9
    assert max(simulated.compute_share) <= 1.0 + 1e-9


def test_a_stage_that_runs_ahead_for_a_while_makes_no_step_shorter() -> None:
    """The last stage takes twice as long as the others, who need not wait for its weight gradients before they begin
    the next step."""
    times = [StageTimes(forward_s=1.0, backward_s=2.0), StageTimes(forward_s=2.0, backward_s=4.0)]
    simulated = simulate(get_schedule("zb:rtt_ratio=24"), times, [FREE], microbatches=16)
    assert simulated.step_s >= 16 * 6.0
    assert max(simulated.compute_share) <= 1.0 + 1e-9
