"""When this process was last paused: by SIGSTOP, a debugger, a container or a virtual machine that was frozen.

A deadline measures what others do. Where the process itself did not run, it measures that instead: on waking all timers
are due at once, before anything that came meanwhile has been read, and a node would end its run although its neighbours
wait for it. So whoever is about to give up asks here first, and begins to wait again after a pause.

How: the event loop looks at its clock every second, and a look that comes much later was held up. To ask is to look,
too, so it does not matter which of the timers that are due is served first. Why not compare a timer with the time at
which it was due: a pause that ends a moment before that would not show, and the wait would end a moment after waking.
A laptop that sleeps is no pause: Linux's monotonic clock, by which all of this is measured, sleeps with it.
"""

from __future__ import annotations

import asyncio

from .link_settings import HOLD_UP_S

LOOK_EVERY_S = 1.0
PAUSE_S = LOOK_EVERY_S + HOLD_UP_S  # more than a busy machine takes; neighbours begin to miss a process after as much


class ProcessPause:
    """Of this process. `watch` has to run; all times are those of the running event loop."""

    def __init__(self) -> None:
        self._looked_s: float | None = None
        self._last_s = float("-inf")

    def ago_s(self) -> float:
        """How long ago the last pause ended; infinity: there was none."""
        now = asyncio.get_running_loop().time()
        if self._looked_s is not None and now - self._looked_s > PAUSE_S:
            self._last_s = now
        self._looked_s = now
        return now - self._last_s

    async def watch(self) -> None:
        """Look; never returns."""
        while True:
            self.ago_s()
            await asyncio.sleep(LOOK_EVERY_S)
