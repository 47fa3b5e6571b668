"""Lanes that hold chunks of the same sequences, in one process: a thread each, since each waits for the others in the
middle of a layer.

Which thread runs when does not reach the arithmetic: what a lane takes from another one is asked for by name, and added
in a fixed order. So the bits are those of lanes as processes. Why threads and not one loop over the lanes, layer by
layer: a layer's attention is deep inside of the architecture's own forward, and of autograd's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from .mailbox import Mailbox

L = TypeVar("L")
T = TypeVar("T")


class LaneThreads:
    """One thread for each of `lanes`, which exchange parts by `mailbox`."""

    def __init__(self, lanes: int, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._pool = ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(1,))

    def each(self, work: Callable[[L], T], lanes: Sequence[L]) -> list[T]:
        """What `work` gives for each lane, at the same time. Raises the first error of any, after all have ended: a
        lane that fails ends the waiting of the others."""

        def guarded(lane: L) -> T:
            try:
                return work(lane)
            except BaseException as error:
                self._mailbox.fail(error)
                raise

        jobs = [self._pool.submit(guarded, lane) for lane in lanes]
        wait(jobs)
        if self._mailbox.failure:
            raise self._mailbox.failure
        return [job.result() for job in jobs]

    def close(self) -> None:
        self._pool.shutdown()
