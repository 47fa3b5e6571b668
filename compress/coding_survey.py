"""What coding leaves of a tensor, direction by direction: the figure that shows a codec which fails.

The error of a vector quantiser says how much was lost, and not of what. Few rows in many dimensions code the strong
directions of a token and never the weak ones: a small error, and always the same one. So the tokens' principal
directions u (eigenvectors of XᵀX, W of them) are looked at one by one. Of a direction, uᵀXᵀX̂u / uᵀXᵀXu arrives: 1 if
all of it does, whatever noise there is beside it. `kept_strongest` and `kept_weakest` are the two ends. Where the
weakest is near 0 the other end never sees that direction: a gradient without it does not train what lies above
(docs/results/loss.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

SURVEY_EVERY = 64  # tensors
MAX_WIDTH = 512  # eigenvectors of wider tokens take too long
_NOTHING = 1e-9  # of the strongest direction's energy: rounding, no direction


class CodingSurvey:
    def __init__(self) -> None:
        self._tensors = 0
        self._shares: dict[str, float] = {}

    def is_due(self, width: int) -> bool:
        """Once for each tensor that is learned from: whether to `see` this one."""
        self._tensors += 1
        return width <= MAX_WIDTH and self._tensors % SURVEY_EVERY == 1

    def see(self, sent_NW: Tensor, arrived_NW: Tensor) -> None:
        sent, arrived = (x.detach().to("cpu", torch.float64) for x in (sent_NW, arrived_NW))
        energies_W, directions_WW = torch.linalg.eigh(sent.mT @ sent)
        kept_W = ((sent @ directions_WW) * (arrived @ directions_WW)).sum(dim=0)
        there_W = energies_W > _NOTHING * energies_W[-1]
        if bool(there_W.any()):
            kept_W = kept_W[there_W] / energies_W[there_W]
            self._shares = {"kept_strongest": kept_W[-1].item(), "kept_weakest": kept_W[0].item()}

    def shares(self) -> dict[str, float]:
        """Of the last tensor that was seen; nothing before the first."""
        return dict(self._shares)
