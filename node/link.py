"""One boundary's traffic in one direction each way: queue, shaper, delay line, session, inbox.

A `Link` joins the pure rules (`protocol.session`), the pure link model (`sim.shaper`) and whatever moves bytes. It
outlives connections: `attach` runs one connection until it ends, and the next one goes on where that stopped.

Outgoing, a frame passes four places: the queue (control ahead of tensors), the token bucket, the delay line, gRPC. A
tensor part gets its sequence number when it enters the bucket, so everything still queued can be overtaken. It enters
only while the bytes that the peer has not acknowledged stay below the window of about 1.5 bandwidth-delay products:
what gRPC holds cannot be overtaken any more, and more of it would not make the link faster. Delay is applied here, at
the sender and on its own clock, so two machines need no common time.

Why not shape inside a proxy or a socket wrapper: only this place sees whole frames, their priority and their kind, so
only here do the bytes reported, the bytes paced and the bytes sent come from the same count.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from ..protocol.errors import Fault, ProtocolError, RefusedError, RemoteProtocolError
from ..protocol.framing import framed_bytes
from ..protocol.messages import Greeting, Head, Kind, Message, decode_frame, split
from ..protocol.session import LinkSession, Opened, PeerDone, Received
from ..sim.shaper import BusyMeter, LinkProfile, Queued, Shaper, WireQueue
from .metrics import Tracer

WINDOW_BANDWIDTH_DELAY_PRODUCTS = 1.5
PROBE_S = 0.25  # several times the longest wake-up delay seen on a busy laptop
BUSY_SHORTEST_S = 0.05  # ten times a late wake-up: shorter stretches say nothing of the link
PROBE_BYTES_MAX = 32 * 2**20
ROW = {
    Kind.ACTIVATION: "activation",
    Kind.GRADIENT: "gradient",
    Kind.EVALUATION: "evaluation",
    Kind.EVALUATION_LOSS: "evaluation",
    Kind.PROBE: "probe",
}

Read = Callable[[], Awaitable[bytes | None]]
Write = Callable[[bytes], Awaitable[None]]


def chunk_bytes_for(profile: LinkProfile) -> int:
    """64 to 256 KiB: large ones cost less CPU, but a control frame may have to wait for one, so at most about 5 ms."""
    if profile.rate_bits_per_s is None:
        return 256 * 1024
    return min(256 * 1024, max(64 * 1024, int(profile.rate_bits_per_s / 8 * 0.005)))


@dataclass(slots=True, kw_only=True)
class _Part:
    """A queued part of a message and how its bytes are accounted."""

    head: Head | None
    data: bytes | memoryview
    row: str
    token_ids: int


_Item = _Part | Literal["credit", "goodbye"]


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """A frame between the bucket and gRPC."""

    frame: bytes
    rows: dict[str, int]
    depart_s: float
    arrive_s: float
    tensor: bool
    goodbye: bool


@dataclass(slots=True)
class Traffic:
    """Framed bytes by kind. `sent` counts what was handed to gRPC, resent frames included."""

    sent: Counter[str] = field(default_factory=Counter)
    received_bytes: int = 0


class Link:
    """This node's end of the boundary to one neighbour.

    `receive` waits without a deadline of its own: whoever needs the message knows how long it may take, and `late`
    words the error. `drain` raises TimeoutError that says what was waited for and for how long.
    """

    def __init__(
        self,
        *,
        session: LinkSession,
        profile: LinkProfile,
        chunk_bytes: int | None,
        send_buffer_bytes: int,
        uncapped_window_bytes: int,
        seed: int,
        tracer: Tracer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.profile = profile
        self.traffic = Traffic()
        self.meter = BusyMeter(shortest_s=BUSY_SHORTEST_S)
        self.peer_done = asyncio.Event()
        self.opened = asyncio.Event()
        self._both_done = asyncio.Event()
        self.fault: str | None = None  # why the last connection ended, when it was not by goodbye
        self._shaper = Shaper(profile, random=seed)
        self._queue: WireQueue[_Item] = WireQueue()
        self._line: deque[_InFlight] = deque()
        self._inbox: deque[tuple[Message, int]] = deque()
        self._chunk_bytes = chunk_bytes or chunk_bytes_for(profile)
        self._send_buffer_bytes = send_buffer_bytes
        self._uncapped_window_bytes = uncapped_window_bytes
        self._clock = clock
        self._tracer = tracer
        self._admit = asyncio.Event()  # the admission loop has something new to look at
        self._deliver = asyncio.Event()
        self._arrived = asyncio.Event()
        self._moved = asyncio.Event()  # queue or acknowledgement state changed
        self._credit_queued = False
        self._window_open_since = 0.0
        self._round_trip_s = 2 * profile.latency_s
        self._greeted_at = 0.0
        self._said_goodbye = False  # nothing may follow it
        self._goodbye_queued = False
        self._goodbye_sent = False  # handed to gRPC
        self._close_connection: Callable[[ProtocolError], None] | None = None

    @property
    def name(self) -> str:
        mine, peer = self.session.identity.stage, self.session.peer_stage
        return f"boundary {min(mine, peer)}-{max(mine, peer)}"

    @property
    def finished(self) -> bool:
        """Both sides said goodbye: the connection may end."""
        return self._goodbye_sent and self.peer_done.is_set()

    @property
    def window_bytes(self) -> int:
        """The most that may be under way unacknowledged."""
        if self.profile.rate_bits_per_s is None:
            return self._uncapped_window_bytes
        product = self.profile.rate_bits_per_s / 8 * self._round_trip_s
        return int(WINDOW_BANDWIDTH_DELAY_PRODUCTS * product) + 2 * self._chunk_bytes

    # -- for the stage ------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Queue a message; waits while more than the send buffer is queued (one message always fits)."""
        size = len(message.token_ids) + len(message.body)
        while len(self._queue) and self._queue.queued_bytes + size > self._send_buffer_bytes:
            self._moved.clear()
            await self._moved.wait()
        now = self._clock()
        if not self.meter.busy:
            self.meter.begin(now)
        ids_left = len(message.token_ids)
        row = ROW[message.kind]
        for head, data in split(message, self._chunk_bytes):
            ids = min(ids_left, len(data))
            ids_left -= ids
            part = _Part(head=head, data=data, row=row, token_ids=ids)
            self._queue.push(part, framed_bytes(len(data)), control=False, now_s=now)
        self._admit.set()

    async def receive(self) -> Message:
        """The next message. Its credit returns to the peer at once, so the caller has to bound what it holds."""
        while not self._inbox:
            self._arrived.clear()
            await self._arrived.wait()
        message, cost_bytes = self._inbox.popleft()
        self.session.consume(cost_bytes)
        self._queue_credit()
        return message

    async def probe(self, timeout_s: float) -> None:
        """Fill the capped link for a moment, so that its rate is known before it is trusted. Raises TimeoutError."""
        if self.profile.rate_bits_per_s is None:
            return
        left = int(min(PROBE_BYTES_MAX, PROBE_S * self.profile.rate_bits_per_s / 8))
        try:
            async with asyncio.timeout(timeout_s):
                while left > 0:
                    ballast = bytes(min(left, self.session.limits.message_bytes))
                    left -= len(ballast)
                    await self.send(Message(kind=Kind.PROBE, step=0, microbatch=0, body=ballast))
                await self._until_acknowledged()
        except TimeoutError:
            raise TimeoutError(self.late("the probe of the link", timeout_s)) from None

    async def _until_acknowledged(self) -> None:
        while self._queue.peek_tensor() or self._line or self.session.unacknowledged_bytes:
            self._moved.clear()
            await self._moved.wait()

    async def drain(self, timeout_s: float) -> None:
        """Wait until the peer has acknowledged everything, say goodbye, and wait for the peer's."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._until_acknowledged()
                self._said_goodbye = True
                self._queue_goodbye()
                await self._both_done.wait()
        except TimeoutError:
            raise TimeoutError(self.late("the peer's acknowledgements and goodbye", timeout_s)) from None

    def _queue_goodbye(self) -> None:
        if not self._goodbye_queued:
            self._goodbye_queued = True
            self._queue.push("goodbye", framed_bytes(2), control=True, now_s=self._clock())
            self._admit.set()

    def reject(self, error: RemoteProtocolError) -> None:
        """What the peer sent is not what was agreed (seen only after decoding): refuse it and close the connection."""
        self.fault = str(error)
        if self._close_connection is not None:
            self._close_connection(error)

    def take_over(self, frame: bytes) -> bool:
        """Whether a new stream's first frame is the greeting of the very process that the open stream belongs to.

        If so the open stream, which must be half-dead, is closed in its favour.
        """
        try:
            greeting = decode_frame(frame, self.session.limits)
        except RemoteProtocolError:
            return False
        peer = self.session.peer
        if not isinstance(greeting, Greeting) or peer is None or greeting.incarnation != peer.incarnation:
            return False
        if self._close_connection is not None:
            self._close_connection(RemoteProtocolError(Fault.UNEXPECTED, "the same process opened another connection"))
        return True

    def late(self, waiting_for: str, timeout_s: float) -> str:
        """One line for a wait on this link that ran out of time."""
        state = self.session.state.value
        why = f"; the last connection ended with {self.fault}" if self.fault else ""
        return f"{self.name}: waited {timeout_s:g} s for {waiting_for}; the link is {state}{why}"

    # -- for the transport --------------------------------------------------------------------------------------

    async def attach(self, read: Read, write: Write, *, speaks_first: bool, greeting_timeout_s: float) -> None:
        """Run one connection until it ends.

        Returns when both sides said goodbye or the stream ended. Raises RemoteProtocolError (the peer broke a rule and
        has been told), RefusedError (the peer told us), or what `read` and `write` raise.
        """
        self.session.connect()
        self._line.clear()
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def close(error: ProtocolError) -> None:
            if not closing.done():
                closing.set_exception(error)

        self._close_connection = close
        try:
            if speaks_first:
                await self._greet(write)
            async with asyncio.timeout(greeting_timeout_s):
                await self._await_greeting(read)
            if not speaks_first:
                await self._greet(write)
            await self._converse(read, write, closing)
        except TimeoutError:
            error = RemoteProtocolError(Fault.TIMEOUT, f"no greeting within {greeting_timeout_s:g} s")
            self.fault = str(error)
            await write(self.session.refuse(error))
            raise error from None
        except RemoteProtocolError as error:
            self.fault = str(error)
            await write(self.session.refuse(error))
            raise
        except RefusedError as error:
            self.fault = f"a refusal by stage {self.session.peer_stage}: {error}"
            raise
        finally:
            closing.cancel()
            self._close_connection = None
            self.session.disconnect()
            self._moved.set()

    async def _greet(self, write: Write) -> None:
        """Greetings precede the queue, so they are written directly, at the link's latency."""
        frame = self.session.greeting()
        passage = self._shaper.admit(framed_bytes(len(frame)), self._clock())
        self._greeted_at = self._clock()
        await self._sleep_until(passage.arrive_s)
        await write(frame)
        self.traffic.sent["control"] += framed_bytes(len(frame))

    async def _await_greeting(self, read: Read) -> None:
        raw = await read()
        if raw is None:
            raise ConnectionError(f"{self.name}: the stream ended before the greeting")
        self.traffic.received_bytes += framed_bytes(len(raw))
        for event in self.session.receive(raw):
            if isinstance(event, Opened):
                if self._greeted_at:  # this node spoke first, so the answer took one round trip
                    self._round_trip_s = max(self._round_trip_s, self._clock() - self._greeted_at)
                self.opened.set()
                self.fault = None

    async def _converse(self, read: Read, write: Write, closing: asyncio.Future[None]) -> None:
        now = self._clock()
        for frame in self.session.kept_frames():
            self._enter_line(frame, {"retransmission": framed_bytes(len(frame))}, now)
        if self._said_goodbye:  # it is not kept, so what an earlier connection carried of it may be lost
            self._goodbye_sent = False
            self._queue_goodbye()
        self._window_open_since = now
        self._admit.set()
        self._deliver.set()
        parts = (self._admission(), self._delivery(write), self._reading(read), self._both_done.wait())
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait([*tasks, closing], return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()  # raises what ended the connection
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reading(self, read: Read) -> None:
        while (raw := await read()) is not None:
            self.traffic.received_bytes += framed_bytes(len(raw))
            for event in self.session.receive(raw):
                if isinstance(event, Received):
                    self._inbox.append((event.message, event.cost_bytes))
                    self._arrived.set()
                    self._tracer.instant("arrived", self.name)
                elif isinstance(event, PeerDone):
                    self.peer_done.set()
                    self._note_end()
            if not self.peer_done.is_set():
                self._queue_credit()
            self._admit.set()
            self._moved.set()

    def _queue_credit(self) -> None:
        """One credit frame waits at a time; it is written with the counters of the moment it leaves."""
        if self.session.credit_due and not self._credit_queued and not self._said_goodbye:
            self._credit_queued = True
            self._queue.push("credit", framed_bytes(16), control=True, now_s=self._clock())
            self._admit.set()

    def _may_enter(self, entry: Queued[_Item] | None) -> bool:
        if entry is None or not isinstance(entry.item, _Part):
            return False
        size, under_way = len(entry.item.data), self.session.unacknowledged_bytes
        if not self.session.may_send(size):
            return False
        return under_way == 0 or under_way + size <= self.window_bytes

    async def _admission(self) -> None:
        """Move frames from the queue through the token bucket, one at a time, as late as possible."""
        stalled = False
        while True:
            tensor = self._queue.peek_tensor()
            closed = not self._may_enter(tensor)
            if closed and self._queue.peek(control_only=True) is None:
                stalled = stalled or tensor is not None
                self._admit.clear()
                await self._admit.wait()
                continue
            if stalled and not closed:
                stalled, self._window_open_since = False, self._clock()
            # What an ideal sender would have done: the wire is taken at `free_at`, by what was there at that time.
            waiting = self._queue.peek(control_only=True) if closed else None
            ready_at = waiting.enqueued_s if waiting else self._queue.ready_s()
            free_at = self._shaper.wire_free_at(ready_at)
            if free_at > self._clock():
                await self._sleep_until(free_at)
                continue  # a control frame may have come in front meanwhile
            entry = self._queue.pop(at_s=free_at, control_only=closed)
            eligible_at = entry.enqueued_s if entry.control else max(entry.enqueued_s, self._window_open_since)
            frame, rows = self._frame_of(entry.item)
            self._enter_line(frame, rows, eligible_at, entry.item)
            self._moved.set()

    def _frame_of(self, item: _Item) -> tuple[bytes, dict[str, int]]:
        if item == "credit":
            self._credit_queued = False
            frame = self.session.credit()
            return frame, {"control": framed_bytes(len(frame))}
        if item == "goodbye":
            self._goodbye_queued = False
            frame = self.session.goodbye()
            return frame, {"control": framed_bytes(len(frame))}
        assert isinstance(item, _Part)
        frame = self.session.stamp(item.head, item.data)
        total = framed_bytes(len(frame))
        if item.row in ("evaluation", "probe"):
            return frame, {item.row: total}
        rows = {item.row: len(item.data) - item.token_ids, "token_ids": item.token_ids}
        return frame, {**rows, "framing": total - len(item.data)}

    def _enter_line(self, frame: bytes, rows: dict[str, int], eligible_at: float, item: _Item | None = None) -> None:
        passage = self._shaper.admit(framed_bytes(len(frame)), eligible_at)
        flight = _InFlight(
            frame=frame,
            rows=rows,
            depart_s=passage.depart_s,
            arrive_s=passage.arrive_s,
            tensor=item is None or isinstance(item, _Part),
            goodbye=item == "goodbye",
        )
        self._line.append(flight)
        self._deliver.set()

    def _note_end(self) -> None:
        if self.finished:
            self._both_done.set()

    async def _delivery(self, write: Write) -> None:
        """Hand frames to gRPC when the delay line lets go of them."""
        while True:
            while not self._line:
                self._deliver.clear()
                await self._deliver.wait()
            flight = self._line[0]
            await self._sleep_until(flight.arrive_s)
            await write(flight.frame)
            now = self._clock()
            self._line.popleft()
            if flight.goodbye:
                self._goodbye_sent = True
                self._note_end()
            self.traffic.sent.update(flight.rows)
            if self.meter.busy:  # at the time it really left, not at the ideal one: a cap that is missed must show
                self.meter.delivered(framed_bytes(len(flight.frame)), now - self.profile.latency_s)
            if flight.tensor:
                started_s = flight.depart_s - self.profile.serialisation_s(framed_bytes(len(flight.frame)))
                self._tracer.span("send", self.name, started_s, now)
            if self.meter.busy and self._queue.peek_tensor() is None and not any(each.tensor for each in self._line):
                self.meter.end(now - self.profile.latency_s)
            self._moved.set()

    async def _sleep_until(self, moment_s: float) -> None:
        delay = moment_s - self._clock()
        if delay > 0:
            await asyncio.sleep(delay)
