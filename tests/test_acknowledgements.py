"""How many frames a message takes: one where no cap asks for more, and none of its own for what can ride along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from thinpipe.node.links.link import Link
from thinpipe.node.links.outgoing import CREDIT_DELAY_S, chunk_bytes_for
from thinpipe.node.run_records import Tracer
from thinpipe.protocol.messages import CHUNK_BYTES_MAX, Chunk, Credit, Frame, Kind, Limits, Message, decode_frame
from thinpipe.protocol.session import LinkSession
from thinpipe.sim.links.shaper import LinkProfile

from .builders import identity
from .virtual import JumpingClock

MIB = 2**20
LIMITS = Limits(message_bytes=2 * MIB + 4096)
Said = list[tuple[float, int, Frame]]  # when, by which stage, what; greetings left out


def message(kind: Kind, step: int, body_bytes: int = 2 * MIB) -> Message:
    ids = b"\x01" * 2048 if kind is Kind.ACTIVATION else b""
    return Message(kind=kind, step=step, microbatch=0, codec="bf16", token_ids=ids, body=b"\x02" * body_bytes)


def told(
    story: Callable[[Link, Link], Coroutine[Any, Any, None]],
    profile: str = "none",
    *,
    window_bytes: int = 16 * MIB,
    limits: Limits = LIMITS,
) -> Said:
    """All frames of a story on a clock that jumps."""
    said: Said = []

    async def job() -> None:
        clock = asyncio.get_running_loop().time
        links, ways = [], [asyncio.Queue[bytes](), asyncio.Queue[bytes]()]
        for stage in (0, 1):
            session = LinkSession(
                identity=identity(stage), peer_stage=1 - stage, limits=limits, receive_buffer_bytes=16 * MIB
            )
            link = Link(
                session=session,
                profile=LinkProfile.parse(profile),
                chunk_bytes=None,
                send_buffer_bytes=16 * MIB,
                uncapped_window_bytes=window_bytes,
                seed=1,
                tracer=Tracer(stage=stage, enabled=False),
                clock=clock,
            )
            links.append(link)

        def end(stage: int) -> Coroutine[Any, Any, None]:
            async def write(raw: bytes) -> None:
                frame = decode_frame(raw, limits)
                if isinstance(frame, Chunk | Credit):
                    said.append((clock(), stage, frame))
                ways[stage].put_nowait(raw)

            read = ways[1 - stage].get
            return links[stage].attach(read, write, speaks_first=stage == 0, greeting_timeout_s=5)

        ends = [asyncio.create_task(end(stage)) for stage in (0, 1)]
        await asyncio.gather(*(link.opened.wait() for link in links))
        await story(*links)
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        runner.run(job())
    return said


def kinds(said: Said) -> list[tuple[int, str]]:
    return [(stage, type(frame).__name__.lower()) for _, stage, frame in said]


@pytest.mark.parametrize("window_bytes", [16 * MIB, 12 * MIB])
def test_messages_that_answer_each_other_are_one_frame_each(window_bytes: int) -> None:
    """1F1B of two stages: gradients acknowledge activations and grant for them, and the other way round. In a window of
    three chunks, of which a message fills half of one, more than one more message fits."""

    async def story(upper: Link, lower: Link) -> None:
        await upper.send(message(Kind.ACTIVATION, 0))
        for step in range(20):
            await upper.send(message(Kind.ACTIVATION, step + 1))
            await lower.receive()
            await asyncio.sleep(0.8 * CREDIT_DELAY_S)
            await lower.send(message(Kind.GRADIENT, step))
            assert (await upper.receive()).step == step

    said = told(story, window_bytes=window_bytes)
    assert kinds(said).count((0, "credit")) == 0
    assert kinds(said).count((1, "credit")) == 0
    assert kinds(said).count((0, "chunk")) == 21
    assert kinds(said).count((1, "chunk")) == 20


def test_who_has_nothing_to_send_acknowledges_after_the_delay() -> None:
    async def story(upper: Link, lower: Link) -> None:
        await upper.send(message(Kind.ACTIVATION, 0))
        await lower.receive()
        await asyncio.sleep(1)
        assert not upper.session.unacknowledged_bytes

    said = told(story)
    assert kinds(said) == [(0, "chunk"), (1, "credit")]
    assert said[1][0] - said[0][0] == pytest.approx(CREDIT_DELAY_S)


def test_more_than_half_a_window_is_acknowledged_at_once() -> None:
    async def story(upper: Link, lower: Link) -> None:
        async def take() -> None:
            for _ in range(24):
                await lower.receive()

        taking = asyncio.create_task(take())
        for step in range(24):
            await upper.send(message(Kind.ACTIVATION, step))
        await taking

    said = told(story)
    assert kinds(said).count((0, "chunk")) == 24
    # Without an answer at once the window would open a delay later.
    assert {when for when, _, frame in said if isinstance(frame, Chunk)} == {said[0][0]}


@pytest.mark.parametrize(
    ("profile", "window_bytes", "seconds"),
    [
        ("none", 2 * CHUNK_BYTES_MAX, 0.0),
        ("10mbit", 2 * CHUNK_BYTES_MAX, 4 * 8 * CHUNK_BYTES_MAX / 10e6),  # its window is two of its own chunks
    ],
)
def test_a_window_of_two_chunks_does_not_stand_still(profile: str, window_bytes: int, seconds: float) -> None:
    """Beside one whole chunk and its envelope no other fits, so it is acknowledged at once."""

    async def story(upper: Link, lower: Link) -> None:
        async def take() -> None:
            for _ in range(4):
                await upper.receive()

        taking = asyncio.create_task(take())
        for step in range(4):
            await lower.send(message(Kind.GRADIENT, step, CHUNK_BYTES_MAX))
        await taking

    limits = Limits(message_bytes=CHUNK_BYTES_MAX)
    said = told(story, profile, window_bytes=window_bytes, limits=limits)
    chunks = [when for when, _, frame in said if isinstance(frame, Chunk)]
    assert chunks[-1] - chunks[0] == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(("profile", "latency_s"), [("none", 0.0), ("300mbit,25ms", 0.025)])
def test_messages_that_cross_are_acknowledged_when_both_ends_end(profile: str, latency_s: float) -> None:
    """Neither could tell of the other. An acknowledgement and a goodbye take the way there, and wait for nothing."""

    async def story(upper: Link, lower: Link) -> None:
        await asyncio.gather(upper.send(message(Kind.ACTIVATION, 0)), lower.send(message(Kind.GRADIENT, 0)))
        await asyncio.gather(upper.receive(), lower.receive())
        before = asyncio.get_running_loop().time()
        await asyncio.gather(upper.drain(5), lower.drain(5))
        assert asyncio.get_running_loop().time() - before == pytest.approx(2 * latency_s, abs=0.001)
        assert upper.finished
        assert lower.finished

    said = kinds(told(story, profile))
    assert latency_s or [said.count((stage, "credit")) for stage in (0, 1)] == [1, 1]


def test_who_ends_does_not_let_the_peer_wait_for_an_acknowledgement() -> None:
    async def story(upper: Link, lower: Link) -> None:
        await upper.send(message(Kind.ACTIVATION, 0))
        await lower.receive()
        before = asyncio.get_running_loop().time()
        await asyncio.gather(upper.drain(5), lower.drain(5))
        assert asyncio.get_running_loop().time() == before
        assert upper.finished
        assert lower.finished

    assert kinds(told(story)) == [(0, "chunk"), (1, "credit")]


@pytest.mark.parametrize(
    ("profile", "chunk_bytes"),
    [
        ("none", CHUNK_BYTES_MAX),
        ("10mbit", 64 * 1024),
        ("300mbit,25ms", 187_500),
        ("10gbit", CHUNK_BYTES_MAX),
    ],
)
def test_chunks_are_five_milliseconds_of_a_cap_and_as_large_as_may_be_without(profile: str, chunk_bytes: int) -> None:
    assert chunk_bytes_for(LinkProfile.parse(profile)) == chunk_bytes


def test_a_cap_cuts_a_message_and_the_parts_come_to_the_same() -> None:
    async def story(upper: Link, lower: Link) -> None:
        await upper.send(message(Kind.ACTIVATION, 0))
        got = await lower.receive()
        assert bytes(got.token_ids) == b"\x01" * 2048
        assert bytes(got.body) == b"\x02" * (2 * MIB)

    sizes = [len(frame.data) for _, _, frame in told(story, "300mbit") if isinstance(frame, Chunk)]
    assert sizes[0] == 2048
    assert max(sizes) == 187_500
    assert sum(sizes) == 2 * MIB + 2048
