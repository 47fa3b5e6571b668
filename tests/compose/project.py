"""docker-compose.yml, as its user meets it: bring it up with some settings, watch its log, break it, read its run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine import compose, docker

DEADLINE_S = 400.0  # of one `up`, on two busy cores
NAME = "thinpipe-test"
CHECKED = re.compile(r"boundary (\d)-\d: sends at (\S+), measured ([\d.]+) Mb/s \(([+-][\d.]+)%\)")


class Late(RuntimeError):
    """Something did not happen in time; the message says what, and holds the end of the log."""


@dataclass(slots=True)
class Project:
    """host: of the engine. file: the compose file. logs: directory for what each `up` printed."""

    host: str
    file: Path
    logs: Path
    settings: dict[str, str] = field(default_factory=dict)

    def _compose(self, *arguments: str) -> list[str]:
        tool = compose()
        assert tool
        return [*tool, "--ansi", "never", "-p", NAME, "-f", str(self.file), *arguments]

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        common = {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "1"}
        return {**os.environ, **common, **self.settings, **settings}

    def call(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """One command of compose, to its end."""
        return subprocess.run(
            self._compose(*arguments),
            env=self._environment(settings),
            cwd=self.file.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )

    def up(self, label: str, *options: str, **settings: str) -> Up:
        """Start it; see `Up`."""
        log = self.logs / f"{label}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._compose("up", "--no-build", *options),
                env=self._environment(settings),
                cwd=self.file.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Up(self, process, log, settings.get("RUN", "demo"))

    def down(self) -> None:
        """Containers, networks and the volume are gone then."""
        self.call("down", "-v", "--timeout", "5")

    def containers(self) -> dict[str, dict[str, Any]]:
        """By service: the engine's State of its container."""
        ids = docker(self.host, "ps", "-aq", "--filter", f"label=com.docker.compose.project={NAME}").stdout.split()
        if not ids:
            return {}
        found = json.loads(docker(self.host, "inspect", *ids).stdout)
        return {each["Config"]["Labels"]["com.docker.compose.service"]: each for each in found}

    def id(self, service: str) -> str:
        return self.containers()[service]["Id"]

    def summary(self, run: str) -> dict[str, Any]:
        """What `thinpipe summary` says of a run in the volume."""
        command = ["run", "--rm", "-v", f"{NAME}_runs:/runs", "thinpipe", "summary", f"/runs/{run}", "--json"]
        return json.loads(docker(self.host, *command).stdout)

    def in_volume(self, script: str) -> str:
        """Output of a shell script with the volume in /runs."""
        command = ["run", "--rm", "-v", f"{NAME}_runs:/runs", "--entrypoint", "sh", "thinpipe", "-c", script]
        return docker(self.host, *command).stdout


@dataclass(slots=True)
class Up:
    """One `up`, attached: it ends when all containers have."""

    project: Project
    process: subprocess.Popen[bytes]
    log: Path
    run: str

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, there: Callable[[str], bool], what: str, within_s: float = DEADLINE_S) -> str:
        """Wait for something in the log, and return it. Raises Late."""
        deadline_s = time.monotonic() + within_s
        while not there(text := self.text):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise Late(f"{what} did not come: {' / '.join(text.splitlines()[-4:])} (all of it: {self.log})")
            time.sleep(0.2)
        return text

    def until_step(self, step: int) -> None:
        """Stage 0 has said that so many steps, or more, are done."""

        def reached(text: str) -> bool:
            return any(int(found) >= step for found in re.findall(r"step (\d+)/", text))

        self.until(reached, f"step {step}")

    def end(self) -> int:
        """Its exit code. Raises Late."""
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise Late(f"`up` did not end: {self.text[-400:]} (all of it: {self.log})") from None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def checks(self) -> list[tuple[str, float, float]]:
        """(link as configured, measured Mb/s, deviation in per cent) of each boundary and direction, from the log."""
        return [(found[2], float(found[3]), float(found[4])) for found in CHECKED.finditer(self.text)]
