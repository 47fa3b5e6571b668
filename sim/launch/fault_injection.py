"""Inject faults into a swarm, at random and repeatably, and check that its result is that of an undisturbed one.

    kill      SIGKILL to a stage; it is started again and has to find its way back
    twice     a second SIGKILL, to another stage, while the run recovers from the first loss
    pause     SIGSTOP for a moment: a machine that hangs, and comes back before it is missed
    sleeper   SIGSTOP, a replacement in its place, SIGCONT: the one that wakes up must be kept out
    disk      SIGKILL to a stage, and its checkpoints are lost; it comes back from the copy that its neighbour kept
    cut       every connection of one boundary is reset
    half      the same, but only the upper end notices

Each step's loss and every bit of every stage's state are compared. The moment of a fault, a step and a part of it, is
drawn from the seed. What the machine does in that instant, and in which order it notices, differs from run to run. The
result must not depend on it.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..links.proxy import Proxy
from ..reports.summary import read_records, steps_of
from .fork_server import ForkServer, Process
from .local_swarm import Swarm, SwarmError
from .node_launch import free_ports

Kind = Literal["kill", "twice", "pause", "sleeper", "disk", "cut", "half"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # pyright: ignore[reportAssignmentType]
LOSSES = ("kill", "twice", "sleeper", "disk")  # of a process
PAUSE_S = 2.0
POLL_S = 0.02
STEP_TIMEOUT_S = 300.0  # without a step from anybody


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault: of stage `stage` (for cuts: of the boundary below it) once the head has done `step` steps, `part` of a
    step later; or, where `after_s` is given, so many seconds after the first step."""

    kind: Kind
    step: int
    part: float
    stage: int
    second: int  # another stage, for `twice`
    after_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Injected:
    """A fault that was injected, and its effect."""

    fault: PlannedFault
    at_s: float
    step: int  # the newest that the head had done
    back_s: float | None = None  # when the last of those who were lost had found its place again
    progress_s: float | None = None  # when the head had done a step that it had not done before


@dataclass(slots=True, kw_only=True)
class Story:
    """All of a disturbed run."""

    injected: list[Injected] = field(default_factory=list)
    fenced: int = 0  # sleepers that woke up and were refused


def plan(seed: int, *, steps: int, stages: int, count: int, kinds: tuple[Kind, ...] = KINDS) -> list[PlannedFault]:
    """`count` faults, spread over the run so that the last ones still have steps before them. Kinds take turns."""
    chance = random.Random(seed)
    last = max(1, steps - 2)
    moments = sorted(chance.uniform(0, last) for _ in range(count))
    drawn = _draw(chance, stages, kinds)
    return [replace(fault, step=int(moment), part=moment % 1) for moment, fault in zip(moments, drawn, strict=False)]


def plan_every(every_s: float, seed: int, *, stages: int, kinds: tuple[Kind, ...] = KINDS) -> Iterator[PlannedFault]:
    """A fault every so many seconds, without end. Kinds take turns."""
    for number, fault in enumerate(_draw(random.Random(seed), stages, kinds), start=1):
        yield replace(fault, after_s=number * every_s)


def _draw(chance: random.Random, stages: int, kinds: tuple[Kind, ...]) -> Iterator[PlannedFault]:
    for kind in itertools.cycle(kinds):
        # A boundary has a stage above it; the last stage dials nobody, so nobody tells it that it was replaced.
        within = stages - 1 if kind in ("cut", "half", "sleeper") else stages
        stage = chance.randrange(within)
        second = (stage + chance.randrange(1, stages)) % stages
        yield PlannedFault(kind=kind, step=0, part=0.0, stage=stage, second=second)


def disturb(
    run: Path,
    faults: Iterable[PlannedFault],
    *,
    stages: int,
    apart: bool,
    on_event: Callable[[str], None],
    forks: ForkServer | None = None,
) -> Story:
    """Run the swarm of `run`/run.toml while `faults` happen to it, until it ends; apart: each stage has a disk of its
    own; forks: see `Swarm`. Raises SwarmError when it does not come through."""
    with ExitStack() as held:
        ports, relays = free_ports(stages), free_ports(stages)
        proxies = {
            stage: held.enter_context(Proxy(f"127.0.0.1:{ports[stage + 1]}", port=relays[stage + 1]))
            for stage in range(stages - 1)
        }
        disks = run / "disks" if apart else None
        swarm = Swarm(run, stages=stages, ports=ports, next_ports=relays, disks=disks, forks=forks)
        held.callback(swarm.stop)
        for stage in range(stages):
            swarm.start(stage, resume=False)
        chaos = _Chaos(run, swarm, proxies, on_event)
        for fault in faults:
            chaos.inject(fault)
            if chaos.over:
                break
        chaos.until_ended()
        return chaos.story


class _Chaos:
    def __init__(self, run: Path, swarm: Swarm, proxies: dict[int, Proxy], on_event: Callable[[str], None]) -> None:
        self.story = Story()
        self._run, self._swarm, self._proxies, self._on_event = run, swarm, proxies, on_event
        self._sleepers: list[_Sleeper] = []
        self._seen_at = time.monotonic()
        self._seen = -1
        self._began: float | None = None  # when the head had done its first step

    def _head_steps(self) -> int:
        """Steps that the head has done, at most; also keeps watch."""
        done = 1 + max(
            (r["step"] for r in read_records(self._run / "stage-0.jsonl") if r["event"] == "step"), default=-1
        )
        now = time.monotonic()
        if done != self._seen:
            self._seen, self._seen_at = done, now
            self._began = self._began or (now if done else None)
        elif now - self._seen_at > STEP_TIMEOUT_S:
            raise SwarmError(f"no step for {STEP_TIMEOUT_S:g} s after step {done}; see the logs in {self._run}", 1)
        self._mind_the_dead()
        return done

    def _mind_the_dead(self) -> None:
        """Nobody but us may have killed anybody."""
        for stage, node in enumerate(self._swarm.nodes):
            assert node
            code = node.process.poll()
            if code == -signal.SIGKILL and not self.over:
                self._swarm.start(stage, resume=True)
            elif code and not self.over:
                raise SwarmError(str(node.failure or node.why), 1)
        for sleeper in list(self._sleepers):
            if not sleeper.awake and self._is_back(sleeper.stage, sleeper.since_s):
                sleeper.awake = True
                sleeper.process.send_signal(signal.SIGCONT)
            if sleeper.process.poll() is not None:
                self._sleepers.remove(sleeper)
                self.story.fenced += sleeper.process.returncode == 2

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        """The condition looks after the run, and raises SwarmError when there is no step for too long."""
        while not condition():
            time.sleep(POLL_S)

    @property
    def over(self) -> bool:
        """Whether anybody has left, which nobody does before all are through."""
        return any(node and node.process.poll() == 0 for node in self._swarm.nodes)

    def _due(self, fault: PlannedFault) -> bool:
        done = self._head_steps()
        if fault.after_s is None:
            return done >= fault.step
        return self._began is not None and time.monotonic() >= self._began + fault.after_s

    def _ended(self) -> bool:
        return self.over and all(node and node.process.poll() is not None for node in self._swarm.nodes)

    def inject(self, fault: PlannedFault) -> None:
        """Wait for the fault's moment, and let it happen. Faults that come too late for the run are left out."""
        self._wait(lambda: self._ended() or self._due(fault))
        time.sleep(fault.part * self._step_s())
        if self.over:
            return
        done = self._head_steps()
        injected = Injected(fault=fault, at_s=time.time(), step=done)
        process = self._swarm.process(fault.stage)
        self._on_event(f"{fault.kind} at stage {fault.stage} after step {done}")
        match fault.kind:
            case "kill":
                self._kill(process)
            case "twice":
                self._kill(process)
                self._swarm.start(fault.stage, resume=True)
                time.sleep(fault.part * 4.0)  # while the first one starts, greets or restores
                self._kill(self._swarm.process(fault.second))
            case "pause":
                process.send_signal(signal.SIGSTOP)
                time.sleep(PAUSE_S)
                process.send_signal(signal.SIGCONT)
            case "sleeper":
                process.send_signal(signal.SIGSTOP)
                self._replace(fault.stage, process)
            case "disk":
                self._kill(process)
                if disk := self._swarm.disk(fault.stage):
                    shutil.rmtree(disk, ignore_errors=True)
            case "cut" | "half":
                self._proxies[fault.stage].cut(half=fault.kind == "half")
        self.story.injected.append(injected)
        self._mind_the_dead()

    def _replace(self, stage: int, sleeper: Process) -> None:
        """Start another process for `stage`, at another address, because the one that sleeps holds its own."""
        self._sleepers.append(_Sleeper(process=sleeper, stage=stage, since_s=time.time()))
        (self._swarm.ports[stage],) = free_ports(1)
        if stage:
            self._proxies[stage - 1].redirect(f"127.0.0.1:{self._swarm.ports[stage]}")
        self._swarm.start(stage, resume=True)

    def _is_back(self, stage: int, since_s: float) -> bool:
        """Whether the stage has taken part in a new generation since then."""
        records = read_records(self._run / f"stage-{stage}.jsonl")
        return any(record["event"] == "rollback" and record["time_s"] > since_s for record in records)

    @staticmethod
    def _kill(process: Process) -> None:
        process.kill()
        process.wait()

    def _step_s(self) -> float:
        steps = [r["seconds"] for r in read_records(self._run / "stage-0.jsonl") if r["event"] == "step"]
        return statistics.median(steps[-10:]) if steps else 1.0

    def until_ended(self) -> None:
        def ended() -> bool:
            self._head_steps()
            return self._ended()

        self._wait(ended)


@dataclass(slots=True, kw_only=True)
class _Sleeper:
    """A process that was stopped and replaced."""

    process: Process
    stage: int
    since_s: float
    awake: bool = False


def measure(run: Path, story: Story, *, stages: int) -> None:
    """Fill in, from the records, when the run had recovered from each fault."""
    records = [read_records(run / f"stage-{stage}.jsonl") for stage in range(stages)]
    for injected in story.injected:
        lost = (injected.fault.stage,) if injected.fault.kind in ("kill", "sleeper", "disk") else ()
        if injected.fault.kind == "twice":
            lost = (injected.fault.stage, injected.fault.second)
        found = [
            min(
                (r["time_s"] for r in records[stage] if r["event"] == "rollback" and r["time_s"] > injected.at_s),
                default=None,
            )
            for stage in lost
        ]
        injected.back_s = max((moment for moment in found if moment is not None), default=injected.at_s)
        injected.progress_s = min(
            (
                r["time_s"]
                for r in records[0]
                if r["event"] == "step" and r["step"] >= injected.step and r["time_s"] > injected.back_s
            ),
            default=None,
        )


def report(run: Path, undisturbed: Path, story: Story, *, stages: int) -> dict[str, Any]:
    """What happened, and whether the two runs ended alike: the content of chaos.json."""
    measure(run, story, stages=stages)
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run, undisturbed))
    losses, expected = (
        {r["step"]: r["loss"] for r in steps_of(read_records(each / "stage-0.jsonl"))} for each in (run, undisturbed)
    )
    done = [r for r in read_records(run / "stage-0.jsonl") if r["event"] == "step"]
    alone = [r for r in read_records(undisturbed / "stage-0.jsonl") if r["event"] == "step"]
    step_s = statistics.median(r["seconds"] for r in alone)
    lost = [i for i in story.injected if i.progress_s is not None and i.fault.kind in LOSSES]
    waits = [(i.progress_s or 0) - (i.back_s or 0) for i in lost]
    wholes = [(i.progress_s or 0) - i.at_s for i in lost]
    seconds = done[-1]["time_s"] - done[0]["time_s"] if done else 0.0
    undisturbed_s = alone[-1]["time_s"] - alone[0]["time_s"]
    return {
        "stages": stages,
        "steps": len(losses),
        "faults": dict(Counter(injected.fault.kind for injected in story.injected)),
        "generations": 1 + max((r["generation"] for r in ours["rollbacks"]), default=0),
        "fenced": story.fenced,
        "steps_replayed": len(done) - len(losses),
        "step_s": step_s,
        "seconds": seconds,
        "seconds_undisturbed": undisturbed_s,
        "throughput_share": undisturbed_s / seconds if seconds else None,
        "back_to_progress_s": _spread(waits),
        "fault_to_progress_s": _spread(wholes),
        "back_to_progress_steps": _spread([wait / step_s for wait in waits]),
        "losses_equal": losses == expected,
        "val_loss_equal": ours["val_loss"] == theirs["val_loss"],
        "state_equal": [
            a["state_sha256"] == b["state_sha256"] for a, b in zip(ours["stages"], theirs["stages"], strict=True)
        ],
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "worst": max(values)} if values else None


def survived(report: dict[str, Any]) -> bool:
    """Whether nothing was lost."""
    return bool(report["losses_equal"] and report["val_loss_equal"] and all(report["state_equal"]))
