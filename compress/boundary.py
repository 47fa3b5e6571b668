"""What a codec is: an in-graph half and a byte half.

A codec compresses what crosses one pipeline boundary. Its *in-graph half* is what autograd sees: `Encoder.encode` at
the upstream stage maps hidden states (B, T, D) to a narrower wire tensor (B, T, W), `Decoder.decode` at the downstream
stage maps it back; whatever is learned by gradient lives there. Its *byte half* is a `ByteFormat`: `pack` turns a wire
tensor into bytes, `unpack` turns them back, and autograd passes straight through, because the receiver differentiates
with respect to what it unpacked and sends that gradient back, packed, as dL/dZ (Bengio et al., arXiv 1308.3432).
Protocol NanoGPT splits its codecs the same way.

Why two objects and not one module that compresses: the halves of a boundary live on different machines and share
nothing but bytes, the two directions are packed independently, and any projection combines with any format.

Why a `Key` and not a random generator: what a message contains may depend on (seed, boundary, direction, step,
microbatch) and codec state, never on the order in which messages were packed; with a counter-based generator (Salmon et
al., SC'11, Philox) a resent, reordered or recomputed message has the same bits.
"""

from __future__ import annotations

import enum
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .recommended import Recommended, recommended_for
from .stage_parts import StageParts


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
    body: bytes


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
    streamed: bool = False  # instead, each tensor of training brings a change
    policy: Policy = "full"  # how a change chooses its entries, as `protocol.dictionary_selection` calls it
    divisor: int = 1  # a change covers one part in so many


def _without_table(what: object) -> CodecError:
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
        raise _without_table(self)

    @property
    def usage(self) -> Tensor:
        """How much each entry of the master is used (entries,), at least 0: what `drift` weighs its distance with."""
        raise _without_table(self)

    def use_table(self, table: Tensor) -> None:
        """From now on pack and unpack with `table` (entries, width), which nobody changes any more."""
        del table
        raise _without_table(self)

    def learn(self, z: Tensor, key: Key) -> None:
        """Move `master` towards what `z` (..., width) needs: a function of state, table in use, `z` and `key`."""
        del z, key
        raise _without_table(self)

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
        if not isinstance(body, bytes):
            raise CodecError(f"{self.id} payload's body is {type(body).__name__}, not bytes")
        if len(body) != self.body_bytes(shape):
            raise CodecError(
                f"{self.id} payload has {len(body)} bytes, expected {self.body_bytes(shape)} for shape {list(shape)}"
            )


class BoundaryModule(nn.Module, ABC):
    """What both halves of a boundary have: a table that may be there, and a state that may be empty.

    Parameters of a half are moved by its stage's own optimizer, matrices under the name `layers` by Muon, and are in
    the stage's digest and checkpoint; nothing of them crosses the wire.
    """

    def use_table(self, table: Tensor) -> None:
        """From now on work with `table`. Raises CodecError in a half without one."""
        del table
        raise _without_table(self)

    def state_tensors(self) -> dict[str, Tensor]:
        """What is learned or gathered here and no optimizer of the stage holds."""
        return {}

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """What `state_tensors` has after `completed` steps: names, with shapes and dtypes as meta tensors."""
        del completed
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor], table: Tensor | None) -> None:
        """Go on from `state_tensors`, which fit `state_layout`, and the table in use then, which this half takes over
        (None: there was none yet). A step that was broken off leaves nothing behind."""
        if state or table is not None:
            raise _without_table(self)


class Encoder(BoundaryModule):
    """The in-graph half at the upstream stage.

    A half with a learned table codes with what the receiver holds (`use_table`), never with what it has learned since
    (`master`), so that both ends compute with the same bits whatever is under way.
    """

    @abstractmethod
    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) and their token ids (B, T), int64, to the wire tensor (B, T, W)."""

    @property
    def master(self) -> Tensor:
        """The learned table as it is now (entries, width). Raises CodecError in a half that has none, as the next two
        methods do: `Codec.table` says beforehand whether there is one."""
        raise _without_table(self)

    def learn(self, gradient: Tensor | None, *, rate: float) -> None:
        """One step of the table with the gradient gathered here and the receiver's half. `rate`: of matrices, now."""
        del gradient, rate
        raise _without_table(self)

    def measures(self) -> dict[str, float]:
        """Figures of the steps since the last call, for the records."""
        return {}


class Decoder(BoundaryModule):
    """The in-graph half at the downstream stage."""

    @abstractmethod
    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        """The wire tensor (B, T, W) and the token ids (B, T), int64, to hidden states (B, T, D)."""

    def take_gradient(self) -> Tensor:
        """This half's part of the table's gradient (entries, width), gathered since the last call."""
        raise _without_table(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage's own part of a codec may know when it is built."""

    seed: int
    stage: int
    width: int  # D, of the hidden states
    vocab_size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryContext:
    """What a half may know when it is built. All but `tokens` is equal at both ends."""

    seed: int
    boundary: int  # 0-based: boundary b lies between stages b and b + 1
    width: int  # D, of the hidden states
    vocab_size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    tokens: nn.Module | None = None  # what this stage's codec knows of its tokens (`Codec.tokens`), for both its halves


class Codec(ABC):
    """A method: builds the two in-graph halves and says which byte formats suit them. Holds options, never state."""

    name: str
    default_forward: str  # spec of the byte format of activations
    default_backward: str  # and of gradients
    table_scale: float = 0.0  # of the frozen token table that is a part of stage 0's embedding; 0: there is none
    constrains: bool = False  # it changes the stage's model, so that what crosses a boundary fits it

    @property
    def recommended(self) -> Recommended:
        """Optimizer settings that suit this codec, by name, for whoever has not set them."""
        return recommended_for(self.name)

    def check(self, width: int) -> None:
        """Raises CodecError for options that do not fit hidden states of `width`, before anything is built."""
        del width

    def check_rate(self, muon_lr: float) -> None:
        """Raises CodecError for options that cannot learn at this rate of matrices, before anything is built."""
        del muon_lr

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises CodecError for options that do not fit stages of so many layers each."""
        del layers

    def frozen(self, context: StageContext) -> Tensor | None:
        """What all stages generate alike, beside the token table; its digest is compared in greetings."""
        del context
        return None

    def constrain(self, parts: StageParts, context: StageContext) -> None:
        """Replace modules of a stage's model, which has its weights, before its optimizer is made. Raises CodecError
        for a model where that cannot be done."""
        del parts, context

    def lost(self, hidden_BTD: Tensor, known_BTD: Tensor | None, context: StageContext) -> float:
        """What of hidden states at a boundary cannot cross, relative, root of energies: what `constrain` promises to be
        nothing but rounding. `known_BTD`: what both ends know of the tokens."""
        del hidden_BTD, known_BTD, context
        return 0.0

    def shrunk(self, width: int) -> Codec:
        """The same method for a small copy of the model, of this width."""
        del width
        return self

    @abstractmethod
    def wire_width(self, width: int) -> int:
        """W, the numbers per token that cross the boundary, for hidden states of `width`."""

    def table(self, width: int) -> LearnedTable | None:
        """The table that the sender owns and the receiver needs, if any."""
        del width
        return None

    def tokens(self, context: StageContext, table_VD: Tensor | None) -> nn.Module | None:
        """What one stage knows of its tokens, shared by its halves at both its boundaries. Parameters in it that want a
        gradient are trained by the stage's optimizer. `table_VD`: the token table, if `table_scale` is not 0."""
        del context, table_VD
        return None

    @abstractmethod
    def encoder(self, context: BoundaryContext) -> Encoder:
        """The upstream half. A node builds only its own side; nothing is shared with the other."""

    @abstractmethod
    def decoder(self, context: BoundaryContext) -> Decoder:
        """The downstream half."""


def check_table_scale(codec: str, scale: float) -> None:
    """Raises CodecError for a token table that no model could use (`anchors.token_table` takes what passes)."""
    if scale and not 1e-30 <= scale <= 1e30:
        raise CodecError(f"codec '{codec}': table={scale:g} has to be 0 (no token table) or from 1e-30 to 1e30")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryCodec:
    """One boundary's codec and its two byte formats. Call `parse_codec` once per boundary: formats may have state."""

    codec: Codec
    forward: ByteFormat
    backward: ByteFormat

    def format(self, direction: Direction) -> ByteFormat:
        return self.forward if direction is Direction.FORWARD else self.backward
