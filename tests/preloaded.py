"""`thinpipe` commands for tests, forked from one process that has imported everything, once for each pytest process.

What runs is what a user starts, but for the imports, which would be most of the time of these tests. A test of how the
command line itself starts calls `python -m thinpipe.cli`.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, NamedTuple

from thinpipe.sim.launch.fork_server import CannotFork, ForkServer, Process
from thinpipe.sim.launch.node_launch import node_environment

_server: ForkServer | None = None


def forks() -> ForkServer:
    """That process, for `run_local`: this one has threads, and its nodes would be interpreters."""
    global _server
    if _server is None:
        _server = ForkServer.apart(["tests.preloaded_modules"], _environment())
        atexit.register(_server.close)
    return _server


def _environment() -> dict[str, str]:
    return {**node_environment(), "GRPC_VERBOSITY": "NONE"}  # it counts when gRPC is imported


def start(arguments: Sequence[str], out: IO[str], err: IO[str] | None = None) -> Process:
    """`thinpipe` with these arguments, writing all its words to `out`, or what it says of faults to `err`. It does not
    outlive this process."""
    environment = _environment()
    err = err or out
    try:
        return forks().start(
            arguments,
            stdout=out.fileno(),
            stderr=err.fileno(),
            environment=environment,
            session=False,
            dies_with=True,
        )
    except CannotFork as error:
        print(f"an interpreter of its own: {error}")
        command = [sys.executable, "-m", "thinpipe.cli", *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)


class Ran(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def ran(*arguments: str, within_s: float = 180.0) -> Ran:
    """The same, to its end, as `typer.testing.CliRunner` has it; but nodes that it starts are forked, too. Raises
    subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(arguments, out, err)
        try:
            code = process.wait(within_s)
        finally:
            process.kill()
        for stream in (out, err):
            stream.seek(0)
        return Ran(code, out.read(), err.read())
