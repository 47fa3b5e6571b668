"""Receiving a copy of a neighbour's checkpoint, until it is complete and its digest is right.

It outlives connections, so the next one continues where the last one broke. `CopyReceiver` writes to the disk, so its
methods belong on a thread. A job whose connection is gone may still run in its thread; a lock keeps it apart from those
of the next connection. Each offer gets a `Receiving` of its own, which gives the right to write: an earlier one is
void. What goes with a state (`Manifest.beside`) comes first, and only where it is not here already.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ...protocol.control_messages import CopyOffer, CopyPart
from ...protocol.copy_transfer import Receiving
from .durable_files import incoming_path, make
from .kept_tokenizer import beside, take_beside
from .manifest import CheckpointError, Manifest, parse_manifest
from .store import CheckpointStore


@dataclass(slots=True)
class _Arrival:
    manifest: Manifest
    path: Path
    file: IO[bytes]
    beside: IO[bytes]  # what comes before the state, and has a place of its own
    state: Receiving
    began: int  # bytes, of both, that were here already
    written: int  # and are now

    def write(self, data: bytes) -> None:
        before = max(0, self.manifest.beside_bytes - self.written)
        self.beside.write(data[:before])
        self.file.write(data[before:])
        self.written += len(data)


class CopyReceiver:
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

    async def begin(self, frame: CopyOffer) -> Incoming:
        """What comes of an offer, on the connection that it came on; raises what `offer` does."""
        return Incoming(self, frame.completed_steps, await asyncio.to_thread(self.offer, frame))

    def offer(self, frame: CopyOffer) -> Receiving:
        """This one is coming; what has come of it is here already. Another one is given up. Raises CheckpointError for
        one that is not taken, OSError for a disk that does not take it."""
        manifest = parse_manifest(frame.manifest, where="the manifest of a copy", remedy="it is not taken")
        self._store.check_same_run(manifest, "a copy that was offered")
        if manifest.completed != frame.completed_steps:
            raise CheckpointError(f"its manifest is after {manifest.completed} steps")
        self._check(manifest)
        with self._lock:
            if self._closed:
                raise CheckpointError("this node is about to end")
            present = self._arrival
            if present and present.manifest == manifest:
                present.state = Receiving(size=manifest.copy_bytes, offset=present.written)
                return present.state
            self._drop()
            make(self._path.parent)
            have = manifest.beside_bytes if beside(self._store.directory) == manifest.beside else 0
            state = Receiving(size=manifest.copy_bytes, offset=have)
            aside = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 (closed with the arrival)
            self._arrival = _Arrival(manifest, self._path, self._path.open("wb"), aside, state, have, have)
            return state

    def write(self, state: Receiving, parts: list[bytes]) -> int | None:
        """More bytes; returns how many are written now, or None if that offer does not hold any more. Raises OSError
        for a disk that does not take them."""
        with self._lock:
            arrival = self._arrival
            if arrival is None or arrival.state is not state:
                return None
            try:
                for data in parts:
                    arrival.write(data)
            except OSError:
                self._drop()
                raise
            return arrival.written

    def complete(self) -> tuple[int, int] | None:
        """Hand it over to the store if it is whole; after how many steps it was, and how many bytes have come, on
        however many connections. None if it is not whole. Raises CheckpointError for one that is damaged."""
        with self._lock:
            arrival = self._arrival
            if arrival is None or arrival.written != arrival.manifest.copy_bytes:
                return None
            try:
                arrival.file.close()  # here a full disk may show
                if arrival.beside.tell():
                    arrival.beside.seek(0)
                    take_beside(arrival.beside, arrival.manifest.beside, self._store.directory)
                self._store.adopt(arrival.manifest, arrival.path, supersede=self._supersede)
            finally:
                self._drop()
            return arrival.manifest.completed, arrival.written - arrival.began

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
                arrival.beside.close()
                arrival.file.close()
            finally:
                arrival.path.unlink(missing_ok=True)


@dataclass(slots=True, eq=False)
class Incoming:
    """What comes over one connection. Parts are written several at a time: a job on a thread costs more than a write.
    Those that wait when the connection ends are lost with it, and were not acknowledged. On the event loop."""

    receiver: CopyReceiver
    completed: int
    state: Receiving
    parts: list[bytes] = field(default_factory=list)

    async def part(self, frame: CopyPart) -> int | None:
        """One more; returns how many bytes are written, or None if there is nothing to say yet, or ever: a later offer
        has taken its place. Raises RemoteProtocolError for one out of its turn, and what `write` does."""
        self.state.part(frame.offset, len(frame.data))
        self.parts.append(frame.data)
        if not self.state.due:
            return None
        parts, self.parts = self.parts, []
        self.state.acknowledged()
        return await asyncio.to_thread(self.receiver.write, self.state, parts)
