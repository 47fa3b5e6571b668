"""What `thinpipe chaos` plans, and how it judges: the same faults for the same seed, in the run, of every kind; what
differs from the recomputation is found. (Runs of one lane are in tests/test_recovery.py, of several in
tests/test_chaos_lanes.py.)"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.recomputed_run import counting
from thinpipe.protocol.membership_log import Entry, MembershipLog
from thinpipe.sim.launch.chaos_report import survived
from thinpipe.sim.launch.planned_faults import (
    CHAIN_KINDS,
    KINDS,
    LANE_KINDS,
    OF_BOUNDARY,
    Kind,
    kinds_for,
    plan,
    plan_every,
)
from thinpipe.sim.reports.recomputation import compare_lane, members_lines
from thinpipe.sim.reports.run_watch import RunWatch

# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_spread_over_the_run(seed: int) -> None:
    count = 3 * len(CHAIN_KINDS)
    faults = plan(seed, steps=100, stages=4, count=count)
    assert faults == plan(seed, steps=100, stages=4, count=count)
    assert faults != plan(seed + 1, steps=100, stages=4, count=count)
    assert [fault.kind for fault in faults] == 3 * list(CHAIN_KINDS)
    moments = [fault.step + fault.part for fault in faults]
    assert moments == sorted(moments)
    assert 0 <= moments[0] < moments[-1] < 98  # the last ones have steps after them
    assert all(0 <= fault.stage < 4 and fault.second != fault.stage for fault in faults)
    assert all(fault.after_s is None and fault.lane == 0 for fault in faults)


def test_a_boundary_has_a_stage_on_each_side() -> None:
    for fault in plan(1, steps=50, stages=2, count=50, kinds=("cut", "half", "sleeper")):
        assert fault.stage == 0


def test_faults_by_the_clock_have_no_end() -> None:
    faults = list(itertools.islice(plan_every(2.5, 1, stages=3, kinds=("kill", "cut")), 100))
    assert [fault.after_s for fault in faults] == [2.5 * number for number in range(1, 101)]
    assert [fault.kind for fault in faults[:4]] == ["kill", "cut", "kill", "cut"]
    assert {fault.stage for fault in faults if fault.kind == "kill"} == {0, 1, 2}


@pytest.mark.parametrize(("stages", "lanes"), [(1, 2), (1, 3), (2, 2), (3, 4)])
def test_faults_are_spread_over_the_grid(stages: int, lanes: int) -> None:
    kinds = kinds_for(stages=stages, lanes=lanes)
    faults = plan(3, steps=100, stages=stages, lanes=lanes, count=200, kinds=kinds)
    assert {fault.kind for fault in faults} == {*kinds} == {*KINDS} - (set() if stages > 1 else {*OF_BOUNDARY})
    assert {(fault.lane, fault.stage) for fault in faults} == set(itertools.product(range(lanes), range(stages)))
    for fault in faults:
        assert 0 <= fault.second < lanes * stages
        assert fault.other in set(range(lanes)) - {fault.lane} or fault.kind == "join"
    come = faults[[fault.kind for fault in faults].index("join") + 1 :]  # before, one lane may be all there is
    assert all(fault.second != fault.lane * stages + fault.stage for fault in come)
    assert len({fault.length for fault in faults if fault.kind == "outage"}) == 2


def test_nothing_happens_to_a_lane_before_it_has_come() -> None:
    faults = plan(5, steps=100, stages=2, lanes=3, count=40, kinds=("kill", "lateral", "twice", "join"))
    comes = next(at for at, fault in enumerate(faults) if fault.kind == "join")
    assert [fault.kind for fault in faults].count("join") == 1
    assert faults[comes].lane == 2
    for fault in faults[:comes]:
        assert {fault.lane, fault.other} <= {0, 1}
        assert fault.second < 4
    assert any(fault.lane == 2 for fault in faults[comes + 1 :])
    assert len(plan(5, steps=100, stages=2, lanes=3, count=40, kinds=("join",))) == 1


@pytest.mark.parametrize(
    ("stages", "lanes", "lacks"), [(4, 1, {*LANE_KINDS}), (1, 2, {*OF_BOUNDARY}), (2, 2, set[Kind]())]
)
def test_what_can_happen_to_a_grid(stages: int, lanes: int, lacks: set[Kind]) -> None:
    assert set(kinds_for(stages=stages, lanes=lanes)) == {*KINDS} - lacks


def test_nothing_that_leaves_a_lane_out_happens_to_chunks() -> None:
    kinds = kinds_for(stages=2, lanes=2, grouped=True)
    assert set(kinds) == {*KINDS} - {*LANE_KINDS} | {"lateral"}


# -- the verdict ------------------------------------------------------------------------------------------------------


def node(losses: list[float], digests: list[str], *, state: str = "ab", steps: int | None = None) -> list[Any]:
    """The records of a node."""
    return [
        {"event": "start"},
        *({"event": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)),
        *(
            {"event": "round", "number": at, "used": at + 1, "digest": each, "members": [0, 1]}
            for at, each in enumerate(digests)
        ),
        {"event": "evaluation", "step": len(losses) - 1, "val_loss": losses[-1]},
        {"event": "end", "steps": len(losses) if steps is None else steps, "state_sha256": state},
    ]


LOSSES, DIGESTS = [5.0, 4.0, 3.0], ["x", "y"]
SAME = node(LOSSES, DIGESTS)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (SAME, "equal bit for bit"),
        (node([9.0, 9.0, 9.0], ["q", "q"]) + SAME, "equal bit for bit"),  # what was done again counts
        ([*SAME[:-2], {"event": "evaluation", "step": 2, "val_loss": 2.5}, SAME[-1]], "DIFFERENT: held-out loss"),
        (node([5.0, 4.5, 3.0], DIGESTS), "DIFFERENT: loss from step 2 on"),
        (node(LOSSES, ["x", "q"]), "DIFFERENT: averaging from round 1 on"),
        (node(LOSSES, ["x"]), "DIFFERENT: averaging from round 1 on"),
        (node(LOSSES, DIGESTS, state="cd"), "DIFFERENT: state of stage 0"),
        (node(LOSSES, DIGESTS, steps=2), "has not come to the end, so there is nothing to compare"),
        ([*SAME, {"event": "start"}], "has not come to the end, so there is nothing to compare"),
        ([], "has not come to the end, so there is nothing to compare"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_from_the_recomputation_is_found(ours: list[Any], words: str) -> None:
    verdict = compare_lane([ours], [SAME[1:]], lane=0, steps=3)
    assert verdict.words() == words
    assert verdict.equal == ("DIFFERENT" not in words)


def test_all_stages_are_compared() -> None:
    other = node(LOSSES, ["q", "y"], state="cd")
    verdict = compare_lane([SAME, other], [SAME, SAME], lane=1, steps=3)
    assert verdict.words() == "DIFFERENT: state of stage 1, averaging from round 0 on"


def test_what_a_lane_did_before_it_took_up_another_ones_state_is_not_compared() -> None:
    ours, theirs = node([9.0, 4.0, 3.0], ["q", "y"])[2:], node(LOSSES, DIGESTS)
    assert compare_lane([ours], [theirs], lane=0, steps=3, since=1).equal
    assert compare_lane([ours], [theirs], lane=0, steps=3).words() == (
        "DIFFERENT: loss from step 1 on, averaging from round 0 on"
    )


def test_a_lane_that_is_not_through_is_forgiven_if_it_was_kept_away() -> None:
    lanes = [{"lane": lane, "ended": lane != 2, "apart": None} for lane in range(3)]
    for away, equal, expected in (([2], True, True), ([], True, False), ([1], True, False), ([2], False, False)):
        found = {"recomputed": {"equal": equal, "lanes": lanes}, "away_at_the_end": away}
        assert survived(found) is expected


def test_of_all_lanes_logs_one_counts() -> None:
    begun = MembershipLog.begin(3)
    both, alone = begun.then((0, 1)).then((0, 1)), begun.then((2,)).then((2,)).then((2,))
    behind = begun.then((0, 1))
    for logs in itertools.permutations([both, alone, behind]):
        assert counting(logs) == both


def test_who_left_and_came_is_said() -> None:
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 2)).then((0,))
    log = log.then((0, 2), (Entry(lane=2, first=3, begins=15, source=2, copied=8),))
    assert members_lines(log, 3, [1]) == [
        "round 1: lane 1 is left out",
        "round 2: lane 2 is left out",
        "round 3: lane 2 is back, from step 15 on; it followed from 8",
        "the end: lane 1 had followed the others up to it",
    ]


def test_a_run_is_watched_by_its_records(tmp_path: Path) -> None:
    def write(lane: int, event: str, time_s: float, **fields: Any) -> None:
        place = tmp_path / f"lane-{lane}"
        place.mkdir(exist_ok=True)
        with (place / "stage-0.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "time_s": time_s, **fields}) + "\n")

    watch = RunWatch(tmp_path, lanes=2, stages=1)
    watch.look()
    assert (watch.steps_done, watch.is_left_out(1), watch.is_left_out(0)) == (0, False, False)
    for lane, steps in enumerate((3, 2)):
        for step in range(steps):
            write(lane, "step", 1.0 + step, step=step, seconds=0.5)
    write(0, "members", 4.0, members=[0])
    before = watch.progress
    watch.look()
    assert (watch.steps_done, watch.lane_steps) == (3, [3, 2])
    assert watch.progress != before
    assert (watch.is_left_out(1), watch.is_left_out(0)) == (True, False)
    write(1, "rollback", 5.0)
    write(1, "step", 5.5, step=0, seconds=0.5)  # done again
    before = watch.progress
    write(0, "members", 6.0, members=[0, 1])
    watch.look()
    assert (watch.rolled_back_s, watch.is_left_out(1)) == ([0.0, 5.0], False)
    assert watch.progress == before
