"""Output that may be lost: a stream that is full, or that nobody reads any more, does not end the program.

A run of days must not end because `| head` has seen enough, or because the disk with its log is full. So what cannot be
written is left out, and that is said once, on the other stream. A file that has room again is written again. Why not
in each place that prints: libraries print too, and rich leaves the program when a pipe breaks. Why not for every
command: a report that nobody reads any more has nothing else to do.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO


class LastingStream:
    """`stream` for text; what it cannot take is left out. name, other: to say so, once."""

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other
        self._said = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._say(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._say(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _say(self, error: OSError) -> None:
        if self._said:
            return
        self._said = True
        line = f"thinpipe: warning: {self._name} cannot be written ({error.strerror}); the run goes on without\n"
        try:
            self._other.write(line)
            self._other.flush()
        except OSError:  # then it cannot be said
            pass


def outlast_output() -> None:
    """From now on, for stdout and stderr of this process."""
    out, err = sys.stdout, sys.stderr
    sys.stdout = LastingStream(out, "stdout", err)  # pyright: ignore[reportAttributeAccessIssue]
    sys.stderr = LastingStream(err, "stderr", out)  # pyright: ignore[reportAttributeAccessIssue]
