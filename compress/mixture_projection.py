"""The projection to keys, or to values, whose rows lie in a subspace that differs from segment to segment.

    y = x B + b,    θ = bound · tanh(ψ(what the head looks at)),    z = y U(θ),    keys = z U(θ)ᵀ

B stays in the place and under the name of the projection that it replaces, in nn.Linear's own layout: a checkpoint of
the plain model starts it, and `folded` gives a plain projection back. z is what the other nodes get, and the keys are
made of z here as there: what a node attends to itself is what the others see. U(θ) is `compress.turned_subspace`.

ψ is one vector and one number, so AdamW moves it and not Muon, whose steps do not shrink with the gradient. Its product
is divided by √D: a step of AdamW then moves θ by about as much at any width. It starts at zero, where U(θ) = Ū.

In which of three *phases* a projection is, its user says before a forward: "warm" is the plain projection, "mixed" as
above, and in "folding" θ is 0, so that nothing but Ū remains to be folded. ψ has a gradient in all of them, zero where
θ is not used, because an optimizer wants one from every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .byte_format import CodecError
from .principal_components import add_to_gram
from .turned_subspace import orthogonality_error, subspace_at

Phase = Literal["warm", "mixed", "folding"]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Looks = Literal["mean", "first"]


class MixtureProjection(nn.Linear):
    """x (B, S T, D) to keys or values (B, S T, K), in segments of T tokens.

    frame_3KR: of the subspace. learned_frame: it will be set from data, and so belongs to the state of a run. angle_D:
    what ψ starts from, None for no mixture. trained: whether ψ learns. looks: at the mean of a segment's tokens, or the
    first of them.
    """

    def __init__(
        self,
        dense: nn.Linear,
        frame_3KR: Tensor,
        *,
        learned_frame: bool,
        angle_D: Tensor | None,
        trained: bool,
        bound: float,
        looks: Looks,
        segment_length: int,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        frame = frame_3KR.to(dense.weight)
        if learned_frame:
            self.frame = nn.Parameter(frame, requires_grad=False)
        else:
            self.register_buffer("frame", frame, persistent=False)
        if angle_D is not None and not trained:
            self.register_buffer("angle_weight", angle_D.to(dense.weight), persistent=False)
        else:
            self.angle_weight = None if angle_D is None else nn.Parameter(angle_D.to(dense.weight))
        self.angle_bias = nn.Parameter(dense.weight.new_zeros(1)) if trained and angle_D is not None else None
        self.bound, self.looks, self.segment_length = bound, looks, segment_length
        self.phase: Phase = "mixed"
        self.product: Product = F.linear  # a schedule that puts weight gradients aside has one of its own
        self.gram: Tensor | None = None  # where the plain projection's rows are added up, while somebody wants that
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._seen: tuple[Tensor | None, Tensor, Tensor] | None = None

    frame: Tensor
    angle_weight: Tensor | None
    angle_bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Raises CodecError for a number of tokens that is not whole segments."""
        tokens = input.shape[1]
        if tokens % self.segment_length:
            raise CodecError(
                f"context method 'mos': {tokens} tokens are not whole segments of {self.segment_length}; give a "
                "multiple of it"
            )
        y_BSTK = self.product(input, self.weight, self.bias).unflatten(1, (-1, self.segment_length))
        with torch.autocast(input.device.type, enabled=False):  # rounded to bfloat16, U would not be orthonormal
            theta_BS = self._angles(input.unflatten(1, (-1, self.segment_length)))
            if self.phase == "warm":
                if self.gram is not None and torch.is_grad_enabled():  # evaluation adds nothing
                    add_to_gram(self.gram, y_BSTK)
                z_BSTW = y_BSTK
                used_BSTK = y_BSTK if theta_BS is None else y_BSTK + theta_BS[..., None, None].to(y_BSTK.dtype)
            else:
                u = subspace_at(self.frame, theta_BS)
                z_BSTW = (y_BSTK.to(u.dtype) @ u).to(y_BSTK.dtype)
                used_BSTK = self.lift(z_BSTW, theta_BS)
                if torch.is_grad_enabled():
                    self._see(theta_BS, y_BSTK, z_BSTW)
        self._kept = (z_BSTW, theta_BS)
        return used_BSTK.flatten(1, 2)

    def _angles(self, input_BSTD: Tensor) -> Tensor | None:
        """θ (B, S), zero where it is not used; None without a mixture."""
        if self.angle_weight is None:
            return None
        x_BSTD = input_BSTD.to(self.frame.dtype)
        x_BSD = x_BSTD[:, :, 0] if self.looks == "first" else x_BSTD.mean(dim=2)
        raw_BS = x_BSD @ self.angle_weight / self.in_features**0.5
        theta_BS = self.bound * torch.tanh(raw_BS if self.angle_bias is None else raw_BS + self.angle_bias)
        return theta_BS if self.phase == "mixed" else 0 * theta_BS

    def lift(self, z: Tensor, theta: Tensor | None) -> Tensor:
        """z U(θ)ᵀ of z (..., T, R) and θ (...): what this node does with its own z, and all others with what they
        get."""
        with torch.autocast(z.device.type, enabled=False):
            u = subspace_at(self.frame, theta)
            return (z.to(u.dtype) @ u.mT).to(z.dtype)

    def kept(self, segment: int) -> tuple[Tensor, Tensor | None]:
        """z (B, T, W) and θ (B,) of one segment of the last forward, in its graph; z is y in the warm phase."""
        assert self._kept is not None, "keys and values are encoded behind the forward that makes them"
        z_BSTW, theta_BS = self._kept
        return z_BSTW[:, segment], None if theta_BS is None else theta_BS[:, segment]

    @torch.no_grad()
    def _see(self, theta_BS: Tensor | None, y_BSTK: Tensor, z_BSTW: Tensor) -> None:
        """Figures of the last forward in training; on the device, which is not waited for."""
        whole, kept = (x.to(self.frame.dtype).square().sum() for x in (y_BSTK, z_BSTW))
        self._seen = (None if theta_BS is None else theta_BS.detach(), whole, kept)

    def measures(self) -> dict[str, float]:
        """Of the last forward in training outside of the warm phase: the mean |θ|, the share of energy that was kept,
        and the largest ‖UᵀU - I‖_F. Nothing before the first."""
        if self._seen is None:
            return {}
        theta_BS, whole, kept = self._seen
        found = {
            "energy_kept": float(kept) / max(float(whole), 1e-300),
            "orthogonality": orthogonality_error(self.frame, theta_BS),
        }
        return found if theta_BS is None else {"angle": float(theta_BS.abs().mean()), **found}

    def folded(self) -> dict[str, Tensor]:
        """Weight, and bias where there is one, of the plain projection that this is at θ = 0: B Ū Ūᵀ."""
        given = {"weight": self.weight, "bias": self.bias}
        return {kind: folded(tensor, self.frame[0]) for kind, tensor in given.items() if tensor is not None}


@torch.no_grad()
def folded(tensor_K: Tensor, u_KR: Tensor) -> Tensor:
    """Ū Ūᵀ W of a weight (K, D), or of a bias (K,): rounded once, at the end."""
    u = u_KR.to(tensor_K.device, torch.float64)
    return (u @ (u.mT @ tensor_K.to(torch.float64))).to(tensor_K.dtype)
