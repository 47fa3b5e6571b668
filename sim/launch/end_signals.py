"""Signals that ask a whole command to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.

Two ways to take them. `ending_as_ctrl_c` raises KeyboardInterrupt wherever the program is, for a body that may be left
anywhere. `end_signals` only notes them, and the body looks when it can: for one that starts processes, where an
exception between a start and the line that remembers it would leave an orphan. A signal that is ignored (nohup, a job
in the background) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None = None) -> NoReturn:
    """As Ctrl-C does; of another signal it says which."""
    del frame
    raise KeyboardInterrupt(*([] if number == signal.SIGINT else [f"stopped by {signal.Signals(number).name}"]))


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP as KeyboardInterrupt. One that somebody handles or ignores stays so."""
    found = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    before = _set(found, _interrupt)
    try:
        yield
    finally:
        _restore(before)


class EndSignals:
    """Those that have come."""

    def __init__(self) -> None:
        self.count = 0
        self._first: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.count += 1
        self._first = self._first or number

    def check(self) -> None:
        """Raises KeyboardInterrupt once one has come."""
        if self._first is not None:
            _interrupt(self._first)


@contextmanager
def end_signals() -> Iterator[EndSignals]:
    """Note them while the body runs; one that the body did not look at is not lost, but raised after it."""
    told = EndSignals()
    before = _set([each for each in ENDING if signal.getsignal(each) not in (signal.SIG_IGN, None)], told.note)
    try:
        yield told
    finally:
        _restore(before)
    told.check()


def _set(numbers: list[signal.Signals], handler: Any) -> dict[signal.Signals, Any]:
    """What was there before; nothing is changed outside of the main thread, where whoever is there handles signals."""
    try:
        return {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        return {}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
