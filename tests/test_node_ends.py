"""What the launcher makes of nodes that end: whom it blames, what it starts again, and what not a second time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.node.run_records import MetricsWriter
from thinpipe.sim.launch import local_swarm, node_launch
from thinpipe.sim.launch.local_swarm import SwarmError, run_swarm
from thinpipe.sim.launch.node_ends import Failure, failure_in
from thinpipe.sim.launch.node_launch import NodeProcess
from thinpipe.sim.reports.lanes import lane_path
from thinpipe.sim.reports.record_tail import whole_bytes

from .preloaded import ran
from .real_faults import records
from .real_node import until

STAGES = 3


class Nodes:
    """Scripts in the place of nodes, which write what nodes write. `plot`: for each life of a node, what it does; the
    stages of the second lane follow those of the first. replays: what fails is the computation.

    fails: it fails. told: it ends because stage 1 has failed. hears: the same a little later than it. ends: well.
    later: the same, after the others. waits: until it is told to end. alone: it fails, and nobody was told. dies: by
    SIGKILL. lane: of the stage 1 that fails, where lanes are one group.
    """

    def __init__(
        self, run: Path, plot: dict[int, list[str]], reasons: list[str], *, replays: bool, lane: int | None
    ) -> None:
        self.run, self.plot, self.reasons, self.replays, self.lane = run, plot, reasons, replays, lane
        self.lives = [0] * len(plot)

    def start(
        self, run: Path, stage: int, *_: object, resume: bool, lane: int, lanes: int, **__: object
    ) -> NodeProcess:
        node = lane * STAGES + stage
        life, self.lives[node] = self.lives[node], self.lives[node] + 1
        assert resume == bool(life)
        own = lane_path(run, lane, lanes)
        own.mkdir(exist_ok=True)
        todo, log = self.plot[node][life], own / f"stage-{stage}.log"
        path = own / f"stage-{stage}.jsonl"
        records_from = whole_bytes(path)
        reason = self.reasons[min(life, len(self.reasons) - 1)]
        failed = {"event": "failed", "stage": 1, "completed_steps": 4, "reason": reason, "told": todo != "alone"}
        failed["replays"] = self.replays
        if self.lane is not None:
            failed["lane"] = self.lane
        line = reason if todo in ("fails", "alone") else f"stage 1 failed after 4 steps: {reason}"
        program = f"""
import json, os, signal, sys, time
if {todo!r} == "hears":
    time.sleep(0.3)
if {todo!r} in ("fails", "hears", "told", "alone"):
    with open({str(path)!r}, "a") as file:
        file.write({json.dumps(failed) + chr(10)!r})
    print("thinpipe: error: " + {line!r}, flush=True)
    sys.exit(1)
if {todo!r} == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if {todo!r} == "later":
    time.sleep(1)
if {todo!r} == "waits":
    time.sleep(60)
"""
        with log.open("ab") as output:
            log_from = output.tell()
            command = [sys.executable, "-S", "-c", program]
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        return NodeProcess(stage, process, log, log_from, records_from, lane, lanes)


def outcome(
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    plot: dict[int, list[str]],
    *,
    restarts: int,
    reasons: tuple[str, ...] = ("not finite",),
    replays: bool = True,
    group_fails_in: int | None = None,
) -> tuple[str, list[int]]:
    """With which words the launcher ends, "" if well, and how many lives each stage had. group_fails_in: lanes are one
    group, and it is in this one that a stage fails."""
    grouped = group_fails_in is not None
    nodes = Nodes(tmp_path, plot, list(reasons), replays=replays, lane=group_fails_in)
    patch.setattr(local_swarm, "start_node", nodes.start)
    patch.setattr(local_swarm, "POLL_S", 0.02)
    try:
        run_swarm(tmp_path, stages=STAGES, lanes=len(plot) // STAGES, grouped=grouped, restarts=restarts)
    except SwarmError as error:
        return str(error), nodes.lives
    return "", nodes.lives


ALL_FAIL = {0: ["told"] * 9, 1: ["fails"] * 9, 2: ["hears"] * 9}


def test_the_stage_that_failed_is_blamed_and_not_the_first_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, lives = outcome(tmp_path, monkeypatch, ALL_FAIL, restarts=0)
    assert said == "stage 1 ended: not finite"
    assert lives == [1, 1, 1]
    for stage in (0, 2):  # they were let end by themselves, and know why
        assert (tmp_path / f"stage-{stage}.log").read_text().splitlines() == [
            "thinpipe: error: stage 1 failed after 4 steps: not finite"
        ]


def test_a_failure_that_replays_alike_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, lives = outcome(tmp_path, monkeypatch, ALL_FAIL, restarts=5)
    assert said == "stage 1 ended: not finite; it failed in the same way before, so it is not started again"
    assert lives == [2, 2, 2]


def test_what_may_pass_is_tried_again_though_it_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of data that was away at two starts may be there at the third."""
    plot = {0: ["told"] * 3 + ["ends"], 1: ["fails"] * 3 + ["ends"], 2: ["hears"] * 3 + ["ends"]}
    assert outcome(tmp_path, monkeypatch, plot, restarts=3, reasons=("away",), replays=False) == ("", [4, 4, 4])


def test_what_may_pass_is_tried_as_often_as_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, lives = outcome(tmp_path, monkeypatch, ALL_FAIL, restarts=2, reasons=("away",), replays=False)
    assert (said, lives) == ("stage 1 ended: away", [3, 3, 3])


def test_all_that_end_with_one_failure_are_started_again_for_the_price_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = {0: ["told", "ends"], 1: ["fails", "ends"], 2: ["hears", "ends"]}
    assert outcome(tmp_path, monkeypatch, plot, restarts=1) == ("", [2, 2, 2])


def test_failures_that_differ_are_tried_as_often_as_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, lives = outcome(tmp_path, monkeypatch, ALL_FAIL, restarts=2, reasons=("a", "b", "c", "d"))
    assert said == "stage 1 ended: c"
    assert lives == [3, 3, 3]


@pytest.mark.parametrize("replays", [True, False])
def test_others_stay_while_one_is_started_again_that_failed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: bool
) -> None:
    """A replacement that cannot begin tells nobody, and costs the others nothing."""
    plot = {0: ["waits"], 1: ["dies", *["alone"] * 4], 2: ["waits"]}
    said, lives = outcome(tmp_path, monkeypatch, plot, restarts=4, reasons=("", "no table"), replays=replays)
    again = "; it failed in the same way before, so it is not started again" if replays else ""
    assert said == f"stage 1 ended: no table{again}"
    assert lives == [1, 3 if replays else 5, 1]


def test_the_logs_of_those_that_the_launcher_ends_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = {0: ["waits"], 1: ["dies"], 2: ["waits"]}
    said, _ = outcome(tmp_path, monkeypatch, plot, restarts=0)
    assert said.startswith("stage 1 was killed by SIGKILL")
    for stage in (0, 2):
        last = (tmp_path / f"stage-{stage}.log").read_text().splitlines()[-1]
        assert last == f"thinpipe: this stage was ended by the launcher: {said}"


def test_nodes_of_lanes_are_told_where_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node dials its stage in the lower lanes, and listens for the stage above and for the higher lanes."""
    given: dict[tuple[int, int], list[str]] = {}

    def start(_: Path, stage: int, __: list[str], options: list[str], *, lane: int, **___: object) -> None:
        given[lane, stage] = options[: options.index("--prometheus")]

    monkeypatch.setattr(local_swarm, "start_node", start)
    swarm = local_swarm.Swarm(tmp_path, stages=2, lanes=3, ports=[10, 11, 20, 21, 30, 31])
    for node in range(6):
        swarm.start(node, resume=False)
    assert [swarm.of_lane(lane) for lane in range(3)] == [range(2), range(2, 4), range(4, 6)]
    here = "127.0.0.1"
    assert {place: " ".join(options) for place, options in given.items()} == {
        (0, 0): f"--listen {here}:10 --next {here}:11 --lane 0",
        (0, 1): f"--listen {here}:11 --lane 0",
        (1, 0): f"--listen {here}:20 --next {here}:21 --lane 1 --lateral 0={here}:10",
        (1, 1): f"--listen {here}:21 --lane 1 --lateral 0={here}:11",
        (2, 0): f"--next {here}:31 --lane 2 --lateral 0={here}:10 --lateral 1={here}:20",
        (2, 1): f"--listen {here}:31 --lane 2 --lateral 0={here}:11 --lateral 1={here}:21",
    }


def test_a_failure_in_one_lane_is_nothing_to_the_stages_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its own lane ends with it and is started again. The other one goes on, whatever it waits for."""
    second = {3: ["told", "ends"], 4: ["fails", "ends"], 5: ["hears", "ends"]}
    plot = {0: ["later"], 1: ["later"], 2: ["later"], **second}
    assert outcome(tmp_path, monkeypatch, plot, restarts=1) == ("", [1, 1, 1, 2, 2, 2])


def test_the_others_go_on_without_a_lane_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left of it is ended, and it is said; the run has ended well when they have."""
    plot = {0: ["later"], 1: ["later"], 2: ["later"], 3: ["waits"], 4: ["dies"], 5: ["waits"]}
    told: list[str] = []
    real = local_swarm.run_swarm
    monkeypatch.setattr(
        sys.modules[__name__], "run_swarm", lambda *args, **named: real(*args, **named, on_warning=told.append)
    )
    assert outcome(tmp_path, monkeypatch, plot, restarts=0) == ("", [1] * 6)
    (said,) = told
    assert said.startswith("lane 1 is lost, and the others go on without it: lane 1: stage 1 was killed by SIGKILL")
    assert f"see {tmp_path}/lane-1/stage-1.log" in said


def test_when_the_last_lane_is_lost_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = {0: ["waits"], 1: ["dies"], 2: ["waits"], 3: ["waits"], 4: ["dies"], 5: ["waits"]}
    said, _ = outcome(tmp_path, monkeypatch, plot, restarts=0)
    assert re.match("lane [01]: stage 1 was killed by SIGKILL", said)  # whichever is the last one


def test_the_same_failure_in_another_lane_is_not_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = {0: ["told", "ends"], 1: ["fails", "ends"], 2: ["hears", "ends"]}
    plot = {**fails, **{node + STAGES: plan for node, plan in fails.items()}}
    assert outcome(tmp_path, monkeypatch, plot, restarts=2) == ("", [2] * 6)


def test_a_group_ends_rather_than_go_on_without_a_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = {0: ["waits"], 1: ["waits"], 2: ["waits"], 3: ["waits"], 4: ["dies"], 5: ["waits"]}
    said, lives = outcome(tmp_path, monkeypatch, plot, restarts=0, group_fails_in=1)
    assert said.startswith("lane 1: stage 1 was killed by SIGKILL")
    assert lives == [1] * 6
    assert f"ended by the launcher: {said}" in (tmp_path / "lane-0" / "stage-0.log").read_text()


def test_a_lost_node_of_a_group_is_started_again_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = {node: ["later"] for node in range(6)} | {1: ["dies", "later"], 5: ["dies", "later"]}
    assert outcome(tmp_path, monkeypatch, plot, restarts=2, group_fails_in=0) == ("", [1, 2, 1, 1, 1, 2])


def test_a_failure_in_a_group_is_one_of_all_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All end with it and are started again for the price of one; of two stages 1 it is that of lane 1 which is
    blamed."""
    plot = {node: ["told"] * 3 for node in range(6)} | {4: ["fails"] * 3}
    said, lives = outcome(tmp_path, monkeypatch, plot, restarts=9, group_fails_in=1)
    assert said == "lane 1: stage 1 ended: not finite; it failed in the same way before, so it is not started again"
    assert lives == [2] * 6


@pytest.mark.parametrize("torn", ["", '{"event": "step", "codec": "' + "x" * 5000])
def test_a_record_that_was_broken_off_hides_no_failure(tmp_path: Path, torn: str) -> None:
    """Whoever takes the place of a process that was killed cuts off the record in which it broke off, and writes where
    that began."""
    path = tmp_path / "stage-1.jsonl"
    path.write_text('{"event": "start"}\n' + torn)
    started = node_launch.start_node(tmp_path, 1, ["/bin/true"], [], resume=True)
    started.process.wait()
    writer = MetricsWriter(path, append=True)
    writer.write("start", stage=1)
    assert started.failure is None
    writer.write("failed", stage=1, completed_steps=4, reason="not finite", told=True, replays=True)
    writer.close()
    assert started.failure == Failure(stage=1, completed_steps=4, reason="not finite", told=True, replays=True)


def test_only_the_newest_failure_counts() -> None:
    first, second = (Failure(stage=1, completed_steps=n, reason="x", told=True, replays=True) for n in (4, 9))
    said = [{"event": "failed", "stage": f.stage, "completed_steps": f.completed_steps} for f in (first, second)]
    lines = [
        {"event": "start"},
        *({**each, "reason": "x", "told": True, "replays": True, "time_s": 1.0} for each in said),
    ]
    assert failure_in(lines) == second
    assert failure_in(lines[:1]) is None
    assert str(second) == "stage 1 failed after 9 steps: x"


def test_a_failure_in_a_group_says_in_which_lane() -> None:
    record = {"event": "failed", "stage": 1, "lane": 2, "completed_steps": 4, "reason": "x", "time_s": 1.0}
    failure = failure_in([{**record, "told": True, "replays": True}])
    assert str(failure) == "stage 1 of lane 2 failed after 4 steps: x"


@pytest.mark.slow
def test_a_run_that_diverges_is_tried_twice_and_ends_with_its_reason(tmp_path: Path) -> None:
    """Real processes: a rate that is far too high makes a gradient or a value that is not finite, at the same step each
    time. Nobody waits for anything."""
    options = ["up", "--stages", "3", "--steps", "50", "--restarts", "5", "--out", str(tmp_path / "run")]
    options += ["--microbatches", "2", "--batch-size", "4", "--sequence-length", "32", "--checkpoint-every", "2"]
    for setting in (
        *("model.width=64", "model.layers=3", "model.vocab_size=512", "data.heldout_sequences=4"),
        *("optim.muon_lr=1e18", "optim.adamw_lr=1e18", "optim.warmup_steps=0", "codec.codec=bf16"),
    ):
        options += ["--set", setting]
    result = ran(*options)
    assert result.exit_code == 1, result
    last = result.stderr.splitlines()[-1]
    assert "not finite" in last or "nan" in last.lower(), result.stderr
    assert "failed in the same way before" in last
    until(lambda: all(records(tmp_path / "run", stage, "exit") for stage in range(3)), "all to end")
    for stage in range(3):
        assert len(records(tmp_path / "run", stage, "start")) == 2
        assert not [r for r in records(tmp_path / "run", stage, "fault") if r["code"] == "Stopped"]
