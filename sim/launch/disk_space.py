"""A look at the free space of the disk that a run's records are on.

A node that cannot write records cannot say so in its records, nor in its log beside them. So its launcher looks, too.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

SPACE_EVERY_S = 2.0  # between two looks


class DiskSpace:
    """Whether the disk of a run's records is full: then they say nothing, and somebody else has to."""

    def __init__(self, run: Path) -> None:
        self._run, self._due_s, self._full = run, 0.0, False

    def look(self) -> str | None:
        """A line when it has become full, and when it is so no more."""
        if time.monotonic() < self._due_s:
            return None
        self._due_s = time.monotonic() + SPACE_EVERY_S
        before = self._full
        with suppress(OSError):
            found = os.statvfs(self._run)
            self._full = found.f_bavail == 0 or (found.f_files > 0 and found.f_favail == 0)
        if self._full == before:
            return None
        if not self._full:
            return f"there is room on the disk of {self._run} again"
        return f"the disk of {self._run} is full: nothing can be recorded there; training goes on, make room"
