"""Who is next to a node on the chain that goes back together, and over which wire things for it go.

Within a lane these are the stages above and below, and the wires are the links of its boundaries. Where lanes hold
chunks of the same sequences, all nodes are one chain (`protocol.group_chain`), and a neighbour may be the same stage in
another lane: then it is the lateral link's wire. Copies of checkpoints go to neighbours of the chain, in the time that
their wire has left: on a link that nobody else wants, and between two generations, when there are no links, on wires of
the same rate.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

from ..protocol.control_messages import CopyFrame, CopyPart
from ..protocol.greeting import NodeIdentity
from ..protocol.rollback_actions import SIDES, Side
from ..protocol.wire_size import framed_bytes
from ..sim.links.shaper import LinkProfile, Shaper
from .lanes.lateral_link import LateralLink
from .lanes.lateral_links import LateralLinks
from .links.link import Link

Links = dict[Side, Link | None]  # of a generation's boundaries; none between two generations


class ChainNeighbours:
    """Of the node that is `chained` on its chain, and `stage` of its lane. lateral: its links to other lanes, if they
    are one group."""

    def __init__(self, chained: NodeIdentity, stage: int, lateral: LateralLinks | None, profile: LinkProfile) -> None:
        self._chained, self._stage, self._lateral = chained, stage, lateral
        self._shapers: dict[Side, Shaper] = {side: Shaper(profile.applied) for side in SIDES}
        self.sent: dict[Side, Counter[str]] = {side: Counter() for side in SIDES}  # of boundaries' links
        # Of what is sent to each neighbour.
        self.accounts: dict[Side, Counter[str]] = {side: self._account(side) for side in SIDES}

    def there(self, links: Links) -> set[Side]:
        """Those that this node is connected to, where `links` are its present ones."""
        found: set[Side] = set()
        for side in SIDES:
            link, lateral = links.get(side), self._lateral_to(side)
            if lateral.session.greeted if lateral else link and link.session.peer:
                found.add(side)
        return found

    async def reserve(self, side: Side, frame: CopyFrame, links: Links) -> None:
        """Wait until a frame of a copy may leave: a part takes the wire's time first."""
        if not isinstance(frame, CopyPart):
            return
        nbytes = framed_bytes(len(frame.data))
        if lateral := self._lateral_to(side):
            await lateral.outgoing.reserve(nbytes)
            return
        link = links.get(side)
        if not (link and await link.reserve(nbytes)):
            loop = asyncio.get_running_loop()
            passage = self._shapers[side].admit(nbytes, loop.time())
            await asyncio.sleep(max(0.0, passage.depart_s - loop.time()))

    def _lateral_to(self, side: Side) -> LateralLink | None:
        """The link to the neighbour on that side, if it is this stage in another lane."""
        if not (self._lateral and 0 <= self._chained.beside(side) < self._chained.stages):
            return None
        place = self._chained.place_of(self._chained.beside(side))
        return self._lateral.link_to(place.lane) if place.stage == self._stage else None

    def _account(self, side: Side) -> Counter[str]:
        lateral = self._lateral_to(side)
        return cast(Counter[str], lateral.outgoing.sent) if lateral else self.sent[side]
