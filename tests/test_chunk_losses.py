"""Lanes that hold chunks of the same sequences are lost, go back and end together: the bits of one process, whoever is
lost and when."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.sim.launch.fork_server import Process
from thinpipe.sim.launch.node_launch import free_ports

from .conftest import TinyConfig
from .faults import Done, During, Phase
from .preloaded import start
from .real_faults import Kill, carry_out, records
from .real_node import until
from .real_up import END_S, Up, ended
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


@pytest.mark.slow
def test_rounds_under_way_are_given_again(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """What was contributed before the step that all go back to, and is used after it, is in nobody's memory."""
    config = tiny({**GRID, "pipeline.stages": 1, "run.steps": 30, "lanes.average": "outer:every=4,fragments=2,delay=3"})
    process, run = started(up, config, tmp_path, "--restarts", "1")
    carry_out(run / "lane-1", [Kill(at=Done(stage=0, steps=11), stage=0)])
    ended(process)
    assert records(run / "lane-0", 0, "rollback")[-1]["completed"] % 2 == 0  # two rounds are under way
    assert ends(run, config) == digests(config)


@pytest.mark.slow
def test_two_microbatches_in_flight_go_back_together(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """Each node is broken off in the middle of two, one of which waits for its turn."""
    codec = {"codec.codec": "mapl:r=8,every=2", "codec.forward": "int4", "codec.backward": "int4"}
    config = tiny({**GRID, **codec, "run.steps": 30, "context.in_flight": 2})
    process, run = started(up, config, tmp_path, "--restarts", "2")
    for number, place in enumerate([(0, 1), (1, 0)], 1):
        until(lambda n=number: len(records(run / "lane-0", 1, "step")) >= 8 * n, f"step {8 * number}")
        kill(run, place)
        until(lambda n=number: len(records(run / "lane-1", 1, "rollback")) >= n, f"rollback {number}")
    ended(process)
    one_after_the_other = tiny({**GRID, **codec, "run.steps": 30})
    assert one_after_the_other.in_flight == 1
    assert ends(run, config) == digests(one_after_the_other)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(0, 0), (1, 0)])
def test_a_node_that_is_lost_with_its_disk_comes_back_from_the_next_one_of_the_chain(
    undisturbed: tuple[RunConfig, list[list[str]]], tmp_path: Path, lost: tuple[int, int]
) -> None:
    """Each node has a machine of its own. The buddy of stage 0 of lane 0 is the same stage of lane 1, which has a state
    of that stage itself; that one's is the stage below it."""
    config, alike = undisturbed
    (tmp_path / "run.toml").write_text(dump_config(config))
    addresses = {place: f"127.0.0.1:{port}" for place, port in zip(PLACES, free_ports(4), strict=True)}
    homes = {(lane, stage): tmp_path / f"machine-{lane}-{stage}" for lane, stage in PLACES}

    def of(place: tuple[int, int], event: str) -> list[dict[str, Any]]:
        return records(homes[place] / f"lane-{place[0]}", place[1], event)

    with ExitStack() as stack:

        def begin(place: tuple[int, int], *options: str) -> Process:
            (lane, stage), home = place, homes[place]
            given = ["--config", str(tmp_path / "run.toml"), "--out", str(home), "--lane", str(lane)]
            given += ["--stage", str(stage), "--listen", addresses[place], *options]
            given += ["--next", addresses[lane, 1]] if stage == 0 else []
            given += ["--lateral", f"0={addresses[0, stage]}"] if lane else []
            process = start(["node", *given], stack.enter_context(home.with_suffix(".log").open("w")))
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        nodes = {place: begin(place) for place in PLACES}
        until(lambda: len([each for each in of(lost, "copy") if each["bytes"]]) >= 2, "two copies")
        nodes[lost].kill()
        nodes[lost].wait()
        copied = of(lost, "copy")[-1]["completed"]
        shutil.rmtree(homes[lost])
        homes[lost] = tmp_path / "another-machine"
        nodes[lost] = begin(lost, "--resume")
        for place, node in nodes.items():
            assert node.wait(END_S) == 0, homes[place].with_suffix(".log").read_text()
    rollbacks = {place: of(place, "rollback")[-1] for place in PLACES}
    assert rollbacks[lost]["source"] == "disk"
    assert {record["completed"] for record in rollbacks.values()} <= {copied, copied - 4} - {0}
    assert len({record["completed"] for record in rollbacks.values()}) == 1
    assert [[of((lane, stage), "end")[-1]["state_sha256"] for stage in range(2)] for lane in range(2)] == alike
