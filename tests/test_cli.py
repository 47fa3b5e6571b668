"""The command as its user meets it: real processes, what they print, how they end, and what they leave behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from thinpipe.cli import app
from thinpipe.node import local
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.sim.launch import node_launch
from thinpipe.sim.launch.local_swarm import SwarmError
from thinpipe.sim.reports.summary import read_records
from typer.testing import CliRunner

from .conftest import TinyConfig

DEADLINE_S = 120.0
STAGES = 2
# For runs that only have to be there: they wait most of the time, and leave the cores to other tests.
IDLE = ("--link", "300mbit,100ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """One `thinpipe up` as a process."""

    process: subprocess.Popen[str]
    out: Path

    def steps(self, stage: int) -> int:
        return sum(record["event"] == "step" for record in read_records(self.out / f"stage-{stage}.jsonl"))

    def trains(self) -> bool:
        return all(self.steps(stage) for stage in range(STAGES))

    def nodes(self) -> list[psutil.Process]:
        """The processes of this run's nodes that are alive."""
        starts = [read_records(self.out / f"stage-{stage}.jsonl")[:1] for stage in range(STAGES)]
        return [found for (start,) in starts if (found := alive(start["process"], self.out)) is not None]

    def end(self) -> tuple[int, str, list[str]]:
        """Exit code, stdout, the lines of stderr."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, stdout, stderr.splitlines()


def alive(pid: int, out: Path) -> psutil.Process | None:
    """The process, unless it is gone, a zombie, or another one that got its number."""
    try:
        process = psutil.Process(pid)
        is_ours = str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if is_ours else None


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.05)


def _heeded() -> None:
    """A test runner in the background has signals ignored, which its children would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(config: Path, out: Path, *options: str) -> Up:
    command = [sys.executable, "-m", "thinpipe.cli", "up", "--config", str(config), "--out", str(out), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heeded,
    )
    return Up(process=process, out=out)


@pytest.fixture(scope="module")
def run_toml(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(dump_config(tiny({"pipeline.stages": STAGES})))
    return path


@pytest.fixture(scope="module")
def endless(run_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Up]]:
    """Runs that would train for days, one for each way of being ended; they start side by side to save time."""
    ways = ("a node is killed", "interrupted", "the launcher is killed", "SIGUSR1", "SIGHUP")
    runs = {way: start(run_toml, tmp_path_factory.mktemp("run"), "--steps", "1000000", *IDLE) for way in ways}
    try:
        until(lambda: all(run.trains() or run.process.poll() is not None for run in runs.values()), "the first steps")
        yield runs
    finally:
        for run in runs.values():
            left = run.nodes()
            run.process.kill()
            for process in left:
                process.kill()
            run.process.communicate()


@pytest.mark.slow
def test_a_killed_node_ends_the_run_by_name(endless: dict[str, Up]) -> None:
    run = endless["a node is killed"]
    (victim, _) = run.nodes()
    victim.kill()
    code, _, errors = run.end()
    assert code == 1
    assert errors == [
        "thinpipe: error: stage 0 was killed by SIGKILL, by hand or because memory ran out; "
        f"see {run.out / 'stage-0.log'}"
    ]
    assert run.nodes() == []


@pytest.mark.slow
def test_ctrl_c_stops_all_stages(endless: dict[str, Up]) -> None:
    run = endless["interrupted"]
    assert len(run.nodes()) == STAGES
    run.process.send_signal(signal.SIGINT)
    code, _, errors = run.end()
    assert code == 130
    (line,) = errors
    assert re.fullmatch(
        r"thinpipe: error: interrupted after \d+ of 1000000 steps; all stages are stopped(, and there is no checkpoint "
        r"yet: it begins anew, with --overwrite|; thinpipe up --resume \S+ goes on after step \d+)",
        line,
    )
    assert run.nodes() == []
    for stage in range(STAGES):
        last = (run.out / f"stage-{stage}.log").read_text().splitlines()[-1]
        assert last in ("thinpipe: error: stopped by SIGINT", "thinpipe: error: stopped by SIGTERM")  # it sends both
        assert run.steps(stage)


@pytest.mark.slow
@pytest.mark.parametrize("warned_by", ["SIGUSR1", "SIGHUP"])
def test_a_warning_ends_a_run_after_the_step_under_way(endless: dict[str, Up], warned_by: str) -> None:
    run = endless[warned_by]
    for node in run.nodes():  # schedulers warn all processes of a job
        node.send_signal(signal.Signals[warned_by])
    run.process.send_signal(signal.Signals[warned_by])
    code, stdout, errors = run.end()
    assert code == 0, errors
    assert f"stopped by {warned_by}\n" in stdout
    done = run.steps(0)
    assert f"this run ended after {done} of 1000000 steps; thinpipe up --resume {run.out} goes on\n" in stdout
    for stage in range(STAGES):
        assert (run.out / "checkpoints" / f"stage-{stage}" / f"step-{done:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("moment", ["begun", "nodes"])
def test_in_the_first_seconds_too(run_toml: Path, tmp_path: Path, moment: str, name: str) -> None:
    """As soon as the program can hear it; and when its nodes are there, whatever they have done."""
    run = start(run_toml, tmp_path / "run", "--steps", "1000000")
    if moment == "begun":
        until(lambda: _catches(run.process.pid, signal.Signals[name]), "the program to hear signals")
    else:
        until(lambda: (run.out / "stage-1.log").exists(), "the nodes")
    run.process.send_signal(signal.Signals[name])
    code, stdout, errors = run.end()
    if code == 0:  # the nodes were quick, and ended in order
        assert f"stopped by {name}\n" in stdout
        return
    assert code == 130
    (line,) = errors
    assert re.match(rf"thinpipe: error: stopped by {name}( before the run began| after 0 of 1000000 steps|$)", line)


def _catches(pid: int, number: signal.Signals) -> bool:
    (caught,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_nodes_end_by_themselves_when_the_launcher_is_killed(endless: dict[str, Up]) -> None:
    run = endless["the launcher is killed"]
    assert len(run.nodes()) == STAGES
    run.process.kill()
    until(lambda: not run.nodes(), "the nodes to notice")
    for stage in range(STAGES):
        *_, last, end = read_records(run.out / f"stage-{stage}.jsonl")
        assert (end["event"], end["exit_code"]) == ("exit", 1)
        assert last["event"] == "fault"
        assert re.fullmatch(r"the launcher \(process \d+\) is gone", last["reason"])  # it, or what forks for it


@pytest.mark.slow
def test_a_run_prints_json_alone_and_its_summary_is_complete(run_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    run = start(run_toml, out, "--json", "--link", "50mbit,2ms")
    code, stdout, errors = run.end()
    assert code == 0, errors
    summary = json.loads(stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert not [line for line in errors if "error" in line or "Traceback" in line]

    assert summary["mode"] == "swarm"
    assert summary["steps"] == 3
    assert summary["tokens_per_step"] == 8 * 32
    assert summary["tokens"] == 3 * 8 * 32
    for key in ("first_loss", "train_loss", "val_loss"):
        assert 0 < summary[key] < 20
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["train_s"])

    sent = summary["bytes"]
    boundary_elements = summary["tokens"] * 64  # width; bf16 both ways
    assert sent["activation"] == sent["gradient"] == 2 * boundary_elements
    assert min(sent[kind] for kind in ("token_ids", "control", "framing", "evaluation", "probe")) > 0
    outside = sent["evaluation"] + sent["probe"] + sent.get("checkpoint_copy", 0)
    assert sent["total"] == sum(sent.values()) - sent["total"] - outside
    assert summary["bytes_per_token"] == pytest.approx(sent["total"] / summary["tokens"])
    assert summary["ratio"] == pytest.approx(4 * boundary_elements / sent["total"])

    (boundary,) = summary["boundaries"]
    assert boundary["configured_bits_per_s"] == 50e6
    assert 0 < boundary["measured_bits_per_s"] < 50e6 * 1.05
    assert 0 < boundary["utilisation"] < 1.05
    checks = summary["link_check"]
    assert [(check["stage"], check["boundary"], check["direction"]) for check in checks] == [
        (0, 0, "forward"),
        (1, 0, "backward"),
    ]
    for check in checks:
        assert check["configured_bits_per_s"] == 50e6
        assert check["measured_bits_per_s"] > 0
        assert (check["warning"] is None) == (45e6 <= check["measured_bits_per_s"] <= 55e6)
    assert checks[0]["round_trip_s"] > 0.004
    assert len(summary["stages"]) == STAGES
    for stage in summary["stages"]:
        assert stage["compute_s"] > 0
        assert stage["codec_s"] > 0
        assert stage["wait_s"] >= 0
        assert stage["peak_rss_bytes"] > 2**26
        assert len(stage["state_sha256"]) == 64
    assert summary["faults"] == []
    assert run.nodes() == []


def test_one_process_prints_json_alone_too(run_toml: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["up", "--config", str(run_toml), "--out", str(tmp_path / "run"), "--one-process", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mode"] == "one-process"


def test_a_run_that_diverges_has_failed_and_says_what_to_do(run_toml: Path, tmp_path: Path) -> None:
    options = ["--set", "optim.muon_lr=1e30", "--set", "optim.adamw_lr=1e30"]
    result = CliRunner().invoke(
        app, ["up", "--config", str(run_toml), "--out", str(tmp_path / "run"), "--one-process", *options]
    )
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("thinpipe: error: value nan at element 0 of FORWARD tensor of boundary 0, step 1")
    assert line.endswith("lower the learning rate or clip")


class Begun(NamedTuple):
    """A run to go on with, and what its nodes would be started on."""

    run: Path
    started: list[RunConfig]

    def go_on(self, *options: str) -> Any:
        return CliRunner().invoke(app, ["up", "--resume", str(self.run), *options])


@pytest.fixture
def has_started(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    has_started = Begun(tmp_path, [])
    (tmp_path / "run.toml").write_text(
        dump_config(tiny({"pipeline.stages": STAGES, "pipeline.schedule": "zb:rtt_ratio=1"}))
    )

    def start_nothing(run: Path, **_: object) -> None:
        has_started.started.append(load_config(run / "run.toml"))
        raise SwarmError("nothing was started", 1)

    monkeypatch.setattr(local, "run_swarm", start_nothing)
    return has_started


def test_what_is_each_machines_own_may_change_when_a_run_goes_on(has_started: Begun) -> None:
    before = load_config(has_started.run / "run.toml")
    whole = [
        "--stages",
        str(STAGES),
        "--steps",
        "3",
        "--schedule",
        "zb:rtt_ratio=auto",
        "--config",
        str(has_started.run / "run.toml"),
    ]
    done = has_started.go_on(*whole, "--checkpoint-every", "5", "--link", "80mbit,5ms", "--set", "link.verify=fail")
    assert "nothing was started" in done.stderr
    (started,) = has_started.started
    assert (started.checkpoint.every, started.link.link, started.link.verify) == (5, "80mbit,5ms", "fail")
    assert started.shared() == before.shared()
    has_started.go_on()
    assert has_started.started[1] == started
    assert sorted(path.name for path in has_started.run.iterdir()) == ["run.lock", "run.toml"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "400", "--seed", "7"], "run.seed is 7 here and 1 there"),
        (["--set", "run.extended=[[2,2]]"], "run.extended is [[2, 2]] here and [] there"),
        (["--codec", "int8", "--checkpoint-every", "5"], "codec.codec is 'int8' here and 'bf16' there"),
        (["--schedule", "1f1b:rtt_ratio=auto"], "pipeline.schedule is '1f1b' here and 'zb:rtt_ratio=1' there"),
        (["--config", "{other}"], "run.seed is 7 here and"),
    ],
)
def test_what_a_run_computes_does_not_change_when_it_goes_on(
    has_started: Begun, tmp_path_factory: pytest.TempPathFactory, options: list[str], named: str
) -> None:
    other = tmp_path_factory.mktemp("other") / "other.toml"
    other.write_text("[run]\nseed = 7\n")
    before = (has_started.run / "run.toml").read_text()
    done = has_started.go_on(*(option.format(other=other) for option in options))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"thinpipe: error: --resume {has_started.run}: {named}" in done.stderr
    assert "begin another run with --out" in done.stderr
    assert (has_started.started, (has_started.run / "run.toml").read_text()) == ([], before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--overwrite"], "--resume goes on with a run, --overwrite replaces one; omit one"),
        (["--out", "elsewhere"], "stays in its directory, not elsewhere; omit --out"),
    ],
)
def test_what_contradicts_going_on(has_started: Begun, options: list[str], named: str) -> None:
    done = has_started.go_on(*options)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert named in done.stderr
    assert has_started.started == []
    assert "nothing was started" in has_started.go_on("--out", str(has_started.run)).stderr  # says the same twice


def test_the_last_words_of_a_node_are_not_those_of_the_one_before_it(tmp_path: Path) -> None:
    """A node that dies with a traceback leaves no line of ours, where the one before it had left one."""
    said = []
    for resume, words in ((False, "thinpipe: error: no space"), (True, "Traceback"), (True, "thinpipe: error: late")):
        node = node_launch.start_node(tmp_path, 1, ["sh", "-c", f"echo {words!r}; exit 1"], [], resume=resume)
        node.process.wait(DEADLINE_S)
        said.append(node.why)
    assert said == [
        "stage 1 ended: no space",
        f"stage 1 ended with exit code 1: Traceback; see {tmp_path / 'stage-1.log'}",
        "stage 1 ended: late",
    ]


HELP = {
    (): ["up", "node", "Train one language model", "Host one stage"],
    ("up",): ["--stages", "--codec", "--link", "--out", "--set", "--json", "--overwrite", "(mapl)", "(4)", "(1f1b)"],
    ("probe",): ["--to", "--listen", "--link", "--seconds", "--once", "--json", "host:port", "(2)", "300mbit,25ms"],
    ("compare",): ["--recipe", "RECIPE", "--seeds", "--target", "--pace", "(an eighth of the run)", "(all cores)"],
    ("node",): ["--config", "--stage", "--listen", "--next", "--device", "host:port", "(beside run.toml;"],
}


@pytest.mark.parametrize("command", HELP, ids=" ".join)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_names_every_option_and_its_default(command: tuple[str, ...], columns: int) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(columns), "TERMINAL_WIDTH": ""})
    assert result.exit_code == 0
    words = result.stdout.split()
    text = " ".join(word for word in words if word != "│")
    for phrase in HELP[command]:
        assert phrase in text
    assert "--no-" not in text
    assert "--parent" not in text  # between the launcher and its nodes
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_a_program_without_arguments_shows_its_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Commands" in result.output


def test_the_entry_point_runs_as_a_module_and_refuses_in_one_line() -> None:
    """The one refusal that is tried as a process; the others run in this one (test_bad_input)."""
    done = subprocess.run(
        [sys.executable, "-m", "thinpipe.cli", "up", "--set", "steps"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "thinpipe: error: --set wants section.key=value, got 'steps'\n"
