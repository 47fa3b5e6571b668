"""What one generation of a stage is made of, apart from its training loop: links, the calls of those, an end.

A generation is a stretch of the run in which each stage is one fixed process. All that is here lives no longer than
that; what does is in `node.recovery_loop`, which decides when one begins and when it is broken off.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from ..protocol.greeting import NodeIdentity
from ..protocol.grid_place import GridPlace
from ..protocol.group_chain import GroupChain
from ..protocol.rollback_actions import Side
from .boundary.endpoints import BoundaryShape
from .config import RunConfig
from .context.context_links import context_links, parts_of
from .context.context_parts import ContextParts
from .context.link_transport import LinkTransport
from .link_settings import make_link
from .links.link import Link
from .receive_deadline import ReceiveDeadline
from .run_records import Tracer
from .run_totals import RunTotals
from .stage import Stage
from .training_loop import TrainingLoop
from .worker_thread import Reporter

Dial = Callable[[Link], Coroutine[Any, Any, None]]


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


async def train(node: TrainingLoop, dial: Dial | None, *, last_word_s: float) -> None:
    """Run the loop, and beside it the calls to the stage below and to lower lanes, for which there is time to end after
    the goodbyes."""
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


async def break_off(node: TrainingLoop, training: asyncio.Task[None] | None, totals: RunTotals) -> None:
    """Nothing of it moves any more, in any thread."""
    for link in node.links:
        link.abandon()
        totals.close(link)
    if training:
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
    node.close()
    await asyncio.to_thread(node.join)
    totals.watch.take()
