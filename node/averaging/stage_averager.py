"""What of one stage is averaged with the other lanes', by the mode that the run asks for.

All that the stage's optimizer moves, and the learned table of the boundary below, which its encoder moves. What else a
stage learns stays its lane's own: codebooks follow the numbers that this lane sends, and both ends of a boundary agree
on them anyhow.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...compress.byte_format import CodecError
from ...compress.codec_interface import Encoder
from ..boundary.learned_tables import TableOwner, moves_after
from ..config import ConfigError, RunConfig
from .averager import Averager, Place
from .gradients import GradientAverager
from .modes import AveragingMode, Gradients, Outer, Sparta, parse_averaging
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


def averager_of(
    config: RunConfig,
    stage: int,
    lane: int,
    *,
    parameters: list[tuple[str, nn.Parameter]],
    sender: Encoder | None,
    table: TableOwner | None,
    table_gradient: Callable[[], Tensor | None],
) -> Averager | None:
    """What that stage does in rounds, if there are other lanes. table: that of the boundary below. Raises ConfigError
    for a mode that does not fit."""
    if config.lanes.count == 1:
        return None
    learned = table.table if table and table.table.every else None
    try:
        return stage_averager(
            parse_averaging(config.lanes.average),
            Place(stage=stage, lane=lane, lanes=config.lanes.count, seed=config.run.seed),
            steps=config.run.steps,
            parameters=parameters,
            sender=sender if learned else None,
            table_moves=lambda step: learned is not None and moves_after(learned, step),
            table_gradient=table_gradient,
        )
    except CodecError as error:
        raise ConfigError(f"lanes.average: {error}") from None


LANE_SEED = 0x9E3779B97F4A7C15  # an odd number (the golden ratio's), so that lanes have seeds far from one another


def rounding_seed(seed: int, lane: int) -> int:
    """The seed of what a lane rounds at random: lanes must not round alike, or their errors would not average out. Lane
    0 has the run's own."""
    return (seed + lane * LANE_SEED) % 2**63
