"""What `thinpipe chaos` plans: the same faults for the same seed, in the run, of every kind. (It runs in
tests/test_recovery.py.)"""

from __future__ import annotations

import itertools

import pytest
from thinpipe.sim.launch.fault_injection import KINDS, plan, plan_every


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_spread_over_the_run(seed: int) -> None:
    faults = plan(seed, steps=100, stages=4, count=3 * len(KINDS))
    assert faults == plan(seed, steps=100, stages=4, count=3 * len(KINDS))
    assert faults != plan(seed + 1, steps=100, stages=4, count=3 * len(KINDS))
    assert [fault.kind for fault in faults] == 3 * list(KINDS)
    moments = [fault.step + fault.part for fault in faults]
    assert moments == sorted(moments)
    assert 0 <= moments[0] < moments[-1] < 98  # the last ones have steps after them
    assert all(0 <= fault.stage < 4 and fault.second != fault.stage for fault in faults)
    assert all(fault.after_s is None for fault in faults)


def test_a_boundary_has_a_stage_on_each_side() -> None:
    for fault in plan(1, steps=50, stages=2, count=50, kinds=("cut", "half", "sleeper")):
        assert fault.stage == 0


def test_faults_by_the_clock_have_no_end() -> None:
    faults = list(itertools.islice(plan_every(2.5, 1, stages=3, kinds=("kill", "cut")), 100))
    assert [fault.after_s for fault in faults] == [2.5 * number for number in range(1, 101)]
    assert [fault.kind for fault in faults[:4]] == ["kill", "cut", "kill", "cut"]
    assert {fault.stage for fault in faults if fault.kind == "kill"} == {0, 1, 2}
