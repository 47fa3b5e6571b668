"""The queues between a link and a stage: received messages are unpacked ahead of need, finished tensors packed behind.

They are short on purpose: their lengths bound memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.messages import Kind, Message
from .boundary.endpoints import ReceivedTensor
from .links.link import Link
from .receive_deadline import ReceiveDeadline
from .worker_thread import Reporter, Worker

AHEAD = 2  # unpacked tensors that wait for the compute thread, and finished ones that wait for the codec thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A message and what it holds. `peer_changes` tells apart processes at the other end (see `Link.peer_changes`)."""

    message: Message
    ids_BS: np.ndarray | None = None
    received: ReceivedTensor | None = None  # from above
    tensor: Tensor | None = None  # from below
    sum_of_squares: float = 0.0  # from either
    peer_changes: int = 0


class ReceiveQueue:
    """Messages from one neighbour, unpacked ahead of need and handed out in exactly the order the schedule expects."""

    def __init__(
        self, link: Link, unpack: Callable[[Message, int], Arrival], codec: Worker, on_fault: Reporter
    ) -> None:
        self.link = link
        self._unpack, self._codec, self._on_fault = unpack, codec, on_fault
        self._queue: asyncio.Queue[Arrival] = asyncio.Queue(AHEAD)
        self.changed = asyncio.Event()  # something came, or whoever waits for it has to look at something else

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    async def pump(self) -> None:
        while True:
            message = await self.link.receive()
            peer_changes = self.link.peer_changes
            if message.kind is Kind.PROBE:
                continue
            try:
                arrival = await self._codec.run(f"unpack {message.microbatch}", self._unpack, message, peer_changes)
            except RemoteProtocolError as error:
                if peer_changes == self.link.peer_changes:
                    # Whatever is wrong with it, it was acknowledged: the link must know that it will not come again.
                    self.reject(RemoteProtocolError(Fault.PAYLOAD, error.reason))
                continue
            await self._queue.put(arrival)
            self.changed.set()

    async def get(
        self, kind: Kind, step: int, microbatch: int, deadline: ReceiveDeadline, *, evaluation_rounds: int = 0
    ) -> Arrival:
        """The next arrival, which has to be this one. evaluation_rounds: of the evaluation that it ends. Raises
        TimeoutError; a wrong one is refused and waited out."""
        what = f"the {kind.name.lower()} of step {step}, microbatch {microbatch}"
        while True:
            timeout_s = deadline.after_evaluation(evaluation_rounds) if evaluation_rounds else deadline.timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._get(kind, step, microbatch, what)
            except TimeoutError:
                if not deadline.extend(timeout_s):
                    raise TimeoutError(self.link.late(what, timeout_s)) from None

    async def begins(self, step: int, goes_on: Callable[[], bool], deadline: ReceiveDeadline) -> None:
        """Wait until there is an arrival, or `goes_on` says no after `changed` was set. Raises TimeoutError."""
        while True:
            timeout_s = deadline.timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    while self.empty and goes_on():
                        self.changed.clear()
                        await self.changed.wait()
                return
            except TimeoutError:
                if not deadline.extend(timeout_s):
                    raise TimeoutError(self.link.late(f"the beginning of step {step}", timeout_s)) from None

    async def _get(self, kind: Kind, step: int, microbatch: int, what: str) -> Arrival:
        while True:
            arrival = await self._queue.get()
            if arrival.peer_changes != self.link.peer_changes:
                continue  # from a process that is gone, and of which nothing was used
            got = arrival.message
            if (got.kind, got.step, got.microbatch) == (kind, step, microbatch):
                self.link.session.used = True
                return arrival
            came = f"{got.kind.name.lower()} of step {got.step}, microbatch {got.microbatch}"
            self.reject(RemoteProtocolError(Fault.OUT_OF_ORDER, f"{came} where {what} was due"))

    def reject(self, error: RemoteProtocolError) -> None:
        self._on_fault(error.fault, f"{self.link.name}: refused {self.link.session.peer_name}: {error}")
        self.link.reject(error)


class SendQueue:
    """Finished tensors on their way to one neighbour: packed on the codec thread, in order, then queued on the link.

    A neighbour that hangs takes nothing, sooner than it is missed: so whoever waits here has a deadline too."""

    def __init__(self, link: Link, codec: Worker, deadline: ReceiveDeadline) -> None:
        self.link, self._codec, self._deadline = link, codec, deadline
        self._queue: asyncio.Queue[tuple[str, Callable[[], Message]]] = asyncio.Queue(AHEAD)
        self._sent = 0

    async def put(self, name: str, pack: Callable[[], Message]) -> None:
        """Waits while the link is behind. Raises TimeoutError."""
        await self._in_time(lambda: self._queue.put((name, pack)))

    async def pump(self) -> None:
        while True:
            name, pack = await self._queue.get()
            await self.link.send(await self._codec.run(name, pack))
            self._sent += 1
            self._queue.task_done()

    async def flush(self) -> None:
        """Wait until the link has all. Raises TimeoutError."""
        await self._in_time(self._queue.join)

    async def _in_time(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Not one of the waits may pass in which nothing is taken."""
        while True:
            timeout_s, sent = self._deadline.timeout_s, self._sent
            try:
                async with asyncio.timeout(timeout_s):
                    return await wait()
            except TimeoutError:
                if self._sent == sent and not self._deadline.extend(timeout_s):
                    raise TimeoutError(self.link.late("the neighbour to take what is sent", timeout_s)) from None
