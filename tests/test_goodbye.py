"""How a link ends: each side gets the other's goodbye, also when a connection breaks on it or a stream is cancelled."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.node.transport import dial

from .in_memory import Cut, join
from .leaving_neighbour import DEADLINE_S, leave, make_link

# Frames 1 and 2 of a connection are the greetings, 3 and 4 the goodbyes.
LOST = {
    "before the first is written": [Cut(frame=3, at="write")],
    "before the second is written": [Cut(frame=4, at="write")],
    "both on their way": [Cut(frame=3, at="read")],
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


def test_over_grpc_the_end_of_a_stream_does_not_overtake_its_goodbye() -> None:
    """A race, lost once in ten ends or so by a stage that cancels its stream as soon as it is done."""
    faults: list[str] = []

    async def one_end(port: int) -> None:
        link = make_link(0)
        calling = dial(
            f"127.0.0.1:{port}",
            link,
            greeting_timeout_s=DEADLINE_S,
            connect_timeout_s=DEADLINE_S,
            report=lambda code, line: faults.append(f"{code}: {line}"),
        )
        await asyncio.gather(calling, leave(link))

    program = Path(__file__).with_name("leaving_neighbour.py")
    with subprocess.Popen([sys.executable, program, "600"], stdout=subprocess.PIPE, text=True) as neighbour:
        assert neighbour.stdout
        for line in neighbour.stdout:
            asyncio.run(one_end(int(line)))
    assert neighbour.returncode == 0
    assert not faults
