"""The rounds of one stage while its lane trains: made, given to the other lanes, waited for, used, recorded.

The training loop calls `hold` at the two moments of a step at which a round may be due; everything else about other
lanes is here and in the links. A round is used when its members are decided (lane_membership.py), which may wait for a
lane that recovers from a loss of its own. Meanwhile this stage's neighbours are told that it is held up, as they are
while stage 0 prepares its data, so that no deadline of theirs passes.

A lane that was left out does no steps but uses the others' rounds (`catch_up`), from the step to which it was set back
up to the one after which it is admitted again.

After a rollback the steps are done again, and with them the rounds: own contributions come out with the same bits, and
those of the others are here still, or are asked for again. So nothing that a checkpoint may go back to is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ..averaging.averager import Averager
from ..averaging.round_plan import Round
from ..run_records import Lap, MetricsWriter, Stopwatch
from ..stage import Stage
from ..worker_thread import Reporter, Worker
from .lane_membership import LaneMembership
from .lateral_link import LateralLink
from .lateral_links import LateralLinks
from .state_copies import StateCopies

Holding = Callable[[Callable[[], str]], AbstractContextManager[object]]
Norm = Callable[[int], Awaitable[float | None]]


class Rounds:
    """held_up: while it is entered, the stage's neighbours know that it waits for something outside of the lane; what
    that is, it may ask for."""

    def __init__(
        self,
        links: LateralLinks,
        membership: LaneMembership,
        states: StateCopies,
        metrics: MetricsWriter,
        *,
        held_up: Holding,
    ) -> None:
        self._links, self.membership, self.states = links, membership, states
        self._metrics, self._held_up = metrics, held_up
        self._counted: dict[int, int] = {}  # by lane: bytes up to the last step

    def begin(self, averager: Averager, completed: int, oldest: int) -> None:
        """A generation begins after `completed` steps; a rollback may lead to `oldest`. What was contributed to rounds
        under way is given again: it may have been lost with a disk."""
        self.membership.train()
        self._links.has_made(averager.plan.made_by(completed))
        self.forget(averager, min(oldest, completed))
        for round_, contribution in averager.under_way(completed).items():
            self._links.publish(round_.number, contribution)

    def forget(self, averager: Averager, oldest: int) -> None:
        """No rollback will lead further back than to after `oldest` steps."""
        self._links.forget_before(averager.plan.first_after(oldest))

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

    def follows(self, completed: int) -> bool:
        """Whether this lane goes on from here with `catch_up`."""
        return self.membership.follows(completed)

    async def catch_up(self, stage: Stage, compute: Worker, watch: Stopwatch, norm: Norm) -> None:
        """Use the rounds of the others, until this lane is admitted, or the run is over. norm: by the sum of which
        squares the gradients of a step are clipped."""
        averager, membership, copied = stage.averager, self.membership, stage.completed
        assert averager
        if stage.first:  # how the run came out depends on it, and only who comes back in time is in the log
            self._metrics.write("follows", completed=copied)
        membership.follow(copied)
        with self._held_up(membership.waits_for):
            while (entry := membership.part.entry(copied)) is None or stage.completed < entry.begins:
                if stage.completed == averager.plan.steps or membership.is_ending:
                    break
                if self._may_follow(averager, copied, stage.completed + 1, entry is not None):
                    await self._follow(stage, averager, compute, watch, norm)
                else:
                    with watch.waiting():
                        await membership.changed()
            # Steps that were passed over are not trained: the others would make it again otherwise.
            assert entry is None or stage.completed <= entry.begins or membership.is_ending
            await compute.run("enter", stage.enter, stage.completed)
            if entry and stage.completed == entry.begins:
                membership.entered(entry)
                while not (
                    membership.below_entered(entry) or membership.is_ending
                ):  # or it would forget what comes of the next step
                    await membership.changed()
        membership.train()

    def _may_follow(self, averager: Averager, copied: int, completed: int, admitted: bool) -> bool:
        """Whether nothing can be decided any more of which that step would have to know."""
        if self.membership.is_stuck(completed - 1):
            return False
        numbers = [each.number for each in averager.plan.used_at(completed)]
        if any(number < self._links.forgot for number in numbers):
            return False
        return self.membership.part.may_follow(copied, completed, numbers, admitted=admitted)

    async def _follow(self, stage: Stage, averager: Averager, compute: Worker, watch: Stopwatch, norm: Norm) -> None:
        """One step, by the rounds that are used in it."""
        step = stage.completed
        if averager.mode.of_gradients:
            await compute.run("make room", stage.make_room, step)
        for round_ in averager.plan.used_at(step + 1):
            await self._use(averager, round_, step + 1, compute, watch, following=True)
        if averager.mode.of_gradients:
            await compute.run("optimizer step", stage.finish, step, await norm(step))
        else:
            stage.follow_to(step + 1)

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
        lane, membership, lap = averager.place.lane, self.membership, Lap()
        with watch.waiting(), self._held_up(membership.waits_for):
            members = await membership.members_of(round_.number)
            if not following and lane not in members and not membership.part.entered_before(round_.number, completed):
                await asyncio.get_running_loop().create_future()  # this lane has to go back, and is told so
            others = await self._links.contributions(round_.number, members)
        waited_s = lap.seconds
        use = partial(averager.use, round_, others, member=lane in members)
        said = await compute.run(f"average {round_.number}", use)
        record = {**said.record(), "waited_s": round(waited_s, 6)}
        self._metrics.write("round", stage=averager.place.stage, **record)

    async def finish(self, on_fault: Reporter) -> None:
        """This lane is through: wait until no other one needs anything of this stage. That one of them is gone is no
        fault here, and is only said."""
        try:
            membership = self.membership
            await self._links.finish(membership.log.members, membership.there, membership.deadline_s)
        except TimeoutError as error:
            on_fault("timeout", str(error))

    # -- records ------------------------------------------------------------------------------------------------

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
