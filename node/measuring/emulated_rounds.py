"""Rounds of a stage that computes nothing: contributions of the size of real ones, with zeros inside.

But for the last one of weights, of all of them at once, which is there so that all lanes end with the same: these have
none, and what it takes says nothing of the steps before it. It is one byte. Gradients are averaged in every step.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..averaging.averager import Averager
from ..averaging.round_plan import Round


class EmulatedAverager(Averager):
    """In the place of `real`, which knows the sizes (contribution_sizes.py) and has nothing to average."""

    def __init__(self, real: Averager, *, steps: int) -> None:
        super().__init__(real.mode, real.place, steps=steps, moved=lambda: None)
        self._real = real

    def contribution_bytes(self, round_: Round) -> int:
        left_out = round_.last and not self.mode.of_gradients
        return 1 if left_out else self._real.contribution_bytes(round_)

    def _packed(self, round_: Round) -> bytes:
        return bytes(self.contribution_bytes(round_))

    def _check(self, round_: Round, lane: int, contribution: bytes) -> None:
        del round_, lane, contribution  # any zeros will do

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
