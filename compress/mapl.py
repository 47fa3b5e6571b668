"""MAPL: each boundary learns its own orthogonal projection while the model trains (arXiv 2606.05484).

    sender    Z = (H - a[t]) A          A in St(D, R): the columns are orthonormal, AᵀA = I
    receiver  Ĥ = Ẑ Aᵀ + a'[t]          a, a': what each stage knows of a token by itself (`compress.anchors`)

R numbers a token cross the boundary, in either direction. What depends on the token alone need not cross: the sender
takes its anchors off, the receiver puts its own on, and no anchor is ever sent. With `pairs`, neither does what depends
on the token and the one before it; that is ours, not the paper's.

The gradient of A has two halves, X̃ᵀ dZ with X̃ = H - a[t] at the sender and Gᵀ Ẑ with G = dL/dĤ at the receiver. The
receiver sends its half once a step; autograd gives each its own, because each holds A as a leaf of its own graph. With
both halves and no rounding Aᵀg is symmetric, so what moves is the subspace; the sender's half alone adds a rotation
that means nothing and loses half of the signal. The sender owns A, steps it on the manifold (SPEL, `compress.stiefel`)
and codes with what the receiver holds; how the change travels is not known here (`node.boundary.learned_tables`).

Why not a fixed subspace (Subspace Networks, arXiv 2506.01260): the same bytes, and the model must be constrained to
stay in it. Why not a free matrix: without the manifold, encoder and decoder drift apart in scale and the published loss
is worse; `projector=free` is here to measure that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .anchor_options import AnchorOptions
from .anchors import Anchors, Kind
from .boundary_function import BoundaryFunction, Half
from .byte_format import CodecError, LearnedTable
from .codec_interface import BoundaryContext, Codec, Decoder, Encoder, StageContext, check_table_scale
from .energy_survey import EnergySurvey
from .registry import register_codec
from .stiefel import (
    SPEL,
    Constraint,
    longest_step,
    orthonormality_error,
    random_orthonormal,
    retract,
    subspace_angle,
)
from .table_leaves import TableLeaves

Projector = Literal["spel", "grassmann", "free", "fixed"]
Start = Literal["own", "shared"]
# int4 changes would leave the shipped projector 5e-4 off orthonormal at the usual rates, int8 ones 4e-5.
DeltaFormat = Literal["fp64", "fp32", "bf16", "int8"]
CONSTRAINTS: dict[Projector, Constraint] = {"spel": "stiefel", "grassmann": "grassmann", "free": "none"}
BITS_A_NUMBER, USUAL_BITS = 3, 96  # of r=auto: about what the best recipes have (docs/results.md)
_STEPS_BACK = 6  # of the retraction, from further off than a step of SPEL goes: from 0.5 to rounding
_STREAM = 0x4D41504C  # "MAPL": keeps the first projector's draws apart from every other use of the seed


class MaplEncoder(Encoder):
    """Owns the projector: `master` (D, R) is learned, `shipped` is what the receiver holds and what codes."""

    def __init__(
        self,
        context: BoundaryContext,
        *,
        rank: int,
        projector: Projector,
        start: Start,
        every: int,
        rate: float,
        beta: float,
    ) -> None:
        super().__init__()
        place = 0 if start == "shared" else context.boundary
        generator = np.random.Generator(
            np.random.Philox(key=np.array([context.seed, place << 32 | _STREAM], dtype=np.uint64))
        )
        first = random_orthonormal(context.width, rank, generator, dtype=context.dtype)
        self._first = first.clone()
        self._master = first.to(context.device).requires_grad_(projector in CONSTRAINTS)
        self._leaves = TableLeaves(learned=projector in CONSTRAINTS)
        self._leaves.use(self._master.detach().clone())
        self._on_manifold = projector in ("spel", "grassmann")
        self._tokens = context.tokens
        self._boundary = context.boundary
        self._every = every
        self._rate = rate
        self._spel: SPEL | None = None
        self._survey = EnergySurvey()
        if projector in CONSTRAINTS:
            kind, dtype = CONSTRAINTS[projector], context.dtype
            self._spel = SPEL([self._master], lr=rate, beta=beta, constraint=kind, msign_dtype=dtype)
        self._moved = 0.0
        self._energy = torch.zeros(2, dtype=torch.float64, device=context.device)  # of what was projected, and kept

    @property
    def master(self) -> Tensor:
        return self._master.detach()

    @property
    def shipped(self) -> Tensor:
        """The projector in use (D, R)."""
        assert self._leaves.table is not None
        return self._leaves.table

    def use_table(self, table: Tensor) -> None:
        self._leaves.use(table)

    def end_step(self) -> None:
        self._leaves.end_step()

    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        x_BTD = hidden_BTD if own_BTD is None else hidden_BTD - own_BTD
        z_BTR = x_BTD @ self.shipped
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._energy += torch.stack([x_BTD.square().sum(), z_BTR.square().sum()]).to(torch.float64)
                self._survey.see(x_BTD)
        return z_BTR

    def take_gradient(self, received: Tensor | None) -> Tensor:
        own = self._leaves.take()
        if own is None:
            raise CodecError("the projector is stepped before anything was encoded with it")
        return own if received is None else own + received

    @torch.no_grad()
    def averaged(self) -> None:
        if self._on_manifold:
            try:
                self._master.copy_(retract(self._master, _STEPS_BACK))
            except ValueError as error:
                raise CodecError(
                    f"the projectors of boundary {self._boundary} have gone too far apart to be averaged ({error}); "
                    "average more often"
                ) from None

    def learn(self, gradient: Tensor, *, rate: float) -> None:
        if self._spel is None:
            return
        before = self._master.detach().clone()
        self._master.grad = gradient
        self._spel.param_groups[0]["lr"] = self._rate * rate * self._every
        try:
            self._spel.step()
        except ValueError as error:
            raise CodecError(f"the projector of boundary {self._boundary} cannot be stepped: {error}") from None
        self._master.grad = None
        self._moved += subspace_angle(before, self._master)

    def measures(self) -> dict[str, float]:
        """Orthonormality errors, angle moved (radians, root mean square over principal angles), the share of what
        was to be projected that the projection lost (relative error, root of energies), and how far what is in use
        stands from the master, relative to it."""
        whole, kept = self._energy.tolist()
        self._energy.zero_()
        moved, self._moved = self._moved, 0.0
        figures = {
            "orthonormality_error_master": orthonormality_error(self.master),
            "orthonormality_error_shipped": orthonormality_error(self.shipped),
            "angle_moved_rad": moved,
            "angle_turned_rad": subspace_angle(self._first.to(self._master.device), self.master),
            **self._survey.shares(self.shipped),
            "reconstruction_error": math.sqrt(max(0.0, 1 - kept / whole)) if whole else 0.0,
            "staleness": ((self.master - self.shipped.detach()).norm() / self.master.norm()).item(),
        }
        if isinstance(self._tokens, Anchors):
            figures["anchor_norm"] = self._tokens.norm()
        return figures

    def state_tensors(self) -> dict[str, Tensor]:
        """The master, its momentum, and what was gathered since its last step; what was shipped is the dictionary's."""
        tensors = {"master": self.master}
        if (gathered := self._leaves.gathered) is not None:
            tensors["gathered"] = gathered
        if self._spel is not None and self._master in self._spel.state:
            tensors["momentum"] = self._spel.state[self._master]["momentum"]
        return tensors

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        layout = {"master": self.master.to("meta")}
        if self._spel is not None and completed % self._every:
            layout["gathered"] = layout["master"]
        if self._spel is not None and completed >= self._every:
            layout["momentum"] = layout["master"]
        return layout

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor], table: Tensor | None) -> None:
        self._master.copy_(state["master"])
        self._master.grad = None
        if self._spel is not None:
            self._spel.state.pop(self._master, None)  # before its first step, SPEL has no momentum and not zeros
            if "momentum" in state:
                self._spel.state[self._master]["momentum"] = _copy(state["momentum"], self._master)
        gathered = _copy(state["gathered"], self._master) if "gathered" in state else None
        self._leaves.go_on(self.master.clone() if table is None else table, gathered)
        self._moved = 0.0
        self._energy.zero_()


class MaplDecoder(Decoder):
    """Knows of the projector only what arrived."""

    def __init__(self, context: BoundaryContext, *, rank: int, every: int, learned: bool) -> None:
        super().__init__()
        self._tokens = context.tokens
        self._shape, self._dtype = (context.width, rank), context.dtype
        self._every, self._learned = every, learned
        self._leaves = TableLeaves(learned=learned)

    def use_table(self, table: Tensor) -> None:
        self._leaves.use(table)

    def end_step(self) -> None:
        self._leaves.end_step()

    @property
    def table(self) -> Tensor | None:
        """The projector in use (D, R)."""
        return self._leaves.table

    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        if self.table is None:
            raise CodecError("a tensor came before the projector that it was coded with")
        hidden_BTD = z_BTW @ self.table.mT
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        return hidden_BTD if own_BTD is None else hidden_BTD + own_BTD

    def take_gradient(self) -> Tensor:
        gradient = self._leaves.take()
        if gradient is None:
            raise CodecError("the projector's gradient is due before anything was decoded with it")
        return gradient

    def state_tensors(self) -> dict[str, Tensor]:
        """What was gathered since the last gradient was sent; the table itself is the dictionary's."""
        gathered = self._leaves.gathered
        return {} if gathered is None else {"gathered": gathered}

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        if not self._learned or not completed % self._every:
            return {}
        return {"gathered": torch.empty(self._shape, dtype=self._dtype, device="meta")}

    def load_state_tensors(self, state: Mapping[str, Tensor], table: Tensor | None) -> None:
        gathered = None
        if table is not None and "gathered" in state:
            gathered = _copy(state["gathered"], table)
        self._leaves.go_on(table, gathered)


def _rounded_down(value: float) -> str:
    """Three digits, and never above."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.floor(value / unit) * unit:.3g}"


def _copy(value: Tensor, like: Tensor) -> Tensor:
    """A tensor of its own, laid out as if it had been computed here: a file's are views at any address."""
    return torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False).copy_(value)


@register_codec
class MaplCodec(Codec):
    """`--codec mapl:r=64,anchors=factorized,ar=64,table=1.0,every=1`; plain `mapl` is the best recipe found.

    That is: an eighth of the width of `tiny` (at other widths give r), full anchors that know the context, no token
    table (which they make up for), a projector that moves every 16th step, and codebooks both ways, 3 bits a number
    and half a byte for its scale; gradients rotated at random before that (docs/results.md).

    r: rank, the numbers a token on the wire. `auto`: what a budget affords. The projection keeps a coordinate for
        every 3 bits of `bits`, and each direction of each boundary gives those that
        matter more bits and those that do not fewer, or none (`compress.transform`). A wider one at the same bits
        trains worse (docs/results.md).
    bits: with `r=auto`, of a token, in each direction at each boundary, beside its scale of half a byte; `auto`: 96.
    anchors, ar: kind and rank of a stage's anchors (ar=0: as r).
    pairs: rows that they also learn for hashes of a token and the one before it, up to 2^24; 0 for none.
    context, ce, ch: how many of the last tokens a small network beside the anchors looks at (0: there is none), with ce
        numbers for each and ch hidden units.
    table: scale of the frozen token table that every node generates; 0 for none.
    projector: `spel` on the Stiefel manifold, `grassmann` along it without rotations, `free` without it, `fixed`.
    start: the first projector is drawn for each boundary (`own`), or is the same at all of them (`shared`), so that
        what one boundary has carried passes the next one as it is.
    every: steps between two changes of the projector, its gradient gathered meanwhile.
    lr, beta: how far a direction moves in a step, in parts of the rate of matrices, so `every` times as far in a
        change; momentum.
    delta, gradient: byte formats of the changes, and of the receiver's half of the gradient (`none`: the sender's half
        alone).
    """

    name = "mapl"
    default_forward = "rvq:levels=3,scale=log4,delta=drift/64"
    default_backward = f"{default_forward},hadamard=true"

    def __init__(
        self,
        r: int | Literal["auto"] = 32,
        bits: int | Literal["auto"] = "auto",
        anchors: Kind = "full",
        ar: int = 0,
        pairs: int = 0,
        context: int = 4,
        ce: int = 32,
        ch: int = 128,
        table: float = 0.0,
        projector: Projector = "spel",
        start: Start = "own",
        every: int = 16,
        delta: DeltaFormat = "int8",
        gradient: Literal["fp64", "fp32", "bf16", "int8", "int4", "none"] = "int8",
        lr: float = 0.1,
        beta: float = 0.9,
    ) -> None:
        for fault, bad, wanted in (
            (f"r={r}", r != "auto" and r < 1, "at least 1"),
            (f"bits={bits}", bits != "auto" and bits < 1, "at least 1"),
            (f"bits={bits}", bits != "auto" and r != "auto", "left out; it is for r=auto"),
            (f"every={every}", every < 1, "at least 1"),
            (f"lr={lr:g}", lr <= 0, "above 0; projector=fixed learns nothing"),
            (f"beta={beta:g}", not 0 <= beta < 1, "at least 0 and below 1"),
        ):
            if bad:
                raise CodecError(f"codec 'mapl': {fault} has to be {wanted}")
        self._affords = "bits" if r == "auto" else "r"  # what to lower where the rank is too large
        if r == "auto":
            budget = USUAL_BITS if bits == "auto" else bits
            r = -(-budget // BITS_A_NUMBER)
            self.default_forward = self.default_backward = f"transform:bits={budget}"
        self._rank = r
        self.known = AnchorOptions(
            anchors=anchors,
            rank=ar or self._rank,
            pairs=pairs,
            context=context,
            context_embedding=ce,
            context_hidden=ch,
        )
        self.looks_back = self.known.looks_back
        self.known.check(self.name)
        check_table_scale(self.name, table)
        self.projector: Projector = projector
        self.start: Start = start
        self.table_scale, self.every = table, every
        self.delta, self.gradient = delta, gradient
        self.rate, self.beta = lr, beta

    def check(self, width: int) -> None:
        rank, lower = self._rank, self._affords
        if rank > width:
            raise CodecError(f"codec 'mapl': r={rank} is above the model's width {width}; lower {lower}")
        if self.projector == "grassmann" and rank == width:
            raise CodecError(f"codec 'mapl': r={rank} is the whole width, which no subspace can move in; lower {lower}")
        self.known.check_width(self.name, width)

    def check_rate(self, muon_lr: float) -> None:
        if self.projector not in ("spel", "grassmann"):
            return
        moves, most = self.rate * self.every * muon_lr, longest_step(self._rank)
        if moves > most:
            raise CodecError(
                f"codec 'mapl': lr={self.rate:g} moves the projector by {moves:.3g} in a change (every={self.every}, "
                f"optim.muon_lr={muon_lr:g}), and {most:.3g} is the most that it surely comes back to the manifold "
                f"from; say lr={_rounded_down(most / self.every / muon_lr)} or less"
            )

    def wire_width(self, width: int) -> int:
        del width
        return self._rank

    def operations_per_token(self, width: int) -> float:
        return super().operations_per_token(width) + self.known.operations_per_token(width)

    def table(self, width: int) -> LearnedTable:
        fixed, by_loss = self.projector == "fixed", self.projector in CONSTRAINTS
        return LearnedTable(
            name="projector",
            entries=width,
            width=self._rank,
            delta=self.delta,
            gradient=self.gradient if by_loss and self.gradient != "none" else None,
            every=0 if fixed else self.every,
        )

    def boundary_function(
        self, *, table: Tensor | None, sender: Mapping[str, Tensor], receiver: Mapping[str, Tensor]
    ) -> BoundaryFunction:
        del sender, receiver
        assert table is not None
        return BoundaryFunction(encode=Half(matrices=[table.mT]), decode=Half(matrices=[table]))

    def tokens(self, context: StageContext, table_VD: Tensor | None) -> nn.Module | None:
        return self.known.build(context, table_VD)

    def encoder(self, context: BoundaryContext) -> Encoder:
        return MaplEncoder(
            context,
            rank=self._rank,
            projector=self.projector,
            start=self.start,
            every=self.every,
            rate=self.rate,
            beta=self.beta,
        )

    def decoder(self, context: BoundaryContext) -> Decoder:
        learned = self.table(context.width).gradient is not None
        return MaplDecoder(context, rank=self._rank, every=self.every, learned=learned)
