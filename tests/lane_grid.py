"""A grid of lanes in virtual time, whose rounds are made as real ones are, over links that are late, cut and lossy.

Each lane is one `RoundMembership` and what a node does around it. Its weights are a hash of all that was averaged, so
two lanes that ever used other members, or other bytes, in a round never agree again. Statuses and contributions cross
on links of their own, as those of stage 0 and of other stages do: one may be cut while the other is not.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from thinpipe.protocol.lane_status import LaneStatus
from thinpipe.protocol.membership_log import Entry, MembershipLog
from thinpipe.protocol.round_membership import RoundMembership
from thinpipe.protocol.round_transfer import ROUNDS_AHEAD

DEADLINE_S = 8.0
STEPS_A_ROUND = 10
Name = int  # of a contribution: which history of its lane it comes from


def begins(round: int) -> int:
    """After how many steps a round is made."""
    return (round + 1) * STEPS_A_ROUND


@dataclass
class Contribution:
    name: Name
    content: int


@dataclass
class Way:
    """What goes from one lane to another, in order; each piece at its time."""

    pieces: deque[tuple[float, Any]] = field(default_factory=deque)
    free_s: float = 0.0

    def send(self, now_s: float, delay_s: float, what: Any) -> None:
        self.free_s = max(self.free_s, now_s + delay_s)
        self.pieces.append((self.free_s, what))

    def arrived(self, now_s: float) -> list[Any]:
        came = []
        while self.pieces and self.pieces[0][0] <= now_s:
            came.append(self.pieces.popleft()[1])
        return came


class Lane:
    """One lane: what it keeps, and what its process knows."""

    def __init__(self, grid: Grid, lane: int, pace_s: float) -> None:
        self.grid, self.lane, self.pace_s = grid, lane, pace_s
        self.own: dict[int, Contribution] = {}
        self.got: dict[int, dict[int, Contribution]] = {other: {} for other in grid.others(lane)}
        self.rounds: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # used: members, and what they gave
        self.weights = [hash("weights")]  # before the first round, and after each
        self.alive = True
        self.start(MembershipLog.begin(grid.lanes))

    def start(self, log: MembershipLog) -> None:
        """A process begins in it."""
        self.membership = RoundMembership(self.lane, self.grid.lanes, deadline_s=DEADLINE_S, begins=begins, log=log)
        self.moved_s = self.grid.now_s  # when it made or used a round last
        self._known: Any = None
        self._names: dict[tuple[int, int], Name | None] = {}
        self._counts: dict[int, int] = {}
        self.settle()

    @property
    def log(self) -> MembershipLog:
        return self.membership.log

    @property
    def used(self) -> int:
        return len(self.rounds)

    # -- what its contributions are ------------------------------------------------------------------------------------

    def entry_of(self, lane: int, round: int) -> Entry | None:
        """With which that lane came before that round."""
        entries = [*self.log.entries_of(lane), *(each for each in self.membership.admitted if each.lane == lane)]
        return next((each for each in reversed(entries) if each.first <= round), None)

    def is_in(self, lane: int, round: int) -> bool:
        """Whether that lane gives something to that round, by what is known."""
        entry = next((each for each in self.membership.admitted if each.lane == lane), None)
        if round >= self.log.decided and entry is not None:
            return round >= entry.first
        return lane in self.log.at(round).members

    def name(self, lane: int, round: int) -> Name | None:
        """None: by what is known, it gives nothing to that round."""
        self._refresh()
        if (lane, round) not in self._names:
            is_in = self.is_in(lane, round)
            self._names[lane, round] = self.grid.name(self, lane, round) if is_in else None
        return self._names[lane, round]

    def _refresh(self) -> None:
        """What follows from the log is found anew when that has changed."""
        known = (self.log.stretches, self.membership.admitted)
        if known != self._known:
            self._known = known
            self._names.clear()
            self._counts.clear()

    def valid(self, lane: int, round: int) -> Contribution | None:
        kept = self.own if lane == self.lane else self.got[lane]
        found = kept.get(round)
        return found if found is not None and found.name == self.name(lane, round) else None

    def count(self, lane: int) -> int:
        """How many rounds of that lane's contributions are here, or needed by nobody."""
        self._refresh()
        round = self._counts.get(lane, 0)
        while (round < self.log.decided and lane not in self.log.members_of(round)) or self.valid(lane, round):
            round += 1
        entry = next((each for each in self.membership.admitted if each.lane == lane), None)
        if entry is not None and round == self.log.decided < entry.first:
            round = entry.first
            while self.valid(lane, round):
                round += 1
        self._counts[lane] = round
        return round

    # -- what it does --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """What was used otherwise than it is decided now is undone, and who is out says from where it goes on."""
        for round, (members, _) in enumerate(self.rounds):
            if round >= self.log.decided or members != self.log.members_of(round):
                del self.rounds[round:], self.weights[round + 1 :]
                break
        if is_out(self.membership) and self.membership.returning == 0:
            self.membership.returning = 1 + self.used * STEPS_A_ROUND
        elif not is_out(self.membership) and self.lane in self.log.members:
            self.membership.returning = 0

    def make(self) -> None:
        round = self.count(self.lane)
        if not self.is_in(self.lane, round) or self.used < round - self.grid.delay:
            return
        if self.lane not in self.log.members and entry_of(self.membership) is None and round >= self.log.decided:
            return
        name = self.name(self.lane, round)
        assert name is not None
        weights = self.weights[max(0, round - self.grid.delay)]
        content = hash((self.lane, round, self.entry_of(self.lane, round), weights))
        self.own[round] = Contribution(name, content)
        self.moved_s = self.grid.now_s

    def use(self) -> None:
        round = self.used
        if round >= self.log.decided:
            return
        members = self.log.members_of(round)
        given = [self.valid(lane, round) for lane in members]
        if all(given):
            contents = tuple(each.content for each in given if each)
            self.rounds.append((members, contents))
            self.weights.append(hash((self.weights[-1], members, contents)))
            self.moved_s = self.grid.now_s
            self.grid.on_use(self, round)

    def step(self) -> None:
        now_s = self.grid.now_s
        self.settle()
        if now_s - self.moved_s >= self.pace_s or self.count(self.lane) < self.log.decided:
            self.make()
        self.use()
        before = self.log
        self.membership.report(tuple(self.count(lane) for lane in range(self.grid.lanes)), now_s)
        self.grid.on_decision(self, before)
        self.settle()

    def hear(self, peer: int, status: LaneStatus) -> None:
        before = self.log
        self.membership.hear(peer, status, self.grid.now_s)
        self.grid.on_decision(self, before, heard=status.log)
        self.settle()
        # Never says what was true with another log.
        self.membership.report(tuple(self.count(lane) for lane in range(self.grid.lanes)), self.grid.now_s)
        self.settle()


class Grid:
    """All lanes. name: what tells a contribution from another one of the same lane to the same round."""

    def __init__(
        self,
        lanes: int,
        *,
        delay: int = 0,
        seed: int = 0,
        pace_s: float = 1.0,
        name: Callable[[Lane, int, int], Name] | None = None,
    ) -> None:
        self.lanes, self.delay, self.now_s = lanes, delay, 0.0
        self.random = random.Random(seed)
        self.name = name or by_history
        self.lane: list[Lane] = []
        for lane in range(lanes):
            self.lane.append(Lane(self, lane, pace_s))
        pairs = [(one, other) for one in range(lanes) for other in self.others(one)]
        self.cut: set[tuple[str, int, int]] = set()  # what, and the lanes, the lower one first
        self.statuses = {pair: Way() for pair in pairs}
        self.bodies = {pair: Way() for pair in pairs}
        self.connected: set[tuple[int, int]] = set()
        self.latency_s = dict.fromkeys(pairs, 0.1)
        self.loss = 0.0
        self.nonsense: set[tuple[int, int]] = set()  # of whom, to which round: whoever gets it refuses it
        self.held_once: set[tuple[int, int, int, int]] = set()  # who held what of whom: lane, of, round, content
        self.contents: dict[tuple[int, int], set[int]] = {}
        self.decisions: list[tuple[int, int, MembershipLog]] = []  # by whom, round, log

    def others(self, lane: int) -> list[int]:
        return [other for other in range(self.lanes) if other != lane]

    @property
    def living(self) -> list[Lane]:
        return [each for each in self.lane if each.alive]

    # -- faults --------------------------------------------------------------------------------------------------------

    def set_cut(self, what: str, one: int, other: int, cut: bool) -> None:
        key = (what, min(one, other), max(one, other))
        (self.cut.add if cut else self.cut.discard)(key)

    def heal(self) -> None:
        self.cut.clear()
        self.loss = 0.0

    def kill(self, lane: int) -> None:
        self.lane[lane].alive = False
        for other in self.others(lane):
            self._disconnect(lane, other)

    def revive(self, lane: int, *, disk: bool) -> None:
        each = self.lane[lane]
        assert not each.alive
        each.alive = True
        log = each.log
        if not disk:
            log = MembershipLog.begin(self.lanes)
            each.own.clear()
            each.rounds.clear()
            del each.weights[1:]
            for kept in each.got.values():
                kept.clear()
        else:
            back = self.random.randint(0, each.used)
            del each.rounds[back:], each.weights[back + 1 :]
        each.start(log)

    # -- time ----------------------------------------------------------------------------------------------------------

    def run(self, seconds: float, tick_s: float = 0.5) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += tick_s
            self.tick()

    def tick(self) -> None:
        for one in range(self.lanes):
            for other in range(one + 1, self.lanes):
                up = self._up("status", one, other)
                if up and (one, other) not in self.connected:
                    self.connected.add((one, other))
                elif not up and (one, other) in self.connected:
                    self._disconnect(one, other)
        for pair in self.statuses:
            self._deliver(*pair)
        for lane in self.living:
            lane.step()
        for (one, other), way in self.statuses.items():
            if (min(one, other), max(one, other)) in self.connected:
                way.send(self.now_s, self._delay(one, other), self.lane[one].membership.status())
            if self._up("body", one, other):
                self._send_body(one, other)

    def _up(self, what: str, one: int, other: int) -> bool:
        living = self.lane[one].alive and self.lane[other].alive
        return living and (what, min(one, other), max(one, other)) not in self.cut

    def _delay(self, one: int, other: int) -> float:
        return self.latency_s[one, other] * self.random.uniform(0.5, 1.5)

    def _disconnect(self, one: int, other: int) -> None:
        self.connected.discard((min(one, other), max(one, other)))
        for a, b in ((one, other), (other, one)):
            self.statuses[a, b].pieces.clear()
            self.bodies[a, b].pieces.clear()
            self.lane[a].membership.part(b)

    def _deliver(self, one: int, other: int) -> None:
        to = self.lane[other]
        for status in self.statuses[one, other].arrived(self.now_s):
            to.hear(one, status)
        if not self._up("body", one, other):
            self.bodies[one, other].pieces.clear()
        for round, contribution in self.bodies[one, other].arrived(self.now_s):
            if contribution.name == to.name(one, round) and (one, round) not in self.nonsense:
                to.got[one][round] = contribution
                self.held_once.add((other, one, round, contribution.content))

    def _send_body(self, one: int, other: int) -> None:
        """The next round that the other one lacks and is not on its way, if both know it by the same name."""
        way = self.bodies[one, other]
        if len(way.pieces) >= ROUNDS_AHEAD or self.random.random() < self.loss:
            return
        round = max([self.lane[other].count(one), *(1 + number for _, (number, _) in way.pieces)])
        wanted, found = self.lane[other].name(one, round), self.lane[one].own.get(round)
        if found is not None and wanted == found.name:
            way.send(self.now_s, self._delay(one, other), (round, found))

    # -- what is watched -----------------------------------------------------------------------------------------------

    def on_use(self, lane: Lane, round: int) -> None:
        """A lane goes on with what its own log says, and with nothing else."""

    def on_decision(self, lane: Lane, before: MembershipLog, heard: MembershipLog | None = None) -> None:
        after = lane.log
        if heard is not None and (before.yields_to(heard)):
            before = heard
        for round in range(before.decided, after.decided):
            self.decisions.append((lane.lane, round, after))
            for one in after.members_of(round):
                for other in after.members_of(round):
                    if one != other and one == lane.lane:
                        assert lane.valid(other, round), f"lane {one} decides round {round} without {other}'s"


def by_stay(lane: Lane, of: int, round: int) -> Name:
    """As both learn from the log: with which round that lane last entered."""
    entry = lane.entry_of(of, round)
    return entry.first if entry else 0


def by_history(lane: Lane, of: int, round: int) -> Name:
    """How it entered, and the members of all rounds that were used before."""
    used, lanes = max(0, round - lane.grid.delay), lane.grid.lanes
    return lane.log.history_of(of, round, used, lane.membership.admitted, lanes=lanes)


def entry_of(membership: RoundMembership) -> Entry | None:
    """Of its own lane, where that has been admitted and the round is not decided yet."""
    return next((each for each in membership.admitted if each.lane == membership.lane), None)


def is_out(membership: RoundMembership) -> bool:
    """The others go on without its lane, and it has not been admitted again."""
    return membership.lane not in membership.log.members and entry_of(membership) is None
