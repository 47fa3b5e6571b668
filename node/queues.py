"""What stands around a stage's compute thread: workers, intakes that unpack ahead, outboxes that pack behind.

The event loop moves messages and never computes. Model work runs on one *compute* thread, packing and unpacking on one
*codec* thread. Queues between them are short on purpose: their lengths bound memory. Why threads and not processes:
torch releases the interpreter's lock while it computes, and a tensor handed to a thread is not copied.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.messages import Kind, Message
from .boundary.endpoints import Received
from .links.link import Link
from .metrics import Stopwatch, Tracer
from .receive_deadline import ReceiveDeadline

T = TypeVar("T")
Reporter = Callable[[str, str], None]  # (fault code, one line for people)

AHEAD = 2  # unpacked tensors that wait for the compute thread, and finished ones that wait for the codec thread


class Worker:
    """One thread with a name, a stopwatch row and a trace lane.

    Not an executor from the standard library: it wraps each result in two futures that copy each other's state, which
    at thousands of small jobs a second costs as much as packing a tensor.
    """

    def __init__(self, activity: Literal["compute", "codec"], stopwatch: Stopwatch, tracer: Tracer) -> None:
        self._activity: Literal["compute", "codec"] = activity
        self._stopwatch, self._tracer = stopwatch, tracer
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=activity)
        self._thread.start()  # no daemon: torch aborts if it still runs at exit

    def _work(self) -> None:
        # A new thread has its own OpenMP pool size; parity and speed both want exactly one thread of arithmetic.
        torch.set_num_threads(1)
        while job := self._jobs.get():
            job()
            del job  # and with it the tensors that it holds

    async def run(self, name: str, work: Callable[..., T], *args: Any) -> T:
        """The result of `work(*args)`, or what it raises, on this worker's thread, after all that came before."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if answer.done():  # nobody waits any more
                return
            answer.set_exception(error) if error else answer.set_result(cast(T, result))

        def job() -> None:
            start = time.monotonic()
            result, error = None, None
            try:
                with self._stopwatch.measure(self._activity):
                    result = work(*args)
            except StopIteration as raised:  # which no future takes
                error = RuntimeError(f"{name} raised {raised!r}")
            except BaseException as raised:
                error = raised
            self._tracer.span(name, self._activity, start, time.monotonic())
            with suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(settle, result, error)

        self._jobs.put(job)
        return await answer

    def close(self) -> None:
        """The thread ends after its present job; what still waits is dropped."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)

    def join(self) -> None:
        """Wait, after `close`, until the present job is done."""
        self._thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A message and what it holds. `peer_changes` tells apart processes at the other end (see `Link.peer_changes`)."""

    message: Message
    ids_BS: np.ndarray | None = None
    received: Received | None = None  # from above
    tensor: Tensor | None = None  # from below
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

    async def get(self, kind: Kind, step: int, microbatch: int, deadline: ReceiveDeadline) -> Arrival:
        """The next arrival, which has to be this one. Raises TimeoutError; a wrong one is refused and waited out."""
        what = f"the {kind.name.lower()} of step {step}, microbatch {microbatch}"
        while True:
            timeout_s = deadline.timeout_s
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
        self._on_fault(error.fault, f"{self.link.name}: refused stage {self.link.session.peer_stage}: {error}")
        self.link.reject(error)


class SendQueue:
    """Finished tensors on their way to one neighbour: packed on the codec thread, in order, then queued on the link."""

    def __init__(self, link: Link, codec: Worker) -> None:
        self.link, self._codec = link, codec
        self._queue: asyncio.Queue[tuple[str, Callable[[], Message]]] = asyncio.Queue(AHEAD)

    async def put(self, name: str, pack: Callable[[], Message]) -> None:
        """Waits while the link is behind."""
        await self._queue.put((name, pack))

    async def pump(self) -> None:
        while True:
            name, pack = await self._queue.get()
            await self.link.send(await self._codec.run(name, pack))
            self._queue.task_done()

    async def flush(self) -> None:
        await self._queue.join()
