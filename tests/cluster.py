"""A whole swarm and what befalls it in this process: real nodes from the host down, no sockets, no threads, no waiting.

What stands in for gRPC, threads and time is `tests/virtual.py`; what can befall the swarm, and when, is
`tests/faults.py`. Faults are carried out where the code really is: the methods of a stage, of its store and of its
rollback are wrapped to tell when they are called, and then do what they always do; frames tell by what is in them. A
killed process is cut off from everything, its disk included, and then cancelled.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.node import node_run
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.config import RunConfig
from thinpipe.node.data import Corpus
from thinpipe.node.node_options import Addresses, NodeOptions, NodeSetup
from thinpipe.node.recovery_loop import RecoveryLoop
from thinpipe.node.run_records import MetricsWriter, Tracer
from thinpipe.node.stage import Stage
from thinpipe.node.stage_failure import first_of
from thinpipe.protocol.control_messages import StartView
from thinpipe.protocol.messages import Chunk, Kind, Limits, decode_frame
from thinpipe.sim.reports.summary import read_records, steps_of

from .faults import (
    Corrupt,
    Cut,
    DiskFull,
    Done,
    Drain,
    During,
    Fail,
    Fault,
    Frame,
    Kill,
    Pause,
    Phase,
    Slow,
    TornCheckpoint,
)
from .virtual import PROCESS, JumpingClock, Network, Process, Stream, without_threads

RUN_S = 6_000.0  # of the jumping clock
CHUNK_BYTES = 128  # so that even a small tensor takes several frames; less than the configuration allows
LIMITS = Limits(message_bytes=2**30)
IN_STAGE = {
    "backward": Phase.MID_BACKWARD,
    "weight_gradient": Phase.MID_BACKWARD,  # of a backward that is split
    "sum_of_squares": Phase.BEFORE_NORM,
    "finish": Phase.BEFORE_COMMIT,
    "snapshot": Phase.SNAPSHOT,
    "restore": Phase.RESTORE,
}


# Boundary and direction (True: down) of control streams that carry nothing before so many seconds.
Late = dict[tuple[int, bool], float]
OpenCorpus = Callable[[Corpus], Any]


@dataclass(slots=True)
class Seat:
    """A stage's place, whichever process serves it, and its disk."""

    process: Process | None = None
    through: asyncio.Event = field(default_factory=asyncio.Event)
    full_writes: int = 0  # so many more find no space


@dataclass(slots=True, kw_only=True)
class Ended:
    """What the run came to."""

    losses: list[list[float]]
    val_losses: list[float]
    state_sha256: list[str]
    generations: int
    frames: int
    seconds: float  # of the jumping clock
    said: list[str]  # by stages, of faults
    happened: list[Fault]  # in this order
    connections: Counter[int]  # tensor streams that a boundary took
    meetings: Counter[int]  # control streams
    starts: list[int]  # processes that a stage took
    fenced: list[tuple[int, str]]  # replaced processes that woke up: the stage, and with which words it ended
    rollbacks: list[dict[str, Any]]
    checkpoints: list[list[int]]  # by stage: after which steps one was written
    damaged: list[tuple[int, int]]  # (stage, step) of checkpoints that were torn

    def said_of(self, *words: str) -> list[str]:
        """What was said that has all of these in it."""
        return [line for line in self.said if all(word in line for word in words)]


@dataclass(slots=True, kw_only=True)
class Failed:
    """How a run ended that was to fail."""

    lines: list[str]  # by stages, with which each ended
    seconds: list[float]  # by stages, of the jumping clock: when
    records: list[list[dict[str, Any]]]
    said: list[str]


class ProcessRecords(MetricsWriter):
    """A process's records; the dead write none. on_step: is told how many steps are done; on_event: of each record."""

    def __init__(
        self,
        path: Path,
        process: Process,
        *,
        append: bool,
        on_step: Callable[[int], None],
        on_event: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(path, append=append)
        self._process, self._on_step, self._on_event = process, on_step, on_event

    def write(self, event: str, **fields: Any) -> None:
        if self._process.dead:
            return
        super().write(event, **fields)
        if event == "rollback":
            self._process.restored.set()
        elif event == "step":
            self._on_step(fields["step"] + 1)
        self._on_event(event)


class Cluster:
    """`config` as a swarm in this process, with `faults`."""

    def __init__(self, config: RunConfig, out: Path, faults: list[Fault], late: Late | None = None) -> None:
        link = config.link.model_copy(update={"chunk_bytes": CHUNK_BYTES})
        self.config, self.out = config.model_copy(update={"link": link}), out
        self.stages = config.pipeline.stages
        self.seats = [Seat() for _ in range(self.stages)]
        self.frames = 0
        self.drained = False
        self.failures: list[BaseException] = []
        self.ends: dict[int, tuple[str, float]] = {}  # by stage, of those that failed: the line, and when
        self._late = late or {}
        self.said: list[str] = []
        self.happened: list[Fault] = []
        self.fenced: list[tuple[int, str]] = []
        self.damaged: list[tuple[int, int]] = []
        self.network = Network(self._carry, self._called)
        self.connections: Counter[int] = Counter()
        self.meetings: Counter[int] = Counter()
        self._pending, self._planned = list(faults), tuple(faults)
        self._passed: Counter[tuple[int, Phase, int | None]] = Counter()
        self._born = 0
        self._streams: dict[Stream, None] = {}
        self._slow: dict[int, float] = {}  # boundary -> bits a second
        self._wires: dict[tuple[int, bool], float] = {}  # boundary and direction -> when a slow wire is free
        self._to_damage: dict[tuple[int, bool], list[int]] = {}  # boundary and control -> frames until then
        self._writing: tuple[Process, int] | None = None  # whose store writes, and a checkpoint of which step
        self._flushed = 0
        self._background: set[asyncio.Task[Any]] = set()
        self._sleepers: list[Process] = []
        self.mistaken: int | None = None  # the stage that is first started as for a new run, and again when that ends

    async def run(self, *, resume: bool = False) -> Ended:
        await self._play(resume=resume)
        return self._ended()

    async def run_to_failure(self) -> Failed:
        await self._play(resume=False, fails=True)
        ends = [self.ends.get(stage, ("ended well", self._loop.time())) for stage in range(self.stages)]
        return Failed(
            lines=[line for line, _ in ends],
            seconds=[when for _, when in ends],
            records=[read_records(self.out / f"stage-{stage}.jsonl") for stage in range(self.stages)],
            said=self.said,
        )

    async def _play(self, *, resume: bool, fails: bool = False) -> None:
        """Everything until all have ended; fails: each by itself, and none in vain."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._outside = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        self._fails = fails
        try:
            async with asyncio.timeout(RUN_S):
                for stage in range(self.stages):
                    self._start(stage, joining=resume and stage != self.mistaken)
                for seat in self.seats:
                    await seat.through.wait()
                if fails:
                    return
                for sleeper in self._sleepers:
                    assert sleeper.task
                    await asyncio.wait([sleeper.task])
                for problem in (*self.failures, *self.network.bugs):
                    raise problem
                assert self.drained or not any(isinstance(fault, Drain) for fault in self._planned)
        finally:
            everyone = [*self._background, *(s.process.task for s in self.seats if s.process and s.process.task)]
            for seat in self.seats:
                if seat.process:
                    seat.process.go_on(self._loop)
            for task in everyone:
                task.cancel()
            await asyncio.gather(*everyone, return_exceptions=True)

    def _ended(self) -> Ended:
        records = [read_records(self.out / f"stage-{stage}.jsonl") for stage in range(self.stages)]
        rollbacks = [r for r in records[0] if r["event"] == "rollback"]
        return Ended(
            losses=[[record["loss"] for record in steps_of(of)] for of in records],
            val_losses=[
                next((r["val_loss"] for r in reversed(of) if r["event"] == "evaluation"), 0.0) for of in records
            ],
            state_sha256=[[r["state_sha256"] for r in of if r["event"] == "end"][-1] for of in records],
            generations=1 + max((r["generation"] for r in rollbacks), default=0),
            frames=self.frames,
            seconds=self._loop.time(),
            said=self.said,
            happened=self.happened,
            connections=self.connections,
            meetings=self.meetings,
            starts=[sum(r["event"] == "start" for r in of) for of in records],
            fenced=self.fenced,
            rollbacks=rollbacks,
            checkpoints=[[r["completed"] for r in of if r["event"] == "checkpoint"] for of in records],
            damaged=self.damaged,
        )

    # -- processes ----------------------------------------------------------------------------------------------

    def _start(self, stage: int, *, joining: bool) -> None:
        """Begin a process in the place of `stage`, as `host` does."""
        self._born += 1
        process = Process(stage=stage, number=self._born)
        self.seats[stage].process = process
        path = self.out / f"stage-{stage}.jsonl"
        metrics = ProcessRecords(path, process, append=joining, on_step=partial(self._stepped, stage))
        metrics.write("start", stage=stage)
        addresses = Addresses(listen=_address(stage) if stage else None, next=_address(stage + 1))

        def on_fault(code: str, line: str) -> None:
            if not process.dead:
                self.said.append(f"stage {stage}: {code}: {line}")

        options = NodeOptions(out=self.out, resume=joining)
        tracer = Tracer(stage=stage, enabled=False)
        node = node_run.run_stage(
            NodeSetup(
                config=self.config,
                stage=stage,
                addresses=addresses,
                options=options,
                metrics=metrics,
                tracer=tracer,
                on_fault=on_fault,
            )
        )
        process.task = self._loop.create_task(self._serve(process, node, metrics), context=process.context)

    async def _serve(self, process: Process, node: Any, metrics: MetricsWriter) -> None:
        seat = self.seats[process.stage]
        try:
            await node
        except Exception as raised:
            error = first_of(raised)
            if seat.process is not process and not process.dead:
                self.fenced.append((process.stage, f"{type(error).__name__}: {error}"))
            elif process.stage == self.mistaken:
                self.mistaken = None
                self.fenced.append((process.stage, f"{type(error).__name__}: {error}"))
                self._start(process.stage, joining=True)
            elif not process.dead:
                self.failures.append(error)
                self.ends[process.stage] = (str(error), self._loop.time())
                for each in () if self._fails else self.seats:  # nobody need wait for the rest
                    each.through.set()
        finally:
            metrics.close()
            if seat.process is process and not process.dead:
                seat.through.set()

    def _spawn(self, job: Any) -> None:
        """From outside all processes, even if one of them has just come to where it is due."""
        task = self._loop.create_task(job, context=self._outside.copy())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- moments ------------------------------------------------------------------------------------------------

    def reached(self, process: Process | None, phase: Phase, step: int | None = None) -> None:
        """`process` is there: whatever is due, happens."""
        if process is None or process.dead or self.seats[process.stage].process is not process:
            return
        passed = self._passed
        passed[process.stage, phase, step] += 1
        if step is not None:
            passed[process.stage, phase, None] += 1

        def due(at: Any) -> bool:
            here = isinstance(at, During) and (at.stage, at.phase) == (process.stage, phase)
            if not here or at.step not in (None, step):
                return False
            count = self._flushed if phase is Phase.CHECKPOINT else passed[at.stage, at.phase, at.step]
            return count == at.point

        self._all_due(due)

    def _stepped(self, stage: int, steps: int) -> None:
        self._all_due(lambda at: isinstance(at, Done) and at.stage == stage and steps >= at.steps)

    def _all_due(self, due: Callable[[Any], bool]) -> None:
        for fault in [fault for fault in self._pending if due(fault.at)]:
            self._pending.remove(fault)
            if self._inject(fault):
                self.happened.append(fault)
            if isinstance(fault, Fail):
                raise fault.error

    def adopt(self, life: RecoveryLoop) -> RecoveryLoop:
        """Its rollback tells when it is where."""
        process = PROCESS.get()
        assert process
        process.recovery_loop = life
        machine, last = life.machine, life.machine.identity.last
        stopped, receive = machine.stopped, machine.receive

        def now_stopped(steps: set[int]) -> Any:
            self.reached(process, Phase.STOPPED)
            return stopped(steps)

        def now_received(side: Any, frame: Any) -> Any:
            if last and isinstance(frame, StartView):
                self.reached(process, Phase.COMMIT)
            return receive(side, frame)

        machine.stopped, machine.receive = now_stopped, now_received
        return life

    def watch(self, stage: Stage) -> Stage:
        """Its methods tell that they were called."""
        process = PROCESS.get()
        assert process
        if process.recovery_loop:  # it is built anew
            self.reached(process, Phase.RESTORE)
        for name, phase in IN_STAGE.items():

            def hooked(*given: Any, really: Any = getattr(stage, name), phase: Phase = phase, **named: Any) -> Any:
                of = {Phase.RESTORE: None, Phase.SNAPSHOT: stage.completed - 1}.get(phase, stage.completed)
                self.reached(process, phase, of)
                return really(*given, **named)

            setattr(stage, name, hooked)
        return stage

    def store(self, *given: Any, **named: Any) -> CheckpointStore:
        process = PROCESS.get()
        assert process
        return _Store(self, process, *given, **named)

    def begin_writing(self, process: Process, step: int) -> None:
        self._writing, self._flushed = (process, step), 0

    def end_writing(self, *, failed: bool) -> None:
        assert self._writing
        seat = self.seats[self._writing[0].stage]
        if failed and not self._writing[0].dead:
            seat.full_writes = max(0, seat.full_writes - 1)
        self._writing = None

    def fsync(self, _: int) -> None:
        """In place of os.fsync. Nothing that a process does outlives the kernel's memory in this tier."""
        if self._writing is None:
            return
        process, step = self._writing
        self._flushed += 1
        self.reached(process, Phase.CHECKPOINT, step)
        if process.dead:
            raise OSError(errno.EIO, "killed")
        if self.seats[process.stage].full_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # -- what happens -------------------------------------------------------------------------------------------

    def _inject(self, fault: Fault) -> bool:
        """Whether it could be done."""
        match fault:
            case Kill() | TornCheckpoint():
                return self._kill(fault)
            case Pause():
                return self._pause(fault)
            case Cut():
                return self._cut(fault)
            case Slow():
                self._slow[fault.boundary] = fault.bits_per_s
                self._spawn(self._fast_again(fault))
            case Corrupt():
                self._to_damage.setdefault((fault.boundary, fault.control), []).append(fault.frame)
                return True
            case DiskFull():
                self.seats[fault.stage].full_writes += fault.writes
            case Drain():
                process = self.seats[fault.stage].process
                self.drained = bool(process and process.drain())
        return True

    def _over(self) -> bool:
        """All have done all, and nothing can be lost any more."""
        lives = [seat.process.recovery_loop for seat in self.seats if seat.process]
        return any(life.control.finished for life in lives if life)

    def _present(self, stage: int) -> Process | None:
        """Who serves it, unless that is over or has been interfered with already."""
        process = self.seats[stage].process
        gone = process is None or process.dead or process.stopped or self.seats[stage].through.is_set()
        return None if gone else process

    def _kill(self, fault: Kill | TornCheckpoint) -> bool:
        process = self.seats[fault.stage].process
        if process is None or process.dead or self._over():
            return False
        process.die(self._loop)
        self._spawn(self._replace_dead(process, fault))
        return True

    async def _replace_dead(self, process: Process, fault: Kill | TornCheckpoint) -> None:
        assert process.task
        await asyncio.wait([process.task])
        await asyncio.sleep(fault.away_s)
        if isinstance(fault, TornCheckpoint):
            self._tear(fault)
        self._start(fault.stage, joining=True)

    def _tear(self, fault: TornCheckpoint) -> None:
        name = "manifest.json" if fault.how == "manifest" else "state.safetensors"
        files = sorted((self.out / "checkpoints" / f"stage-{fault.stage}").glob(f"step-*/{name}"))
        if not files:
            return
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 1
        files[-1].write_bytes(content[:-1] if fault.how == "short" else content)
        self.damaged.append((fault.stage, int(files[-1].parent.name.removeprefix("step-"))))

    def _pause(self, fault: Pause) -> bool:
        process = self._present(fault.stage)
        if process is None or (fault.replaced and self._over()):
            return False
        process.stop()
        if fault.replaced:
            self._sleepers.append(process)
            self._start(fault.stage, joining=True)
        self._spawn(self._wake(process, fault))
        return True

    async def _wake(self, process: Process, fault: Pause) -> None:
        if fault.replaced:
            while True:  # by whoever it is that takes the place in the end
                present = self.seats[fault.stage].process
                if present is not None and present.restored.is_set():
                    break
                await asyncio.sleep(0.1)
        else:
            await asyncio.sleep(fault.seconds)
        process.go_on(self._loop)
        self.network.notify()

    def _cut(self, fault: Cut) -> bool:
        standing = [stream for stream in self._streams if stream.boundary == fault.boundary and not stream.status]
        for stream in standing:
            stream.break_off(half=fault.half)
        return bool(standing)

    async def _fast_again(self, fault: Slow) -> None:
        await asyncio.sleep(fault.seconds)
        self._slow.pop(fault.boundary, None)
        for down in (True, False):
            self._wires.pop((fault.boundary, down), None)

    # -- frames -------------------------------------------------------------------------------------------------

    def _called(self, stream: Stream) -> None:
        self._streams = {each: None for each in (*self._streams, stream) if not each.status}
        (self.meetings if stream.control else self.connections)[stream.boundary] += 1

    async def _carry(self, stream: Stream, frame: bytes, down: bool) -> bytes:
        """Take a frame on its way; returns it as it arrives."""
        sender = stream.upper if down else stream.lower
        if self._pending and down:
            self._look(stream, frame)
        if sender.stopped:
            await asyncio.sleep(0)  # until it goes on
        if stream.control and (until_s := self._late.get((stream.boundary, down), 0.0)) > self._loop.time():
            await asyncio.sleep(until_s - self._loop.time())
        if rate := self._slow.get(stream.boundary):
            # A moment and no lock: who is stopped in the middle of a frame keeps the wire from nobody else.
            wire, now = (stream.boundary, down), self._loop.time()
            self._wires[wire] = max(now, self._wires.get(wire, now)) + 8 * len(frame) / rate
            await asyncio.sleep(self._wires[wire] - now)
        self.frames += 1
        self._all_due(lambda at: isinstance(at, Frame) and at.number <= self.frames)
        return self._damaged(stream, frame)

    def _look(self, stream: Stream, raw: bytes) -> None:
        """At which phase of a step or a rollback a frame that goes down shows the stage above to be."""
        frame = decode_frame(raw, LIMITS)
        if isinstance(frame, StartView):
            self.reached(stream.upper, Phase.COMMIT)
        if not isinstance(frame, Chunk):
            return
        if frame.head:
            stream.part = (frame.head, 0)
        if not stream.part:  # a new connection goes on in the middle of a message
            return
        head, sent = stream.part
        stream.part = (head, sent + len(frame.data))
        if head.kind is not Kind.ACTIVATION:
            return
        self.reached(stream.upper, Phase.MID_SEND if sent else Phase.BEFORE_SEND, head.step)
        if head.token_ids_bytes < sent < head.token_ids_bytes + head.dictionary_bytes:
            self.reached(stream.upper, Phase.DELTA, head.step)

    def _damaged(self, stream: Stream, frame: bytes) -> bytes:
        waiting = self._to_damage.get((stream.boundary, stream.control))
        if not waiting or not (stream.control or isinstance(decode_frame(frame, LIMITS), Chunk)):
            return frame
        waiting[0] -= 1
        if waiting[0]:
            return frame
        del waiting[0]
        if stream.control:
            return frame[:-1]
        content = bytearray(frame)
        content[len(content) // 2] ^= 1
        return bytes(content)


class _Store(CheckpointStore):
    """A stage's disk: it tells how far a write has come, may be full, and is out of reach of the dead."""

    def __init__(self, cluster: Cluster, process: Process, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._cluster, self._process = cluster, process

    def write(self, snapshot: Any, **told: Any) -> Any:
        if self._process.dead:
            raise OSError(errno.EIO, "killed")
        self._cluster.begin_writing(self._process, snapshot.completed - 1)
        failed = True
        try:
            result = super().write(snapshot, **told)
            failed = False
            return result
        finally:
            self._cluster.end_writing(failed=failed)

    def _sweep(self) -> None:
        if not self._process.dead:
            super()._sweep()


def _address(stage: int) -> str:
    return f"127.0.0.1:{7000 + stage}"


async def _until_drained(drain: Callable[[], bool]) -> None:
    """In place of what waits for signals."""
    process = PROCESS.get()
    assert process
    process.drain = drain
    await asyncio.Event().wait()


def run_cluster(
    config: RunConfig,
    out: Path,
    faults: list[Fault],
    *,
    resume: bool = False,
    seed: int = 0,
    hurry: bool = False,
    late: Late | None = None,
    open_corpus: OpenCorpus = lambda corpus: corpus,
    mistaken: int | None = None,
) -> Ended:
    """The whole story on the jumping clock. resume: go on with what an earlier call left in `out`. seed: of how long
    everything takes. hurry: everything takes no time. late: control streams that are. open_corpus: what stage 0 does to
    open its data: it gives it, or an awaitable of it, or raises. mistaken: with `resume`, the one stage that is started
    as for a new run, and with --resume once that process has ended by an error (then it is among the `fenced`)."""
    cluster = Cluster(config, out, faults, late)
    cluster.mistaken = mistaken
    with _stage(cluster, open_corpus), asyncio.Runner(loop_factory=lambda: JumpingClock(seed, hurry=hurry)) as runner:
        return runner.run(cluster.run(resume=resume))


def run_to_failure(
    config: RunConfig,
    out: Path,
    faults: list[Fault],
    *,
    late: Late | None = None,
    open_corpus: OpenCorpus = lambda corpus: corpus,
) -> Failed:
    """The same for a story that ends badly for all."""
    cluster = Cluster(config, out, faults, late)
    with _stage(cluster, open_corpus), asyncio.Runner(loop_factory=JumpingClock) as runner:
        return runner.run(cluster.run_to_failure())


@contextmanager
def _stage(cluster: Cluster, open_corpus: OpenCorpus) -> Iterator[None]:
    """Everything that stands in for threads, gRPC and disks, for as long as this lasts."""
    prepare, prepare_corpus = node_run.prepare, node_run.prepare_corpus
    corpus = prepare_corpus(cluster.config)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        workers = without_threads(patch)
        cluster.network.stand_in(patch)
        patch.setattr(os, "fsync", cluster.fsync)
        patch.setattr(node_run, "RecoveryLoop", lambda *given, **named: cluster.adopt(RecoveryLoop(*given, **named)))
        patch.setattr(node_run, "CheckpointStore", cluster.store)

        def open_text(config: RunConfig, kept: Path | None) -> Any:
            return open_corpus(prepare_corpus(config, kept=kept) if kept else corpus)

        patch.setattr(node_run, "open_text", open_text)
        patch.setattr(node_run, "until_signal", _until_drained)

        def watched(config: RunConfig, stage: int, lane: int) -> tuple[Stage, str]:
            built, digest = prepare(config, stage, lane)
            return cluster.watch(built), digest

        patch.setattr(node_run, "prepare", watched)
        torch.set_num_threads(1)  # as a node's own thread does
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for worker in workers:
                worker.close()
