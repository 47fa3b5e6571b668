"""Stage 0 prepares its data in a thread, says so on its control stream, and is waited for.

A large corpus takes hours to tokenise, once. The node connects to its neighbour first and says *alive* all the time,
with the word that it prepares its data (`protocol.heartbeat_figures`), which travels along the chain. Whoever waits
extends its deadline for as long as it hears that (`node.receive_deadline`): a fixed deadline would end all other
machines while the first one works. Each node says now and then for what it waits, and writes it to its records
(`preparing`), so that whoever watches them can tell a long preparation from a process that hangs.

Why a thread of its own and not a `Worker`: a node that is told to stop must not wait for hours of work that it cannot
break off. So this one dies with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from ..protocol.greeting import NodeIdentity
from ..protocol.heartbeat_figures import HeartbeatAggregate
from .run_records import MetricsWriter

T = TypeVar("T")
LOOK_EVERY_S = 1.0
SAY_AFTER_S, SAY_EVERY_S = 2.0, 60.0
RECORD_EVERY_S = 30.0  # a supervisor takes a node that writes nothing for a minute to be stuck


async def in_daemon(work: Callable[[], T]) -> T:
    """The result of `work()`, or what it raises, from a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not answer.done():
            set_it()

    def job() -> None:
        try:
            result = work()
        except BaseException as raised:
            error = RuntimeError(repr(raised)) if isinstance(raised, StopIteration) else raised
            done = lambda: answer.set_exception(error)  # noqa: E731
        else:
            done = lambda: answer.set_result(result)  # noqa: E731
        with suppress(RuntimeError):  # the loop is gone, and with it whoever asked
            loop.call_soon_threadsafe(settle, done)

    threading.Thread(target=job, name="data", daemon=True).start()
    return await answer


class LongPreparation:
    """Who prepares its data, this stage or another one, as far as is known here."""

    def __init__(
        self, identity: NodeIdentity, figures: HeartbeatAggregate, metrics: MetricsWriter, *, lanes: int = 1
    ) -> None:
        self._identity, self._stage = identity, identity.stage
        self._figures, self._metrics, self._lanes = figures, metrics, lanes
        self._why: Callable[[], str] | None = None  # this stage is held up
        self._last_s = float("-inf")  # when somebody was known to

    async def run(self, work: Callable[[], T], unless: asyncio.Event) -> T | None:
        """The result of `work()`, the preparation of this stage's own data, or what it raises; None once `unless` is
        set, since nobody will need it then."""
        self._figures.preparing = True
        jobs = [asyncio.ensure_future(in_daemon(work)), asyncio.ensure_future(unless.wait())]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            return jobs[0].result() if jobs[0].done() else None
        finally:
            self._figures.preparing = False
            for job in jobs:
                job.cancel()

    @contextmanager
    def held_up(self, why: Callable[[], str]) -> Iterator[None]:
        """This stage waits for something outside of the chain meanwhile, and its neighbours are to wait for it. why: in
        words, as it is now."""
        before = self._figures.preparing, self._why  # one within another one
        self._figures.preparing, self._why = True, why
        try:
            yield
        finally:
            self._figures.preparing, self._why = before

    def ago_s(self) -> float:
        """How long ago a stage was last known to prepare its data; 0: one does."""
        now = asyncio.get_running_loop().time()
        if self._figures.prepares:
            self._last_s = now
        return now - self._last_s

    async def watch(self) -> None:
        """Look, and say and record what there is to see; never returns."""
        clock = asyncio.get_running_loop().time
        began_s = said_s = recorded_s = None
        while True:
            self.ago_s()
            now, who = clock(), self._figures.prepares - 1
            if who < 0:
                began_s = None  # what was said lately is not said again: rounds may hold a stage up in every step
            else:
                began_s = now if began_s is None else began_s
                if now - began_s >= SAY_AFTER_S and (said_s is None or now - said_s >= SAY_EVERY_S):
                    said_s = now
                    print(self._line(who, now - began_s), flush=True)
                if recorded_s is None or now - recorded_s >= RECORD_EVERY_S:
                    recorded_s = now
                    stage = self._identity.place_of(who).stage
                    self._metrics.write("preparing", stage=stage, seconds=round(now - began_s, 3))
            await asyncio.sleep(LOOK_EVERY_S)

    def _line(self, who: int, seconds: float) -> str:
        name, own = self._identity.name_of(who), self._identity.name_of(self._stage)
        if who == self._stage:
            return f"{own} {self._does(who)}, {seconds:.0f} s so far; the other stages wait for it"
        return f"{own} waits for {name}, which {self._does(who)}, {seconds:.0f} s so far"

    def _does(self, who: int) -> str:
        if self._lanes == 1:
            return "prepares its data"
        if who == self._stage and self._why:
            return f"waits in a round: {self._why() or 'another lane has just come'}"
        draws = self._identity.place_of(who).stage == 0
        return "prepares its data or waits for another lane" if draws else "waits for another lane"
