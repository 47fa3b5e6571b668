"""One lateral link, sans-IO: the conversation of the nodes of one stage in two lanes, over any number of connections.

A `RoundSession` outlives its connections. Bytes go in (`receive`), an event comes out; its other methods make the
frames that this node may send. What either side may ask for and send is `protocol.round_transfer`'s, once for each
direction; here is in which order things are said.

The rules, as data (`TRANSITIONS`): first a greeting. Then parts, heartbeats and statuses at any time, and the peer's
own requests in their order: RoundsWanted once, RoundsReceived as often as it likes, Goodbye when it needs nothing more.
Until this node says that too, it lives on and sends what is asked for. Who needs nothing more and has heard that of the
peer says Goodbye a second time, which acknowledges the peer's: what was handed to a connection may be lost with it, and
whoever left on the strength of that would be waited for in vain. Anything else is the peer's fault, and closes the
connection.

Why not on the control stream, which has the same form: that one joins neighbours of one lane and is a part of their
generations. A loss in one lane must not be one in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from .control_messages import (
    PART_BYTES_MAX,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
    Heartbeat,
)
from .errors import Fault, LocalProtocolError, RefusedError, RemoteProtocolError
from .greeting import NodeIdentity, check_lateral
from .messages import Frame, Goodbye, Greeting, Limits, Refusal, decode_frame, encode_frame
from .round_messages import RoundPart, RoundsReceived, RoundStatus, RoundsWanted
from .round_transfer import (
    PARTS_TOGETHER,
    Contribution,
    ContributionBytes,
    PartRange,
    Position,
    RoundReceiver,
    RoundSender,
    StayOf,
    always,
)

LIMITS = Limits(message_bytes=1, chunk_bytes=PART_BYTES_MAX)  # no tensor comes this way


class RoundState(Enum):
    """Where the present connection stands."""

    CLOSED = "closed"
    AWAIT = "awaiting the peer's greeting"
    OPEN = "open"
    PULLED = "the peer has said where it is"
    PEER_DONE = "the peer needs nothing more"
    PARTED = "the peer knows that this node needs nothing more either"


# A lane that comes back may take up another one's state (protocol.copy_transfer).
COPY_FRAMES: tuple[type[CopyFrame], ...] = (CopyWanted, CopyOffer, CopyPart, CopyProgress, CopyDeclined)
TRANSITIONS: dict[RoundState, dict[type[Frame], RoundState]] = {
    RoundState.CLOSED: {},
    RoundState.AWAIT: {Greeting: RoundState.OPEN, Refusal: RoundState.CLOSED},
    RoundState.OPEN: {
        Heartbeat: RoundState.OPEN,
        RoundStatus: RoundState.OPEN,
        **dict.fromkeys(COPY_FRAMES, RoundState.OPEN),
        RoundPart: RoundState.OPEN,
        RoundsWanted: RoundState.PULLED,
        Goodbye: RoundState.PEER_DONE,
        Refusal: RoundState.CLOSED,
    },
    RoundState.PULLED: {
        Heartbeat: RoundState.PULLED,
        RoundStatus: RoundState.PULLED,
        **dict.fromkeys(COPY_FRAMES, RoundState.PULLED),
        RoundPart: RoundState.PULLED,
        RoundsReceived: RoundState.PULLED,
        Goodbye: RoundState.PEER_DONE,
        Refusal: RoundState.CLOSED,
    },
    RoundState.PEER_DONE: {
        Heartbeat: RoundState.PEER_DONE,
        RoundStatus: RoundState.PEER_DONE,
        **dict.fromkeys(COPY_FRAMES, RoundState.PEER_DONE),
        RoundPart: RoundState.PEER_DONE,
        Goodbye: RoundState.PARTED,
        Refusal: RoundState.CLOSED,
    },
    RoundState.PARTED: {
        Heartbeat: RoundState.PARTED,
        RoundStatus: RoundState.PARTED,
        **dict.fromkeys(COPY_FRAMES, RoundState.PARTED),
        RoundPart: RoundState.PARTED,
        Refusal: RoundState.CLOSED,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGreeted:
    """The greetings agree."""

    peer: Greeting


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAlive:
    """How the peer's lane is, from the peer's own view."""

    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTold:
    """How far the peer's lane is, and which rounds are decided."""

    status: RoundStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCopies:
    """What the peer says of a copy of a state, from one lane to the other."""

    frame: CopyFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMoved:
    """The peer has got further, granted more, or may have forgotten: there may be something to send, or to drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCame:
    """The next bytes of a contribution, to be written. complete: those are its last ones."""

    part: RoundPart
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDone:
    """The peer needs no more of this node's contributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerParted:
    """The peer, which needs nothing more, has heard that this node does not either."""


RoundEvent = PeerGreeted | PeerAlive | PeerTold | PeerCopies | PeerMoved | PartCame | PeerDone | PeerParted


class RoundSession:
    """This node's side of the link to its own stage in lane `peer_lane`.

    kept: this node's contributions by round, a mapping that its owner changes. contribution_bytes: the size of any
    node's contribution of this stage to a round. stay_of: as of a RoundSender. generation: in which the peer has to
    be; None: in whichever its lane is.
    """

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        peer_lane: int,
        kept: Mapping[int, Contribution],
        contribution_bytes: ContributionBytes,
        part_bytes: int,
        window_bytes: int,
        stay_of: StayOf = always,
        generation: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.identity, self.peer_lane, self._generation = identity, peer_lane, generation
        self.state = RoundState.CLOSED
        self.peer: Greeting | None = None  # who greeted last
        sizes = {"part_bytes": part_bytes, "window_bytes": window_bytes}
        self.sender = RoundSender(kept, contribution_bytes, stay_of=stay_of, **sizes)
        self.receiver = RoundReceiver(contribution_bytes)
        self.done = False  # this node said goodbye on this connection
        self.parted = False  # and a second time, since it has heard the peer's

    def connect(self) -> None:
        """A new connection stands; greetings are due."""
        self.disconnect()
        self.state = RoundState.AWAIT

    def disconnect(self) -> None:
        """The connection is gone, and with it all that was agreed on it."""
        self.state, self.done, self.parted = RoundState.CLOSED, False, False
        self.sender.reset()
        self.receiver.reset()

    def begin_anew(self) -> None:
        """Both lanes go on from another step: what either promised, or came to, does not hold any more."""
        self.disconnect()
        self.sender.begin_anew()
        self.receiver.begin_anew()

    @property
    def greeted(self) -> bool:
        """The peer's greeting has come, and the connection stands."""
        return self.state not in (RoundState.CLOSED, RoundState.AWAIT)

    # -- what this node says ------------------------------------------------------------------------------------------

    def greeting(self, heartbeat: Heartbeat, *, joining: bool = False) -> bytes:
        """Who this node is. heartbeat: what it would say now. joining: it has yet to take its place in its lane."""
        now = replace(self.identity, generation=heartbeat.generation)
        return encode_frame(now.greeting(completed_steps=heartbeat.completed_steps, joining=joining))

    def heartbeat(self, heartbeat: Heartbeat) -> bytes:
        return encode_frame(heartbeat)

    def status(self, status: RoundStatus) -> bytes:
        """How far this node's lane is; also after the goodbye, for the peer may need nothing but that."""
        if not self.greeted:
            raise LocalProtocolError(Fault.UNEXPECTED, f"a status while the link is {self.state.value}")
        return encode_frame(status)

    def wanted(self, position: Position, xxh3: int | None = None, *, stay: int = 0) -> bytes:
        """This node lacks what is not before that position; see `RoundReceiver.wanted`."""
        self._check_open("a request")
        if self.receiver.asked:
            raise LocalProtocolError(Fault.UNEXPECTED, "a second request on one connection")
        return encode_frame(self.receiver.wanted(position, xxh3, stay=stay))

    def received(self) -> bytes:
        """This node has written what came."""
        self._check_open("an acknowledgement")
        return encode_frame(self.receiver.received())

    def parts(self, most: int = PARTS_TOGETHER) -> list[PartRange]:
        """What may be read and sent now. Raises RemoteProtocolError for what is asked for in vain."""
        return self.sender.next(most) if self.state is RoundState.PULLED else []

    def part(self, range: PartRange, data: bytes | memoryview) -> bytes:
        return encode_frame(self.sender.part(range, data))

    def goodbye(self) -> bytes:
        """This node needs no more of the peer's contributions."""
        self._check_open("a goodbye")
        self.done = True
        return encode_frame(Goodbye())

    @property
    def parting_due(self) -> bool:
        """Both have said goodbye, and the peer is to know that its own was heard."""
        return self.done and not self.parted and self.state in (RoundState.PEER_DONE, RoundState.PARTED)

    def parting(self) -> bytes:
        """The second goodbye: this node has heard the peer's."""
        if not self.parting_due:
            raise LocalProtocolError(Fault.UNEXPECTED, f"a second goodbye while the link is {self.state.value}")
        self.parted = True
        return encode_frame(Goodbye())

    def _check_open(self, what: str) -> None:
        if not self.greeted or self.done:
            where = "after the goodbye" if self.done else f"while the link is {self.state.value}"
            raise LocalProtocolError(Fault.UNEXPECTED, f"{what} {where}")

    # -- what the peer says -------------------------------------------------------------------------------------------

    def receive(self, raw: bytes) -> RoundEvent | None:
        """Take one frame; None: there is nothing to do about it. Raises RemoteProtocolError (the caller answers with a
        Refusal) or RefusedError; either closes the connection."""
        try:
            frame = decode_frame(raw, LIMITS)
            following = TRANSITIONS[self.state].get(type(frame))
            if following is None:
                name = type(frame).__name__
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {name} frame while the link is {self.state.value}")
            event = self._take(frame)
        except (RemoteProtocolError, RefusedError):
            self.state = RoundState.CLOSED
            raise
        self.state = following
        return event

    def _take(self, frame: Frame) -> RoundEvent | None:
        match frame:
            case Greeting():
                check_lateral(frame, self.identity, self.peer_lane, generation=self._generation())
                self.peer = frame
                return PeerGreeted(peer=frame)
            case Heartbeat():
                self._check_heartbeat(frame)
                return PeerAlive(heartbeat=frame)
            case RoundStatus():
                return PeerTold(status=frame)
            case CopyWanted() | CopyOffer() | CopyPart() | CopyProgress() | CopyDeclined():
                return PeerCopies(frame=frame)
            case RoundsWanted():
                self.sender.wanted(frame)
                return PeerMoved()
            case RoundsReceived():
                self.sender.received(frame)
                return PeerMoved()
            case RoundPart():
                complete = self.receiver.take(frame)
                return None if self.done else PartCame(part=frame, complete=complete)  # needed by nobody any more
            case Goodbye() if self.state is RoundState.PEER_DONE:
                if not self.done:
                    raise RemoteProtocolError(Fault.UNEXPECTED, "a second goodbye, and this node has said none")
                return PeerParted()
            case Goodbye():
                self.sender.stop()
                return PeerDone()
            case Refusal():
                raise RefusedError(frame.code, frame.reason)
            case _:
                raise AssertionError(frame)

    def _check_heartbeat(self, heartbeat: Heartbeat) -> None:
        for named, what in ((heartbeat.missing, "be missing"), (heartbeat.preparing, "prepare its data")):
            if named > self.identity.stages:
                raise RemoteProtocolError(Fault.MALFORMED, f"stage {named - 1} cannot {what}")
