"""One node's process on this machine: how it is started, what its log and records say of it, how it is ended.

A node is started as on a separate machine, by the command line, or forked from what has imported all that it needs
(`fork_server`); which of the two, nobody can tell afterwards. Its log is appended to when it takes the place of one
that was lost, so where its own words and records begin is remembered.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ..reports.lanes import lane_path
from ..reports.record_tail import whole_bytes
from .fork_server import CannotFork, ForkServer, Process
from .node_ends import Failure, exit_reason, failure_of

STOP_GRACE_S = 5.0


@dataclass(slots=True)
class NodeProcess:
    """A process that serves a stage, of one of so many lanes. log_from, records_from: where what it says begins in its
    log and its records."""

    stage: int
    process: Process
    log: Path
    log_from: int = 0
    records_from: int = 0
    lane: int = 0
    lanes: int = 1

    @property
    def why(self) -> str:
        """Why it ended."""
        return self.in_lane(exit_reason(self.stage, self.process.poll() or 0, self.log, self.log_from))

    def in_lane(self, line: str) -> str:
        """What is said of a stage, and where there are lanes of which."""
        return line if self.lanes == 1 else f"lane {self.lane}: {line}"

    def is_of(self, failure: Failure) -> bool:
        """Whether it is this node that has failed, or one of that stage."""
        return failure.stage == self.stage and failure.lane in (None, self.lane)

    def told(self, failure: Failure) -> str:
        """What is said of it where this node ended with it."""
        return self.in_lane(str(failure)) if failure.lane is None else str(failure)

    @property
    def failure(self) -> Failure | None:
        """With which it ended."""
        return failure_of(self.log.parent, self.stage, records_from=self.records_from)


def node_environment() -> dict[str, str]:
    """One arithmetic thread a process, and no spinning: stages share cores, and spinning halves the throughput."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago; all are held open until all are known, so they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_node(
    run: Path,
    stage: int,
    prefix: list[str],
    options: list[str],
    *,
    resume: bool,
    forks: ForkServer | None = None,
    lane: int = 0,
    lanes: int = 1,
) -> NodeProcess:
    """Start the process that serves this stage, of `lane` of so many `lanes`. prefix: a command that becomes the node,
    in the same process, so nothing is forked then. options: further ones of its command line."""
    arguments = ["node", "--config", str(run / "run.toml"), "--stage", str(stage), "--out", str(run), *options]
    if resume:
        arguments.append("--resume")
    own = lane_path(run, lane, lanes)
    with suppress(OSError):  # then the node says so
        own.mkdir(exist_ok=True)
    log, environment = own / f"stage-{stage}.log", node_environment()
    records = own / f"stage-{stage}.jsonl"
    records_from = whole_bytes(records) if resume else 0
    with _log(log, "ab" if resume else "wb") as output:
        log_from = output.tell()
        if forks and not prefix:
            try:
                process = forks.start(
                    [*arguments, "--parent", str(forks.pid)],
                    stdout=output.fileno(),
                    stderr=output.fileno(),
                    environment=environment,
                )
                return NodeProcess(stage, process, log, log_from, records_from, lane, lanes)
            except (CannotFork, TimeoutError) as error:
                with suppress(OSError):
                    output.write(f"started as an interpreter of its own: {error}\n".encode())
                    output.flush()
        command = [*prefix, sys.executable, "-m", "thinpipe.cli", *arguments, "--parent", str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return NodeProcess(stage, process, log, log_from, records_from, lane, lanes)


def _log(path: Path, mode: str) -> BinaryIO:
    """What a node says goes there; nowhere, if no file can be made: a full disk is no reason to lose a stage."""
    try:
        return cast(BinaryIO, path.open(mode))
    except OSError:
        return open(os.devnull, "wb")


def stop_nodes(nodes: list[NodeProcess], why: signal.Signals) -> None:
    """Ask politely, then insist. Also called when everything has ended well: it does nothing then."""
    alive = [node for node in nodes if node.process.poll() is None]
    for node in alive:
        node.process.send_signal(why)  # stop now, and not after the step under way
        if why is signal.SIGINT:
            node.process.terminate()  # one that only starts may have been born with SIGINT ignored
    deadline = time.monotonic() + STOP_GRACE_S
    for node in alive:
        try:
            node.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()
