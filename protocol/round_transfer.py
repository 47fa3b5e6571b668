"""Contributions to rounds on their way between two lanes, sans-IO: who may send what, and when.

At fixed steps every node gives the nodes of its own stage in all other lanes some bytes, its *contribution* to that
*round*, and needs theirs. A contribution is a function of the node's state alone, so a node that was set back to an
earlier step makes the same bytes again, and may need those of the others again. It is named by its stage, lane and
round, and it never matters over which connection, in which life of a process or how often it came.

So each direction is a pull. The receiver says what it lacks first (`RoundsWanted`: a round, and a byte in it), and the
sender sends that, and the rounds after it as they are made. The receiver reports how far it is (`RoundsReceived`), and
the sender keeps at most `window_bytes` ahead of the last report. After a broken connection, or a restart of either end,
the receiver names its place again, and what it has is not sent twice.

A lane that was left out, or went by another log of members than counts, has made other contributions, meanwhile, than
those that are wanted. So a receiver also says of which *stay* of that lane it wants them: a number for what the lane
had used before, as both find it in their logs (`MembershipLog.history_of`). While the two disagree nothing is sent: one
of them will learn better. A receiver that learns better asks anew, on another connection.

Two more numbers ride on those frames. `forget_before` is a promise never to ask for earlier rounds again, so that the
sender may drop them. `granted_before` bounds what comes unasked: nothing of a round that is much later than the one
that the receiver is at. Neither is taken back while a connection lasts.

Why not as messages of the tensors' session: that one numbers what belongs to one generation of one lane, keeps it in
memory, and ends when a process does. A contribution has tens of megabytes, outlives both, and is on a disk anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .copy_transfer import PARTS_TOGETHER
from .errors import Fault, LocalProtocolError, RemoteProtocolError
from .round_messages import RoundPart, RoundsReceived, RoundsWanted

# A receiver acknowledges PARTS_TOGETHER at once; a sender that keeps fewer than twice as many ahead would wait for it.
WINDOW_PARTS_LEAST = 2 * PARTS_TOGETHER
# Granted beyond the newest round that this node is at: more than a round that is applied some steps later needs.
ROUNDS_AHEAD = 4

Position = tuple[int, int]  # round, byte in that round's contribution: everything before it is there
ContributionBytes = Callable[[int], int]  # of a round, by the configuration: any round, and 1 or more
StayOf = Callable[[int], int | None]  # of a round: the history that a lane's contribution follows from; None: no member


def always(round: int) -> int | None:
    """The stay of a lane that has been there from the first round on."""
    del round
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What is known of a whole one. xxh3: of all of its bytes."""

    total_bytes: int
    xxh3: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRange:
    """Which bytes are due to be sent: read them, and `RoundSender.part` makes the frame."""

    round: int
    offset: int
    length: int


class RoundSender:
    """What this node sends to one peer. kept: its own contributions by round; whoever owns the mapping changes it.
    stay_of: of this node's lane."""

    def __init__(
        self,
        kept: Mapping[int, Contribution],
        contribution_bytes: ContributionBytes,
        *,
        part_bytes: int,
        window_bytes: int,
        stay_of: StayOf = always,
    ) -> None:
        if part_bytes <= 0 or window_bytes < WINDOW_PARTS_LEAST * part_bytes:
            raise ValueError(f"parts of {part_bytes} bytes in a window of {window_bytes}")
        self._kept, self._contribution_bytes = kept, contribution_bytes
        self._part_bytes, self._window_bytes = part_bytes, window_bytes
        self._stay_of, self._stay = stay_of, 0
        self.patient = False  # what is gone is not refused: the peer was left out, and may do without it
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if there had never been a connection."""
        self.forget_before = 0  # the peer will not ask for an earlier round
        self.acknowledged: Position = (0, 0)  # on the present connection, or on the last one
        self.reset()

    def reset(self) -> None:
        """A connection has ended, and with it what it agreed on; the promise holds until the next one."""
        self._next: Position | None = None  # None: the peer has not said where it is
        self._granted_before = 0
        self.unacknowledged_bytes = 0
        self._under_way: deque[tuple[Position, int]] = deque()  # where each part ends, and its bytes

    def wanted(self, frame: RoundsWanted) -> None:
        """The peer says where it is. Raises RemoteProtocolError if it cannot be there."""
        if frame.offset and frame.offset >= (total := self._contribution_bytes(frame.round)):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"byte {frame.offset} of round {frame.round} of {total} bytes")
        self._next = self.acknowledged = (frame.round, frame.offset)
        self._stay = frame.stay
        # Who was here before may have been another process, or a stranger that knew how to greet: this one counts.
        self._granted_before, self.forget_before = frame.granted_before, frame.forget_before

    def received(self, frame: RoundsReceived) -> None:
        """The peer has got so far. Raises RemoteProtocolError for a place where no part ends that was sent."""
        position = (frame.round, frame.offset)
        ends = [self.acknowledged, *(end for end, _ in self._under_way)]
        if position not in ends:
            raise RemoteProtocolError(
                Fault.OUT_OF_ORDER,
                f"byte {frame.offset} of round {frame.round} acknowledged, where parts from {ends[0]} to {ends[-1]} "
                "were sent",
            )
        while self._under_way and self._under_way[0][0] <= position:
            self.unacknowledged_bytes -= self._under_way.popleft()[1]
        self.acknowledged = position
        self._granted_before = max(self._granted_before, frame.granted_before)
        self.forget_before = max(self.forget_before, frame.forget_before)

    def stop(self) -> None:
        """The peer needs nothing more."""
        self._next = None

    def next(self, most: int = PARTS_TOGETHER) -> list[PartRange]:
        """At most so many parts that may leave now, in order; none: wait for the peer, or for the next contribution.

        Raises RemoteProtocolError if the peer asks for what is gone here and will not be made again.
        """
        ranges: list[PartRange] = []
        while self._next is not None and len(ranges) < most:
            round, offset = self._next
            if round >= self._granted_before or self._stay_of(round) != self._stay:
                break
            contribution = self._kept.get(round)
            if contribution is None:
                if not self.patient:
                    self._check_still_to_come(round)
                break
            length = min(self._part_bytes, contribution.total_bytes - offset)
            if self.unacknowledged_bytes and self.unacknowledged_bytes + length > self._window_bytes:
                break
            end = offset + length
            self._next = (round + 1, 0) if end == contribution.total_bytes else (round, end)
            self._under_way.append((self._next, length))
            self.unacknowledged_bytes += length
            ranges.append(PartRange(round=round, offset=offset, length=length))
        return ranges

    def _check_still_to_come(self, round: int) -> None:
        """Rounds are made in order, so one that is missing before a later one is lost."""
        if round < (newest := max(self._kept, default=0)):
            raise RemoteProtocolError(
                Fault.RESUME, f"round {round} is asked for, of which nothing is kept any more; {newest} is the newest"
            )

    def part(self, range: PartRange, data: bytes | memoryview) -> RoundPart:
        """The frame for these bytes."""
        contribution = self._kept[range.round]
        return RoundPart(
            round=range.round,
            offset=range.offset,
            total_bytes=contribution.total_bytes,
            contribution_xxh3=contribution.xxh3,
            data=data,
        )


class RoundReceiver:
    """What this node receives from one peer, and what it tells that peer of it."""

    def __init__(self, contribution_bytes: ContributionBytes) -> None:
        self._contribution_bytes = contribution_bytes
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if this node had never been at a round."""
        self.forget_before: int | None = None  # None: this node does not know yet from where it goes on
        self._need = -1  # the newest round that this node is at
        self.reset()

    def reset(self) -> None:
        """A connection has ended: what came on it and was not written is lost."""
        self._due: Position | None = None  # where the next part has to begin; None: nothing was asked for
        self._written: Position = (0, 0)
        self._xxh3: int | None = None  # of the contribution that is under way
        self._parts = 0  # that came and are not written
        self.faulty: int | None = None  # a round whose contribution is not of the agreed size, or changed on its way
        self._told_granted = self._told_forget = 0

    # -- what this node does ------------------------------------------------------------------------------------------

    def forget(self, before: int) -> None:
        """This node will never need an earlier round again. Said once before anything is asked for, then now and then;
        lower numbers change nothing."""
        self.forget_before = max(before, self.forget_before or 0)

    def need(self, round: int) -> None:
        """This node has come to that round: it has made its own contribution, or waits for those of others."""
        self._need = max(self._need, round)

    @property
    def asked(self) -> bool:
        """RoundsWanted was said on this connection."""
        return self._due is not None

    @property
    def granted_before(self) -> int:
        """No part of this round, or of a later one, may come."""
        return max(self.forget_before or 0, self._need + 1) + ROUNDS_AHEAD

    @property
    def tell_due(self) -> bool:
        """Whether `received` is worth a frame although nothing has come: much was granted, or may be forgotten."""
        granted = self.granted_before - self._told_granted >= ROUNDS_AHEAD // 2
        return self.asked and (granted or self._forgettable != self._told_forget)

    @property
    def _forgettable(self) -> int:
        """Who drops what is on its way would have to send it all the same."""
        return min(self.forget_before or 0, self._written[0])

    @property
    def jumped(self) -> bool:
        """This node needs nothing any more of what it has asked for: it has to ask anew, on another connection."""
        return self._due is not None and self._due[0] < (self.forget_before or 0)

    @property
    def goes_on_with(self) -> int | None:
        """The round that the next part begins, if all that came before it is written."""
        return self._due[0] if self._due is not None and not (self._due[1] or self._parts) else None

    @property
    def write_due(self) -> bool:
        """What came is to be written now, and acknowledged."""
        return self._parts >= PARTS_TOGETHER or (self._parts > 0 and self._due is not None and self._due[1] == 0)

    def wanted(self, position: Position, xxh3: int | None = None, *, stay: int = 0) -> RoundsWanted:
        """The first frame of this direction. position: where what is here ends; xxh3: of the contribution of which a
        part is here; stay: the peer's, by what is known here."""
        if self.forget_before is None or position[0] < self.forget_before:
            raise LocalProtocolError(
                Fault.UNEXPECTED, f"round {position[0]} is asked for, forgotten is all before {self.forget_before}"
            )
        self._due = self._written = position
        self._xxh3 = xxh3 if position[1] else None
        # Whoever was here before may have had more than what is granted by now: that is where it goes on.
        self._need = max(self._need, position[0] - ROUNDS_AHEAD)
        granted, forget = self._tell()
        first, offset = position
        return RoundsWanted(round=first, offset=offset, granted_before=granted, forget_before=forget, stay=stay)

    def received(self) -> RoundsReceived:
        """Where this node is: what it has written, what it grants, what may be forgotten."""
        granted, forget = self._tell()
        round, offset = self._written
        return RoundsReceived(round=round, offset=offset, granted_before=granted, forget_before=forget)

    def _tell(self) -> tuple[int, int]:
        self._told_granted, self._told_forget = self.granted_before, self._forgettable
        return self._told_granted, self._told_forget

    # -- what comes ---------------------------------------------------------------------------------------------------

    def take(self, part: RoundPart) -> bool:
        """The next part came; whether it was the last one of its contribution. Raises RemoteProtocolError unless it
        goes on where the last one ended, in a contribution of the size that the configuration says."""
        if self._due is None:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"bytes of round {part.round}, of which nothing was asked for")
        if (part.round, part.offset) != self._due:
            due = f"byte {self._due[1]} of round {self._due[0]}"
            line = f"byte {part.offset} of round {part.round} came where {due} was due"
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, line)
        if part.round >= self.granted_before:
            raise RemoteProtocolError(
                Fault.OVERDRAWN, f"round {part.round} came, granted is what is before {self.granted_before}"
            )
        if part.total_bytes != (expected := self._contribution_bytes(part.round)):
            self.faulty = part.round
            fault = Fault.OVERSIZED if part.total_bytes > expected else Fault.MALFORMED
            line = f"a contribution of {part.total_bytes} bytes to round {part.round}, which has {expected} here"
            raise RemoteProtocolError(fault, line)
        if part.offset and part.contribution_xxh3 != self._xxh3:
            self.faulty = part.round
            line = f"the contribution to round {part.round} has changed at byte {part.offset}: it was made anew"
            raise RemoteProtocolError(Fault.PAYLOAD, f"{line}, with other bytes")
        complete = part.end == part.total_bytes
        self._xxh3 = None if complete else part.contribution_xxh3
        self._due = (part.round + 1, 0) if complete else (part.round, part.end)
        self._parts += 1
        return complete

    def written(self) -> None:
        """All that came is written: `received` may say so."""
        assert self._due is not None
        self._written, self._parts = self._due, 0
