"""What tokens have in common, as a moving average: their mean, their principal axes, how far they lie apart along each.

Averages of tokens and of their products are kept in float64 on the CPU, so that they can be subtracted from one another
and are the same whatever the tokens were on. Products are made of one microbatch's tokens around their own mean,
divided by the largest number, in float32, which is quicker; so neither a large mean nor large numbers cost digits. The
average forgets faster at first, as that of codebooks does (`compress.kmeans`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .byte_format import CodecError, check_layout
from .float_formats import MIN_SCALE
from .kmeans import young_decay
from .principal_components import principal

_PARTS = ("mean", "second", "updates")


class TokenMoments:
    """mean (W,) and second (W, W), of tokens and of their products; updates (1,): microbatches so far."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.reset()

    def reset(self) -> None:
        """Nothing is known, not even the width."""
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.second = torch.zeros(0, 0, dtype=torch.float64)
        self.updates = torch.zeros(1, dtype=torch.float64)
        self._table: Tensor | None = None

    @property
    def width(self) -> int:
        """W; 0 before the first tokens."""
        return len(self.mean)

    def follow(self, x_NW: Tensor) -> None:
        """One microbatch: finite, float32, on the CPU. Zeros alone teach nothing but the width."""
        tokens, width = x_NW.shape
        if not self.width:
            self.mean = torch.zeros(width, dtype=torch.float64)
            self.second = torch.zeros(width, width, dtype=torch.float64)
        peak = float(x_NW.abs().max()) if tokens else 0.0
        if not peak:
            return
        peak = max(peak, MIN_SCALE)
        x_NW = x_NW / peak  # before squares, which would overflow
        mean_W = x_NW.mean(dim=0)
        around_NW = x_NW - mean_W
        mean_W, around_WW = (each.to(torch.float64) for each in (mean_W, around_NW.mT @ around_NW / tokens))
        count = self.updates.item()
        decay = young_decay(self._decay, count) if count else 0.0
        self.updates = torch.tensor([count + 1], dtype=torch.float64)
        self.mean = decay * self.mean + (1 - decay) * peak * mean_W
        self.second = decay * self.second + (1 - decay) * peak**2 * (around_WW + torch.outer(mean_W, mean_W))
        self._table = None

    def table(self) -> Tensor:
        """(W + 1, W + 1), float32. Row 0: the mean. Row i: the axis i, the strongest first, and behind it the standard
        deviation along it, in parts of the root mean square over all axes."""
        if self._table is None:
            around_WW = self.second - torch.outer(self.mean, self.mean)
            axes_WW = principal(around_WW, self.width)
            variances_W = (axes_WW * (around_WW @ axes_WW)).sum(dim=0).clamp_(min=0.0)
            whole = variances_W.mean()
            table = torch.zeros(self.width + 1, self.width + 1, dtype=torch.float64)
            table[0, :-1], table[1:, :-1] = self.mean, axes_WW.mT
            table[1:, -1] = (variances_W / whole).sqrt() if whole > 0 else 1.0
            self._table = table.to(torch.float32)
        return self._table

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _PARTS}

    @staticmethod
    def layout(width: int) -> dict[str, Tensor]:
        """What `state` has, as meta tensors."""
        shapes = ((width,), (width, width), (1,))
        made = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes)
        return dict(zip(_PARTS, made, strict=True))

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raises CodecError for tensors that cannot be a state."""
        check_layout("a transform", state, self.layout(state["mean"].numel() if "mean" in state else 1))
        if bool((state["updates"] < 0).any()):
            raise CodecError("the state of a transform: 'updates' is below 0")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`. Raises CodecError, and changes nothing, for tensors that cannot be one."""
        self.check(state)
        self.reset()
        for name in _PARTS:
            setattr(self, name, state[name].to("cpu", copy=True, memory_format=torch.contiguous_format))
