"""Rounds of lanes that are one group, since they hold chunks of the same sequences: all lanes take part in all rounds.

Such lanes need each other in every layer, so none is ever left out of a round, none follows the others, and none takes
up the state of another one: there is nothing to decide. A loss is a loss for all. The whole group goes back to one step
together (`protocol.group_chain`), does it again, and makes the same contributions again. So a contribution is needed in
one generation only, and no longer than until the step that uses it; none outlives a process.

Why not `LaneMembership` with a deadline that never comes: stages of a lane would still tell each other how many
contributions they hold, along a chain that here is another one, and each round would wait for that to come together.
"""

from __future__ import annotations

import asyncio

from ..averaging.averager import Averager
from ..averaging.round_plan import Round
from ..run_records import MetricsWriter, Stopwatch
from ..worker_thread import Reporter, Worker
from .held_rounds import HeldRounds, Holding
from .lateral_links import LateralLinks

END_S = 10.0  # all are through when one is; whether the last words arrived is of no use to anybody


class GroupRounds(HeldRounds):
    """Of one node in a group of so many lanes."""

    redone_otherwise = False

    def __init__(self, links: LateralLinks, lanes: int, metrics: MetricsWriter, *, held_up: Holding) -> None:
        super().__init__(links, metrics, held_up=held_up)
        self._lanes = tuple(range(lanes))
        self.generation = 0

    async def go_back(self, generation: int, completed: int) -> None:
        del completed
        self.generation = generation  # first: or a connection that begins meanwhile would be of the last one
        await self._links.begin_anew()

    def begin(self, averager: Averager, completed: int, oldest: int) -> None:
        del oldest
        self._links.has_made(averager.plan.made_by(completed))
        self._forget_before(averager, completed)
        for round_, contribution in averager.under_way(completed).items():  # made, and used by a later step
            self._links.publish(round_.number, contribution)

    async def hold(self, averager: Averager, completed: int, compute: Worker, watch: Stopwatch) -> None:
        await super().hold(averager, completed, compute, watch)
        self._forget_before(averager, completed)

    def _forget_before(self, averager: Averager, completed: int) -> None:
        self._links.forget_before(averager.plan.first_after(completed), lasting=False)

    def _waits_for(self) -> str:
        return self._links.waits_for()

    async def _members(self, averager: Averager, round_: Round, completed: int, *, following: bool) -> tuple[int, ...]:
        del averager, round_, completed, following
        return self._lanes

    async def finish(self, on_fault: Reporter) -> None:
        try:
            async with asyncio.timeout(END_S):
                await self._links.finish()
        except TimeoutError as error:
            if str(error):
                on_fault("timeout", str(error))
