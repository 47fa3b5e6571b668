"""Both halves of a learned projection at a boundary: the one that owns and learns the projector, the one that follows.

What they compute, and why, is in `compress.mapl`, whose options they are built from. The encoder has two projectors,
the `master` that it learns and the `shipped` one that it codes with, since the receiver knows no other; the decoder has
only what arrived. What each gathers of the gradient is its own (`compress.table_leaves`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .anchors import Anchors
from .byte_format import CodecError
from .codec_interface import BoundaryContext, Decoder, Encoder
from .energy_survey import EnergySurvey
from .stiefel import SPEL, Constraint, orthonormality_error, random_orthonormal, retract, subspace_angle
from .table_leaves import TableLeaves

Projector = Literal["spel", "grassmann", "free", "fixed"]
Start = Literal["own", "shared"]
CONSTRAINTS: dict[Projector, Constraint] = {"spel": "stiefel", "grassmann": "grassmann", "free": "none"}
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
        self._shape, self._dtype, self._device = (context.width, rank), context.dtype, context.device
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
        if "gathered" in state:  # without a table too: nothing has come yet over a boundary that was made later
            gathered = _copy(state["gathered"], torch.empty(self._shape, dtype=self._dtype, device=self._device))
        self._leaves.go_on(table, gathered)


def _copy(value: Tensor, like: Tensor) -> Tensor:
    """A tensor of its own, laid out as if it had been computed here: a file's are views at any address."""
    return torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False).copy_(value)
