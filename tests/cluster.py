"""A whole swarm and its losses in this process: real lifecycles, stages, links, checkpoints; no sockets, no waiting.

What moves frames is a pair of queues, what tells the time is a clock that jumps to the next deadline as soon as nobody
has anything to do, and "kill" cancels a lifecycle between two frames and forgets all of it but its disk. A run with
several losses takes about a second, and where they fall is counted in frames, so every phase of a step and of a rewind
is hit sooner or later, the same one for the same seed.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.checkpoint import CheckpointStore
from thinpipe.node.config import RunConfig
from thinpipe.node.flow import Worker
from thinpipe.node.host import prepare, prepare_corpus
from thinpipe.node.lifecycle import Lifecycle
from thinpipe.node.link import Link
from thinpipe.node.manifest import Fingerprint
from thinpipe.node.metrics import MetricsWriter, Tracer
from thinpipe.protocol.errors import ProtocolError
from thinpipe.protocol.greeting import Identity
from thinpipe.sim.report import read_records, steps_of

from .in_memory import Connection

RUN_S = 3_000.0  # of the jumping clock
RETRY_S = 0.1


class JumpingClock(asyncio.SelectorEventLoop):
    """An event loop whose time stands still while anybody works and jumps to the next timer when nobody does."""

    def __init__(self) -> None:
        self._now = 0.0
        self.at_work = 0  # jobs in threads
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        self.at_work += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: object) -> None:
        self.at_work -= 1


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: JumpingClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self._loop.at_work:
            return super().select(10.0)
        if timeout is None:
            return super().select(10.0)
        self._loop.jump(timeout)
        return []


def count_work(patch: pytest.MonkeyPatch) -> None:
    """Let the clock know of jobs on the nodes' own threads."""
    run = Worker.run

    async def counted(self: Worker, name: str, work: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingClock)
        loop.at_work += 1
        try:
            return await run(self, name, work, *args)
        finally:
            loop.at_work -= 1

    patch.setattr(Worker, "run", counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """At the swarm's frame number `frame`, counted over all streams, `kind` happens to `stage` (a cut: below it)."""

    frame: int
    kind: str  # kill, cut, tear (a kill that damages the newest checkpoint too), drain
    stage: int
    away_s: float = 1.0  # until a killed stage is started again


def faults_of(seed: int, *, stages: int, count: int, frames: int) -> list[Fault]:
    """`count` faults at random frames; every third loses the newest checkpoint of its disk as well."""
    chance = random.Random(seed)
    drawn = []
    for frame in sorted(chance.randrange(5, frames) for _ in range(count)):
        kind = chance.choice(("kill", "kill", "cut", "tear"))
        within = stages - 1 if kind == "cut" else stages
        away_s = chance.choice((0.0, 0.3, 5.0))
        drawn.append(Fault(frame=frame, kind=kind, stage=chance.randrange(within), away_s=away_s))
    return drawn


@dataclass(slots=True)
class Seat:
    """A stage's place, whichever process serves it."""

    lifecycle: Lifecycle | None = None
    task: asyncio.Task[None] | None = None
    metrics: MetricsWriter | None = None
    through: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Ended:
    """What the run came to."""

    losses: list[list[float]]
    val_losses: list[float]
    state_sha256: list[str]
    epochs: int
    frames: int
    seconds: float
    faults: list[str] = field(default_factory=list)


class Cluster:
    """`config` as a swarm in this process, with `faults`."""

    def __init__(self, config: RunConfig, out: Path, faults: list[Fault]) -> None:
        self.config, self.out = config, out
        self.stages = config.pipeline.stages
        self.seats = [Seat() for _ in range(self.stages)]
        self.frames = 0
        self.drained = False
        self.failures: list[Exception] = []
        self.said: list[str] = []
        self._faults, self._planned = list(faults), tuple(faults)
        self._born = 0
        self._connections: dict[int, set[Connection]] = {boundary: set() for boundary in range(self.stages - 1)}
        self._background: set[asyncio.Task[Any]] = set()

    async def run(self, *, resume: bool = False) -> Ended:
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.timeout(RUN_S):
                for stage in range(self.stages):
                    self._start(stage, joining=resume)
                for seat in self.seats:
                    await seat.through.wait()
                if self.failures:
                    raise self.failures[0]
                assert self.drained or not any(fault.kind == "drain" for fault in self._planned)
        finally:
            for task in [*self._background, *(seat.task for seat in self.seats if seat.task)]:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
        records = [read_records(self.out / f"stage-{stage}.jsonl") for stage in range(self.stages)]
        return Ended(
            losses=[[record["loss"] for record in steps_of(of)] for of in records],
            val_losses=[
                next((r["val_loss"] for r in reversed(of) if r["event"] == "evaluation"), 0.0) for of in records
            ],
            state_sha256=[[r["state_sha256"] for r in of if r["event"] == "end"][-1] for of in records],
            epochs=1 + max((r["epoch"] for r in records[0] if r["event"] == "rewind"), default=0),
            frames=self.frames,
            seconds=asyncio.get_running_loop().time(),
            faults=self.said,
        )

    # -- processes ----------------------------------------------------------------------------------------------

    def _start(self, stage: int, *, joining: bool) -> None:
        self._born += 1
        config, seat = self.config, self.seats[stage]
        built, digest = prepare(config, stage)
        identity = Identity(
            run_id=config.run.name, configuration=digest, stage=stage, stages=self.stages, incarnation=self._born
        )
        seat.metrics = MetricsWriter(self.out / f"stage-{stage}.jsonl", append=joining)
        seat.metrics.write("start", stage=stage)
        fingerprint = Fingerprint(run=config.run.name, configuration=digest, stages=self.stages)
        seat.lifecycle = Lifecycle(
            config,
            built,
            identity,
            joining=joining,
            rebuild=lambda: prepare(config, stage)[0],
            store=CheckpointStore(self.out / "checkpoints", stage=stage, fingerprint=fingerprint),
            dial=(lambda below: self._dial(stage, below)) if stage < self.stages - 1 else None,
            corpus=prepare_corpus(config) if stage == 0 else None,
            metrics=seat.metrics,
            tracer=Tracer(stage=stage, enabled=False),
            on_fault=lambda code, line: self.said.append(f"{code}: {line}"),
        )
        seat.task = asyncio.create_task(self._serve(seat, stage))

    async def _serve(self, seat: Seat, stage: int) -> None:
        assert seat.lifecycle
        life = seat.lifecycle
        calling = asyncio.create_task(self._dial_control(stage, life)) if stage < self.stages - 1 else None
        try:
            await life.run()
            if calling:
                await calling
        except Exception as error:
            self.failures.append(error)
            for each in self.seats:  # nobody need wait for the rest
                each.through.set()
        finally:
            if self.seats[stage] is seat and seat.task is asyncio.current_task():
                seat.through.set()
            if calling:
                calling.cancel()
            if seat.metrics:
                seat.metrics.close()

    def _spawn(self, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(job)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _kill(self, fault: Fault) -> None:
        seat = self.seats[fault.stage]
        over = any(each.lifecycle and each.lifecycle.control.through for each in self.seats)
        if seat.task is None or over:  # then all have done all, and nothing can be lost any more
            return
        task, seat.task, seat.lifecycle = seat.task, None, None
        for boundary in (fault.stage - 1, fault.stage):
            self._cut(boundary)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(fault.away_s)
        if fault.kind == "tear":
            self._tear(fault.stage)
        self._start(fault.stage, joining=True)

    def _tear(self, stage: int) -> None:
        """The newest checkpoint lost a byte."""
        files = sorted((self.out / "checkpoints" / f"stage-{stage}").glob("step-*/state.safetensors"))
        if files:
            content = bytearray(files[-1].read_bytes())
            content[len(content) // 2] ^= 1
            files[-1].write_bytes(content)

    # -- streams ------------------------------------------------------------------------------------------------

    def _cut(self, boundary: int) -> None:
        for connection in self._connections.get(boundary, set()).copy():
            connection.break_off()

    def _count(self) -> None:
        self.frames += 1
        while self._faults and self._faults[0].frame <= self.frames:
            fault = self._faults.pop(0)
            life = self.seats[fault.stage].lifecycle
            if fault.kind == "cut":
                self._cut(fault.stage)
            elif fault.kind == "drain":
                self.drained = bool(life and life.drain())
            else:
                self._spawn(self._kill(fault))

    def _ends(self, boundary: int) -> tuple[Connection, Any, Any]:
        connection = Connection(None)
        self._connections[boundary].add(connection)

        def counted(end: tuple[Any, Any]) -> tuple[Any, Any]:
            read, write = end

            async def write_counted(frame: bytes) -> None:
                await write(frame)
                self._count()

            return read, write_counted

        return connection, counted(connection.end(upper=True)), counted(connection.end(upper=False))

    async def _together(self, boundary: int, connection: Connection, *ends: Coroutine[Any, Any, Any]) -> Any:
        """What the upper end returned; None if the connection broke."""

        async def one(end: Coroutine[Any, Any, Any]) -> Any:
            try:
                result = await end
            except ConnectionError:
                connection.break_off()
            except ProtocolError as error:
                self.said.append(str(error))
                connection.break_off()
            except asyncio.CancelledError:
                connection.break_off()
                raise
            else:
                connection.hang_up()
                return result
            return None

        upper, lower = (asyncio.create_task(one(end)) for end in ends)
        self._background.add(lower)  # the lower end is not the dialler's to cancel
        lower.add_done_callback(self._background.discard)
        try:
            return await upper
        finally:
            upper.cancel()
            self._connections[boundary].discard(connection)

    async def _dial(self, stage: int, below: Link) -> None:
        while not below.finished:
            below.opened.clear()
            life = self.seats[stage + 1].lifecycle
            lower = life and life.link_above
            if lower and not lower.serving.locked():
                connection, up, down = self._ends(stage)
                await self._together(
                    stage,
                    connection,
                    below.attach(*up, speaks_first=True, greeting_timeout_s=5.0),
                    self._attach_lower(lower, down),
                )
            if not below.finished:
                await asyncio.sleep(RETRY_S)

    async def _attach_lower(self, lower: Link, down: tuple[Any, Any]) -> None:
        async with lower.serving:
            await lower.attach(*down, speaks_first=False, greeting_timeout_s=5.0)

    async def _dial_control(self, stage: int, life: Lifecycle) -> None:
        while True:
            below = self.seats[stage + 1].lifecycle
            if below:
                connection, up, down = self._ends(stage)
                last_word = await self._together(
                    stage,
                    connection,
                    life.control.converse("below", *up, speaks_first=True, greeting_timeout_s=5.0),
                    below.control.converse("above", *down, speaks_first=False, greeting_timeout_s=5.0),
                )
                if last_word:
                    return
            if life.control.through and self.seats[stage + 1].through.is_set():
                return
            await asyncio.sleep(RETRY_S)


def run_cluster(config: RunConfig, out: Path, faults: list[Fault], *, resume: bool = False) -> Ended:
    """The whole story on the jumping clock. resume: go on with what an earlier call left in `out`."""
    with pytest.MonkeyPatch.context() as patch:
        count_work(patch)
        with asyncio.Runner(loop_factory=JumpingClock) as runner:
            return runner.run(Cluster(config, out, faults).run(resume=resume))
