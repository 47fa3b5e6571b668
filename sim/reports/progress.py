"""How far a run on this machine is: the figures of all its stages, lane by lane, from their records as they grow."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .figures import StageFigures
from .lanes import lane_path
from .record_tail import RecordTail

TAIL_BYTES = 2**20  # a record is a few kilobytes


class Progress:
    """What the records of a run's stages say as they grow. from_now: and not what they say already, in a run that is
    gone on with."""

    def __init__(self, run: Path, *, stages: int, lanes: int = 1, from_now: bool = False) -> None:
        nodes = [(lane, stage) for lane in range(lanes) for stage in range(stages)]
        self._figures = [StageFigures(stage, lane=lane, lanes=lanes) for lane, stage in nodes]
        paths = [lane_path(run, lane, lanes) / f"stage-{stage}.jsonl" for lane, stage in nodes]
        self._tails = [RecordTail(path, offset=_size(path) if from_now else 0) for path in paths]

    def look(self) -> list[StageFigures]:
        """Those of the first lane in the order of stages, then those of the next."""
        for figures, tail in zip(self._figures, self._tails, strict=True):
            for record in tail.read():
                with suppress(KeyError, TypeError, ValueError, AttributeError):  # left by another version: not shown
                    figures.take(record)
        return self._figures


def _size(path: Path) -> int:
    """Up to the end of its last whole line: the rest is cut off by who goes on with it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        tail = min(file.seek(0, os.SEEK_END), TAIL_BYTES)
        file.seek(-tail, os.SEEK_END)
        start = file.tell()
        return start + file.read().rfind(b"\n") + 1
    return 0
