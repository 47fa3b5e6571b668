"""A target for the stream between two lanes: what another lane's node may say about contributions, to either direction.

The session is that of a node; its disk is a mapping. What comes is put together as a node does, so that a byte too
many, or at a wrong place, would show. What is said of members goes where it goes in a node of stage 0.
"""

from __future__ import annotations

from typing import Any

import xxhash
from thinpipe.protocol.control_messages import STEP_MAX, Heartbeat
from thinpipe.protocol.errors import Fault, RefusedError, RemoteProtocolError
from thinpipe.protocol.lane_status import LaneStatus, StatusExchange
from thinpipe.protocol.membership_log import Entry, MembershipLog
from thinpipe.protocol.messages import Frame, Goodbye, Greeting, Refusal, decode_frame, encode_frame
from thinpipe.protocol.round_membership import RoundMembership
from thinpipe.protocol.round_messages import RoundPart, RoundsReceived, RoundStatus, RoundsWanted
from thinpipe.protocol.round_session import LIMITS, PartCame, PeerDone, PeerGreeted, PeerParted, PeerTold, RoundSession
from thinpipe.protocol.round_transfer import ROUNDS_AHEAD, WINDOW_PARTS_LEAST, Contribution

from ..builders import identity
from . import mutators
from .judge import Ends, Finding, Target, check_refusal
from .wire import INPUT_BYTES_MAX, READING_BYTES

PART_BYTES = 16
WINDOW_BYTES = WINDOW_PARTS_LEAST * PART_BYTES
SIZES = (20, 200, 1)
RUN_ROUNDS = 40
MINE, THEIRS = identity(1, 3, lane=0, lanes=3, incarnation=0xA), identity(1, 3, lane=2, lanes=3, incarnation=0xB)
GREETING = encode_frame(THEIRS.greeting())
BEAT = Heartbeat(generation=0, completed_steps=3)


def _begins(round: int) -> int | None:
    return None if round + 1 >= RUN_ROUNDS else 10 * round


def size_of(round: int) -> int:
    return SIZES[round % len(SIZES)]


def content(round: int) -> bytes:
    return bytes((round + at) % 256 for at in range(size_of(round)))


def described(round: int) -> Contribution:
    return Contribution(total_bytes=size_of(round), xxh3=xxhash.xxh3_64_intdigest(content(round)))


class _Node:
    """Lane 0, which has made two contributions and needs those of lane 2."""

    def __init__(self) -> None:
        self.kept = {round: described(round) for round in range(2)}
        self.session = RoundSession(
            identity=MINE,
            peer_lane=2,
            kept=self.kept,
            contribution_bytes=size_of,
            part_bytes=PART_BYTES,
            window_bytes=WINDOW_BYTES,
        )
        self.session.receiver.forget(0)
        self.membership = RoundMembership(0, 3, deadline_s=9.0, begins=_begins, log=MembershipLog.begin(3))
        self.now_s = 0.0
        self.position = (0, 0)
        self.partial = b""
        self.ending = False  # it needs nothing more once the peer does not

    def connect(self, *, greeted: bool) -> None:
        self.session.connect()
        self.statuses = StatusExchange(3, RUN_ROUNDS)
        self.membership.part(2)
        self.position, self.partial = (self.position[0], 0), b""
        if greeted:
            self.take(GREETING)

    def take(self, raw: bytes) -> None:
        """As a node does. Raises RemoteProtocolError or RefusedError."""
        match self.session.receive(raw):
            case PeerGreeted(peer=peer):
                said = (peer.run_id, peer.configuration, peer.stages, peer.stage, peer.lane)
                if said != ("r", "c", MINE.stages, MINE.stage, THEIRS.lane):
                    raise Finding(f"{peer} was let in")
                self.session.wanted(self.position)
            case PeerTold(status=status):
                self.hear(status)
            case PeerDone():
                self.membership.part(2, ended=True)
                if self.ending:
                    decode_frame(self.session.goodbye(), LIMITS)
                    decode_frame(self.session.parting(), LIMITS)
            case PeerParted():
                if not self.session.parted:
                    raise Finding("the peer has heard a goodbye that was not said")
            case PartCame(part=part, complete=complete):
                if (part.round, part.offset) != self.position or part.total_bytes != size_of(part.round):
                    raise Finding(f"{part} came where {self.position} was due")
                if part.round >= ROUNDS_AHEAD + max(self.kept, default=0) + 1:
                    raise Finding(f"round {part.round} came, which was not granted")
                self.partial += part.data
                self.position = (part.round + 1, 0) if complete else (part.round, part.end)
                if len(self.partial) != (size_of(part.round) if complete else part.end):
                    raise Finding(f"{len(self.partial)} bytes of round {part.round} have come")
                self.partial = b"" if complete else self.partial
                if self.session.receiver.write_due:
                    self.session.receiver.written()
                    decode_frame(self.session.received(), LIMITS)

    def hear(self, frame: RoundStatus) -> None:
        """What the other lane says of itself and of members. Raises RemoteProtocolError."""
        self.membership.hear(2, self.statuses.hear(frame), self.now_s)
        self.now_s += 5.0
        self.membership.report((len(self.kept), 0, self.position[0]), self.now_s)
        log = self.membership.log
        lanes = {lane for each in log.stretches for lane in each.members}
        if not lanes <= {0, 1, 2} or log.decided > RUN_ROUNDS or any(not each.members for each in log.stretches):
            raise Finding(f"{log} came through")
        said = StatusExchange(3, RUN_ROUNDS).say(self.membership.status())
        if decode_frame(encode_frame(said), LIMITS) != said:
            raise Finding(f"another lane would read something else than {said}")
        for lane in range(3):
            log.history_of(lane, log.decided, log.decided, self.membership.admitted)
            if (log.joined_at(lane, max(0, log.decided - 1)) is None) == (lane in log.members):
                raise Finding(f"lane {lane} is a member and is none: {log}")

    def publish(self) -> None:
        self.kept[len(self.kept)] = described(len(self.kept))
        self.session.receiver.need(len(self.kept) - 1)

    def send(self) -> None:
        """What may leave now, leaves. Raises RemoteProtocolError."""
        for each in self.session.parts(100):
            data = content(each.round)[each.offset : each.offset + each.length]
            decode_frame(self.session.part(each, data), LIMITS)
        if self.session.sender.unacknowledged_bytes > WINDOW_BYTES:
            raise Finding(f"{self.session.sender.unacknowledged_bytes} bytes are under way")


def rounds(data: bytes) -> Ends:
    """A conversation. Of a part's first byte, bit 0: the connection breaks before it; bit 1: this node makes its next
    contribution before it; bit 2: on a new connection, the part comes where a greeting is due; bit 3: from then on this
    node needs nothing more once the peer does not."""
    node = _Node()
    node.connect(greeted=True)
    taken = refused = 0
    for how, raw in mutators.cut(data[1:]):
        node.ending = node.ending or bool(how & 8)
        if how & 2:
            node.publish()
        if how & 1 or not node.session.greeted:
            node.connect(greeted=not how & 4)
        sender = node.session.sender
        before = (sender.forget_before, sender.acknowledged, sender.unacknowledged_bytes)
        try:
            node.take(raw)
            taken += 1
        except (RemoteProtocolError, RefusedError) as error:
            refused += 1
            check_refusal(error)
            if before != (sender.forget_before, sender.acknowledged, sender.unacknowledged_bytes):
                raise Finding(f"'{error}' changed {before}") from error
            continue
        try:
            node.send()
        except RemoteProtocolError as error:  # it asked for what is gone
            check_refusal(error)
            node.session.disconnect()
        if not sender.forget_before <= STEP_MAX:
            raise Finding(f"{sender.forget_before} came through")
    return Ends(taken, refused)


def _part(round: int, offset: int, length: int = PART_BYTES) -> RoundPart:
    whole, made = content(round), described(round)
    known: dict[str, Any] = {"total_bytes": made.total_bytes, "contribution_xxh3": made.xxh3}
    return RoundPart(round=round, offset=offset, data=whole[offset : offset + length], **known)


def _seeds() -> list[bytes]:
    def wanted(round: int, offset: int = 0, granted: int = 3) -> RoundsWanted:
        return RoundsWanted(round=round, offset=offset, granted_before=granted, forget_before=0)

    def received(round: int, offset: int = 0, forget: int = 0) -> RoundsReceived:
        return RoundsReceived(round=round, offset=offset, granted_before=round + 4, forget_before=forget)

    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 2))
    entry = Entry(lane=1, first=4, begins=40, source=1, copied=10)
    said = [
        LaneStatus(held=(1, 0, 1), log=MembershipLog.begin(3)),
        LaneStatus(held=(2, 2, 2), log=log),
        LaneStatus(held=(3, 2, 3), log=log.then((0, 2)), admitted=(entry,)),
        LaneStatus(held=(5, 5, 5), log=log.then((0, 2)).then((0, 2)).then((0, 1, 2), (entry,))),
    ]
    statuses = list(map(StatusExchange(3).say, said))
    out = LaneStatus(held=(9, 9, 2), log=MembershipLog.begin(3).then((0, 1)), returning=11)
    parts = [_part(0, 0), _part(0, 16), *(_part(1, at) for at in range(0, 200, PART_BYTES))]
    spoken: list[list[tuple[int, Frame]]] = [
        [(0, BEAT), (0, wanted(0)), (0, parts[0]), (0, parts[1]), (0, parts[2]), (0, received(1))],
        [(0, part) for part in parts[:7]],
        [(0, wanted(0)), (0, received(0, 16)), (0, received(1, 16)), (2, received(1, 16, 1)), (1, wanted(1, 16))],
        [(0, parts[0]), (0, parts[1]), (1, parts[2]), (0, Goodbye()), (0, BEAT), (0, parts[3])],
        [(8, wanted(0)), (0, Goodbye()), (0, parts[0]), (0, Goodbye()), (0, BEAT), (0, Goodbye())],
        [(5, THEIRS.greeting()), (0, wanted(1)), (2, BEAT), (2, received(1)), (1, wanted(2))],
        [(0, each) for each in statuses],
        [(2, statuses[0]), (2, StatusExchange(3).say(out)), (0, Goodbye()), (2, statuses[1]), (1, statuses[0])],
        [(5, Refusal(code=Fault.LANE, reason="another lane")), (0, wanted(5)), (2, BEAT)],
    ]
    assert isinstance(spoken[5][0][1], Greeting)
    return [b"\x00" + mutators.join([(how, encode_frame(frame)) for how, frame in said]) for said in spoken]


ROUNDS = [
    Target(
        name="rounds",
        run=rounds,
        mutate=mutators.conversation,
        seeds=_seeds(),
        peak_bytes=READING_BYTES + 4 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    )
]
