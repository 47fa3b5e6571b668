"""Keys and values between chunks on the virtual clock: cases that are worked out by hand, and laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.sim.links.context_exchange import (
    ContextTimes,
    ContextWork,
    LaneLayer,
    Route,
    TakenSegment,
    paths,
    simulate_context,
)
from thinpipe.sim.links.shaper import LinkProfile

INSTANT = LinkProfile(rate_bits_per_s=None)
LINK = LinkProfile(rate_bits_per_s=8.0, latency_s=0.5)  # a byte a second


def taken(segment: int, owner: int, attend_s: float) -> TakenSegment:
    return TakenSegment(segment=segment, owner=owner, attend_s=attend_s)


def two_plain(**changed: Any) -> ContextWork:
    """Lane 1 looks at what lane 0 has: a triangle of 1 s each, a square of 2 s."""
    lane_0 = LaneLayer(before_s=1.0, own_s=1.0, after_s=3.0, gives=(0,), takes=())
    lane_1 = LaneLayer(before_s=1.0, own_s=1.0, after_s=3.0, gives=(1,), takes=(taken(0, 0, 2.0),))
    return ContextWork(**{"lanes": (lane_0, lane_1), "layers": 1, "forward_bytes": 4, "backward_bytes": 6, **changed})


def four_plain() -> ContextWork:
    lanes = [
        LaneLayer(
            before_s=1.0,
            own_s=0.5,
            after_s=1.0,
            gives=(lane,),
            takes=tuple(taken(segment, segment, 1.0) for segment in range(lane - 1, -1, -1)),
        )
        for lane in range(4)
    ]
    return ContextWork(lanes=tuple(lanes), layers=2, forward_bytes=10, backward_bytes=10)


def zigzag(chunks: int, layers: int = 2, **sizes: int) -> ContextWork:
    """The order of `node.context.chunk_layout`, a second for each pair of segments."""
    last = 2 * chunks - 1
    lanes = []
    for lane in range(chunks):
        own = (lane, last - lane)
        needed = [segment for segment in range(own[1] - 1, -1, -1) if segment not in own]
        takes = [taken(segment, min(segment, last - segment), 1.0 + (segment < lane)) for segment in needed]
        lanes.append(LaneLayer(before_s=1.0, own_s=2.0, after_s=2.0, gives=own, takes=tuple(takes)))
    return ContextWork(**{"lanes": tuple(lanes), "layers": layers, "forward_bytes": 4, "backward_bytes": 4, **sizes})


def test_two_chunks_over_a_thin_link() -> None:
    """Forward: what lane 1 needs leaves at 1 s, takes 4 s and half a second, and is here at 5.5 s; lane 1 has had
    nothing to do since 2 s. Backward, twice as long: its gradient leaves at 6 + 4 s, takes 6 s and half a second, and
    lane 0, which is done with its own at 8 s, waits for it until 16.5 s."""
    found = simulate_context(two_plain(), LINK)
    assert (found.forward_s, found.forward_wait_s) == ((5.5 + 2 + 3,), (0, 3.5))
    assert (found.backward_s, found.backward_wait_s) == ((16.5 + 2,), (8.5, 0))
    assert found.sent_bytes == {(0, 1): 4, (1, 0): 6}


def test_a_second_layer_finds_the_wire_as_the_first_one_left_it() -> None:
    """Forward, lane 0 waits for nobody: what lane 1 needs of the second layer leaves at 6 s and is here at 10.5 s, and
    lane 1 comes to it at 12.5 s. Backward, so does lane 1: its second gradient leaves at 14 + 6 + 4 s and is here at
    30.5 s; lane 0 is done with the first layer at 18.5 s, and comes to it at 26.5 s."""
    found = simulate_context(two_plain(layers=2), LINK)
    assert found.forward_wait_s == (0, 3.5)
    assert found.forward_s == (10.5 + 7,)
    assert found.backward_wait_s == (8.5 + 4, 0)
    assert found.backward_s == (30.5 + 2,)


def test_links_that_are_instant_leave_what_lanes_wait_for_each_other() -> None:
    found = simulate_context(two_plain(), INSTANT)
    assert (found.forward_s, found.forward_wait_s) == ((7,), (0, 0))
    assert (found.backward_s, found.backward_wait_s) == ((14,), (2, 0))  # lane 1 has 2 s more to do before it sends
    free = simulate_context(zigzag(4), INSTANT)
    assert free.backward_s[0] == 2 * free.forward_s[0]


def test_an_infinite_rate_leaves_the_latency() -> None:
    found = simulate_context(two_plain(), LinkProfile(rate_bits_per_s=None, latency_s=2.0))
    assert found.forward_wait_s == (0, 1)  # 1 + 2 s, of which attention to itself hides one
    assert found.backward_wait_s == (4, 0)


def test_links_behind_one_interface_wait_for_each_other() -> None:
    """A segment takes an interface for 10 s. Lane 0 sends its own to three lanes, the last of them from 21 s to 31 s;
    over links of their own all are there at 11 s."""
    work, link = replace(four_plain(), layers=1), LinkProfile(rate_bits_per_s=8.0)
    assert simulate_context(work, link).forward_wait_s == (0, 9.5, 9.5, 9.5)
    found = simulate_context(work, link, interface=True)
    assert found.forward_s == (31 + 1 + 1,)
    assert found.forward_wait_s == (0, 9.5, 9.5 + 9, 9.5 + 9 + 9)


def test_an_interface_takes_in_one_segment_at_a_time() -> None:
    """Two lanes send at 1 s to a third, where the second one begins to come in at 6 s and has come at 11 s."""
    lanes = [LaneLayer(before_s=1.0, own_s=0.0, after_s=0.0, gives=(lane,), takes=()) for lane in range(2)]
    last = LaneLayer(before_s=1.0, own_s=0.0, after_s=0.0, gives=(2,), takes=(taken(1, 1, 0.0), taken(0, 0, 0.0)))
    work = ContextWork(lanes=(*lanes, last), layers=1, forward_bytes=5, backward_bytes=5)
    assert simulate_context(work, LinkProfile(rate_bits_per_s=8.0)).forward_s == (6,)
    assert simulate_context(work, LinkProfile(rate_bits_per_s=8.0), interface=True).forward_s == (11,)
    assert simulate_context(work, LINK, interface=True).forward_s == (11.5,)  # latency occupies nothing


def test_a_ring_passes_on() -> None:
    assert paths(0, (1, 2, 3), 4, "direct") == [(1,), (2,), (3,)]
    assert paths(0, (1, 2, 3), 4, "ring") == [(1, 2, 3)]
    assert paths(3, (0, 1, 2), 4, "ring") == [(0, 1, 2)]
    assert paths(2, (0, 1), 4, "ring") == [(1, 0)]  # three hops the other way
    assert paths(3, (0,), 5, "ring") == [(4, 0)]  # by lane 4, which does not look at it
    assert paths(2, (), 4, "ring") == []


def test_a_ring_adds_hops_forward_and_backward() -> None:
    """Plain order; lane 2 gets what lane 0 has a hop later, and lane 0 the sum that lane 1 passes on."""
    lanes = [
        LaneLayer(
            before_s=1.0,
            own_s=1.0,
            after_s=0.0,
            gives=(lane,),
            takes=tuple(taken(segment, segment, 1.0) for segment in range(lane - 1, -1, -1)),
        )
        for lane in range(3)
    ]
    work, link = ContextWork(lanes=tuple(lanes), layers=1, forward_bytes=4, backward_bytes=4), LINK
    direct, ring = (simulate_context(work, link, route=route) for route in ("direct", "ring"))
    # Lane 1 has segment 0 at 5.5 s; lane 2 has both then, or that of lane 0 only after another hop.
    assert (direct.forward_s, ring.forward_s) == ((5.5 + 2,), (10 + 1,))
    # Lane 2 gives segment 1's at 2 s and segment 0's at 4 s, which waits for the wire until 6 s; here at 10.5 s
    # Over links of their own it is there at 8.5 s, and lane 1's at 6.5 s.
    assert direct.backward_s == (8.5 + 2,)
    assert ring.backward_s == (10.5 + 4.5 + 2,)
    assert direct.sent_bytes == {(0, 1): 4, (0, 2): 4, (1, 2): 4, (1, 0): 4, (2, 0): 4, (2, 1): 4}
    assert ring.sent_bytes == {(0, 1): 4, (1, 2): 8, (1, 0): 4, (2, 1): 8}


@pytest.mark.parametrize("interface", [False, True])
@pytest.mark.parametrize("work", [two_plain(), zigzag(2)], ids=["plain", "zigzag"])
def test_two_chunks_are_a_ring(work: ContextWork, interface: bool) -> None:
    direct, ring = (simulate_context(work, LINK, route=route, interface=interface) for route in ("direct", "ring"))
    assert direct == ring


WORKS = st.builds(
    zigzag,
    chunks=st.integers(2, 5),
    layers=st.integers(1, 3),
    forward_bytes=st.integers(1, 30),
    backward_bytes=st.integers(1, 30),
)


def everything(found: ContextTimes) -> tuple[float, ...]:
    return (*found.forward_s, *found.backward_s)


@settings(max_examples=60, deadline=None)
@given(work=WORKS, rate=st.floats(1, 1e4), slower=st.floats(0.01, 1), latency=st.floats(0, 5))
def test_less_rate_or_more_latency_is_never_faster(
    work: ContextWork, rate: float, slower: float, latency: float
) -> None:
    """Over links of their own, where nobody's parts can come before another's."""
    fast = simulate_context(work, LinkProfile(rate_bits_per_s=rate, latency_s=latency))
    thin = simulate_context(work, LinkProfile(rate_bits_per_s=rate * slower, latency_s=latency))
    late = simulate_context(work, LinkProfile(rate_bits_per_s=rate, latency_s=latency + 1))
    free = simulate_context(work, INSTANT)
    for less, more in ((free, fast), (fast, thin), (fast, late)):
        assert all(a <= b + 1e-9 for a, b in zip(everything(less), everything(more), strict=True))


@settings(max_examples=60, deadline=None)
@given(work=WORKS, route=st.sampled_from(["direct", "ring"]), interface=st.booleans())
def test_bytes_and_seconds_add_up(work: ContextWork, route: Route, interface: bool) -> None:
    """Every lane that looks at a segment gets it once and gives one gradient back, on whatever way; a lane computes
    what it computes, waits, and is done no later than the slowest one."""
    found = simulate_context(work, LINK, route=route, interface=interface)
    copies = work.layers * sum(len(lane.takes) for lane in work.lanes)
    each = work.forward_bytes + work.backward_bytes
    assert found.sent_bytes.total() >= copies * each
    if route == "direct":
        assert found.sent_bytes.total() == copies * each
    for lane, forward_s, backward_s in zip(work.lanes, found.forward_wait_s, found.backward_wait_s, strict=True):
        assert work.layers * lane.forward_s + forward_s <= found.forward_s[-1] + 1e-9
        assert work.layers * 2 * lane.forward_s + backward_s <= found.backward_s[-1] + 1e-9
    sums = [
        (work.layers * lane.forward_s + wait_s) for lane, wait_s in zip(work.lanes, found.forward_wait_s, strict=True)
    ]
    assert max(sums) == pytest.approx(found.forward_s[-1])
    assert simulate_context(work, LINK, route=route, interface=interface) == found


def test_two_in_flight_fill_what_one_waits_for() -> None:
    """Lane 1 has computed until 2 s what comes before attention to lane 0's, and then the same of the second microbatch
    until 4 s; the first one's keys and values are here at 5.5 s, the second one's, which left at 3 s and found the wire
    taken until 5 s, at 9.5 s. Each has 5 s left then. Backward, twice as long: lane 1 gives the first one's gradient at
    10 s, here at 16.5 s, and the second one's at 22 s, here at 28.5 s; lane 0 has 2 s of each left then. Lane 1 itself
    is back at the first one at 24 s."""
    found = simulate_context(two_plain(), LINK, in_flight=2)
    assert found.forward_s == (5.5 + 5, 10.5 + 5)
    assert found.forward_wait_s == (0, 1.5)
    assert found.backward_s == (24 + 2, 28.5 + 2)
    assert found.backward_wait_s == (30.5 - 2 * 10, 0)
    assert found.sent_bytes == {(0, 1): 8, (1, 0): 12}


@settings(max_examples=60, deadline=None)
@given(work=WORKS, rate=st.floats(1, 1e4), latency=st.floats(0, 5))
def test_two_in_flight_are_never_slower(work: ContextWork, rate: float, latency: float) -> None:
    """Nor faster than computing, and what they give is what two microbatches give."""
    link = LinkProfile(rate_bits_per_s=rate, latency_s=latency)
    one, free = (simulate_context(work, each) for each in (link, INSTANT))
    two = simulate_context(work, link, in_flight=2)
    for of_one, of_two, of_free in zip(everything(one), two_way(two), everything(free), strict=True):
        assert 2 * of_free - 1e-9 <= of_two <= 2 * of_one + 1e-9
    assert two.sent_bytes.total() == 2 * one.sent_bytes.total()


def two_way(found: ContextTimes) -> tuple[float, float]:
    return (found.forward_s[-1], found.backward_s[-1])


def test_a_segment_that_nobody_gives() -> None:
    lanes = (*two_plain().lanes, LaneLayer(before_s=1.0, own_s=1.0, after_s=1.0, gives=(), takes=(taken(7, 0, 1.0),)))
    with pytest.raises(ValueError, match=r"segments \[7\] are taken, and no lane gives them"):
        simulate_context(two_plain(lanes=lanes), LINK)
