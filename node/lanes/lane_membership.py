"""Which lanes are members of a round, as one node knows it: stage 0 decides with the other lanes, the others are told.

Within a lane two things travel on the control stream (`RoundStatus`). Upwards: how many rounds this stage and all below
it hold, of each lane, and how far they are in following the others. Downwards: the log of what is decided, and whether
the lane has to follow the others from where it is. The node of stage 0 says the sum of it to the other lanes, on its
lateral links, and hears theirs; who decides when is `protocol.round_membership`'s. What it decides or learns is on its
disk before anybody uses it.

All work on it is done by one task (`run`), in one order: take what is new; drop contributions that do not count any
more; say it. So a stage that reports what it holds has done what the log asks for before.

A lane whose own part of the log changes has gone wrong since then: it goes back to a step before that (`on_left_out`)
and from there follows the others' rounds (`Rounds.catch_up`), until it is admitted again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from ...protocol.errors import RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ...protocol.lane_status import LaneStatus
from ...protocol.membership_log import Entry, MembershipLog
from ...protocol.rollback_actions import Side
from ...protocol.round_membership import RoundMembership
from ...protocol.round_messages import RoundStatus
from ..averaging.round_plan import RoundPlan
from ..run_records import MetricsWriter
from .chain_statuses import ChainStatuses
from .lateral_links import LateralLinks
from .members_file import FILE, in_words, read_members, read_taken, write_members
from .own_part import OwnPart
from .standstill import Standstill
from .state_taking import StateTaking
from .stays import Stays

LOOK_EVERY_S = 0.25  # a deadline may have passed
THERE_S = 10.0  # after which a lane that is not connected any more is not there; links begin anew when members change


class LaneMembership:
    """Of the node that `identity` describes.

    tell: says a frame to a neighbour; refuse: ends the connection to it. on_left_out: this lane has to go back. Of
    stage 0 alone: on_in_vain: it is to end, and cannot do the step under way, since other lanes have ended before it;
    on_void: what this lane had after so many steps, and later, came of a log that does not count; no process must go on
    from it. on_changed: something is known that was not. under_way: steps that are completed
    once the present one is. saved: steps of this stage's newest checkpoint. take_up: fetches this stage's state of
    another lane after so many steps; came_s: when bytes of it came last; let_go: that lane needs none any more.
    paused_ago_s: how long ago this process was stopped for a while. deadline_s: that a round waits for a lane; lost_s:
    that this one, which follows, waits for anything to happen.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        plan: RoundPlan,
        links: LateralLinks,
        metrics: MetricsWriter,
        *,
        deadline_s: float,
        tell: Callable[[Side, RoundStatus], None],
        refuse: Callable[[Side, RemoteProtocolError], None],
        on_left_out: Callable[[], None],
        on_in_vain: Callable[[], None],
        on_void: Callable[[int], Awaitable[None]],
        on_changed: Callable[[], None],
        under_way: Callable[[], int],
        saved: Callable[[], int],
        take_up: Callable[[int, int], Awaitable[None]],
        let_go: Callable[[int], None],
        came_s: Callable[[], float],
        lost_s: float,
        paused_ago_s: Callable[[], float],
    ) -> None:
        self._identity, self._plan, self._links, self._metrics = identity, plan, links, metrics
        self._on_left_out, self._on_in_vain = on_left_out, on_in_vain
        self._on_void, self._under_way = on_void, under_way
        self._on_changed, self._saved, self._let_go = on_changed, saved, let_go
        self._paused_ago_s, self._paused_s = paused_ago_s, float("inf")
        self.deadline_s = deadline_s  # that a round waits for a lane
        self._path = links.directory / FILE
        self._lane, lanes = identity.lane, identity.lanes
        self.log, self.admitted = (
            (read_members(self._path, lanes) if identity.first else MembershipLog.begin(lanes)),
            (),
        )
        self._following: int | None = None  # the steps from which this lane is to follow; of stage 0: and does
        self._place: int | None = None  # the steps from which this stage does
        self._entered: Entry | None = None  # how this stage last came back
        self._state = StateTaking(
            read_taken(self._path, self.log, self._lane) if identity.first else None,
            deadline_s=deadline_s,
            fetch=take_up,
            on_want=lambda completed: links.forget_before(plan.first_after(completed)),
            on_here=self._wake_up,
            came_s=came_s,
        )
        self._standstill = Standstill([link.peer for link in links.links], deadline_s=deadline_s, lost_s=lost_s)
        self._there: set[int] = set()  # lanes to which a stage of this one is connected, by stage 0's word
        self._seen_s: dict[int, float] = {}  # when each was that last, as stage 0 knows
        self._lacks_for_good = False  # as members have dropped what this lane, which was left out, needs next
        self.is_ending = False
        self._knows = identity.first  # which log counts
        links.hold_back()
        self._is_in_vain = False  # this lane is to end, and waits in a round for lanes that have ended
        self._machine = self._machine_of(identity, deadline_s) if identity.first else None
        self._chain = ChainStatuses(identity, plan.count, tell=tell, refuse=refuse)
        self._said: LaneStatus | None = None  # to other lanes
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()  # replaced whenever there is something that somebody may wait for

    def _machine_of(self, identity: NodeIdentity, deadline_s: float) -> RoundMembership:
        known = {"deadline_s": deadline_s, "begins": self._begins, "log": self.log}
        return RoundMembership(identity.lane, identity.lanes, **known)

    def _begins(self, round: int) -> int | None:
        """After how many steps a lane trains that enters between this round and the next one."""
        if round + 1 >= self._plan.count:
            return None
        made = self._plan.round(round).made
        return made if self._plan.round(round + 1).made > made else None

    # -- for the rounds of this stage ---------------------------------------------------------------------------------

    async def members_of(self, round: int) -> tuple[int, ...]:
        """Waits until they are decided, for as long as that takes."""
        while self.log.decided <= round:
            await self.changed()
        return self.log.members_of(round)

    async def changed(self) -> None:
        """Wait until anything is."""
        await self._changed.wait()

    def follows(self, completed: int) -> bool:
        """Whether this lane, which has completed so many steps, goes on with the rounds of others and not with steps of
        its own."""
        if self._machine is None or self._following == completed:
            return self._following == completed
        return self._has_to_follow(completed)

    def _has_to_follow(self, completed: int) -> bool:
        if self.part.entry(completed) is not None or self._state.took(completed) or self.is_stuck(completed):
            return True
        return not self._state.taken and self.part.has_made_all(completed)

    def is_stuck(self, completed: int) -> bool:
        """Whether who goes on from there would need rounds that this lane may not ask for any more, or nobody can give:
        it was set back too far, and has to take up the state of another one. The latter stage 0 alone knows."""
        below = self._chain.below.forgot if self._chain.below else 0
        return self._lacks_for_good or self._plan.first_after(completed) < max(self._links.forgot, below)

    @property
    def decides(self) -> bool:
        """Whether it does so for its lane, with the other lanes."""
        return self._machine is not None

    @property
    def part(self) -> OwnPart:
        """What is known of this lane's own steps."""
        return OwnPart(self._lane, self.log, self.admitted, self._plan)

    @property
    def there(self) -> set[int]:
        """The lanes of which any stage is there. One that has lost a stage, and is on its way back, needs something of
        this stage as well, once it is whole again."""
        return {*self._there, *self._links.there}

    def follow(self, completed: int) -> None:
        """This stage, which has completed so many steps, does nothing but follow from here."""
        self._place = completed
        if self._machine:
            self._following = completed
        self._wake.set()

    def below_follows(self, completed: int) -> bool:
        """Whether all stages below do, from the same step."""
        return self._chain.follow(completed)

    def entered(self, entry: Entry) -> None:
        """This stage is where the lane trains on."""
        self._entered = entry  # it may still be that its round is decided without this lane
        self._wake.set()

    def below_entered(self, entry: Entry) -> bool:
        """Whether all stages below are, too."""
        below = self._chain.below
        return self._identity.last or (below is not None and entry in below.admitted)

    def train(self) -> None:
        """This stage has caught up, or was set back."""
        self._place = None
        if self._machine:
            self._following = None
        self._wake.set()

    def go_back(self) -> None:
        """This stage has followed further than its lane trains from."""
        self._on_left_out()

    async def forget_state(self, completed: int) -> None:
        """This lane goes on from another step than that of the state that it took up, which was lost again."""
        if self._state.taken and not self._state.took(completed):
            self._state.forget()
            await self._write(self.log)

    def valid(self, completed: int) -> bool:
        """Whether what this lane had after so many steps is a part of the run, by what is known."""
        return self.part.valid(completed, self._state.taken)

    def waits_for(self) -> str:
        """For whom the next round waits, for people."""
        if self._machine is None:
            return self._links.waits_for() or "stage 0 says who takes part in the round"
        known = {link.lane: link.peer.state for link in self._links.links}
        return "; ".join(known[lane] for lane in self._machine.lacking())

    def freeze(self) -> None:
        """This lane is to end: nobody is left out any more by its decision."""
        self.is_ending = True
        if self._machine:
            self._machine.frozen = True
        self._wake.set()

    def through(self) -> None:
        """All stages of this lane are, with a checkpoint of their last step, if there are checkpoints at all."""
        self._chain.through(self._saved())
        self.train()
        self._wake.set()

    def close(self) -> None:
        """No state is fetched any more."""
        self._state.close()

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        self._wake.set()

    held = _wake_up  # what this node holds has changed, or to which lanes it is connected

    def met(self, side: Side) -> None:
        """A neighbour is connected, and knows nothing yet."""
        self._chain.met(side)
        self._wake.set()

    def parted(self, side: Side) -> None:
        """It is not any more."""
        self._chain.parted(side)
        self._wake.set()

    def receive(self, side: Side, frame: RoundStatus) -> None:
        """A neighbour's."""
        self._chain.receive(side, frame)
        self._wake.set()

    def status(self) -> LaneStatus:
        """What is said of this lane to others."""
        assert self._machine
        return self._machine.status()

    def hear(self, lane: int, status: LaneStatus | None) -> None:
        """What another lane says of itself; None: it is not connected any more."""
        self._wake.set()
        if self._machine is None:
            return
        if status is None:
            self._machine.part(lane)
        else:
            self._machine.hear(lane, status, self._now_s())

    def ended(self, lane: int) -> None:
        """It needs nothing more, and makes no more contributions."""
        if self._machine:
            self._machine.part(lane, ended=True)
            self._wake.set()

    # -- the one task -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Never returns. Raises ContributionError for this node's own disk, and TimeoutError where this lane follows,
        and nothing happens any more that it could wait for."""
        if self._machine:  # who knows nothing yet has nothing to say of what is on its disk
            await self._links.expect(self._stays(self.log, self.admitted))
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S if self._machine else None):
                    await self._wake.wait()
            self._wake.clear()
            if self._machine:
                await self._decide(self._machine)
            elif news := self._chain.take():
                await self._take(news.log, news.admitted)
                self._following, self._there = news.returning - 1 if news.returning else None, {*news.there}
                self._state.want((news.source - 1, news.returning - 1) if news.source else None)
            self._say()
            self._notify()

    async def _decide(self, machine: RoundMembership) -> None:
        now_s = self._now_s()
        if (paused_s := self._paused_ago_s()) < self._paused_s:
            machine.paused()
        self._paused_s = paused_s
        for link in self._links.links:
            machine.prepares(link.lane, bool(link.peer.heartbeat and link.peer.heartbeat.preparing))
        mine = self._joined()
        stuck = self._following is not None and self.is_stuck(self._following)
        # Not yet, while a state is only there to be taken up, or has to be.
        machine.returning = 0 if mine.source or stuck else mine.returning
        machine.saved, machine.kept, machine.forgot = mine.saved, mine.kept, mine.forgot
        taken = self._state.taken
        machine.source = taken[0] + 1 if taken and self._following == taken[1] else 0
        self._seen_s |= dict.fromkeys(mine.there, now_s)
        self._there = {lane for lane, seen_s in self._seen_s.items() if now_s < seen_s + THERE_S}
        machine.report(mine.held, now_s)
        self._see_what_is_gone(machine, mine, now_s)
        if machine.is_in_vain(now_s) and not self._is_in_vain:
            self._is_in_vain = True
            lanes = ", ".join(f"lane {lane}" for lane in machine.lacking())
            print(f"round {self.log.decided} waits for {lanes}, which ended before: this lane goes back", flush=True)
            self._on_in_vain()
        await self._choose_state(machine, mine)
        if self._following is not None and not self.is_ending:
            self._standstill.check(self._following, (mine, self._state.came_s()), now_s, paused_ago_s=self._paused_s)
        while (machine.log, machine.admitted) != (self.log, self.admitted):
            log, admitted = machine.log, machine.admitted
            if (first := self.log.differs_from(log)) is not None and first < self._plan.count:
                await self._on_void(self._plan.round(first).used)
            await self._write(log)
            await self._take(log, admitted)
            self._say()
            machine.report(self._joined().held, self._now_s())  # by the log that counts now

    def _see_what_is_gone(self, machine: RoundMembership, mine: LaneStatus, now_s: float) -> None:
        """What this lane lacks may be gone while it does steps again that it is a member of, and would wait for it in
        vain: it breaks off, and follows. Or it is there again, and this lane can do those steps."""
        if not self._chain.is_agreed(self.log) or mine.held[self._lane] < self._plan.made_by(self._under_way()):
            return  # what is held is not known, or some stage has yet to say from where on it needs rounds
        before, self._lacks_for_good = self._lacks_for_good, machine.lacks_what_is_gone(now_s)
        if self._following is not None:
            breaks_off = before and not self._has_to_follow(self._following)
        else:
            breaks_off = self._lacks_for_good and not before and self._state.under_way is None
        if breaks_off:
            self._on_left_out()

    async def _choose_state(self, machine: RoundMembership, mine: LaneStatus) -> None:
        """Where this lane follows, and lacks what nobody has any more, it takes up the state of another one."""
        state = self._state
        if not state.under_way:
            at = mine.returning - 1
            if mine.returning and self.part.entry(at) is None and self.is_stuck(at):
                before = lambda at: (self._plan.made_by(at), self._plan.first_after(at))  # noqa: E731
                state.choose(partial(machine.state_to_take, before))
        elif mine.source:
            state.taken = state.wanted
            await self._write(self.log)
            self._on_left_out()  # and goes on from there
        elif state.is_overdue(source_is_there=machine.is_there(state.under_way[0])):
            state.give_up()

    async def _write(self, log: MembershipLog) -> None:
        await asyncio.to_thread(write_members, self._path, log, self._state.taken)

    async def _take(self, log: MembershipLog, admitted: tuple[Entry, ...]) -> None:
        """What counts from now on."""
        before, told, self.log, self.admitted = self.part, self.log, log, admitted
        part = self.part
        if any(self._state.took(each.copied) for each in log.entries_of(self._lane)):
            self._state.forget()  # by the log, this lane is back with it
        if log.expecting(admitted).stretches != told.expecting(before.admitted).stretches or not self._knows:
            self._knows = True
            await self._links.expect(self._stays(log, admitted))
        self._links.need(log.decided)
        for lane in log.members:
            self._let_go(lane)
        if self._machine:
            self._record(told, log)
            changed = before.differs_at(part)
            if told.differs_from(log) is not None or (changed is not None and not self._comes_back(changed)):
                self._on_left_out()

    def _stays(self, log: MembershipLog, admitted: tuple[Entry, ...]) -> Stays:
        return Stays(log, self._identity.lanes, admitted, self._plan.used_before)

    def _comes_back(self, round: int) -> bool:
        """Whether what is new of this lane is just that it is admitted, as it asked for: it follows from there, or has
        not got there yet."""
        entry = next((each for each in reversed(self.part.entries) if each.first == round), None)
        return entry is not None and (self._following == entry.copied or self._under_way() <= entry.copied)

    def _joined(self) -> LaneStatus:
        """What this stage and all below it hold, and whether all of them follow, have entered, or have a state here."""
        place, wanted = self._place, self._state.wanted
        source, returning = 0, place + 1 if place is not None and place == self._following else 0
        if wanted and wanted == self._state.here and not self._state.taken:
            source, returning = wanted[0] + 1, wanted[1] + 1
        mine = LaneStatus(
            held=self._links.held(),
            log=self.log,
            admitted=(self._entered,) if self._entered else (),
            returning=returning,
            source=source,
            saved=self._saved(),
            kept=self._links.kept(),
            forgot=self._links.forgot,
            there=self._links.there,
        )
        return self._chain.joined(mine)

    def _say(self) -> None:
        """What is new: to the stages above and below, or to the other lanes."""
        if self._knows:  # which is what stage 0 knows
            self._chain.say("below", self._for_below())
        if not self._machine:
            self._chain.say("above", self._joined())
        elif self._said != (status := self._machine.status()):
            self._said = status
            self._links.tell_status()

    def _for_below(self) -> LaneStatus:
        source, following = 0, self._following
        if under_way := self._state.under_way:
            source, following = under_way[0] + 1, under_way[1]
        return LaneStatus(
            held=(0,) * self._identity.lanes,
            log=self.log,
            admitted=self.admitted,
            returning=0 if following is None else following + 1,
            source=source,
            there=tuple(sorted(self._there)),
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_changed()

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()

    def _record(self, before: MembershipLog, log: MembershipLog) -> None:
        """Write down, and say, who has left or come."""
        known = set(before.stretches)
        for stretch in log.stretches:
            if stretch not in known:
                entered = [asdict(each) for each in stretch.entered]
                self._metrics.write("members", first=stretch.first, members=list(stretch.members), entered=entered)
                print(in_words(log, stretch, self._identity.lanes), flush=True)
