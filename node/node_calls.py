"""Whom a node calls: where the others are, how long it tries, and which calls go on beside its work.

Of two neighbours one dials and the other listens (docs/protocol.md). Where they are is in the addresses that the node
was given, or, if it finds the others by the DHT, what the membership says at each try: a replacement is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from ..protocol.grid_place import GridPlace
from ..protocol.rollback_actions import SIDES, Side
from .links.control_stream import Control
from .links.dialling import Where, dial, dial_control
from .links.link import Link
from .node_ending import while_calling
from .node_options import NodeSetup
from .recovery_loop import RecoveryLoop


class NodeCalls:
    """Of the node that `setup` describes. `recovery_loop` is asked for when a call is made: it is not there yet
    when this is."""

    def __init__(self, setup: NodeSetup, recovery_loop: Callable[[], RecoveryLoop]) -> None:
        self._config, self._index, self._lane = setup.config, setup.stage, setup.options.lane
        self._addresses, self._membership = setup.addresses, setup.options.membership
        self._on_fault, self._recovery_loop = setup.on_fault, recovery_loop
        self._waits: dict[str, Any] = {
            "greeting_timeout_s": setup.config.link.greeting_timeout_s,
            "report": setup.on_fault,
            "security": setup.options.security,
            "paused_ago_s": lambda: recovery_loop().pause.ago_s(),
        }

    def laterals(self) -> Mapping[int, str | Where]:
        """Where the own stage is, by lower lane."""
        if self._membership is None:
            return self._addresses.lateral
        places = {lane: GridPlace(self._index, lane) for lane in range(self._lane)}
        return {lane: self._membership.where(place, self._on_fault) for lane, place in places.items()}

    def dial_link(self, link: Link) -> Coroutine[Any, Any, None]:
        """To the stage below, or to the own one in a lower lane; of a later generation one may be lost anew."""
        if not link.of_context:
            there = self._where(GridPlace(self._index + 1, self._lane))
            return dial(there, link, deadline_s=self._deadline_s, **self._waits)
        limits = self._config.link
        timeout_s = limits.connect_timeout_s
        if link.session.identity.generation:
            timeout_s = max(timeout_s, limits.replacement_timeout_s)
        return dial(self.laterals()[link.session.place.lane], link, deadline_s=lambda: timeout_s, **self._waits)

    def beside(self, work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """`work`, and as long as it lasts the control streams to the neighbours that this node dials."""
        loop, timeout_s = self._recovery_loop(), self._config.link.greeting_timeout_s
        control, chained = loop.control, loop.machine.identity
        for side in SIDES:
            if chained.dials(side):
                there = self._where(chained.place_of(chained.beside(side)))
                due_s = partial(self._deadline_s, side)
                calling = dial_control(there, control, side=side, deadline_s=due_s, **self._waits)
                work = while_calling(work, calling, partial(_farewell_s, control, side, timeout_s))
        return work

    def _where(self, place: GridPlace) -> str | Where:
        if self._membership:
            return self._membership.where(place, self._on_fault)
        addresses = self._addresses
        return (addresses.next if place.stage != self._index else addresses.lateral.get(place.lane)) or ""

    def _deadline_s(self, side: Side | None = None) -> float:
        """For the neighbour on that side of the chain (None: for the stage below): one that was there may have been
        lost, and somebody has to start it again."""
        loop, link = self._recovery_loop(), self._config.link
        was_there = loop.was_met if self._config.context.method and side is None else False
        was_there = was_there or loop.control.met[side or "below"].is_set()
        return max(link.connect_timeout_s, link.replacement_timeout_s) if was_there else link.connect_timeout_s


def _farewell_s(control: Control, side: Side, timeout_s: float) -> float:
    """For how long the call to that neighbour may go on when this node is through."""
    return timeout_s if control.said_last_word(side) else 0
