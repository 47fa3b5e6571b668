"""The outgoing half of a lateral link: queue, token bucket, delay line, and the account of what was sent.

The same link model as that of the tensors (`node.links.outgoing`), for frames that are whole when they are queued:
nothing is kept here until it is acknowledged, since what is lost with a connection is read from the disk again. So the
window is the session's (`protocol.round_transfer`), and this half only paces, delays, counts and measures. Heartbeats
and acknowledgements go ahead of contributions that wait for the bucket.

Each lateral link has a bucket of its own, as each boundary has: a path of its own to another machine. Where lateral and
boundary links leave through one interface, cap that in the kernel (`LinkProfile.kernel`); then nothing is shaped here.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from ...protocol.round_transfer import WINDOW_PARTS_LEAST
from ...protocol.wire_size import framed_bytes
from ...sim.links.shaper import BusyMeter, LinkProfile, Passage, Shaper, WireQueue
from ..links.outgoing import BUSY_LEAST_S, WINDOW_BANDWIDTH_DELAY_PRODUCTS, Write, part_bytes_for

Kind = Literal["control", "averaging", "checkpoint_copy"]
QUEUED_PARTS = 8  # read from the disk ahead of the bucket
QUEUED_CONTROL_MAX = 64  # frames
WINDOW_BYTES_MAX = 16 * 2**20


def window_bytes_for(profile: LinkProfile) -> int:
    """What fills the link for a round trip, beside the parts that wait for the bucket and for an acknowledgement."""
    part_bytes = part_bytes_for(profile)
    product = profile.bandwidth_delay_product_bytes()
    if product is None:
        return WINDOW_BYTES_MAX
    waiting = QUEUED_PARTS + WINDOW_PARTS_LEAST
    return min(WINDOW_BYTES_MAX, int(WINDOW_BANDWIDTH_DELAY_PRODUCTS * product) + waiting * part_bytes)


@dataclass(frozen=True, slots=True)
class _Item:
    frame: bytes
    kind: Kind


@dataclass(frozen=True, slots=True)
class _InFlight:
    """Between the bucket and gRPC."""

    item: _Item
    enqueued_s: float
    passage: Passage


class LateralOutgoing:
    """What this node sends to one peer. Outlives connections; `admission` and `delivery` run while one stands. Times
    are those of the event loop."""

    def __init__(self, profile: LinkProfile, *, seed: int) -> None:
        self.sent: Counter[Kind] = Counter()  # framed bytes, counted when they are handed to gRPC
        self.shaper = Shaper(profile.applied, random=seed)
        credit_bytes = profile.burst_bytes if profile.rate_bits_per_s else 0
        self.meter = BusyMeter(least_bytes=credit_bytes + int(BUSY_LEAST_S * (profile.rate_bits_per_s or 0) / 8))
        self._moved = asyncio.Event()
        self._admit, self._deliver = asyncio.Event(), asyncio.Event()
        self.begin_connection()

    def begin_connection(self) -> None:
        """What waited for an earlier connection is void."""
        self._queue: WireQueue[_Item] = WireQueue()
        self._line: deque[_InFlight] = deque()
        self._control = 0  # frames of that kind which were not handed to gRPC
        self._queued_parts = 0
        self._moved.set()

    def push(self, frame: bytes, kind: Kind = "control") -> None:
        """Queue a frame. Raises ConnectionError where the peer takes nothing."""
        control = kind == "control"
        if control:
            self._control += 1
        else:
            self._queued_parts += 1
        if self._control > QUEUED_CONTROL_MAX:
            raise ConnectionError(f"{QUEUED_CONTROL_MAX} frames wait for a peer that takes none")
        now_s = asyncio.get_running_loop().time()
        self._queue.push(_Item(frame, kind), framed_bytes(len(frame)), control=control, now_s=now_s)
        self._admit.set()

    async def reserve(self, nbytes: int) -> None:
        """Wait until nothing here waits for the wire, and take it for so many bytes that travel beside; returns when
        they have left."""
        loop = asyncio.get_running_loop()
        while True:
            if len(self._queue):
                await self._until_moved()
                continue
            free_s = self.shaper.wire_free_at(loop.time())
            if free_s <= loop.time():
                break
            await asyncio.sleep(free_s - loop.time())
        passage = self.shaper.admit(nbytes, loop.time())
        await asyncio.sleep(max(0.0, passage.depart_s - loop.time()))

    async def until_short(self) -> None:
        """Wait while enough parts of contributions are queued."""
        while self._queued_parts > QUEUED_PARTS:
            await self._until_moved()

    async def until_sent(self) -> None:
        """Wait until everything has been handed to gRPC."""
        while not self.idle:
            await self._until_moved()

    @property
    def idle(self) -> bool:
        """Everything has been handed to gRPC."""
        return not (len(self._queue) or self._line)

    async def _until_moved(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    async def admission(self) -> None:
        """Move frames from the queue through the token bucket, one at a time, as late as possible (sim.links.shaper
        says why)."""
        loop = asyncio.get_running_loop()
        while True:
            if not len(self._queue):
                self._admit.clear()
                await self._admit.wait()
                continue
            free_s = self.shaper.wire_free_at(self._queue.ready_s())
            if free_s > loop.time():
                await asyncio.sleep(free_s - loop.time())
                continue
            entry = self._queue.pop(at_s=free_s)
            self._queued_parts -= not entry.control
            passage = self.shaper.admit(entry.nbytes, entry.enqueued_s)
            self._line.append(_InFlight(entry.item, entry.enqueued_s, passage))
            self._deliver.set()
            self._moved.set()

    async def delivery(self, write: Write) -> None:
        """Hand frames to gRPC when the delay line lets go of them."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._line:
                self._deliver.clear()
                await self._deliver.wait()
            flight = self._line[0]
            if (delay_s := flight.passage.arrive_s - loop.time()) > 0:
                await asyncio.sleep(delay_s)
            await write(flight.item.frame)
            self._line.popleft()
            self._control -= flight.item.kind == "control"
            nbytes = framed_bytes(len(flight.item.frame))
            left_s = loop.time() - self.shaper.profile.latency_s  # really, and not ideally: a missed cap must show
            self.sent[flight.item.kind] += nbytes
            self.meter.passed(
                nbytes,
                enqueued_s=flight.enqueued_s,
                paid_from_s=flight.passage.paid_from_s,
                left_s=left_s,
                tensor=flight.item.kind == "averaging",
            )
            self._moved.set()
