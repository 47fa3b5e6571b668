"""The rounds of one stage whose lane may be left out and come back (held_rounds.py has what all rounds have in common).

A round is used when its members are decided (lane_membership.py), which may wait for a lane that recovers from a loss
of its own.

A lane that was left out does no steps but uses the others' rounds (`catch_up`), from the step to which it was set back
up to the one after which it is admitted again.

After a rollback the steps are done again, and with them the rounds: own contributions come out with the same bits, and
those of the others are here still, or are asked for again. So nothing that a checkpoint may go back to is forgotten.
"""

from __future__ import annotations

import asyncio

from ...protocol.control_messages import CopyFrame
from ...protocol.lane_status import LaneStatus
from ..averaging.averager import Averager
from ..averaging.round_plan import Round
from ..run_records import MetricsWriter, Stopwatch
from ..stage import Stage
from ..worker_thread import Reporter, Worker
from .held_rounds import HeldRounds, Holding, Norm
from .lane_membership import LaneMembership
from .lateral_links import LateralLinks
from .state_copies import StateCopies


class Rounds(HeldRounds):
    """states: of this stage, for lanes that take one up."""

    redone_otherwise = True  # other lanes may have been left out meanwhile

    def __init__(
        self,
        links: LateralLinks,
        membership: LaneMembership,
        states: StateCopies,
        metrics: MetricsWriter,
        *,
        held_up: Holding,
    ) -> None:
        super().__init__(links, metrics, held_up=held_up)
        self.membership, self.states = membership, states

    async def go_back(self, generation: int, completed: int) -> None:
        del generation
        if self.membership.decides:
            await self.membership.forget_state(completed)

    def broken_off(self) -> None:
        self.membership.train()

    def valid(self, completed: int) -> bool:
        return not self.membership.decides or self.membership.valid(completed)

    def freeze(self) -> None:
        self.membership.freeze()

    async def run(self) -> None:
        await self.membership.run()

    async def close(self) -> None:
        self.membership.close()
        await self.states.close()

    def held(self) -> None:
        self.membership.held()

    def status(self) -> LaneStatus:
        return self.membership.status()

    def met(self, lane: int) -> None:
        self.states.met(lane)
        self.membership.held()

    def told(self, lane: int, status: LaneStatus | None) -> None:
        if status is None:
            self.states.parted(lane)
        self.membership.hear(lane, status)

    def copy_frame(self, lane: int, frame: CopyFrame) -> None:
        self.states.receive(lane, frame)

    def ended(self, lane: int) -> None:
        self.membership.ended(lane)

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
            if entry and stage.completed > entry.begins and not membership.is_ending:
                # It had been admitted to a later round, and enters by itself since all others are gone. Whoever makes
                # the run again trains the steps that were passed over.
                membership.go_back()
                await asyncio.get_running_loop().create_future()
            await compute.run("enter", stage.enter, stage.completed)
            if entry and stage.completed == entry.begins:
                membership.entered(entry)
                while not (
                    membership.below_entered(entry) or membership.is_ending
                ):  # or it would forget what comes of the next step
                    await membership.changed()
        if stage.completed < averager.plan.steps:  # or it stays where it followed from until all stages have got there
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
            try:
                await self._use(averager, round_, step + 1, compute, watch, following=True)
            except TimeoutError as error:
                await self._do_without(round_, error)
        if averager.mode.of_gradients:
            await compute.run("optimizer step", stage.finish, step, await norm(step))
        else:
            stage.follow_to(step + 1)

    async def _do_without(self, round_: Round, error: TimeoutError) -> None:
        """Nobody gives this stage what it needs of that round, while others may go on with it. That is said by the
        promise not to ask for it again: then the lane takes up the state of another one, and this generation ends;
        or there is none, and stage 0 says so."""
        why = str(error).partition("; ")[0]  # without what to do about it, since this lane does something else
        print(f"{why}; this lane takes up the state of another one, if it can", flush=True)
        self._links.forget_before(round_.number + 1)
        await asyncio.get_running_loop().create_future()

    def _waits_for(self) -> str:
        return self.membership.waits_for()

    async def _members(self, averager: Averager, round_: Round, completed: int, *, following: bool) -> tuple[int, ...]:
        lane, membership = averager.place.lane, self.membership
        members = await membership.members_of(round_.number)
        if not following and lane not in members and not membership.part.entered_before(round_.number, completed):
            await asyncio.get_running_loop().create_future()  # this lane has to go back, and is told so
        return members

    async def finish(self, on_fault: Reporter) -> None:
        """This lane is through: wait until no other one needs anything of this stage. That one of them is gone is no
        fault here, and is only said."""
        try:
            membership = self.membership
            membership.through()
            await self._links.finish(membership.log.members, membership.there, membership.deadline_s)
        except TimeoutError as error:
            on_fault("timeout", str(error))
