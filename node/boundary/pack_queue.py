"""A queue of messages that are packed in order, beside the compute, by whichever thread needs one first.

A stage computes on one thread and packs on another, and packing has state: what rounding left of a projector's
gradient, a codebook that learns from what it codes. A checkpoint is taken between two steps, when the last tensors of
the step may still wait for the packing thread, and it must not depend on how far that thread is. So each tensor is
handed to `submit` in the order of the schedule; the packing thread asks for its message when the link has room, and
`flush` packs all that waits. Either way the order is the same, and so are the bytes.

Why not wait for the packing thread: it waits in turn for a link that may be slow, or cut.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ...protocol.messages import Message

T = TypeVar("T")


class _Job:
    """One message to come. What it is made of is let go of once it is made."""

    def __init__(self, pack: Callable[[], Message]) -> None:
        self._pack: Callable[[], Message] | None = pack
        self._message: Message | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._pack is None

    def do(self) -> None:
        assert self._pack is not None
        try:
            self._message = self._pack()
        except BaseException as error:
            self._error = error  # for whoever asks for the message too
            raise
        finally:
            self._pack = None

    def result(self) -> Message:
        if self._error:
            raise self._error
        assert self._message is not None
        return self._message


class PackQueue:
    """What one port still has to pack."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()

    def submit(self, pack: Callable[[], Message]) -> Callable[[], Message]:
        """Take `pack` into the order; what is returned gives its message, now or later, once all before it are packed.
        Raises what `pack` raises, and RuntimeError if `discard` came first."""
        job = _Job(pack)
        with self._lock:
            self._waiting.append(job)

        def message() -> Message:
            with self._lock:
                while not job.done:
                    if not self._waiting:
                        raise RuntimeError("a tensor of a step that was broken off is not packed any more")
                    self._waiting.popleft().do()
            return job.result()

        return message

    def flush(self) -> None:
        """Pack all that waits. Raises what packing raises."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft().do()

    def discard(self) -> None:
        """The step was broken off: what waits will never be packed."""
        with self._lock:
            self._waiting.clear()

    def while_idle(self, look: Callable[[], T]) -> T:
        """The result of `look`, which runs while nothing is being packed."""
        with self._lock:
            return look()
