"""This node's stage in one other lane as somebody who is waited for: what is known of it, and for how long.

Silence and an end are different. A peer of which nothing is heard may come back, and has the deadline for that. One
that needs nothing more has made all contributions that it will make, and they are on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from ...protocol.control_messages import Heartbeat
from .lateral_settings import LateralSettings


class WaitedPeer:
    """Stage `stage` in lane `lane`. Who hears it keeps `connected`, `heartbeat`, `fault` and the rest, and calls
    `notify`."""

    def __init__(self, stage: int, lane: int, settings: LateralSettings) -> None:
        self.stage, self.lane, self._settings = stage, lane, settings
        self.connected = False  # and has greeted
        self.done = False  # it needs nothing more
        self.heartbeat: Heartbeat | None = None  # its last one
        self.heard_s = self.part_s = float("-inf")  # when a frame came last, and a part of a contribution
        self.fault: str | None = None  # why the last connection ended, or there is none
        self.failure: Exception | None = None  # no connection can mend it
        self.refused: str | None = None  # why the contribution that is due is not asked for any more
        self.waited_for = 0  # how many wait for it now
        self._moved = asyncio.Event()  # replaced whenever there is something that somebody may wait for

    @property
    def state(self) -> str:
        """How its lane is, as far as is known here, for people."""
        if self.refused:
            return self.refused
        if not self.connected:
            return f"lane {self.lane} is not connected ({self.fault or 'it was not there yet'})"
        if (beat := self.heartbeat) is None:
            return f"lane {self.lane} has just connected"
        if beat.preparing:
            return f"lane {self.lane}: its stage {beat.preparing - 1} prepares its data"
        if beat.missing:
            return f"lane {self.lane}: its stage {beat.missing - 1} is missing"
        return f"lane {self.lane} has completed {beat.completed_steps} steps"

    def notify(self) -> None:
        """Something has changed."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def changed(self) -> None:
        """Wait until anything has."""
        await self._moved.wait()

    def fail(self, error: Exception) -> None:
        """No connection can mend it."""
        self.failure = self.failure or error
        self.notify()

    async def until(self, there: Callable[[], bool], waiting_for: str, deadline_s: float | None = None) -> None:
        """Wait until it is `there`. Raises TimeoutError, which says for whom and for how long, when nothing was heard
        for the deadline (default: of the settings), or, of a peer that needs nothing more, nothing came; or what made
        it fail."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self.waited_for += 1
        try:
            while not there():
                if self.failure:
                    raise self.failure
                heard_s = self.part_s if self.done else self.heard_s
                patience_s = self._patience_s(deadline_s or self._settings.deadline_s)
                due_s = max(began_s, heard_s) + patience_s
                if loop.time() >= due_s:
                    raise TimeoutError(self._late(waiting_for, loop.time() - began_s, patience_s))
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due_s):
                        await self.changed()
        finally:
            self.waited_for -= 1

    def _patience_s(self, deadline_s: float) -> float:
        ended_s = max(self._settings.silence_s, self._settings.greeting_timeout_s)
        return min(ended_s, deadline_s) if self.done else deadline_s

    def _late(self, waiting_for: str, waited_s: float, patience_s: float) -> str:
        told = f"stage {self.stage}: waited {waited_s:.0f} s for {waiting_for}"
        if self.done:
            done = f" after {self.heartbeat.completed_steps} steps" if self.heartbeat else ""
            return (
                f"{told}, but that lane has ended{done}, and nothing came of it for {patience_s:g} s; start all "
                "lanes again with --resume"
            )
        why = self.fault or "there was no connection"
        return (
            f"{told}, and nothing was heard of it for {patience_s:g} s ({why}); is stage {self.stage} of lane "
            f"{self.lane} running? If it was lost, start it again with --resume"
        )
