"""The matrix sign, and steepest descent on the Stiefel manifold with it: by matrix products alone.

For `G = U S Vᵀ`, `msign(G) = U Vᵀ`: the same directions, every singular value made 1. It is the steepest descent
direction under the spectral norm, so Muon takes it as the update of every hidden matrix, and it is the orthogonal
factor of the polar decomposition, so one routine serves an optimizer and a walk on the Stiefel manifold alike.

An odd polynomial of a matrix acts on its singular values: `a X + b X XᵀX + c X (XᵀX)²` maps each `s` to
`a s + b s³ + c s⁵`. A chain of such quintics that drives all of [l, 1] to 1 is therefore a matrix sign, three products
a link. Two chains are here:

* "quintic": one polynomial, repeated (K. Jordan, "Muon", 2024, kellerjordan.github.io/posts/muon). Steep at 0 and
  never convergent: singular values end anywhere in about 0.7..1.2, however many steps are taken.
* "polar_express": another polynomial at every step, each the minimax answer for the interval in which the one before
  left the singular values (Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932). Converges.

Why not an SVD: it is sequential, slow on accelerators and worse in low precision. Why not the classical Newton-Schulz
quintic (15/8, -10/8, 3/8) from the start: its slope at 0 is 1.875, so a singular value of 1e-3 needs some eleven steps
to come up to 1, where the chain of the paper needs five.

A learned projector `A` (d, r) has orthonormal columns, `AᵀA = I`: a point of the Stiefel manifold. `SPEL` (Yang, Lai,
"Manifold constrained steepest descent", arXiv 2601.21487) walks on it in three acts a step. `tangent` removes from the
gradient what would leave the manifold at first order (Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix
Manifolds", 2008, 3.6). `msign` turns the momentum of that into a step, all of its directions equally fast. `retract`
goes back to the nearest point of the manifold. `horizontal` also removes what only turns the basis inside its span (the
Grassmann manifold): noise where a loss sees the span alone, signal where codes live in the coordinates `H A`.

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

Coefficients = Literal["polar_express", "quintic"]
Constraint = Literal["stiefel", "grassmann", "none"]
Polynomial = tuple[float, float, float]

NORM_FLOOR = 1e-7  # torch.optim.Muon's `eps`: a matrix whose Frobenius norm is below it is divided by this instead

# K. Jordan's Muon post (above), also the default of torch.optim.Muon: slope at 0 as steep as [0, 1] can bear.
QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)

# arXiv 2505.16932, the appendix's listing with l = 1e-3, u = 1 and cushion 0.02407327424182761; tests/test_stiefel.py
# derives every row again by Remez exchange. Beside each: where the chain so far sends the singular values of [1e-3, 1].
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),  # 0.00829 .. 1.9917
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),  # 0.0340 .. 1.9660
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),  # 0.1343 .. 1.8657
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),  # 0.4396 .. 1.5604
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),  # 0.8764 .. 1.1236
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),  # 0.99882 .. 1.00118
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),  # 1 ± 1.1e-9
    (1.875, -1.25, 0.375),  # the limit, Newton-Schulz of degree 5; repeated for all further steps
)

# arXiv 2505.16932, finite precision: p(s) becomes p(s / 1.01) in all rows but the last, so that a singular value which
# bfloat16 rounded past the end of its interval does not meet the part of the polynomial that grows without bound.
# Measured on a Gaussian 256 x 256: the largest singular value is 1.41 without it, 1.124 with it.
LOW_PRECISION_SAFETY = 1.01


def _chain(coefficients: Coefficients, steps: int, dtype: torch.dtype) -> list[Polynomial]:
    if coefficients == "quintic":
        return [QUINTIC] * steps
    if coefficients != "polar_express":
        raise ValueError(f"unknown coefficients '{coefficients}'; choose 'polar_express' or 'quintic'")
    *head, limit = POLAR_EXPRESS
    if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
        safety = LOW_PRECISION_SAFETY
        head = [(a / safety, b / safety**3, c / safety**5) for a, b, c in head]
    return (head + [limit] * max(0, steps - len(head)))[:steps]


def _msign_wide(g_MN: Tensor, chain: list[Polynomial], dtype: torch.dtype) -> Tensor:
    """One (m, n) matrix, m <= n, so that the Gram matrix is the smaller of the two."""
    x_MN = g_MN.to(dtype).contiguous()  # one memory layout, one sequence of products: no dependence on strides
    x_MN = x_MN / torch.linalg.vector_norm(x_MN).clamp(min=NORM_FLOOR)  # Frobenius >= spectral norm: all s <= 1
    for a, b, c in chain:
        gram_MM = x_MN @ x_MN.mT
        update_MM = torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c)
        x_MN = torch.addmm(x_MN, update_MM, x_MN, beta=a)
    return x_MN


@torch.no_grad()
def msign(
    g: Tensor,
    *,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    coefficients: Coefficients = "polar_express",
) -> Tensor:
    """The orthogonal polar factor of every matrix of `g` (..., m, n), computed in `dtype`, returned in `g`'s own dtype.

    Singular values between 1e-3 and 1 of the Frobenius norm end within 0.8764..1.1236 after 5 steps of
    "polar_express" (0.846..1.124 and rounding in bfloat16, where the safety factor shifts them) and within 1 ± 1.2e-3
    after 6; with "quintic" within 0.47..1.203 after 5. Relative Frobenius distance to the exact factor after 5 steps,
    measured, "polar_express" / "quintic", the same in float32 and bfloat16 to 3e-3: Gaussian 256 x 688 0.088 / 0.163,
    Gaussian 256 x 256 0.117 / 0.213, singular values falling as 1/k 0.091 / 0.184. Hence the default.
    "quintic" in bfloat16 gives the bits of `torch.optim.Muon`.

    A batch is worked off matrix by matrix: a batched product saves no time where one matrix fills the machine, and so
    the bits of a result cannot depend on which other matrices happen to live in the same stage.

    A zero matrix stays zero. No gradient flows. Raises ValueError for fewer than two dimensions, a dtype that is not
    floating, negative `steps` or unknown `coefficients`.
    """
    if g.ndim < 2:
        raise ValueError(f"msign wants matrices (..., m, n), got shape {tuple(g.shape)}; reshape the vector first")
    if not (g.is_floating_point() and dtype.is_floating_point):
        raise ValueError(f"msign computes in floating point, got {g.dtype} to be worked on in {dtype}")
    if steps < 0:
        raise ValueError(f"msign takes a number of steps >= 0, got {steps}")
    chain = _chain(coefficients, steps, dtype)
    m, n = g.shape[-2:]
    if g.numel() == 0:
        return g.clone()
    wide = g if m <= n else g.mT
    signs = [_msign_wide(matrix, chain, dtype).to(g.dtype) for matrix in wide.reshape(-1, *wide.shape[-2:])]
    sign = torch.stack(signs).reshape(wide.shape)
    return sign if m <= n else sign.mT


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
