"""The byte half of a codec: a tensor of one direction to bytes and back.

`pack` turns a wire tensor into bytes, `unpack` turns them back, and autograd passes straight through
(`compress.codec_interface` says why). Any format combines with any in-graph half.

Why a `Key` and not a random generator: what a message contains may depend on (seed, boundary, direction, step,
microbatch) and codec state, never on the order in which messages were packed; with a counter-based generator (Salmon et
al., SC'11, Philox) a resent, reordered or recomputed message has the same bits.
"""

from __future__ import annotations

import enum
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


class CodecError(ValueError):
    """A payload that cannot be what was agreed, a tensor that must not be sent, or a spec that names no codec."""


class Direction(enum.IntEnum):
    """FORWARD carries activations downstream, BACKWARD gradients upstream."""

    FORWARD = 0
    BACKWARD = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """All that a message's content may depend on beside the tensor and codec state."""

    seed: int
    boundary: int
    direction: Direction
    step: int
    microbatch: int

    def __post_init__(self) -> None:
        for name in ("seed", "boundary", "step", "microbatch"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"Key.{name} = {getattr(self, name)} is outside [0, 2**63)")

    def generator(self, stream: int = 0) -> np.random.Philox:
        """A counter-based generator that is this key's own; its raw stream is fixed for good (NumPy's NEP 19).

        The fields fill Philox's key and the upper words of its counter, so no two keys or streams ever overlap.
        `stream` separates independent uses under one key.
        """
        return np.random.Philox(
            key=np.array([self.seed, self.boundary << 1 | self.direction], dtype=np.uint64),
            counter=np.array([0, self.microbatch, self.step, stream], dtype=np.uint64),
        )

    def __str__(self) -> str:
        what = f"{self.direction.name} tensor of boundary {self.boundary}"
        return f"{what}, step {self.step}, microbatch {self.microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One packed tensor. `codec` is the byte format's id, `header` is msgpack-able (small ints, strings, lists)."""

    codec: str
    header: dict[str, Any]
    body: bytes | memoryview  # a view where it was received: of bytes, and not to be written


def is_finite(x: Tensor) -> bool:
    # two extremes, which propagate nan, in one pass: ten times faster than isfinite().all()
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


Policy = Literal["full", "random", "robin", "drift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedTable:
    """A table (entries, width) that the sender owns and the receiver needs: known to both from the configuration."""

    name: str
    entries: int
    width: int
    delta: str  # byte format of the changes that follow it downstream
    gradient: str | None  # byte format of the receiver's half of its gradient; None: it sends none
    every: int  # steps between two changes; 0: it never changes
    streamed: bool = False  # it follows what is coded; with every=1 each tensor of training brings a change
    policy: Policy = "full"  # how a change chooses its entries, as `protocol.dictionary_selection` calls it
    divisor: int = 1  # a change covers one part in so many
    delay: int = 0  # steps between a step of the table and the first one whose messages are coded with it


def check_layout(what: str, state: Mapping[str, Tensor], layout: Mapping[str, Tensor]) -> None:
    """Raises CodecError for tensors that are not finite, or not those of `layout` by name, shape and dtype. what: whose
    state."""
    if sorted(state) != sorted(layout):
        raise CodecError(f"the state of {what} is {list(layout)}, but was given {sorted(state)!r:.200}")
    for name, wanted in layout.items():
        found = state[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            shown = f"{list(found.shape)} {found.dtype}, wanted {list(wanted.shape)} {wanted.dtype}"
            raise CodecError(f"the state of {what}: '{name}' is {shown}")
        if not bool(found.isfinite().all()):
            raise CodecError(f"the state of {what}: '{name}' has a value that is not finite")


def without_table(what: object) -> CodecError:
    return CodecError(f"{type(what).__name__} has no learned table")


class ByteFormat(ABC):
    """The byte half: tensor <-> bytes. One instance serves one direction of one boundary (it may have state).

    Some formats code with a learned table, which the node that packs owns: `learn` moves `master`, the dictionary
    protocol ships changes of it, and both ends pack and unpack with what has been shipped (`use_table`). Packing leaves
    all state as it is, so whoever only packs (evaluation) learns nothing. The first `learn` has to come before the
    first `pack`, because no table can be shipped before it; later ones come after the `pack` of the same tensor.
    """

    id: str  # on the wire

    @abstractmethod
    def pack(self, z: Tensor, key: Key) -> Payload:
        """Bytes of a tensor of any floating dtype, on any device; `z` is not changed and its graph not followed.

        Raises CodecError for a value that is not finite, or not finite in this format, naming it and `key`.
        """

    @abstractmethod
    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        """The tensor that was packed, up to rounding; its memory is its own. `shape` and `dtype` are what the LOCAL
        configuration expects: all sizes are checked against them before anything is allocated. `key` is the one that
        it was packed with, which both ends know; formats that draw something for both of them need it.

        Raises CodecError for another format's payload, another shape, a wrong length, or a scale or value out of range.
        """

    @abstractmethod
    def body_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact length of `Payload.body` for a tensor of this shape."""

    def table(self, width: int) -> LearnedTable | None:
        """The learned table, if any, for tensors (..., width). Raises CodecError for a width that cannot be packed."""
        del width
        return None

    @property
    def remembers(self) -> bool:
        """Whether `pack_training` depends on what it packed before. Of formats without a table."""
        return False

    def pack_training(self, z: Tensor, key: Key) -> Payload:
        """As `pack`, of the next tensor of training in a format without a table; state moves here and nowhere else."""
        return self.pack(z, key)

    @property
    def has_started(self) -> bool:
        """Whether there is a master: something was learned from."""
        return False

    @property
    def master(self) -> Tensor:
        """The table as it has been learned (entries, width): float32, on the CPU, another tensor after each `learn`.

        Raises CodecError before the first `learn`, and, as the next three do, in a format without a table.
        """
        raise without_table(self)

    @property
    def usage(self) -> Tensor:
        """How much each entry of the master is used (entries,), at least 0: what `drift` weighs its distance with."""
        raise without_table(self)

    def use_table(self, table: Tensor) -> None:
        """From now on pack and unpack with `table` (entries, width), which nobody changes any more."""
        del table
        raise without_table(self)

    def learn(self, z: Tensor, key: Key) -> None:
        """Move `master` towards what `z` (..., width) needs: a function of state, table in use, `z` and `key`."""
        del z, key
        raise without_table(self)

    def has_table_of(self, other: ByteFormat, width: int) -> bool:
        """Whether what `other` learned from tensors (..., width) is a table for this format too."""
        del other, width
        return False

    def for_tensors_of(self, state: Mapping[str, Tensor], times: float) -> dict[str, Tensor]:
        """`state_tensors` of such a format, as they are where a tensor has so many times as many tokens; the master is
        the same."""
        del times
        return dict(state)

    def measures(self) -> dict[str, float]:
        """Figures of what was learned from since the last call, for the records."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Named tensors that the packing node's checkpoint has to hold; a format without state has none."""
        return {}

    def state_layout(self, shape: tuple[int, ...], completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps with tensors of `shape`: names, shapes and dtypes as meta
        tensors."""
        del shape, completed
        return {}

    def check_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Raises CodecError for what `state_tensors` cannot have returned; changes nothing."""
        if state:
            raise CodecError(f"format '{self.id}' has no state, but was given {reprlib.repr(sorted(state))}")

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises CodecError, and changes nothing, for tensors that this format
        does not have."""
        self.check_state_tensors(state)

    def needed(self, key: Key | None) -> Key:
        """`key`, in a format that cannot unpack without one. Raises CodecError if it was not given."""
        if key is None:
            raise CodecError(f"format '{self.id}' draws from the tensor's key at both ends; unpack it with `key`")
        return key

    def check(self, payload: Payload, shape: tuple[int, ...]) -> None:
        """Refuse, before anything is allocated, a payload that is not this format's or not of this shape."""
        if payload.codec != self.id:
            raise CodecError(f"payload has format {reprlib.repr(payload.codec)}, agreed was '{self.id}'")
        header: Any = payload.header
        if not isinstance(header, dict) or "shape" not in header:
            raise CodecError(f"{self.id} payload's header has no shape: {reprlib.repr(header)}")
        if header["shape"] != list(shape):
            raise CodecError(
                f"{self.id} payload has shape {reprlib.repr(header['shape'])}, expected {list(shape)}; "
                "both nodes must run the same configuration"
            )
        body: Any = payload.body
        if not isinstance(body, bytes) and not (isinstance(body, memoryview) and body.format == "B"):
            raise CodecError(f"{self.id} payload's body is {type(body).__name__}, not bytes")
        if len(body) != self.body_bytes(shape):
            raise CodecError(
                f"{self.id} payload has {len(body)} bytes, expected {self.body_bytes(shape)} for shape {list(shape)}"
            )
