"""Two microbatches in flight: while the one waits for other lanes' keys and values, the other one computes.

They are a layer apart, each on a thread of its own, and take turns: only who has the turn computes. It is handed over
where a microbatch would begin to take what other lanes have sent, *always*, and not only when there is something to
wait for. So the order of all that is computed follows from the settings alone, and never from what came when; and as
the first is ahead at every such place, each parameter has the first one's gradient before the second one's: the bits
are those of one microbatch after the other.

Why threads: a layer's attention is deep inside of the architecture's own forward, and of autograd's backward, which can
be left in the middle only by standing still (as in `lane_threads`). Why not two real ones at the same time: two halves
of a machine each take twice as long, and then neither bits nor memory would be known.

What a stage keeps of the microbatch that it computes *now* has to be a thread's own, or found by what it belongs to:
the moment (`layer_attention`), where weight gradients go (`Deferral`), autocast; answers of anchors, by the ids. The
wait for a turn has no deadline: it ends with the other one's wait, which has one, and with its failure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class OtherFailed(RuntimeError):
    """The other microbatch of the pair has failed, and with it this one."""


class Turns:
    """Of one stage. `both` is for the thread that computes; `hand_over` for whatever is computed in it."""

    def __init__(self) -> None:
        self.second_cpu_s = 0.0  # what the last pair's second one took of the CPU, on its own thread
        self._pool: ThreadPoolExecutor | None = None
        self._pair: _Pair | None = None

    def both(
        self, first: Callable[[], T], second: Callable[[], T], on_first: Callable[[T], None] | None = None
    ) -> tuple[T, T]:
        """What the two give. on_first: is told of the first one's result as soon as that is there. Raises the first
        error of either, after both have ended."""
        if self._pool is None:  # a thread has a number of arithmetic threads of its own
            count = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(1, "second", initializer=torch.set_num_threads, initargs=(count,))
        pair = self._pair = _Pair()

        def run() -> T:
            before_s = time.thread_time()
            try:
                return pair.run(1, second)
            finally:
                self.second_cpu_s = time.thread_time() - before_s

        other = self._pool.submit(run)
        try:
            mine = pair.run(0, first, on_first)
        finally:
            wait([other])
            self._pair = None
            if pair.failure:
                raise pair.failure
        return mine, other.result()

    def hand_over(self) -> None:
        """The other one computes until it comes to such a place too, or is done. Nothing happens outside of `both`.
        Raises OtherFailed."""
        if self._pair:
            self._pair.hand_over()


class _Pair:
    """Whose turn it is: 0's first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._done = [False, False]
        self.failure: BaseException | None = None

    def run(self, who: int, work: Callable[[], T], then: Callable[[T], None] | None = None) -> T:
        try:
            self._await(who)
            result = work()
            if then:
                then(result)
        except BaseException as error:
            with self._changed:
                self.failure = self.failure or error
            raise
        finally:
            with self._changed:
                self._done[who], self._turn = True, 1 - who
                self._changed.notify_all()
        return result

    def hand_over(self) -> None:
        me = self._turn  # who calls is who has it
        if self._done[1 - me]:
            return
        with self._changed:
            self._turn = 1 - me
            self._changed.notify_all()
        self._await(me)

    def _await(self, who: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == who or self.failure is not None)
            if self.failure:
                raise OtherFailed("the other microbatch of the pair has failed") from self.failure
