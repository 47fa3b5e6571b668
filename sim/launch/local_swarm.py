"""A swarm on this machine: the same node processes that a user starts by hand, watched and cleaned up.

Nodes are started through the command line (`python -m thinpipe.cli node …`), each in its own session, so a Ctrl-C in
the terminal reaches the launcher alone, which then stops them in order. Each node also watches the launcher: if that
is killed, they end by themselves. Why subprocess and not multiprocessing: spawned workers re-import the parent's main
module and share its file descriptors; a node must be exactly what runs on a separate machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ..reports.figures import StageFigures
from ..reports.metrics_address import MetricsAddress
from ..reports.progress import Progress
from ..reports.record_tail import whole_bytes
from .disk_space import DiskSpace
from .end_signals import ANOTHER_ENDED, DRAINING, EndSignals, draining_signals
from .fork_server import CannotFork, ForkServer, Process
from .isolation import PORT, Isolation
from .node_ends import AGAIN, Failure, exit_reason, failure_of

STOP_GRACE_S = 5.0
POLL_S = 0.1
DRAIN_EVERY_S = 1.0
TOLD_TO_END = (130, *(-number for number in DRAINING))  # exit codes of nodes that were, before they had begun
TOLD_S = 60.0  # within which all nodes end that were told of a failure; a large checkpoint may be under way


class SwarmError(RuntimeError):
    """A node ended the run; the message says which and why. `exit_code` is what the command should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class NodeProcess:
    """A process that serves a stage. log_from, records_from: where what it says begins in its log and its records."""

    stage: int
    process: Process
    log: Path
    log_from: int = 0
    records_from: int = 0

    @property
    def why(self) -> str:
        """Why it ended."""
        return exit_reason(self.stage, self.process.poll() or 0, self.log, self.log_from)

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


def run_swarm(
    run: Path,
    *,
    stages: int,
    trace: bool = False,
    resume: bool = False,
    restarts: int = 0,
    disks: Path | None = None,
    isolation: Isolation | None = None,
    keys: Path | None = None,
    watch: Watch | None = None,
    forks: ForkServer | None = None,
    node_options: Mapping[int, Sequence[str]] | None = None,
    on_progress: Callable[[list[StageFigures]], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> str | None:
    """Start `stages` nodes on `run`/run.toml and wait until all have ended.

    `on_progress` gets, about ten times a second, what the records of every stage have said since now. `on_warning`: a
    line for people. `resume`: go on from the newest checkpoint that all stages have. `restarts`: how often, in all, a
    stage that was lost is started again, while the others wait for it; or all stages are, after one has failed and
    ended all; but not twice for a failure that replays. `disks`, `isolation`, `keys`, `watch`, `forks`, `node_options`:
    see `Swarm`. SIGTERM, SIGHUP and SIGUSR1 (with which schedulers warn) end the run after the step under way: returns
    the name of the first that came, None if none did. Raises SwarmError when a node ends early otherwise, naming it,
    and KeyboardInterrupt for Ctrl-C, a second SIGTERM, or a signal that came before all nodes could end in order. No
    node is left running either way.
    """
    swarm = Swarm(
        run,
        stages=stages,
        trace=trace,
        disks=disks,
        isolation=isolation,
        keys=keys,
        watch=watch,
        forks=forks,
        node_options=node_options,
    )
    progress = Progress(run, stages=stages, from_now=True)
    with draining_signals() as told:
        try:
            for stage in range(stages):
                swarm.start(stage, resume=resume)
            _watch(swarm, told, restarts, progress, on_progress, on_warning)
        except SwarmError as error:
            swarm.stop(why=str(error))
            raise
        finally:
            swarm.stop()
    return told.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who may look at the nodes. prometheus: where stage 0 serves its figures, each further stage one port further."""

    prometheus: MetricsAddress | None = None
    tensorboard: bool = False

    def options(self, stage: int) -> list[str]:
        """Of the command line of `stage`, whatever run.toml says."""
        where = str(self.prometheus.of_stage(stage)) if self.prometheus else "none"
        return ["--prometheus", where, *(["--tensorboard"] if self.tensorboard else [])]


class Swarm:
    """The node processes of a run on this machine. A stage keeps its port, whichever process serves it.

    ports: where each stage listens. next_ports: where the stage above finds it, if something is between the two.
    disks: directory of the directories that stages keep their checkpoints in, one each, as if each had a disk of its
    own; None: one for all. isolation: the namespaces that the nodes run in, which have one each. keys: directory of a
    certificate that names all stages, for TLS between them. watch: who may look at the nodes (nobody). forks: what
    they are forked from, where that can be; None: each is an interpreter of its own. node_options: further ones of a
    stage's command line.
    """

    def __init__(
        self,
        run: Path,
        *,
        stages: int,
        trace: bool = False,
        ports: list[int] | None = None,
        next_ports: list[int] | None = None,
        disks: Path | None = None,
        isolation: Isolation | None = None,
        keys: Path | None = None,
        watch: Watch | None = None,
        forks: ForkServer | None = None,
        node_options: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self._node_options = node_options or {}
        self.run, self._disks, self._isolation, self._keys = run, disks, isolation, keys
        self._watch, self._forks = watch or Watch(), forks
        self.nodes: list[NodeProcess | None] = [None] * stages
        self.ports = ports or ([PORT] * stages if isolation else free_ports(stages))
        self._next_ports = next_ports or self.ports
        self.draining = False  # nobody is started again
        self._trace = trace
        self._gone: list[NodeProcess] = []  # replaced, but perhaps still there

    def start(self, stage: int, *, resume: bool) -> None:
        """Start stage `stage`, in the place of the process that had it, if there was one."""
        if before := self.nodes[stage]:
            self._gone.append(before)
        options = ["--listen", f"{self._host(stage)}:{self.ports[stage]}"] if stage else []
        if stage + 1 < len(self.nodes):
            options += ["--next", f"{self._host(stage + 1)}:{self._next_ports[stage + 1]}"]
        if disk := self.disk(stage):
            options += ["--set", f"checkpoint.directory={disk.absolute()}"]
        if self._trace:
            options.append("--trace")
        options += [*self._watch.options(stage), *self._node_options.get(stage, ())]
        prefix: list[str] = []
        if self._isolation:
            prefix = self._isolation.network.prefix(stage)
            options += ["--link", str(self._isolation.link)]
        if self._keys:
            options += ["--keys", str(self._keys)]
        elif self._isolation:  # addresses that leave a namespace, but not this machine
            options.append("--insecure")
        self.nodes[stage] = _start(self.run, stage, prefix, options, resume=resume, forks=self._forks)

    def _host(self, stage: int) -> str:
        return self._isolation.network.addresses[stage] if self._isolation else "127.0.0.1"

    def disk(self, stage: int) -> Path | None:
        """Where that stage keeps its checkpoints, and copies for its neighbours, if not with all others."""
        return self._disks / f"stage-{stage}" if self._disks else None

    def process(self, stage: int) -> Process:
        """The one that serves `stage` now."""
        node = self.nodes[stage]
        assert node
        return node.process

    def drain(self) -> None:
        """Ask all to end after the step under way. Not by SIGTERM, which whoever ends a whole group of processes sends
        them besides: a second one would end them at once."""
        self.draining = True
        for node in self.nodes:
            if node and node.process.poll() is None:
                node.process.send_signal(signal.SIGUSR1)

    def kill(self, stages: list[int]) -> None:
        for process in map(self.process, stages):
            process.kill()
            process.wait()

    def stop(self, why: str = "") -> None:
        """Leave none behind. why: another stage has ended the run; the logs of those that have to be ended say so."""
        alive = [node for node in (*self.nodes, *self._gone) if node and node.process.poll() is None]
        _stop(alive, ANOTHER_ENDED if why else signal.SIGINT)
        for node in alive if why else ():
            with suppress(OSError), node.log.open("a", encoding="utf-8") as log:
                log.write(f"thinpipe: this stage was ended by the launcher: {why}\n")


def _start(
    run: Path, stage: int, prefix: list[str], options: list[str], *, resume: bool, forks: ForkServer | None = None
) -> NodeProcess:
    """`prefix`: a command that becomes the node, in the same process; so that one has to be started."""
    arguments = ["node", "--config", str(run / "run.toml"), "--stage", str(stage), "--out", str(run), *options]
    if resume:
        arguments.append("--resume")
    log, environment = run / f"stage-{stage}.log", node_environment()
    records = run / f"stage-{stage}.jsonl"
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
                return NodeProcess(stage, process, log, log_from, records_from)
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
    return NodeProcess(stage, process, log, log_from, records_from)


def _log(path: Path, mode: str) -> BinaryIO:
    """What a node says goes there; nowhere, if no file can be made: a full disk is no reason to lose a stage."""
    try:
        return cast(BinaryIO, path.open(mode))
    except OSError:
        return open(os.devnull, "wb")


def _watch(
    swarm: Swarm,
    told: EndSignals,
    restarts: int,
    progress: Progress,
    on_progress: Callable[[list[StageFigures]], None] | None,
    on_warning: Callable[[str], None] | None,
) -> None:
    space, drain_due_s, before = DiskSpace(swarm.run), 0.0, set[Failure]()

    def codes() -> list[int | None]:
        if on_progress:
            on_progress(progress.look())
        return [swarm.process(stage).poll() for stage in range(len(swarm.nodes))]

    while True:
        if told.name and time.monotonic() >= drain_due_s:  # and again, to one that was only being made
            swarm.drain()
            drain_due_s = time.monotonic() + DRAIN_EVERY_S
        if on_warning and (line := space.look()):
            on_warning(line)
        now = codes()
        over = 0 in now  # no stage leaves before all have finished: one that is lost now has nothing left to do
        if not over and any(now):
            failure = next(filter(None, (node.failure for node in swarm.nodes if node and node.process.poll())), None)
            if failure and failure.told:
                until = time.monotonic() + TOLD_S
                while None in (now := codes()) and time.monotonic() < until:
                    time.sleep(POLL_S)
                swarm.kill([stage for stage, code in enumerate(now) if code is None])
                now = codes()
            lost = [stage for stage, code in enumerate(now) if code]
            if swarm.draining and failure is None and all(now[stage] in TOLD_TO_END for stage in lost):
                raise KeyboardInterrupt(f"stopped by {told.name}")  # they had not begun, so they cannot end in order
            cost = 1 if failure else len(lost)
            again = failure is not None and failure.replays and failure in before
            if again or cost > restarts or 2 in now or swarm.draining:
                raise SwarmError(_why(swarm, lost, failure, again=again), 2 if 2 in now else 1)
            restarts -= cost
            before |= {failure} if failure else set()
            for stage in lost:
                swarm.start(stage, resume=True)
        if over and None not in now:
            return
        time.sleep(POLL_S)


def _why(swarm: Swarm, lost: list[int], failure: Failure | None, *, again: bool) -> str:
    """Of the stage that began it, if that can be told, and else of the first one that ended."""
    blamed = swarm.nodes[failure.stage if failure and failure.stage in lost else lost[0]]
    assert blamed
    line = blamed.why if failure is None or failure.stage in lost else str(failure)
    return f"{line}; {AGAIN}" if again else line


def _stop(nodes: list[NodeProcess], why: signal.Signals) -> None:
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
