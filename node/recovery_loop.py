"""One stage over all generations of a run: train, break off, restore, train again, until all stages have finished.

Within a generation nothing is shared with the next one: links, sessions, queues and threads are made anew, and all that
crosses over is the stage's state, restored from a snapshot. So whatever a loss left half done (a message under way, a
partial gradient, an unpacked tensor) is gone with its generation and needs no rule of its own. Why not repair the links
in place: each of those leftovers would be a case, and the order of two cases another one.

Snapshots: after every `checkpoint.every` steps the state is copied (`checkpoints.restore_points`). After 0 steps none
is needed: a stage can be built anew from the run's settings.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from ..protocol.control_messages import CopyFrame, Heartbeat
from ..protocol.greeting import NodeIdentity
from ..protocol.group_chain import group_ends_after
from ..protocol.rollback import Rollback, RollbackPhase
from ..protocol.rollback_actions import ChooseEnd, End, EndAfter, Leave, Side, Start, Stop
from ..sim.links.shaper import LinkProfile
from ..sim.reports.wording import counted
from .chain_neighbours import ChainNeighbours, Links
from .checkpoints.copy_service import CopyService
from .checkpoints.manifest import Manifest
from .checkpoints.restore_points import RestorePoints
from .checkpoints.store import HELD_TIMES, CheckpointStore
from .config import RunConfig
from .context.link_transport import LinkTransport
from .data import Corpus
from .free_memory import give_back_free_memory
from .generation import Dial, break_off, context_of, context_parts_of, links_of, train
from .lanes.group_rounds import GroupRounds
from .lanes.held_rounds import HeldRounds
from .lanes.lane_rounds import rounds_over
from .lanes.lateral_links import LateralLinks
from .link_settings import heartbeat_timeout_s, part_bytes_for, parts_ahead_for, transfer_s
from .links.control_stream import Control, Wanted
from .links.link import Link
from .long_preparation import LongPreparation
from .process_pause import ProcessPause
from .receive_deadline import ReceiveDeadline
from .run_records import MetricsWriter, Tracer
from .run_totals import RunTotals
from .stage import Stage
from .stage_failure import Farewell, StageFailed
from .stage_state import StageSnapshot
from .training_loop import TrainingLoop
from .worker_thread import Reporter, Worker

TIDY_EVERY = 100  # steps, where there are no checkpoints


class RecoveryLoop:
    """Stage `stage.index` from its first generation to its last.

    `dial` keeps a link to the stage below, or to a lower lane, connected; `link_above` and the links of `context` are
    what a listener serves. `rebuild` makes the stage anew, as it is before the first step. `open_corpus`, of stage 0,
    may take hours, in a thread; `on_corpus` is told of the result. `accept_corpus` is given what it opened and the
    manifests of the checkpoints that this node could go on from, raises what is wrong with them, and returns what
    writes down which text it is. Raises that, what `node.training_loop.TrainingLoop` and `open_corpus` do, TimeoutError
    if no new generation is agreed in time, and StageFailed if another stage has failed.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        identity: NodeIdentity,
        *,
        joining: bool,
        rebuild: Callable[[], Stage],
        store: CheckpointStore,
        dial: Dial | None,
        open_corpus: Callable[[], Corpus] | None,
        on_corpus: Callable[[Corpus], None],
        metrics: MetricsWriter,
        tracer: Tracer,
        on_fault: Reporter,
        accept_corpus: Callable[[Corpus, list[Manifest]], Callable[[], None]] | None = None,
        lateral: LateralLinks | None = None,
    ) -> None:
        self.config, self.stage = config, stage
        self.committed = 0  # steps, in the newest checkpoint on disk
        self.link_above: Link | None = None
        self.context: LinkTransport | None = None
        self._identity, self._joining = identity, joining
        self._grouped = bool(config.context.method)  # all lanes are one chain, and this node a position in it
        chained = identity.in_group() if self._grouped else identity
        self.was_met = joining  # whether the stages above and below have been there
        self._rebuild, self._store, self._dial = rebuild, store, dial
        self._open_corpus, self._on_corpus, self._corpus = open_corpus, on_corpus, None
        self._accept_corpus = accept_corpus
        self._keep_corpus: Callable[[], None] | None = None
        self._metrics, self._tracer, self._on_fault = metrics, tracer, on_fault
        self._effects: asyncio.Queue[Wanted] = asyncio.Queue()
        self._sent_to_lanes: defaultdict[int, Counter[str]] = defaultdict(Counter)  # keys and values
        self._end_asked = asyncio.Event()
        self._finishing = False  # all steps are done, here and in all stages
        self._said_end: int | None = None
        self._node: TrainingLoop | None = None
        self._training: asyncio.Task[None] | None = None
        self._totals = RunTotals()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._points = RestorePoints(store, on_written=self._written, on_error=self._unwritten)
        profile = LinkProfile.parse(config.link.link)
        between = lateral if self._grouped else None
        self._neighbours = ChainNeighbours(chained, identity.stage, between, profile)
        self._known = known = (
            store.newest_intact(HELD_TIMES * store.keep, report=partial(on_fault, "checkpoint")) if joining else []
        )
        generation = max((store.manifest(step).generation for step in known), default=0)
        self.committed = max(known, default=0)
        self.machine = Rollback(chained, joining=joining, generation=generation)
        self.control = Control(
            self.machine,
            heartbeat_timeout_s=heartbeat_timeout_s(profile, config.link.chunk_bytes),
            on_effect=self._wanted,
            sent=self._neighbours.accounts,
        )
        self._farewell = Farewell(self.control, metrics)
        self._preparing = LongPreparation(chained, self.machine.heartbeats, metrics, lanes=identity.lanes)
        self.pause = ProcessPause()  # whoever has a deadline asks it
        self.rounds: HeldRounds | None = None
        if lateral:
            assert stage.averager
            self.rounds = rounds_over(
                lateral,
                config,
                identity,
                stage.averager,
                machine=self.machine,
                control=self.control,
                points=self._points,
                metrics=metrics,
                under_way=lambda: self._node.under_way if self._node else self.machine.completed,
                committed=lambda: self.committed,
                on_changed=lambda: self._node and self._node.look_again(),
                on_fault=on_fault,
                held_up=self._preparing.held_up,
                paused_ago_s=self.pause.ago_s,
            )
        self._deadline = ReceiveDeadline(
            transfer_s=transfer_s(config, stage, profile, context_parts_of(config, stage)),
            fixed_s=config.link.progress_timeout_s,
            replacement_s=config.link.replacement_timeout_s,
            missing_s=self.control.missing_s,
            prepared_ago_s=self._preparing.ago_s,
            paused_ago_s=self.pause.ago_s,
        )
        self._copies = self.control.copies = CopyService(
            stage=chained.stage,
            stages=chained.stages,
            chain=chained.chain,
            store=store,
            bytes_max=config.checkpoint.copy_bytes_max if config.checkpoint.every else 0,
            part_bytes=part_bytes_for(profile),
            parts_ahead=parts_ahead_for(profile),
            say=self._say_of_copies,
            refuse=self.control.refuse,
            on_fault=on_fault,
            on_copy=lambda completed, size, fetched: metrics.write(
                "copy", completed=completed, bytes=size, fetched=fetched
            ),
            on_held=self._held_at_buddy,
            paused_ago_s=self.pause.ago_s,
        )

    async def run(self) -> None:
        """Returns when every stage has finished."""
        self._loop = asyncio.get_running_loop()
        watching = [asyncio.create_task(each.watch()) for each in (self._preparing, self.pause)]
        try:
            if self._joining:  # first: the tokenizer may come with a copy
                await self._fetch_copies()
            if self._open_corpus:
                self._corpus = await self._preparing.run(self._open_corpus, unless=self._end_asked)
                if self._corpus:
                    self._on_corpus(self._corpus)
                else:  # all end, without another step
                    self.control.act(self.machine.end_after(self.machine.completed))
            if self._joining:
                self._accept_known()
                self.control.act(self.machine.stopped(self._valid(set(self._known))))
            else:
                self._accept([])
                self._begin(Start(generation=0, completed=0, members=()))
            while not await self._next():
                pass
            if self.rounds:
                self._finishing = True
                await self.rounds.finish(self._on_fault)
        except Exception as error:
            await self.farewell(error)
            raise
        finally:
            for each in watching:
                each.cancel()
            await self._break_off()
            await self._copies.close()
            if self.rounds:
                await self.rounds.close()
            # What was submitted is written; its records come before the end.
            await self._points.close()

    async def _fetch_copies(self) -> None:
        """What this disk lacks and the buddy has of this stage's checkpoints."""
        link = self.config.link
        limits = {"deadline_s": link.connect_timeout_s, "replacement_s": link.replacement_timeout_s}
        if await self._copies.fetch(self._known, **limits):
            self._known = await self._points.on_disk()

    def _accept_known(self) -> None:
        """Raises what is wrong with the checkpoints of this disk, less those of which other lanes have said meanwhile
        that they do not count: they are gone."""
        there = set(self._store.steps())
        self._known = [step for step in self._known if step in there]
        self._accept([self._store.manifest(step) for step in self._known])

    def _accept(self, known: list[Manifest]) -> None:
        if self._corpus and self._accept_corpus:
            self._keep_corpus = self._accept_corpus(self._corpus, known)

    async def farewell(self, error: Exception) -> None:
        """The node ends with this: record it, and tell the other stages, so that they end with it too. Waits for
        `FAREWELL_S` at most; does nothing the second time."""
        await self._farewell.say(error, there=self._neighbours.there(self._links))

    @property
    def _links(self) -> Links:
        """Those of the boundaries in this generation."""
        return {"above": self._node.above, "below": self._node.below} if self._node else {}

    def _wanted(self, effect: Wanted) -> None:
        self._effects.put_nowait(effect)
        if isinstance(effect, ChooseEnd) or (isinstance(effect, EndAfter) and effect.completed <= self._done()):
            self._end_asked.set()
        elif isinstance(effect, End):
            self._copies.give_up()

    async def _next(self) -> bool:
        """Wait for whatever comes first and do it; True when this node may leave."""
        wanted = asyncio.ensure_future(self._effects.get())
        waits: set[asyncio.Future[Any]] = {wanted}
        if self._training:
            waits.add(self._training)
        timeout_s = None if self._training else self.config.link.replacement_timeout_s
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            wanted.cancel()
            if self._deadline.excused(timeout_s or 0.0):
                return False
            if self.machine.phase is not RollbackPhase.RUNNING:
                raise TimeoutError(self._late(timeout_s))
            line = f"this stage has finished; it waited {timeout_s:g} s to hear that the others have, and leaves"
            self._on_fault("timeout", line)
            return True
        if wanted not in done:
            wanted.cancel()
            return await self._trained()
        match wanted.result():
            case Stop():
                began = time.monotonic()
                self._store.floor = self.machine.heartbeats.copied_by_all
                await self._break_off()
                await self._written_out()  # a checkpoint that is being written is not to be looked at
                if not (self._joining or self.machine.generation or self.machine.completed):
                    # A machine that is new to a run which had begun, as it shows now: it has looked at nothing yet.
                    self._known = await self._points.on_disk()
                    await self._fetch_copies()
                    self._accept_known()
                offered = await self._points.offered()
                self._metrics.write(
                    "view_change", generation=self.machine.generation, seconds=round(time.monotonic() - began, 6)
                )
                self.control.act(self.machine.stopped(self._valid(offered)))
            case Start() as start:
                await self._restore(start)
                self._say_end()
                if self.rounds:
                    await self.rounds.go_back(start.generation, start.completed)
                self._begin(start)
                if not self._valid({start.completed}):  # learned since this stage offered it
                    self.control.act(self.machine.start_view_change())
            case ChooseEnd():
                last = self._last_step()
                if self._node:
                    self._node.end_after(last)  # at once, or it could begin another one meanwhile
                self.control.act(self.machine.end_after(last))
            case EndAfter() as end:
                if self.rounds:
                    self.rounds.freeze()
                self._say_end()
                if self._node:
                    self._node.end_after(end.completed)
            case End(failure=failure):
                raise StageFailed(failure, self.machine.identity.name_of(failure.stage))
            case Leave():
                return True
        return False

    def _valid(self, steps: set[int]) -> set[int]:
        """Those whose state is a part of the run, as stage 0 knows, where there are lanes that leave and come back."""
        if not self.rounds:
            return steps
        return {step for step in steps if self.rounds.valid(step) and not self._points.is_void(step)}

    def _done(self) -> int:
        """Steps that are, where no other one can be under way."""
        return self.machine.completed if self._node is None else self._node.under_way

    def _last_step(self) -> int:
        """After how many steps all can end, as the head of the chain knows. Stages further down never begin a step
        before it; lanes of a group may."""
        under_way = self._done()
        return group_ends_after(under_way, self.config.run.steps) if self._grouped and self._node else under_way

    def heartbeat(self) -> Heartbeat:
        """What other lanes are told of this one. Those of a group know of each other what they need to on their
        control streams."""
        if isinstance(self.rounds, GroupRounds):
            return Heartbeat(generation=self.rounds.generation, completed_steps=self.machine.completed)
        return self.machine.heartbeats.of_chain(generation=self.machine.generation, completed=self.machine.completed)

    def _say_end(self) -> None:
        """Say after which step the run stops, if it does, as soon as that can be known: who takes a stage's place does
        not know how many are done before all have said, and stage 0 may be asked to end while it still prepares its
        data."""
        machine = self.machine
        if machine.end is None or machine.phase is not RollbackPhase.RUNNING:
            return
        last = max(machine.end, machine.completed)
        if last != self._said_end:
            self._said_end = last
            print(f"the run stops after {counted(last, 'step')} and can be resumed", flush=True)

    def drain(self) -> bool:
        """End after the step under way, and all others too. False if that cannot be arranged, because who would have
        to know is not there."""
        if self._finishing:
            return True  # there is no step left, and other lanes may need what this one has
        reachable = self.machine.identity.first or self.machine.peers["above"] is not None
        if self.machine.phase is RollbackPhase.FINISHED or not (reachable and self._loop):
            return False
        self.control.act(self.machine.drain())
        return True

    async def _trained(self) -> bool:
        """The generation's training ended by itself: this stage has done all its steps, or has failed."""
        assert self._training
        training, self._training = self._training, None
        training.result()
        if self.config.checkpoint.every and self.stage.completed not in self._points:
            await self._keep(await asyncio.to_thread(self.stage.snapshot))
        await self._written_out()  # a stage says that it has finished only when nothing is left to write
        # Whoever has not been met on the control stream yet is waited for too: it may need to be told of the end.
        self.control.act(self.machine.finished())
        return False

    async def _written_out(self) -> None:
        await self._points.flush(self.config.link.replacement_timeout_s)

    def _late(self, timeout_s: float | None) -> str:
        chained, peers = self.machine.identity, self.machine.peers
        absent: list[Side] = [side for side, peer in peers.items() if peer is None and not chained.ends(side)]
        names = ", ".join(f"{side} ({chained.name_of(chained.beside(side))})" for side in absent) or "nobody"
        return f"waited {timeout_s:g} s for a new generation to be agreed; not connected: {names}"

    # -- a generation -----------------------------------------------------------------------------------------------

    def _begin(self, start: Start) -> None:
        """Train in this generation, in the background."""
        identity = replace(self._identity, generation=start.generation)
        above, below = links_of(
            self.config, self.stage, identity, start.members, tracer=self._tracer, sent=self._neighbours.sent
        )
        self.context = context_of(
            self.config,
            self.stage,
            identity,
            start.members,
            tracer=self._tracer,
            sent=self._sent_to_lanes,
            deadline=self._deadline,
            on_fault=self._on_fault,
            totals=self._totals,
        )
        self._node = TrainingLoop(
            self.config,
            self.stage,
            above=above,
            below=below,
            corpus=self._corpus,
            metrics=self._metrics,
            tracer=self._tracer,
            on_fault=self._on_fault,
            generation=start.generation,
            on_completed=self._completed,
            totals=self._totals,
            deadline=self._deadline,
            last=self.machine.end,
            rounds=self.rounds,
            on_met=self._met,
            context=self.context,
        )
        self.link_above = above
        work = train(self._node, self._dial, last_word_s=self.config.link.greeting_timeout_s)
        self._training = asyncio.create_task(work)

    def _met(self) -> None:
        """The neighbours are there, in this generation, and so agree where this stage goes on. Not before are other
        lanes told of it, or anything of the text written: this may have been started as for a new run by mistake."""
        self.was_met = True
        if keep := self._keep_corpus:
            self._keep_corpus = None
            keep()
        if self.rounds and self.stage.averager:
            self.rounds.begin(self.stage.averager, self.stage.completed, self._points.oldest)

    async def _break_off(self) -> None:
        """Nothing of the generation moves any more, in any thread."""
        if self.rounds:
            self.rounds.broken_off()
        node, self._node = self._node, None
        training, self._training = self._training, None
        self.link_above = self.context = None
        if node is not None:
            await break_off(node, training, self._totals)

    async def _completed(self, compute: Worker, completed: int) -> None:
        """A step is done; `compute` is the thread that may look at the stage."""
        self.machine.completed = completed
        every = self.config.checkpoint.every
        if every and completed % every == 0:
            await self._keep(await compute.run("snapshot", self.stage.snapshot))
        if not every and completed % TIDY_EVERY == 0:
            await asyncio.to_thread(give_back_free_memory)

    async def _keep(self, snapshot: StageSnapshot) -> None:
        self._store.floor = self.machine.heartbeats.copied_by_all
        await self._points.keep(snapshot, generation=self.machine.generation)

    async def _restore(self, start: Start) -> None:
        """Bring the stage to where it was after `start.completed` steps."""
        began = time.monotonic()
        snapshot, where = await self._points.find(start.completed)
        if snapshot is None:
            self.stage = await asyncio.to_thread(self._rebuild)
        else:
            await asyncio.to_thread(self.stage.restore, snapshot)
        self.stage.set_generation(start.generation)
        self._copies.written(start.completed)  # what comes after it is not to be copied any more
        if self.rounds and self.rounds.redone_otherwise:  # the later ones may be of steps that do not count
            await self._points.discard_after(start.completed)
        self._points.forget_after(start.completed)
        self._points.gone_back(start.completed)
        seconds = round(time.monotonic() - began, 6)
        self._metrics.write(
            "rollback", generation=start.generation, completed=start.completed, source=where, seconds=seconds
        )
        print(
            f"generation {start.generation}: goes on after {counted(start.completed, 'step')}, restored from {where}",
            flush=True,
        )

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _written(self, completed: int, size: int, seconds: float) -> None:
        record = partial(self._metrics.write, "checkpoint", completed=completed, bytes=size, seconds=round(seconds, 6))
        self._in_loop(record)
        self.committed = completed
        self._in_loop(partial(self._copies.written, completed))
        if self.rounds and self.stage.averager:
            self._in_loop(partial(self.rounds.forget, self.stage.averager, self._points.oldest))

    def _held_at_buddy(self, completed: int) -> None:
        self.machine.heartbeats.copied = completed

    async def _say_of_copies(self, side: Side, frame: CopyFrame) -> None:
        await self._neighbours.reserve(side, frame, self._links)
        self.control.tell(side, frame)

    def _unwritten(self, line: str) -> None:
        self._in_loop(partial(self._on_fault, "checkpoint", line))

    def _in_loop(self, call: Callable[[], None]) -> None:
        """Records are written by one thread."""
        with suppress(RuntimeError):  # the loop has ended
            assert self._loop
            self._loop.call_soon_threadsafe(call)
