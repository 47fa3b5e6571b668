"""A swarm on this machine: the same node processes that a user starts by hand, watched and cleaned up.

Nodes are started through the command line (`python -m thinpipe.cli node …`), each in its own session, so a Ctrl-C in
the terminal reaches the launcher alone, which then stops them in order. Each node also watches the launcher: if that
is killed, they end by themselves. Why subprocess and not multiprocessing: spawned workers re-import the parent's main
module and share its file descriptors; a node must be exactly what runs on a separate machine.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..reports.figures import StageFigures
from ..reports.metrics_address import MetricsAddress
from ..reports.progress import Progress
from .disk_space import DiskSpace
from .end_signals import ANOTHER_ENDED, DRAINING, EndSignals, draining_signals
from .fork_server import ForkServer, Process
from .isolation import PORT, Isolation
from .node_ends import AGAIN, Failure
from .node_launch import NodeProcess, free_ports, start_node, stop_nodes

POLL_S = 0.1
DRAIN_EVERY_S = 1.0
TOLD_TO_END = (130, *(-number for number in DRAINING))  # exit codes of nodes that were, before they had begun
TOLD_S = 60.0  # within which all nodes end that were told of a failure; a large checkpoint may be under way


class SwarmError(RuntimeError):
    """A node ended the run; the message says which and why. `exit_code` is what the command should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_swarm(
    run: Path,
    *,
    stages: int,
    lanes: int = 1,
    grouped: bool = False,
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
    """Start `stages` nodes for each of `lanes` on `run`/run.toml and wait until all have ended.

    `on_progress` gets, about ten times a second, what the records of every stage have said since now. `on_warning`: a
    line for people. `resume`: go on from the newest checkpoint that all stages have. `restarts`: how often, in all, a
    stage that was lost is started again, while the others wait for it; or all of its lane are, after one has failed and
    ended them; but not twice for a failure that replays. A lane that is not started again is given up, as long as there
    is another one, and the others go on without it. `grouped`: lanes cannot go on without one another, so for all of
    this they are as one. `disks`, `isolation`, `keys`, `watch`, `forks`,
    `node_options`: see `Swarm`. SIGTERM, SIGHUP and SIGUSR1 (with which schedulers warn) end the run after the step
    under way: returns the name of the first that came, None if none did. Raises SwarmError when a node ends early
    otherwise, naming it, and KeyboardInterrupt for Ctrl-C, a second SIGTERM, or a signal that came before all nodes
    could end in order. No node is left running either way.
    """
    swarm = Swarm(
        run,
        stages=stages,
        lanes=lanes,
        trace=trace,
        disks=disks,
        isolation=isolation,
        keys=keys,
        watch=watch,
        forks=forks,
        node_options=node_options,
    )
    progress = Progress(run, stages=stages, lanes=lanes, from_now=True)
    with draining_signals() as told:
        try:
            for node in range(len(swarm.nodes)):
                swarm.start(node, resume=resume)
            _watch(swarm, swarm.units(grouped=grouped), told, restarts, progress, on_progress, on_warning)
        except SwarmError as error:
            swarm.stop(why=str(error))
            raise
        finally:
            swarm.stop()
    return told.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who may look at the nodes. prometheus: where the first serves its figures, each further one a port further."""

    prometheus: MetricsAddress | None = None
    tensorboard: bool = False

    def options(self, node: int) -> list[str]:
        """Of that node's command line, whatever run.toml says."""
        where = str(self.prometheus.of_stage(node)) if self.prometheus else "none"
        return ["--prometheus", where, *(["--tensorboard"] if self.tensorboard else [])]


class Swarm:
    """The node processes of a run on this machine. A stage keeps its port, whichever process serves it. Nodes are
    numbered: the stages of lane 0, then those of lane 1. So where there is one lane, a node's number is its stage.

    ports: where each node listens. next_ports: where the stage above finds it, if something is between the two.
    lateral_ports: by the numbers of a node and of the one in a lower lane that it dials, the same of those.
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
        lanes: int = 1,
        trace: bool = False,
        ports: list[int] | None = None,
        next_ports: list[int] | None = None,
        lateral_ports: Mapping[tuple[int, int], int] | None = None,
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
        self._stages, self.lanes = stages, lanes
        self.nodes: list[NodeProcess | None] = [None] * (lanes * stages)
        self.ports = ports or ([PORT] * len(self.nodes) if isolation else free_ports(len(self.nodes)))
        self._next_ports, self._lateral_ports = next_ports or self.ports, lateral_ports or {}
        self.draining = False  # nobody is started again
        self._trace = trace
        self._gone: list[NodeProcess] = []  # replaced, but perhaps still there

    def of_lane(self, lane: int) -> range:
        """Its nodes."""
        return range(lane * self._stages, (lane + 1) * self._stages)

    def units(self, *, grouped: bool) -> list[range]:
        """The nodes that are lost, started again and given up together: a lane's, or in a group those of all lanes."""
        return [range(len(self.nodes))] if grouped else [self.of_lane(lane) for lane in range(self.lanes)]

    def start(self, node: int, *, resume: bool) -> None:
        """Start that node, in the place of the process that was it, if there was one."""
        if before := self.nodes[node]:
            self._gone.append(before)
        lane, stage = divmod(node, self._stages)
        options: list[str] = []
        if stage or lane + 1 < self.lanes:  # who is in a higher lane dials too
            options += ["--listen", f"{self._host(node)}:{self.ports[node]}"]
        if stage + 1 < self._stages:
            options += ["--next", f"{self._host(node + 1)}:{self._next_ports[node + 1]}"]
        if self.lanes > 1:
            options += ["--lane", str(lane)]
        for lower in range(lane):
            there = lower * self._stages + stage
            port = self._lateral_ports.get((node, there), self.ports[there])
            options += ["--lateral", f"{lower}={self._host(there)}:{port}"]
        if disk := self.disk(stage):
            options += ["--set", f"checkpoint.directory={disk.absolute()}"]
        if self._trace:
            options.append("--trace")
        options += [*self._watch.options(node), *self._node_options.get(stage, ())]
        prefix: list[str] = []
        if self._isolation:
            prefix = self._isolation.network.prefix(node)
            options += ["--link", str(self._isolation.link)]
        if self._keys:
            options += ["--keys", str(self._keys)]
        elif self._isolation:  # addresses that leave a namespace, but not this machine
            options.append("--insecure")
        where = {"lane": lane, "lanes": self.lanes}
        self.nodes[node] = start_node(self.run, stage, prefix, options, resume=resume, forks=self._forks, **where)

    def _host(self, node: int) -> str:
        return self._isolation.network.addresses[node] if self._isolation else "127.0.0.1"

    def disk(self, stage: int) -> Path | None:
        """Where that stage keeps its checkpoints, and copies for its neighbours, if not with all others."""
        return self._disks / f"stage-{stage}" if self._disks else None

    def process(self, node: int) -> Process:
        """The one that is that node now."""
        found = self.nodes[node]
        assert found
        return found.process

    def drain(self) -> None:
        """Ask all to end after the step under way. Not by SIGTERM, which whoever ends a whole group of processes sends
        them besides: a second one would end them at once."""
        self.draining = True
        for node in self.nodes:
            if node and node.process.poll() is None:
                node.process.send_signal(signal.SIGUSR1)

    def kill(self, nodes: list[int]) -> None:
        for process in map(self.process, nodes):
            process.kill()
            process.wait()

    def stop(self, why: str = "") -> None:
        """Leave none behind. why: another stage has ended the run; the logs of those that have to be ended say so."""
        alive = [node for node in (*self.nodes, *self._gone) if node and node.process.poll() is None]
        stop_nodes(alive, ANOTHER_ENDED if why else signal.SIGINT)
        for node in alive if why else ():
            with suppress(OSError), node.log.open("a", encoding="utf-8") as log:
                log.write(f"thinpipe: this stage was ended by the launcher: {why}\n")


def _watch(
    swarm: Swarm,
    units: list[range],
    told: EndSignals,
    restarts: int,
    progress: Progress,
    on_progress: Callable[[list[StageFigures]], None] | None,
    on_warning: Callable[[str], None] | None,
) -> None:
    space, drain_due_s, before = DiskSpace(swarm.run), 0.0, set[tuple[int, Failure]]()
    given_up: set[int] = set()  # units that the others go on without

    def codes() -> list[int | None]:
        if on_progress:
            on_progress(progress.look())
        return [swarm.process(node).poll() for node in range(len(swarm.nodes))]

    while True:
        if told.name and time.monotonic() >= drain_due_s:  # and again, to one that was only being made
            swarm.drain()
            drain_due_s = time.monotonic() + DRAIN_EVERY_S
        if on_warning and (line := space.look()):
            on_warning(line)
        now = codes()
        all_over = True
        for unit, own in enumerate(units):  # what happens in a lane is nothing to the stages of another
            if unit in given_up:
                continue
            # No stage leaves before all of its unit have finished: one that is lost now has nothing left to do.
            over = any(now[node] == 0 for node in own)
            all_over = all_over and over
            if over or not any(now[node] for node in own):
                continue
            ended = (swarm.nodes[node] for node in own if swarm.process(node).poll())
            failure = next(filter(None, (node.failure for node in ended if node)), None)
            if failure and failure.told:
                until = time.monotonic() + TOLD_S
                while any((now := codes())[node] is None for node in own) and time.monotonic() < until:
                    time.sleep(POLL_S)
                swarm.kill([node for node in own if now[node] is None])
                now = codes()
            lost = [node for node in own if now[node]]
            if swarm.draining and failure is None and all(now[node] in TOLD_TO_END for node in lost):
                raise KeyboardInterrupt(f"stopped by {told.name}")  # they had not begun, so they cannot end in order
            cost = 1 if failure else len(lost)
            bad = any(now[node] == 2 for node in lost)
            again = failure is not None and failure.replays and (unit, failure) in before
            if again or cost > restarts or bad or swarm.draining:
                why = _why(swarm, lost, failure, again=again)
                if bad or swarm.draining or len(given_up) + 1 == len(units):
                    raise SwarmError(why, 2 if bad else 1)
                given_up.add(unit)
                swarm.kill([node for node in own if now[node] is None])
                now = codes()
                if on_warning:
                    on_warning(f"lane {unit} is lost, and the others go on without it: {why}")
                continue
            restarts -= cost
            before |= {(unit, failure)} if failure else set()
            for node in lost:
                swarm.start(node, resume=True)
        if all_over and None not in now:
            return
        time.sleep(POLL_S)


def _why(swarm: Swarm, lost: list[int], failure: Failure | None, *, again: bool) -> str:
    """Of the stage that began it, if that can be told, and else of the first one that ended."""
    ended = [node for each in lost if (node := swarm.nodes[each])]
    blamed = next((node for node in ended if failure and node.is_of(failure)), None)
    first = blamed or ended[0]
    line = first.why if failure is None or blamed else first.told(failure)
    return f"{line}; {AGAIN}" if again else line
