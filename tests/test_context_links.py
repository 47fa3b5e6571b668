"""Keys and values between nodes: parts arrive whole whatever breaks, what no stage sends is refused by name, every wait
ends, and no byte is lost from the account."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.context.context_parts import message_of
from thinpipe.node.context.exchange import ContextKey, What
from thinpipe.node.links.link import GenerationEnded
from thinpipe.protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from thinpipe.protocol.messages import Greeting, Kind, Message, encode_frame
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.reports.figures import StageFigures
from thinpipe.sim.reports.lanes import other_lane
from thinpipe.sim.reports.summary import sent_by, total_by_kind

from .context_ends import BYTES, LAYERS, MICROBATCHES, End, content
from .in_memory import Cut, join
from .virtual import JumpingClock

ROOT = Path(__file__).resolve().parent.parent
WHATS: tuple[What, What] = ("gram", "subspace")
FIRST = ContextKey(step=0, evaluation=False, microbatch=0, layer=2, segment=0)


GRAM, CHOSEN = (ContextKey(step=1, evaluation=False, microbatch=0, layer=2, segment=0, what=what) for what in WHATS)


@asynccontextmanager
async def joined(*cuts: Cut, **given: Any) -> AsyncIterator[tuple[End, End]]:
    """Lanes 0 and 1, connected; lane 1 dials."""
    lower, upper = End(0, **given), End(1, **given)
    pumps = [asyncio.create_task(end.transport.pump()) for end in (lower, upper)]
    joining = asyncio.create_task(join(upper.links[0], lower.links[1], cuts))
    try:
        yield lower, upper
    finally:
        for end in (lower, upper):
            await end.end()
        for task in (*pumps, joining):
            task.cancel()
        await asyncio.gather(*pumps, joining, return_exceptions=True)


def run(job: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await job

    asyncio.run(bounded())


async def both_do(lower: End, upper: End, steps: int = 2) -> None:
    for step in range(steps):
        await asyncio.gather(*(end.compute.run("step", end.step, step) for end in (lower, upper)))


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_parts_cross_whole_in_any_order_of_segments(order: str, in_flight: int) -> None:
    async def job() -> None:
        async with joined(order=order, in_flight=in_flight) as (lower, upper):
            await both_do(lower, upper)
            assert not lower.faults + upper.faults
            rows = upper.sent[0]
            assert rows["context_gradient"] == 2 * 2 * len(LAYERS) * len(upper.parts.taken(0)) * BYTES[True]
            assert rows["context"] == 2 * 2 * len(LAYERS) * len(upper.parts.given(0)) * BYTES[False]
            assert bool(rows["evaluation"]) == bool(upper.parts.given(0))

    run(job())


def test_all_that_two_microbatches_can_be_ahead_by_is_held() -> None:
    """Lane 0 has given all of its first layer and takes nothing yet; lane 1 goes on as far as that takes it: two layers
    of two microbatches, of two segments each."""

    async def job() -> None:
        async with joined(in_flight=2) as (lower, upper):
            loop, peer = asyncio.get_running_loop(), lower.transport._peers[1]
            assert lower.parts.held_most(1) == 8

            async def full() -> None:
                while len(peer.held) < 8:
                    peer.came.clear()
                    await peer.came.wait()

            def wait() -> None:
                lower.before_taking = lambda: None
                asyncio.run_coroutine_threadsafe(full(), loop).result(20)

            lower.before_taking = wait
            await both_do(lower, upper, 1)
            assert not lower.faults + upper.faults

    run(job())


@pytest.mark.parametrize("at", ["write", "read"])
def test_a_connection_that_breaks_at_any_frame_loses_nothing(at: Any) -> None:
    async def job(frame: int) -> None:
        async with joined(Cut(frame=frame, at=at), Cut(frame=frame + 2, at=at)) as (lower, upper):
            await both_do(lower, upper, 1)
            assert not lower.faults + upper.faults

    for frame in range(1, 40, 3):
        run(job(frame))


HOSTILE: dict[str, tuple[list[Message], str]] = {
    "second": ([message_of(FIRST, content(FIRST))] * 2, "for the second time"),
    "step": ([message_of(replace(FIRST, step=2), content(FIRST))], "this node is in step 0"),
    "layer": ([message_of(replace(FIRST, layer=1), content(FIRST))], "this stage has layers 2 to 3"),
    "segment": ([message_of(replace(FIRST, segment=1), content(FIRST))], "of lane 0 segments 0 are due"),
    "gradient": (
        [message_of(replace(FIRST, gradient=True), bytes(BYTES[True]))],
        "of lane 0 segments 1, 2 are due",
    ),
    "microbatch": ([message_of(replace(FIRST, microbatch=2), content(FIRST))], "there are 2 microbatches"),
    "size": ([message_of(FIRST, b"x")], f"it has 1 bytes, and {BYTES[False]} are due"),
    "more": ([replace(message_of(FIRST, content(FIRST)), codec="int8")], "more than a body"),
    "loss": ([replace(message_of(FIRST, content(FIRST)), loss_sum=1.0)], "it brings a loss"),
    "a choice that lane 0 makes": ([message_of(GRAM, content(GRAM))], "no part of that kind in a choice of subspaces"),
    "a choice too early": ([message_of(replace(CHOSEN, step=0), content(CHOSEN))], "behind this step"),
    "a choice of another length": ([message_of(CHOSEN, b"x")], f"it has 1 bytes, and {BYTES[False]} are due"),
    "kind": ([Message(kind=Kind.ACTIVATION, step=0, microbatch=0)], "kind activation where keys and values are due"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_stage_sends_is_refused_by_name(what: str) -> None:
    async def job() -> None:
        messages, words = HOSTILE[what]
        async with joined() as (lower, upper):
            await asyncio.gather(*(link.opened.wait() for link in (upper.links[0], lower.links[1])))
            upper.links[0].session.used = True  # the stage has told it something
            for message in messages:
                await lower.links[1].send(message)
            await upper.refused.wait()
            upper.links[0].fix_peer()  # as its transport does
            assert upper.links[0].lost.is_set()
            (line,) = upper.faults
            assert line.startswith("bad-payload: context 1: lane 0-1: refused stage 1 of lane 0: ")
            assert words in line, line

    run(job())


def test_parts_that_no_schedule_sends_ahead_are_refused_and_what_is_held_is_bounded() -> None:
    async def job() -> None:
        async with joined() as (lower, upper):
            ahead = [replace(FIRST, microbatch=1, layer=layer) for layer in LAYERS]
            ahead += [replace(key, step=1) for key in ahead]
            for key in ahead:
                await lower.links[1].send(message_of(key, content(key)))
            waiting = asyncio.create_task(upper.compute.run("receive", upper.transport.receive, 0, FIRST))
            await upper.refused.wait()
            assert "4 other parts came where keys and values of layer 2, segment 0, step 0" in upper.faults[0]
            await upper.end()
            with pytest.raises(GenerationEnded):
                await waiting

    run(job())


def test_the_end_of_a_generation_wakes_the_thread_that_waits() -> None:
    async def job() -> None:
        async with joined() as (_, upper):
            loop, began = asyncio.get_running_loop(), asyncio.Event()

            def receive() -> bytes:
                loop.call_soon_threadsafe(began.set)
                return upper.transport.receive(0, FIRST)

            waiting = asyncio.create_task(upper.compute.run("receive", receive))
            await began.wait()
            await upper.end()  # which joins the thread
            with pytest.raises(GenerationEnded):
                await waiting
            for work in (
                lambda: upper.transport.send(0, FIRST, content(FIRST)),
                lambda: upper.transport.receive(0, FIRST),
            ):
                with pytest.raises(GenerationEnded):
                    await asyncio.to_thread(work)

    run(job())


def test_a_thread_that_waits_when_the_loop_ends_is_let_go() -> None:
    ends: list[End] = []

    async def job() -> None:
        ends.append(End(1))
        asyncio.ensure_future(ends[0].compute.run("receive", ends[0].transport.receive, 0, FIRST))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(job())
    ends[0].compute.close()
    ends[0].compute.join(10)


def test_a_wait_has_a_deadline_and_says_for_what() -> None:
    async def job() -> None:
        end = End(1, timeout_s=7.0)
        try:
            with pytest.raises(TimeoutError) as caught:
                await end.transport.take(0, FIRST)
        finally:
            end.close()
        assert str(caught.value) == (
            "context 1: lane 0-1: waited 7 s for keys and values of layer 2, segment 0, step 0, microbatch 0; "
            "the link is closed"
        )

    loop = JumpingClock()
    try:
        loop.run_until_complete(job())
        assert loop.time() == pytest.approx(7.0)
    finally:
        loop.close()


def test_nor_is_who_reads_nothing_waited_for_without_end_when_all_is_sent() -> None:
    async def job() -> None:
        end = End(1, timeout_s=7.0)
        end.links[0]._send_buffer_bytes = 0  # one message always fits
        pump = asyncio.create_task(end.transport.pump())
        try:
            for microbatch in range(MICROBATCHES):
                key = replace(FIRST, microbatch=microbatch)
                end.transport.send(0, key, content(key))
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError, match="waited 7 s for the link to take what is sent"):
                await end.transport.flush()
        finally:
            pump.cancel()
            end.close()

    loop = JumpingClock()
    try:
        loop.run_until_complete(job())
    finally:
        loop.close()


def test_this_node_does_not_send_what_is_none_nor_wait_on_its_own_loop() -> None:
    async def job() -> None:
        end = End(1)
        try:
            with pytest.raises(LocalProtocolError, match="1 bytes to send"):
                end.transport.send(0, FIRST, b"x")
            with pytest.raises(RuntimeError, match="would wait for itself"):
                end.transport.receive(0, FIRST)
        finally:
            end.close()

    run(job())


def greeting_of(end: End, **other: Any) -> Greeting:
    return replace(end.identity.greeting(), **other)


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"stage": 2}, Fault.STAGE),
        ({"lane": 0}, Fault.LANE),
        ({"generation": 1}, Fault.GENERATION),
        ({"run_id": "another"}, Fault.RUN_ID),
    ],
    ids=str,
)
def test_a_link_is_for_one_stage_in_one_lane_and_generation(other: dict[str, Any], fault: Fault) -> None:
    async def job() -> None:
        end, peer = End(0, lanes=3), End(1, lanes=3)
        session = end.links[1].session
        try:
            session.connect()
            with pytest.raises(RemoteProtocolError) as caught:
                session.receive(encode_frame(greeting_of(peer, **other)))
            assert caught.value.fault is fault
            session.connect()
            session.receive(encode_frame(greeting_of(peer)))
        finally:
            end.close()
            peer.close()

    run(job())


def test_a_stream_finds_its_link_by_the_lane_of_its_greeting() -> None:
    async def job() -> None:
        ends = [End(lane, lanes=3) for lane in range(3)]
        try:
            low, middle, high = ends
            assert low.find(encode_frame(greeting_of(high))) is low.links[2]
            assert middle.find(encode_frame(greeting_of(high))) is middle.links[2]
            for end, greeter in ((middle, low), (middle, middle), (high, low)):
                with pytest.raises(RemoteProtocolError) as caught:
                    end.find(encode_frame(greeting_of(greeter)))
                assert caught.value.fault is Fault.LANE
            assert [link.dials for link in middle.transport.links] == [True, False]
        finally:
            for end in ends:
                end.close()

    run(job())


SENT = {"context": 1000, "context_gradient": 500, "framing": 30, "control": 20, "evaluation": 7, "probe": 3}
ROWS = {"context": 1050, "context_gradient": 500, "evaluation": 7, "probe": 3}


def test_reports_keep_keys_and_values_beside_the_ratio() -> None:
    name = "context 1: lane 0-1"
    record = {"event": "step", "sent_bytes": {name: SENT, "boundary 0-1": {"gradient": 50}}}
    assert total_by_kind([record]) == {**ROWS, "gradient": 50}
    end = {"event": "end", "links": [{"peer_lane": 1, "direction": "context", "sent_bytes": SENT}]}
    assert sent_by([end]) == ROWS
    assert other_lane(name, 0) == 1
    figures = StageFigures(1, lane=0, lanes=2)
    spent = {f"{each}_s": 0.1 for each in ("compute", "codec", "wait")}
    link = {
        "peer_lane": 1,
        "direction": "context",
        "configured_bits_per_s": None,
        "measured_bits_per_s": None,
        "used_bits_per_s": 8,
        "received_bytes": 9,
    }
    step = {"time_s": 1.0, "step": 0, "tokens": 4, "seconds": 1.0, "loss": 1.0, "dense_bytes": 100, "links": [link]}
    figures.take({**record, **step, **spent})
    assert (figures.moved_bytes, figures.context_bytes, figures.averaging_bytes) == (50, 1550, 0)
    assert figures.links[1, "context"].received_bytes == 9


@pytest.mark.slow
def test_two_processes_exchange_parts_at_the_cap_and_count_every_byte() -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", f"{__package__}.context_ends"]
    processes = [
        subprocess.Popen([*command, str(lane), str(port), "20mbit,5ms"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for lane in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=100)[0].strip().split("|") for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
    (sent, received, faults), (other_sent, other_received, other_faults) = (
        (ast.literal_eval(rows), int(came), ast.literal_eval(lines)) for rows, came, _, lines in said
    )
    assert not faults + other_faults
    assert sum(sent.values()) == other_received
    assert sum(other_sent.values()) == received
    assert sent["context"] == 3 * 2 * len(LAYERS) * BYTES[False]  # lane 1 looks at one segment of lane 0, which at two
    assert sent["context_gradient"] == 3 * 2 * len(LAYERS) * 2 * BYTES[True]
    assert all(float(rate) < 20e6 * 1.05 for _, _, rate, _ in said)
