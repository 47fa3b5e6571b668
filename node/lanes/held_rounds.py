"""Rounds between lanes as the training loop of one stage knows them: made, given away, waited for, used, recorded.

The training loop calls `hold` at the two moments of a step at which a round may be due; everything else about other
lanes is in the links and in what decides on members. There are two kinds: of lanes that may be left out and come back
(rounds.py), and of lanes that are one group (group_rounds.py). While a stage waits in a round, its neighbours are told
that it is held up, as they are while stage 0 prepares its data, so that no deadline of theirs passes.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ...protocol.control_messages import CopyFrame
from ...protocol.lane_status import LaneStatus
from ..averaging.averager import Averager
from ..averaging.round_plan import Round
from ..run_records import Lap, MetricsWriter, Stopwatch
from ..stage import Stage
from ..worker_thread import Reporter, Worker
from .lateral_link import LateralLink
from .lateral_links import LateralLinks

Holding = Callable[[Callable[[], str]], AbstractContextManager[object]]
Norm = Callable[[int], Awaitable[float | None]]


class RoundEvents:
    """What rounds are told of their lane and of the others. Nothing follows from it, where no class says otherwise."""

    async def go_back(self, generation: int, completed: int) -> None:
        """A generation is about to begin after so many steps."""

    def forget(self, averager: Averager, oldest: int) -> None:
        """No rollback will lead further back than to after `oldest` steps."""

    def broken_off(self) -> None:
        """The generation's training is."""

    def valid(self, completed: int) -> bool:
        """Whether what this lane had after so many steps is a part of the run, as far as this node decides on that."""
        del completed
        return True

    def freeze(self) -> None:
        """This lane is to end."""

    async def run(self) -> None:
        """What goes on beside training; never returns."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing is sent or written any more."""

    def held(self) -> None:
        """What this node holds of contributions has changed."""

    def status(self) -> LaneStatus | None:
        """What is said of this lane to others, by the node that speaks for it; None: nothing."""
        return None

    def met(self, lane: int) -> None:
        """That lane is connected."""

    def told(self, lane: int, status: LaneStatus | None) -> None:
        """What it says of itself; None: it is not connected any more."""

    def copy_frame(self, lane: int, frame: CopyFrame) -> None:
        """What it says on a copy of a state."""

    def ended(self, lane: int) -> None:
        """It needs nothing more."""


class HeldRounds(RoundEvents, ABC):
    """held_up: while it is entered, the stage's neighbours know that it waits for something outside of the lane; what
    that is, it may ask for."""

    redone_otherwise: bool  # whether steps that are done again may come out in other bits

    def __init__(self, links: LateralLinks, metrics: MetricsWriter, *, held_up: Holding) -> None:
        self._links, self._metrics, self._held_up = links, metrics, held_up
        self._counted: dict[int, int] = {}  # by lane: bytes up to the last step

    # -- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, averager: Averager, completed: int, oldest: int) -> None:
        """A generation begins after `completed` steps; a rollback may lead to `oldest`."""

    @abstractmethod
    async def finish(self, on_fault: Reporter) -> None:
        """This lane is through: wait until no other one needs anything of this stage."""

    def follows(self, completed: int) -> bool:
        """Whether this lane goes on from here with `catch_up`."""
        del completed
        return False

    async def catch_up(self, stage: Stage, compute: Worker, watch: Stopwatch, norm: Norm) -> None:
        """Where it follows: use the rounds of the others, until this lane is admitted. norm: by the sum of which
        squares the gradients of a step are clipped."""

    async def hold(self, averager: Averager, completed: int, compute: Worker, watch: Stopwatch) -> None:
        """All that is due once `completed` steps are, or with gradients the step under way. Waits until the members of
        a round are decided. Raises TimeoutError where a member shows no life whose contribution is not here, RoundError
        for a contribution that is none."""
        used = averager.plan.used_at(completed)
        for round_ in used:
            if round_.made < completed:
                await self._use(averager, round_, completed, compute, watch)
        for round_ in averager.plan.made_at(completed):
            contribution = await compute.run(f"contribute {round_.number}", averager.contribute, round_)
            self._links.publish(round_.number, contribution)
        for round_ in used:
            if round_.made == completed:
                await self._use(averager, round_, completed, compute, watch)

    @abstractmethod
    def _waits_for(self) -> str:
        """For whom a round waits, for people."""

    @abstractmethod
    async def _members(self, averager: Averager, round_: Round, completed: int, *, following: bool) -> tuple[int, ...]:
        """Of the round, as soon as they are decided."""

    async def _use(
        self,
        averager: Averager,
        round_: Round,
        completed: int,
        compute: Worker,
        watch: Stopwatch,
        *,
        following: bool = False,
    ) -> None:
        lap = Lap()
        with watch.waiting(), self._held_up(self._waits_for):
            members = await self._members(averager, round_, completed, following=following)
            others = await self._links.contributions(round_.number, members)
        waited_s = lap.seconds
        use = partial(averager.use, round_, others, member=averager.place.lane in members)
        said = await compute.run(f"average {round_.number}", use)
        record = {**said.record(), "waited_s": round(waited_s, 6)}
        self._metrics.write("round", stage=averager.place.stage, **record)

    # -- records ------------------------------------------------------------------------------------------------------

    def sent_bytes(self) -> dict[str, dict[str, int]]:
        """By lateral link and kind, since this process began."""
        return {link.name: {str(kind): count for kind, count in link.outgoing.sent.items()} for link in self._all}

    def step_records(self, seconds: float) -> list[dict[str, Any]]:
        """What each lateral link has done at the end of a step that took `seconds`."""
        records = []
        for link in self._all:
            now = sum(link.outgoing.sent.values())
            before, self._counted[link.lane] = self._counted.get(link.lane, 0), now
            record = self._record(link)
            records.append({**record, "used_bits_per_s": round((now - before) * 8 / seconds)})
        return records

    def records(self) -> list[dict[str, Any]]:
        """The same at the end of the run."""
        return [
            {
                **self._record(link),
                "link": str(link.profile),
                "busy_s": round(link.outgoing.meter.busy_s, 6),
                "utilisation": None,
                "sent_bytes": dict(link.outgoing.sent),
            }
            for link in self._all
        ]

    @property
    def _all(self) -> list[LateralLink]:
        return self._links.links

    def _record(self, link: LateralLink) -> dict[str, Any]:
        rate = link.outgoing.meter.rate_bits_per_s()
        return {
            "peer_lane": link.lane,
            "configured_bits_per_s": link.profile.rate_bits_per_s,
            "measured_bits_per_s": rate and round(rate),
            "received_bytes": sum(link.received_bytes.values()),
        }
