"""Rounds of a stage that computes nothing: contributions of the right size, with zeros inside.

What is averaged is counted from the model's own shapes and the codec's own module, both built without memory (torch's
meta device), so that contributions have the size of real ones to within what the halves of a boundary train beside
them (a projector's master, a bottleneck's networks), which is less than a hundredth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compress.codec_interface import StageContext
from ...compress.registry import parse_codec
from ..averaging.averager import Averager, Place
from ..averaging.fragments import row_shape
from ..averaging.modes import Sparta, parse_averaging
from ..averaging.round_plan import Round
from ..config import RunConfig
from ..model.architecture import with_layers
from ..model.slices import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def averaged_numbers(config: RunConfig, architecture: PretrainedConfig, stage: int, layers: int) -> int:
    """How many numbers stage `stage` trains, of so many layers: the model's, and what the codec knows of tokens."""
    one = skeleton(with_layers(architecture, range(1)), torch.float32)
    last = stage == config.pipeline.stages - 1
    count = 0
    for name, parameter in one.named_parameters():
        if ".layers." in name:
            count += layers * parameter.numel()
        elif (stage == 0) if "embed" in name else last:
            count += parameter.numel()
    codec = parse_codec(config.codec.codec).codec
    if config.pipeline.stages > 1 and not codec.table_scale:
        size = {"width": architecture.hidden_size, "vocab_size": architecture.vocab_size}
        with torch.device("meta"):
            tokens = codec.tokens(StageContext(seed=0, stage=stage, **size, device="meta"), None)
        count += sum(each.numel() for each in tokens.parameters() if each.requires_grad) if tokens else 0
    return count


class EmulatedAverager(Averager):
    """As `config` has it, for a stage that trains so many `numbers`."""

    def __init__(self, config: RunConfig, place: Place, numbers: int) -> None:
        super().__init__(parse_averaging(config.lanes.average), place, steps=config.run.steps, moved=lambda: None)
        self._numbers = numbers
        self._format = self.mode.byte_format()

    def contribution_bytes(self, round_: Round) -> int:
        share = self.mode.p if isinstance(self.mode, Sparta) and not round_.last else 1 / self.mode.fragments
        return self._format.body_bytes(row_shape(max(1, round(share * self._numbers))))

    def _packed(self, round_: Round) -> bytes:
        return bytes(self.contribution_bytes(round_))

    def _apply(self, round_: Round, contributions: Mapping[int, bytes]) -> float:
        del round_, contributions
        return 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        del completed
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor], completed: int) -> None:
        del state, completed
