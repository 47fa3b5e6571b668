"""`thinpipe up` as a user starts it, for tests that do something to it meanwhile (the fixture `up`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .preloaded import start

END_S = 180.0


class Started:
    """`thinpipe up --json` with these options, forked from a process that has its imports (`preloaded`). directory: for
    what it says."""

    def __init__(self, directory: Path, number: int, options: tuple[str, ...]) -> None:
        self._out, self._err = directory / f"{number}.out", directory / f"{number}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = start(("up", "--json", *options), out, err)

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All that it said, once it has ended. Raises subprocess.TimeoutExpired."""
        self._process.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # the nodes watch it
        self._process.wait()


Up = Callable[..., Started]


def started(directory: Path) -> Iterator[Up]:
    """Starts it with these options; whatever still runs at the test's end is ended."""
    processes: list[Started] = []

    def up(*options: str) -> Started:
        processes.append(Started(directory, len(processes), options))
        return processes[-1]

    yield up
    for process in processes:
        process.close()


def ended(process: Started, code: int = 0) -> dict[str, Any]:
    """Its summary, once it has ended with that exit code."""
    stdout, stderr = process.communicate(timeout=END_S)
    assert process.returncode == code, stderr
    return json.loads(stdout) if stdout else {}
