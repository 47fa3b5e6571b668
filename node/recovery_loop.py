"""One stage over all generations of a run: train, break off, restore, train again, until all stages have finished.

Within a generation nothing is shared with the next one: links, sessions, queues and threads are made anew, and all that
crosses over is the stage's state, restored from a snapshot. So whatever a loss left half done (a message under way, a
partial gradient, an unpacked tensor) is gone with its generation and needs no rule of its own. Why not repair the links
in place: each of those leftovers would be a case, and the order of two cases another one.

Snapshots: after every `checkpoint.every` steps the state is copied (`kept_states`). After 0 steps none
is needed: a stage can be built anew from the run's settings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..protocol.control_messages import Heartbeat
from ..protocol.greeting import NodeIdentity
from ..protocol.group_chain import group_ends_after
from ..protocol.rollback import Rollback, RollbackPhase
from ..protocol.rollback_actions import ChooseEnd, End, EndAfter, Leave, Side, Start, Stop
from ..sim.links.shaper import LinkProfile
from ..sim.reports.wording import counted
from .chain_neighbours import ChainNeighbours
from .checkpoints.manifest import Manifest
from .checkpoints.store import HELD_TIMES, CheckpointStore
from .config import RunConfig
from .data import Corpus
from .free_memory import give_back_free_memory
from .generation import Dial, Generations, context_parts_of
from .kept_states import KeptStates
from .lanes.group_rounds import GroupRounds
from .lanes.held_rounds import HeldRounds
from .lanes.lane_rounds import rounds_over
from .lanes.lateral_links import LateralLinks
from .link_settings import heartbeat_timeout_s, transfer_s
from .links.control_stream import Control, Wanted
from .long_preparation import LongPreparation
from .process_pause import ProcessPause
from .receive_deadline import ReceiveDeadline
from .run_records import MetricsWriter, Tracer
from .stage import Stage
from .stage_failure import Farewell, StageFailed
from .worker_thread import Reporter, Worker

TIDY_EVERY = 100  # steps, where there are no checkpoints


class RecoveryLoop:
    """Stage `stage.index` from its first generation to its last.

    `dial` is as of `Generations`. `rebuild` makes the stage anew, as it is before the first step. `open_corpus`, of
    stage 0, may take hours, in a thread; `on_corpus` is told of the result. `accept_corpus` is given what it opened and
    the manifests of the checkpoints that this node could go on from, raises what is wrong with them, and returns what
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
        self._joining = joining
        self._grouped = bool(config.context.method)  # all lanes are one chain, and this node a position in it
        chained = identity.in_group() if self._grouped else identity
        self.was_met = joining  # whether the stages above and below have been there
        self._rebuild = rebuild
        self._open_corpus, self._on_corpus, self._corpus = open_corpus, on_corpus, None
        self._accept_corpus = accept_corpus
        self._keep_corpus: Callable[[], None] | None = None
        self._metrics, self._on_fault = metrics, on_fault
        self._effects: asyncio.Queue[Wanted] = asyncio.Queue()
        self._end_asked = asyncio.Event()
        self._finishing = False  # all steps are done, here and in all stages
        self._said_end: int | None = None
        self._runs = False
        profile = LinkProfile.parse(config.link.link)
        between = lateral if self._grouped else None
        self._neighbours = ChainNeighbours(chained, identity.stage, between, profile)
        damaged = partial(on_fault, "checkpoint")
        known = store.newest_intact(HELD_TIMES * store.keep, report=damaged) if joining else []
        generation = max((store.manifest(step).generation for step in known), default=0)
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
        self.states = KeptStates(
            config,
            store,
            known,
            machine=self.machine,
            control=self.control,
            neighbours=self._neighbours,
            links=lambda: self.generations.links,
            metrics=metrics,
            on_fault=on_fault,
            on_written=self._forget_rounds if lateral else None,
            paused_ago_s=self.pause.ago_s,
        )
        self.rounds: HeldRounds | None = None
        if lateral:
            assert stage.averager
            self.rounds = self.states.rounds = rounds_over(
                lateral,
                config,
                identity,
                stage.averager,
                machine=self.machine,
                control=self.control,
                points=self.states.points,
                metrics=metrics,
                under_way=self._done,
                committed=lambda: self.states.committed,
                on_changed=lambda: self.generations.node and self.generations.node.look_again(),
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
        self.generations = Generations(
            config,
            identity,
            dial=dial,
            sent=self._neighbours.sent,
            deadline=self._deadline,
            metrics=metrics,
            tracer=tracer,
            on_fault=on_fault,
            on_completed=self._completed,
            on_met=self._met,
        )

    async def run(self) -> None:
        """Returns when every stage has finished."""
        self._runs = True
        self.states.open()
        watching = [asyncio.create_task(each.watch()) for each in (self._preparing, self.pause)]
        try:
            if self._joining:  # first: the tokenizer may come with a copy
                await self.states.fetch()
            if self._open_corpus:
                self._corpus = await self._preparing.run(self._open_corpus, unless=self._end_asked)
                if self._corpus:
                    self._on_corpus(self._corpus)
                else:  # all end, without another step
                    self.control.act(self.machine.end_after(self.machine.completed))
            if self._joining:
                self._accept(self.states.manifests())
                self.control.act(self.machine.stopped(self.states.known()))
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
            try:
                await self._break_off()
            except TimeoutError as error:  # the process ends all the same
                self._on_fault("timeout", str(error))
            if self.rounds:
                await self.rounds.close()
            await self.states.close()

    def _accept(self, known: list[Manifest]) -> None:
        """This node may go on from these. Raises what is wrong with the text, or with checkpoints of it."""
        self.machine.outlived = max([self.machine.outlived, *(each.generation for each in known)])
        if self._corpus and self._accept_corpus:
            self._keep_corpus = self._accept_corpus(self._corpus, known)

    async def farewell(self, error: Exception) -> None:
        """The node ends with this: record it, and tell the other stages, so that they end with it too. Waits for
        `FAREWELL_S` at most; does nothing the second time."""
        await self._farewell.say(error, there=self._neighbours.there(self.generations.links))

    def _wanted(self, effect: Wanted) -> None:
        self._effects.put_nowait(effect)
        if isinstance(effect, ChooseEnd) or (isinstance(effect, EndAfter) and effect.completed <= self._done()):
            self._end_asked.set()
        elif isinstance(effect, End):
            self.states.give_up_fetching()

    async def _next(self) -> bool:
        """Wait for whatever comes first and do it; True when this node may leave."""
        wanted = asyncio.ensure_future(self._effects.get())
        waits: set[asyncio.Future[Any]] = {wanted}
        training = self.generations.training
        if training:
            waits.add(training)
        timeout_s = None if training else self.config.link.replacement_timeout_s
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
                self.states.set_floor()
                await self._break_off()
                await self.states.written_out()  # a checkpoint that is being written is not to be looked at
                if not (self._joining or self.machine.generation or self.machine.completed):
                    # A machine that is new to a run which had begun, as it shows now: it has looked at nothing yet.
                    await self.states.look()
                    self._accept(self.states.manifests())
                offered = await self.states.offered()
                self._metrics.write(
                    "view_change", generation=self.machine.generation, seconds=round(time.monotonic() - began, 6)
                )
                self.control.act(self.machine.stopped(offered))
            case Start() as start:
                self.stage = await self.states.restore(self.stage, start, self._rebuild)
                self._say_end()
                if self.rounds:
                    await self.rounds.go_back(start.generation, start.completed)
                self._begin(start)
                if not self.states.valid({start.completed}):  # learned since this stage offered it
                    self.control.act(self.machine.start_view_change())
            case ChooseEnd():
                last = self._last_step()
                if node := self.generations.node:
                    node.end_after(last)  # at once, or it could begin another one meanwhile
                self.control.act(self.machine.end_after(last))
            case EndAfter() as end:
                if self.rounds:
                    self.rounds.freeze()
                self._say_end()
                if node := self.generations.node:
                    node.end_after(end.completed)
            case End(failure=failure):
                raise StageFailed(failure, self.machine.identity.name_of(failure.stage))
            case Leave():
                return True
        return False

    def _done(self) -> int:
        """Steps that are, where no other one can be under way."""
        node = self.generations.node
        return node.under_way if node else self.machine.completed

    def _last_step(self) -> int:
        """After how many steps all can end, as the head of the chain knows. Stages further down never begin a step
        before it; lanes of a group may."""
        under_way = self._done()
        return (
            group_ends_after(under_way, self.config.run.steps) if self._grouped and self.generations.node else under_way
        )

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
        if self.machine.phase is RollbackPhase.FINISHED or not (reachable and self._runs):
            return False
        self.control.act(self.machine.drain())
        return True

    async def _trained(self) -> bool:
        """The generation's training ended by itself: this stage has done all its steps, or has failed."""
        self.generations.ended()
        if self.config.checkpoint.every and self.stage.completed not in self.states.points:
            await self.states.keep(await asyncio.to_thread(self.stage.snapshot))
        await self.states.written_out()  # a stage says that it has finished only when nothing is left to write
        # Whoever has not been met on the control stream yet is waited for too: it may need to be told of the end.
        self.control.act(self.machine.finished())
        return False

    def _late(self, timeout_s: float | None) -> str:
        chained, peers = self.machine.identity, self.machine.peers
        absent: list[Side] = [side for side, peer in peers.items() if peer is None and not chained.ends(side)]
        names = ", ".join(f"{side} ({chained.name_of(chained.beside(side))})" for side in absent) or "nobody"
        return f"waited {timeout_s:g} s for a new generation to be agreed; not connected: {names}"

    def _met(self) -> None:
        """The neighbours are there, in this generation, and so agree where this stage goes on. Not before are other
        lanes told of it, or anything of the text written: this may have been started as for a new run by mistake."""
        self.was_met = True
        if keep := self._keep_corpus:
            self._keep_corpus = None
            keep()
        if self.rounds and self.stage.averager:
            self.rounds.begin(self.stage.averager, self.stage.completed, self.states.points.oldest)

    def _begin(self, start: Start) -> None:
        """Train in this generation, in the background."""
        self.generations.begin(self.stage, start, last=self.machine.end, corpus=self._corpus, rounds=self.rounds)

    def _forget_rounds(self, oldest: int) -> None:
        if self.rounds and self.stage.averager:
            self.rounds.forget(self.stage.averager, oldest)

    async def _break_off(self) -> None:
        """Nothing of the generation moves any more, in any thread."""
        if self.rounds:
            self.rounds.broken_off()
        await self.generations.break_off()

    async def _completed(self, compute: Worker, completed: int) -> None:
        """A step is done; `compute` is the thread that may look at the stage."""
        self.machine.completed = completed
        every = self.config.checkpoint.every
        # The last one at once: what is left to do then is to part, which may take long where a neighbour is lost.
        if every and (completed % every == 0 or completed == self.config.run.steps):
            await self.states.keep(await compute.run("snapshot", self.stage.snapshot))
        if not every and completed % TIDY_EVERY == 0:
            await asyncio.to_thread(give_back_free_memory)
