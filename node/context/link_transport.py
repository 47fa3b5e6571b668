"""The `ContextTransport` of a node: the compute thread's keys and values on their way over context links.

The compute thread blocks in the middle of a layer until a part of another lane is here, and only there: the links live
on the event loop, which goes on. So each wait is a coroutine of the loop, with the loop's clock and the deadline rules
of all other waits (`node.receive_deadline`), and the thread waits for that one's end. Why not a queue of the standard
library between the two: it would need a deadline of its own, and could not say what the link is doing.

What comes is kept by key until it is wanted, since segments of one layer may come in another order than they are
looked at; no more than `ContextParts.held_most` of it. Then nothing more is read from that peer, whose credit ends; and
if what is wanted is not among so many, the peer sends what no schedule has, and is refused.

When the generation is over, all waits end at once, with GenerationEnded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from ...protocol.messages import Kind, Message
from ..links.link import GenerationEnded, Link
from ..receive_deadline import ReceiveDeadline
from ..run_records import Stopwatch
from ..worker_thread import Reporter
from .context_parts import ContextParts, message_of
from .exchange import ContextKey

T = TypeVar("T")
LOOK_AGAIN_S = 1.0  # whether the loop that the compute thread waits for is still there


@dataclass(slots=True)
class _Peer:
    """One other lane. handed, gone: bytes that the compute thread gave, and that the link took of them."""

    link: Link
    peer_changes: int = 0
    held: dict[ContextKey, bytes] = field(default_factory=dict)
    taken: set[ContextKey] = field(default_factory=set)  # of the step under way
    came: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    outbox: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    handed: int = 0
    gone: int = 0


class LinkTransport:
    """Over `links`, by lane, in one generation that begins after `completed` steps. send_buffer_bytes: from which on
    `send` waits. Must be made in the event loop. `send` and `receive` are for the thread that computes; all else
    belongs to the loop."""

    def __init__(
        self,
        links: Mapping[int, Link],
        parts: ContextParts,
        *,
        completed: int,
        send_buffer_bytes: int,
        deadline: ReceiveDeadline,
        on_fault: Reporter,
        watch: Stopwatch,
    ) -> None:
        self._peers = {lane: _Peer(link) for lane, link in sorted(links.items())}
        self._parts, self._step = parts, completed
        self._send_buffer_bytes = send_buffer_bytes
        self._deadline, self._on_fault, self._watch = deadline, on_fault, watch
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        self._ended = False

    @property
    def links(self) -> list[Link]:
        """By lane, in order."""
        return [peer.link for peer in self._peers.values()]

    # -- for the thread that computes ---------------------------------------------------------------------------------

    def send(self, lane: int, key: ContextKey, body: bytes) -> None:
        """To that lane; does not wait for it, but for this node's own link where that is far behind (in plain order the
        first lanes may be). Raises what `receive` does, and LocalProtocolError for a part that is none."""
        if self._ended:
            raise self._over()
        peer, due = self._peers[lane], self._parts.body_bytes(key)
        if len(body) != due:
            raise LocalProtocolError(Fault.MALFORMED, f"{key}: {len(body)} bytes to send, and {due} are due")
        peer.handed += len(body)
        self._call(peer.outbox.put_nowait, message_of(key, body))
        if peer.handed - peer.gone > self._send_buffer_bytes:
            self._wait(self.until_room(lane, key))

    def receive(self, lane: int, key: ContextKey) -> bytes:
        """From that lane; waits until it is here. Each part once. Raises TimeoutError, which says for what and for how
        long was waited, and GenerationEnded."""
        return self._wait(self.take(lane, key))

    def _call(self, callback: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed
            raise self._over() from None

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that the loop runs."""
        if threading.get_ident() == self._loop_thread:
            work.close()
            raise RuntimeError("the event loop would wait for itself; call from the thread that computes")
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise self._over() from None
        with self._watch.waiting_within("compute"):
            while not wait([future], LOOK_AGAIN_S).done:  # the loop has the deadline
                if self._loop.is_closed():  # before it began with this
                    work.close()
                    raise self._over()
            try:
                return future.result()
            except CancelledError:  # the loop ends
                raise self._over() from None

    # -- on the loop --------------------------------------------------------------------------------------------------

    async def take(self, lane: int, key: ContextKey) -> bytes:
        """As `receive`."""
        return await self._in_time(self._peers[lane].link, str(key), lambda: self._take(lane, key))

    async def until_room(self, lane: int, key: ContextKey) -> None:
        """Wait while too much is handed to the link of that lane."""
        peer = self._peers[lane]

        async def room() -> None:
            while peer.handed - peer.gone > self._send_buffer_bytes:
                peer.left.clear()
                await self._unless_over(peer.left)

        await self._in_time(peer.link, f"the link to take {key}", room)

    async def _in_time(self, link: Link, what: str, wait: Callable[[], Coroutine[Any, Any, T]]) -> T:
        while True:
            timeout_s = self._deadline.timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    return await wait()
            except TimeoutError:
                if not self._deadline.extend(timeout_s):
                    raise TimeoutError(link.late(what, timeout_s)) from None

    async def _take(self, lane: int, key: ContextKey) -> bytes:
        peer = self._peers[lane]
        while True:
            if self._ended:
                raise self._over()
            self._look_at(peer)
            if (body := peer.held.pop(key, None)) is not None:
                if key.step > self._step:
                    self._step = key.step
                    for each in self._peers.values():
                        each.taken.clear()
                peer.taken.add(key)
                peer.link.session.used = True
                peer.room.set()
                return body
            if len(peer.held) >= self._parts.held_most(lane):
                line = f"{len(peer.held)} other parts came where {key} was due, first {min(peer.held)}"
                self._refuse(peer, RemoteProtocolError(Fault.PAYLOAD, line))
            peer.came.clear()
            await self._unless_over(peer.came)

    async def _unless_over(self, event: asyncio.Event) -> None:
        await event.wait()
        if self._ended:
            raise self._over()

    async def pump(self) -> None:
        """Move everything, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane, peer in self._peers.items():
                group.create_task(self._receiving(lane, peer))
                group.create_task(self._sending(peer))

    async def flush(self) -> None:
        """Wait until the links have taken everything. Raises TimeoutError."""
        for peer in self._peers.values():
            await self._in_time(peer.link, "the link to take what is sent", peer.outbox.join)

    def end(self) -> None:
        """The generation is over."""
        self._ended = True
        for peer in self._peers.values():
            for event in (peer.came, peer.left):
                event.set()

    async def _sending(self, peer: _Peer) -> None:
        while True:
            message = await peer.outbox.get()
            await peer.link.send(message)
            peer.gone += message.head.body_bytes
            peer.left.set()
            peer.outbox.task_done()

    async def _receiving(self, lane: int, peer: _Peer) -> None:
        while True:
            while len(peer.held) >= self._parts.held_most(lane):
                peer.room.clear()
                await peer.room.wait()
            message = await peer.link.receive()
            self._look_at(peer)
            if message.kind is Kind.PROBE:
                continue
            try:
                key = self._parts.key_of(message, lane)
                self._check_order(peer, key)
            except RemoteProtocolError as error:
                self._refuse(peer, error)
                continue
            peer.held[key] = bytes(message.body)
            peer.came.set()

    def _check_order(self, peer: _Peer, key: ContextKey) -> None:
        """Raises RemoteProtocolError for a part of a step that no peer is in, and for one that was here before."""
        if not self._step <= key.step <= self._step + 1:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{key}, and this node is in step {self._step}")
        if key in peer.held or key in peer.taken:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{key} for the second time")

    def _look_at(self, peer: _Peer) -> None:
        """Whether it is still the process of which parts are held; no part of another one counts."""
        if peer.peer_changes != peer.link.peer_changes:
            peer.peer_changes = peer.link.peer_changes
            peer.held.clear()
            peer.room.set()

    def _refuse(self, peer: _Peer, error: RemoteProtocolError) -> None:
        self._on_fault(error.fault, f"{peer.link.name}: refused {peer.link.session.peer_name}: {error}")
        peer.link.reject(error)
        self._look_at(peer)

    @staticmethod
    def _over() -> GenerationEnded:
        return GenerationEnded("the generation is over, and with it what was waited for of other lanes")
