"""Following a file of records while it is written: JSON lines, read from where the last read ended.

A line that is still being written is left for the next look. A file that became shorter, or is another one, belongs to
another run that took its place, and is read from its beginning. A line that is not a record is counted and skipped, so
that what a full disk left behind does not stop a watcher.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HEAD_BYTES = 256
TAIL_BYTES = 2**20  # a record is a few kilobytes


def whole_bytes(path: Path) -> int:
    """Where the last whole line of a file of records ends, 0 where there is none. A process that was killed while it
    wrote leaves half a line behind, and whoever goes on with the file cuts it off and writes in its place: so what
    comes next begins here, and not at the end of the file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        tail = min(file.seek(0, os.SEEK_END), TAIL_BYTES)
        file.seek(-tail, os.SEEK_END)
        start = file.tell()
        return start + file.read().rfind(b"\n") + 1
    return 0


class RecordTail:
    """replacements: rises when the file was replaced. unreadable: lines that were no record."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        """offset: what is before it is not read."""
        self.path = path
        self.replacements = 0
        self.unreadable = 0
        self._offset = offset
        self._head = b""  # its beginning, which no other run's file shares: there is a time in it

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that came since the last call; none where there is no file."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            head = file.read(HEAD_BYTES)
            if head[: len(self._head)] != self._head:
                self.replacements, self._offset, self.unreadable = self.replacements + 1, 0, 0
            self._head = head[: self._offset or None]
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict) and isinstance(record.get("event"), str):
                    yield record
                else:
                    self.unreadable += 1
