"""A whole grid of lanes and stages in this process, nodes of which are lost at any moment, on the jumping clock.

As `tests/cluster.py` is for one chain: real nodes from the host down, with real contributions, checkpoints and logs of
members on the disk, and what stands in for gRPC, threads and time of `tests/virtual.py`. A story is judged as `thinpipe
chaos` judges one: done again in one process from the record of who took part, every lane that came to the end has to be
the same. Each stage has a disk of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.node import node_run
from thinpipe.node.config import RunConfig
from thinpipe.node.data import Corpus
from thinpipe.node.node_options import Addresses, NodeOptions, NodeSetup
from thinpipe.node.recomputed_run import Recomputation, recompute
from thinpipe.node.recovery_loop import RecoveryLoop
from thinpipe.node.run_records import MetricsWriter, Tracer
from thinpipe.node.stage_failure import first_of
from thinpipe.sim.reports.lanes import lane_path
from thinpipe.sim.reports.summary import read_records

from .cluster import ProcessRecords, _until_drained
from .virtual import PROCESS, JumpingClock, Network, Process, Stream, without_threads

RUN_S = 4000.0  # of the jumping clock
SILENCE_S = 9.0
Place = tuple[int, int]  # lane, stage
OnEvent = Callable[["GridCluster", Place, str], None]
KINDS = ("kill", "lane", "absent", "sleeper", "disk", "cut")
AWAY_S = {"kill": (0.3, 3.0), "disk": (0.3, 3.0), "lane": (0.5, 25.0), "absent": (5.0, 25.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFault:
    """Once a step with that number is done anywhere: what befalls which node (of `lane`: all of that lane), for how
    long it is away. kind: one of KINDS; `cut` ends all connections of that node to its own stage in other lanes. Or
    `hang`: all nodes of that lane are stopped for so long; or `drain`: so much later all nodes of all lanes are told to
    end, as `thinpipe up` tells them on SIGTERM."""

    step: int
    kind: str
    lane: int
    stage: int
    away_s: float = 0.0


def draw_faults(seed: int, *, lanes: int, stages: int, steps: int, count: int) -> list[GridFault]:
    chance = random.Random(seed)
    faults = []
    for step in sorted(chance.randint(1, steps) for _ in range(count)):
        kind = chance.choice([each for each in KINDS if stages > 1 or each != "sleeper"])  # no neighbour keeps it out
        away_s = round(chance.uniform(*AWAY_S.get(kind, (0.0, 0.0))), 2)
        place = chance.randrange(lanes), chance.randrange(stages)
        faults.append(GridFault(step=step, kind=kind, lane=place[0], stage=place[1], away_s=away_s))
    return faults


class _Clock(JumpingClock):
    """Jobs of the dead do nothing."""

    async def _job(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        process = PROCESS.get()
        if process and process.dead:
            raise asyncio.CancelledError
        return await super()._job(func, args)


@dataclass(slots=True)
class _Seat:
    process: Process | None = None
    through: asyncio.Event = field(default_factory=asyncio.Event)
    away: bool = False  # what served it is dead, and nothing takes its place yet


class GridCluster:
    """`config`, of several lanes, as a grid in this process, with `faults`. on_event: told of each record that a node
    writes, with its place, so that it may let something befall the grid at that moment."""

    def __init__(
        self, config: RunConfig, out: Path, faults: list[GridFault], on_event: OnEvent = lambda *_: None
    ) -> None:
        self.config, self.out = config, out
        self.lanes, self.stages = config.lanes.count, config.pipeline.stages
        self.seats = {(lane, stage): _Seat() for lane in range(self.lanes) for stage in range(self.stages)}
        self.network = Network(self._carry, lambda _: None)
        self.failures: list[tuple[Place, float, BaseException]] = []
        self.said: list[str] = []
        self.happened: list[GridFault] = []
        self._pending, self._on_event = list(faults), on_event
        self._place: dict[int, Place] = {}  # by the number of a process
        self._background: set[asyncio.Task[Any]] = set()
        self._sleepers: list[Process] = []
        self.drained: list[bool] = []

    async def run(self, *, resume: bool = False) -> None:
        """Until all lanes are through that are not away when the others are."""
        self._outside = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RUN_S):
                for place in self.seats:
                    self._start(place, joining=resume)
                for seat in self.seats.values():
                    await seat.through.wait()
        except TimeoutError:
            waiting = [place for place, seat in self.seats.items() if not seat.through.is_set()]
            raise AssertionError(f"after {RUN_S:g} s these are not through: {waiting}") from None
        else:
            for problem in (*(error for *_, error in self.failures), *self.network.bugs):
                raise problem
        finally:
            processes = [*self._sleepers, *(seat.process for seat in self.seats.values() if seat.process)]
            for process in processes:
                process.go_on(self._loop)
            everyone = [*self._background, *(process.task for process in processes if process.task)]
            for task in everyone:
                task.cancel()
            await asyncio.wait(everyone, timeout=60)

    # -- processes ----------------------------------------------------------------------------------------------------

    def _config_of(self, place: Place) -> RunConfig:
        directory = self.out / "disks" / f"lane-{place[0]}-stage-{place[1]}"
        checkpoint = self.config.checkpoint.model_copy(update={"directory": directory})
        return self.config.model_copy(update={"checkpoint": checkpoint})

    def _start(self, place: Place, *, joining: bool) -> None:
        lane, stage = place
        process = Process(stage=stage, number=len(self._place) + 1)
        self._place[process.number] = place
        seat = self.seats[place]
        seat.process, seat.away = process, False
        home = lane_path(self.out, lane, self.lanes)
        home.mkdir(parents=True, exist_ok=True)
        path, on_event = home / f"stage-{stage}.jsonl", partial(self._on_event, self, place)
        metrics = ProcessRecords(path, process, append=joining, on_step=self._stepped, on_event=on_event)
        metrics.write("start", stage=stage)
        below = address((lane, stage + 1)) if stage + 1 < self.stages else None
        lateral = {other: address((other, stage)) for other in range(lane)}
        addresses = Addresses(listen=address(place), next=below, lateral=lateral)

        def on_fault(code: str, line: str) -> None:
            if not process.dead:
                self.said.append(f"{self._loop.time():.2f} {lane}.{stage}: {code}: {line}")

        options = NodeOptions(out=home, run=self.out, lane=lane, resume=joining)
        tracer = Tracer(stage=stage, enabled=False)
        config = self._config_of(place)
        node = partial(
            node_run.run_stage,
            NodeSetup(
                config=config,
                stage=stage,
                addresses=addresses,
                options=options,
                metrics=metrics,
                tracer=tracer,
                on_fault=on_fault,
            ),
        )
        process.task = self._loop.create_task(self._serve(place, process, node, metrics), context=process.context)
        process.task.add_done_callback(lambda _: metrics.close())  # one that is killed at once does not begin
        self.network.notify()

    async def _serve(
        self, place: Place, process: Process, node: Callable[[], Awaitable[None]], metrics: MetricsWriter
    ) -> None:
        seat = self.seats[place]
        try:
            await node()
        except Exception as raised:
            if seat.process is process and not process.dead:
                self.failures.append((place, self._loop.time(), first_of(raised)))
                for each in self.seats.values():
                    each.through.set()
        else:
            if seat.process is not process and not process.dead:  # woken in time, it has kept its place
                self._die(place)  # whoever was to take it stands outside
                seat.away = False
                seat.through.set()
        finally:
            metrics.close()
            if seat.process is process and not process.dead:
                seat.through.set()
                self._leave_out_who_is_away()

    def _spawn(self, job: Any) -> None:
        task = self._loop.create_task(job, context=self._outside.copy())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @property
    def is_ending(self) -> bool:
        """Whether some node has left since all is done."""
        return any(seat.through.is_set() for seat in self.seats.values())

    def _leave_out_who_is_away(self) -> None:
        """Once some node has left: a lane with a node that is away stays away. Who is through waits for it for a while
        only, and each node by itself."""
        if not self.is_ending:
            return
        for lane in range(self.lanes):
            if any(self.seats[lane, stage].away for stage in range(self.stages)):
                for stage in range(self.stages):
                    self._die((lane, stage))
                    self.seats[lane, stage].through.set()

    # -- what happens -------------------------------------------------------------------------------------------------

    def _stepped(self, steps: int) -> None:
        for fault in [each for each in self._pending if each.step <= steps]:
            self._pending.remove(fault)
            self.befall(fault)

    def befall(self, fault: GridFault) -> None:
        """Now, whatever its `step` says."""
        self._spawn(self._befall(fault))

    async def _befall(self, fault: GridFault) -> None:
        place = fault.lane, fault.stage
        seat = self.seats[place]
        process = seat.process
        usable = process and not (process.dead or process.stopped or seat.through.is_set())
        if not usable or self.is_ending:
            return
        assert process
        self.happened.append(fault)
        self.said.append(f"{self._loop.time():.2f} == {fault}")
        if fault.kind == "cut":
            for stream in list(process.streams):
                if self._is_lateral(stream):
                    stream.break_off()
            return
        if fault.kind == "drain":
            await asyncio.sleep(fault.away_s)
            self.drained = [bool(seat.process and seat.process.drain()) for seat in self.seats.values()]
            return
        if fault.kind == "hang":
            hung = [self.seats[fault.lane, stage].process for stage in range(self.stages)]
            for each in hung:
                assert each
                each.stop()
            await asyncio.sleep(fault.away_s)
            for each in hung:
                assert each
                each.go_on(self._loop)
            self.network.notify()
            return
        if fault.kind == "sleeper":
            process.stop()
            self._sleepers.append(process)
            self._start(place, joining=True)
            await self._wake(place, process)
            return
        killed = [(fault.lane, stage) for stage in range(self.stages)] if fault.kind == "lane" else [place]
        killed = [each for each in killed if not self.seats[each].away]
        for each in killed:
            self._die(each)
        if fault.kind == "disk":
            shutil.rmtree(self.out / "disks" / f"lane-{place[0]}-stage-{place[1]}", ignore_errors=True)
            home = lane_path(self.out, place[0], self.lanes)
            shutil.rmtree(home / "rounds" / f"stage-{place[1]}", ignore_errors=True)
        self._leave_out_who_is_away()
        await asyncio.sleep(fault.away_s)
        for each in killed:
            if self.seats[each].away and not self.seats[each].through.is_set():
                self._start(each, joining=True)

    def _die(self, place: Place) -> None:
        seat = self.seats[place]
        if seat.process and not seat.process.dead and not seat.through.is_set():
            seat.process.die(self._loop)
            seat.away = True
            self.network.notify()

    async def _wake(self, place: Place, process: Process) -> None:
        """Once another one has its place, and it was silent for so long that all connections to it are gone."""
        await asyncio.sleep(SILENCE_S)
        while True:
            present = self.seats[place].process
            if present and present.restored.is_set():
                break
            await asyncio.sleep(0.1)
        process.go_on(self._loop)
        self.network.notify()

    def _is_lateral(self, stream: Stream) -> bool:
        return self._place[stream.upper.number][0] != self._place[stream.lower.number][0]

    async def _carry(self, stream: Stream, frame: bytes, down: bool) -> bytes:
        if (stream.upper if down else stream.lower).stopped:
            await asyncio.sleep(0)  # until it goes on
        return frame


def address(place: Place) -> str:
    return f"127.0.0.1:{7000 + 100 * place[0] + place[1]}"


def run_grid(
    config: RunConfig,
    out: Path,
    faults: list[GridFault],
    *,
    seed: int = 0,
    resume: bool = False,
    on_event: OnEvent = lambda *_: None,
) -> GridCluster:
    """The whole story. seed: of how long everything takes. Raises what a node ended with that was not killed."""
    grid = GridCluster(config, out, faults, on_event)
    with _stand_in(grid) as corpus, asyncio.Runner(loop_factory=lambda: _Clock(seed)) as runner:
        del corpus
        runner.run(grid.run(resume=resume))
    return grid


@contextmanager
def _stand_in(grid: GridCluster) -> Iterator[Corpus]:
    """For threads, gRPC and disks, for as long as this lasts."""
    prepare_corpus = node_run.prepare_corpus
    corpus = prepare_corpus(grid.config)
    threads = torch.get_num_threads()

    def adopted(*given: Any, **named: Any) -> RecoveryLoop:
        process, loop = PROCESS.get(), RecoveryLoop(*given, **named)
        assert process
        process.recovery_loop = loop
        return loop

    with pytest.MonkeyPatch.context() as patch:
        workers = without_threads(patch)
        grid.network.stand_in(patch)
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(node_run, "RecoveryLoop", adopted)
        patch.setattr(node_run, "open_text", lambda config, kept: prepare_corpus(config, kept=kept))
        patch.setattr(node_run, "until_signal", _until_drained)
        torch.set_num_threads(1)
        try:
            yield corpus
        finally:
            torch.set_num_threads(threads)
            for worker in workers:
                worker.close()


def judged(config: RunConfig, out: Path) -> Recomputation:
    """The run done again from its record."""
    return recompute(out, out / "again", config)


def events(out: Path, config: RunConfig, lane: int, stage: int, *kinds: str) -> list[dict[str, Any]]:
    """Records of a node."""
    records = read_records(lane_path(out, lane, config.lanes.count) / f"stage-{stage}.jsonl")
    return [record for record in records if record["event"] in kinds]
