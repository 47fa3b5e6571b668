"""What of one stage is averaged with the other lanes', by the mode that the run asks for.

All that the stage's optimizer moves, and the learned table of the boundary below, which its encoder moves. What else a
stage learns stays its lane's own: codebooks follow the numbers that this lane sends, and both ends of a boundary agree
on them anyhow.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...compress.codec_interface import Encoder
from .averager import Averager, Place
from .gradients import GradientAverager
from .modes import AveragingMode, Gradients, Outer, Sparta
from .weights import OuterAverager, SpartaAverager, StageWeights


def stage_averager(
    mode: AveragingMode,
    place: Place,
    *,
    steps: int,
    parameters: list[tuple[str, nn.Parameter]],
    sender: Encoder | None,
    table_moves: Callable[[int], bool],
    table_gradient: Callable[[], Tensor | None],
) -> Averager:
    """The averager of one stage. sender: the half of the boundary below, if it owns a learned table; the table moves
    after the steps for which `table_moves`, by this step's `table_gradient`. Raises CodecError for a mode that does not
    fit."""

    def moved() -> None:
        if sender is not None:
            sender.averaged()

    tensors: list[Tensor] = [parameter for _, parameter in parameters]
    weights = StageWeights(cut=tensors, whole=[] if sender is None else [sender.master], moved=moved)
    match mode:
        case Gradients():
            return GradientAverager(
                mode,
                place,
                steps=steps,
                parameters=parameters,
                table_gradient=table_gradient,
                table_shape=() if sender is None else tuple(sender.master.shape),
                table_moves=table_moves,
            )
        case Outer():
            return OuterAverager(mode, place, weights, steps=steps)
        case Sparta():
            return SpartaAverager(mode, place, weights, steps=steps)
        case _:
            raise AssertionError(mode)


LANE_SEED = 0x9E3779B97F4A7C15  # an odd number (the golden ratio's), so that lanes have seeds far from one another


def rounding_seed(seed: int, lane: int) -> int:
    """The seed of what a lane rounds at random: lanes must not round alike, or their errors would not average out. Lane
    0 has the run's own."""
    return (seed + lane * LANE_SEED) % 2**63
