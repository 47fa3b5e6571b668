"""A checkpoint of one stage on its way here from a neighbour, until it is whole and its digest is right.

It outlives connections, so that the next one goes on where the last one broke. All methods touch the disk and belong on
a thread; a lock keeps apart a job whose connection is gone, which runs on in its thread, from those of the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..protocol.control import CopyOffer, CopyPart
from ..protocol.copies import Receiving
from .checkpoint import CheckpointStore
from .durable import incoming_path, make
from .manifest import CheckpointError, Manifest, parse_manifest


@dataclass(slots=True)
class _Arrival:
    manifest: Manifest
    path: Path
    file: IO[bytes]
    state: Receiving


class Arrivals:
    """What comes into `store`, one checkpoint at a time.

    check: raises CheckpointError for one that is not to be taken. supersede: a state that has come is the newest there
    is, so later ones, of training that was undone, go.
    """

    def __init__(
        self, store: CheckpointStore, *, check: Callable[[Manifest], None], supersede: bool, directory: Path
    ) -> None:
        self._store, self._check, self._supersede = store, check, supersede
        self._path = incoming_path(directory, store.stage)
        self._lock = threading.Lock()
        self._arrival: _Arrival | None = None
        self._closed = False

    def offer(self, frame: CopyOffer) -> int:
        """This one is coming; returns how many bytes of it are here. Another one is given up. Raises CheckpointError
        for one that is not taken, OSError for a disk that does not take it."""
        manifest = parse_manifest(frame.manifest, where="the manifest of a copy", remedy="it is not taken")
        self._store.check_kinship(manifest, "a copy that was offered")
        if manifest.completed != frame.completed_steps:
            raise CheckpointError(f"its manifest is after {manifest.completed} steps")
        self._check(manifest)
        with self._lock:
            if self._closed:
                raise CheckpointError("this node is about to end")
            present = self._arrival
            if present and present.manifest == manifest:
                return present.state.offset
            self._drop()
            make(self._path.parent)
            file = self._path.open("wb")
            self._arrival = _Arrival(manifest, self._path, file, Receiving(size=manifest.file_bytes))
            return 0

    def part(self, frame: CopyPart) -> int | None:
        """More bytes; returns how many are here now, or None if none of that checkpoint are expected. Raises
        RemoteProtocolError for one out of its turn, OSError for a disk that does not take it."""
        with self._lock:
            arrival = self._arrival
            if arrival is None or arrival.manifest.completed != frame.completed_steps:
                return None
            arrival.state.part(frame.offset, len(frame.data))
            try:
                arrival.file.write(frame.data)
            except OSError:
                self._drop()
                raise
            return arrival.state.offset

    def settle(self) -> int | None:
        """Hand it over to the store if it is whole; after how many steps it was, None if it is not whole. Raises
        CheckpointError for one that is damaged."""
        with self._lock:
            arrival = self._arrival
            if arrival is None or not arrival.state.done:
                return None
            try:
                arrival.file.close()  # here a full disk may show
                self._store.adopt(arrival.manifest, arrival.path, supersede=self._supersede)
            finally:
                self._drop()
            return arrival.manifest.completed

    def drop(self) -> None:
        """Nothing is expected any more."""
        with self._lock:
            self._drop()

    def close(self) -> None:
        """The same, for good."""
        with self._lock:
            self._closed = True
            self._drop()

    def _drop(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival:
            try:
                arrival.file.close()
            finally:
                arrival.path.unlink(missing_ok=True)
