"""Dictionaries that a decoder needs (projectors, codebooks), kept bit-identical at both ends by versioned deltas.

A dictionary is a table of `entries x width` numbers with one owner. Its Publisher keeps `shipped`, bit-exactly what the
peer's Replica holds once every delta so far has arrived; the owner codes tensors with `shipped`, never with the master
that it trains, so that both ends agree whatever is in flight. The first delta is a snapshot at full precision. Later
ones code `master - shipped` of the chosen entries coarsely, and the *decoded* values are added to `shipped` by the
function that the replica runs: what rounding left out is part of the next delta. This is closed-loop prediction,
x' = x + Q(master - x), as in CHOCO (arXiv 1902.00340) and EF21 (arXiv 2106.05203).

Why not the whole table each time: at full precision it is 4 to 8 times the bytes, and rounded it never gets closer than
one rounding (a bf16 cast of a projector leaves it 2.4e-3 off orthogonal). Why not the difference of successive masters:
each one adds a rounding error that nothing takes away again, and the ends drift apart like a random walk.

`delta` encodes a delta as bytes. With each one the
distance to a constant master shrinks to 2^-24 (fp32), 2^-8 (bf16), 1/254 or 1/14 of it, down to its last bit.

The digest covers the version and the *whole resulting table*, not the deltas that led there: those would not show an
end that adds differently or restored another table, and a table alone (a checkpoint, a snapshot) could not be verified.
It costs a pass of 0.7 ms a MB. Damage to a delta that still leads to the same table does no harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np

from .dictionary_delta import DIGEST_BYTES, Delta, DictionarySpec, Version, as_version, check_delta, check_indices
from .errors import Fault, LocalProtocolError, RemoteProtocolError
from .rows import decode_rows, encode_rows


class _Table:
    """A table at a version: what Publisher and Replica have in common."""

    def __init__(self, spec: DictionarySpec, generation: int) -> None:
        self.spec, self.generation = spec, generation
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
            version = None if state["version"] is None else as_version(list(state["version"]))
        except (KeyError, TypeError, ValueError, RemoteProtocolError) as error:
            raise LocalProtocolError(Fault.RESUME, f"{what} is damaged: {error!r}") from None
        shape = (spec.entries if version else 0, spec.width)
        if (table.shape, table.dtype) != (shape, np.dtype(spec.dtype)):
            raise LocalProtocolError(Fault.RESUME, f"{what} is {table.shape} {table.dtype}, not {shape} {spec.dtype}")
        if digest != (_digest(spec, version, table) if version else b""):
            raise LocalProtocolError(Fault.RESUME, f"{what} does not match its digest")
        if version and version.generation > self.generation:
            raise LocalProtocolError(
                Fault.GENERATION, f"{what} is of generation {version.generation}, later than {self.generation} here"
            )
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
        version = Version(self.generation, step, microbatch, 0)
        if old and old[:3] == version[:3]:
            version = old._replace(index=old.index + 1)
        encoding, indices = spec.encoding if old else spec.snapshot_encoding, None
        with np.errstate(all="ignore"):
            drift = master - self._table if old else master
        try:
            if entries is not None and old:
                check_indices(entries, spec)
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
            check_delta(delta, spec)
            table = _advance(self._table, delta, spec)
        except RemoteProtocolError as error:  # the replica's rules, broken here
            raise LocalProtocolError(error.fault, error.reason) from None
        self.version, self.digest, self._table = version, _digest(spec, version, table), table
        return replace(delta, digest=self.digest)


class Replica(_Table):
    """The peer's end: the table as of the last delta."""

    def after(self, delta: Delta) -> np.ndarray:
        """What the table would be after this delta; changes nothing. Raises RemoteProtocolError for any but the next
        one."""
        spec, what = self.spec, f"the delta to {delta.version} of dictionary '{self.spec.name}'"
        check_delta(delta, spec)
        if delta.version.generation != self.generation:
            raise RemoteProtocolError(Fault.GENERATION, f"{what} is not of generation {self.generation}")
        if delta.previous != self.version:  # a gap, a replay, a second snapshot or a first delta that is none
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"{what} starts from {delta.previous}, here: {self.version}")
        table = _advance(self._table, delta, spec)
        if (digest := _digest(spec, delta.version, table)) != delta.digest:
            found = f"digest {digest.hex()} here, {delta.digest.hex()} there"
            raise RemoteProtocolError(Fault.PAYLOAD, f"{what} leads to another table: {found}")
        return table

    def adopt(self, delta: Delta, table: np.ndarray) -> None:
        """Hold `table` from now on, which is `after(delta)` of this replica as it is: where one message changes several
        dictionaries, all of them are looked at before one is changed."""
        self.version, self.digest, self._table = delta.version, delta.digest, table

    def apply(self, delta: Delta) -> np.ndarray:
        """The table after this delta. Raises RemoteProtocolError, and changes nothing, for any but the next one."""
        table = self.after(delta)
        self.adopt(delta, table)
        return table

    def check(self, version: Version, digest: bytes) -> None:
        """Raises RemoteProtocolError unless a tensor that was coded with this version can be decoded now."""
        what = f"a tensor coded with {version} of dictionary '{self.spec.name}'"
        if version != self.version:
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"{what}, here: {self.version}")
        if digest != self.digest:
            raise RemoteProtocolError(Fault.PAYLOAD, f"{what}, digest {digest.hex()}, here: {self.digest.hex()}")


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
