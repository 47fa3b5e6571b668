"""docs/walkthrough.md is carried out as it is written: each machine a namespace behind a line of 80 Mb/s."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from thinpipe.node.config_file import load_config
from thinpipe.sim.launch.node_launch import node_environment
from thinpipe.sim.links.netns import Network, network
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.reports.summary import read_records

from .in_memory import run_reference

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "walkthrough.md"
MACHINES = ("alpha", "beta", "gamma")
LOST_AFTER = 20  # steps
DEADLINE_S = 120.0


@dataclass
class Lan:
    """The three machines: a namespace and a home directory each."""

    made: Network
    homes: Path
    running: list[tuple[str, subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def home(self, machine: str) -> Path:
        path = self.homes / machine
        path.mkdir(exist_ok=True)
        return path

    def address(self, text: str) -> str:
        for index, machine in enumerate(MACHINES):
            text = text.replace(f"{machine}.example", self.made.addresses[index])
        return text

    def run(self, machine: str, line: str) -> str:
        """One command line of the document; returns what it printed, or "" for one that runs on (&)."""
        background = line.endswith("&")
        words = shlex.split(line.rstrip("& "))
        if words[0] == "scp":
            self._copy(machine, [word for word in words[1:] if not word.startswith("-")])
            return ""
        assert words[0] == "thinpipe", line
        index = MACHINES.index(machine)
        command = [*self.made.prefix(index), sys.executable, "-m", "thinpipe.cli", *map(self.address, words[1:])]
        log = self.home(machine) / f"{len(self.running)}-{words[1]}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self.home(machine), stdout=out, stderr=subprocess.STDOUT, env=node_environment()
            )
        if background:
            self.running.append((machine, process, log))
            return ""
        assert process.wait(DEADLINE_S) == 0, f"{line}: {log.read_text()}"
        return log.read_text()

    def _copy(self, machine: str, words: list[str]) -> None:
        source, target = words
        if ".example:" in source:
            host, _, path = source.partition(".example:")
            shutil.copy2(self.home(host) / path, self.home(machine) / target)
        else:
            host, _, path = target.partition(".example:")
            assert host in MACHINES
            assert not path
            shutil.copytree(self.home(machine) / source, self.home(host) / Path(source).name)

    def process(self, machine: str, command: str) -> tuple[subprocess.Popen[bytes], Path]:
        return next((process, log) for on, process, log in self.running if on == machine and command in log.name)


@pytest.fixture
def lan(tmp_path: Path, kernel_links: None) -> Iterator[Lan]:
    del kernel_links
    with network(len(MACHINES), LinkProfile.parse("80mbit")) as made:
        lan = Lan(made, tmp_path)
        try:
            yield lan
        finally:
            for _, process, _ in lan.running:
                process.kill()
                process.wait()


def steps(lan: Lan, machine: str, stage: int) -> int:
    found = [
        r for r in read_records(lan.home(machine) / f"runs/walkthrough/stage-{stage}.jsonl") if r["event"] == "step"
    ]
    return found[-1]["step"] + 1 if found else 0


def until_step(lan: Lan, machine: str, stage: int, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while steps(lan, machine, stage) < step:
        for on, process, log in lan.running:
            assert process.poll() is None, f"{log.name} on {on} ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"no step {step} of {machine} in {DEADLINE_S} s"
        time.sleep(0.1)


def until_claimed(lan: Lan) -> None:
    """Each node has said which stage it takes, and builds it."""
    deadline = time.monotonic() + DEADLINE_S
    for machine in ("alpha", "beta"):
        process, log = lan.process(machine, "node")
        while "joins run" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{machine} has no stage: {log.read_text()}"
            time.sleep(0.1)


def blocks() -> list[tuple[str, str]]:
    """(what it is for, text) of every block of code with a machine."""
    found = re.findall(r"^```(?:sh|toml) (\S+)\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == 8
    return found


@pytest.mark.slow
def test_the_walkthrough_does_what_it_says(lan: Lan) -> None:
    (where, settings), *rest = blocks()
    machine, _, name = where.partition(":")
    (lan.home(machine) / name).write_text(settings)
    printed = ""
    for machine, text in rest:
        if machine == "gamma":  # section 4: beta is lost, and then the bootstrap
            until_step(lan, "alpha", 0, LOST_AFTER)
            assert "beta" in {on for on, _, _ in lan.running}
            for victim, command in (("beta", "node"), ("alpha", "dht")):
                process, _ = lan.process(victim, command)
                process.send_signal(signal.SIGKILL)
                process.wait()
                lan.running = [entry for entry in lan.running if entry[1] is not process]
            assert not (lan.home("gamma") / "runs").exists()
        if "summary" in text:
            for on, process, log in lan.running:
                assert process.wait(DEADLINE_S) == 0, f"{log.name} on {on}: {log.read_text()}"
        for line in text.splitlines():
            if "status" in line:
                until_claimed(lan)
            printed = lan.run(machine, line)
            if line.startswith("thinpipe dht"):
                process, log = lan.process("alpha", "dht")
                deadline = time.monotonic() + DEADLINE_S
                while "--join" not in log.read_text():  # how to join
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, f"the bootstrap said only: {log.read_text()}"
                    time.sleep(0.1)
            if "status" in line:
                assert all(lan.address(f"{each}.example:7010") in printed for each in ("alpha", "beta")), printed
    assert "60 steps" in printed
    assert "unknown" in printed  # what beta sent
    assert "stage 1: its records have" in printed

    home = lan.home("alpha")
    ends = [read_records(home / f"runs/walkthrough/stage-{stage}.jsonl") for stage in (0, 1)]
    digests = [next(r for r in reversed(records) if r["event"] == "end")["state_sha256"] for records in ends]
    assert any(record["event"] == "rollback" for record in ends[0])
    check = next(record for record in ends[0] if record["event"] == "ready")["link_check"]
    assert [each["configured_bits_per_s"] for each in check] == [80e6]
    assert check[0]["warning"] is None
    assert digests == run_reference(load_config(home / "run.toml"), lan.homes / "reference").state_sha256
    assert load_config(lan.home("gamma") / "runs/walkthrough/run.toml").run.name == "walkthrough"
