"""A change of a dictionary as bytes: its version before and after, the entries that it covers, their values, a digest.

On the wire a delta is the length of its header (2 bytes), the header (msgpack, bounded by header.py), the indices, the
payload. Lengths follow from the local spec. Why not all in msgpack: its one-byte empty lists take 60 times that in
memory. A message may change several dictionaries: `join_deltas` puts each one after its length (4 bytes).

`rows` encodes the values of an entry; `dictionary` applies deltas to a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .errors import Fault, LocalProtocolError, RemoteProtocolError
from .header import check_text, decode_header, encode_header
from .messages import MICROBATCH_MAX, STEP_MAX
from .rows import Encoding, rows_bytes

DIGEST_BYTES = 16  # against accident, not malice: the owner may say what it likes
_HEAD_BYTES_MAX = 192  # length, keys, two versions of four 9-byte numbers, count, encoding, digest; not the name
_LENGTH_BYTES = 4
_FIELDS = ["name", "version", "previous", "entries", "encoding", "digest"]


class Version(NamedTuple):
    """When a delta was made; a later one is greater. `index` counts the deltas of one microbatch."""

    generation: int
    step: int
    microbatch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True, slots=True)
class DictionarySpec:
    """What both ends know of a dictionary from their own configuration."""

    name: str
    entries: int
    width: int
    dtype: Literal["float32", "float64"] = "float32"
    encoding: Encoding = "bf16"

    def __post_init__(self) -> None:
        known = self.dtype in ("float32", "float64") and self.encoding in get_args(Encoding)
        if not (known and 0 < self.entries <= 2**32 and self.width > 0):
            raise LocalProtocolError(Fault.CONFIGURATION, f"no dictionary can be {self}")
        try:
            check_text("dictionary name", self.name)
        except RemoteProtocolError as error:
            raise LocalProtocolError(error.fault, error.reason) from None

    @property
    def snapshot_encoding(self) -> Encoding:
        return "fp64" if self.dtype == "float64" else "fp32"

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """How an entry's number travels: the smallest unsigned integer that can hold the last one."""
        return np.min_scalar_type(self.entries - 1).newbyteorder("<")

    @property
    def delta_bytes_max(self) -> int:
        """No serialised delta of this dictionary, snapshots included, is longer."""
        payload = max(self.payload_bytes(self.entries, name) for name in (self.encoding, self.snapshot_encoding))
        return _HEAD_BYTES_MAX + len(self.name.encode()) + self.entries * self.index_dtype.itemsize + payload

    def payload_bytes(self, rows: int, encoding: Encoding | None = None) -> int:
        """Exactly what `rows` entries take, in this dictionary's encoding unless another one is named."""
        return rows_bytes(rows, self.width, encoding or self.encoding)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """What leads a replica from version `previous` to `version`; from nothing (a snapshot) where that is None.

    indices: the entries it changes, ascending; None for all. digest: of the table after it.
    """

    name: str
    version: Version
    previous: Version | None
    indices: np.ndarray | None
    encoding: Encoding
    payload: bytes
    digest: bytes

    @property
    def snapshot(self) -> bool:
        """The whole table, and not a change to one."""
        return self.previous is None


def encode_delta(delta: Delta) -> bytes:
    head = _encode_head(delta)
    indices = b"" if delta.indices is None else delta.indices.tobytes()
    return b"".join([len(head).to_bytes(2, "little"), head, indices, delta.payload])


def decode_delta(raw: bytes | memoryview, spec: DictionarySpec) -> Delta:
    """The one delta whose bytes these are; its values are for the replica to judge. Raises RemoteProtocolError only."""
    if (size := memoryview(raw).nbytes) > spec.delta_bytes_max:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a delta of {size} bytes, at most {spec.delta_bytes_max} here")
    raw = bytes(raw)
    head_end = 2 + int.from_bytes(raw[:2], "little")
    head = decode_header(raw[2:head_end])
    if list(head) != _FIELDS or not isinstance(head["digest"], bytes) or head["encoding"] not in get_args(Encoding):
        raise malformed(f"a delta with this header: {head!a:.200}")
    if (count := head["entries"]) is not None and not (type(count) is int and 0 < count <= spec.entries):
        raise malformed(f"a delta of {count!a:.40} entries, '{spec.name}' has {spec.entries}")
    payload_start = head_end + (count or 0) * spec.index_dtype.itemsize
    if size != payload_start + spec.payload_bytes(count or spec.entries, head["encoding"]):
        raise malformed(f"a delta of {size} bytes, which is not what its header says")
    head["version"] = as_version(head["version"])
    head["previous"] = None if head["previous"] is None else as_version(head["previous"])
    indices = None if count is None else np.frombuffer(raw, spec.index_dtype, count, head_end)
    del head["entries"]
    delta = Delta(**head, indices=indices, payload=raw[payload_start:])
    check_delta(delta, spec)
    if _encode_head(delta) != raw[2:head_end]:  # a key twice, a number in more bytes than it needs
        raise malformed("a delta whose header is not the shortest spelling of itself")
    return delta


def join_deltas(deltas: Iterable[bytes]) -> bytes:
    """The dictionary section of a message: each delta behind its length."""
    return b"".join(len(delta).to_bytes(_LENGTH_BYTES, "little") + delta for delta in deltas)


def joined_bytes_max(specs: Iterable[DictionarySpec]) -> int:
    """No dictionary section with a change of each of these is longer."""
    return sum(_LENGTH_BYTES + spec.delta_bytes_max for spec in specs)


def split_deltas(raw: bytes | memoryview, names: Collection[str]) -> dict[str, bytes]:
    """The deltas of `join_deltas`, not decoded yet, by the dictionary that each one names. Raises RemoteProtocolError
    for a section that breaks off, and for a dictionary that is not one of `names` or comes twice."""
    rest, found = bytes(raw), {}
    while rest:
        end = _LENGTH_BYTES + int.from_bytes(rest[:_LENGTH_BYTES], "little")
        delta, whole = rest[_LENGTH_BYTES:end], len(rest)
        if whole < _LENGTH_BYTES + 2 or whole < end:
            raise malformed(f"a delta that breaks off: {whole} bytes of {max(end, _LENGTH_BYTES + 2)}")
        name = decode_header(delta[2 : 2 + int.from_bytes(delta[:2], "little")]).get("name")
        if not isinstance(name, str) or name not in names:
            here = ", ".join(f"'{known}'" for known in sorted(names)) or "none"
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a change of dictionary {name!a:.80}; here: {here}")
        if name in found:
            raise malformed(f"two changes of dictionary '{name}' in one message")
        found[name], rest = delta, rest[end:]
    return found


def malformed(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(Fault.MALFORMED, reason)


def _encode_head(delta: Delta) -> bytes:
    previous, count = delta.previous and list(delta.previous), None if delta.indices is None else len(delta.indices)
    values = [delta.name, list(delta.version), previous, count, delta.encoding, delta.digest]
    return encode_header(f"dictionary {delta.name}", dict(zip(_FIELDS, values, strict=True)))


def as_version(numbers: Any) -> Version:
    """Raises RemoteProtocolError unless these are the numbers of one."""
    ends = (2**64, STEP_MAX, MICROBATCH_MAX, MICROBATCH_MAX)
    if isinstance(numbers, list | Version) and len(numbers) == 4 and all(type(number) is int for number in numbers):
        version = Version(*numbers)
        if all(0 <= number < end for number, end in zip(version, ends, strict=True)):
            return version
    raise malformed(f"{numbers!a:.80} is no version")


def check_indices(indices: np.ndarray, spec: DictionarySpec) -> None:
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        raise malformed(f"entries of '{spec.name}' are {indices.dtype} {indices.shape}, not a few whole numbers")
    if not (np.all(indices[1:] > indices[:-1]) and indices[0] >= 0 and indices[-1] < spec.entries):
        raise malformed(f"entries of '{spec.name}' are not ascending numbers below {spec.entries}")


def check_delta(delta: Delta, spec: DictionarySpec) -> None:
    """The rules that a delta of this dictionary obeys whatever came before it. Raises RemoteProtocolError."""
    if delta.name != spec.name:
        raise RemoteProtocolError(Fault.UNEXPECTED, f"a delta of dictionary {delta.name!a:.80}, not '{spec.name}'")
    if as_version(delta.version) <= (delta.previous or ()):
        raise malformed(f"a delta of '{spec.name}' from {delta.previous} to {delta.version}, which is not later")
    if delta.encoding != (wanted := spec.snapshot_encoding if delta.snapshot else spec.encoding):
        raise RemoteProtocolError(Fault.CONFIGURATION, f"a delta of '{spec.name}' in {delta.encoding}, not {wanted}")
    if delta.indices is not None:
        if delta.snapshot:
            raise malformed(f"a snapshot of some entries of '{spec.name}'")
        check_indices(delta.indices, spec)
    rows = spec.entries if delta.indices is None else len(delta.indices)
    if len(delta.payload) != spec.payload_bytes(rows, delta.encoding) or len(delta.digest) != DIGEST_BYTES:
        raise malformed(f"a delta of '{spec.name}' with {len(delta.payload)} bytes for {rows} entries")
