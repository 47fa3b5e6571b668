"""Steepest descent on the Stiefel manifold of matrices with orthonormal columns, by matrix products alone.

A learned projector `A` (d, r) has orthonormal columns, `AᵀA = I`: a point of the Stiefel manifold. `SPEL` (Yang, Lai,
"Manifold constrained steepest descent", arXiv 2601.21487) walks on it in three acts a step. `tangent` removes from the
gradient what would leave the manifold at first order (Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix
Manifolds", 2008, 3.6). `msign` (`compress.matrix_sign`) turns the momentum of that into a step, all of its directions
equally fast. `retract` goes back to the nearest point of the manifold. `horizontal` also removes what only turns the
basis inside its span (the Grassmann manifold): noise where a loss sees the span alone, signal where codes live in the
coordinates `H A`.

Why not the exactly steepest tangent direction: the matrix sign of a tangent vector is in general not quite tangent, and
the remedy (J. Bernstein, "Stiefel manifold", Modula docs, 2025) is an inner loop of dual ascent at every step; the
retraction takes care of the rest for nothing. Why not Adam and then a QR: it steps by element, so it depends on how the
hidden coordinates are turned, and its second moments belong to no tangent space. Why not QR or Cayley as the
retraction: the former is sequential, the latter solves a linear system, and the polar factor is the nearest point.
Why not Polar Express as the retraction: it divides by the norm first, forgets that all singular values were near 1 and
leaves each off by 6 to 8 % after five steps, 0.1 % after six (measured). Cubic Newton-Schulz doubles the digits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .matrix_sign import Coefficients, msign

Constraint = Literal["stiefel", "grassmann", "none"]


def tangent(a_DR: Tensor, g_DR: Tensor) -> Tensor:
    """`g` projected on the tangent space of the Stiefel manifold at `a`: `g - A sym(Aᵀg)`, the Riemannian gradient
    under the Euclidean metric. What remains, `T`, has `AᵀT` skew."""
    inner_RR = a_DR.mT @ g_DR
    return g_DR - a_DR @ (0.5 * (inner_RR + inner_RR.mT))


def horizontal(a_DR: Tensor, g_DR: Tensor) -> Tensor:
    """`g - A Aᵀg`: the part of `g` that moves the span of `a`, without the part that turns its basis."""
    return g_DR - a_DR @ (a_DR.mT @ g_DR)


def _gram_error(a_DR: Tensor) -> Tensor:
    error_RR = a_DR.mT @ a_DR
    error_RR.diagonal().sub_(1)
    return error_RR


@torch.no_grad()
def retract(x_DR: Tensor, steps: int = 3) -> Tensor:
    """The polar factor of a nearly orthonormal (d, r), r <= d, in a fresh tensor of `x`'s own dtype.

    With `E = XᵀX - I`, a step of cubic Newton-Schulz is `X - X E / 2` (= 1.5 X - 0.5 X XᵀX) and takes every eigenvalue
    `e` of E to `-3/4 e² + 1/4 e³`: from 0.2 to 5e-7 in three steps, from 0.5 only to 1e-3. Nothing is rescaled.

    Singular values in (0, √3) converge to 1, others do not. `‖E²‖_F < 1` is sufficient for it (all of them are then in
    (0, √2)) and costs one r x r product; the plain `‖E‖_F < 1` would refuse 512 columns that are 3 % too long, which is
    harmless. Raises ValueError where the condition fails, for NaN too, and for a shape or `steps` without a meaning.
    """
    if x_DR.ndim != 2 or x_DR.shape[0] < x_DR.shape[1] or steps < 0:
        raise ValueError(f"retract takes (d, r) with r <= d and steps >= 0, got {tuple(x_DR.shape)} and {steps}")
    x_DR = x_DR.clone(memory_format=torch.contiguous_format)
    error_RR = _gram_error(x_DR)
    if not (distance := float((error_RR @ error_RR).norm())) < 1:  # NaN is refused too
        far = f"too far from orthonormal columns to retract, ‖(XᵀX - I)²‖_F = {distance:.3g} where it must be below 1"
        raise ValueError(f"{far}; take a smaller step or start from orthonormal columns")
    for step in range(steps):
        error_RR = _gram_error(x_DR) if step else error_RR
        x_DR = torch.addmm(x_DR, x_DR, error_RR, alpha=-0.5)
    return x_DR


def longest_step(r: int) -> float:
    """The largest `lr` of SPEL at which every step of a (d, r) can be retracted, whatever its direction.

    With singular values of msign up to s = 1.13, `E = XᵀX - I` of a point that was moved by lr has a spectral norm of
    at most 2 s lr + (s lr)², and `‖E²‖_F <= √r ‖E‖²` has to stay below 1 (`retract`). Tangent directions allow more.
    """
    return (math.sqrt(1 + r**-0.25) - 1) / 1.13


def _measured(a: Tensor) -> Tensor:  # bfloat16 would round by more than there is to be measured
    return a.detach().to(torch.promote_types(a.dtype, torch.float32))


def orthonormality_error(a_DR: Tensor) -> float:
    """`‖AᵀA - I‖_F`, the Frobenius norm: an upper bound of the spectral one, at most √r times as large."""
    return float(_gram_error(_measured(a_DR)).norm())


def subspace_angle(a_DR: Tensor, b_DR: Tensor) -> float:
    """The root-mean-square principal angle, in radians, between the spans of two orthonormal (d, r).

    The mean is taken over squared sines, `Σ sin² = ‖B - A AᵀB‖²`: the angle whose sine is the root-mean-square sine.
    It is the mean over angles where they are equal, and to third order where they are small, without an SVD. Cosines
    would lose an angle below √eps; and since `A - A AᵀA` is 0, `B - A` may be projected in place of `B`, so that a
    basis that has moved a little is measured to full relative precision (a merely turned one to about eps absolute).
    """
    a_DR, b_DR = _measured(a_DR), _measured(b_DR)
    return math.atan2(float(horizontal(a_DR, b_DR - a_DR).norm()), float((a_DR.mT @ b_DR).norm()))


def random_orthonormal(
    d: int, r: int, generator: np.random.BitGenerator | np.random.Generator, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A uniformly random (d, r) with orthonormal columns, from a generator such as `np.random.Philox(key=...)`.

    The Q of normal draws, with R's diagonal made positive: else Q is not uniform (F. Mezzadri, "How to generate random
    matrices from the classical compact groups", math-ph/0609050). The draws are the inverse normal of raw bits, whose
    stream numpy keeps for good; QR is LAPACK's in float64, so the last bits belong to the machine: send, never redraw.
    """
    if not 1 <= r <= d:
        raise ValueError(f"no {r} orthonormal columns in {d} dimensions; choose 1 <= r <= d")
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    raw_DR = bits.random_raw((d, r)) >> np.uint64(12)  # 52 bits and a half lie strictly inside (0, 1), exactly
    uniform_DR = (raw_DR.astype(np.float64) + 0.5) * 2.0**-52
    q_DR, r_RR = torch.linalg.qr(torch.special.ndtri(torch.from_numpy(uniform_DR)))
    return (q_DR * torch.where(r_RR.diagonal() < 0, -1.0, 1.0).to(q_DR.dtype)).to(dtype)


class SPEL(Optimizer):
    """`m ← β m + (1 - β) tangent(A, g)`, `A ← retract(A - lr · msign(m))` (arXiv 2601.21487, as used in 2606.05484).

    Every parameter is a (d, r), r <= d, float32 or float64, that starts with orthonormal columns. Under "grassmann",
    `horizontal` stands for `tangent`, and r < d: with r = d it is zero but for rounding, which msign would blow up.
    "none" is the ablation: the raw gradient, no retraction. `lr` is the length of a step in every direction, read
    from `param_groups` at each step; since msign forgets the size of a gradient, only a falling `lr` comes to rest,
    and the zero start of `m` needs no correction.

    The momentum is kept in plain form: not projected again, not transported, so the older part of `m` is tangent where
    it was taken and, after k steps, only to about k · lr at `A`; the retraction absorbs it. (The other order, to
    average raw gradients and project the average at the present point, is found in accounts of the paper too.)

    A gradient that is not finite, or a step too long to retract, raises ValueError with the parameter's name before any
    parameter or momentum is changed. A parameter without a gradient is left alone.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        beta: float = 0.9,
        constraint: Constraint = "stiefel",
        msign_steps: int = 5,
        msign_dtype: torch.dtype = torch.float32,
        msign_coefficients: Coefficients = "polar_express",
    ) -> None:
        defaults = {"lr": lr, "beta": beta, "constraint": constraint, "msign_steps": msign_steps}
        super().__init__(params, defaults | {"msign_dtype": msign_dtype, "msign_coefficients": msign_coefficients})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # As torch has it, without its decorator: that is for the compiler, and imports it (2 s in every stage).
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        if not (0 <= group["lr"] < math.inf and 0 <= group["beta"] < 1):
            raise ValueError(f"SPEL: lr {group['lr']}, beta {group['beta']}; choose finite lr >= 0 and beta in [0, 1)")
        if group["constraint"] not in ("stiefel", "grassmann", "none"):
            raise ValueError(f"SPEL: unknown constraint '{group['constraint']}'; choose stiefel, grassmann or none")
        least = 1 if group["constraint"] == "grassmann" else 0
        for i, p in enumerate(group["params"]):
            if p.ndim != 2 or p.shape[0] - p.shape[1] < least or p.dtype not in (torch.float32, torch.float64):
                what = f"{self._name(index, i)} is {p.dtype} of shape {tuple(p.shape)}"
                raise ValueError(f"SPEL: {what}; choose (d, r) with d - r >= {least}, float32 or float64")

    def _name(self, group: int, i: int) -> str:
        return str(self.param_groups[group].get("param_names", {i: f"parameter {i} of group {group}"})[i])

    def _moved(self, a_DR: Tensor, grad_DR: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The next point and the next momentum, nothing changed."""
        if not bool(torch.isfinite(grad_DR).all()):
            raise ValueError("its gradient holds NaN or infinity")
        project = {"stiefel": tangent, "grassmann": horizontal, "none": lambda _, g_DR: g_DR}[group["constraint"]]
        momentum_DR = (1 - group["beta"]) * project(a_DR, grad_DR)
        if a_DR in self.state:
            momentum_DR += group["beta"] * self.state[a_DR]["momentum"]
        settings = {key: group[f"msign_{key}"] for key in ("steps", "dtype", "coefficients")}
        moved_DR = a_DR - group["lr"] * msign(momentum_DR, **settings)
        return moved_DR if group["constraint"] == "none" else retract(moved_DR), momentum_DR

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        moves: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    try:
                        moves.append((p, *self._moved(p, p.grad, group)))
                    except ValueError as error:
                        raise ValueError(f"SPEL, {self._name(index, i)}: {error}; nothing was changed") from error
        for p, moved_DR, momentum_DR in moves:
            p.copy_(moved_DR)
            self.state[p]["momentum"] = momentum_DR
        return loss
