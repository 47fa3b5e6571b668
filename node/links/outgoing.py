"""The outgoing half of a link: queue, token bucket, delay line, and the account of what was sent.

A frame passes four places: the queue (control ahead of tensors), the token bucket, the delay line, gRPC. A tensor part
gets its sequence number when it enters the bucket, so everything still queued can be overtaken. It enters only while
the bytes that the peer has not acknowledged stay below the window of about 1.5 bandwidth-delay products: what gRPC
holds cannot be overtaken any more, and more of it would not make the link faster. Delay is applied here, at the sender
and on its own clock, so two machines need no common time.

Why not shape inside a proxy or a socket wrapper: only this place sees whole frames, their priority and their kind, so
only here do the bytes reported, the bytes paced and the bytes sent come from the same count.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ...protocol.control_messages import PART_BYTES_MAX
from ...protocol.envelope import Data
from ...protocol.messages import CHUNK_BYTES_MAX, Head, Kind, Message, split
from ...protocol.session import LinkSession
from ...protocol.wire_size import framed_bytes
from ...sim.links.shaper import BusyMeter, LinkProfile, Queued, Shaper, WireQueue
from ..run_records import Tracer
from .link_probe import AcknowledgedRate

WINDOW_BANDWIDTH_DELAY_PRODUCTS = 1.5
CREDIT_DELAY_S = 0.25  # a chunk that goes the other way in this time saves a frame; more than most microbatches take
# With more under way than this share of the window, or where only one more chunk fits, the peer is asked at once.
ASK_SHARE = 0.5
BUSY_LEAST_S = 0.05  # of traffic at the cap, ten times a late wake-up: shorter stretches say nothing of the link
ROW = {
    Kind.ACTIVATION: "activation",
    Kind.GRADIENT: "gradient",
    Kind.EVALUATION: "evaluation",
    Kind.EVALUATION_LOSS: "evaluation",
    Kind.PROBE: "probe",
    Kind.PROJECTOR_GRADIENT: "projector_gradient",
    Kind.GRADIENT_NORM: "gradient_norm",
    Kind.CONTEXT: "context",
    Kind.CONTEXT_GRADIENT: "context_gradient",
    Kind.CONTEXT_EVALUATION: "evaluation",
    Kind.CONTEXT_GRAM: "context",
    Kind.CONTEXT_SUBSPACE: "context",
}
APART = ("evaluation", "probe")  # counted whole, outside the ratio

Write = Callable[[bytes], Awaitable[None]]


def chunk_bytes_for(profile: LinkProfile) -> int:
    """About 5 ms of the link, since a control frame may have to wait for one, and not too little, since each costs CPU
    at both ends. Where no rate is known, the most: there the whole window may be inside gRPC ahead of a control frame,
    however it is cut."""
    if profile.rate_bits_per_s is None:
        return CHUNK_BYTES_MAX
    return min(CHUNK_BYTES_MAX, max(64 * 1024, int(profile.rate_bits_per_s / 8 * 0.005)))


def part_bytes_for(profile: LinkProfile) -> int:
    """Of a file that is sent in parts: large ones cost less CPU, but a tensor or a heartbeat that comes may have to
    wait for one, so at most about 5 ms of the link, and not too little."""
    if profile.rate_bits_per_s is None:
        return PART_BYTES_MAX
    return max(16 * 1024, min(PART_BYTES_MAX, int(profile.rate_bits_per_s / 8 * 0.005)))


def accounted_parts(message: Message, chunk_bytes: int) -> Iterator[tuple[Head | None, Data, dict[str, int]]]:
    """The parts of a message (`protocol.messages.split`), each with its data bytes by kind."""
    row = ROW[message.kind]
    left = {"token_ids": len(message.token_ids), "dictionary": len(message.dictionary), row: len(message.body)}
    if row in APART:
        left = {row: sum(left.values())}
    for head, data in split(message, chunk_bytes):
        rows, room = {}, len(data)
        for name in left:
            rows[name] = min(left[name], room)
            left[name] -= rows[name]
            room -= rows[name]
        yield head, data, {name: count for name, count in rows.items() if count or name == row}


def framed_rows(rows: dict[str, int], framed: int) -> dict[str, int]:
    """The same with what the frame around the data takes: a row of its own, or in the row of what is counted whole."""
    (first, *_), framing = rows, framed - sum(rows.values())
    return {first: framed} if first in APART else {**rows, "framing": framing}


@dataclass(slots=True, kw_only=True)
class _Part:
    """A queued part of a message and how its data bytes are accounted."""

    head: Head | None
    data: Data
    rows: dict[str, int]


_Item = _Part | Literal["credit", "goodbye"]


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """A frame between the bucket and gRPC."""

    frame: bytes
    rows: dict[str, int]
    enqueued_s: float
    paid_from_s: float
    depart_s: float
    arrive_s: float
    tensor: bool
    goodbye: bool


class Outgoing:
    """What this node sends to one neighbour. Outlives connections; `admission` and `delivery` run while one stands."""

    def __init__(
        self,
        *,
        name: str,
        session: LinkSession,
        profile: LinkProfile,
        chunk_bytes: int,
        uncapped_window_bytes: int,
        seed: int,
        tracer: Tracer,
        clock: Callable[[], float],
        sent: Counter[str] | None = None,
    ) -> None:
        self.session, self.profile = session, profile
        # Framed bytes by kind, counted when handed to gRPC; resent frames too, and what earlier generations sent.
        self.sent: Counter[str] = Counter() if sent is None else sent
        # What the bucket's credit alone can carry waited for nothing, and says nothing of the rate.
        credit_bytes = profile.burst_bytes if profile.rate_bits_per_s else 0
        self.meter = BusyMeter(least_bytes=credit_bytes + int(BUSY_LEAST_S * (profile.rate_bits_per_s or 0) / 8))
        self.shaper = Shaper(profile.applied, random=seed)
        self.queue: WireQueue[_Item] = WireQueue()
        self.line: deque[_InFlight] = deque()
        self.round_trip_s = 2 * profile.latency_s
        self.goodbye_due = False  # said: nothing may follow it
        self.goodbye_leaving = False  # being handed to gRPC
        self.goodbye_sent = False  # handed to gRPC
        self.probing: AcknowledgedRate | None = None  # while filler, and nothing else, is sent
        self.credit_row = "control"  # or "probe", while what came last is filler: how often it was tried is no training
        self.moved = asyncio.Event()  # something left the queue or the line, or was acknowledged
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._uncapped_window_bytes = uncapped_window_bytes
        self._tracer = tracer
        self._clock = clock
        self._admit = asyncio.Event()  # the admission loop has something new to look at
        self._deliver = asyncio.Event()
        self._credit_queued = False
        self._draining = False
        self._credit_timer: asyncio.TimerHandle | None = None
        self._goodbye_queued = False
        self._window_open_since = 0.0

    @property
    def window_bytes(self) -> int:
        """The most that may be under way unacknowledged."""
        if self.profile.rate_bits_per_s is None:
            return self._uncapped_window_bytes
        product = self.profile.rate_bits_per_s / 8 * self.round_trip_s
        return int(WINDOW_BANDWIDTH_DELAY_PRODUCTS * product) + 2 * self._chunk_bytes

    @property
    def quiet(self) -> bool:
        """Everything was sent and acknowledged."""
        return not (self.queue.peek_tensor() or self.line or self.session.unacknowledged_bytes)

    # -- into the queue -----------------------------------------------------------------------------------------

    def push(self, message: Message) -> None:
        """Queue a message, whole."""
        now = self._clock()
        for head, data, rows in accounted_parts(message, self._chunk_bytes):
            part = _Part(head=head, data=data, rows=rows)
            self.queue.push(part, framed_bytes(len(data)), control=False, now_s=now)
        self._admit.set()

    def drain(self) -> None:
        """Nothing more will be pushed, so no chunk will bring the peer what it has to know before it says goodbye."""
        self._draining = True
        self._queue_credit()

    def push_credit(self) -> None:
        """Tell the peer what came and what is free: at once if it waits for that, else soon, unless a chunk does."""
        if self.session.credit_urgent or self._draining:
            self._queue_credit()
        elif self.session.credit_due and self._credit_timer is None:
            self._credit_timer = asyncio.get_running_loop().call_later(CREDIT_DELAY_S, self._queue_credit)

    def _queue_credit(self) -> None:
        """One credit frame waits at a time; it is written with the counters of the moment it leaves."""
        self._stop_credit_timer()
        if self.session.credit_due and not self._credit_queued and not self.goodbye_due:
            self._credit_queued = True
            self.queue.push("credit", framed_bytes(16), control=True, now_s=self._clock())
            self._admit.set()

    def _stop_credit_timer(self) -> None:
        if self._credit_timer is not None:
            self._credit_timer.cancel()
            self._credit_timer = None

    def push_goodbye(self) -> None:
        """Nothing may be pushed after it."""
        self._queue_credit()  # the peer says goodbye only when all of its own is acknowledged
        self.goodbye_due = True
        if not self._goodbye_queued:
            self._goodbye_queued = True
            self.queue.push("goodbye", framed_bytes(2), control=True, now_s=self._clock())
            self._admit.set()

    def acknowledged(self) -> None:
        """The session took a frame that may have opened the window."""
        if self.probing:
            self.probing.acknowledged(self.session.unacknowledged_bytes, self._clock())
        self._admit.set()
        self.moved.set()

    # -- onto the wire ------------------------------------------------------------------------------------------

    def begin_connection(self) -> None:
        """Forget what an earlier connection had on its line: it is kept by the session, or said anew by greetings."""
        self.line.clear()

    def forget(self) -> None:
        """What is queued was for a process that is gone."""
        self.queue = WireQueue()
        self._credit_queued = self._goodbye_queued = False
        self.moved.set()

    async def greet(self, write: Write, timeout_s: float) -> float:
        """Greetings precede the queue, so they are written directly, at the link's latency. Returns when it began.
        Raises TimeoutError: a peer may never let a stream begin."""
        frame, began = self.session.greeting(), self._clock()
        passage = self.shaper.admit(framed_bytes(len(frame)), began)
        await self._sleep_until(passage.arrive_s)
        async with asyncio.timeout(timeout_s):
            await write(frame)
        self.sent["control"] += framed_bytes(len(frame))
        return began

    def resume(self) -> None:
        """The greetings agree: what the peer lacks goes first, as it was."""
        now = self._clock()
        for frame in self.session.retransmissions():
            self._enter_line(frame, {"retransmission": framed_bytes(len(frame))}, now, now)
        if self.goodbye_due:  # it is not kept, so what an earlier connection carried of it may be lost
            self.goodbye_sent = self.goodbye_leaving = False
            self.push_goodbye()
        self._window_open_since = now
        self._admit.set()
        self._deliver.set()

    async def reserve(self, nbytes: int) -> bool:
        """If nothing here waits for the wire, take it for so many bytes that travel elsewhere, and return when they
        have left; otherwise wait until something has moved. Whether they have left."""
        if len(self.queue):
            self.moved.clear()
            await self.moved.wait()
            return False
        now = self._clock()
        free_at = self.shaper.wire_free_at(now)
        if free_at > now:
            await self._sleep_until(free_at)
            return False
        passage = self.shaper.admit(nbytes, now)
        # Later, in the order in which the line's own frames are measured, which is when they have arrived.
        loop, arrives_s = asyncio.get_running_loop(), passage.depart_s + self.shaper.profile.latency_s
        measure = partial(
            self.meter.passed,
            nbytes,
            enqueued_s=now,
            paid_from_s=passage.paid_from_s,
            left_s=passage.depart_s,
            tensor=True,
        )
        loop.call_later(max(0.0, arrives_s - now), measure)
        await self._sleep_until(passage.depart_s)
        return True

    def _may_enter(self, entry: Queued[_Item] | None) -> bool:
        if entry is None or not isinstance(entry.item, _Part):
            return False
        size, under_way = len(entry.item.data), self.session.unacknowledged_bytes
        if not self.session.may_send(size):
            return False
        return under_way == 0 or under_way + size <= self.window_bytes

    async def admission(self) -> None:
        """Move frames from the queue through the token bucket, one at a time, as late as possible."""
        stalled = False
        while True:
            tensor = self.queue.peek_tensor()
            closed = not self._may_enter(tensor)
            if closed and self.queue.peek(control_only=True) is None:
                stalled = stalled or tensor is not None
                self._admit.clear()
                await self._admit.wait()
                continue
            if stalled and not closed:
                stalled, self._window_open_since = False, self._clock()
            # What an ideal sender would have done: the wire is taken at `free_at`, by what was there at that time.
            waiting = self.queue.peek(control_only=True) if closed else None
            ready_at = waiting.enqueued_s if waiting else self.queue.ready_s()
            free_at = self.shaper.wire_free_at(ready_at)
            if free_at > self._clock():
                await self._sleep_until(free_at)
                continue  # a control frame may have come in front meanwhile
            entry = self.queue.pop(at_s=free_at, control_only=closed)
            eligible_at = entry.enqueued_s if entry.control else max(entry.enqueued_s, self._window_open_since)
            frame, rows = self._frame_of(entry.item)
            self._enter_line(frame, rows, entry.enqueued_s, eligible_at, entry.item)
            self.moved.set()

    def _frame_of(self, item: _Item) -> tuple[bytes, dict[str, int]]:
        if item == "credit":
            self._credit_queued = False
            frame = self.session.credit()
            return frame, {self.credit_row: framed_bytes(len(frame))}
        if item == "goodbye":
            self._goodbye_queued = False
            frame = self.session.goodbye()
            return frame, {"control": framed_bytes(len(frame))}
        assert isinstance(item, _Part)
        under_way = self.session.unacknowledged_bytes + len(item.data)
        part_bytes = min(self._chunk_bytes, self.session.limits.message_bytes)  # the most that a part holds
        asks_from = min(ASK_SHARE * self.window_bytes, self.window_bytes - 2 * part_bytes)
        asks = under_way > asks_from or self.probing is not None
        frame = self.session.send(item.head, item.data, acknowledge=asks)
        self._stop_credit_timer()  # it told all; what comes from now on has its own delay
        if self.probing:
            self.probing.stamped(len(item.data), framed_bytes(len(frame)))
        return frame, framed_rows(item.rows, framed_bytes(len(frame)))

    def _enter_line(
        self, frame: bytes, rows: dict[str, int], enqueued_s: float, eligible_s: float, item: _Item | None = None
    ) -> None:
        passage = self.shaper.admit(framed_bytes(len(frame)), eligible_s)
        flight = _InFlight(
            frame=frame,
            rows=rows,
            enqueued_s=enqueued_s,
            paid_from_s=passage.paid_from_s,
            depart_s=passage.depart_s,
            arrive_s=passage.arrive_s,
            tensor=item is None or isinstance(item, _Part),
            goodbye=item == "goodbye",
        )
        self.line.append(flight)
        self._deliver.set()

    async def delivery(self, write: Write, on_goodbye: Callable[[], None]) -> None:
        """Hand frames to gRPC when the delay line lets go of them."""
        while True:
            while not self.line:
                self._deliver.clear()
                await self._deliver.wait()
            flight = self.line[0]
            await self._sleep_until(flight.arrive_s)
            self.goodbye_leaving = self.goodbye_leaving or flight.goodbye
            await write(flight.frame)
            now = self._clock()
            self.line.popleft()
            if flight.goodbye:
                self.goodbye_sent = True
                on_goodbye()
            self.sent.update(flight.rows)
            nbytes = framed_bytes(len(flight.frame))
            # At the time it really left, not at the ideal one: a cap that is missed must show.
            self.meter.passed(
                nbytes,
                enqueued_s=flight.enqueued_s,
                paid_from_s=flight.paid_from_s,
                left_s=now - self.shaper.profile.latency_s,
                tensor=flight.tensor,
            )
            if flight.tensor:
                started_s = flight.depart_s - self.shaper.profile.serialisation_s(framed_bytes(len(flight.frame)))
                self._tracer.span("send", self._name, started_s, now)
            self.moved.set()

    async def _sleep_until(self, moment_s: float) -> None:
        delay = moment_s - self._clock()
        if delay > 0:
            await asyncio.sleep(delay)
