"""Three machines for documents that are carried out as they are written: each a namespace behind a capped line."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from thinpipe.sim.launch.node_launch import node_environment
from thinpipe.sim.links.netns import Network, network
from thinpipe.sim.links.shaper import LinkProfile

from .real_faults import records

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"
MACHINES = ("alpha", "beta", "gamma")
DEADLINE_S = 120.0


def blocks(document: str, count: int) -> list[tuple[str, str]]:
    """(what it is for, text) of every block of code with a machine; so many have to be there."""
    text = (DOCUMENTS / document).read_text(encoding="utf-8")
    found = re.findall(r"^```(?:sh|toml) (\S[^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(found) == count
    return found


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
            found, to = self.home(host) / path, self.home(machine) / target
            if found.is_dir():
                shutil.copytree(found, to / found.name)
            else:
                shutil.copy2(found, to)
        else:
            host, _, path = target.partition(".example:")
            assert host in MACHINES
            assert not path
            shutil.copytree(self.home(machine) / source, self.home(host) / Path(source).name)

    def processes(self, machine: str, command: str) -> list[tuple[subprocess.Popen[bytes], Path]]:
        return [(process, log) for on, process, log in self.running if on == machine and command in log.name]

    def lose(self, machine: str, command: str) -> None:
        """SIGKILL for all that runs there by that command."""
        for process, _ in (lost := self.processes(machine, command)):
            process.send_signal(signal.SIGKILL)
            process.wait()
        gone = [process for process, _ in lost]
        self.running = [entry for entry in self.running if entry[1] not in gone]

    def until(self, there: Callable[[], object], what: str) -> None:
        """Wait for it, while everything that runs goes on running."""
        deadline = time.monotonic() + DEADLINE_S
        while not there():
            for on, process, log in self.running:
                assert process.poll() is None, f"{log.name} on {on} ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {DEADLINE_S} s"
            time.sleep(0.1)

    def until_step(self, machine: str, run: str, stage: int, step: int) -> None:
        """That many steps are on record there. run: the directory with that stage's records, in its home."""

        def reached() -> bool:
            found = records(self.home(machine) / run, stage, "step")
            return bool(found) and found[-1]["step"] + 1 >= step

        self.until(reached, f"step {step} of {machine}")

    def until_said(self, machine: str, command: str, words: str) -> None:
        """By each process there that runs that command."""
        for _, log in self.processes(machine, command):
            self.until(lambda log=log: words in log.read_text(), f"'{words}' of {machine}'s {command}")

    def until_nodes_ended(self) -> None:
        """All of them, well; a bootstrap runs on."""
        for on, process, log in self.running:
            assert "dht" in log.name or process.wait(DEADLINE_S) == 0, f"{log.name} on {on}: {log.read_text()}"


@contextmanager
def three_machines(homes: Path, link: str = "80mbit") -> Iterator[Lan]:
    with network(len(MACHINES), LinkProfile.parse(link)) as made:
        lan = Lan(made, homes)
        try:
            yield lan
        finally:
            for _, process, _ in lan.running:
                process.kill()
                process.wait()
