"""Who decides which lanes are members of a round, and when: one lane's view of it, sans-IO.

The nodes of stage 0 speak for their lanes. Each tells the others how far its lane is: from each lane, how many rounds
of contributions *all its stages hold* (`LaneStatus.held`). A round is decided when its members hold each other's
contributions, so a decision never waits for bytes that may not come; and it is not used before it is decided.

The lowest of the members decides, at once where all are complete. What is lacking is waited for up to
`deadline_s` from when this lane itself was complete; then the round goes on without. If nothing is heard of a decision
either, the next lane decides after half as long again, and so on; who can decide for less than half of the members
does after all others. All pass on the newest log that they know. Two that decide at the same time are settled by the
log itself (`protocol.membership_log`). What a lane says counts only while it goes by a log that agrees.

A lane that is left out says from where it goes on (`LaneStatus.returning`), fetches what it missed like any other
contribution, and is admitted to a round that nobody has made yet, so that nobody waits for it. It may be some rounds
behind, as who is far away always is, but must have got, or be able to get, all contributions that were used. If no
member is there any more, the lowest lane that has got all enters by itself.

Inputs: `report`, `hear`, `part`, `tick`. What to write down, say and do next is in `log`, `admitted` and `status`.
Times are given, in seconds of one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from .lane_status import LaneStatus
from .membership_log import Entry, MembershipLog
from .missed_rounds import MissedRounds
from .round_messages import STATUS_NUMBERS

SUCCESSION = 0.5  # of the deadline: how much later each next lane decides
ENDED_S = 10.0  # after which a lane that has ended is waited for no longer
BEHIND_MAX = 8  # rounds: who follows over a long way is never nearer to rounds that are short


class RoundMembership:
    """Lane `lane` of `lanes`, which goes on from `log`. begins: for a round, after how many steps it is made; None for
    one that a lane cannot enter before: past the last, or made together with the next one."""

    def __init__(
        self, lane: int, lanes: int, *, deadline_s: float, begins: Callable[[int], int | None], log: MembershipLog
    ) -> None:
        self.lane, self.lanes = lane, lanes
        self.log = log
        self.admitted: tuple[Entry, ...] = ()
        self.returning = self.source = self.saved = self.kept = self.forgot = 0
        self.frozen = False  # this lane is to end: it decides nothing more because of time
        self._deadline_s, self._begins = deadline_s, begins
        self._held = (0,) * lanes
        self._peers: dict[int, LaneStatus] = {}  # who is connected
        self._preparing: set[int] = set()  # who has not begun yet
        self._ended: set[int] = set()
        self._since_s: tuple[int, float] | None = None  # the round that this lane waits in, and since when
        self._in_vain_s: float | None = None  # since when this lane, which is to end, waits for nobody who could come
        self._missed = MissedRounds(lane, deadline_s=deadline_s, ended_s=ENDED_S)
        self._gone_s: float | None = None  # since when no member is there, of a lane that is none

    # -- inputs -------------------------------------------------------------------------------------------------------

    def report(self, held: tuple[int, ...], now_s: float) -> None:
        """How far this lane is."""
        self._held = held
        self.tick(now_s)

    def hear(self, peer: int, status: LaneStatus, now_s: float) -> None:
        """What another lane says."""
        if peer not in self._peers:  # on the connection on which it ended it may still pass on what it knows
            self._ended.discard(peer)
        self._peers[peer] = status
        self._missed.hear(peer, status.kept)
        if self.log.yields_to(status.log):
            self._take(status.log)
        if not self.log.yields_to(status.log) and self.log.differs_from(status.log) is None:
            self._learn(status.admitted, of=peer)
        self.tick(now_s)

    def prepares(self, peer: int, preparing: bool) -> None:
        """Whether that lane still prepares its data."""
        (self._preparing.add if preparing else self._preparing.discard)(peer)

    def part(self, peer: int, *, ended: bool = False) -> None:
        """It is not connected any more, or needs nothing more and makes no more contributions."""
        self._preparing.discard(peer)
        if ended:
            self._ended.add(peer)
        else:
            self._peers.pop(peer, None)

    def tick(self, now_s: float) -> None:
        """Decide whatever can be decided now."""
        self._missed.look({lane for lane in range(self.lanes) if lane not in self._peers}, now_s)
        self._since_s = self._waits(now_s)
        while self._decides(now_s):
            self._since_s = self._waits(now_s)
        self._admit()
        self._take_over(now_s)
        in_vain = self.frozen and self._since_s is not None and self._waits_in_vain()
        self._in_vain_s = None if not in_vain else now_s if self._in_vain_s is None else self._in_vain_s

    def paused(self) -> None:
        """This process did not run for a while: what it waited for is waited for anew."""
        self._since_s = self._gone_s = None
        self._missed.paused()

    # -- what is known ------------------------------------------------------------------------------------------------

    def status(self) -> LaneStatus:
        """What this lane says."""
        numbers = {each: getattr(self, each) for each in STATUS_NUMBERS}
        return LaneStatus(held=self._held, log=self.log, admitted=self.admitted, **numbers)

    def is_there(self, lane: int) -> bool:
        """Whether that lane is connected."""
        return lane in self._peers

    def is_in_vain(self, now_s: float) -> bool:
        """Whether this lane, which is to end, has waited in a round for long enough for lanes that have ended before
        it: nobody is left out for that."""
        return self._in_vain_s is not None and now_s >= self._in_vain_s + ENDED_S

    def _waits_in_vain(self) -> bool:
        awaited = [*self.lacking()] or [lane for lane in self._candidates()[:1] if lane != self.lane]  # who decides
        return all(lane in self._ended or lane not in self._peers for lane in awaited)

    def lacking(self) -> dict[int, str]:
        """For whom the next round waits, by lane, in words."""
        due = {}
        for lane in self._candidates():
            if lane != self.lane and not self._mutual(self.lane, lane, self.log.decided):
                status = self._peers.get(lane)
                due[lane] = "it is not connected" if status is None else f"it has made {status.held[lane]} rounds"
        return due

    def state_to_take(
        self, rounds_before: Callable[[int], tuple[int, int]], without: Collection[tuple[int, int]] = ()
    ) -> tuple[int, int] | None:
        """Where this lane, which was left out, lacks rounds that nobody can give any more, or that it may not ask for:
        the lane whose state it can take up instead, and after how many steps. None: nobody has one that would do.
        rounds_before: for a number of steps, how many rounds are made after them, and the first that who goes on from
        there needs. without: those that were tried in vain."""
        there = {lane: self._peers[lane] for lane in self.log.members if lane in self._peers}
        gone, left = [status.kept for status in there.values()], self.log.left_at(self.lane)
        if left is None:
            return None
        for lane, status in sorted(there.items(), key=lambda each: (-each[1].saved, each[0])):
            made, first = rounds_before(status.saved)
            # What is under way in that state must not be of rounds that this lane has a part in.
            does = status.saved and min(made, first) >= left and first >= max(self.forgot, *gone)
            if does and (lane, status.saved) not in without:
                return lane, status.saved
        return None

    def lacks_what_is_gone(self, now_s: float) -> bool:
        """Whether this lane, which was left out, lacks rounds that who made them can give no more."""
        if self.log.left_at(self.lane) is None:
            return False
        return self._missed.are_gone(self.log, self._held, now_s, ended=self._ended)

    # -- within -------------------------------------------------------------------------------------------------------

    def _take(self, log: MembershipLog) -> None:
        """Another log counts."""
        first = self.log.differs_from(log)
        self.log = log
        if first is not None:  # what is held by the other one is not what counts, until that is reported anew
            self.admitted, self._held = (), (0,) * self.lanes
            self._missed.forget()
        self._since_s = None
        self._sort_out()

    def _learn(self, admitted: tuple[Entry, ...], *, of: int) -> None:
        """What lane `of` knows. Two lanes may have admitted the same one, each by itself: its own word counts."""
        known = {each.lane: each for each in self.admitted}
        for each in admitted:
            if each.lane not in known or (each.lane == of != self.lane):
                known[each.lane] = each
        self.admitted = tuple(sorted(known.values()))
        self._sort_out()

    def _sort_out(self) -> None:
        """Whose round has been decided is not to enter any more: it is a member, or its time has passed."""
        self.admitted = tuple(each for each in self.admitted if each.first >= self.log.decided)

    def _candidates(self) -> tuple[int, ...]:
        """Who is to be a member of the next round. Who is admitted to it may not have heard of it yet: rounds can be
        shorter than the way there and back."""
        due = [each for each in self.admitted if each.first <= self.log.decided]
        new = {each.lane for each in due if self._confirmed(each) or self._may_confirm(each)}
        return tuple(sorted({*self.log.members, *new}))

    def _may_confirm(self, entry: Entry) -> bool:
        """Whether that lane does not say that it enters otherwise. It may be gone for a moment: links begin anew when
        who is expected changes."""
        status = self._peers.get(entry.lane)
        said = [each for each in status.admitted if each.lane == entry.lane] if status else []
        return all(each.first < self.log.decided for each in said)  # that passed

    def _agreeing(self, lane: int) -> LaneStatus | None:
        """What another lane said last, if by a log that this one may go on from: what it made and held by another one
        are other bytes."""
        status = self._peers.get(lane)
        return status if status and status.log.differs_from(self.log) is None else None

    def _confirmed(self, entry: Entry) -> bool:
        """Whether that lane itself says that it enters so."""
        return entry.lane == self.lane or (
            (status := self._agreeing(entry.lane)) is not None and entry in status.admitted
        )

    def _held_by(self, lane: int) -> tuple[int, ...]:
        if lane == self.lane:
            return self._held
        status = self._agreeing(lane)
        return status.held if status else (0,) * self.lanes

    def _mutual(self, one: int, other: int, round: int) -> bool:
        """Whether both hold both contributions: who has not made its own may not know yet by which log it will."""
        return all(self._held_by(holder)[maker] > round for holder in (one, other) for maker in (one, other))

    def _complete(self, lanes: tuple[int, ...], round: int) -> bool:
        new = [each for each in self.admitted if each.lane in lanes and each.lane not in self.log.members]
        return all(self._confirmed(each) for each in new) and all(
            self._mutual(one, other, round) for one in lanes for other in lanes if one <= other
        )

    def _waits(self, now_s: float) -> tuple[int, float] | None:
        """Since when this lane has all that it can have for the next round by itself."""
        round = self.log.decided
        if self.lane not in self._candidates() or self._held[self.lane] <= round:
            return None
        if self._since_s is not None and self._since_s[0] == round:
            return self._since_s
        return round, now_s

    def _decides(self, now_s: float) -> bool:
        """Decide the next round, if that is due here."""
        if self._since_s is None:
            return False
        round, since_s = self._since_s
        candidates = self._candidates()
        place = candidates.index(self.lane)
        if place == 0 and self._complete(candidates, round):
            self._decide(candidates)
            return True
        if self.frozen:
            return False
        # Who waits in a round says so in the same words as who prepares its data, but has contributed to it.
        if round == 0 and any(lane in self._preparing and not self._held_by(lane)[lane] for lane in candidates):
            self._since_s = round, now_s
            return False
        lacking = [lane for lane in candidates if lane != self.lane and not self._mutual(self.lane, lane, round)]
        ended = bool(lacking) and all(lane in self._ended for lane in lacking)
        deadline_s = min(self._deadline_s, ENDED_S) if ended else self._deadline_s
        if now_s < since_s + deadline_s + place * SUCCESSION * self._deadline_s:
            return False
        members: tuple[int, ...] = (self.lane,)
        for lane in candidates:
            if lane != self.lane and self._complete(grown := tuple(sorted((*members, lane))), round):
                members = grown
        # Who has most of the lanes decides before who has few: those would all have to come back.
        most = 2 * len(members) > len(candidates) or (2 * len(members) == len(candidates) and candidates[0] in members)
        if not most and now_s < since_s + deadline_s + (place + len(candidates)) * SUCCESSION * self._deadline_s:
            return False
        # A lower lane may have decided already, with the word of it on its way: it is in where it can be, or all would
        # have to go back to this round once it is there again.
        lower = [lane for lane in candidates[:place] if all(self._held_by(each)[lane] > round for each in members)]
        self._decide(tuple(sorted({*members, *lower})))
        if self._held[self.lane] > round + 1:  # those who lack in that one, too, were waited for
            self._since_s = round + 1, since_s
        return True

    def _decide(self, members: tuple[int, ...]) -> None:
        round = self.log.decided
        entered = tuple(each for each in self.admitted if each.first == round and each.lane in members)
        self.log = self.log.then(members, entered)
        self._sort_out()

    def _admit(self) -> None:
        """The lowest member admits who has come back and has all that was decided."""
        members = self.log.members
        if not members or members[0] != self.lane or self.frozen or self.log.is_full:
            return
        present = [lane for lane in members if lane == self.lane or lane in self._peers]
        made = max(self._held_by(lane)[lane] for lane in present)
        for lane, status in sorted(self._peers.items()):
            if lane in members or not status.returning or any(each.lane == lane for each in self.admitted):
                continue
            behind = self._behind(lane, status)
            if behind is None or behind > BEHIND_MAX:
                continue
            before = max(made, self.log.decided) + behind
            begins = self._begins(before)
            if begins is not None:
                source = status.source - 1 if status.source else lane
                entry = Entry(lane=lane, first=before + 1, begins=begins, source=source, copied=status.returning - 1)
                self._learn((entry,), of=self.lane)

    def _take_over(self, now_s: float) -> None:
        """All members are gone, and this lane, which is none, has got all that they did: it enters by itself. A lower
        one does so before it."""
        round, lower = self.log.decided, [each.lane for each in self.admitted if each.lane != self.lane]
        there = [lane for lane in (*self.log.members, *lower) if lane in self._peers and lane not in self._ended]
        if self.lane in self.log.members or there or self.frozen or self.log.is_full:
            self._gone_s = None
            return
        self._gone_s = now_s if self._gone_s is None else self._gone_s
        begins = self._begins(round - 1) if round and self.returning else None
        begins = None if begins is None or begins < self.returning else begins  # it copied what is later
        if now_s < self._gone_s + self._deadline_s * (1 + SUCCESSION * (self.lanes + self.lane)) or begins is None:
            return
        needed = self.log.contributed_before()
        if all(self._held[lane] >= needed[lane] for lane in needed if lane != self.lane):
            source = self.source - 1 if self.source else self.lane
            known = {"lane": self.lane, "source": source, "copied": self.returning - 1}
            others = [each for each in self.admitted if each.lane != self.lane]
            self.admitted = tuple(sorted([*others, Entry(first=round, begins=begins, **known)]))

    def _behind(self, lane: int, status: LaneStatus) -> int | None:
        """How many decided rounds that lane does not know or has not got yet; None: it can never follow, for it lacks
        contributions of one that is gone, or has them no more, or goes by another log."""
        if status.log.differs_from(self.log) is not None:
            return None
        behind = max(0, self.log.decided - status.log.decided)
        for other, needed in self.log.contributed_before().items():
            lacking = needed - status.held[other]
            if other != lane and lacking > 0:
                if other != self.lane and other not in self._peers:
                    return None
                kept = self.kept if other == self.lane else self._peers[other].kept
                if status.held[other] < kept:
                    return None  # it has yet to notice, and would be waited for in vain
                behind = max(behind, lacking)
        return behind
