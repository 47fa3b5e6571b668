"""`thinpipe` commands for tests, forked from one process that has imported everything, once for each pytest process.

What runs is what a user starts, but for the imports, which would be most of the time of these tests. A test of how the
command line itself starts calls `python -m thinpipe.cli`.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

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
