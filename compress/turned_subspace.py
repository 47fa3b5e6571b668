"""A subspace that turns with one angle: U(θ) = exp(θ A) Ū to second order, from parts that every node has alike.

Ū (K, R) has orthonormal columns, A (K, K) is skew-symmetric and fixed, so exp(θ A) is a rotation. To second order,

    U(θ) = Ū + θ (A Ū) + ½ θ² (A² Ū)

so three matrices (K, R), the *frame*, are all that is ever needed, and no product with A. What the rest of the series
would add shows as UᵀU = I + ¼ θ⁴ Ūᵀ A⁴ Ū: with ‖A‖₂ = 1 at most ¼ θ⁴, 0.002 at θ = 0.3.

A turns K / 2 planes of a random orthonormal basis, by rates that are spread evenly over (0, 1]. With equal rates A²
would be -I, and the second term would only shorten Ū. Everything is computed as `compress.exact_orthonormal` computes,
so nodes have the same bits and send nothing. Why not a Gaussian A, scaled: its norm is an iteration, and A Ū a product
of matrices, whose last bits belong to a library.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .exact_orthonormal import ExactRotation


def frame_of(u_KR: Tensor, seed: int, stream: int) -> Tensor:
    """(3, K, R), float64, on the CPU: Ū, A Ū and A² Ū, for the A of (seed, stream)."""
    turns = ExactRotation(seed, stream, len(u_KR))
    parts = [u_KR.detach().to("cpu", torch.float64).numpy()]
    for _ in range(2):
        parts.append(_turned(parts[-1], turns))
    return torch.from_numpy(np.stack(parts))


def _turned(matrix_KR: np.ndarray, basis: ExactRotation) -> np.ndarray:
    """A X = Q J Qᵀ X, where J turns the coordinates in pairs, the last pair at rate 1."""
    turned = matrix_KR.copy()
    basis.turn_back(turned)
    planes = len(turned) // 2
    rates = (np.arange(1, planes + 1) / max(1, planes))[:, None]
    upper, lower = turned[:planes].copy(), turned[planes : 2 * planes].copy()
    turned[:planes], turned[planes : 2 * planes] = -rates * lower, rates * upper
    turned[2 * planes :] = 0  # of an odd number, one coordinate stays where it is
    basis.turn(turned)
    return turned


def subspace_at(frame_3KR: Tensor, theta: Tensor | None) -> Tensor:
    """U(θ): (..., K, R) for angles θ of any shape, differentiable in them; Ū where there are none."""
    if theta is None:
        return frame_3KR[0]
    angle = theta[..., None, None]
    return frame_3KR[0] + angle * frame_3KR[1] + 0.5 * angle.square() * frame_3KR[2]


def orthogonality_error(frame_3KR: Tensor, theta: Tensor | None) -> float:
    """The largest ‖UᵀU - I‖_F over the angles θ."""
    u = subspace_at(frame_3KR.detach().double(), None if theta is None else theta.detach().double())
    return float((u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)).flatten(-2).norm(dim=-1).max())
