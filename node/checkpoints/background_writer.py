"""Writing checkpoints beside training: one thread, one snapshot at a time. A failure is only reported.

Why a thread and not a process: the tensors are in this memory already, and hashing, writing and fsync let go of the
interpreter. Why no queue: see `CheckpointWriter`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..free_memory import give_back_free_memory
from ..stage_state import StageSnapshot
from .manifest import CheckpointError
from .store import CheckpointStore


class CheckpointWriter:
    """Writes checkpoints on a thread of its own, one at a time, while training goes on. A write that
    fails is only reported.

    on_written(completed, bytes, seconds) and on_error(line) are called on that thread. `waited_s` is how long `submit`
    has waited in all, for the records. Two snapshots are in memory at most, and their makers': a queue of several would
    cost more of it and only put off the wait of a disk that is too slow.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        on_written: Callable[[int, int, float], None],
        on_error: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._on_written, self._on_error = on_written, on_error
        self._clock, self._calendar = clock, calendar
        self._changed = threading.Condition()
        self._job: tuple[StageSnapshot, int] | None = None  # stays until it is written
        self._closed = False
        self.waited_s = 0.0
        # A daemon, so that a process that fails elsewhere can end; half a write is no checkpoint anyway.
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
        self._thread.start()

    def submit(self, snapshot: StageSnapshot, *, generation: int) -> float:
        """Have `snapshot` written; waits until the one before is. Returns the seconds waited.

        The snapshot must not change any more. Raises RuntimeError after `close`.
        """
        began = self._clock()
        with self._changed:
            self._changed.wait_for(lambda: self._job is None or self._closed)
            if self._closed:
                raise RuntimeError("the checkpoint writer is closed")
            self._job = (snapshot, generation)
            self._changed.notify_all()
            waited = self._clock() - began
            self.waited_s += waited
        return waited

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; whether that came within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._job is None, timeout_s)

    def close(self) -> None:
        """Finish what was submitted, then end the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job is not None or self._closed)
                job = self._job
            if job is None:
                return
            self._write(*job)
            del job  # and with it the tensors, which are free now, in pieces
            give_back_free_memory()
            with self._changed:
                self._job = None
                self._changed.notify_all()

    def _write(self, snapshot: StageSnapshot, generation: int) -> None:
        began = self._clock()
        try:
            size = self._store.write(snapshot, generation=generation, written_s=self._calendar())
            self._on_written(snapshot.completed, size, self._clock() - began)
        except Exception as error:  # training must go on whatever is wrong here
            line = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            with suppress(Exception):
                self._on_error(" ".join(line.split()))
