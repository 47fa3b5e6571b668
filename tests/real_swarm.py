"""Real bootstraps and nodes that find each other by the DHT on loopback, started as a user starts them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from thinpipe.cli import app
from thinpipe.protocol.grid_place import GridPlace
from typer.testing import CliRunner

from .preloaded import start
from .real_faults import records
from .real_node import until


class Process:
    """`thinpipe` with these arguments; its words are in `log`."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("w") as out:
            self.popen = start(arguments, out)
        self._descendants: list[psutil.Process] = []

    @property
    def words(self) -> str:
        return self.log.read_text()

    def until_says(self, pattern: str) -> re.Match[str]:
        def said() -> re.Match[str] | None:
            assert self.popen.poll() is None or re.search(pattern, self.words), f"ended, having said: {self.words}"
            return re.search(pattern, self.words)

        until(said, f"{self.log.name} to say {pattern}")
        found = said()
        assert found
        return found

    def ends(self, code: int = 0, within_s: float = 90.0) -> str:
        """Its words, once it has ended with that exit code."""
        self.popen.wait(within_s)
        assert self.popen.returncode == code, self.words
        return self.words

    def family(self) -> list[psutil.Process]:
        """It and all that it has started; nobody, when it has ended by itself."""
        try:
            own = psutil.Process(self.popen.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def dht(self) -> psutil.Process:
        """The process that holds its part of the DHT."""
        children = psutil.Process(self.popen.pid).children()
        return next(each for each in children if "thinpipe.node.discovery.dht" in each.cmdline())

    def p2pd(self) -> psutil.Process:
        return next(each for each in self.family() if each.name() == "p2pd")

    def kill(self) -> None:
        """SIGKILL; nobody whom it had started may be there for long."""
        family = self.family()
        self.popen.kill()
        self.popen.wait()
        all_gone(family)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


def all_gone(family: Sequence[psutil.Process]) -> None:
    """Or wait to be taken note of by whoever started them."""

    def there(each: psutil.Process) -> bool:
        try:
            return each.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until(lambda: not any(map(there, family)), f"the end of {family}")


class Scene:
    """Everything that a test starts, and ends with it."""

    def __init__(self, directory: Path, local: Sequence[str]) -> None:
        self.directory, self._local = directory, list(local)
        self.keys: list[str] = []  # options
        self.started: list[Process] = []

    def use_keys(self, run: str, stages: str) -> None:
        """Everything from here on has one directory of keys for these stages."""
        authority, issued = str(self.directory / "authority"), str(self.directory / "keys")
        init = ["keys", "init", "--run", run, "--out", authority]
        issue = ["keys", "issue", "--stages", stages, "--authority", authority, "--out", issued]
        for arguments in (init, issue):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
        self.keys = ["--keys", issued]

    def run(self, name: str, *arguments: str) -> Process:
        self.started.append(Process(self.directory / f"{name}.log", *arguments))
        return self.started[-1]

    def dht(self, name: str, *options: str) -> Process:
        return self.run(name, "dht", "--listen", "127.0.0.1:0", *self.keys, *options)

    def node(self, name: str, join: str, stage: str, *options: str) -> Process:
        """Its records are in a directory of its own, and so are its checkpoints: as on another machine."""
        out = str(self.directory / name)
        return self.run(
            name, "node", "--join", join, "--stage", stage, "--out", out, *self._local, *self.keys, *options
        )

    def status(self, join: str) -> dict[str, Any]:
        told = self.run(f"status-{len(self.started)}", "status", "--join", join, "--json", *self.keys)
        return json.loads(told.ends())

    def close(self) -> None:
        for process in self.started:
            process.close()


DOOR = r"node --join (\S+) --stage auto"
MULTIADDR = r"or by --join (/\S+)"
JOINED = r"as stage (\d+) of \d+(?: in lane (\d+) of \d+)? at (\S+),"


def served(process: Process) -> tuple[int, str]:
    """(stage, endpoint) of a node that has joined."""
    found = process.until_says(JOINED)
    return int(found[1]), found[3]


def served_place(process: Process) -> GridPlace:
    """Of a node that has joined a run of several lanes."""
    found = process.until_says(JOINED)
    return GridPlace(int(found[1]), int(found[2]))


def end_of(directory: Path, stage: int) -> str:
    """The digest of the stage's state at the run's end."""
    return records(directory, stage, "end")[-1]["state_sha256"]
