"""Lanes as processes, over links of their own: the bits of lanes in one process, whatever is lost on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.one_process import OneProcess
from thinpipe.node.recomputed_run import recompute
from thinpipe.node.security.key_directory import init, issue
from thinpipe.sim.launch.node_launch import free_ports, node_environment

from .conftest import TinyConfig
from .preloaded import start
from .real_faults import Done, Kill, carry_out, records
from .real_node import until
from .real_up import END_S, Up, ended
from .test_cli import start as start_apart

ROOT = Path(__file__).resolve().parent.parent

GRID = {"lanes.count": 2, "pipeline.stages": 2, "run.steps": 12, "checkpoint.every": 4}
BOOKS = {"codec.forward": "rvq:groups=2,codes=16", "codec.backward": "rvq:groups=2,codes=16"}
CLIPPED = {"optim.clip": 0.1, "optim.clip_norm": "global"}
MODES = {
    "gradients": ("mapl:r=8,every=2", "gradients:format=int8", BOOKS | CLIPPED),
    "outer": ("mapl:r=8,every=2", "outer:every=3", BOOKS | {"run.steps": 6}),
    "fragments": ("resbm:b=8", "outer:every=4,fragments=2,delay=3,format=topk:k=16", {"pipeline.schedule": "zb"}),
    "sparta": ("ssn:k=8", "sparta:p=0.2,every=2,delay=1", {}),
}


def digests(config: RunConfig) -> list[list[str]]:
    """Of each lane's stages, in one process."""
    run = OneProcess(config)
    run.train()
    return [[stage.state_sha256() for stage in lane.stages] for lane in run.lanes]


def ends(run: Path, config: RunConfig) -> list[list[str]]:
    """The same of the processes, from their records."""
    lanes, stages = range(config.lanes.count), range(config.pipeline.stages)
    return [[records(run / f"lane-{lane}", stage, "end")[-1]["state_sha256"] for stage in stages] for lane in lanes]


def started(up: Up, config: RunConfig, tmp_path: Path, *options: str) -> tuple[Any, Path]:
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = tmp_path / "run"
    return up("--config", str(tmp_path / "run.toml"), "--out", str(run), *options), run


@pytest.mark.parametrize(
    "mode", ["outer", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES if mode != "outer")]
)
def test_processes_are_one_process(up: Up, tiny: TinyConfig, tmp_path: Path, mode: str) -> None:
    codec, average, more = MODES[mode]
    config = tiny({**GRID, **more, "codec.codec": codec, "lanes.average": average})
    process, run = started(up, config, tmp_path)
    summary = ended(process)
    assert ends(run, config) == digests(config)
    assert summary["averaging"]
    rounds = [records(run / f"lane-{lane}", 1, "round") for lane in range(2)]
    assert [each["digest"] for each in rounds[0]] == [each["digest"] for each in rounds[1]]
    assert all(each["members"] == [0, 1] for each in rounds[0])
    sent = records(run / "lane-0", 1, "end")[-1]["links"][-1]
    assert sent["peer_lane"] == 1
    assert sent["sent_bytes"]["averaging"] > 0


@pytest.mark.slow
def test_lanes_over_tls(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """On links of both kinds, with one certificate that is good for every place."""
    config, now = tiny({**GRID, "lanes.average": "outer:every=3", "run.steps": 6}), datetime.now(UTC)
    init(config.run.name, tmp_path / "authority", days=2, now=now)
    issue([0, 1], tmp_path / "authority", tmp_path / "keys", lanes=[0, 1], days=1, now=now)
    process, run = started(up, config, tmp_path, "--keys", str(tmp_path / "keys"))
    ended(process)
    assert ends(run, config) == digests(config)
    for lane, stage in product(range(2), range(2)):
        assert records(run / f"lane-{lane}", stage, "start")[0]["tls"] is True


@pytest.mark.slow
def test_three_lanes_over_thin_links(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({**GRID, "lanes.count": 3, "lanes.average": "outer:every=3,delay=1", "link.link": "20mbit,5ms"})
    process, run = started(up, config, tmp_path)
    ended(process)
    assert ends(run, config) == digests(config)


@pytest.mark.slow
def test_another_run_in_the_same_directory_uses_nothing_of_the_first(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """Other text makes other contributions to rounds of the same numbers."""
    first = tiny({**GRID, "lanes.average": "outer:every=3", "run.seed": 5})
    process, run = started(up, first, tmp_path)
    ended(process)
    config = tiny({**GRID, "lanes.average": "outer:every=3", "run.seed": 6})
    process, run = started(up, config, tmp_path, "--overwrite")
    ended(process)
    assert ends(run, config) == digests(config)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gradients", "fragments"])
def test_a_lost_stage_is_its_own_lanes_loss(up: Up, tiny: TinyConfig, tmp_path: Path, mode: str) -> None:
    """The tail of lane 1 is killed, then the head of lane 0: a lane goes back by itself, and does its rounds again."""
    codec, average, more = MODES[mode]
    config = tiny({**GRID, **more, "run.steps": 28, "codec.codec": codec, "lanes.average": average})
    process, run = started(up, config, tmp_path, "--restarts", "2")
    carry_out(run / "lane-1", [Kill(at=Done(stage=0, steps=6), stage=1)])
    carry_out(run / "lane-0", [Kill(at=Done(stage=0, steps=18), stage=0)])
    ended(process)
    assert ends(run, config) == digests(config)
    starts = [[len(records(run / f"lane-{lane}", stage, "start")) for stage in range(2)] for lane in range(2)]
    assert starts == [[2, 1], [1, 2]]
    assert [len(records(run / f"lane-{lane}", 1 - lane, "rollback")) for lane in range(2)] == [1, 1]


@pytest.mark.slow
def test_a_lane_that_is_told_to_end_ahead_of_the_others_ends_alike(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """It waits in a round to which the other one, which ends before it, contributes no more."""
    config = tiny({**GRID, "run.steps": 30, "lanes.average": "outer:every=10"})
    process, run = started(up, config, tmp_path)
    until(lambda: len(records(run / "lane-1", 0, "step")) >= 8, "lane 1's first steps")
    nodes = [psutil.Process(records(run / "lane-1", stage, "start")[0]["process"]) for stage in range(2)]
    for node in nodes:
        node.suspend()
    ahead = len(records(run / "lane-1", 0, "step")) // 10 * 10 + 9
    until(lambda: len(records(run / "lane-0", 0, "step")) >= ahead, "lane 0's coming to a round")
    process.terminate()
    until(lambda: "the run stops after" in (run / "lane-0" / "stage-0.log").read_text(), "the word to end")
    for node in nodes:
        node.resume()
    ended(process)
    assert "which ended before: this lane goes back" in (run / "lane-0" / "stage-0.log").read_text()
    for lane, stage in product(range(2), range(2)):
        assert records(run / f"lane-{lane}", stage, "end")
        assert not records(run / f"lane-{lane}", stage, "failed")
    ended(up("--resume", str(run)))
    assert ends(run, config) == digests(config)


@pytest.mark.slow
def test_ctrl_c_ends_lanes_of_which_one_is_ahead(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    """As a terminal does it: all processes get it at once. One lane waits in a round for the other, which is behind."""
    config = tiny({**GRID, "run.steps": 30, "lanes.average": "outer:every=10"})
    (tmp_path / "run.toml").write_text(dump_config(config))
    run = start_apart(tmp_path / "run.toml", tmp_path / "run")
    out = run.out
    try:
        until(lambda: len(records(out / "lane-1", 0, "step")) >= 8, "lane 1's first steps")
        slow = [psutil.Process(records(out / "lane-1", stage, "start")[0]["process"]) for stage in range(2)]
        for node in slow:
            node.suspend()
        ahead = len(records(out / "lane-1", 0, "step")) // 10 * 10 + 9
        until(lambda: len(records(out / "lane-0", 0, "step")) >= ahead, "lane 0's coming to a round")
        nodes = [
            psutil.Process(records(out / f"lane-{lane}", stage, "start")[0]["process"])
            for lane, stage in product(range(2), range(2))
        ]
        for node in slow:
            node.resume()
        os.killpg(run.process.pid, signal.SIGINT)
        code, _, errors = run.end()
    finally:
        run.process.kill()
    assert code == 130
    (line,) = errors
    wanted = (
        r"thinpipe: error: interrupted after \d+ of 30 steps; all stages are stopped; thinpipe up --resume .* goes on"
    )
    assert re.match(wanted, line)
    assert not any(node.is_running() and node.status() != psutil.STATUS_ZOMBIE for node in nodes)
    for lane, stage in product(range(2), range(2)):
        assert not records(out / f"lane-{lane}", stage, "failed")
    ended(up("--resume", str(out)))
    assert ends(out, config) == digests(config)


@pytest.mark.slow
def test_a_lane_that_gives_nonsense_is_left_out_of_that_round(tiny: TinyConfig, tmp_path: Path) -> None:
    """Both other lanes refuse it, and say so; nobody ends, and all have the bits that follow from who took part."""
    more = {"lanes.average": "outer:every=3", "run.steps": 45, "lanes.round_timeout_s": 5}
    config = tiny({**GRID, "lanes.count": 3, "pipeline.stages": 1, **more})
    (tmp_path / "run.toml").write_text(dump_config(config))
    run, ports = tmp_path / "run", free_ports(2)
    logs = [tmp_path / f"lane-{lane}.log" for lane in range(3)]
    with ExitStack() as stack:
        nodes = {}
        start(["--version"], stack.enter_context((tmp_path / "version.log").open("w"))).wait(END_S)
        for lane in (1, 0, 2):  # nobody must be late for the first round: lane 1 has an interpreter to start
            command = ["node", "--config", str(tmp_path / "run.toml"), "--out", str(run)]
            command += ["--stage", "0", "--lane", str(lane)]
            command += ["--listen", f"127.0.0.1:{ports[lane]}"] if lane < 2 else []
            command += [part for lower in range(lane) for part in ("--lateral", f"{lower}=127.0.0.1:{ports[lower]}")]
            log = stack.enter_context(logs[lane].open("w"))
            if lane == 1:
                command = [sys.executable, "-m", "tests.nonsense_node", "4", *command]
                nodes[lane] = subprocess.Popen(command, cwd=ROOT, env=node_environment(), stdout=log, stderr=log)
            else:
                nodes[lane] = start(command, log)
            stack.callback(nodes[lane].wait)
            stack.callback(nodes[lane].kill)
            until(lambda: records(run / "lane-1", 0, "start"), "the start of lane 1")
        for lane, node in nodes.items():
            assert node.wait(END_S) == 0, logs[lane].read_text()
    refused = "lane 1's contribution to round 4 of stage 0 is refused: int4 payload"
    for lane in (0, 2):
        faults = [each for each in records(run / f"lane-{lane}", 0, "fault") if each["code"] == "bad-payload"]
        assert len(faults) == 3
        assert all(refused in each["reason"] for each in faults)
        assert "the round goes on without this lane" in faults[-1]["reason"]
    told = [each["reason"] for each in records(run / "lane-1", 0, "fault") if each["code"] == "bad-payload"]
    # Three times by each; but who is left out ends its connections, and what is on its way then may be lost.
    assert len(told) in (4, 5, 6)
    for whom in ("refused by the node at", "refused by the peer at"):  # lane 0, which is dialled, and lane 2
        assert any(whom in each for each in told)
    members = records(run / "lane-0", 0, "members")
    assert (members[0]["first"], members[0]["members"]) == (4, [0, 2])
    found = recompute(run, tmp_path / "again", config)
    assert found.equal, [each.words() for each in found.lanes]
    assert all(each.ended for each in found.lanes)
