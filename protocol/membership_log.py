"""Which lanes were members of which rounds: the log that all lanes of a run agree on, as plain values.

A round is decided once. What it does to the weights is then a function of its members and their contributions, so this
log, with the settings and the text, says how the whole run came out: one process can do it again to the same bits. It
is short, because members change seldom: a list of *stretches* of rounds with the same members.

A lane that is left out may come back. It *enters*: it takes up the state that some lane had after `copied` steps, adds
all rounds since then without having trained, trains from `begins` on, and contributes to round `first` and those after
it.

Two parts of a run that could not hear each other may have decided on their own. When they meet, one log counts: at the
first round in which they differ, that with more members, then that with the lower lanes. Whoever holds the other one
has left the run at that round, and comes back to it as any lane does. So there is no quorum, and the last lane that is
left may train on alone. Why not a consensus protocol (Raft, Paxos): two lanes, the smallest grid, would stop as soon as
one is gone.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, replace

import xxhash

STRETCHES_MAX = 4096
LOG_BYTES_MAX = 200_000  # as it lies in a frame, which holds little more
HISTORY_MAX = 2**48


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Entry:
    """How `lane` came (back) into the run. first: the round that it contributes to first. begins: steps after which it
    trains on. source, copied: the lane whose state it took up, and after how many steps."""

    lane: int
    first: int
    begins: int
    source: int
    copied: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """From round `first` on, up to the next stretch, `members` contribute. entered: those that are new with it."""

    first: int
    members: tuple[int, ...]  # rising
    entered: tuple[Entry, ...] = ()  # by lane, rising

    def rank(self) -> tuple[int, tuple[int, ...], tuple[Entry, ...]]:
        """What of two decisions on the same round counts is the lower one."""
        return -len(self.members), self.members, self.entered


@dataclass(frozen=True, slots=True)
class MembershipLog:
    """stretches: rising, the first from round 0. decided: how many rounds are."""

    stretches: tuple[Stretch, ...]
    decided: int = 0

    @classmethod
    def begin(cls, lanes: int) -> MembershipLog:
        """Of a run that begins: all lanes, nothing decided."""
        return cls((Stretch(first=0, members=tuple(range(lanes))),))

    @property
    def members(self) -> tuple[int, ...]:
        """Of the newest round that was decided, or of the first one."""
        return self.stretches[-1].members

    @property
    def is_full(self) -> bool:
        """Whether a frame has room for no more than that all members leave, one after the other: nobody may enter any
        more."""
        later, count = len(self.members), sum(len(each.members) + 32 * len(each.entered) for each in self.stretches)
        most = LOG_BYTES_MAX - 128 * later
        return len(self.stretches) + later >= STRETCHES_MAX or count + 16 * len(self.stretches) >= most

    def at(self, round: int) -> Stretch:
        """The stretch that `round` belongs to, be it decided or not."""
        return self.stretches[bisect_right(self.stretches, round, key=lambda each: each.first) - 1]

    def members_of(self, round: int) -> tuple[int, ...]:
        """Raises IndexError for a round that is not decided."""
        if not 0 <= round < self.decided:
            raise IndexError(f"round {round} is not decided, {self.decided} are")
        return self.at(round).members

    def then(self, members: tuple[int, ...], entered: tuple[Entry, ...] = ()) -> MembershipLog:
        """The log once one more round is decided."""
        stretches, new = self.stretches, Stretch(first=self.decided, members=members, entered=entered)
        if members != self.members or entered:
            # What no round was decided by is void.
            stretches = (*(each for each in stretches if each.first < new.first), new)
        return MembershipLog(stretches, self.decided + 1)

    def expecting(self, admitted: tuple[Entry, ...]) -> MembershipLog:
        """The same as it will be if all who are admitted come."""
        stretches = self.stretches
        for entry in sorted(admitted, key=lambda each: each.first):
            last = stretches[-1]
            members, entered = tuple(sorted({*last.members, entry.lane})), (entry,)
            if last.first == entry.first:
                stretches, entered = stretches[:-1], tuple(sorted((*last.entered, entry)))
            stretches = (*stretches, Stretch(first=entry.first, members=members, entered=entered))
        return MembershipLog(stretches, self.decided)

    def differs_from(self, other: MembershipLog) -> int | None:
        """The first round that is decided in both, and otherwise; None: one goes on where the other one ends."""
        if self.stretches == other.stretches:
            return None
        decided = min(self.decided, other.decided)
        for first in sorted({each.first for log in (self, other) for each in log.stretches if each.first < decided}):
            mine, others = self.at(first), other.at(first)
            entered = [each.entered if each.first == first else () for each in (mine, others)]
            if mine.members != others.members or entered[0] != entered[1]:
                return first
        return None

    def yields_to(self, other: MembershipLog) -> bool:
        """Whether `other` counts and not this one: it says more, or is before it where they differ."""
        first = self.differs_from(other)
        if first is None:
            return other.decided > self.decided
        return _as_of(other, first).rank() < _as_of(self, first).rank()

    def contributed_before(self) -> dict[int, int]:
        """By lane that ever was one: the round after the last decided one that it is a member of."""
        ends = [*(each.first for each in self.stretches[1:]), self.decided]
        last: dict[int, int] = {}
        for stretch, end in zip(self.stretches, ends, strict=True):
            last |= dict.fromkeys(stretch.members, end)
        return last

    # -- one lane's part ----------------------------------------------------------------------------------------------

    def entries_of(self, lane: int) -> list[Entry]:
        """When that lane came back, in order."""
        return [entry for each in self.stretches for entry in each.entered if entry.lane == lane]

    def history_of(
        self, lane: int, round: int, used: int, admitted: tuple[Entry, ...] = (), *, lanes: int | None = None
    ) -> int:
        """A number below HISTORY_MAX for all that the lane's contribution to `round` depends on: how the lane entered
        last, and who were the members of the rounds that it had used, of which there are `used`. Two contributions of
        one lane to one round that have the same number are the same bytes. admitted: who is to enter. lanes: how many
        the run has; 0 then says that all of them were members of all, so the number stays while nobody leaves.

        Since when it is a member (`joined_at`) does not tell them apart: a lane that had used what others decided makes
        other contributions once it goes by this log, and may be a member all along by both.
        """
        entries = [each for each in (*self.entries_of(lane), *admitted) if each.lane == lane and each.first <= round]
        before = [each for each in self.stretches if each.first < used]
        if lanes is not None and before and before[0].members == tuple(range(lanes)):
            before = before[1:]
        if not entries and not before:
            return 0
        numbers = [len(entries[-1:]), *(number for each in entries[-1:] for number in _numbers(each))]
        for each in before:
            numbers += [each.first, len(each.members), *each.members, len(each.entered)]
            numbers += [number for entry in each.entered for number in _numbers(entry)]
        return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(numbers)}Q", *numbers)) % HISTORY_MAX

    def joined_at(self, lane: int, round: int) -> int | None:
        """Of the rounds that the lane is a member of without a break, up to and with `round`: the first. None: it is no
        member of it. For a round that is not decided, as if the newest members stayed."""
        first = None
        for each in self.stretches:
            if each.first > round:
                break
            if lane not in each.members:
                first = None
            elif first is None or any(entry.lane == lane for entry in each.entered):
                first = each.first
        return first

    def next_stay(self, lane: int, round: int) -> int | None:
        """The first round from `round` on of which the lane is a member; None: as far as is known, of none."""
        if self.joined_at(lane, round) is not None:
            return round
        return next((each.first for each in self.stretches if each.first > round and lane in each.members), None)

    def left_at(self, lane: int) -> int | None:
        """The first round of those that go on without the lane; None: it is a member."""
        if lane in self.members:
            return None
        later = [each.first for each in self.stretches if lane in each.members]
        last = later[-1] if later else -1
        return next(each.first for each in self.stretches if each.first > last)

    def left_before(self, entry: Entry) -> int:
        """The first of the rounds that the lane of an entry missed before it."""
        before = [each for each in self.stretches if each.first < entry.first]
        last = max((place for place, each in enumerate(before) if entry.lane in each.members), default=-1)
        return before[last + 1].first if last + 1 < len(before) else entry.first

    def parts_from(self, other: MembershipLog, lane: int) -> int | None:
        """The first round in which the lane's part differs in the two: it is a member in one alone, or since
        another round. None: in none. Rounds that one of them has not decided count as if its newest members stayed."""
        for first in sorted({each.first for log in (self, other) for each in log.stretches}):
            if self.joined_at(lane, first) != other.joined_at(lane, first):
                return first
        return None


def _numbers(entry: Entry) -> tuple[int, ...]:
    return entry.lane, entry.first, entry.begins, entry.source, entry.copied


def _as_of(log: MembershipLog, round: int) -> Stretch:
    stretch = log.at(round)
    return stretch if stretch.first == round else replace(stretch, entered=())
