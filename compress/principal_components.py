"""The subspace that keeps the most of what has been seen: principal components, with order and signs that are fixed.

What is seen is added up as a *Gram matrix* C = Σ xᵀx (K, K), in float64: it can be summed over microbatches and nodes,
and does not grow with the tokens. Its R strongest eigenvectors span the subspace that keeps the most energy (Eckart and
Young, 1936). An eigenvector has no sign of its own, so each gets the one that makes its largest component positive; the
strongest comes first. Nodes that have the same C, on processors of one type, compute the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def add_to_gram(gram_KK: Tensor, x: Tensor) -> None:
    """gram += xᵀx, of x (..., K)."""
    x_NK = x.detach().flatten(0, -2).to(gram_KK.dtype)
    gram_KK.addmm_(x_NK.mT, x_NK)


@torch.no_grad()
def principal(gram_KK: Tensor, r: int) -> Tensor:
    """(K, r), float64, on the CPU: the eigenvectors of the r largest eigenvalues, the largest first. Raises ValueError
    for r outside of 1 to K, and for a matrix that is not finite."""
    size = len(gram_KK)
    if not 1 <= r <= size:
        raise ValueError(f"no {r} principal components in {size} dimensions; choose from 1 to {size}")
    gram_KK = gram_KK.to("cpu", torch.float64)
    if not bool(torch.isfinite(gram_KK).all()):
        raise ValueError("a Gram matrix that is not finite has no principal components")
    vectors_KK = torch.linalg.eigh(0.5 * (gram_KK + gram_KK.mT))[1]
    u_KR = vectors_KK[:, -r:].flip(1)
    largest_R = u_KR.gather(0, u_KR.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest_R < 0, -u_KR, u_KR).contiguous()
