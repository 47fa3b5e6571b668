"""How far a run on this machine is: the figures of all its stages, lane by lane, from their records as they grow."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .figures import StageFigures
from .lanes import lane_path
from .record_tail import RecordTail, whole_bytes


class Progress:
    """What the records of a run's stages say as they grow. from_now: and not what they say already, in a run that is
    gone on with."""

    def __init__(self, run: Path, *, stages: int, lanes: int = 1, from_now: bool = False) -> None:
        nodes = [(lane, stage) for lane in range(lanes) for stage in range(stages)]
        self._figures = [StageFigures(stage, lane=lane, lanes=lanes) for lane, stage in nodes]
        paths = [lane_path(run, lane, lanes) / f"stage-{stage}.jsonl" for lane, stage in nodes]
        self._tails = [RecordTail(path, offset=whole_bytes(path) if from_now else 0) for path in paths]

    def look(self) -> list[StageFigures]:
        """Those of the first lane in the order of stages, then those of the next."""
        for figures, tail in zip(self._figures, self._tails, strict=True):
            for record in tail.read():
                with suppress(KeyError, TypeError, ValueError, AttributeError):  # left by another version: not shown
                    figures.take(record)
        return self._figures
