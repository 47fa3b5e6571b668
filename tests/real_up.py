"""`thinpipe up` as a user starts it, for tests that do something to it meanwhile (the fixture `up`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

Up = Callable[..., subprocess.Popen[str]]
END_S = 180.0


def started() -> Iterator[Up]:
    """Starts it with these options; whatever still runs at the test's end is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "thinpipe.cli", "up", "--json", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, start_new_session=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()  # the nodes watch it
        process.communicate()


def ended(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    """Its summary, once it has ended with that exit code."""
    stdout, stderr = process.communicate(timeout=END_S)
    assert process.returncode == code, stderr
    return json.loads(stdout) if stdout else {}
