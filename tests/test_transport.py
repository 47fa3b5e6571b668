"""Laws of a link, the same over in-memory queues and over real gRPC on loopback: order, rate, window, bytes counted."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from thinpipe.node.links.dialling import dial
from thinpipe.node.links.link import Link
from thinpipe.node.links.transport import listening
from thinpipe.protocol.messages import Kind, Message
from thinpipe.protocol.wire_size import framed_bytes
from thinpipe.sim.links.shaper import LinkProfile

from .links import make_link

pytestmark = pytest.mark.alone

MESSAGE_BYTES = 512 * 1024
RATE_TOLERANCE = 0.05


def complain(code: str, line: str) -> None:
    raise AssertionError(f"{code}: {line}")


@asynccontextmanager
async def joined_by_memory(upper: Link, lower: Link) -> AsyncIterator[None]:
    down: asyncio.Queue[bytes] = asyncio.Queue()
    up: asyncio.Queue[bytes] = asyncio.Queue()
    ends = [
        asyncio.create_task(upper.attach(up.get, down.put, speaks_first=True, greeting_timeout_s=5)),
        asyncio.create_task(lower.attach(down.get, up.put, speaks_first=False, greeting_timeout_s=5)),
    ]
    await asyncio.gather(upper.opened.wait(), lower.opened.wait())
    yield
    for end in ends:
        end.cancel()
    await asyncio.gather(*ends, return_exceptions=True)


@asynccontextmanager
async def joined_by_grpc(upper: Link, lower: Link) -> AsyncIterator[None]:
    async with listening("127.0.0.1:0", lower, greeting_timeout_s=5, report=complain) as port:
        address = f"127.0.0.1:{port}"
        calling = asyncio.create_task(
            dial(address, upper, greeting_timeout_s=5, deadline_s=lambda: 10, report=complain)
        )
        await asyncio.gather(upper.opened.wait(), lower.opened.wait())
        yield
        await asyncio.gather(upper.drain(10), lower.drain(10))
        await calling


Join = Callable[[Link, Link], "asynccontextmanager[None]"]
JOINS = {"memory": joined_by_memory, "grpc": joined_by_grpc}
every_join = pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)


def message(number: int, size: int = MESSAGE_BYTES) -> Message:
    return Message(
        kind=Kind.ACTIVATION, step=number, microbatch=number % 7, codec="x", body=bytes([number % 251]) * size
    )


def run(job: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await job

    asyncio.run(bounded())


@every_join
def test_messages_arrive_whole_and_in_order_both_ways(join: Join) -> None:
    async def job() -> None:
        upper, lower = make_link(0), make_link(1)
        sizes = [1, 0, MESSAGE_BYTES, 128 * 1024, 128 * 1024 + 1, 77]
        async with join(upper, lower):
            for number, size in enumerate(sizes):
                await upper.send(message(number, size))
                await lower.send(message(number, size))
            for number, size in enumerate(sizes):
                for link in (upper, lower):
                    got = await link.receive()
                    assert (got.step, bytes(got.body)) == (number, message(number, size).body)

    run(job())


async def delivered_rate(join: Join, profile: str, count: int) -> tuple[float, float]:
    """(what the receiver's clock says, what the sender reports), both in framed bits/s, for one saturated direction."""
    upper, lower = make_link(0, profile), make_link(1, profile)
    arrivals: list[float] = []
    async with join(upper, lower):
        sending = asyncio.create_task(_send_all(upper, count))
        for _ in range(count):
            await lower.receive()
            arrivals.append(time.monotonic())
        await sending
        await acknowledged(upper)
        framed = sum(upper.sent.values())
    per_message = framed / count
    return (count - 1) * per_message * 8 / (arrivals[-1] - arrivals[0]), upper.meter.rate_bits_per_s() or 0.0


async def acknowledged(link: Link) -> None:
    while link.session.unacknowledged_bytes:
        link._outgoing.moved.clear()
        await link._outgoing.moved.wait()


async def _send_all(link: Link, count: int) -> None:
    for number in range(count):
        await link.send(message(number))


def assert_capped(join: Join, profile: str, count: int) -> None:
    """Never above the cap by more than the tolerance, and at it in one of eight tries.

    Below it once is no fault of the link: a machine that stalls for longer than the window's slack (half a round trip)
    delays acknowledgements, and a real link waits for those too.
    """
    cap = LinkProfile.parse("300mbit").rate_bits_per_s
    assert cap

    async def job() -> None:
        tries = []
        while len(tries) < 8:
            tries.append(await delivered_rate(join, profile, count))
            assert max(tries[-1]) <= cap * (1 + RATE_TOLERANCE)
            if min(tries[-1]) >= cap * (1 - RATE_TOLERANCE):
                return
        raise AssertionError(f"{tries} bits/s (seen, reported) where {cap} were due")

    run(job())


@every_join
def test_delivered_rate_is_the_cap_while_the_queue_is_not_empty(join: Join) -> None:
    assert_capped(join, "300mbit,25ms", 100)


@every_join
def test_rate_test_fails_with_the_shaper_disabled(join: Join) -> None:
    with pytest.raises(AssertionError):
        assert_capped(join, "none", 100)


@every_join
def test_both_directions_have_a_bucket_of_their_own(join: Join) -> None:
    async def job() -> None:
        upper, lower = make_link(0, "200mbit,5ms"), make_link(1, "200mbit,5ms")
        async with join(upper, lower):
            started = time.monotonic()
            count = 12
            sending = asyncio.gather(_send_all(upper, count), _send_all(lower, count))
            await asyncio.gather(*(link.receive() for link in (upper, lower) for _ in range(count)))
            await sending
            elapsed_s = time.monotonic() - started
        one_way_s = count * MESSAGE_BYTES * 8 / 200e6
        assert one_way_s < elapsed_s < 1.5 * one_way_s  # sharing one bucket would take twice as long

    run(job())


@every_join
def test_latency_is_applied_to_a_lone_message(join: Join) -> None:
    async def job() -> None:
        upper, lower = make_link(0, "1gbit,60ms"), make_link(1, "1gbit,60ms")
        async with join(upper, lower):
            started = time.monotonic()
            await upper.send(message(1, 1000))
            await lower.receive()
            assert 0.060 <= time.monotonic() - started < 0.120

    run(job())


@every_join
@pytest.mark.parametrize("sender", ["upper", "lower"])
def test_a_link_without_latency_does_not_wait_for_acknowledgements(join: Join, sender: str) -> None:
    """Its window holds two chunks, so each has to be acknowledged as it comes, and not with the next chunk back."""

    async def job() -> None:
        ends = {"upper": make_link(0, "80mbit"), "lower": make_link(1, "80mbit")}
        away = ends["lower" if sender == "upper" else "upper"]
        async with join(ends["upper"], ends["lower"]):
            started = time.monotonic()
            sending = asyncio.create_task(_send_all(ends[sender], 20))
            size = sum([len((await away.receive()).body) for _ in range(20)])
            await sending
            assert time.monotonic() - started < 2 * size * 8 / 80e6 + 0.1

    run(job())


@every_join
def test_unacknowledged_bytes_stay_below_the_window(join: Join) -> None:
    async def job() -> None:
        upper, lower = make_link(0, "300mbit,25ms"), make_link(1, "300mbit,25ms")
        under_way: list[int] = []
        stamp = upper.session.send

        def recording(*args: object, acknowledge: bool) -> bytes:
            frame = stamp(*args, acknowledge=acknowledge)
            under_way.append(upper.session.unacknowledged_bytes)
            return frame

        upper.session.send = recording
        async with join(upper, lower):
            sending = asyncio.create_task(_send_all(upper, 40))
            for _ in range(40):
                await lower.receive()
            await sending
        product = 300e6 / 8 * 0.05
        assert max(under_way) > 0.8 * product  # the window does not throttle the link
        assert max(under_way) <= 1.5 * max(product, 300e6 / 8 * upper._outgoing.round_trip_s) + 3 * 128 * 1024

    run(job())


@every_join
def test_a_slow_receiver_bounds_what_is_sent(join: Join) -> None:
    async def job() -> None:
        buffer = 2 * 2**20
        upper, lower = make_link(0), make_link(1, receive_buffer_bytes=buffer)
        async with join(upper, lower):
            sending = asyncio.create_task(_send_all(upper, 12))
            stalled_at = -1
            while (now_at := sum(upper.sent.values())) != stalled_at:
                stalled_at = now_at
                await asyncio.sleep(0.1)
            assert stalled_at <= buffer + 64 * 1024  # the receiver consumes nothing, so nothing more may come
            for number in range(12):
                assert (await lower.receive()).step == number
            await sending

    run(job())


@every_join
def test_both_ends_count_the_same_bytes(join: Join) -> None:
    async def job() -> None:
        upper, lower = make_link(0), make_link(1)
        async with join(upper, lower):
            await _send_all(upper, 10)
            for _ in range(10):
                await lower.receive()
            await acknowledged(upper)
            await lower.send(message(0, 10))
            await upper.receive()
        assert lower.received_bytes <= sum(upper.sent.values())
        assert lower.received_bytes >= sum(upper.sent.values()) - 100  # a last credit may be on its way
        assert upper.sent["activation"] == 10 * MESSAGE_BYTES
        unsent = sum(framed_bytes(len(flight.frame)) for flight in upper._outgoing.line)  # a last credit, perhaps
        assert sum(upper.sent.values()) + unsent == upper._outgoing.shaper.passed_bytes

    run(job())


def test_a_busy_port_is_one_clear_line() -> None:
    from thinpipe.node.addresses import ListenError

    async def job(port: int) -> None:
        async with listening(f"127.0.0.1:{port}", make_link(1), greeting_timeout_s=1, report=complain):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:\d+: it is in use"):
            run(job(taken.getsockname()[1]))
