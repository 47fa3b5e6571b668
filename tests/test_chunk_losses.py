"""Lanes that hold chunks of the same sequences are lost, go back and end together: the bits of one process, whoever is
lost and when."""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path

import pytest
from thinpipe.node.config import RunConfig

from .conftest import TinyConfig
from .faults import Done, During, Phase
from .real_faults import Kill, carry_out, records
from .real_node import until
from .real_up import Up, ended
from .test_lane_processes import digests, ends, started

GRID = {
    "lanes.count": 2,
    "lanes.average": "gradients",
    "pipeline.stages": 2,
    "run.steps": 12,
    "checkpoint.every": 4,
    "context.method": "full",
}
PLACES = list(product(range(2), range(2)))  # lane, stage


def newest_rollbacks(run: Path) -> list[tuple[int, int]]:
    """Of each node: to which generation, and after how many steps."""
    last = [records(run / f"lane-{lane}", stage, "rollback")[-1] for lane, stage in PLACES]
    return [(record["generation"], record["completed"]) for record in last]


def kill(run: Path, *places: tuple[int, int]) -> None:
    """SIGKILL to these at once: lane, stage."""
    for process in [records(run / f"lane-{lane}", stage, "start")[-1]["process"] for lane, stage in places]:
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tiny: TinyConfig) -> tuple[RunConfig, list[list[str]]]:
    """A run of forty steps, and how it ends in one process."""
    config = tiny({**GRID, "run.steps": 40})
    return config, digests(config)


@pytest.mark.slow
def test_a_lost_node_is_a_rewind_of_all_lanes(
    up: Up, undisturbed: tuple[RunConfig, list[list[str]]], tmp_path: Path
) -> None:
    """A stage in the middle of the chain of all, then the one that draws lane 1's data, then one of each lane at
    once."""
    config, alike = undisturbed
    process, run = started(up, config, tmp_path, "--restarts", "4")
    lost = [[(0, 1)], [(1, 0)], [(0, 0), (1, 1)]]
    for number, places in enumerate(lost, 1):
        until(lambda n=number: len(records(run / "lane-0", 1, "step")) >= 9 * n, f"step {9 * number}")
        kill(run, *places)
        until(lambda n=number: len(records(run / "lane-1", 1, "rollback")) >= n, f"rollback {number}")
    ended(process)
    (newest,) = set(newest_rollbacks(run))
    assert newest[0] >= 3
    assert ends(run, config) == alike
    counts = [len(records(run / f"lane-{lane}", stage, "start")) for lane, stage in PLACES]
    assert counts == [2, 2, 2, 2]


@pytest.mark.slow
def test_one_that_is_lost_while_the_others_go_back(
    up: Up, undisturbed: tuple[RunConfig, list[list[str]]], tmp_path: Path
) -> None:
    config, alike = undisturbed
    process, run = started(up, config, tmp_path, "--restarts", "2")
    carry_out(
        run / "lane-1",
        [Kill(at=Done(stage=0, steps=10), stage=1), Kill(at=During(stage=0, phase=Phase.STOPPED), stage=0)],
    )
    ended(process)
    assert len(set(newest_rollbacks(run))) == 1
    assert ends(run, config) == alike


@pytest.mark.slow
def test_a_node_that_is_told_to_end_ends_all_after_the_same_step(
    up: Up, undisturbed: tuple[RunConfig, list[list[str]]], tmp_path: Path
) -> None:
    """The one at the end of the chain of all; `up` is told nothing, and finds that all have ended well."""
    config, alike = undisturbed
    process, run = started(up, config, tmp_path)
    until(lambda: len(records(run / "lane-0", 1, "step")) >= 6, "six steps")
    os.kill(records(run / "lane-0", 1, "start")[-1]["process"], signal.SIGTERM)
    ended(process)
    (done,) = {len(records(run / f"lane-{lane}", stage, "step")) for lane, stage in PLACES}
    assert 6 <= done < 40
    ended(up("--resume", str(run)))
    assert ends(run, config) == alike
    assert set(newest_rollbacks(run)) == {(1, done)}
