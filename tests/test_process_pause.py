"""What a pause of this process must not do to its waits for others: the first call to a neighbour, copies it asked for.

Virtual time, and a process that can be stopped (`tests/virtual.py`): on waking all its timers are due at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from thinpipe.node.checkpoints.copy_service import CopyService
from thinpipe.node.checkpoints.manifest import Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.links.control_stream import Control
from thinpipe.node.links.dialling import Where, dial, dial_control
from thinpipe.node.process_pause import ProcessPause
from thinpipe.protocol.rollback import Rollback

from .builders import identity
from .links import make_link
from .virtual import JumpingClock, Network, Process

WAIT_S = 60.0
AWAY_S = 1000.0
Wait = Callable[[Path, ProcessPause], Awaitable[object]]


async def nobody_is_announced() -> str | None:
    return None


async def one_is_announced() -> str | None:
    return "127.0.0.1:7001"


async def nothing_is_carried(*_: object) -> bytes:
    raise AssertionError("nobody listens")


def first_call(where: str | Where) -> Wait:
    async def wait(_: Path, pause: ProcessPause) -> None:
        given = {"greeting_timeout_s": 5.0, "report": print, "paused_ago_s": pause.ago_s}
        await dial(where, make_link(0), deadline_s=lambda: WAIT_S, **given)

    return wait


def control_call(where: str | Where) -> Wait:
    async def wait(_: Path, pause: ProcessPause) -> None:
        sent = {side: Counter[str]() for side in ("above", "below")}
        upper = Rollback(identity(0, 2), joining=False)
        control = Control(upper, heartbeat_timeout_s=1e6, on_effect=lambda _: None, sent=sent)
        given = {"greeting_timeout_s": 5.0, "report": print, "paused_ago_s": pause.ago_s}
        await dial_control(where, control, deadline_s=lambda: WAIT_S, **given)

    return wait


def copies(*, of_who_is_there: bool) -> Wait:
    """From a buddy that says nothing, or is not there."""

    async def wait(directory: Path, pause: ProcessPause) -> None:
        async def nothing(*_: object) -> None:
            return None

        def on_fault(_: str, line: str) -> None:
            raise TimeoutError(line)

        fingerprint = Fingerprint(run="r", configuration="c" * 64, stages=2)
        service = CopyService(
            stage=0,
            stages=2,
            store=CheckpointStore(directory, stage=0, fingerprint=fingerprint),
            bytes_max=2**20,
            part_bytes=1000,
            parts_ahead=2,
            say=nothing,
            refuse=lambda *_: None,
            on_fault=on_fault,
            on_copy=lambda *_: None,
            on_held=lambda _: None,
            paused_ago_s=pause.ago_s,
        )
        try:
            if of_who_is_there:
                service.met("below")
                await service.fetch([], deadline_s=WAIT_S, replacement_s=1e6)
            else:
                await service.fetch([], deadline_s=1e6, replacement_s=WAIT_S)
        finally:
            await service.close()

    return wait


WAITS = {
    "a fixed address": first_call("127.0.0.1:7001"),
    "an address that is looked up": first_call(one_is_announced),
    "an address that nobody knows": first_call(nobody_is_announced),
    "control, a fixed address": control_call("127.0.0.1:7001"),
    "control, an address that nobody knows": control_call(nobody_is_announced),
    "copies from who is silent": copies(of_who_is_there=True),
    "copies from who is not there": copies(of_who_is_there=False),
}


@pytest.mark.parametrize("away_s", [0.0, AWAY_S])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_begins_again_after_a_pause(
    wait: Wait, away_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped half-way through; without that, the wait is as long as it was said to be."""
    loop = JumpingClock(hurry=True)

    async def story() -> float:
        Network(nothing_is_carried, lambda _: None).stand_in(monkeypatch)
        process, pause = Process(stage=0, number=1), ProcessPause()
        watching = loop.create_task(pause.watch(), context=process.context)
        waiting = loop.create_task(wait(tmp_path, pause), context=process.context)
        await asyncio.sleep(WAIT_S / 2)
        if away_s:
            process.stop()
            await asyncio.sleep(away_s)
            process.go_on(loop)
        with pytest.raises(TimeoutError):
            await waiting
        watching.cancel()
        return loop.time()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        ended_s = runner.run(story())
    usual_s = WAIT_S / 2 + away_s + WAIT_S if away_s else WAIT_S
    assert usual_s <= ended_s < usual_s + 5
