"""What is shown while a text is prepared: a bar on a terminal, a plain line now and then in a log.

A large corpus takes minutes to hours to tokenise, once. On a terminal the bar is redrawn in place; elsewhere a line is
written each EVERY_S seconds, so that a log shows that something happens, and a quick start writes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

EVERY_S = 10.0


class PreparationDisplay:
    """Use as a context manager, and give `report` to whoever prepares."""

    def __init__(self, console: Console, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._name, self._clock = console, name, clock
        self._progress: Progress | None = None
        self._last_line_s = clock()

    def __enter__(self) -> PreparationDisplay:
        if self._console.is_terminal:
            columns = (
                TextColumn("preparing {task.fields[name]}: {task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("reading the files", total=None, name=escape(self._name))
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def report(self, what: str, done: int, total: int) -> None:
        """What is being done, and how much of it is, of how much (0: nobody knows): bytes, else characters."""
        if self._progress:
            self._progress.update(self._task, description=what, completed=done, total=total or None)
        elif self._clock() - self._last_line_s >= EVERY_S:
            self._last_line_s = self._clock()
            share = (
                f", {min(done / total, 1):.0%}" if total else f", {done / 1e6:,.1f} million characters" if done else ""
            )
            line = f"preparing {self._name}: {what}{share}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
