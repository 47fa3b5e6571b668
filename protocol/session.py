"""One neighbour link, sans-IO: greeting, sequence numbers, acknowledgement, credit, resume.

A `LinkSession` outlives its connections. Bytes go in (`receive`), events come out; `send` turns a part of a message
into the bytes of a frame and keeps them until the peer has acknowledged them. After a reconnect the kept frames are
sent again as they were, never encoded again, so what the peer decodes does not depend on what the network did.

The rules, as data (`TRANSITIONS`): in AWAIT only a greeting or a refusal may come; in OPEN chunks, credits, a goodbye
or a refusal; after the peer's goodbye only credits. Anything else is the peer's fault and closes the connection.

A peer's fault closes the connection and changes nothing of what was agreed, received and kept.

Two limits bound what is under way. *Credit*: the receiver grants bytes as it consumes them, so a slow stage bounds its
own memory, to its buffer and the rest of the one message that is coming in. *Acknowledgement*: `unacknowledged_bytes`
is what the transport compares with its window of about 1.5 bandwidth-delay products, since nothing can overtake what is
already inside gRPC. Both ride on the chunks that go the other way; a frame of their own costs as much work as a chunk,
so one is sent only where the peer asked for an answer at once or no chunk has gone for a while. Why not HTTP/2's own
windows: they count bytes taken off the socket, not bytes consumed by the stage, and they cannot be read from Python.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from .envelope import Data
from .errors import Fault, LocalProtocolError, RefusedError, RemoteProtocolError
from .greeting import NodeIdentity, check_greeting, check_resume
from .grid_place import GridPlace
from .messages import (
    Chunk,
    Credit,
    Frame,
    Goodbye,
    Greeting,
    Head,
    Limits,
    Message,
    Refusal,
    decode_frame,
    encode_frame,
)
from .reassembly import Assembly, message_cost


class SessionState(Enum):
    """Where the present connection stands."""

    CLOSED = "closed"
    AWAIT = "awaiting the peer's greeting"
    OPEN = "open"
    PEER_DONE = "the peer said goodbye"


TRANSITIONS: dict[SessionState, dict[type[Frame], SessionState]] = {
    SessionState.CLOSED: {},
    SessionState.AWAIT: {Greeting: SessionState.OPEN, Refusal: SessionState.CLOSED},
    SessionState.OPEN: {
        Chunk: SessionState.OPEN,
        Credit: SessionState.OPEN,
        Goodbye: SessionState.PEER_DONE,
        Refusal: SessionState.CLOSED,
    },
    SessionState.PEER_DONE: {Credit: SessionState.PEER_DONE, Refusal: SessionState.CLOSED},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The greetings agree.

    resumed: this link was open before, and goes on where it was. started_over: it was open with another process, of
    which nothing was used, and is new again: drop what came from that one and what was queued for it.
    """

    peer: Greeting
    resumed: bool
    started_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A whole message; tell `consume(cost_bytes)` once it is no longer held."""

    message: Message
    cost_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """The peer holds everything before `next_sequence`, or granted more."""

    next_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDone:
    """The peer will send no more messages."""


Event = Opened | Received | Acknowledged | PeerDone


class LinkSession:
    """This node's side of the link to stage `peer_stage`, in one generation. peer_lane: where that is another lane, of
    which it is this node's own stage; default: the same lane."""

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        peer_stage: int,
        limits: Limits,
        receive_buffer_bytes: int,
        member: int | None = None,
        peer_lane: int | None = None,
    ) -> None:
        needed = message_cost(limits.message_bytes)
        if receive_buffer_bytes < needed:
            raise LocalProtocolError(
                Fault.OVERSIZED,
                f"a receive buffer of {receive_buffer_bytes} bytes cannot hold one message of {limits.message_bytes}; "
                f"raise link.receive_buffer_bytes to at least {needed}",
            )
        self.identity = identity
        self.place = GridPlace(peer_stage, identity.lane if peer_lane is None else peer_lane)
        self.limits = limits
        self.state = SessionState.CLOSED
        self._member = member  # the only process that may greet here; None: whoever comes first
        self.used = False  # set by the owner: it took something from the peer, or told it what cannot be told again
        self._receive_buffer_bytes = receive_buffer_bytes
        self._start_over()

    def _start_over(self) -> None:
        """Everything that belongs to the conversation with one process."""
        self.peer: Greeting | None = None
        self._next_sequence = 0  # of what this node sends
        self._unsent = 0  # data bytes of the message whose first part was sent and whose last was not
        self._sent_cost = 0
        self._peer_granted = 0
        self._retransmission_buffer: deque[tuple[int, bytes]] = deque()  # (sequence, frame) until acknowledged
        self.unacknowledged_bytes = 0
        self._expected = 0  # sequence of the next chunk from the peer
        self._told = (0, self._receive_buffer_bytes)  # what the last credit or chunk said
        self._asked = False  # the peer wants to be told at once
        self._received_cost = 0
        self._delivered_cost = 0
        self._consumed_cost = 0
        self._assembly = Assembly()

    @property
    def peer_stage(self) -> int:
        return self.place.stage

    @property
    def peer_name(self) -> str:
        """Of the other node, for people: `stage 1`, and in another lane `stage 1 of lane 2`."""
        stage, lane = self.place
        return f"stage {stage}" if lane == self.identity.lane else f"stage {stage} of lane {lane}"

    # -- connection ---------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """A new connection stands; greetings are due."""
        self.state = SessionState.AWAIT

    def disconnect(self) -> None:
        """The connection is gone. What was agreed, received and kept stays."""
        self.state = SessionState.CLOSED

    def greeting(self) -> bytes:
        """Who this node is and from where it goes on; tells all that `credit` would."""
        self._tell()
        return encode_frame(self.identity.greeting(next_sequence=self._expected, granted_bytes=self._granted))

    def goodbye(self) -> bytes:
        """The frame after which this node sends no more. Raises LocalProtocolError in the middle of a message."""
        if self._unsent:
            raise LocalProtocolError(Fault.UNEXPECTED, f"a goodbye with {self._unsent} bytes of a message to go")
        return encode_frame(Goodbye())

    # -- sending ------------------------------------------------------------------------------------------------

    def may_send(self, data_bytes: int) -> bool:
        """Whether the peer's credit covers the next chunk, with this much data."""
        return self._sent_cost + self._cost(data_bytes, starts=not self._unsent) <= self._peer_granted

    def send(self, head: Head | None, data: Data, *, acknowledge: bool = True) -> bytes:
        """The frame for the next part of a message, kept until acknowledged. It tells all that `credit` would.

        `acknowledge` asks the peer to answer at once and not with its next chunk. Raises LocalProtocolError past
        credit, and for a part that does not continue the message that was begun.
        """
        if not self.may_send(len(data)):
            raise LocalProtocolError(Fault.OVERDRAWN, f"{self.peer_name} has not granted {len(data)} more bytes")
        if (head is None) != bool(self._unsent):
            what = "belongs to no message" if head is None else f"comes where {self._unsent} bytes of another are due"
            raise LocalProtocolError(Fault.OUT_OF_ORDER, f"a part of {len(data)} bytes {what}")
        due = self._unsent if head is None else head.data_bytes
        if len(data) > due or (due and not len(data)):
            raise LocalProtocolError(Fault.MALFORMED, f"a part of {len(data)} bytes where {due} are left")
        next_sequence, granted_bytes = self._tell()
        chunk = Chunk(
            sequence=self._next_sequence,
            generation=self.identity.generation,
            head=head,
            data=data,
            next_sequence=next_sequence,
            granted_bytes=granted_bytes,
            acknowledge=acknowledge,
        )
        frame = encode_frame(chunk)
        self._retransmission_buffer.append((self._next_sequence, frame))
        self._next_sequence += 1
        self._sent_cost += self._cost(len(data), starts=head is not None)
        self._unsent = due - len(data)
        self.unacknowledged_bytes += len(frame)
        return frame

    @staticmethod
    def _cost(data_bytes: int, *, starts: bool) -> int:
        """What a chunk takes of the credit: both ends count alike. The message's own price is due with its head."""
        return message_cost(data_bytes) if starts else data_bytes

    def retransmissions(self) -> list[bytes]:
        """What a new connection has to carry first: all frames that the peer has not acknowledged, as they were."""
        return [frame for _, frame in self._retransmission_buffer]

    # -- receiving ----------------------------------------------------------------------------------------------

    def receive(self, raw: bytes) -> list[Event]:
        """Take one frame. Raises RemoteProtocolError (the caller answers with a Refusal) or RefusedError.

        Either closes the connection: whatever else had arrived on it is refused too.
        """
        try:
            frame = decode_frame(raw, self.limits)
            following = TRANSITIONS[self.state].get(type(frame))
            if following is None:
                name = type(frame).__name__.lower()
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {name} frame while the link is {self.state.value}")
            event = self._take(frame)
        except (RemoteProtocolError, RefusedError):
            self.state = SessionState.CLOSED
            raise
        self.state = following
        return [event] if event else []

    def _take(self, frame: Frame) -> Event | None:
        match frame:
            case Greeting():
                return self._take_greeting(frame)
            case Chunk():
                return self._take_chunk(frame)
            case Credit():
                return self._take_credit(frame.next_sequence, frame.granted_bytes)
            case Goodbye():
                if self._assembly.under_way:
                    raise RemoteProtocolError(Fault.UNEXPECTED, "a goodbye in the middle of a message")
                return PeerDone()
            case Refusal():
                raise RefusedError(frame.code, frame.reason)

    def consume(self, cost_bytes: int) -> None:
        """A received message is no longer held: its bytes may be granted again (send `credit`).

        Raises LocalProtocolError for more than was received, since that would grant memory that is in use.
        """
        held = self._delivered_cost - self._consumed_cost
        if not 0 <= cost_bytes <= held:
            raise LocalProtocolError(Fault.OVERDRAWN, f"{cost_bytes} bytes consumed where {held} are held")
        self._consumed_cost += cost_bytes

    def credit(self) -> bytes:
        """The frame that acknowledges what came and grants what is free."""
        next_sequence, granted_bytes = self._tell()
        return encode_frame(Credit(next_sequence=next_sequence, granted_bytes=granted_bytes))

    def _tell(self) -> tuple[int, int]:
        self._told, self._asked = (self._expected, self._granted), False
        return self._told

    @property
    def credit_due(self) -> bool:
        """Whether `credit` would tell the peer something worth a frame: that a chunk came, or that much was consumed.

        It need not go at once, since the next chunk tells it too, unless `credit_urgent`.
        """
        return self._expected != self._told[0] or self.credit_urgent

    @property
    def credit_urgent(self) -> bool:
        """Whether the peer may soon have to wait for it: it asked, or a quarter of the buffer is free unbeknown to it.

        (A quarter: the peer then never stalls for what is free, and credits are not answered by credits.)
        """
        return self._asked or self._granted - self._told[1] >= self._receive_buffer_bytes // 4

    @property
    def _granted(self) -> int:
        return self._consumed_cost + self._receive_buffer_bytes

    def _take_greeting(self, peer: Greeting) -> Opened:
        check_greeting(peer, self.identity, self.place)
        if self._member is not None and peer.incarnation != self._member:
            raise RemoteProtocolError(
                Fault.FENCED,
                f"in generation {self.identity.generation} {self.peer_name} is process {self._member:x}, not "
                f"{peer.incarnation:x}",
            )
        another = self.peer is not None and self.peer.incarnation != peer.incarnation
        started_over = another and not self.used  # a stranger that knew how to greet must not keep the true one out
        first_kept = self._retransmission_buffer[0][0] if self._retransmission_buffer else self._next_sequence
        resumed = check_resume(
            peer,
            self.identity,
            before=None if started_over else self.peer,
            began=not started_over and bool(self._expected or self._next_sequence),
            first_kept=0 if started_over else first_kept,
            next_sequence=0 if started_over else self._next_sequence,
        )
        if started_over:  # only now: what is refused changes nothing
            self._start_over()
        if not resumed:
            self._peer_granted = 0  # nothing that an earlier process granted binds this one
        self.peer = peer
        self._take_credit(peer.next_sequence, peer.granted_bytes)
        return Opened(peer=peer, resumed=resumed, started_over=started_over)

    def _check_acknowledged(self, next_sequence: int) -> None:
        if next_sequence > self._next_sequence:
            raise RemoteProtocolError(
                Fault.OUT_OF_ORDER, f"chunk {next_sequence - 1} acknowledged, only {self._next_sequence} were sent"
            )

    def _take_credit(self, next_sequence: int, granted_bytes: int) -> Acknowledged:
        self._check_acknowledged(next_sequence)
        while self._retransmission_buffer and self._retransmission_buffer[0][0] < next_sequence:
            self.unacknowledged_bytes -= len(self._retransmission_buffer.popleft()[1])
        self._peer_granted = max(self._peer_granted, granted_bytes)  # a grant is never taken back
        return Acknowledged(next_sequence=next_sequence)

    def _take_chunk(self, chunk: Chunk) -> Received | None:
        if chunk.generation != self.identity.generation:
            raise RemoteProtocolError(
                Fault.GENERATION,
                f"chunk {chunk.sequence} is of generation {chunk.generation}, "
                f"this run is in {self.identity.generation}",
            )
        if chunk.sequence < self._expected:
            self._take_credit(chunk.next_sequence, chunk.granted_bytes)  # what it said then is still true
            return None  # a duplicate, sent again after a reconnect
        if chunk.sequence > self._expected:
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"chunk {chunk.sequence} came where {self._expected} was due")
        cost = self._cost(len(chunk.data), starts=chunk.head is not None)
        if self._received_cost + cost > self._granted:
            raise RemoteProtocolError(
                Fault.OVERDRAWN, f"chunk {chunk.sequence} exceeds the {self._granted} bytes granted so far"
            )
        self._check_acknowledged(chunk.next_sequence)
        message = self._assembly.add(chunk)
        self._take_credit(chunk.next_sequence, chunk.granted_bytes)
        self._expected += 1
        self._asked |= chunk.acknowledge
        self._received_cost += cost
        if message is None:
            return None
        cost_bytes = message_cost(message.head.data_bytes)
        self._delivered_cost += cost_bytes
        return Received(message=message, cost_bytes=cost_bytes)
