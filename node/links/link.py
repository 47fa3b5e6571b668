"""A link to one neighbour: what a stage sends and receives at one boundary, over as many connections as needed. Where
lanes hold chunks of the same sequences, there is one to the own stage in each other lane too, a *context link*.

A `Link` joins the pure rules (`protocol.session`), the outgoing half with its link model (outgoing.py) and whatever
moves bytes. It outlives connections: `attach` runs one connection until it ends, and the next one goes on where that
stopped. Reading and writing are two coroutines given by the transport, so the same link runs over gRPC and in memory.

Whoever knows the run's configuration can greet, so a greeting alone binds nobody: until the stage has used something of
the process at the other end, or has told it something (`LinkSession.used`), another one may take its place. From then
on only that process is accepted, and its messages must be valid: sending a message again that was refused after it was
acknowledged would not help, so the link is lost, and the run with it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from ...protocol.errors import Fault, RefusedError, RemoteProtocolError
from ...protocol.messages import Greeting, Kind, Message, decode_frame
from ...protocol.session import LinkSession, Opened, PeerDone, Received
from ...protocol.wire_size import framed_bytes
from ...sim.links.link_check import LinkCheck
from ...sim.links.shaper import BusyMeter, LinkProfile
from ...sim.reports.lanes import context_link_name
from ..run_records import Tracer
from .link_probe import AcknowledgedRate, fill, probe_s
from .outgoing import Outgoing, Write, chunk_bytes_for

# Once below the cap is no fault of the link: a machine that stalls for longer than the window lasts makes it so.
PROBE_TRIES = 3
SHARED_PROBE_TRIES = 6  # where links share an interface, and so probes may meet
LAST_WORD_S = 10.0

Read = Callable[[], Awaitable[bytes | None]]


class LinkLost(RuntimeError):
    """What the peer sent, or was sent, was refused for good: the run has to start again."""


class LinkOffCap(LinkLost):
    """The link is not what is configured, and the settings say that the node shall not go on then."""


class GenerationEnded(ConnectionError):
    """The connection ends because its generation has: nobody is to blame."""


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
        sent: Counter[str] | None = None,
    ) -> None:
        self.session = session
        self.serving = asyncio.Lock()  # held while a connection from above is attached
        self.over = False  # its generation is
        self.profile = profile
        self.received_bytes = 0
        self.peer_done = asyncio.Event()
        self.opened = asyncio.Event()
        self._both_done = asyncio.Event()  # goodbye was said both ways on the present connection
        self._peer_parted = False  # on it
        self.fault: str | None = None  # why the last connection ended, when it was not by goodbye
        self.lost = asyncio.Event()  # no connection can mend this link
        self._outgoing = Outgoing(
            name=self.name,
            session=session,
            profile=profile,
            chunk_bytes=chunk_bytes or chunk_bytes_for(profile),
            uncapped_window_bytes=uncapped_window_bytes,
            seed=seed,
            tracer=tracer,
            clock=clock,
            sent=sent,
        )
        self.peer_changes = 0  # rises when what came so far must not be used
        self._rejected = False  # a message on this connection was refused for what it says, here or there
        self._inbox: deque[tuple[Message, int]] = deque()
        self._arrived = asyncio.Event()
        self._send_buffer_bytes = send_buffer_bytes
        self._clock = clock
        self._tracer = tracer
        self._greeted_at: float | None = None
        self.round_trip_s: float | None = None  # of the greetings, where this node spoke first
        self._close_connection: Callable[[Exception], None] | None = None

    @property
    def of_context(self) -> bool:
        """Whether it leads to another lane."""
        return self.session.place.lane != self.session.identity.lane

    @property
    def dials(self) -> bool:
        """Whether this node opens its connections: those to the stage below, and to lower lanes."""
        identity, place = self.session.identity, self.session.place
        return place.lane < identity.lane if self.of_context else place.stage > identity.stage

    @property
    def name(self) -> str:
        identity, place = self.session.identity, self.session.place
        if self.of_context:
            return context_link_name(identity.stage, identity.lane, place.lane)
        return f"boundary {min(identity.stage, place.stage)}-{max(identity.stage, place.stage)}"

    @property
    def way(self) -> dict[str, int | str]:
        """Which way this node sends, for its records."""
        if self.of_context:
            return {"peer_lane": self.session.place.lane, "direction": "context"}
        mine, peer = self.session.identity.stage, self.session.peer_stage
        return {"boundary": min(mine, peer), "direction": "backward" if peer < mine else "forward"}

    @property
    def sent(self) -> Counter[str]:
        """Framed bytes by kind, counted when they were handed to gRPC."""
        return self._outgoing.sent

    @property
    def meter(self) -> BusyMeter:
        """What the link delivered while its queue was not empty."""
        return self._outgoing.meter

    @property
    def finished(self) -> bool:
        """Both sides said goodbye: the connection may end."""
        return self._outgoing.goodbye_sent and self.peer_done.is_set()

    # -- for the stage ------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Queue a message; waits while more than the send buffer is queued (one message always fits)."""
        self.session.used = self.session.used or message.kind is not Kind.PROBE
        size, out = message.head.data_bytes, self._outgoing
        while len(out.queue) and out.queue.queued_bytes + size > self._send_buffer_bytes:
            out.moved.clear()
            await out.moved.wait()
        out.push(message)

    async def receive(self) -> Message:
        """The next message. Its credit returns to the peer at once, so the caller has to bound what it holds."""
        while not self._inbox:
            self._arrived.clear()
            await self._arrived.wait()
        message, cost_bytes = self._inbox.popleft()
        self.session.consume(cost_bytes)
        self._outgoing.push_credit()
        return message

    async def reserve(self, nbytes: int) -> bool:
        """Take the link's time, when it has nothing else to do, for so many bytes that travel beside it. Returns when
        they have left; False if the generation is over before."""
        while not self.over:
            if await self._outgoing.reserve(nbytes):
                return True
        return False

    async def probe(self, timeout_s: float) -> LinkCheck:
        """Fill the capped link for a moment, so that its rate is known before it is trusted: configured and measured.

        Measured again, a few times, while the two differ; the closest counts. Raises TimeoutError.
        """
        found, most = self._checked(None, 1), SHARED_PROBE_TRIES if self.profile.kernel else PROBE_TRIES
        if self.profile.rate_bits_per_s is None:
            return found
        try:
            async with asyncio.timeout(timeout_s):
                for tries in range(1, most + 1):
                    rate = await fill(
                        self._count_probe,
                        self.send,
                        self._until_acknowledged,
                        rate_bits_per_s=self.profile.rate_bits_per_s,
                        burst_bytes=self.profile.burst_bytes,
                        message_bytes_max=self.session.limits.message_bytes,
                    )
                    again = self._checked(rate, tries)
                    if found.deviation is None or (again.deviation and abs(again.deviation) < abs(found.deviation)):
                        found = again
                    if not again.misses:
                        return again
                    if self.profile.kernel and self.way["direction"] != "forward":
                        # A probe that goes down may share the interface: it tries again at once, this one later.
                        await asyncio.sleep(3 * probe_s(self.profile))
        except TimeoutError:
            raise TimeoutError(self.late("the probe of the link", timeout_s)) from None
        finally:
            self._outgoing.probing = None
        return replace(found, tries=most)

    @property
    def _own_name(self) -> str:
        stage, lane = self.session.identity.stage, self.session.identity.lane
        return f"lane {lane}" if self.of_context else f"stage {stage}"

    def _count_probe(self, meter: AcknowledgedRate) -> None:
        self._outgoing.probing = meter

    def _checked(self, measured_bits_per_s: float | None, tries: int) -> LinkCheck:
        return LinkCheck(
            name=f"{self.name}, from {self._own_name}",
            configured_bits_per_s=self.profile.rate_bits_per_s,
            measured_bits_per_s=measured_bits_per_s,
            round_trip_s=self.round_trip_s,
            tries=tries,
        )

    async def _until_acknowledged(self) -> None:
        while not self._outgoing.quiet:
            self._outgoing.moved.clear()
            await self._outgoing.moved.wait()

    async def settle(self, timeout_s: float) -> None:
        """Wait until the peer has acknowledged everything: it is on the wire then, and in the account."""
        try:
            async with asyncio.timeout(timeout_s):
                self._outgoing.drain()
                await self._until_acknowledged()
        except TimeoutError:
            raise TimeoutError(self.late("the peer's acknowledgements", timeout_s)) from None

    async def drain(self, timeout_s: float) -> None:
        """Wait until the peer has acknowledged everything, say goodbye, and wait for the peer's.

        Whether our own goodbye arrives is then of use to the peer alone, and if that has left, to nobody: it is not
        waited for longer than `LAST_WORD_S`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                self._outgoing.drain()
                await self._until_acknowledged()
                if not self._outgoing.goodbye_due:  # on each next connection it is said anyway
                    self._outgoing.push_goodbye()
                await self.peer_done.wait()
        except TimeoutError:
            raise TimeoutError(self.late("the peer's acknowledgements and goodbye", timeout_s)) from None
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await self._both_done.wait()

    def reject(self, error: RemoteProtocolError) -> None:
        """What the peer sent is not what was agreed (seen only after decoding): refuse it and close the connection."""
        self.fault, self._rejected = str(error), True
        self._disown()
        if self._close_connection is not None:
            self._close_connection(error)
        else:
            self.fix_peer()

    def abandon(self) -> None:
        """The generation is over, and this link with it."""
        self.over = True
        self._outgoing.moved.set()
        if self._close_connection is not None:
            self._close_connection(GenerationEnded(f"{self.name}: the generation is over"))

    @property
    def parting(self) -> bool:
        """Nothing is left to be done but to tell the peer goodbye."""
        return self._outgoing.goodbye_due and self.peer_done.is_set()

    def unheard(self) -> None:
        """The connection is over, and whether the peer has read our goodbye is not known: it has to be said again."""
        self._outgoing.goodbye_sent = False

    def fix_peer(self) -> None:
        """The connection is over and both ends know why: is the link lost with it?"""
        if self.session.used and self._rejected:
            self.lost.set()
        self._rejected = False

    async def until_lost(self) -> None:
        """Raises LinkLost."""
        await self.lost.wait()
        raise LinkLost(f"{self.name}: {self.fault}; sending it again would not help, so start the whole swarm again")

    def _disown(self) -> None:
        """What came so far and was not used yet must not be."""
        self._inbox.clear()
        self.peer_changes += 1

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
        is still to be told), RefusedError (the peer told us), or what `read` and `write` raise.
        """
        self.session.connect()
        self._outgoing.begin_connection()
        self._peer_parted = False  # it says goodbye again, and who left without hearing that would leave it alone
        self._both_done.clear()
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def close(error: Exception) -> None:
            if not closing.done():
                closing.set_exception(error)

        self._close_connection = close
        opened = False
        try:
            if speaks_first:
                self._greeted_at = await self._outgoing.greet(write, greeting_timeout_s)
            async with asyncio.timeout(greeting_timeout_s):
                await self._await_greeting(read)
            opened = True
            if not speaks_first:
                await self._outgoing.greet(write, greeting_timeout_s)
            await self._converse(read, write, closing)
        except TimeoutError:
            error = RemoteProtocolError(Fault.TIMEOUT, f"no greeting within {greeting_timeout_s:g} s")
            self.fault = str(error)
            raise error from None
        except RemoteProtocolError as error:
            self.fault = str(error)
            raise
        except RefusedError as error:
            self.fault = f"a refusal by {self.session.peer_name}: {error}"
            self._rejected = opened and error.fault is Fault.PAYLOAD
            raise
        finally:
            closing.cancel()
            self._close_connection = None
            self.session.disconnect()
            self._outgoing.moved.set()

    async def _await_greeting(self, read: Read) -> None:
        raw = await read()
        if raw is None:
            raise ConnectionError(f"{self.name}: the stream ended before the greeting")
        self.received_bytes += framed_bytes(len(raw))
        for event in self.session.receive(raw):
            if isinstance(event, Opened):
                if self._greeted_at is not None:  # this node spoke first, so the answer took one round trip
                    out = self._outgoing
                    self.round_trip_s = self._clock() - self._greeted_at
                    out.round_trip_s = max(out.round_trip_s, self.round_trip_s)
                if event.started_over:
                    self._disown()
                    self._outgoing.forget()
                self.opened.set()
                self.fault = None

    async def _converse(self, read: Read, write: Write, closing: asyncio.Future[None]) -> None:
        out = self._outgoing
        out.resume()
        parts = (out.admission(), out.delivery(write, self._note_end), self._reading(read), self._both_done.wait())
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait([closing, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for ended in (closing, *tasks):  # in this order: what closed it comes before what followed from that
                if ended in done:
                    ended.result()  # raises what ended the connection
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reading(self, read: Read) -> None:
        out = self._outgoing
        while (raw := await read()) is not None:
            self.received_bytes += framed_bytes(len(raw))
            for event in self.session.receive(raw):
                if isinstance(event, Received) and not self._rejected:
                    out.credit_row = "probe" if event.message.kind is Kind.PROBE else "control"
                    self._inbox.append((event.message, event.cost_bytes))
                    self._arrived.set()
                    self._tracer.instant("arrived", self.name)
                elif isinstance(event, PeerDone):
                    self._peer_parted = True
                    self.peer_done.set()
                    self._note_end()
            if not self.peer_done.is_set():
                out.push_credit()
            out.acknowledged()
        if self._peer_parted and out.goodbye_leaving:
            out.goodbye_sent = (
                True  # who said goodbye ends the stream when it has ours: sooner than gRPC says we sent it
            )
            self._note_end()

    def _note_end(self) -> None:
        if self._outgoing.goodbye_sent and self._peer_parted:
            self._both_done.set()
