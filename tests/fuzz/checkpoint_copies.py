"""A target for copies of checkpoints: what a neighbour may say of them to both ends, down to the file on the disk.

One end receives (checkpoints/arrivals.py, by the rules of `protocol.copy_transfer`) into a directory of a memory file
system, where there is one; the other sends, by the same rules, and is told how far its peer is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from thinpipe.node.checkpoints.copy_receiver import CopyReceiver, Incoming
from thinpipe.node.checkpoints.manifest import CheckpointError, Manifest
from thinpipe.node.checkpoints.store import STATE, CheckpointStore
from thinpipe.node.links.control_stream import LIMITS
from thinpipe.protocol.control_messages import CopyFrame, CopyOffer, CopyPart, CopyProgress
from thinpipe.protocol.copy_transfer import PARTS_AHEAD_LEAST, PARTS_TOGETHER, Receiving, Sending
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.messages import Frame, decode_frame, encode_frame

from . import mutators
from .disk import COMPLETED, FINGERPRINT, sealed
from .judge import Ends, Finding, Target, check_refusal
from .wire import INPUT_BYTES_MAX, READING_BYTES

STAGE, PART_BYTES = 1, 50
FILE_BYTES_MAX = 4096
SENT_BYTES = 1000
HASHING_BYTES = 512 * 1024  # hashlib.file_digest reads by pieces of 256 KiB


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="thinpipe-fuzz-", dir=memory if memory.is_dir() else None)


def _check_size(manifest: Manifest) -> None:
    if manifest.file_bytes > FILE_BYTES_MAX:
        raise CheckpointError(f"it has {manifest.file_bytes} bytes, at most {FILE_BYTES_MAX}")


class _Receiver:
    """A node that keeps its neighbour's copies."""

    def __init__(self) -> None:
        directory = Path(_scratch().name)
        self.store = CheckpointStore(directory, stage=STAGE, fingerprint=FINGERPRINT)
        self.receiver = CopyReceiver(self.store, check=_check_size, supersede=True, directory=directory)
        self.incoming: Incoming | None = None

    def take(self, frame: CopyOffer | CopyPart) -> None:
        """As `node.checkpoints.copy_service` does, but at once. Raises RemoteProtocolError or CheckpointError."""
        if isinstance(frame, CopyOffer):
            self.incoming = None
            self.incoming = Incoming(self.receiver, frame.completed_steps, self.receiver.offer(frame))
        incoming = self.incoming
        if incoming is None or incoming.completed != frame.completed_steps:
            raise CheckpointError("it was not offered")
        if isinstance(frame, CopyPart):
            incoming.state.part(frame.offset, len(frame.data))
            incoming.parts.append(frame.data)
            if incoming.state.due:
                parts, incoming.parts = incoming.parts, []
                incoming.state.acknowledged()
                if self.receiver.write(incoming.state, parts) != incoming.state.offset:
                    raise Finding("what was taken is not what was written")
        self._check(incoming.state)
        if incoming.state.done:
            self.incoming = None
            if self.receiver.complete() is not None:
                self.store.verify(frame.completed_steps)

    def _check(self, state: Receiving) -> None:
        assert self.incoming
        waiting, arrival = sum(map(len, self.incoming.parts)), self.receiver._arrival
        if len(self.incoming.parts) >= PARTS_TOGETHER or state.offset > state.size > FILE_BYTES_MAX:
            raise Finding(f"{len(self.incoming.parts)} parts wait, {state.offset} bytes have come of {state.size}")
        if arrival is None or arrival.written + waiting != state.offset:
            raise Finding(f"{state.offset} bytes have come, {waiting} of them wait")

    def close(self) -> None:
        self.receiver.close()
        for step in self.store.numbers():
            path = self.store.path(step)
            if sorted(os.listdir(path)) != sorted((STATE, "manifest.json")):
                raise Finding(f"{path} is no checkpoint")
            self.store.verify(step)
        shutil.rmtree(self.store.directory, ignore_errors=True)
        if left := os.listdir(_scratch().name):
            raise Finding(f"{left} are left")


def copies(data: bytes) -> Ends:
    """A conversation about copies. Of a part's first byte, bit 0: the connection breaks before it."""
    receiver, sending = _Receiver(), Sending(size=SENT_BYTES, part_bytes=PART_BYTES)
    taken = refused = 0
    try:
        for how, raw in mutators.cut(data[1:]):
            if how & 1:
                receiver.incoming, sending = None, Sending(size=SENT_BYTES, part_bytes=PART_BYTES)
            try:
                frame = decode_frame(raw, LIMITS)
                if isinstance(frame, CopyOffer | CopyPart) and frame.stage == STAGE:
                    receiver.take(frame)
                elif isinstance(frame, CopyProgress):
                    sending.progress(frame.offset)
                    _check_ahead(sending, frame.offset)
                elif not isinstance(frame, CopyFrame):
                    raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__}")
                taken += 1
            except (RemoteProtocolError, CheckpointError) as error:
                refused += 1
                check_refusal(error)
                receiver.incoming = None
    finally:
        receiver.close()
    return Ends(taken, refused)


def _check_ahead(sending: Sending, said: int) -> None:
    most = min(SENT_BYTES, said + (PARTS_AHEAD_LEAST + 1) * PART_BYTES)  # what is said may be no end of a part
    while parts := sending.next():
        for offset, length in parts:
            if not said <= offset < offset + length <= most:
                raise Finding(f"{length} bytes from {offset} are sent to a peer that has {said}")


def _seeds() -> list[bytes]:
    state = bytes(range(256))
    names: dict[str, Any] = {"stage": STAGE, "completed_steps": COMPLETED}
    offer = CopyOffer(**names, manifest=sealed(state).rendered())
    step = len(state) // 5 + 1
    parts = [CopyPart(**names, offset=at, data=state[at : at + step]) for at in range(0, len(state), step)]
    progress = [CopyProgress(**names, offset=at) for at in (0, 100, 150, 550)]
    spoken: list[list[tuple[int, Frame]]] = [
        [(0, offer), *((0, part) for part in parts)],
        [(0, offer), *((0, part) for part in parts[:4]), (1, offer), (0, parts[4])],
        [(0, offer), *((0, part) for part in parts[:3]), (1, offer), *((0, part) for part in parts[:3])],
        [(0, frame) for frame in progress],
        [(0, progress[3]), (0, progress[3]), (1, progress[0]), (0, offer), (0, parts[0])],
    ]
    return [b"\x00" + mutators.join([(how, encode_frame(frame)) for how, frame in said]) for said in spoken]


COPYING = [
    Target(
        name="copies",
        run=copies,
        mutate=mutators.conversation,
        seeds=_seeds(),
        peak_bytes=READING_BYTES + HASHING_BYTES + 64 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    )
]
