"""How long a node waits for a message before it gives up: computed from bytes, rates and the times of earlier steps.

The control stream shows within seconds that a neighbour is gone (`node.link_settings.heartbeat_timeout_s`), and then
all stages wait for a replacement. This module is for a neighbour that answers but sends no tensors: its compute hangs,
or its disk. The deadline allows several times the longest round of work so far, and the time of a step's bytes on the
link. Before the first round is done no such time is known, so there is a minimum.

While any stage of the run is missing, however far away, no neighbour can be blamed for being late: the wait begins
again when all are there. A stage that is there and prepares its data (stage 0 tokenises a large corpus for hours) is
waited for as long as it says so. And where this process itself was paused (`node.process_pause`), nobody knows who
would have been late. Why not one constant: what is generous on a laptop is short for a stage of billions of
parameters.
"""

from __future__ import annotations

from collections.abc import Callable

# For a round of work of which nothing is known yet (compilation, a first touch of the data), and at least: a neighbour
# may have to wait for its disk before it can take the next snapshot.
LEAST_S = 300.0
TIMES = 10.0  # the longest round so far


class ReceiveDeadline:
    """transfer_s: what a step's bytes take on a link. fixed_s: the user's own deadline instead of a computed one.
    missing_s: for how long somebody has been missing (0: nobody is), and how long ago the last such time ended.
    prepared_ago_s: how long ago a stage was last known to prepare its data (0: one does). paused_ago_s: how long ago
    the last pause of this process ended."""

    def __init__(
        self,
        *,
        transfer_s: float = 0.0,
        fixed_s: float | None = None,
        replacement_s: float = 1800.0,
        missing_s: Callable[[], tuple[float, float]] = lambda: (0.0, float("inf")),
        prepared_ago_s: Callable[[], float] = lambda: float("inf"),
        paused_ago_s: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        self._transfer_s, self._fixed_s, self._replacement_s = transfer_s, fixed_s, replacement_s
        self._missing_s, self._prepared_ago_s, self._paused_ago_s = missing_s, prepared_ago_s, paused_ago_s
        self._longest_s = self._longest_evaluation_s = 0.0

    def observe(self, seconds: float) -> None:
        """A round of work, a step, is done. One in which somebody was missing, or that is `excused`, says nothing of
        work."""
        if self._tells(seconds):
            self._longest_s = max(seconds, self._longest_s)

    def observe_evaluation(self, seconds: float) -> None:
        """The same of an evaluation, which is as many rounds as it takes."""
        if self._tells(seconds):
            self._longest_evaluation_s = max(seconds, self._longest_evaluation_s)

    def _tells(self, seconds: float) -> bool:
        since_s, ago_s = self._missing_s()
        return not (since_s or ago_s < seconds or self.excused(seconds))

    @property
    def timeout_s(self) -> float:
        """For the next message."""
        if self._fixed_s is not None:
            return self._fixed_s
        return max(LEAST_S, TIMES * self._longest_s) + TIMES * self._transfer_s

    def after_evaluation(self, rounds: int) -> float:
        """For the message at its end, `rounds` being how many times a step's microbatches it takes."""
        if self._fixed_s is not None:
            return self._fixed_s
        work_s = self._longest_evaluation_s or rounds * self._longest_s
        return max(LEAST_S, TIMES * work_s) + rounds * TIMES * self._transfer_s

    def extend(self, waited_s: float) -> bool:
        """After a wait of `waited_s` without a message: whether to wait again, because a stage is or was missing, or
        all are `excused`."""
        if self.excused(waited_s):
            return True
        since_s, ago_s = self._missing_s()
        return since_s < self._replacement_s if since_s else ago_s < waited_s

    def excused(self, waited_s: float) -> bool:
        """Whether, in the last so many seconds, a stage has prepared its data, or this process was paused."""
        return self._prepared_ago_s() < waited_s or self._paused_ago_s() < waited_s
