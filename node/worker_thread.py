"""A thread that works for the event loop: model work on one *compute* thread, packing on one *codec* thread.

The event loop moves messages and never computes. Why threads and not processes: torch releases the interpreter's lock
while it computes, and a tensor handed to a thread is not copied.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar, cast

import torch

from .run_records import Stopwatch, Tracer

T = TypeVar("T")
Reporter = Callable[[str, str], None]  # (fault code, one line for people)


class Worker:
    """One thread with a name, a stopwatch row and a trace lane.

    Not an executor from the standard library: it wraps each result in two futures that copy each other's state, which
    at thousands of small jobs a second costs as much as packing a tensor.
    """

    def __init__(self, activity: Literal["compute", "codec"], stopwatch: Stopwatch, tracer: Tracer) -> None:
        self._activity: Literal["compute", "codec"] = activity
        self._stopwatch, self._tracer = stopwatch, tracer
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._job = ""  # the present one
        self._thread = threading.Thread(target=self._work, name=activity)
        self._thread.start()  # no daemon: torch aborts if it still runs at exit

    def _work(self) -> None:
        # A new thread has its own OpenMP pool size; parity and speed both want exactly one thread of arithmetic.
        torch.set_num_threads(1)
        while job := self._jobs.get():
            job()
            del job  # and with it the tensors that it holds

    async def run(self, name: str, work: Callable[..., T], *args: Any) -> T:
        """The result of `work(*args)`, or what it raises, on this worker's thread, after all that came before."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if answer.done():  # nobody waits any more
                return
            answer.set_exception(error) if error else answer.set_result(cast(T, result))

        def job() -> None:
            self._job, start = name, time.monotonic()
            result, error = None, None
            try:
                with self._stopwatch.measure(self._activity):
                    result = work(*args)
            except StopIteration as raised:  # which no future takes
                error = RuntimeError(f"{name} raised {raised!r}")
            except BaseException as raised:
                error = raised
            self._tracer.span(name, self._activity, start, time.monotonic())
            with suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(settle, result, error)

        self._jobs.put(job)
        return await answer

    def close(self) -> None:
        """The thread ends after its present job; what still waits is dropped."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait, after `close`, until the present job is done. Raises TimeoutError."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(
                f"waited {timeout_s:g} s for this stage's {self._job!r} to end; its device or disk hangs"
            )
