"""Dictionaries that a decoder needs (projectors, codebooks), kept bit-identical at both ends by versioned deltas.

A dictionary is a table of `entries x width` numbers with one owner. Its Publisher keeps `shipped`, bit-exactly what the
peer's Mirror holds once every delta so far has arrived; the owner codes tensors with `shipped`, never with the master
that it trains, so that both ends agree whatever is in flight. The first delta is a snapshot at full precision. Later
ones code `master - shipped` of the chosen entries coarsely, and the *decoded* values are added to `shipped` by the
function that the mirror runs: what rounding left out is part of the next delta. This is closed-loop prediction,
x' = x + Q(master - x), as in CHOCO (arXiv 1902.00340) and EF21 (arXiv 2106.05203).

Why not the whole table each time: at full precision it is 4 to 8 times the bytes, and rounded it never gets closer than
one rounding (a bf16 cast of a projector leaves it 2.4e-3 off orthogonal). Why not the difference of successive masters:
each one adds a rounding error that nothing takes away again, and the ends drift apart like a random walk.

How the values of an entry become bytes stands in `rows`. With each delta the
distance to a constant master shrinks to 2^-24 (fp32), 2^-8 (bf16), 1/254 or 1/14 of it, down to its last bit.

The digest covers the version and the *whole resulting table*, not the deltas that led there: those would not show an
end that adds differently or restored another table, and a table alone (a checkpoint, a snapshot) could not be verified.
It costs a pass of 0.7 ms a MB. Damage to a delta that leads to the very same table is no damage.

On the wire: the length of the header (2 bytes), the header (msgpack, bounded by header.py), the indices, the payload.
Lengths follow from the local spec. Why not all in msgpack: its one-byte empty lists take 60 times that in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import msgpack
import numpy as np

from .errors import Fault, LocalProtocolError, RemoteProtocolError
from .header import check_text, decode_header, encode_header
from .messages import MICROBATCH_MAX, STEP_MAX
from .rows import Encoding, decode_rows, encode_rows, rows_bytes

DIGEST_BYTES = 16  # against accident, not malice: the owner may say what it likes
_HEAD_BYTES_MAX = 192  # length, keys, two versions of four 9-byte numbers, count, encoding, digest; not the name
_FIELDS = ["name", "version", "previous", "entries", "encoding", "digest"]


class Version(NamedTuple):
    """When a delta was made; a later one is greater. `index` counts the deltas of one microbatch."""

    epoch: int
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
    """What leads a mirror from version `previous` to `version`; from nothing (a snapshot) where that is None.

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
    """The one delta whose bytes these are; its values are for the mirror to judge. Raises RemoteProtocolError only."""
    if (size := memoryview(raw).nbytes) > spec.delta_bytes_max:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a delta of {size} bytes, at most {spec.delta_bytes_max} here")
    raw = bytes(raw)
    head_end = 2 + int.from_bytes(raw[:2], "little")
    head = decode_header(raw[2:head_end])
    if list(head) != _FIELDS or not isinstance(head["digest"], bytes) or head["encoding"] not in get_args(Encoding):
        raise _malformed(f"a delta with this header: {head!a:.200}")
    if (count := head["entries"]) is not None and not (type(count) is int and 0 < count <= spec.entries):
        raise _malformed(f"a delta of {count!a:.40} entries, '{spec.name}' has {spec.entries}")
    payload_start = head_end + (count or 0) * spec.index_dtype.itemsize
    if size != payload_start + spec.payload_bytes(count or spec.entries, head["encoding"]):
        raise _malformed(f"a delta of {size} bytes, which is not what its header says")
    head["version"] = _version(head["version"])
    head["previous"] = None if head["previous"] is None else _version(head["previous"])
    indices = None if count is None else np.frombuffer(raw, spec.index_dtype, count, head_end)
    del head["entries"]
    delta = Delta(**head, indices=indices, payload=raw[payload_start:])
    _check(delta, spec)
    if _encode_head(delta) != raw[2:head_end]:  # a key twice, a number in more bytes than it needs
        raise _malformed("a delta whose header is not the shortest spelling of itself")
    return delta


class _Table:
    """A table at a version: what Publisher and Mirror have in common."""

    def __init__(self, spec: DictionarySpec, epoch: int) -> None:
        self.spec, self.epoch = spec, epoch
        self.version: Version | None = None
        self.digest = b""
        self._table: np.ndarray | None = None

    @property
    def table(self) -> np.ndarray:
        """(entries, width), read-only, another array for each version."""
        if self._table is None:
            raise LocalProtocolError(Fault.UNEXPECTED, f"dictionary '{self.spec.name}' is empty: no snapshot yet")
        return self._table

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint: one array, and values that JSON can hold."""
        table = np.empty((0, self.spec.width), self.spec.dtype) if self._table is None else self._table
        return {"version": self.version and list(self.version), "digest": self.digest.hex(), "table": table}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, bit for bit. Raises LocalProtocolError, and changes nothing, if it is damaged."""
        spec, what = self.spec, f"the state of dictionary '{self.spec.name}'"
        try:
            table, digest = np.array(state["table"], order="C"), bytes.fromhex(state["digest"])
            version = None if state["version"] is None else _version(list(state["version"]))
        except (KeyError, TypeError, ValueError, RemoteProtocolError) as error:
            raise LocalProtocolError(Fault.RESUME, f"{what} is damaged: {error!r}") from None
        shape = (spec.entries if version else 0, spec.width)
        if (table.shape, table.dtype) != (shape, np.dtype(spec.dtype)):
            raise LocalProtocolError(Fault.RESUME, f"{what} is {table.shape} {table.dtype}, not {shape} {spec.dtype}")
        if digest != (_digest(spec, version, table) if version else b""):
            raise LocalProtocolError(Fault.RESUME, f"{what} does not match its digest")
        if version and version.epoch > self.epoch:
            raise LocalProtocolError(Fault.EPOCH, f"{what} is of epoch {version.epoch}, later than {self.epoch} here")
        table.setflags(write=False)
        self.version, self.digest, self._table = version, digest, table if version else None


class Publisher(_Table):
    """The owner's end. Keeps what it has shipped; the master is the caller's."""

    @property
    def shipped(self) -> np.ndarray:
        """What tensors have to be coded with: (entries, width), read-only, another array for each version."""
        return self.table

    def publish(self, master: np.ndarray, *, step: int, microbatch: int, entries: np.ndarray | None = None) -> Delta:
        """The delta that brings these entries (ascending; None: all) as near to `master` as the encoding can.

        The first one is a snapshot of all entries whatever `entries` says. Raises LocalProtocolError, and changes
        nothing, for a master that is not finite or not of the spec's shape and dtype, and a version that does not rise.
        """
        spec, old = self.spec, self.version
        shape, dtype = (spec.entries, spec.width), np.dtype(spec.dtype)
        if (master.shape, master.dtype) != (shape, dtype) or not np.isfinite(master).all():
            found = f"{master.shape} {master.dtype}, want finite numbers {shape} {dtype}"
            raise LocalProtocolError(Fault.PAYLOAD, f"master of '{spec.name}' at step {step}: {found}")
        version = Version(self.epoch, step, microbatch, 0)
        if old and old[:3] == version[:3]:
            version = old._replace(index=old.index + 1)
        encoding, indices = spec.encoding if old else spec.snapshot_encoding, None
        with np.errstate(all="ignore"):
            drift = master - self._table if old else master
        try:
            if entries is not None and old:
                _check_indices(entries, spec)
                indices, drift = entries.astype(spec.index_dtype), drift[entries]
            delta = Delta(
                name=spec.name,
                version=version,
                previous=old,
                indices=indices,
                encoding=encoding,
                payload=encode_rows(drift, encoding),
                digest=bytes(DIGEST_BYTES),
            )
            _check(delta, spec)
            table = _advance(self._table, delta, spec)
        except RemoteProtocolError as error:  # the mirror's rules, broken here
            raise LocalProtocolError(error.fault, error.reason) from None
        self.version, self.digest, self._table = version, _digest(spec, version, table), table
        return replace(delta, digest=self.digest)


class Mirror(_Table):
    """The peer's end: the table as of the last delta."""

    def apply(self, delta: Delta) -> np.ndarray:
        """The table after this delta. Raises RemoteProtocolError, and changes nothing, for any but the next one."""
        spec, what = self.spec, f"the delta to {delta.version} of dictionary '{self.spec.name}'"
        _check(delta, spec)
        if delta.version.epoch != self.epoch:
            raise RemoteProtocolError(Fault.EPOCH, f"{what} is not of epoch {self.epoch}")
        if delta.previous != self.version:  # a gap, a replay, a second snapshot or a first delta that is none
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"{what} starts from {delta.previous}, here: {self.version}")
        table = _advance(self._table, delta, spec)
        if (digest := _digest(spec, delta.version, table)) != delta.digest:
            found = f"digest {digest.hex()} here, {delta.digest.hex()} there"
            raise RemoteProtocolError(Fault.PAYLOAD, f"{what} leads to another table: {found}")
        self.version, self.digest, self._table = delta.version, digest, table
        return table

    def check(self, version: Version, digest: bytes) -> None:
        """Raises RemoteProtocolError unless a tensor that was coded with this version can be decoded now."""
        what = f"a tensor coded with {version} of dictionary '{self.spec.name}'"
        if version != self.version:
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"{what}, here: {self.version}")
        if digest != self.digest:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{what}, digest {digest.hex()}, here: {self.digest.hex()}")


def _malformed(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(Fault.MALFORMED, reason)


def _encode_head(delta: Delta) -> bytes:
    previous, count = delta.previous and list(delta.previous), None if delta.indices is None else len(delta.indices)
    values = [delta.name, list(delta.version), previous, count, delta.encoding, delta.digest]
    return encode_header(f"dictionary {delta.name}", dict(zip(_FIELDS, values, strict=True)))


def _version(numbers: Any) -> Version:
    """Raises RemoteProtocolError unless these are the numbers of one."""
    ends = (2**64, STEP_MAX, MICROBATCH_MAX, MICROBATCH_MAX)
    if isinstance(numbers, list | Version) and len(numbers) == 4 and all(type(number) is int for number in numbers):
        version = Version(*numbers)
        if all(0 <= number < end for number, end in zip(version, ends, strict=True)):
            return version
    raise _malformed(f"{numbers!a:.80} is no version")


def _check_indices(indices: np.ndarray, spec: DictionarySpec) -> None:
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
        raise _malformed(f"entries of '{spec.name}' are {indices.dtype} {indices.shape}, not a few whole numbers")
    if not (np.all(indices[1:] > indices[:-1]) and indices[0] >= 0 and indices[-1] < spec.entries):
        raise _malformed(f"entries of '{spec.name}' are not ascending numbers below {spec.entries}")


def _check(delta: Delta, spec: DictionarySpec) -> None:
    """The rules that a delta of this dictionary obeys whatever came before it. Raises RemoteProtocolError."""
    if delta.name != spec.name:
        raise RemoteProtocolError(Fault.UNEXPECTED, f"a delta of dictionary {delta.name!a:.80}, not '{spec.name}'")
    if _version(delta.version) <= (delta.previous or ()):
        raise _malformed(f"a delta of '{spec.name}' from {delta.previous} to {delta.version}, which is not later")
    if delta.encoding != (wanted := spec.snapshot_encoding if delta.snapshot else spec.encoding):
        raise RemoteProtocolError(Fault.CONFIGURATION, f"a delta of '{spec.name}' in {delta.encoding}, not {wanted}")
    if delta.indices is not None:
        if delta.snapshot:
            raise _malformed(f"a snapshot of some entries of '{spec.name}'")
        _check_indices(delta.indices, spec)
    rows = spec.entries if delta.indices is None else len(delta.indices)
    if len(delta.payload) != spec.payload_bytes(rows, delta.encoding) or len(delta.digest) != DIGEST_BYTES:
        raise _malformed(f"a delta of '{spec.name}' with {len(delta.payload)} bytes for {rows} entries")


def _advance(table: np.ndarray | None, delta: Delta, spec: DictionarySpec) -> np.ndarray:
    """The table after a delta that has been checked: the one piece of arithmetic, run at both ends."""
    rows = slice(None) if delta.indices is None else delta.indices
    with np.errstate(all="ignore"):
        after = np.zeros((spec.entries, spec.width), spec.dtype) if table is None else table.copy()
        change = decode_rows(delta.payload, delta.encoding, after[rows].shape, spec.dtype, spec.name)
        after[rows] = change if table is None else after[rows] + change
    if not np.isfinite(after).all():
        raise RemoteProtocolError(Fault.PAYLOAD, f"dictionary '{spec.name}' would not be finite at {delta.version}")
    after.setflags(write=False)
    return after


def _digest(spec: DictionarySpec, version: Version, table: np.ndarray) -> bytes:
    head = msgpack.packb([spec.name, spec.entries, spec.width, spec.dtype, *version])
    digest = hashlib.blake2b(head or b"", digest_size=DIGEST_BYTES)
    digest.update(table.astype(table.dtype.newbyteorder("<"), copy=False).data)
    return digest.digest()
