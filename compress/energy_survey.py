"""What of the hidden states a projection keeps, and what the best one of its rank could keep.

The measure is energy: the sum of squares of what is to be projected, X (tokens, D), with covariance C = XᵀX. A
projection on orthonormal columns A keeps tr(AᵀCA) of tr(C); the most that R columns can keep is the sum of the R
largest eigenvalues of C (Eckart and Young, 1936). So the ratio of the two says whether a projector has found what
there is to find.
"""

from __future__ import annotations

import torch
from torch import Tensor

SURVEY_EVERY = 16  # steps: eigenvalues of (D, D) take a good part of a small step


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
