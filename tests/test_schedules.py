"""One conformance test for every schedule, and broken schedules that it must catch."""

from collections import deque
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.protocol.global_norm import WithGlobalNorm
from thinpipe.protocol.schedule import (
    RTT_RATIO_MAX,
    SCHEDULES,
    Backward,
    BroadcastNorm,
    Evaluate,
    FlushingSchedule,
    Forward,
    GPipe,
    InputGradient,
    OneFOneB,
    ReduceNorm,
    Schedule,
    ScheduleDeadlock,
    ScheduleError,
    StageOrders,
    Step,
    Upward,
    WeightGradient,
    ZeroBubble,
    get_schedule,
    interleave,
    messages_ahead,
    prerequisites,
    receiver,
)
from thinpipe.protocol.step_orders import (
    DelayedOrder,
    interleave_steps,
    overlapping_ahead,
    overlapping_depth,
    overlapping_peak,
)

LINK_CAPACITY = 2  # messages that each direction of a boundary holds in the bounded run


def streams_of(schedule, stages, microbatches):
    return [list(schedule.actions(stage=s, stages=stages, microbatches=microbatches)) for s in range(stages)]


# --- the laws -------------------------------------------------------------------------------------------------------


def check_stream(schedule, actions, stage, stages, microbatches):
    """The laws that one stage's stream obeys by itself."""
    every = list(range(microbatches))
    training = any(isinstance(action, (Forward, Upward, Step)) for action in actions)
    forwards = [a.microbatch for a in actions if isinstance(a, Forward if training else Evaluate)]
    assert forwards == every, "each microbatch goes forward once, in order"
    if training:
        assert [a.microbatch for a in actions if isinstance(a, Upward)] == every, "backward once, in order"
        owed = [a.microbatch for a in actions if isinstance(a, InputGradient)]
        paid = [a.microbatch for a in actions if isinstance(a, WeightGradient)]
        assert paid == owed, "a weight gradient for each input gradient, in order"
        assert not any(isinstance(a, Evaluate) for a in actions), "a training step does not evaluate"
        assert [i for i, a in enumerate(actions) if isinstance(a, Step)] == [len(actions) - 1], "one Step, at the end"
        if any(isinstance(a, (ReduceNorm, BroadcastNorm)) for a in actions):
            passes = [a for a in actions if not isinstance(a, (Forward, Upward, WeightGradient))]
            assert passes == actions[-3:] == [ReduceNorm(), BroadcastNorm(), Step()], "the norm of all gradients"
    in_flight, split, peak = set(), set(), 0
    for action in actions:
        if isinstance(action, Forward):
            in_flight.add(action.microbatch)
        if isinstance(action, Upward):
            assert action.microbatch in in_flight, "backward only after its forward"
        if isinstance(action, InputGradient):
            split.add(action.microbatch)
        if isinstance(action, WeightGradient):
            assert action.microbatch in split, "a weight gradient only after its input gradient"
        if isinstance(action, (Backward, WeightGradient)):
            in_flight.remove(action.microbatch)
        peak = max(peak, len(in_flight))
    assert peak == schedule.peak_in_flight(stage, stages, microbatches), "peak in flight as declared"


def check_global_order(schedule, stages, microbatches):
    """The merged order holds every stage's stream, each action after what it needs; and is the same every time."""
    order = list(interleave(schedule, stages, microbatches))
    assert order == list(interleave(schedule, stages, microbatches))
    for stage, stream in enumerate(streams_of(schedule, stages, microbatches)):
        assert [action for s, action in order if s == stage] == stream
    position = {entry: index for index, entry in enumerate(order)}
    for (stage, action), index in position.items():
        if isinstance(action, (Forward, Evaluate)) and stage > 0:
            assert position[stage - 1, action] < index
        if isinstance(action, WeightGradient):
            assert position[stage, InputGradient(microbatch=action.microbatch)] < index
        if isinstance(action, Upward):
            assert position[stage, Forward(microbatch=action.microbatch)] < index
            if stage < stages - 1:
                assert position[stage + 1, action] < index
        if isinstance(action, ReduceNorm) and stage < stages - 1:
            assert position[stage + 1, action] < index
        if isinstance(action, BroadcastNorm):
            assert all(position[s, ReduceNorm()] < index for s in range(stages)), "the total is of all stages"
            assert stage == 0 or position[stage - 1, action] < index


def run_bounded(schedule, stages, microbatches, downward=LINK_CAPACITY, upward=LINK_CAPACITY):
    """Run all stages over links that hold so many messages a direction; a stage blocks in a send into a full one.

    Blocking reads and writes on FIFO links make the outcome independent of who runs first, so one order proves it.
    """
    links = {(a, b): deque() for s in range(stages - 1) for a, b in ((s, s + 1), (s + 1, s))}
    todo = [deque(stream) for stream in streams_of(schedule, stages, microbatches)]
    outbox = [None] * stages
    advanced = True
    while advanced:
        advanced = False
        for stage in range(stages):
            if outbox[stage] is not None:
                to, message = outbox[stage]
                if len(links[stage, to]) == (downward if to > stage else upward):
                    continue
                links[stage, to].append(message)
                outbox[stage] = None
                advanced = True
            if not todo[stage]:
                continue
            action = todo[stage][0]
            if not isinstance(action, (Step, WeightGradient)):
                upstream, downstream = stage - 1, stage + 1
                up = isinstance(action, (Upward, ReduceNorm))
                source, to = (downstream, upstream) if up else (upstream, downstream)
                assert receiver(action, stage=stage, stages=stages) == (to if 0 <= to < stages else None)
                if (source, stage) in links:
                    if not links[source, stage]:
                        continue
                    assert links[source, stage].popleft() == action, "messages are used in the order they were sent"
                if (stage, to) in links:
                    outbox[stage] = (to, action)
            todo[stage].popleft()
            advanced = True
    blocked = [s for s in range(stages) if todo[s] or outbox[s]]
    assert not blocked, f"stages {blocked} are deadlocked on links of {downward} messages down and {upward} up"
    assert not any(links.values()), "every message sent is used"


def check_conformance(schedule: Schedule, stages: int, microbatches: int) -> None:
    for stage, actions in enumerate(streams_of(schedule, stages, microbatches)):
        check_stream(schedule, actions, stage, stages, microbatches)
    check_global_order(schedule, stages, microbatches)
    run_bounded(schedule, stages, microbatches)


@pytest.mark.parametrize("name", SCHEDULES)
@given(stages=st.integers(1, 8), microbatches=st.integers(1, 24))
@settings(deadline=None)
def test_conformance(name, stages, microbatches):
    check_conformance(get_schedule(name), stages, microbatches)


@pytest.mark.parametrize("kind", [OneFOneB, ZeroBubble])
@given(rtt_ratio=st.floats(0, RTT_RATIO_MAX), stages=st.integers(1, 8), microbatches=st.integers(1, 40))
@settings(deadline=None)
def test_conformance_over_links_that_take_time(kind, rtt_ratio, stages, microbatches):
    schedule = kind(rtt_ratio)
    for stage, actions in enumerate(streams_of(schedule, stages, microbatches)):
        check_stream(schedule, actions, stage, stages, microbatches)
    check_global_order(schedule, stages, microbatches)
    # What the receive buffers of two nodes take (`node.link_settings.receive_buffer_bytes`).
    run_bounded(schedule, stages, microbatches, max(2, messages_ahead(schedule, stages, microbatches)), 2)


@st.composite
def written_orders(draw: st.DrawFn, stages: int | None = None, microbatches: int | None = None) -> StageOrders:
    """Any that can be run: how many forwards each stage has done at each backward, and where weight gradients are."""
    stages = stages or draw(st.integers(1, 6))
    count = microbatches or draw(st.integers(1, 10))
    split = draw(st.booleans())
    least, rows = list(range(1, count + 1)), []
    for _ in range(stages):  # from the last one up: none may have done fewer than the stage below
        done = list(accumulate((draw(st.integers(at, count)) for at in least), max))
        row, before, owed = "", 0, 0
        for at in done:
            row += "F" * (at - before)
            whole = not split or (not owed and draw(st.booleans()))
            row, before, owed = row + ("B" if whole else "I"), at, owed + (not whole)
            paid = draw(st.integers(0, owed))
            row, owed = row + "W" * paid, owed - paid
        rows.insert(0, row + "W" * owed)
        least = done
    return StageOrders(rows)


@given(orders=written_orders())
@settings(deadline=None)
def test_conformance_of_written_orders(orders: StageOrders) -> None:
    """Over links that hold one message upwards, and no more downwards than the orders need; with a norm too."""
    stages, microbatches = len(orders.rows), orders.microbatches
    assert get_schedule(orders.spec).spec == orders.spec
    for schedule in (orders, WithGlobalNorm(orders)):
        for stage, actions in enumerate(streams_of(schedule, stages, microbatches)):
            check_stream(schedule, actions, stage, stages, microbatches)
        check_global_order(schedule, stages, microbatches)
        run_bounded(schedule, stages, microbatches, max(1, messages_ahead(schedule, stages, microbatches)), 1)


@pytest.mark.parametrize("spec", ["gpipe", "1f1b", "1f1b:rtt_ratio=2.5", "zb", "zb:rtt_ratio=2.5"])
@given(stages=st.integers(1, 8), microbatches=st.integers(1, 24))
@settings(deadline=None)
def test_written_down_a_schedule_is_the_same(spec: str, stages: int, microbatches: int) -> None:
    schedule = get_schedule(spec)
    orders = StageOrders.of(schedule, stages, microbatches)
    assert streams_of(orders, stages, microbatches) == streams_of(schedule, stages, microbatches)
    assert messages_ahead(orders, stages, microbatches) == messages_ahead(schedule, stages, microbatches)


@pytest.mark.parametrize("spec", ["gpipe", "1f1b", "1f1b:rtt_ratio=2.5", "zb", "zb:rtt_ratio=2.5"])
@given(stages=st.integers(1, 8), microbatches=st.integers(1, 24), capacity=st.integers(1, 3))
@settings(deadline=None)
def test_conformance_with_a_norm_over_all_stages(spec, stages, microbatches, capacity):
    """Also over links that hold one message upwards, and no more downwards than the schedule itself needs."""
    schedule = WithGlobalNorm(get_schedule(spec))
    for stage, actions in enumerate(streams_of(schedule, stages, microbatches)):
        check_stream(schedule, actions, stage, stages, microbatches)
        assert (ReduceNorm() in actions) == (stages > 1)
    check_global_order(schedule, stages, microbatches)
    ahead = messages_ahead(schedule, stages, microbatches)
    assert ahead == messages_ahead(get_schedule(spec), stages, microbatches)
    run_bounded(schedule, stages, microbatches, max(capacity, ahead), capacity)


# --- steps that overlap ---------------------------------------------------------------------------------------------


def check_overlap(schedule, stages, microbatches, steps, drains):
    """The laws of steps that overlap: for each stage, over all stages, and over links of bounded length."""
    shape = {"stages": stages, "microbatches": microbatches}
    spans = list(pairwise([0, *drains, steps]))
    for stage in range(stages):
        stream = [
            entry
            for first, end in spans
            for entry in DelayedOrder(schedule, stage=stage, **shape, first=first, end=end)
        ]
        alone = list(schedule.actions(stage=stage, **shape))
        for step in range(steps):
            of_step = [action for s, action in stream if s == step]
            for kind in (Forward, (Upward, WeightGradient, Step)):
                ours, theirs = ([a for a in actions if isinstance(a, kind)] for actions in (of_step, alone))
                assert set(ours) == set(theirs), "each step's actions"
                assert len(ours) == len(theirs), "each once"
            for kind in (Forward, Upward, WeightGradient):
                numbers = [action.microbatch for action in of_step if isinstance(action, kind)]
                assert numbers == sorted(numbers), "in order"
        in_flight, ended, peak = set(), 0, 0
        for step, action in stream:
            if isinstance(action, Forward):
                assert ended >= step - 1, "the weights of a step are made when the last but one before it ends"
                in_flight.add((step, action.microbatch))
            else:
                assert step == ended, "gradients add up for one step at a time"
            if isinstance(action, Upward):
                assert (step, action.microbatch) in in_flight, "backward only after its forward"
            if isinstance(action, (Backward, WeightGradient)):
                in_flight.remove((step, action.microbatch))
            if isinstance(action, Step):
                ended += 1
                assert ended not in drains or not in_flight, "a drain leaves nothing under way"
            peak = max(peak, len(in_flight))
        declared = overlapping_peak(schedule, stage, stages, microbatches)
        assert peak == declared or (peak < declared and (steps < 4 or drains)), "peak in flight as declared"
        assert declared <= overlapping_depth(schedule, 0 if schedule.splits else stage, stages, microbatches)
    for first, end in spans:
        orders = [DelayedOrder(schedule, stage=stage, **shape, first=first, end=end) for stage in range(stages)]
        merged = list(interleave_steps(orders))
        assert merged == list(interleave_steps(orders))
        for stage, order in enumerate(orders):
            assert [entry[1:] for entry in merged if entry[0] == stage] == list(order)


class Overlapped(Schedule):
    """Steps that overlap as one long step, so that links are tried as those of any schedule."""

    name = "overlapped"

    def __init__(self, schedule, steps):
        self.schedule, self.steps = schedule, steps

    def peak_in_flight(self, stage, stages, microbatches):
        return self.schedule.peak_in_flight(stage, stages, microbatches)

    def _order(self, stage, stages, microbatches):
        order = DelayedOrder(self.schedule, stage=stage, stages=stages, microbatches=microbatches, end=self.steps)
        for step, action in order:
            if not isinstance(action, Step):
                yield type(action)(microbatch=step * microbatches + action.microbatch)


@pytest.mark.parametrize("spec", ["gpipe", "1f1b", "1f1b:rtt_ratio=2.5", "zb", "zb:rtt_ratio=2.5"])
@given(
    stages=st.integers(1, 8),
    microbatches=st.integers(1, 12),
    steps=st.integers(1, 5),
    drains=st.sets(st.integers(1, 4)),
    capacity=st.integers(1, 3),
)
@settings(deadline=None)
def test_conformance_of_steps_that_overlap(spec, stages, microbatches, steps, drains, capacity):
    """Also over links that hold one message upwards, and no more downwards than depths differ by."""
    schedule = get_schedule(spec)
    check_overlap(schedule, stages, microbatches, steps, sorted(each for each in drains if each < steps))
    ahead = overlapping_ahead(schedule, stages, microbatches)
    run_bounded(Overlapped(schedule, steps), stages, microbatches, max(capacity, ahead), capacity)


def test_the_textbook_order_of_steps_that_overlap():
    def shown(spec, stage):
        order = DelayedOrder(get_schedule(spec), stage=stage, stages=2, microbatches=4, end=3)
        return " ".join(f"{short([action])}{step * chr(39)}" for step, action in order)

    assert shown("1f1b", 0).startswith("F0 F1 B0 F2 B1 F3 B2 F0' B3 F1' S B0' F2' B1' F3' B2' F0'' B3' F1'' S' B0''")
    assert shown("1f1b", 0).endswith("S' B0'' F2'' B1'' F3'' B2'' B3'' S''")
    assert shown("1f1b", 1).startswith("F0 B0 F1 B1 F2 B2 F3 B3 F0' S B0' F1' B1' F2' B2' F3' B3' F0'' S' B0''")
    assert shown("zb", 1).startswith("F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 F0' W3 S I0' F1' I1' W0' F2' I2'")
    assert shown("1f1b:rtt_ratio=4", 0) == (
        "F0 F1 F2 F3 F0' F1' B0 F2' B1 F3' B2 B3 S F0'' F1'' B0' F2'' B1' F3'' B2' B3' S' B0'' B1'' B2'' B3'' S''"
    )
    assert shown("gpipe", 0).startswith("F0 F1 F2 F3 F0' F1' F2' F3' B0 B1 B2 B3 S F0'' F1'' F2'' F3'' B0' B1'")
    assert shown("gpipe", 1) == shown("1f1b", 1)


def test_depths_of_steps_that_overlap_fall_evenly_where_microbatches_are_few():
    def depths(spec, stages, microbatches):
        return [overlapping_depth(get_schedule(spec), stage, stages, microbatches) for stage in range(stages)]

    assert depths("1f1b", 4, 8) == depths("zb", 4, 8) == [4, 3, 2, 1]
    assert depths("1f1b:rtt_ratio=3", 4, 8) == [13, 9, 5, 1]
    assert depths("1f1b:rtt_ratio=5", 4, 8) == depths("gpipe", 4, 8) == [16, 11, 6, 1]
    assert depths("1f1b", 8, 3) == [6, 5, 4, 3, 3, 2, 1, 1]
    assert depths("gpipe", 1, 4) == [1]


def test_an_order_that_does_not_alternate_is_refused():
    with pytest.raises(ScheduleError, match=r"'order' cannot overlap: .*; say gpipe, 1f1b or zb"):
        DelayedOrder(get_schedule("order:FFBFFBBB"), stage=0, stages=1, microbatches=4, end=2)


# --- broken schedules are caught --------------------------------------------------------------------------------------


class Edited(GPipe):
    """GPipe whose stream an edit has broken, on every stage alike."""

    name = "edited"

    def __init__(self, edit):
        self.edit = edit

    def _order(self, stage, stages, microbatches):
        yield from self.edit(list(super()._order(stage, stages, microbatches)))


class EditedSplit(ZeroBubble):
    """ZB-H1 likewise, but only on the last stage."""

    name = "edited split"

    def __init__(self, edit):
        super().__init__()
        self.edit = edit

    def _order(self, stage, stages, microbatches):
        actions = list(super()._order(stage, stages, microbatches))
        yield from self.edit(actions) if stage == stages - 1 else actions


class EditedNorm(WithGlobalNorm):
    """ZB-H1 with the norm of all stages likewise, on every stage alike."""

    name = "edited norm"

    def __init__(self, edit):
        super().__init__(ZeroBubble())
        self.edit = edit

    def _order(self, stage, stages, microbatches):
        yield from self.edit(list(super()._order(stage, stages, microbatches)))


class UnderstatedSplit(ZeroBubble):
    """Declares what 1F1B holds, which frees a microbatch with its only backward."""

    def peak_in_flight(self, stage, stages, microbatches):
        return OneFOneB().peak_in_flight(stage, stages, microbatches)

    def _order(self, stage, stages, microbatches):
        yield from ZeroBubble()._order(stage, stages, microbatches)


class UnderstatedMemory(OneFOneB):
    """Works as GPipe and declares the memory of 1F1B."""

    def _order(self, stage, stages, microbatches):
        yield from GPipe()._order(stage, stages, microbatches)


class Depths(FlushingSchedule):
    """A flushing schedule with any depth for each stage."""

    name = "depths"

    def __init__(self, depths):
        self.depths = depths

    def depth(self, stage, stages):
        assert stages == len(self.depths)
        return self.depths[stage]

    def peak_in_flight(self, stage, stages, microbatches):
        return min(microbatches, self.depth(stage, stages))


def swapped(first, second):
    def edit(actions):
        actions[first], actions[second] = actions[second], actions[first]
        return actions

    return edit


BROKEN = {  # over 6 microbatches: F0..F5 at 0..5, B0..B5 at 6..11, Step at 12
    "backwards swapped": (Edited(swapped(6, 7)), "backward once, in order"),
    "backward lost": (Edited(lambda actions: actions[:-2] + actions[-1:]), "backward once, in order"),
    "backward doubled": (Edited(lambda actions: [*actions[:-1], *actions[-2:]]), "backward once, in order"),
    "forwards swapped": (Edited(swapped(0, 1)), "forward once, in order"),
    "forward lost": (Edited(lambda actions: actions[1:]), "forward once, in order"),
    "no step": (Edited(lambda actions: actions[:-1]), "one Step, at the end"),
    "early step": (Edited(swapped(11, 12)), "one Step, at the end"),
    "two steps": (Edited(lambda actions: [*actions, Step()]), "one Step, at the end"),
    "backward first": (Edited(lambda actions: actions[6:12] + actions[:6] + actions[12:]), "only after its forward"),
    "evaluates in training": (Edited(lambda actions: [Evaluate(microbatch=0), *actions]), "does not evaluate"),
    "memory understated": (UnderstatedMemory(), "peak in flight as declared"),
    # The last of 3 stages under ZB-H1: F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 F5 I5 W3 W4 W5 S
    "weight gradients swapped": (EditedSplit(swapped(15, 16)), "a weight gradient for each input gradient, in order"),
    "weight gradient lost": (EditedSplit(lambda actions: actions[:-2] + actions[-1:]), "for each input gradient"),
    "weight gradient doubled": (EditedSplit(lambda actions: [*actions[:-1], *actions[-2:]]), "for each input gradient"),
    "weight gradient first": (EditedSplit(lambda a: [a[0], a[6], *a[1:6], *a[7:]]), "only after its input gradient"),
    "weight gradient after the step": (EditedSplit(swapped(17, 18)), "one Step, at the end"),
    "input gradients swapped": (EditedSplit(swapped(1, 3)), "backward once, in order"),
    "a backward beside a split one": (EditedSplit(lambda a: [*a[:-1], Backward(microbatch=5), a[-1]]), "backward once"),
    "memory of weight gradients understated": (UnderstatedSplit(), "peak in flight as declared"),
    "a norm without the last weight gradient": (EditedNorm(swapped(-4, -3)), "the norm of all gradients"),
    "a total before its sum": (EditedNorm(swapped(-3, -2)), "the norm of all gradients"),
    "a step before the total": (EditedNorm(swapped(-2, -1)), "one Step, at the end"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_conformance_catches(fault):
    schedule, law = BROKEN[fault]
    with pytest.raises(AssertionError, match=law):
        check_conformance(schedule, 3, 6)


def test_interleave_names_a_deadlock():
    # The downstream stage wants two forwards before its first backward, the upstream one waits after a single forward.
    with pytest.raises(ScheduleDeadlock, match=r"stage 0 waits with Backward\(microbatch=0\) for .* of stage 1") as e:
        list(interleave(Depths([1, 2]), 2, 4))
    assert "'depths' deadlocks with 2 stages and 4 microbatches" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(ScheduleDeadlock):
        list(interleave(Edited(lambda actions: [actions[1], actions[0], actions[2]]), 1, 1))


def test_bounded_run_catches_what_unbounded_links_allow():
    # Every law holds and the global order exists, yet stage 0 cannot hand over the forwards it wants to run first.
    too_deep = Depths([6, 1])
    check_global_order(too_deep, 2, 8)
    with pytest.raises(AssertionError, match="deadlocked on links of 2 messages"):
        run_bounded(too_deep, 2, 8)
    run_bounded(too_deep, 2, 8, 3, 3)


@given(
    falls=st.lists(st.integers(0, 2 * LINK_CAPACITY), min_size=1, max_size=7),
    last=st.integers(1, 4),
    microbatches=st.integers(1, 40),
)
@settings(deadline=None)
def test_depths_that_fall_by_at_most_both_buffers_never_deadlock(falls, last, microbatches):
    depths = [last]
    for fall in falls:
        depths.insert(0, depths[0] + fall)
    check_conformance(Depths(depths), len(depths), microbatches)


# --- what the schedules are ------------------------------------------------------------------------------------------


def short(actions):
    return " ".join(type(a).__name__[0] + str(getattr(a, "microbatch", "")) for a in actions)


def test_the_textbook_orders():
    assert [short(s) for s in streams_of(get_schedule("1f1b"), 3, 4)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3 S",
        "F0 F1 B0 F2 B1 F3 B2 B3 S",
        "F0 B0 F1 B1 F2 B2 F3 B3 S",
    ]
    assert [short(s) for s in streams_of(get_schedule("1f1b:rtt_ratio=1.5"), 2, 4)] == [
        "F0 F1 F2 F3 B0 B1 B2 B3 S",
        "F0 B0 F1 B1 F2 B2 F3 B3 S",
    ]
    assert [short(s) for s in streams_of(get_schedule("zb"), 3, 4)] == [  # arXiv 2401.10241, figure 2, top
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 S",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3 S",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3 S",
    ]
    assert [short(s) for s in streams_of(get_schedule("zb:rtt_ratio=1.5"), 2, 4)] == [
        "F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3 S",
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3 S",
    ]
    assert [short(s) for s in streams_of(get_schedule("gpipe"), 2, 3)] == ["F0 F1 F2 B0 B1 B2 S"] * 2
    assert [short(s) for s in streams_of(get_schedule("evaluation"), 2, 3)] == ["E0 E1 E2"] * 2


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (4, 8), (8, 3), (8, 24)])
def test_memory_is_what_the_literature_says(stages, microbatches):
    for stage in range(stages):
        assert get_schedule("gpipe").peak_in_flight(stage, stages, microbatches) == microbatches
        assert get_schedule("1f1b").peak_in_flight(stage, stages, microbatches) == min(microbatches, stages - stage)
        assert get_schedule("zb").peak_in_flight(stage, stages, microbatches) == min(microbatches, stages)
        assert get_schedule("evaluation").peak_in_flight(stage, stages, microbatches) == 0


def makespan(schedule, stages, microbatches, forward_s=1, backward_s=2, weight_s=1):
    """Length of a step with instant links: each action starts when its stage is free and its needs are done."""
    costs = {Forward: forward_s, Backward: backward_s, InputGradient: backward_s - weight_s, WeightGradient: weight_s}
    free, finished = [0] * stages, {}
    for stage, action in interleave(schedule, stages, microbatches):
        needs = [finished[need] for need in prerequisites(action, stage=stage, stages=stages)]
        cost = costs.get(type(action), 0)
        free[stage] = finished[stage, action] = max([free[stage], *needs]) + cost
    return max(free)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_bubble_of_a_flush(name):
    # (M + P - 1)(t_F + t_B) for both: arXiv 2104.04473, section 2.2
    for stages, microbatches in pairwise([1, 2, 4, 8, 16]):
        assert makespan(get_schedule(name), stages, microbatches) == 3 * (microbatches + stages - 1)


@pytest.mark.parametrize(("forward_s", "input_s", "weight_s"), [(1, 1, 1), (10, 11, 9), (4, 7, 3)])
def test_the_bubble_of_zero_bubble(forward_s, input_s, weight_s):
    """(P-1)(t_F + t_B - t_W), where 1F1B has (P-1)(t_F + t_B + t_W): arXiv 2401.10241, section 2.3."""
    for stages, microbatches in pairwise([1, 2, 4, 8, 16]):
        work = microbatches * (forward_s + input_s + weight_s)
        whole, split = (
            makespan(get_schedule(name), stages, microbatches, forward_s, input_s + weight_s, weight_s) - work
            for name in ("1f1b", "zb")
        )
        assert whole == (stages - 1) * (forward_s + input_s + weight_s)
        assert split == (stages - 1) * (forward_s + input_s - weight_s)


def test_which_schedules_split():
    assert [name for name, schedule in SCHEDULES.items() if schedule.splits] == ["zb"]
    assert get_schedule("zb:rtt_ratio=2").splits
    assert WithGlobalNorm(get_schedule("zb")).splits
    assert [get_schedule(f"order:{word}").splits for word in ("FFBB", "FFIWIW", "FFBIW")] == [False, True, True]


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ScheduleError, match="unknown schedule '1F1'; the nearest known one is '1f1b'"):
        get_schedule("1F1")
    with pytest.raises(ScheduleError, match="unknown schedule 'yyy'; known: gpipe, 1f1b, zb, evaluation"):
        get_schedule("yyy")
    with pytest.raises(ScheduleError, match="unknown schedule 'zbv'; the nearest known one is 'zb'"):
        get_schedule("zbv")
    for name in ("1f1b", "zb"):
        for option in (":", ":hop", ":rtt_ratio=", ":rtt_ratio=-1", ":rtt_ratio=nan", ":depth=3"):
            with pytest.raises(ScheduleError, match=rf"'{name}:.*': {name} has one option, as in {name}:rtt_ratio=1.8"):
                get_schedule(name + option)
        with pytest.raises(ScheduleError, match=rf"'{name}': rtt_ratio=24.5 has to be from 0 \(instant links\) to 24"):
            get_schedule(f"{name}:rtt_ratio=24.5")
    with pytest.raises(ScheduleError, match="unknown schedule 'gpipe:rtt_ratio=1'; the nearest known one is 'gpipe'"):
        get_schedule("gpipe:rtt_ratio=1")


@pytest.mark.parametrize(("stage", "stages", "microbatches"), [(0, 0, 1), (0, 1, 0), (2, 2, 4), (-1, 2, 4)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_that_does_not_exist_is_refused(name, stage, stages, microbatches):
    schedule = get_schedule(name)
    with pytest.raises(ScheduleError):
        schedule.actions(stage=stage, stages=stages, microbatches=microbatches)
    with pytest.raises(ScheduleError):
        schedule.peak_in_flight(stage, stages, microbatches)
    if stages < 1 or microbatches < 1:
        with pytest.raises(ScheduleError):
            list(interleave(schedule, stages, microbatches))
