"""Generations of one stage: what one is made of, how it begins, how it is broken off.

A generation is a stretch of the run in which each stage is one fixed process. Its links, its training loop and that
loop's threads are made anew for each and live no longer; what does is in `node.recovery_loop`, which decides when one
begins and when it is broken off.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..protocol.greeting import NodeIdentity
from ..protocol.grid_place import GridPlace
from ..protocol.group_chain import GroupChain
from ..protocol.rollback_actions import Side, Start
from .boundary.endpoints import BoundaryShape
from .chain_neighbours import Links
from .config import RunConfig
from .context.context_links import context_links, parts_of
from .context.context_parts import ContextParts
from .context.link_transport import LinkTransport
from .data import Corpus
from .lanes.held_rounds import HeldRounds
from .link_settings import make_link
from .links.link import Link
from .receive_deadline import ReceiveDeadline
from .run_records import MetricsWriter, Tracer
from .run_totals import RunTotals
from .stage import Stage
from .training_loop import TrainingLoop
from .worker_thread import Reporter, Worker

Dial = Callable[[Link], Coroutine[Any, Any, None]]


class Generations:
    """Those of one stage, one after the other; between two of them there is none.

    identity: this node's, of whatever generation. dial: keeps a link to the stage below, or to a lower lane, connected;
    `link_above` and the links of `context` are what a listener serves. sent: the accounts that links to neighbours go
    on with. on_completed, on_met: as of `TrainingLoop`.
    """

    def __init__(
        self,
        config: RunConfig,
        identity: NodeIdentity,
        *,
        dial: Dial | None,
        sent: Mapping[Side, Counter[str]],
        deadline: ReceiveDeadline,
        metrics: MetricsWriter,
        tracer: Tracer,
        on_fault: Reporter,
        on_completed: Callable[[Worker, int], Awaitable[None]],
        on_met: Callable[[], None],
    ) -> None:
        self.node: TrainingLoop | None = None
        self.training: asyncio.Task[None] | None = None
        self.link_above: Link | None = None
        self.context: LinkTransport | None = None
        self._config, self._identity, self._dial, self._sent = config, identity, dial, sent
        self._sent_to_lanes: defaultdict[int, Counter[str]] = defaultdict(Counter)  # keys and values
        self._deadline, self._metrics, self._tracer, self._on_fault = deadline, metrics, tracer, on_fault
        self._on_completed, self._on_met = on_completed, on_met
        self._totals = RunTotals()

    @property
    def links(self) -> Links:
        """Those of the boundaries in this generation."""
        return {"above": self.node.above, "below": self.node.below} if self.node else {}

    def begin(
        self, stage: Stage, start: Start, *, last: int | None, corpus: Corpus | None, rounds: HeldRounds | None
    ) -> None:
        """Train in this generation, in the background, until `last` steps are completed (None: all)."""
        config, tracer = self._config, self._tracer
        identity = replace(self._identity, generation=start.generation)
        above, below = links_of(config, stage, identity, start.members, tracer=tracer, sent=self._sent)
        self.context = context_of(
            config,
            stage,
            identity,
            start.members,
            tracer=tracer,
            sent=self._sent_to_lanes,
            deadline=self._deadline,
            on_fault=self._on_fault,
            totals=self._totals,
        )
        self.node = TrainingLoop(
            config,
            stage,
            above=above,
            below=below,
            corpus=corpus,
            metrics=self._metrics,
            tracer=tracer,
            on_fault=self._on_fault,
            generation=start.generation,
            on_completed=self._on_completed,
            totals=self._totals,
            deadline=self._deadline,
            last=last,
            rounds=rounds,
            on_met=self._on_met,
            context=self.context,
        )
        self.link_above = above
        work = _train(self.node, self._dial, last_word_s=config.link.replacement_timeout_s)
        self.training = asyncio.create_task(work)

    def ended(self) -> None:
        """The training ended by itself. Raises what it ended with."""
        assert self.training
        training, self.training = self.training, None
        training.result()

    async def break_off(self) -> None:
        """Nothing of the generation moves any more, in any thread. Raises TimeoutError for a job that does not end in
        the time that others would wait for what it makes."""
        node, self.node = self.node, None
        training, self.training = self.training, None
        self.link_above = self.context = None
        if node is None:
            return
        for link in node.links:
            link.abandon()
            self._totals.close(link)
        if training:
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
        node.close()
        await asyncio.to_thread(node.join, self._deadline.timeout_s)
        self._totals.watch.take()


def links_of(
    config: RunConfig,
    stage: Stage,
    identity: NodeIdentity,
    members: Sequence[int],
    *,
    tracer: Tracer,
    sent: Mapping[Side, Counter[str]],
) -> tuple[Link | None, Link | None]:
    """To the stages above and below, where there are any, in the generation of `identity`. members: the only process
    that may serve each stage, or where lanes hold chunks each position of the chain of all; none: any may. sent: the
    accounts to go on with."""
    chain = GroupChain(identity.stages, identity.lanes)

    def link(side: Side, shape: BoundaryShape) -> Link:
        peer = identity.beside(side)
        at = chain.position(GridPlace(peer, identity.lane)) if config.context.method else peer
        member = members[at] if members else None
        return make_link(config, identity, peer, shape, tracer, member=member, sent=sent[side])

    above = link("above", stage.upstream_endpoint.shape) if stage.upstream_endpoint else None
    below = link("below", stage.downstream_endpoint.shape) if stage.downstream_endpoint else None
    return above, below


def context_parts_of(config: RunConfig, stage: Stage) -> ContextParts | None:
    """What the stage exchanges with its own in other lanes; None: nothing."""
    if not (stage.chunk and stage.layers):  # a cut may leave a stage none
        return None
    return parts_of(config, stage.lane, stage.layers, stage.chunk.body_bytes, stage.chunk.gathering_step)


def context_of(
    config: RunConfig,
    stage: Stage,
    identity: NodeIdentity,
    members: Sequence[int],
    *,
    tracer: Tracer,
    sent: Mapping[int, Counter[str]],
    deadline: ReceiveDeadline,
    on_fault: Reporter,
    totals: RunTotals,
) -> LinkTransport | None:
    """What moves keys and values to and from the own stage in other lanes; None: it keeps them for itself. members and
    the rest as above. Must be called in the event loop."""
    parts = context_parts_of(config, stage)
    if not parts:
        return None
    chain = GroupChain(identity.stages, identity.lanes)
    at = {lane: chain.position(GridPlace(identity.stage, lane)) for lane in range(identity.lanes)}
    beside = {lane: members[position] for lane, position in at.items()} if members else {}
    return LinkTransport(
        context_links(config, identity, parts, beside, tracer=tracer, sent=sent),
        parts,
        completed=stage.completed,
        send_buffer_bytes=config.link.send_buffer_bytes,
        deadline=deadline,
        on_fault=on_fault,
        watch=totals.watch,
    )


async def _train(node: TrainingLoop, dial: Dial | None, *, last_word_s: float) -> None:
    """Run the loop, and beside it the calls to the stage below and to lower lanes. They may go on after it, for as long
    as who has not heard our goodbye waits for it."""
    called = [link for link in node.links if link.dials]
    if not called:
        return await node.run()
    assert dial
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(dial(link)) for link in called]
        await group.create_task(node.run())
        await asyncio.wait(calls, timeout=last_word_s)
        for call in calls:
            call.cancel()
    return None
