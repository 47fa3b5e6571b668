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

from ...protocol.errors import RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ...protocol.lane_status import LaneStatus, StatusExchange
from ...protocol.membership_log import Entry, MembershipLog, Stretch
from ...protocol.rollback_actions import Side
from ...protocol.round_membership import RoundMembership
from ...protocol.round_messages import RoundStatus
from ..averaging.round_plan import RoundPlan
from ..checkpoints.manifest import CheckpointError
from ..run_records import MetricsWriter
from .lateral_links import LateralLinks
from .members_file import FILE, read_members, read_taken, write_members
from .state_copies import ASK_AGAIN_S
from .stays import Stays

TAKING_S = 3600.0  # after which a state that has not come is given up for another one
LOOK_EVERY_S = 0.25  # a deadline may have passed


class LaneMembership:
    """Of the node that `identity` describes.

    tell: says a frame to a neighbour; refuse: ends the connection to it. on_left_out: this lane has to go back; of
    stage 0 alone, as on_void: what this lane had after so many steps, and later, came of a log that does not count, so
    no process must go on from it. on_changed: something is known that was not. under_way: steps that are
    completed once the present one is. saved: steps of this stage's newest
    checkpoint. take_up: fetches this stage's state of another lane after so many steps; let_go: that lane needs none
    any more. paused_ago_s: how long ago this process was stopped for a while.
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
        on_void: Callable[[int], Awaitable[None]],
        on_changed: Callable[[], None],
        under_way: Callable[[], int],
        saved: Callable[[], int],
        take_up: Callable[[int, int], Awaitable[None]],
        let_go: Callable[[int], None],
        paused_ago_s: Callable[[], float],
    ) -> None:
        self._identity, self._plan, self._links, self._metrics = identity, plan, links, metrics
        self._tell, self._refuse, self._on_left_out = tell, refuse, on_left_out
        self._on_void = on_void
        self._under_way = under_way
        self._on_changed, self._saved, self._take_up, self._let_go = on_changed, saved, take_up, let_go
        self._paused_ago_s, self._paused_s = paused_ago_s, float("inf")
        self._path = links.directory / FILE
        self._lane, lanes = identity.lane, identity.lanes
        self.log, self.admitted = (
            (read_members(self._path, lanes) if identity.first else MembershipLog.begin(lanes)),
            (),
        )
        self._following: int | None = None  # the steps from which this lane is to follow; of stage 0: and does
        self._place: int | None = None  # the steps from which this stage does
        self._entered: Entry | None = None  # how this stage last came back
        self._taken = read_taken(self._path, self.log, self._lane) if identity.first else None  # and all stages have
        self._has_state = self._taking = self._taken
        self._fetching: asyncio.Task[None] | None = None
        self.is_ending = False
        self._deadline_s = deadline_s
        self._taking_s = self._source_s = 0.0  # when it began, and when its source was there last
        self._knows = identity.first  # which log counts
        if not self._knows:
            links.hold_back()
        self._in_vain: list[int] = []  # for whom the next round waits, though they have ended and this lane is to
        self._machine = self._machine_of(identity, deadline_s) if identity.first else None
        self._exchanges = {side: StatusExchange(lanes, plan.count) for side in ("above", "below")}
        self._below: LaneStatus | None = None
        self._news: LaneStatus | None = None  # from above, not taken yet
        self._said_up: LaneStatus | None = None
        self._told_below: LaneStatus | None = None
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
        """Waits until they are decided, for as long as that takes; raises TimeoutError where this lane is to end, and
        those that it waits for have ended before it."""
        while self.log.decided <= round:
            if self._in_vain:
                lanes = ", ".join(f"lane {lane}" for lane in self._in_vain)
                raise TimeoutError(
                    f"stage {self._identity.stage}: this lane is to end, and waits in round {round} for {lanes}, which "
                    "ended before; start all lanes again with --resume"
                )
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
        if self.entry(completed) is not None or self._took(completed) or self.is_stuck(completed):
            return True
        # Of all rounds that it is a member of, this lane has made its contribution.
        return self.valid(completed) and self._plan.made_by(completed) == self._left

    def is_stuck(self, completed: int) -> bool:
        """Whether who goes on from there would need rounds that this lane may not ask for any more: it was set back too
        far, and has to take up the state of another one."""
        below = self._below.forgot if self._below else 0
        return self._plan.first_after(completed) < max(self._links.forgot, below)

    def _took(self, completed: int) -> bool:
        """Whether the state after so many steps is another lane's, which this one has taken up."""
        return self._taken is not None and self._taken[1] == completed

    @property
    def _left(self) -> int | None:
        """The round that the others go on with, without this lane; None: it is a member, or admitted."""
        return self.log.expecting(self.admitted).left_at(self._lane)

    def entry(self, copied: int) -> Entry | None:
        """With which this lane comes back, having followed from `copied` steps on."""
        known = (*self.log.entries_of(self._lane), *(each for each in self.admitted if each.lane == self._lane))
        return next((each for each in reversed(known) if each.copied == copied), None)

    def entered_before(self, round: int, completed: int) -> bool:
        """Whether this lane is no member of that round and uses it all the same, because it came when it was under
        way."""
        known = (*self.log.entries_of(self._lane), *(each for each in self.admitted if each.lane == self._lane))
        return any(each.begins <= completed and round < each.first for each in known)

    def follow(self, completed: int) -> None:
        """This stage, which has completed so many steps, does nothing but follow from here."""
        self._place = completed
        if self._machine:
            self._following = completed
        self._wake.set()

    def below_follows(self, completed: int) -> bool:
        """Whether all stages below do, from the same step."""
        return self._identity.last or (self._below is not None and self._below.returning == completed + 1)

    def entered(self, entry: Entry) -> None:
        """This stage is where the lane trains on."""
        self._entered = entry  # it may still be that its round is decided without this lane
        self._wake.set()

    def below_entered(self, entry: Entry) -> bool:
        """Whether all stages below are, too."""
        return self._identity.last or (self._below is not None and entry in self._below.admitted)

    def train(self) -> None:
        """This stage has caught up, or was set back."""
        self._place = None
        if self._machine:
            self._following = None
        self._wake.set()

    async def forget_state(self, completed: int) -> None:
        """This lane goes on from another step than that of the state that it took up, which was lost again."""
        if self._taken and self._taken[1] != completed:
            self._taken = self._taking = self._has_state = None
            await asyncio.to_thread(write_members, self._path, self.log)

    def valid(self, completed: int) -> bool:
        """Whether what this lane had after so many steps is a part of the run, by what is known."""
        if self._taken and (completed < self._taken[1] or self.entry(self._taken[1]) is None):
            return self._took(completed)  # whatever is older lacks rounds that nobody has
        left, expected = self._left, self.log.expecting(self.admitted)
        if left is not None and left < self._plan.count and completed >= self._plan.round(left).made:
            return False
        for entry in expected.entries_of(self._lane):
            made = self._plan.round(expected.left_before(entry)).made
            if entry.copied < completed < entry.begins or made <= completed < entry.copied:
                return False
        return True

    def waits_for(self) -> str:
        """For whom the next round waits, for people."""
        if self._machine is None:
            return self._links.waits_for() or "stage 0 says who takes part in the round"
        known = {link.lane: link.state for link in self._links.links}
        return "; ".join(known[lane] for lane in self._machine.lacking())

    def freeze(self) -> None:
        """This lane is to end: nobody is left out any more by its decision."""
        self.is_ending = True
        if self._machine:
            self._machine.frozen = True
        self._wake.set()

    # -- what comes ---------------------------------------------------------------------------------------------------

    def held(self) -> None:
        """What this node holds has changed."""
        self._wake.set()

    def met(self, side: Side) -> None:
        """A neighbour is connected, and knows nothing yet."""
        self._exchanges[side] = StatusExchange(self._identity.lanes, self._plan.count)
        self._said_up = None if side == "above" else self._said_up
        if side == "below":
            self._tell_below()
        self._wake.set()

    def parted(self, side: Side) -> None:
        if side == "below":
            self._below = None
            self._wake.set()

    def receive(self, side: Side, frame: RoundStatus) -> None:
        """A neighbour's."""
        try:
            status = self._exchanges[side].hear(frame)
        except RemoteProtocolError as error:
            self._refuse(side, error)
            return
        if side == "below":
            self._below = status
        else:
            self._news = status
        self._wake.set()

    def status(self) -> LaneStatus:
        """What is said of this lane to others."""
        assert self._machine
        return self._machine.status()

    def hear(self, lane: int, status: LaneStatus | None) -> None:
        """What another lane says of itself; None: it is not connected any more."""
        if self._machine is None:
            return
        if status is None:
            self._machine.part(lane)
        else:
            self._machine.hear(lane, status, self._now_s())
        self._wake.set()

    def ended(self, lane: int) -> None:
        """It needs nothing more, and makes no more contributions."""
        if self._machine:
            self._machine.part(lane, ended=True)
            self._wake.set()

    # -- the one task -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Never returns. Raises ContributionError for this node's own disk."""
        if self._machine:  # who knows nothing yet has nothing to say of what is on its disk
            await self._links.expect(self._stays(self.log, self.admitted))
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S if self._machine else None):
                    await self._wake.wait()
            self._wake.clear()
            if self._machine:
                await self._decide(self._machine)
            elif self._news is not None:
                news, self._news = self._news, None
                await self._take(news.log, news.admitted)
                self._following = news.returning - 1 if news.returning else None
                self._take_state((news.source - 1, news.returning - 1) if news.source else None)
                self._tell_below()
            self._tell_below(anew=False)
            self._say(self._aggregated())
            self._notify()

    async def _decide(self, machine: RoundMembership) -> None:
        now_s = self._now_s()
        if (paused_s := self._paused_ago_s()) < self._paused_s:
            machine.paused()
        self._paused_s = paused_s
        for link in self._links.links:
            machine.prepares(link.lane, bool(link.heartbeat and link.heartbeat.preparing))
        mine = self._aggregated()
        stuck = self._following is not None and self.is_stuck(self._following)
        # Not yet, while a state is only there to be taken up, or has to be.
        machine.returning = 0 if mine.source or stuck else mine.returning
        machine.saved, machine.kept, machine.forgot = mine.saved, mine.kept, mine.forgot
        machine.source = self._taken[0] + 1 if self._taken and self._following == self._taken[1] else 0
        machine.report(mine.held, now_s)
        self._in_vain = [*machine.lacking()] if machine.is_in_vain(now_s) else []
        await self._choose_state(machine, mine)
        while (machine.log, machine.admitted) != (self.log, self.admitted):
            log, admitted = machine.log, machine.admitted
            if (first := self.log.differs_from(log)) is not None and first < self._plan.count:
                await self._on_void(self._plan.round(first).used)
            await asyncio.to_thread(write_members, self._path, log, self._taken)
            await self._take(log, admitted)
            self._tell_below()
            machine.report(self._aggregated().held, self._now_s())  # by the log that counts now

    async def _choose_state(self, machine: RoundMembership, mine: LaneStatus) -> None:
        """Where this lane follows, and lacks what nobody has any more, it takes up the state of another one."""
        if self._taking is None or self._taken is not None:
            at = mine.returning - 1
            if mine.returning and self.entry(at) is None:
                before = lambda at: (self._plan.made_by(at), self._plan.first_after(at))  # noqa: E731
                found = machine.state_to_take(before, stuck=self.is_stuck(at))
                if found and found != self._taken:
                    self._take_state(found)
                    self._tell_below()
        elif not mine.source:
            if self._is_overdue(machine, self._now_s()):  # the source is gone, or has nothing to give
                self._take_state(None)
                self._tell_below()
        else:
            self._taken = self._taking
            await asyncio.to_thread(write_members, self._path, self.log, self._taken)
            self._on_left_out()  # and goes on from there

    def _is_overdue(self, machine: RoundMembership, now_s: float) -> bool:
        """Whether a state that is taken up has not come for too long, or its source has been away for long."""
        assert self._taking
        if machine.is_there(self._taking[0]):
            self._source_s = now_s
        return now_s >= min(self._source_s + self._deadline_s, self._taking_s + TAKING_S)

    def _take_state(self, taking: tuple[int, int] | None) -> None:
        if taking == self._taking:
            return
        self._taking, self._taken = taking, None
        if self._fetching:
            self._fetching.cancel()
        self._taking_s = self._source_s = self._now_s()
        if taking:
            self._links.forget_before(self._plan.first_after(taking[1]))
            self._fetching = asyncio.create_task(self._fetch(*taking))

    async def _fetch(self, lane: int, completed: int) -> None:
        while True:
            try:
                await self._take_up(lane, completed)
                break
            except CheckpointError as error:
                print(f"stage {self._identity.stage}: {error}; asks again", flush=True)
                await asyncio.sleep(ASK_AGAIN_S)
        self._has_state = lane, completed
        self._wake.set()

    async def _take(self, log: MembershipLog, admitted: tuple[Entry, ...]) -> None:
        """What counts from now on."""
        before, expected = self.log.expecting(self.admitted), log.expecting(admitted)
        told, self.log, self.admitted = self.log, log, admitted
        if self._taken and any(each.copied == self._taken[1] for each in log.entries_of(self._lane)):
            self._taking = self._taken = None  # by the log, this lane is back with it
        if expected.stretches != before.stretches or not self._knows:
            self._knows = True
            await self._links.expect(self._stays(log, admitted))
        self._links.need(log.decided)
        for lane in log.members:
            self._let_go(lane)
        if self._machine:
            self._record(told, log)
            changed = before.parts_from(expected, self._lane)
            came = changed is not None and self._comes_back(expected, changed)
            if told.differs_from(log) is not None or (changed is not None and not came):
                self._on_left_out()

    def _stays(self, log: MembershipLog, admitted: tuple[Entry, ...]) -> Stays:
        return Stays(log, self._identity.lanes, admitted, self._plan.used_before)

    def _comes_back(self, expected: MembershipLog, round: int) -> bool:
        """Whether what is new of this lane is just that it is admitted, as it asked for: it follows from there, or has
        not got there yet."""
        entry = next((each for each in reversed(expected.entries_of(self._lane)) if each.first == round), None)
        return entry is not None and (self._following == entry.copied or self._under_way() <= entry.copied)

    def _aggregated(self) -> LaneStatus:
        """What this stage and all below it hold, and whether all of them follow, or have entered."""
        held = self._links.held()
        if not self._identity.last:
            agrees = self._below is not None and self._below.log.differs_from(self.log) is None
            below = self._below.held if self._below and agrees else (0,) * len(held)
            held = tuple(min(pair) for pair in zip(held, below, strict=True))
        place = self._place
        follows = place is not None and place == self._following and self.below_follows(place)
        returning = place + 1 if follows and place is not None else 0  # who still takes up a state does not yet
        entered = (self._entered,) if self._entered and self.below_entered(self._entered) else ()
        saved, kept, forgot, source = self._saved(), self._links.kept(), self._links.forgot, 0
        if self._below:
            saved, kept = min(saved, self._below.saved), max(kept, self._below.kept)
            forgot = max(forgot, self._below.forgot)
        if self._taking and self._taking == self._has_state:
            below = self._below and (self._below.source - 1, self._below.returning - 1)
            if self._identity.last or below == self._taking:
                source, returning = self._taking[0] + 1, self._taking[1] + 1
        return LaneStatus(
            held=held,
            log=self.log,
            admitted=entered,
            returning=returning,
            source=source,
            saved=saved,
            kept=kept,
            forgot=forgot,
        )

    def _say(self, mine: LaneStatus) -> None:
        """To the stage above, or to the other lanes, if it is new."""
        if self._machine:
            if self._said_up != (status := self._machine.status()):
                self._said_up = status
                self._links.tell_status()
        elif self._said_up != mine:
            self._said_up = mine
            self._tell("above", self._exchanges["above"].say(mine))

    def _tell_below(self, *, anew: bool = True) -> None:
        """What stage 0 knows; not anew: if that is not what was told last."""
        if self._identity.last or not self._knows:
            return
        source, following = 0, self._following
        if self._taking and self._taken is None:
            source, following = self._taking[0] + 1, self._taking[1]
        status = LaneStatus(
            held=(0,) * self._identity.lanes,
            log=self.log,
            admitted=self.admitted,
            returning=0 if following is None else following + 1,
            source=source,
        )
        if anew or status != self._told_below:
            self._told_below = status
            self._tell("below", self._exchanges["below"].say(status))

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
            if stretch in known:
                continue
            entered = [asdict(each) for each in stretch.entered]
            self._metrics.write("members", first=stretch.first, members=list(stretch.members), entered=entered)
            print(_line(log, stretch, self._identity.lanes), flush=True)


def _line(log: MembershipLog, stretch: Stretch, lanes: int) -> str:
    """Who has left or come with it, for people."""
    at = log.stretches.index(stretch)
    before = log.stretches[at - 1].members if at else tuple(range(lanes))
    left = [f"lane {lane} is left out" for lane in before if lane not in stretch.members]
    came = [
        f"lane {each.lane} is back: it followed the others from {each.copied} steps on and trains from {each.begins}"
        for each in stretch.entered
    ]
    members = ", ".join(map(str, stretch.members))
    return f"from round {stretch.first} on: {'; '.join(left + came) or 'another log counts'}; members: {members}"
