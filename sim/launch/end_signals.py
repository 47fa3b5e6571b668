"""Signals that ask a whole command to end: Ctrl-C, SIGTERM, SIGHUP of a terminal that was closed, and SIGUSR1, with
which schedulers warn before they end a job.

Three ways to take them. `ending_as_ctrl_c` raises KeyboardInterrupt wherever the program is, for a body that may be
left anywhere. `end_signals` only notes them, and the body looks when it can: for one that starts processes, where an
exception between a start and the line that remembers it would leave an orphan. `draining_signals` does so too, for a
body that ends in order, after what is under way; a second SIGTERM does not wait for that. A signal that is ignored
(nohup, a job in the background) stays ignored.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

DRAINING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ENDING = (signal.SIGINT, *DRAINING)
TOGETHER_S = 0.5
ANOTHER_ENDED = signal.SIGUSR2  # a launcher to its nodes


def words_for(number: int) -> str:
    """What a process says that was ended by it."""
    if number == ANOTHER_ENDED:
        return "stopped by the launcher, because another stage had ended"
    return f"stopped by {signal.Signals(number).name}"


def _interrupt(number: int, frame: FrameType | None = None) -> NoReturn:
    """As Ctrl-C does; of another signal it says which."""
    del frame
    raise KeyboardInterrupt(*([] if number == signal.SIGINT else [words_for(number)]))


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGUSR1 as KeyboardInterrupt. One that somebody handles or ignores stays so."""
    before = end_as_ctrl_c()
    try:
        yield
    finally:
        _restore(before)


def end_as_ctrl_c() -> dict[signal.Signals, Any]:
    """The same from now on, for a whole program; returns what was there before."""
    numbers = (*DRAINING, ANOTHER_ENDED)
    return _set([each for each in numbers if signal.getsignal(each) is signal.SIG_DFL], _interrupt)


def ignore_draining() -> None:
    """For a program that has nothing left to do but to end: it is not to be ended by a request to do so."""
    _set(list(DRAINING), signal.SIG_IGN)


class EndSignals:
    """Those that have come."""

    def __init__(self) -> None:
        self.count = 0
        self._first: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.count += 1
        self._first = self._first or number

    @property
    def name(self) -> str | None:
        """Of the first one."""
        return None if self._first is None else signal.Signals(self._first).name

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


class Impatience:
    """Whether somebody who asked by SIGTERM asks again: later than TOGETHER_S, since `timeout` and others tell a
    process and its group at once."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def shown_by(self, number: int) -> bool:
        if number != signal.SIGTERM:
            return False
        now = time.monotonic()
        self._first_s = now if self._first_s is None else self._first_s
        return now - self._first_s > TOGETHER_S


@contextmanager
def draining_signals() -> Iterator[EndSignals]:
    """Note those of DRAINING while the body runs, which ends in order then; a second SIGTERM is a Ctrl-C."""
    told, impatience = EndSignals(), Impatience()

    def note(number: int, frame: FrameType | None) -> None:
        told.note(number, frame)
        if impatience.shown_by(number):
            _interrupt(number)

    before = _set([each for each in DRAINING if signal.getsignal(each) not in (signal.SIG_IGN, None)], note)
    try:
        yield told
    finally:
        _restore(before)


def _set(numbers: list[signal.Signals], handler: Any) -> dict[signal.Signals, Any]:
    """What was there before; nothing is changed outside of the main thread, where whoever is there handles signals."""
    try:
        return {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        return {}


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
