"""What of the hidden states a projection keeps, and what the best one of its rank could keep.

The measure is energy: the sum of squares of what is to be projected, X (tokens, D), with covariance C = XᵀX. A
projection on orthonormal columns A keeps tr(AᵀCA) of tr(C); the most that R columns can keep is the sum of the R
largest eigenvalues of C (Eckart and Young, 1936). So the ratio of the two says whether a projector has found what
there is to find.

`PrincipalSubspace` follows that best subspace itself, as a projector that learns from what it sees and not from the
loss (the classical answer; Oja, 1982, for its online form). Here eigenvectors of a running covariance are exact and
cheap beside a stage: D² operations a token, D³ a change. Only its owner computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SURVEY_EVERY = 16  # steps: eigenvalues of (D, D) take a good part of a small step


def top_eigenvectors(covariance_DD: Tensor, rank: int) -> Tensor:
    """Orthonormal (D, R), of the largest eigenvalues, in float64 on the CPU."""
    return torch.linalg.eigh(covariance_DD.to("cpu", torch.float64)).eigenvectors[:, -rank:]


class EnergySurvey:
    """Now and then looks at one microbatch: the share of its energy that is kept, and that could be."""

    def __init__(self) -> None:
        self._steps = 0
        self._seen_DD: Tensor | None = None
        self._shares: dict[str, float] = {}

    def see(self, x_BTD: Tensor) -> None:
        if self._seen_DD is None and self._steps % SURVEY_EVERY == 0:
            x_ND = x_BTD.flatten(0, 1)
            self._seen_DD = x_ND.mT @ x_ND

    def shares(self, projector_DR: Tensor) -> dict[str, float]:
        """`energy_kept` and `energy_best` of the last survey. Call it once a step."""
        self._steps += 1
        seen_DD, self._seen_DD = self._seen_DD, None
        if seen_DD is not None and (whole := float(seen_DD.trace())) > 0:
            a_DR = projector_DR.detach()
            values_D = torch.linalg.eigvalsh(seen_DD.to("cpu", torch.float64))
            self._shares = {
                "energy_kept": float((a_DR * (seen_DD @ a_DR)).sum()) / whole,
                "energy_best": float(values_D[-a_DR.shape[1] :].sum()) / whole,
            }
        return dict(self._shares)


class PrincipalSubspace:
    """A running covariance, and an orthonormal basis of its principal subspace that turns no more than it must."""

    def __init__(self, width: int, beta: float) -> None:
        self.beta = beta
        self.covariance_DD = torch.zeros(width, width, dtype=torch.float64)
        self._seen_DD = torch.zeros(width, width)

    def see(self, x_BTD: Tensor) -> None:
        x_ND = x_BTD.flatten(0, 1)
        self._seen_DD = self._seen_DD.to(x_ND) + x_ND.mT @ x_ND

    def follow(self, a_DR: Tensor) -> Tensor:
        """The orthonormal basis of the principal subspace that is nearest to `a`."""
        seen_DD = self._seen_DD.to("cpu", torch.float64)
        self._seen_DD = torch.zeros_like(self._seen_DD)
        self.covariance_DD = self.beta * self.covariance_DD + (1 - self.beta) * seen_DD / seen_DD.trace()
        u_DR = top_eigenvectors(self.covariance_DD, a_DR.shape[1])
        left_RR, _, right_RR = torch.linalg.svd(u_DR.mT @ a_DR.to("cpu", torch.float64))
        return (u_DR @ (left_RR @ right_RR)).to(a_DR)
