"""What one stage was after earlier steps of its run, wherever that is kept: in memory, on its disk, at a neighbour.

`checkpoints.restore_points` knows memory and disk, and `checkpoints.copy_service` the copies that neighbours keep for
each other. Here they are one: a state that is kept goes to all three, and a stage whose disk is new asks its neighbour
first. Which of the states counts is not decided here: stages agree on a step (`protocol.rollback`), and where there are
lanes, other lanes may have gone on without what this one did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..protocol.control_messages import CopyFrame
from ..protocol.rollback import Rollback
from ..protocol.rollback_actions import Side, Start
from ..sim.links.shaper import LinkProfile
from ..sim.reports.wording import counted
from .chain_neighbours import ChainNeighbours, Links
from .checkpoints.copy_service import CopyService
from .checkpoints.generation_file import GENERATION
from .checkpoints.manifest import CheckpointError, Manifest
from .checkpoints.restore_points import RestorePoints
from .checkpoints.store import CheckpointStore
from .config import RunConfig
from .lanes.held_rounds import HeldRounds
from .link_settings import part_bytes_for, parts_ahead_for
from .links.control_stream import Control
from .run_records import MetricsWriter
from .stage import Stage
from .stage_state import StageSnapshot
from .worker_thread import Reporter


class KeptStates:
    """Of the stage that `machine` decides for.

    known: checkpoints that were on this disk when the process began, newest first. links: those of the present
    generation, over which copies travel. on_written: told with each checkpoint that no rollback will lead further back
    than to after so many steps. paused_ago_s: how long ago the last pause of this process ended. Everything is called
    on the event loop.
    """

    def __init__(
        self,
        config: RunConfig,
        store: CheckpointStore,
        known: list[int],
        *,
        machine: Rollback,
        control: Control,
        neighbours: ChainNeighbours,
        links: Callable[[], Links],
        metrics: MetricsWriter,
        on_fault: Reporter,
        on_written: Callable[[int], None] | None,
        paused_ago_s: Callable[[], float],
    ) -> None:
        self.committed = max(known, default=0)  # steps, in the newest checkpoint on disk
        self.rounds: HeldRounds | None = None
        self._config, self._store, self._known = config, store, known
        self._machine, self._control, self._neighbours, self._links = machine, control, neighbours, links
        self._metrics, self._on_fault, self._on_written = metrics, on_fault, on_written
        self._loop: asyncio.AbstractEventLoop | None = None
        self.points = RestorePoints(store, on_written=self._written, on_error=self._unwritten)
        machine.outlived = self._outlived()
        chained, profile = machine.identity, LinkProfile.parse(config.link.link)
        self._copies = control.copies = CopyService(
            stage=chained.stage,
            stages=chained.stages,
            chain=chained.chain,
            store=store,
            bytes_max=config.checkpoint.copy_bytes_max if config.checkpoint.every else 0,
            part_bytes=part_bytes_for(profile),
            parts_ahead=parts_ahead_for(profile),
            say=self._say_of_copies,
            refuse=control.refuse,
            on_fault=on_fault,
            on_copy=lambda completed, size, fetched: metrics.write(
                "copy", completed=completed, bytes=size, fetched=fetched
            ),
            on_held=self._held_at_buddy,
            paused_ago_s=paused_ago_s,
        )

    def open(self) -> None:
        """The loop runs, to which what is written in other threads is told."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Of what was kept, all is written; its records come before this returns."""
        await self._copies.close()
        await self.points.close()

    # -- what there is ------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """At the disk once more: this machine turns out to be new to a run that has begun. And ask the buddy."""
        self._known = await self.points.on_disk()
        await self.fetch()

    async def fetch(self) -> None:
        """What this disk lacks and the buddy has of this stage's checkpoints."""
        link = self._config.link
        limits = {"deadline_s": link.connect_timeout_s, "replacement_s": link.replacement_timeout_s}
        if await self._copies.fetch(self._known, **limits):
            self._known = await self.points.on_disk()

    def give_up_fetching(self) -> None:
        """The run ends."""
        self._copies.give_up()

    def manifests(self) -> list[Manifest]:
        """Of what this node could go on from, less what other lanes have said meanwhile that it does not count: that is
        gone."""
        there = set(self._store.steps())
        self._known = [step for step in self._known if step in there]
        return [self._store.manifest(step) for step in self._known]

    def known(self) -> set[int]:
        """Steps after which this disk had a state that counts, when it was last looked at."""
        return self.valid(set(self._known))

    async def offered(self) -> set[int]:
        """Steps after which there is a state that counts, in memory or on disk."""
        return self.valid(await self.points.offered())

    def valid(self, steps: set[int]) -> set[int]:
        """Those whose state is a part of the run, as stage 0 knows, where there are lanes that leave and come back."""
        if not self.rounds:
            return steps
        return {step for step in steps if self.rounds.valid(step) and not self.points.is_void(step)}

    # -- to keep and to restore ---------------------------------------------------------------------------------------

    async def keep(self, snapshot: StageSnapshot) -> None:
        """In memory now, on disk and at the buddy soon."""
        self.set_floor()
        await self.points.keep(snapshot, generation=self._machine.generation)

    def set_floor(self) -> None:
        """What all nodes have copies of is what the oldest rollback may need."""
        self._store.floor = self._machine.heartbeats.copied_by_all

    async def written_out(self) -> None:
        """Nothing is left to write, or so long has passed that something is wrong."""
        await self.points.flush(self._config.link.replacement_timeout_s)

    async def restore(self, stage: Stage, start: Start, rebuild: Callable[[], Stage]) -> Stage:
        """The stage as it was after `start.completed` steps: `stage` itself, or what `rebuild` makes."""
        began = time.monotonic()
        snapshot, where = await self.points.find(start.completed)
        if snapshot is None:
            stage = await asyncio.to_thread(rebuild)
        else:
            await asyncio.to_thread(stage.restore, snapshot)
        stage.set_generation(start.generation)
        self._copies.written(start.completed)  # what comes after it is not to be copied any more
        if self.rounds and self.rounds.redone_otherwise:  # the later ones may be of steps that do not count
            await self.points.discard_after(start.completed)
        self.points.forget_after(start.completed)
        self.points.gone_back(start.completed)
        await self._enter(start.generation)
        seconds = round(time.monotonic() - began, 6)
        self._metrics.write(
            "rollback", generation=start.generation, completed=start.completed, source=where, seconds=seconds
        )
        print(
            f"generation {start.generation}: goes on after {counted(start.completed, 'step')}, restored from {where}",
            flush=True,
        )
        return stage

    def _outlived(self) -> int:
        """The newest generation of the processes that were here before, as this disk knows."""
        try:
            return GENERATION.read(self._store.directory)
        except CheckpointError as error:
            self._on_fault("checkpoint", str(error))
            return 0

    async def _enter(self, generation: int) -> None:
        """Where nothing is written, nobody can go on, and no later process counts on from here."""
        if self._config.checkpoint.every:
            try:
                await asyncio.to_thread(GENERATION.write, self._store.directory, generation)
            except CheckpointError as error:  # as of any other write there: the run goes on
                self._on_fault("checkpoint", str(error))

    # -- what is told by others ---------------------------------------------------------------------------------------

    def _written(self, completed: int, size: int, seconds: float) -> None:
        record = partial(self._metrics.write, "checkpoint", completed=completed, bytes=size, seconds=round(seconds, 6))
        self._in_loop(record)
        self.committed = completed
        self._in_loop(partial(self._copies.written, completed))
        if self._on_written:
            self._in_loop(partial(self._on_written, self.points.oldest))

    def _unwritten(self, line: str) -> None:
        self._in_loop(partial(self._on_fault, "checkpoint", line))

    def _in_loop(self, call: Callable[[], None]) -> None:
        """Records are written by one thread."""
        with suppress(RuntimeError):  # the loop has ended
            assert self._loop
            self._loop.call_soon_threadsafe(call)

    def _held_at_buddy(self, completed: int) -> None:
        self._machine.heartbeats.copied = completed

    async def _say_of_copies(self, side: Side, frame: CopyFrame) -> None:
        await self._neighbours.reserve(side, frame, self._links())
        self._control.tell(side, frame)
