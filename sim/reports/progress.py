"""How far a run on this machine is: the figures of all its stages, from their records as they grow."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .figures import StageFigures
from .record_tail import RecordTail, whole_bytes


class Progress:
    """What the records of a run's stages, in one directory, say as they grow. from_now: and not what they say already,
    in a run that is gone on with."""

    def __init__(self, run: Path, *, stages: int, from_now: bool = False) -> None:
        self._figures = [StageFigures(stage) for stage in range(stages)]
        paths = [run / f"stage-{stage}.jsonl" for stage in range(stages)]
        self._tails = [RecordTail(path, offset=whole_bytes(path) if from_now else 0) for path in paths]

    def look(self) -> list[StageFigures]:
        for figures, tail in zip(self._figures, self._tails, strict=True):
            for record in tail.read():
                with suppress(KeyError, TypeError, ValueError, AttributeError):  # left by another version: not shown
                    figures.take(record)
        return self._figures
