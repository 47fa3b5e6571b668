"""What a codec is: an in-graph half and a byte half.

A codec compresses what crosses one pipeline boundary. Its *in-graph half* is what autograd sees: `Encoder.encode` at
the upstream stage maps hidden states (B, T, D) to a narrower wire tensor (B, T, W), `Decoder.decode` at the downstream
stage maps it back; whatever is learned by gradient lives there. Its *byte half* is a `ByteFormat`: `pack` turns a wire
tensor into bytes, `unpack` turns them back, and autograd passes straight through, because the receiver differentiates
with respect to what it unpacked and sends that gradient back, packed, as dL/dZ (Bengio et al., arXiv 1308.3432).
Protocol NanoGPT splits its codecs the same way.

Why two objects and not one module that compresses: the halves of a boundary live on different machines and share
nothing but bytes, the two directions are packed independently, and any projection combines with any format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .boundary_function import BoundaryFunction
from .byte_format import ByteFormat, CodecError, Direction, LearnedTable, without_table
from .recommended_rates import Recommended, recommended_for
from .stage_parts import StageParts


class BoundaryModule(nn.Module, ABC):
    """What both halves of a boundary have: a table that may be there, and a state that may be empty.

    Parameters of a half are moved by its stage's own optimizer, matrices under the name `layers` by Muon, and are in
    the stage's digest and checkpoint; nothing of them crosses the wire.
    """

    def use_table(self, table: Tensor) -> None:
        """From now on work with `table`. Raises CodecError in a half without one."""
        del table
        raise without_table(self)

    def end_step(self) -> None:
        """All backwards of a step are done, and none of the next one, whose forwards may have begun."""

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
            raise without_table(self)


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
        """The learned table as it is now (entries, width). Raises CodecError in a half that has none, as the next
        three methods do: `Codec.table` says beforehand whether there is one."""
        raise without_table(self)

    def take_gradient(self, received: Tensor | None) -> Tensor:
        """The whole gradient of the table (entries, width): this half's part, gathered since the last call, and what
        was `received` of the other's."""
        del received
        raise without_table(self)

    def learn(self, gradient: Tensor, *, rate: float) -> None:
        """One step of the table with its whole gradient. `rate`: of matrices, now."""
        del gradient, rate
        raise without_table(self)

    def averaged(self) -> None:
        """The master was changed from outside, as the mean of several: bring it back to where it may be."""
        raise without_table(self)

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
        raise without_table(self)


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
    looks_back: int = 0  # tokens before its own that what is known of a token depends on
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

    def last_layers(self, width: int) -> int:
        """Layers that the last stage wants at least, unless the user says otherwise. Behind a narrow boundary one:
        without it, logits are read from what has just crossed, and a head cannot make up for what is missing there."""
        return 1 if self.wire_width(width) < width else 0

    def frozen(self, context: StageContext) -> Tensor | None:
        """What all stages generate alike, beside the token table; its digest is compared in greetings."""
        del context
        return None

    def constrain(self, parts: StageParts, context: StageContext) -> None:
        """Replace modules of a stage's model, which has its weights, before its optimizer is made. Raises CodecError
        for a model where that cannot be done."""
        del parts, context

    def unconstrained(self, weights: dict[str, Tensor], context: StageContext) -> dict[str, Tensor]:
        """What `constrain` has changed of a whole model's weights, changed back: ordinary modules that compute the same
        up to rounding, by their names. `weights` stays as it is."""
        del context
        return dict(weights)

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

    def operations_per_token(self, width: int) -> float:
        """Multiplications and additions of a forward pass, a token, at one end of a boundary: what a stage's compute is
        estimated from. A projection's, unless the method says otherwise."""
        narrow = self.wire_width(width)
        return 2.0 * width * narrow if narrow < width else 0.0

    def table(self, width: int) -> LearnedTable | None:
        """The table that the sender owns and the receiver needs, if any."""
        del width
        return None

    def boundary_function(
        self, *, table: Tensor | None, sender: Mapping[str, Tensor], receiver: Mapping[str, Tensor]
    ) -> BoundaryFunction | None:
        """What a boundary computes, without what its bytes round away; None where hidden states come out as they went
        in. `table`: the learned one, if any; the parameters of the two halves by name. Raises CodecError for a codec
        that nobody can compute without this package."""
        del table, sender, receiver
        raise CodecError(f"codec '{self.name}' cannot be exported: it does not say what its boundaries compute")

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
