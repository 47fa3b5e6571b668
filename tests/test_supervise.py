"""`thinpipe supervise` with real processes on loopback, and what it stands on: locks, records, settings that must
agree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from thinpipe.cli import app
from thinpipe.commands import supervise
from thinpipe.node.checkpoints.manifest import Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.one_process import OneProcess
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.sim.launch import privileges, service_supervisor, stage_lock
from thinpipe.sim.launch.node_launch import free_ports, node_environment
from thinpipe.sim.launch.service_supervisor import Assignment, Supervisor
from thinpipe.sim.launch.stage_lock import ended_after, take_lock
from thinpipe.sim.links import tc
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.reports.summary import read_records
from typer.testing import CliRunner

from .conftest import TinyConfig
from .in_memory import run_reference
from .real_faults import records
from .test_checkpoint import small

DEADLINE_S = 150.0
STEPS = 120


@pytest.fixture(scope="module")
def settings(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "run.toml"
    overrides = {"run.steps": STEPS, "pipeline.stages": 2, "checkpoint.every": 10, "link.link": "300mbit,2ms"}
    path.write_text(dump_config(tiny(overrides)))
    return path


@pytest.fixture(scope="module")
def reference(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """State digests of the same run in one process."""
    return run_reference(load_config(settings), tmp_path_factory.mktemp("reference")).state_sha256


class Swarm:
    """Keepers as processes, each with a log."""

    def __init__(self, run: Path, settings: Path) -> None:
        self.run, self._settings = run, settings
        self._peers = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *options: str) -> None:
        command = [sys.executable, "-m", "thinpipe.cli", "supervise", str(self.run), "--peers", self._peers]
        command += ["--config", str(self._settings), "--node", "--insecure", *options]
        with (self.run.parent / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=node_environment(), start_new_session=True
            )

    def log(self, name: str) -> str:
        return (self.run.parent / f"{name}.log").read_text()

    def until(self, there: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not there():
            assert time.monotonic() < deadline_s, f"{what}: {[self.log(name)[-500:] for name in self.processes]}"
            time.sleep(0.05)

    def steps(self, stage: int) -> int:
        return sum(record["event"] == "step" for record in read_records(self.run / f"stage-{stage}.jsonl"))

    def kill(self, name: str) -> None:
        """The supervisor and all that it started, at once, as the end of a container is."""
        family = [
            *psutil.Process(self.processes[name].pid).children(recursive=True),
            psutil.Process(self.processes[name].pid),
        ]
        for each in family:
            each.kill()
        self.processes.pop(name).wait()

    def codes(self) -> dict[str, int]:
        return {name: process.wait(DEADLINE_S) for name, process in self.processes.items()}

    def digests(self) -> list[str]:
        summary = json.loads((self.run / "summary.json").read_text())
        return [stage["state_sha256"] for stage in summary["stages"]]


@contextmanager
def swarm(tmp_path: Path, settings: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path / "run", settings)
    try:
        yield made
    finally:
        for name in list(made.processes):
            if made.processes[name].poll() is None:
                made.kill(name)


@pytest.mark.slow
def test_a_standby_takes_the_place_of_whoever_is_killed(tmp_path: Path, settings: Path, reference: list[str]) -> None:
    with swarm(tmp_path, settings) as made:
        made.start("standby", "--standby", "--health", str(tmp_path / "healthy"))
        made.start("stage-0", "--stage", "0")
        made.start("stage-1", "--stage", "1")
        made.until(lambda: made.steps(1) > 20, "steps")
        made.kill("stage-1")
        made.until(lambda: "stage 1 was lost; this one takes its place" in made.log("standby"), "the standby's word")
        made.start("stage-1-again", "--stage", "1")
        made.until(lambda: "stage 1 is served elsewhere" in made.log("stage-1-again"), "the second standby's word")
        # A node alone is started again by its supervisor, which nobody else notices.
        node = psutil.Process(made.processes["stage-0"].pid).children()[0]
        node.kill()
        assert made.codes() == {"standby": 0, "stage-0": 0, "stage-1-again": 0}
        assert "its node was killed by SIGKILL; it is started again" in made.log("stage-0")
        assert f"{STEPS} steps of 256 tokens (swarm)" in made.log("stage-0")
        assert f"step {STEPS}/{STEPS}" in made.log("stage-0")
        assert (tmp_path / "healthy").read_text() == "the run has ended\n"
        assert made.digests() == reference
        # Once more, it is only summed up.
        made.start("stage-0-later", "--stage", "0")
        assert made.codes()["stage-0-later"] == 0
        assert "is complete" in made.log("stage-0-later")
        assert f"{STEPS} steps of 256 tokens (swarm)" in made.log("stage-0-later")


@pytest.mark.slow
def test_each_lane_is_kept_and_the_first_one_sums_up(tmp_path: Path, tiny: TinyConfig) -> None:
    """Two lanes of one stage each, so that all is said on lateral links; one is killed, and the standby takes it."""
    lanes = {"lanes.count": 2, "lanes.average": "outer:every=5", "pipeline.stages": 1}
    config = tiny({**lanes, "run.steps": 60, "checkpoint.every": 10, "link.link": "300mbit,2ms"})
    (tmp_path / "settings.toml").write_text(dump_config(config))
    with swarm(tmp_path, tmp_path / "settings.toml") as made:
        made.start("standby", "--standby")
        made.start("lane-0", "--stage", "0", "--lane", "0")
        made.start("lane-1", "--stage", "0", "--lane", "1")
        made.until(lambda: len(records(tmp_path / "run" / "lane-1", 0, "round")) > 2, "rounds")
        made.kill("lane-1")
        word = "stage 0 of lane 1 was lost; this one takes its place"
        made.until(lambda: word in made.log("standby"), "the standby's word")
        assert made.codes() == {"standby": 0, "lane-0": 0}
        assert "60 steps of 512 tokens (swarm, 2 lanes: means and sums)" in made.log("lane-0")
        reference = OneProcess(config)
        reference.train()
        assert made.digests() == [lane.stages[0].state_sha256() for lane in reference.lanes]


@pytest.mark.long  # what `up` does at SIGTERM is in test_recovery
def test_sigterm_ends_after_a_step_and_the_next_start_goes_on(
    tmp_path: Path, settings: Path, reference: list[str]
) -> None:
    with swarm(tmp_path, settings) as made:
        for stage in range(2):
            made.start(f"stage-{stage}", "--stage", str(stage))
        made.until(lambda: made.steps(1) > 20, "steps")
        for process in made.processes.values():
            process.send_signal(signal.SIGTERM)
        assert set(made.codes().values()) == {0}
        done = ended_after(made.run, 0) or STEPS
        assert done < STEPS
        for stage in range(2):
            made.start(f"stage-{stage}", "--stage", str(stage))
        assert set(made.codes().values()) == {0}
        assert f"stage 1 goes on after {done} steps" in made.log("stage-1")
        assert made.digests() == reference


@pytest.mark.slow
def test_a_node_that_cannot_start_ends_its_keeper_and_the_standby(tmp_path: Path, settings: Path) -> None:
    with swarm(tmp_path, settings) as made:
        made.start("standby", "--standby")
        for stage in range(2):
            made.start(f"stage-{stage}", "--stage", str(stage), "--node", "--keys /nowhere")
        assert made.codes() == {"standby": 1, "stage-0": 2, "stage-1": 2}
        assert "/nowhere" in made.log("stage-0")
        assert "no stage could be served" in made.log("standby")


def test_a_lock_is_one_processes_and_ends_with_it(tmp_path: Path) -> None:
    held = take_lock(tmp_path, 0)
    assert held is not None
    assert take_lock(tmp_path, 0) is None
    assert take_lock(tmp_path, 1) is not None
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], pass_fds=[held])
    os.close(held)
    assert take_lock(tmp_path, 0) is None  # the node lives
    child.kill()
    child.wait()
    assert take_lock(tmp_path, 0) is not None


def test_only_the_newest_process_counts_as_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "stage-0.jsonl"
    assert ended_after(tmp_path, 0) is None
    records.write_text('{"event": "start"}\n{"event": "step", "step": 0}\n{"event": "end", "steps": 7}\n')
    assert ended_after(tmp_path, 0) == 7
    monkeypatch.setattr(stage_lock, "TAIL_BYTES", 40)  # from within the step
    assert ended_after(tmp_path, 0) == 7
    with records.open("a") as file:
        file.write('{"event": "start"}\n{"event": "end", "st')  # being written
    assert ended_after(tmp_path, 0) is None


def test_where_other_stages_leave_no_records_nobody_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    assignment = Assignment(run=tmp_path, stage=1, peers=["a:1", "b:2"], steps=3)
    (tmp_path / "stage-1.jsonl").write_text('{"event": "start"}\n{"event": "end", "steps": 3}\n')
    assert Supervisor(assignment, said.append)._conclude(GridPlace(1)) == 0
    assert "thinpipe summary" in said[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_is_over_stays_over_where_a_stage_is_alone(tmp_path: Path, stage: int) -> None:
    """As a service is started again with its machine. Whoever was not let go yet goes on; so does who failed."""
    said: list[str] = []
    records = tmp_path / f"stage-{stage}.jsonl"
    kept = Supervisor(Assignment(run=tmp_path, stage=stage, peers=["a:1", "b:2"], steps=3), said.append)
    assert not kept._complete()
    begin, end, left = '{"event": "start"}\n', '{"event": "end", "steps": 3}\n', '{"event": "exit", "exit_code": 0}\n'
    for lines in (begin + end, begin + end + left.replace("0", "1"), begin + left, begin + end + left + begin):
        records.write_text(lines)
        assert not kept._complete()
    records.write_text(begin + end + left)
    assert kept.run() == 0
    assert len(said) == 1
    assert "is complete: 3 steps" in said[0]


PEERS = ("--peers", "127.0.0.1:1,127.0.0.1:2")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--stage", "0"), "--peers has 0 stages"),
        ((*PEERS,), "say which stage to serve"),
        (("--stage", "0", "--standby", *PEERS), "say which stage to serve"),
        (("--stage", "2", *PEERS), "--peers has 2 stages"),
        (("--stage", "0", *PEERS, "--lane", "1"), "--lane 1: the run has 1 lane, so only 0"),
        (("--stage", "1", *PEERS, "--lanes", "2"), "--peers has 2 addresses, for 1 stages of 2 lanes"),
        (("--stage", "0", *PEERS, "--lanes", "3"), "--peers has 2 addresses, for 0.666667 stages of 3 lanes"),
        (
            ("--standby", *PEERS, "--lane", "0"),
            "--standby serves any stage that is lost, in whatever lane; omit --lane",
        ),
        (("--stage", "0", *PEERS, "--cap", "tight"), "there is no 'tight'; choose user, kernel, auto"),
        (("--stage", "0", *PEERS, "--codec", "bf16 int8 int8 int8"), "has 4 parts"),
        (("--stage", "0", *PEERS, "--link", "300mbits"), "unknown unit 'mbits'"),
        (("--stage", "0", *PEERS, "--user", "nobody-here"), "there is no user 'nobody-here'"),
        (("--stage", "0", "--peers", "127.0.0.1,127.0.0.1:2"), "'127.0.0.1' is not host:port"),
        (("--stage", "0", *PEERS, "--health", "/nowhere/healthy"), "there is no directory /nowhere; make it"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    done = CliRunner().invoke(app, ["supervise", str(tmp_path / "run"), *options])
    assert done.exit_code == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "run.toml").exists()


def test_the_end_of_an_earlier_life_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped is gone on with, and the standby is there before the second stage's supervisor."""
    records = [tmp_path / f"stage-{stage}.jsonl" for stage in range(2)]
    for path in records:
        path.write_text('{"event": "start"}\n{"event": "end", "steps": 6}\n')
    lock = take_lock(tmp_path, 0)
    assert lock is not None
    said: list[str] = []
    waits: list[float] = []

    def go_on(seconds: float) -> None:
        """What happens while the standby sleeps: both stages go on, and at last they end."""
        waits.append(seconds)
        if len(waits) == 3:
            for path in records:
                path.write_text(path.read_text() + '{"event": "start"}\n')
        elif len(waits) == 6:
            for path in records:
                path.write_text(path.read_text() + '{"event": "end", "steps": 9}\n')
        assert len(waits) < 20

    monkeypatch.setattr(service_supervisor.time, "sleep", go_on)
    monkeypatch.setattr(service_supervisor, "STANDBY_S", 1e9)
    try:
        code = Supervisor(Assignment(run=tmp_path, stage=None, peers=["a:1", "b:2"], steps=40), said.append).run()
    finally:
        os.close(lock)
    assert (code, len(waits)) == (0, 6)
    assert said == ["stands by for any stage"]


def test_the_last_step_is_said_of_a_node_that_has_just_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words come after the supervisor has last looked."""
    steps = [{"event": "step", "step": step, "seconds": 0.1, "loss": 3.5, "tokens_per_s": 9} for step in range(2)]
    words = "".join(json.dumps(each) + "\n" for each in steps)
    program = f"open({str(tmp_path / 'stage-0.jsonl')!r}, 'w').write({words!r})"
    monkeypatch.setattr(Supervisor, "_command", lambda *_, **__: [sys.executable, "-S", "-c", program])
    monkeypatch.setattr(service_supervisor, "POLL_S", DEADLINE_S)
    said: list[str] = []
    assert Supervisor(Assignment(run=tmp_path, stage=0, peers=["a:1", "b:2"], steps=2), said.append).run() == 0
    assert said[0] == "step 2/2  loss 3.500  9 tokens/s"


def failing(run: Path, *reasons: str, replays: bool = True) -> list[str]:
    """A node in whose stead a script writes what one writes that fails: each life with the next of these reasons, and
    the last one for ever."""
    program = f"""
import json, pathlib, sys
records, reasons = pathlib.Path({str(run / "stage-0.jsonl")!r}), {list(reasons)!r}
text = records.read_text() if records.exists() else ""
lives, text = text.count("start"), text[: text.rfind(chr(10)) + 1]
failed = {{"event": "failed", "stage": 1, "completed_steps": 4, "told": True, "replays": {replays}}}
failed["reason"] = reasons[min(lives, len(reasons) - 1)]
records.write_text(text)
with records.open("a") as file:
    for record in ({{"event": "start"}}, failed):
        file.write(json.dumps(record) + "\\n")
sys.exit(1)
"""
    return [sys.executable, "-S", "-c", program]


def kept_until_it_gives_up(run: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> list[str]:
    """What the supervisor of stage 0 says, three restarts being allowed, of this in the place of a node."""
    monkeypatch.setattr(Supervisor, "_command", lambda *_, **__: command)
    monkeypatch.setattr(service_supervisor, "PAUSE_FIRST_S", 0.0)
    monkeypatch.setattr(service_supervisor, "POLL_S", DEADLINE_S)
    said: list[str] = []
    assignment = Assignment(run=run, stage=0, peers=["a:1", "b:2"], steps=9, restarts=3)
    assert Supervisor(assignment, said.append).run() == 1
    return said


@pytest.mark.parametrize(
    ("reasons", "lives"),
    [(["not finite"], 2), (["no disk", "not finite"], 3), (["a", "b", "a"], 3), (["a", "b", "c", "d", "e", "f"], 4)],
)
def test_what_fails_alike_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[str], lives: int
) -> None:
    """Whichever stage it was. Another failure may be gone the next time, as often as --restarts says."""
    said = kept_until_it_gives_up(tmp_path, monkeypatch, failing(tmp_path, *reasons))
    assert (tmp_path / "stage-0.jsonl").read_text().count("start") == lives
    alike = f"stage 1 failed after 4 steps: {reasons[min(lives, len(reasons)) - 1]}; it failed in the same way before"
    assert said[-1].startswith(alike) == (lives < 4), said


def test_what_may_pass_is_started_again_as_often_as_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = kept_until_it_gives_up(tmp_path, monkeypatch, failing(tmp_path, "the source is away", replays=False))
    assert (tmp_path / "stage-0.jsonl").read_text().count("start") == 4
    assert said[-1] == "stage 0: its node was ended with exit code 1, and was restarted 3 times already"


def test_a_record_that_was_broken_off_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the place of a process that was killed writes where its last record began."""
    records = tmp_path / "stage-0.jsonl"
    records.write_text('{"event": "data"}\n{"event": "step", "codec": "' + "x" * 5000)
    kept_until_it_gives_up(tmp_path, monkeypatch, failing(tmp_path, "not finite"))
    assert records.read_text().count("start") == 2


@pytest.mark.parametrize("completed", [0, 1, 20])
def test_it_says_after_which_step_a_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completed: int
) -> None:
    """The records hold a rollback of an earlier life, and the node writes two."""
    records = tmp_path / "stage-0.jsonl"
    records.write_text('{"event": "start"}\n{"event": "rollback", "completed": 7}\n')
    words = "".join(json.dumps({"event": "rollback", "completed": each}) + "\n" for each in (completed, 5))
    program = f"open({str(records)!r}, 'a').write({words!r})"
    monkeypatch.setattr(Supervisor, "_command", lambda *_, **__: [sys.executable, "-S", "-c", program])
    monkeypatch.setattr(service_supervisor, "POLL_S", DEADLINE_S)
    said: list[str] = []
    assert Supervisor(Assignment(run=tmp_path, stage=0, peers=["a:1", "b:2"], steps=40), said.append).run() == 0
    steps = {1: "goes on after 1 step", 20: "goes on after 20 steps"}
    begins = "begins again with step 1: there is no checkpoint that all stages have"
    assert said[:2] == [
        "stage 0 has been started before, and is resumed",
        f"stage 0 {steps.get(completed, begins)}",
    ]
    assert not [line for line in said[2:] if "goes on" in line]


@pytest.mark.parametrize("what", ["lost", "lost in part", "there", "there as a copy", "none yet", "elsewhere", "done"])
def test_a_run_whose_checkpoints_are_lost_does_not_begin_again(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One that was lost before its first checkpoint does, by itself; and where a stage is alone it asks its
    neighbour."""
    config = tiny({"pipeline.stages": 2})
    (tmp_path / "run.toml").write_text(dump_config(config))
    for stage in range(1 if what == "elsewhere" else 2):
        done = [{"event": "start"}, {"event": "checkpoint", "completed": 20}, {"event": "checkpoint", "completed": 40}]
        kept = done[:1] if what == "none yet" and stage else done
        kept += [{"event": "end", "steps": config.run.steps}] if what == "done" else []
        lines = "".join(json.dumps({"time_s": 1.0, **each}) + "\n" for each in kept)
        (tmp_path / f"stage-{stage}.jsonl").write_text(lines)
    saved = tmp_path / "checkpoints"
    for stage, place in enumerate([saved, saved / "copies" if what == "there as a copy" else saved]):
        if what.startswith("there") or (what == "lost in part" and not stage):
            fingerprint = Fingerprint(run="run", stages=2, configuration="c0ffee")
            CheckpointStore(place, stage=stage, fingerprint=fingerprint).write(small(40), generation=0, written_s=0)
    monkeypatch.setattr(Supervisor, "run", lambda _: 7)
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS])
    if what.startswith("lost"):
        assert done.exit_code == 2
        assert done.stderr == (
            f"thinpipe: error: {tmp_path}: all stages have written checkpoints, up to step 40, but {saved} has none "
            "that all of them have; put them back there, or name another directory to begin anew\n"
        )
    else:
        assert (done.exit_code, done.stderr) == (7, "")


def test_data_that_takes_long_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A health check must not have a node killed that tokenises."""
    line = json.dumps({"event": "preparing", "stage": 0, "seconds": 30.0}) + "\n"
    records, health = tmp_path / "stage-0.jsonl", tmp_path / "healthy"
    program = f"import time; open({str(records)!r}, 'w').write({line!r}); time.sleep(0.3)"
    monkeypatch.setattr(Supervisor, "_command", lambda *_, **__: [sys.executable, "-S", "-c", program])
    monkeypatch.setattr(service_supervisor, "POLL_S", 0.05)
    monkeypatch.setattr(service_supervisor, "STARTING_S", -1e9)  # and so nothing is healthy that does not move
    assignment = Assignment(run=tmp_path, stage=0, peers=["a:1", "b:2"], steps=2, health=health)
    Supervisor(assignment, lambda _: None)._one_life(GridPlace(0), os.open(tmp_path / "lock", os.O_CREAT))
    assert health.read_text() == "stage 0 starts\n"


def test_settings_of_another_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nsteps = 40\n[pipeline]\nstages = 2\n")
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS, "--steps", "20", "--seed", "7"])
    assert done.exit_code == 2
    assert "is another run's: run.seed is 7 here and 1 there, run.steps is 20 here and 40 there; name" in done.stderr
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS, "--steps", "50"])
    assert done.exit_code == 2
    assert (
        "has run.steps = 40, here run.steps = 50; to go on with that run, write run.steps = 50 into it" in done.stderr
    )
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", "--peers", "a:1,b:2,c:3"])
    assert "pipeline.stages is 3 here and 2 there" in done.stderr


def test_what_is_each_nodes_own_reaches_the_node_of_a_run_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what its file, or somebody else's, says already is not repeated."""
    (tmp_path / "run.toml").write_text("[run]\nsteps = 40\n[pipeline]\nstages = 2\n[checkpoint]\nkeep = 7\n")
    posts: list[Assignment] = []

    def run(self: Supervisor) -> int:
        posts.append(self.assignment)
        return 0

    monkeypatch.setattr(Supervisor, "run", run)
    given = {
        "THINPIPE_STEPS": "40",
        "THINPIPE_CHECKPOINT_EVERY": "5",
        "THINPIPE_DATA": "/mi ne",
        "THINPIPE_LINK": "80mbit,5ms",
        "THINPIPE_SET": "link.verify=fail checkpoint.keep=7",
        "THINPIPE_NODE": "--device cuda",
    }
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS], env=given)
    assert done.exit_code == 0, done.output
    (assignment,) = posts
    own = ["--set", 'data.source="/mi ne"', "--set", "checkpoint.every=5", "--set", 'link.verify="fail"']
    assert list(assignment.node) == ["--link", "80mbit,5ms", *own, "--device", "cuda"]
    (tmp_path / "my.toml").write_text("[run]\nsteps = 40\n[pipeline]\nstages = 2\n[checkpoint]\nkeep = 8\n")
    done = CliRunner().invoke(
        app, ["supervise", str(tmp_path), "--stage", "0", *PEERS, "--config", str(tmp_path / "my.toml")]
    )
    assert done.exit_code == 0, done.output
    assert list(posts[1].node) == ["--link", "none", "--set", "checkpoint.keep=8"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS, "--node", "--keys '/k"])
    assert done.exit_code == 2
    assert "No closing quotation; write it as in a shell" in done.stderr
    assert not list(tmp_path.iterdir())


def test_summary_wants_a_run_that_has_ended(tmp_path: Path) -> None:
    runner = CliRunner()
    none = runner.invoke(app, ["summary", str(tmp_path)])
    assert (none.exit_code, none.stderr.count("\n")) == (2, 1)
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 2\n[model]\nvocab_size = 512\n")
    early = runner.invoke(app, ["summary", str(tmp_path)])
    assert early.exit_code == 1
    assert "has not begun: no stage has records here; no summary yet" in early.stderr


def told(stage: int, *lives: tuple[range, int | None]) -> str:
    """The records of a stage of two: of each process the steps that it did, 1000 bytes each, and its end, if any."""
    lines: list[dict[str, object]] = []
    for steps, end in lives:
        sent = {"activation": 1000 * len(steps)}
        lines.append({"event": "start"})
        for done, step in enumerate(steps, 1):
            so_far = {"boundary 0-1": {"activation": 1000 * done}}
            lines.append(
                {"event": "step", "step": step, "loss": 5.0, "tokens": 100, "seconds": 0.1, "sent_bytes": so_far}
            )
        link = {"boundary": 0, "direction": "backward" if stage else "forward", "sent_bytes": sent}
        link |= dict.fromkeys(("configured_bits_per_s", "measured_bits_per_s", "utilisation"))
        spent = dict.fromkeys(("cpu_s", "compute_s", "codec_s", "wait_s", "peak_rss_bytes", "state_bytes"), 1)
        spent |= {"layers": 2, "train_s": 2.0}
        if end is not None:
            lines.append({"event": "end", "steps": end, "links": [link], "state_sha256": "0" * 64, **spent})
    return "".join(json.dumps(line) + "\n" for line in lines)


def summed_up(run: Path, *records: str, options: tuple[str, ...] = ()) -> Any:
    (run / "run.toml").write_text(f"[pipeline]\nstages = {len(records)}\n[model]\nvocab_size = 512\nwidth = 64\n")
    for stage, text in enumerate(records):
        (run / f"stage-{stage}.jsonl").write_text(text)
    return CliRunner().invoke(app, ["summary", str(run), *options])


def test_a_run_that_goes_on_after_its_end_has_not_ended(tmp_path: Path) -> None:
    earlier, goes_on = (range(4), 4), (range(4, 7), None)
    done = summed_up(tmp_path, told(0, earlier, goes_on), told(1, earlier, goes_on))
    assert done.exit_code == 1
    assert "has not ended, and nobody works on it" in done.stderr
    later = (range(4, 10), 10)
    done = summed_up(tmp_path, told(0, earlier, later), told(1, earlier, later), options=("--json",))
    found = json.loads(done.stdout)
    assert (found["steps"], found["bytes_per_token"], found["lacking"]) == (10, 20.0, [])
    assert done.stderr == ""


def test_where_records_were_lost_bytes_are_unknown_and_not_too_few(tmp_path: Path) -> None:
    """A machine was lost, and its records with it: those of the stage begin where another one took over."""
    whole, taken_over = told(0, (range(10), 10)), told(1, (range(6, 10), 10))
    done = summed_up(tmp_path, whole, taken_over)
    assert done.exit_code == 0
    assert done.stdout.count("unknown") == 2
    assert done.stderr.startswith("thinpipe: warning: stage 1: its records have 4 of 10 steps, the first is step 7;")
    found = json.loads(summed_up(tmp_path, whole, taken_over, options=("--json",)).stdout)
    assert (found["steps"], found["bytes_per_token"], found["ratio"]) == (10, None, None)
    assert found["lacking"] == [{"stage": 1, "first_step": 6, "steps": 4, "of_steps": 10}]
    # The head's are as good as any other's, and a stage that took over at the very end has no step at all.
    found = json.loads(
        summed_up(tmp_path, told(0, (range(6, 10), 10)), told(1, (range(10), 10)), options=("--json",)).stdout
    )
    assert (found["ratio"], found["lacking"][0]["stage"]) == (None, 0)
    done = summed_up(tmp_path, whole, told(1, (range(0), 10)))
    assert (done.exit_code, done.stderr.count("\n")) == (0, 1)
    assert "stage 1: its records have 0 of 10 steps; what it sent" in done.stderr
    done = summed_up(tmp_path, told(0, (range(0), 10)), whole)
    assert done.exit_code == 1
    assert "the records of stage 0" in done.stderr


@pytest.mark.slow
def test_without_the_capability_the_line_says_what_to_give(tmp_path: Path) -> None:
    """Root in a network of its own, but without NET_ADMIN, as in a container that was not given it."""
    prefix = ["unshare", "--net", "setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    if os.geteuid() != 0:
        pytest.skip("only root can make a network of its own, to be without a capability in it")
    if missing := [name for name in ("unshare", "setpriv", "ip", "tc") if shutil.which(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed (util-linux, iproute2)")
    here = subprocess.run([*prefix, "tc", "qdisc"], capture_output=True, text=True, check=False)
    if here.returncode:
        pytest.skip(f"this kernel does not let root do it: {here.stderr.strip()}")
    script = 'ip link add one type veth peer name two && ip link set one up && exec "$@"'
    inside = ["unshare", "--net", "sh", "-c", script, "sh", *prefix[2:]]
    command = [sys.executable, "-m", "thinpipe.cli", "supervise", str(tmp_path / "run"), "--stage", "0", *PEERS]
    done = subprocess.run(
        [*inside, *command, "--link", "80mbit", "--cap", "kernel"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "the kernel does not cap the links here: `tc qdisc add dev one" in done.stderr
    assert "give it the capability NET_ADMIN" in done.stderr
    assert done.stderr.count("\n") == 1


class Kernel:
    """What ip and tc would do: interfaces, and the queueing disciplines on them as `tc qdisc show` says them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *interfaces: str) -> None:
        self.disciplines: dict[str, list[str]] = {name: [] for name in interfaces}
        self.without: set[str] = set()  # kinds, or interfaces, that it refuses
        monkeypatch.setattr(tc, "run", self._run)
        monkeypatch.setattr(tc, "require", lambda *_: None)

    def _run(self, command: list[str]) -> str:
        if command[0] == "ip":
            return json.dumps([{"ifname": name, "flags": ["UP"]} for name in self.disciplines])
        _, _, what, _, name, *rest = command
        there = self.disciplines[name]
        if what == "show":
            return "\n".join(there)
        if what == "del":
            there.clear()
            return ""
        root = rest[0] == "root"
        where, handle, kind = ("root", *rest[2:4]) if root else (f"parent {rest[1]}", *rest[3:5])
        if kind in self.without or name in self.without or (root and there):
            raise tc.KernelLinkError(f"no {kind} on {name}")
        there.append(f"qdisc {kind} {handle} {where} refcnt 2")
        return ""

    @property
    def capped(self) -> dict[str, int]:
        return {name: len(there) for name, there in self.disciplines.items() if there}


SLOW = LinkProfile.parse("80mbit,25ms")


@pytest.mark.parametrize("refused", ["tbf", "eth1"])
def test_a_cap_that_fails_leaves_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: str
) -> None:
    kernel = Kernel(monkeypatch, "eth0", "eth1")
    assert supervise._cap(SLOW, "stage 0", must=True).kernel == "all"
    assert kernel.capped == {"eth0": 2, "eth1": 2}  # of an earlier life, from here on
    kernel.without = {refused}
    assert supervise._cap(SLOW, "stage 0", must=False) == SLOW
    assert not kernel.capped
    assert "the node caps its links itself" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        supervise._cap(SLOW, "stage 0", must=True)
    assert not kernel.capped


def test_no_link_takes_off_our_cap_and_nobody_elses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Kernel(monkeypatch, "eth0", "eth1")
    supervise._cap(LinkProfile.parse("80mbit"), "stage 0", must=True)
    kernel.disciplines["eth1"] = ["qdisc tbf 10: root refcnt 2", "qdisc netem 1: root refcnt 2"]
    none = LinkProfile.parse("none")
    assert supervise._cap(none, "stage 0", must=False) == none
    assert kernel.capped == {"eth1": 2}
    assert "stage 0: eth0 no longer capped" in capsys.readouterr().out


def test_a_refusal_comes_before_any_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, "eth0")
    (tmp_path / "run.toml").write_text('[run]\nsteps = 40\n[pipeline]\nstages = 2\n[link]\nlink = "80mbit"\n')
    options = ["supervise", str(tmp_path), "--stage", "0", *PEERS, "--link", "80mbit", "--cap", "kernel"]

    def refused(user: str) -> None:
        assert kernel.capped
        raise stage_lock.SupervisorError(f"may not become {user}")

    for more, line in (
        (("--user", "nobody-here"), "there is no user"),
        (("--seed", "7"), "is another run's"),
        (("--user", "root"), "may not become root"),
    ):
        monkeypatch.setattr(privileges, "become", refused)
        done = CliRunner().invoke(app, [*options, *more])
        assert done.exit_code == 2
        assert line in done.stderr
        assert not kernel.capped


@pytest.mark.parametrize("corrected", [True, False])
def test_a_mark_of_an_earlier_life_ends_no_standby(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    """All failed once, and are started again, the standby first; or the standby alone is."""
    marks = [tmp_path / f"stage-{stage}.lock" for stage in range(2)]
    for mark in marks:
        mark.write_text("exit code 2\n")
    polls: list[float] = []

    def go_on(seconds: float) -> None:
        polls.append(seconds)
        if corrected and len(polls) in (3, 6):  # one supervisor after the other claims its stage
            marks[len(polls) // 6].write_text("")
        if corrected and len(polls) in (5, 9):  # and that fails too
            marks[len(polls) // 9].write_text("exit code 2\n")
        if not corrected and len(polls) == 4:
            monkeypatch.setattr(service_supervisor, "STARTING_S", 0.0)
        assert len(polls) < 20

    monkeypatch.setattr(service_supervisor.time, "sleep", go_on)
    said: list[str] = []
    code = Supervisor(Assignment(run=tmp_path, stage=None, peers=["a:1", "b:2"], steps=40), said.append).run()
    assert (code, len(polls)) == (1, 9 if corrected else 4)
    assert "no stage could be served" in said[-1]


def test_a_health_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    kept = Supervisor(Assignment(run=tmp_path, stage=0, peers=["a:1"], steps=1, health=healthy), said.append)
    kept._healthy("step 1")
    kept._healthy("step 2")
    assert said == [f"cannot write {healthy}: Is a directory; a health check of it sees no progress"]
    healthy.rmdir()
    kept._healthy("step 3")
    assert healthy.read_text() == "step 3\n"


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 2\n")
    (tmp_path / "stage-0.lock").mkdir()  # root may open any file
    done = CliRunner().invoke(app, ["supervise", str(tmp_path), "--stage", "0", *PEERS])
    assert done.exit_code == 2
    assert f"cannot open {tmp_path}/stage-0.lock: Is a directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_iproute2_the_node_caps_its_links(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert supervise._cap(SLOW, "stage 0", must=False) == SLOW
    assert "ip is not installed" in capsys.readouterr().out


def test_a_summary_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 2\n[model]\nvocab_size = 512\n")
    (tmp_path / "summary.json").mkdir()
    monkeypatch.setattr(
        "thinpipe.sim.reports.lanes_summary.summarise_run",
        lambda *_, **__: {"lacking": {}, "faults": [], "mode": "swarm", "stages": []},
    )
    monkeypatch.setattr("thinpipe.sim.reports.summary.mode_of", lambda _: "swarm")
    done = CliRunner().invoke(app, ["summary", str(tmp_path), "--write"])
    assert done.exit_code == 2
    assert f"cannot write {tmp_path}/summary.json: Is a directory" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--model", "huge", "--cap", "kernel", "--link", "80mbit"), "huge"),
        (("--data", "/nowhere/text"), "no such file or directory: /nowhere/text"),
        (("--node", "--device nonsense"), "compute.device 'nonsense' is unknown"),
    ],
)
def test_settings_that_cannot_work_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], line: str
) -> None:
    """Nor is an interface capped for them."""
    monkeypatch.setattr(supervise, "_cap", lambda *_, **__: pytest.fail("capped"))
    done = CliRunner().invoke(app, ["supervise", str(tmp_path / "run"), "--stage", "0", *PEERS, *options])
    assert done.exit_code == 2, done.stderr
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
