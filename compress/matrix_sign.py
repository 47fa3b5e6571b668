"""The matrix sign by matrix products alone: Polar Express and Newton-Schulz.

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
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Coefficients = Literal["polar_express", "quintic"]
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
