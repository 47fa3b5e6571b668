"""How a link ends: each side gets the other's goodbye, also when a connection breaks on it or a stream is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from thinpipe.node.links.control_stream import Control
from thinpipe.node.links.dialling import dial, dial_control
from thinpipe.node.links.link import Link
from thinpipe.node.links.transport import SERVICE, listening
from thinpipe.protocol.control_messages import CopyProgress
from thinpipe.protocol.rollback import Rollback
from thinpipe.protocol.rollback_actions import Leave, Side
from thinpipe.protocol.session import Event, LinkSession, PeerDone, SessionState

from .builders import identity
from .in_memory import Cut, join
from .links import make_link

pytestmark = pytest.mark.alone

DEADLINE_S = 5.0


# Frames 1 and 2 of a connection are the greetings, 3 and 4 the goodbyes.
LOST = {
    "before the first is written": [Cut(frame=3, at="write")],
    "before the second is written": [Cut(frame=4, at="write")],
    "both on their way": [Cut(frame=3, at="read")],
    "the second on its way": [Cut(frame=4, at="read")],
    "again and again": [Cut(frame=frame, at=at) for at in ("read", "write") for frame in (1, 2, 3)] * 3,
}


@pytest.mark.parametrize("cuts", LOST.values(), ids=LOST)
def test_a_goodbye_that_is_lost_is_said_again(cuts: list[Cut]) -> None:
    async def job() -> None:
        upper, lower = make_link(0), make_link(1)
        async with asyncio.timeout(DEADLINE_S):
            connections, *_ = await asyncio.gather(
                join(upper, lower, cuts), upper.drain(DEADLINE_S), lower.drain(DEADLINE_S)
            )
        assert connections == len(cuts) + 1
        assert upper.finished
        assert lower.finished

    asyncio.run(job())


async def end_before_the_write_returns() -> Link:
    """The peer answers a goodbye, and ends the stream, before gRPC reports that goodbye as written."""
    link, peer = make_link(0), make_link(1).session
    frames: asyncio.Queue[bytes | None] = asyncio.Queue()
    peer.connect()

    async def write(frame: bytes) -> None:
        if any(isinstance(event, PeerDone) for event in peer.receive(frame)):
            frames.put_nowait(peer.goodbye())
            frames.put_nowait(None)
            await asyncio.sleep(DEADLINE_S)
        else:
            frames.put_nowait(peer.greeting())

    async with asyncio.timeout(DEADLINE_S / 2):
        attached = link.attach(frames.get, write, speaks_first=True, greeting_timeout_s=DEADLINE_S)
        await asyncio.gather(attached, link.drain(DEADLINE_S))
    return link


def test_a_stream_that_ends_after_both_goodbyes_is_not_taken_for_a_broken_one() -> None:
    assert asyncio.run(end_before_the_write_returns()).finished


async def part_from_one_who_left() -> Link:
    """The peer's goodbye came, ours was lost with the connection, and there is no other one."""
    link, peer = make_link(0), make_link(1).session
    frames: asyncio.Queue[bytes | None] = asyncio.Queue()
    peer.connect()

    async def write(frame: bytes) -> None:
        if frames.empty() and link.session.state is SessionState.AWAIT:
            peer.receive(frame)
            frames.put_nowait(peer.greeting())
            frames.put_nowait(peer.goodbye())
        else:
            raise ConnectionResetError("cut")

    async with asyncio.timeout(DEADLINE_S):
        draining = asyncio.ensure_future(link.drain(DEADLINE_S))
        with pytest.raises(ConnectionResetError):
            await link.attach(frames.get, write, speaks_first=True, greeting_timeout_s=DEADLINE_S)
        await draining
    return link


def test_a_goodbye_that_nobody_is_left_to_hear_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinpipe.node.links.link.LAST_WORD_S", 0.05)
    assert not asyncio.run(part_from_one_who_left()).finished


Neighbour = Callable[[object, grpc.aio.ServicerContext], Awaitable[None]]


@asynccontextmanager
async def served(neighbour: Neighbour) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    """What it does with each stream that is opened to it, at an address."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(neighbour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Link": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(grace=DEADLINE_S)


async def meet(session: LinkSession, context: grpc.aio.ServicerContext) -> None:
    """Greet, and say goodbye at once."""
    session.connect()
    session.receive(await context.read())
    await context.write(session.greeting())
    await context.write(session.goodbye())


async def dial_a_slow_reader() -> tuple[bool, list[Event]]:
    """A neighbour says goodbye and then reads nothing until the dialling side is done or waits for it.

    Returns whether that was done before its own goodbye had been read, and what the neighbour got in the end.
    """
    link, session = make_link(0), make_link(1).session
    may_read = asyncio.Event()
    events: list[Event] = []

    async def neighbour(_: object, context: grpc.aio.ServicerContext) -> None:
        await meet(session, context)
        await may_read.wait()
        events.extend(session.receive(await context.read()))

    async with served(neighbour) as (address, _):
        calling = dial(
            address,
            link,
            greeting_timeout_s=DEADLINE_S,
            deadline_s=lambda: DEADLINE_S,
            report=lambda code, line: pytest.fail(f"{code}: {line}"),
        )
        leaving = asyncio.ensure_future(asyncio.gather(calling, link.drain(DEADLINE_S)))
        left_early, _ = await asyncio.wait({leaving}, timeout=0.3)
        may_read.set()
        await leaving
    return bool(left_early), events


def test_over_grpc_the_end_of_a_stream_does_not_overtake_its_goodbye() -> None:
    left_early, events = asyncio.run(dial_a_slow_reader())
    assert not left_early
    assert events == [PeerDone()]


async def dial_one_whose_stream_breaks(comes_back: bool) -> tuple[int, list[Event]]:
    """The goodbyes have left at both ends, and the stream breaks before the dialling side's is read: to gRPC there it
    was written. comes_back: whether anybody listens after that.

    Returns how many streams were opened to the neighbour, and what it got on the last one.
    """
    link, session = make_link(0), make_link(1).session
    streams, events = 0, list[Event]()
    gone = asyncio.Event()

    async def neighbour(_: object, context: grpc.aio.ServicerContext) -> None:
        nonlocal streams
        streams += 1
        await meet(session, context)
        if streams == 1:
            while not link.finished:  # noqa: ASYNC110 (the other end's, which has no event for it)
                await asyncio.sleep(0.001)
            gone.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the machine is cut off")
        events.extend(session.receive(await context.read()))

    async with served(neighbour) as (address, server):
        calling = dial(
            address,
            link,
            greeting_timeout_s=DEADLINE_S,
            deadline_s=lambda: DEADLINE_S if comes_back else 0.3,
            report=lambda *_: None,
        )
        leaving = asyncio.ensure_future(asyncio.gather(calling, link.drain(DEADLINE_S)))
        await gone.wait()
        if not comes_back:
            await server.stop(grace=0)
        async with asyncio.timeout(DEADLINE_S):
            await leaving
    return streams, events


def test_a_goodbye_that_was_written_and_not_read_is_said_again() -> None:
    assert asyncio.run(dial_one_whose_stream_breaks(comes_back=True)) == (2, [PeerDone()])


class Wire:
    """A way to a port that can stop carrying what goes down or up it, and break."""

    def __init__(self, port: int) -> None:
        self._port, self._open = port, list[asyncio.StreamWriter]()
        self.carries = {"down": asyncio.Event(), "up": asyncio.Event()}
        for each in self.carries.values():
            each.set()
        self.made = 0

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._open += [writer, there_writer]
        await asyncio.gather(self._carry(reader, there_writer, "down"), self._carry(there_reader, writer, "up"))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while some := await reader.read(2**16):
                await self.carries[way].wait()
                writer.write(some)
            writer.close()

    def cut(self) -> None:
        """All that is open is gone, and what was still to be carried; what is opened from now on is carried."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()
        for each in self.carries.values():
            each.set()


@pytest.mark.parametrize("latency", ["none", "1gbit,20ms"])
@pytest.mark.parametrize("lost", ["down", "up"])
def test_who_dials_leaves_when_its_goodbye_was_read(lost: str, latency: str) -> None:
    """Over gRPC, both ends real: the connection breaks when both goodbyes were written. Down, that of who dials is lost
    with it; up, only the word that it was read, and both say goodbye once more."""

    async def story() -> tuple[int, bool]:
        upper, lower = make_link(0, latency), make_link(1, latency)
        waits: dict[str, Any] = {"greeting_timeout_s": DEADLINE_S, "report": lambda *_: None}
        async with asyncio.timeout(2 * DEADLINE_S), listening("127.0.0.1:0", lower, **waits) as port:
            wire = Wire(port)
            server = await asyncio.start_server(wire.connect, "127.0.0.1", 0)
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            calling = asyncio.create_task(dial(address, upper, deadline_s=lambda: DEADLINE_S, **waits))
            await asyncio.gather(upper.opened.wait(), lower.opened.wait())
            last = asyncio.create_task(lower.drain(DEADLINE_S))
            await upper.peer_done.wait()
            wire.carries[lost].clear()
            await upper.drain(DEADLINE_S)
            if lost == "up":
                await lower.peer_done.wait()
            assert not calling.done()
            wire.cut()
            await asyncio.gather(calling, last)
            server.close()
        return wire.made, upper.finished and lower.finished

    assert asyncio.run(story()) == (2, True)


def test_who_is_not_there_any_more_needs_no_goodbye() -> None:
    assert asyncio.run(dial_one_whose_stream_breaks(comes_back=False)) == (1, [])


@pytest.mark.parametrize("under_way", [0, 5])
def test_who_is_dismissed_leaves_at_once_whatever_is_still_coming(under_way: int) -> None:
    """gRPC tells how a stream ended only when all that came on it has been read."""

    async def story() -> float:
        machines = [Rollback(identity(stage), joining=False) for stage in (0, 1)]
        through = [asyncio.Event(), asyncio.Event()]
        controls: list[Control] = []

        def on_effect(stage: int) -> Callable[[object], None]:
            def took(effect: object) -> None:
                if isinstance(effect, Leave):
                    through[stage].set()
                    for offset in range(under_way if stage else 0):
                        controls[1].tell("above", CopyProgress(stage=0, completed_steps=5, offset=offset))

            return took

        for stage, machine in enumerate(machines):
            sent: dict[Side, Counter[str]] = {"above": Counter(), "below": Counter()}
            controls.append(Control(machine, heartbeat_timeout_s=60, on_effect=on_effect(stage), sent=sent))
        listener = listening("127.0.0.1:0", lambda: None, greeting_timeout_s=30, report=print, control=controls[1])
        async with listener as port:
            calling = asyncio.create_task(
                dial_control(
                    f"127.0.0.1:{port}", controls[0], greeting_timeout_s=30, deadline_s=lambda: 60, report=print
                )
            )
            for control, side in ((controls[1], "above"), (controls[0], "below")):
                await control.met[side].wait()
            controls[1].act(machines[1].finished())
            controls[0].act(machines[0].finished())
            for each in through:
                await each.wait()
            began = time.monotonic()
            await asyncio.wait_for(calling, 60)
            return time.monotonic() - began

    assert asyncio.run(story()) < 10  # it would be 30
