"""A microbatch's token ids as a stage computes with them: inputs, targets, and what codecs look at before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .chunk_layout import LaneSegment


@dataclass(frozen=True, slots=True)
class StageTokens:
    """inputs_BT, targets_BT: of all segments, one after the other, int64. known: of each segment the inputs with some
    ids before them, (B, N+T), and how many these are."""

    inputs_BT: Tensor
    targets_BT: Tensor
    known: Sequence[tuple[Tensor, int]]

    @classmethod
    def of(cls, segments: Sequence[LaneSegment], device: torch.device) -> StageTokens:
        """On that device."""

        def together(parts: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int64)).to(device)

        return cls(
            inputs_BT=together([part.inputs_BT for part in segments]),
            targets_BT=together([part.targets_BT for part in segments]),
            known=[(together([part.known_BT]), part.before) for part in segments],
        )
