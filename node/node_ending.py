"""What ends a node beside its own work: a signal, a launcher that has died, a call to a neighbour that fails.

Each is a coroutine that raises why, so that a node is a race of its work against them (`first_to_end`), and all that is
to be done at an end stands in one place. Why not handlers that call `sys.exit`: records, checkpoints and the last word
to the neighbours come after it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ..sim.launch.end_signals import ANOTHER_ENDED, DRAINING, Impatience, words_for


class ParentGone(RuntimeError):
    """The process that started this node is gone, and nobody is left to stop it."""


class Stopped(RuntimeError):
    """A signal that ends the node at once."""


async def while_calling(
    work: Coroutine[Any, Any, None], calling: Coroutine[Any, Any, None], grace_s: Callable[[], float]
) -> None:
    """Wait for the work, and a little for the call to end after it, so that the last word arrives. What the work raises
    comes first; the failure of the call ends the work."""
    job, call = asyncio.ensure_future(work), asyncio.ensure_future(calling)
    try:
        done, _ = await asyncio.wait([job, call], return_when=asyncio.FIRST_COMPLETED)
        if job not in done:
            call.result()
            await asyncio.wait([job])
        await asyncio.wait([call], timeout=grace_s())
        job.result()
    finally:
        for task in (job, call):
            task.cancel()
        await asyncio.gather(job, call, return_exceptions=True)


async def until_signal(drain: Callable[[], bool]) -> None:
    """Raises Stopped on SIGINT, and when the launcher says that another stage has ended. SIGTERM, SIGHUP and SIGUSR1
    ask to end after the step under way; where that cannot be, and for the second SIGTERM, they are as SIGINT. (Only
    that one: a scheduler warns by one signal before it sends another, or sends the same to launcher and nodes.)"""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()
    asked, impatience = False, Impatience()

    def told(number: signal.Signals) -> None:
        nonlocal asked
        at_once = impatience.shown_by(number) or number not in DRAINING
        asked = asked or (not at_once and drain())
        if (at_once or not asked) and not stop.done():
            stop.set_result(number)

    for number in (*DRAINING, signal.SIGINT, ANOTHER_ENDED):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, told, number)
    raise Stopped(words_for(await stop))


async def watch_parent(parent: int) -> None:
    """Raises ParentGone when the launcher has died, so that no orphan keeps computing."""
    while os.getppid() == parent:  # noqa: ASYNC110 (no event tells of it)
        await asyncio.sleep(0.5)
    raise ParentGone(f"the launcher (process {parent}) is gone")


async def first_to_end(*jobs: Awaitable[None]) -> None:
    """Run `jobs` side by side until the first one returns or raises; cancel the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
