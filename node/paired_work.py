"""One microbatch's work on the compute thread, or that of a pair in turns: each result is passed on when it is there.

The first of a pair is done before the second, and the neighbour can begin with it at once; so its result leaves while
the second one is computed still.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from .run_records import Stopwatch
from .stage import Stage
from .worker_thread import Worker

T = TypeVar("T")


async def computed(
    name: str,
    works: Sequence[Callable[[], T]],
    then: Callable[[int, T], Awaitable[None]],
    *,
    stage: Stage,
    compute: Worker,
    watch: Stopwatch,
) -> None:
    """Do one or two `works` of `stage`, and for each, in their order, `then` with its place and what it gave. Raises
    what they raise."""
    if len(works) == 1:
        await then(0, await compute.run(name, works[0]))
        return
    loop = asyncio.get_running_loop()
    first: asyncio.Future[T] = loop.create_future()

    def tell(result: T) -> None:
        with suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(first.set_result, result)

    def both() -> tuple[T, T]:
        found = stage.in_turns(works[0], works[1], tell)
        watch.add_cpu("compute", stage.second_cpu_s)
        return found

    pair = asyncio.ensure_future(compute.run(name, both))
    try:
        await asyncio.wait([first, pair], return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            await then(0, first.result())
        await then(1, (await pair)[1])
    finally:
        if not pair.cancel() and not pair.cancelled():
            pair.exception()  # raised here, or nobody wants it any more
