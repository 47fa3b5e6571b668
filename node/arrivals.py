"""Checkpoints on their way here from a neighbour: one file a stage, until it is whole and its digest is right.

They outlive connections, so that the next one goes on where the last one broke. All methods touch the disk and belong
on a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..protocol.control import CopyPart
from ..protocol.copies import Receiving
from .checkpoint import CheckpointStore
from .durable import incoming_path, make, sweep_incoming
from .manifest import Manifest


@dataclass(slots=True)
class _Arrival:
    manifest: Manifest
    path: Path
    file: IO[bytes]
    state: Receiving


class Arrivals:
    """What is on its way into `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._by_stage: dict[int, _Arrival] = {}

    def sweep(self) -> None:
        """Put away what dead processes left."""
        sweep_incoming(self._directory)

    def expect(self, manifest: Manifest) -> int:
        """This one is coming; returns how many bytes of it are here. Another one of that stage is given up. Raises
        OSError."""
        present = self._by_stage.get(manifest.stage)
        if present and present.manifest == manifest:
            return present.state.offset
        self._drop(manifest.stage)
        make(self._directory)
        path = incoming_path(self._directory, manifest.stage)
        self._by_stage[manifest.stage] = _Arrival(
            manifest=manifest, path=path, file=path.open("wb"), state=Receiving(size=manifest.file_bytes)
        )
        return 0

    def part(self, frame: CopyPart) -> int | None:
        """More bytes; returns how many are here now, or None if none of that checkpoint are expected. Raises
        RemoteProtocolError for one out of its turn, OSError for a disk that does not take it."""
        arrival = self._by_stage.get(frame.stage)
        if arrival is None or arrival.manifest.completed != frame.completed_steps:
            return None
        arrival.state.part(frame.offset, len(frame.data))
        try:
            arrival.file.write(frame.data)
        except OSError:
            self._drop(frame.stage)
            raise
        return arrival.state.offset

    def settle(self, stage: int, store: CheckpointStore) -> bool:
        """Hand it over to `store` if it is whole; whether it was. Raises CheckpointError for one that is damaged."""
        arrival = self._by_stage.get(stage)
        if arrival is None or not arrival.state.done:
            return False
        try:
            arrival.file.close()  # here a full disk may show
            store.adopt(arrival.manifest, arrival.path)
        finally:
            self._drop(stage)
        return True

    def clear(self) -> None:
        """Nothing is expected any more."""
        for stage in list(self._by_stage):
            self._drop(stage)

    def _drop(self, stage: int) -> None:
        if arrival := self._by_stage.pop(stage, None):
            try:
                arrival.file.close()
            finally:
                arrival.path.unlink(missing_ok=True)
