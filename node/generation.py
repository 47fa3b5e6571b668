"""What one generation of a stage is made of, apart from its training loop: links, the call to the stage below, an end.

A generation is a stretch of the run in which each stage is one fixed process. All that is here lives no longer than
that; what does is in `node.recovery_loop`, which decides when one begins and when it is broken off.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from ..protocol.control_messages import CopyFrame, CopyPart
from ..protocol.greeting import NodeIdentity
from ..protocol.grid_place import GridPlace
from ..protocol.group_chain import GroupChain
from ..protocol.rollback_actions import Side
from ..protocol.wire_size import framed_bytes
from ..sim.links.shaper import LinkProfile, Shaper
from .boundary.endpoints import BoundaryShape
from .config import RunConfig
from .link_settings import make_link
from .links.link import Link
from .run_records import Tracer
from .run_totals import RunTotals
from .stage import Stage
from .training_loop import TrainingLoop

Dial = Callable[[Link], Coroutine[Any, Any, None]]


def links_of(
    config: RunConfig,
    stage: Stage,
    identity: NodeIdentity,
    members: Sequence[int],
    *,
    tracer: Tracer,
    sent: Mapping[Side, Counter[str]],
    grouped: bool = False,
) -> tuple[Link | None, Link | None]:
    """To the stages above and below, where there are any, in the generation of `identity`. members: the only process
    that may serve each stage, or where lanes are one group (`grouped`) each position of its chain; none: any may. sent:
    the accounts to go on with."""
    chain = GroupChain(identity.stages, identity.lanes)

    def link(side: Side, shape: BoundaryShape) -> Link:
        peer = identity.beside(side)
        at = chain.position(GridPlace(peer, identity.lane)) if grouped else peer
        member = members[at] if members else None
        return make_link(config, identity, peer, shape, tracer, member=member, sent=sent[side])

    above = link("above", stage.upstream_endpoint.shape) if stage.upstream_endpoint else None
    below = link("below", stage.downstream_endpoint.shape) if stage.downstream_endpoint else None
    return above, below


async def train(node: TrainingLoop, dial: Dial | None, *, last_word_s: float) -> None:
    """Run the loop, and the call to the stage below beside it, for which there is time to end after the goodbyes."""
    if node.below is None:
        return await node.run()
    assert dial
    async with asyncio.TaskGroup() as group:
        call = group.create_task(dial(node.below))
        await group.create_task(node.run())
        await asyncio.wait([call], timeout=last_word_s)
        call.cancel()
    return None


async def break_off(node: TrainingLoop, training: asyncio.Task[None] | None, totals: RunTotals) -> None:
    """Nothing of it moves any more, in any thread."""
    for link in (node.above, node.below):
        if link:
            link.abandon()
            totals.close(link)
    if training:
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
    node.close()
    await asyncio.to_thread(node.join)
    totals.watch.take()


class IdleWires:
    """Where copies of checkpoints find the wire's time: on a link that nobody else wants, and between two generations,
    when there are no links, on wires of the same rate."""

    def __init__(self, profile: LinkProfile) -> None:
        self._shapers: dict[Side, Shaper] = {"above": Shaper(profile.applied), "below": Shaper(profile.applied)}

    async def reserve(self, side: Side, frame: CopyFrame, link: Link | None) -> None:
        """Wait until the frame may leave: a part takes the wire's time first."""
        if not isinstance(frame, CopyPart):
            return
        nbytes = framed_bytes(len(frame.data))
        if not (link and await link.reserve(nbytes)):
            loop = asyncio.get_running_loop()
            passage = self._shapers[side].admit(nbytes, loop.time())
            await asyncio.sleep(max(0.0, passage.depart_s - loop.time()))
