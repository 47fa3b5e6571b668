"""Encoding and parsing a frame around tensor data with one copy into it, and none out of it.

Protobuf copies what it is given into the message, that into the frame around it, and the frame into its bytes: 1.2 to
2.2 ms of a core for each MiB, where joining takes 0.02. But a message's bytes are those of its fields, one after the
other, so the fields before and after the data may be serialised alone. The result is what protobuf writes itself
(tests/test_messages.py).

Reading is the same the other way: the data are found, and protobuf parses what is left without them (1.4 ms for each
MiB before, of which the checksum was 0.25). Whatever is not spelled exactly so is left to protobuf as a whole, which
judges it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import stage_pb2 as pb

LENGTH_DELIMITED = 2  # wire type of bytes and messages


@dataclass(frozen=True, slots=True)
class Gathered:
    """Buffers that travel as one, and are joined only in the frame: joined before, each byte would be copied twice."""

    buffers: tuple[memoryview, ...]

    def __len__(self) -> int:
        return sum(map(len, self.buffers))

    def __bytes__(self) -> bytes:
        return b"".join(self.buffers)


Data = bytes | memoryview | Gathered


def buffers_of(data: Data) -> tuple[bytes | memoryview, ...]:
    return data.buffers if isinstance(data, Gathered) else (data,)


def around_data(name: str, before: Any, data: Data, after: Any) -> bytes:
    """The bytes of a frame whose body, called `name`, has the fields of `before`, then its `data`, then those of
    `after`: two messages of the body's type, with fields of smaller and of larger numbers than that of the data."""
    head, tail = before.SerializeToString(), after.SerializeToString()
    buffers = buffers_of(data)
    size = sum(memoryview(buffer).nbytes for buffer in buffers)
    if size:  # an empty field is left out
        head += _key(before, "data") + _varint(size)
    length = len(head) + size + len(tail)
    return b"".join((_key(pb.Frame, name), _varint(length), head, *buffers, tail))


def without_data(name: str, body: Any, raw: bytes) -> tuple[bytes, memoryview] | None:
    """Of a frame whose body, called `name`, is of the type of `body`: the body's bytes without its data, and a view of
    the data. None for any other frame, one without data, and one that spells a length as protobuf does not."""
    view, outer, inner = memoryview(raw), _key(pb.Frame, name), _key(body, "data")
    if not raw.startswith(outer):
        return None
    try:
        length, start = _read_varint(raw, len(outer))
        if length != len(raw) - start or raw[len(outer) : start] != _varint(length):
            return None
        at = start
        while not raw.startswith(inner, at):
            at = _past_field(raw, at)
        size, begin = _read_varint(raw, at + len(inner))
    except IndexError:  # the frame ends here
        return None
    end = begin + size
    if not size or end > len(raw) or raw[at + len(inner) : begin] != _varint(size):
        return None
    return b"".join((view[start:at], view[end:])), view[begin:end]


def _past_field(raw: bytes, at: int) -> int:
    """Where the next field begins. Raises IndexError where there is none, or not one of the kinds that a body has."""
    key, at = _read_varint(raw, at)
    match key & 7:
        case 0:
            return _read_varint(raw, at)[1]
        case 1:
            return at + 8
        case 5:
            return at + 4
        case 2:
            size, at = _read_varint(raw, at)
            return at + size
    raise IndexError(at)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends. Raises IndexError."""
    number = 0
    for shift in range(0, 64, 7):
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise IndexError(at)


def _key(message: Any, field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | LENGTH_DELIMITED)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the least first; all but the last byte have the eighth bit."""
    raw = bytearray()
    while number > 0x7F:
        raw.append(number & 0x7F | 0x80)
        number >>= 7
    raw.append(number)
    return bytes(raw)
