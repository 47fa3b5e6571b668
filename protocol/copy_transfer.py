"""Sending a file to a neighbour in parts, in the time that the link has to spare, sans-IO: who may send what, and when.

The receiver reports how many bytes it has (`CopyProgress`), and the sender continues there, a few parts ahead of the
last report. So a connection may break at any moment: at the next one the receiver names its offset again, and what it
has is not sent twice. The stream beneath keeps the order, so a part that does not begin where the last one ended is a
broken rule and not a loss. Whether the bytes are right is decided once, by the digest in the manifest.

Parts are cheap to read and to write, but expensive to pass between threads and to acknowledge. So the receiver takes
`PARTS_TOGETHER` at a time and acknowledges them once. The sender may be twice as many parts ahead, so the two never
wait for each other.

Why not as messages of the tensors' stream: those must arrive before training goes on, are kept until acknowledged, and
end with their generation. A copy may take many generations, matters to nobody until a disk is lost, and can be read
again.
"""

from __future__ import annotations

from .errors import Fault, RemoteProtocolError

PARTS_TOGETHER = 4  # written and acknowledged at once; a peer that is given fewer ahead would wait for ever
# Sent and not yet acknowledged: as many as fill the link for a round trip, within these bounds.
PARTS_AHEAD_LEAST, PARTS_AHEAD_MOST = 2 * PARTS_TOGETHER, 32


class Sending:
    """The sender's side of one file of `size` bytes."""

    def __init__(self, *, size: int, part_bytes: int, parts_ahead: int = PARTS_AHEAD_LEAST) -> None:
        if size < 0 or part_bytes <= 0 or not PARTS_AHEAD_LEAST <= parts_ahead <= PARTS_AHEAD_MOST:
            raise ValueError(f"a file of {size} bytes in parts of {part_bytes}, {parts_ahead} ahead")
        self.size = size
        self._part_bytes, self._ahead_bytes = part_bytes, parts_ahead * part_bytes
        self._sent: int | None = None  # None: the receiver has not said yet where it is
        self._acknowledged = 0

    @property
    def done(self) -> bool:
        """The receiver has all of it."""
        return self._sent is not None and self._acknowledged == self.size

    def next(self, most: int = PARTS_TOGETHER) -> list[tuple[int, int]]:
        """(offset, bytes) of at most so many parts that may leave now, in order; none: wait for the receiver."""
        parts: list[tuple[int, int]] = []
        while self._sent is not None and self._sent < self.size and len(parts) < most:
            if self._sent - self._acknowledged >= self._ahead_bytes:
                break
            offset = self._sent
            self._sent = min(self.size, offset + self._part_bytes)
            parts.append((offset, self._sent - offset))
        return parts

    def progress(self, offset: int) -> None:
        """The receiver has so many bytes. The first one says where to begin. Raises RemoteProtocolError for more than
        was sent and for less than it had."""
        most = self.size if self._sent is None else self._sent
        if not self._acknowledged <= offset <= most:
            raise RemoteProtocolError(
                Fault.UNEXPECTED, f"a copy is said to be at byte {offset}, not at {self._acknowledged} to {most}"
            )
        self._acknowledged = offset
        if self._sent is None:
            self._sent = offset


class Receiving:
    """The receiver's side, on one connection: what has come of a file of `size` bytes, of which it said that it had
    `offset` when this connection began."""

    def __init__(self, *, size: int, offset: int = 0) -> None:
        self.size = size
        self.offset = offset  # everything before it has come
        self._parts = 0  # that came and were not acknowledged

    @property
    def done(self) -> bool:
        return self.offset == self.size

    @property
    def due(self) -> bool:
        """What came is to be written now, and acknowledged."""
        return self._parts >= PARTS_TOGETHER or (self.done and self._parts > 0)

    def part(self, offset: int, length: int) -> None:
        """The next part came. Raises RemoteProtocolError unless it goes on where the last one ended, within the
        file."""
        if offset != self.offset or not 0 < length <= self.size - offset:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"bytes {offset} to {offset + length} of a copy of {self.size}, due from {self.offset}",
            )
        self.offset += length
        self._parts += 1

    def acknowledged(self) -> None:
        """All received parts are written, and this was acknowledged."""
        self._parts = 0
