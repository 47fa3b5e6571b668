"""For how long nothing has changed of what somebody looks at: a wait for many things at once that has a deadline.

A lane that follows may wait for hours, as long as the others train: rounds are seldom. What it must not do is to wait
when nothing happens anywhere, for a lane that has ended, or for each other.
"""

from __future__ import annotations


class Standstill:
    """Of values that can be compared."""

    def __init__(self) -> None:
        self._known: object = None
        self._since_s = 0.0

    def seconds(self, known: object, now_s: float) -> float:
        """Since when they are as they are now, by a clock of which it is now_s."""
        if known != self._known:
            self._known, self._since_s = known, now_s
        return now_s - self._since_s
