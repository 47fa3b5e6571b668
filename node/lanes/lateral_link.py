"""A lateral link: this node's end of the connection to its own stage in one other lane.

A `LateralLink` joins the pure rules (`protocol.round_session`), two directories of contributions, and the outgoing half
with its link model. It outlives connections: `attach` runs one until it ends, and the next one goes on where the disks
say that it stopped. Reading and writing are two coroutines given by the transport.

What comes is acknowledged when it is written (lateral_arrivals.py), so neither end holds more than a window in memory,
whatever a contribution has. While the disk works nothing more is read from this peer.

A heartbeat a second says that this node lives, how far it is, and what its lane waits for. A peer that says nothing for
`silence_s` counts as gone and is dialled again; who waits for it learns how long ago it was heard.

At the end each side has the other's word that it needs nothing more, and that it has heard the same of this one. Until
then a link is not over: a goodbye that was lost with its connection is said again over the next one. Only the very last
word may be lost, and who lacks nothing but that does not wait for long.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from ...protocol.control_messages import CopyFrame, CopyPart
from ...protocol.errors import Fault, ProtocolError, RefusedError, RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ...protocol.lane_status import StatusExchange
from ...protocol.messages import Greeting, encode_frame
from ...protocol.round_session import (
    PartCame,
    PeerAlive,
    PeerCopies,
    PeerDone,
    PeerGreeted,
    PeerMoved,
    PeerParted,
    PeerTold,
    RoundSession,
)
from ...protocol.round_transfer import PartRange
from ...protocol.wire_size import framed_bytes
from ...sim.links.shaper import LinkProfile
from ..links.control_stream import HEARTBEAT_EVERY_S
from ..links.link import LAST_WORD_S, Read
from ..links.outgoing import Write, part_bytes_for
from .contribution_check import ContributionCheck
from .contribution_store import ContributionError, ContributionStore
from .lateral_arrivals import REFUSED_MAX, LateralArrivals
from .lateral_outgoing import Kind, LateralOutgoing, window_bytes_for
from .lateral_settings import LateralSettings
from .stays import Stays, all_stay
from .waited_peer import WaitedPeer


class LateralLinkEnded(ConnectionError):
    """This node itself ends the connection, to ask anew or to leave: nobody is to blame."""


class LateralLink:
    """The link to lane `peer_lane`. own, received: this node's contributions, and those of that lane."""

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        peer_lane: int,
        own: ContributionStore,
        received: ContributionStore,
        settings: LateralSettings,
        on_peer_moved: Callable[[], None],
        check: ContributionCheck,
        on_held: Callable[[], None] = lambda: None,
    ) -> None:
        profile = settings.profile
        self.session = RoundSession(
            identity=identity,
            peer_lane=peer_lane,
            kept=own.kept,
            contribution_bytes=settings.contribution_bytes,
            part_bytes=part_bytes_for(profile),
            window_bytes=window_bytes_for(profile),
            stay_of=lambda round: self.stays.stay_of(identity.lane, round),
            generation=settings.generation,
        )
        self.stays = all_stay(identity.lanes)  # whose contributions to which rounds are expected
        self.lane = peer_lane
        self.outgoing = LateralOutgoing(profile, seed=settings.seed)
        self._check = check
        self.received = received
        self.arrivals = LateralArrivals(received, lambda round, content: check(round, peer_lane, content))
        self.received_bytes: Counter[Kind] = Counter()  # framed
        self.connections = 0  # on which the peer greeted
        self.peer = WaitedPeer(identity.stage, peer_lane, settings)
        self._own, self._settings, self._on_peer_moved = own, settings, on_peer_moved
        self._on_held = on_held
        self._statuses = StatusExchange(identity.lanes)  # of each connection another one
        self._status_due = False
        self._stay = 0  # of the peer, as it was asked for on this connection
        self._finishing = False
        self._attached = asyncio.Lock()
        self._end: asyncio.Future[None] | None = None  # ends the present connection
        self._greeted, self._news, self._sendable = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._parted = self._left = False  # the peer has heard the goodbye; this node waits for it no more

    @property
    def name(self) -> str:
        mine, peer = sorted((self.session.identity.lane, self.lane))
        return f"lateral {self.session.identity.stage}: lane {mine}-{peer}"

    @property
    def profile(self) -> LinkProfile:
        return self._settings.profile

    @property
    def greeting_timeout_s(self) -> float:
        return self._settings.greeting_timeout_s

    def held_before(self, forgot: int) -> int:
        """All rounds before this one that the peer contributes to are held here, or needed by nobody, as are those
        before `forgot`."""
        return self._next_lacking(max(forgot, self.session.receiver.forget_before or 0))[0]

    def _next_lacking(self, round: int) -> tuple[int, bool]:
        """The first round from this one on that is not held, and whether it is expected at all."""
        while (expected := self.stays.next_stay(self.lane, round)) is not None:
            if expected not in self.received.kept:
                return expected, True
            round = expected + 1
        return round, False

    @property
    def finished(self) -> bool:
        """Neither side needs anything of the other, and the peer knows that; or this node leaves anyway."""
        return self._parted or self._left

    # -- what the node does -------------------------------------------------------------------------------------------

    def need(self, round: int) -> None:
        """This node is at that round."""
        self.session.receiver.need(round)
        self._news.set()

    def forget_before(self, round: int) -> None:
        """This node will never need an earlier round of the peer again."""
        self.session.receiver.forget(round)
        self._news.set()

    def published(self) -> None:
        """There may be more to send."""
        self._sendable.set()

    def tell_status(self) -> None:
        """This node's status has changed."""
        self._status_due = self._settings.status is not None
        self._news.set()

    def expect(self, stays: Stays) -> None:
        """Which contributions are expected from now on: they are asked for anew."""
        self.stays, self.arrivals.void, self.peer.refused = stays, True, None
        self.end(LateralLinkEnded("a lane has left, or entered"))
        self._news.set()
        self._sendable.set()

    def begin_anew(self) -> None:
        """All lanes go on from another step: nothing that was said or came so far counts."""
        self.arrivals.void = True
        self.end(LateralLinkEnded("a generation has begun"))
        self.session.begin_anew()
        self._news.set()

    def finish(self) -> None:
        """This node needs nothing more of the peer."""
        self._finishing = True
        self._news.set()

    async def until_received(self, round: int) -> None:
        """Wait for the peer's contribution. Raises TimeoutError, which says for whom and for how long, when nothing was
        heard for the deadline, or, of a peer that needs nothing more, no contribution; ContributionError for one that
        was given up here, and counts all the same; or what made this link fail."""

        def given_up() -> str | None:
            return self.arrivals.given_up(round, self.stays.stay_of(self.lane, round))

        waiting_for = f"lane {self.lane}'s contribution to round {round}"
        await self.peer.until(lambda: round in self.received.kept or given_up() is not None, waiting_for)
        if round not in self.received.kept:
            raise ContributionError(
                f"{self.name}: {given_up()} ({REFUSED_MAX} times), and other lanes count it; look at the node of lane "
                f"{self.lane}, start it again with --resume, then this lane"
            )

    async def until_finished(self, deadline_s: float | None = None) -> None:
        """Wait until the peer needs nothing more either, and knows that this node does not; the same errors. The latter
        is of use to the peer only, so for that alone no longer than it takes to notice a loss and to say it again.
        deadline_s: without a sign of life, if another one than the settings say, but no shorter than that."""
        patience_s = self._settings.silence_s + LAST_WORD_S
        deadline_s = max(deadline_s, patience_s) if deadline_s is not None else None
        while not self.finished:
            await self.peer.until(lambda: self.peer.done or self.finished, f"the end of lane {self.lane}", deadline_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    while self.peer.done and not self.finished:  # another process of the peer may need something again
                        await self.peer.changed()
            if self.peer.done and not self.finished:
                raise TimeoutError(
                    f"{self.name}: both lanes are through; waited {patience_s:g} s to hear that lane {self.lane} knows "
                    "that of this one, which leaves"
                )

    def leave(self) -> None:
        """Whatever the peer may still need, this node leaves. What it has to say is said."""
        self._left = not self._parted
        self.peer.notify()

    async def until_over(self) -> None:
        """Wait until neither side needs anything of the other, and no connection stands, for as long as that takes."""
        while not self.finished or self._end is not None:
            await self.peer.changed()

    async def say(self, frame: CopyFrame) -> None:
        """On a copy of a state, if the peer is connected. Parts wait for those that are queued."""
        part = isinstance(frame, CopyPart)
        if part:
            await self.outgoing.until_short()
        if self.session.greeted:
            self.outgoing.push(encode_frame(frame), "checkpoint_copy" if part else "control")

    def take_place(self, peer: Greeting) -> None:
        """Another connection comes. The same process dials again: its first connection must be half-dead, and ends. Or
        one dials that has its place in its lane, and the connected one has none, or had it in an earlier generation:
        that was replaced, and may not know yet. Raises RemoteProtocolError for any other process while the first one
        answers."""
        present, beat = self.session.peer, self.peer.heartbeat
        if self._end is None or present is None or not self.session.greeted:
            return
        same = present.incarnation == peer.incarnation
        generation = max(present.generation, beat.generation if beat else 0)
        place_since = None if present.joining and generation == present.generation else generation
        succeeds = not peer.joining and (place_since is None or peer.generation > place_since)
        if not (same or succeeds):
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"lane {self.lane} of stage {peer.stage} is served by process {present.incarnation:x}, which "
                f"answers, so there is no place for process {peer.incarnation:x}; stop one of the two",
            )
        self.end(LateralLinkEnded("the same process opened another connection" if same else "its successor came"))

    def end(self, why: Exception) -> None:
        """End the present connection, if there is one."""
        if self._end is not None and not self._end.done():
            self._end.set_exception(why)

    # -- for the transport --------------------------------------------------------------------------------------------

    async def attach(self, read: Read, write: Write, *, speaks_first: bool) -> None:
        """Run one connection until it ends: when neither side needs anything more, or when the stream does.

        Raises RemoteProtocolError (the peer is still to be told), RefusedError (it told us), ConnectionError,
        ContributionError for this node's own disk, or what `read` and `write` raise.
        """
        async with self._attached:
            await self.arrivals.begin_connection()
            out, session = self.outgoing, self.session
            self._end = asyncio.get_running_loop().create_future()
            self._greeted.clear()
            self._parted = False
            out.begin_connection()
            session.connect()
            self._statuses = StatusExchange(session.identity.lanes, self._settings.rounds())
            self._status_due = self._settings.status is not None
            if speaks_first:
                out.push(self._greeting())
            parts = (
                self._hear(read, answers=not speaks_first),
                out.admission(),
                out.delivery(write),
                self._tell(),
                self._beat(),
                self._send(),
                self._until_parted(),
            )
            tasks = [asyncio.ensure_future(part) for part in parts]
            try:
                done, _ = await asyncio.wait([self._end, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for each in (self._end, *tasks):  # in this order: what closed it comes before what followed from that
                    if each in done:
                        each.result()
            except ProtocolError as error:
                refused = isinstance(error, RefusedError)
                self.peer.fault = f"a refusal by the peer: {error}" if refused else str(error)
                raise
            except ConnectionError as error:
                self.peer.fault = str(error)
                raise
            except ContributionError as error:
                self.peer.fail(ContributionError(f"{self.name}: {error}"))
                raise self.peer.failure or error from None
            finally:
                if not self.finished:
                    self.peer.fault = self.peer.fault or "the last connection broke"
                self._end.cancel()
                self._end = None
                greeted, self.peer.connected = session.greeted, False
                session.disconnect()
                if greeted:
                    self._settings.on_status(self.lane, None)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.peer.notify()

    def _greeting(self) -> bytes:
        return self.session.greeting(self._settings.heartbeat(), joining=self._settings.joining())

    async def _hear(self, read: Read, *, answers: bool) -> None:
        loop, session = asyncio.get_running_loop(), self.session
        while True:
            timeout_s = self._settings.silence_s if session.greeted else self._settings.greeting_timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    raw = await read()
            except TimeoutError:
                if not session.greeted:
                    raise RemoteProtocolError(Fault.TIMEOUT, f"no greeting within {timeout_s:g} s") from None
                raise ConnectionError(f"{self.name}: nothing was heard for {timeout_s:.1f} s") from None
            if raw is None:
                return
            self.peer.heard_s = loop.time()
            try:
                event = session.receive(raw)
            except RemoteProtocolError as error:
                if (faulty := session.receiver.faulty) is not None:
                    await self._refuse(faulty, error)
                raise
            except RefusedError as error:
                if error.fault is Fault.PAYLOAD:
                    refused = session.sender.acknowledged[0]  # the first that the peer does not have
                    await self._check.own(self._own, refused, session.identity.lane, refused_by=self.lane)
                raise
            kind: Kind = "averaging" if isinstance(event, PartCame) else "control"
            if isinstance(event, PeerCopies) and isinstance(event.frame, CopyPart):
                kind = "checkpoint_copy"
            self.received_bytes[kind] += framed_bytes(len(raw))
            match event:
                case PeerGreeted(peer=greeting):
                    if self.arrivals.begin_process(greeting.incarnation):
                        self.peer.refused = None
                    self.peer.done, self.connections = False, self.connections + 1
                    self.peer.fault = self.peer.heartbeat = None
                    if answers:
                        self.outgoing.push(self._greeting())
                    self._greeted.set()
                    self.peer.connected = True
                    self._settings.on_met(self.lane)
                case PeerAlive(heartbeat=heartbeat):
                    self.peer.heartbeat = heartbeat
                case PeerTold(status=status):
                    self._settings.on_status(self.lane, self._statuses.hear(status))
                case PeerCopies(frame=frame):
                    self._settings.on_copy(self.lane, frame)
                case PeerMoved():
                    self._sendable.set()
                    self._on_peer_moved()
                case PartCame(part=part):
                    self.peer.part_s = self.peer.heard_s
                    self.arrivals.add(part)
                    if session.receiver.write_due:
                        await self._write(part.round)
                        session.receiver.written()
                        self._on_held()
                        if not self._finishing:
                            self.outgoing.push(session.received())
                case PeerDone():
                    self.peer.done = True
                    self._news.set()
                    self._settings.on_ended(self.lane)
                case PeerParted():
                    self._parted = True
                    self._news.set()
                case None:
                    pass
            self.peer.notify()

    async def _write(self, round: int) -> None:
        try:
            await self.arrivals.write(self._stay)
        finally:
            self._say_given_up(round)

    async def _refuse(self, round: int, error: RemoteProtocolError) -> None:
        await self.arrivals.refuse(round, self._stay, error.reason)
        self._say_given_up(round)

    def _say_given_up(self, round: int) -> None:
        self.peer.refused = self.arrivals.given_up(round, self._stay)
        self.peer.notify()

    async def _tell(self) -> None:
        """Say where this node is, and whatever has changed of that."""
        await self._greeted.wait()
        receiver, out = self.session.receiver, self.outgoing
        while True:
            self._news.clear()
            if self._status_due and self._settings.status:
                self._status_due = False
                if status := self._settings.status():
                    out.push(self.session.status(self._statuses.say(status)))
            if self._finishing:
                if not self.session.done:
                    out.push(self.session.goodbye())
                if self.session.parting_due:
                    out.push(self.session.parting())
                    self.peer.notify()
                await self._news.wait()  # of statuses, or of the peer's goodbye: there is nothing else to tell
                continue
            if receiver.jumped or self._skips(receiver.goes_on_with):
                raise LateralLinkEnded("this node has gone on to a later round")
            before, stays = receiver.forget_before, self.stays
            first, expected = self._next_lacking(before or 0)
            given_up = self.arrivals.given_up(first, self.stays.stay_of(self.lane, first)) is not None
            if before is not None and not receiver.asked and expected and not given_up:
                bytes_of = self._settings.contribution_bytes
                position, xxh3 = await self.arrivals.lacking(first, bytes_of)
                unchanged = receiver.forget_before == before and self.stays is stays and not self._finishing
                if unchanged and (stay := stays.stay_of(self.lane, position[0])) is not None:
                    self._stay = stay
                    out.push(self.session.wanted(position, xxh3, stay=stay))
                continue
            if receiver.tell_due:
                out.push(self.session.received())
            await self._news.wait()

    async def _until_parted(self) -> None:
        """Wait until both have heard the other's goodbye, as far as this node can know and do: the peer has said so,
        and that this node has heard its own is handed to gRPC."""
        while not (self._left or (self._parted and self.session.parted)):
            await self.peer.changed()
        await self.outgoing.until_sent()

    def _skips(self, round: int | None) -> bool:
        """Whether the peer had no part in that round and came back later, or makes it after others have: it is to be
        asked for anew."""
        if round is None:
            return False
        later = self.stays.next_stay(self.lane, round)
        return later is not None and (later != round or self.stays.stay_of(self.lane, round) != self._stay)

    async def _beat(self) -> None:
        await self._greeted.wait()
        while True:
            self.outgoing.push(self.session.heartbeat(self._settings.heartbeat()))
            await asyncio.sleep(HEARTBEAT_EVERY_S)

    async def _send(self) -> None:
        await self._greeted.wait()
        while True:
            self._sendable.clear()
            ranges = self.session.parts()
            if not ranges:
                await self._sendable.wait()
                continue
            try:
                datas = await asyncio.to_thread(self._read, ranges)
                frames = [self.session.part(each, data) for each, data in zip(ranges, datas, strict=True)]
            except (KeyError, ContributionError):
                if all(each.round in self._own.kept for each in ranges):
                    raise
                raise LateralLinkEnded("what was being sent does not count any more") from None
            for frame in frames:
                self.outgoing.push(frame, "averaging")
            await self.outgoing.until_short()

    def _read(self, ranges: list[PartRange]) -> list[bytes]:
        return [self._own.read(each.round, each.offset, each.length) for each in ranges]
