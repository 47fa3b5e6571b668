"""The model of a run whose lanes hold chunks, as one that has whole sequences and the architecture's own projections.

Lanes of such a run are parts of one model: with averaging in every step they have the same weights, and one lane's are
the model's. What a context method has put in the place of a projection to keys or to values is multiplied out, where
that computes the same (`ContextMethod.plain_weights`); so who takes the model out of a run, or measures it, need not
know how its sequences were cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...compress.byte_format import CodecError
from ...compress.context_registry import parse_context
from ..config import ConfigError, RunConfig
from ..config_file import load_config
from ..config_sections import ContextSection
from ..lane_choice import chosen_lane
from ..run_directory import with_start
from ..run_lanes import of_lane
from ..stage_state import StageSnapshot
from .assemble import Assembled, AssembleError, assemble
from .manifest import CheckpointError

_ROUNDS = "lanes/"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunModel:
    """The model of a run, of lane `lane`, whose directory is `place`. config: of the whole run."""

    found: Assembled
    config: RunConfig
    lane: int
    place: Path


def model_of_run(
    run: Path,
    lane: int | None,
    *,
    step: int | None = None,
    config: RunConfig | None = None,
    report: Callable[[str], None] | None = None,
    nearly: bool = False,
) -> RunModel:
    """The model of the run in `run` with weights of the architecture's own names, as `chosen_lane` and `assemble` find
    it. nearly: also where these compute something else. `report` is told, too, of lanes that are not here to be
    compared.

    Raises what those two do, ConfigError for a model that is none of plain projections, and AssembleError where lanes
    that hold chunks differ.
    """
    settings, say = with_start(config or load_config(run / "run.toml"), run), report or (lambda _: None)
    chosen, own, place = chosen_lane(run, lane, config=settings, step=step, report=report)
    found = assemble(place, step=step, config=own, report=report)
    if settings.context.method:
        found = _plain(run, settings, chosen, found, say, nearly=nearly)
    return RunModel(found=found, config=settings, lane=chosen, place=place)


def _plain(
    run: Path, config: RunConfig, lane: int, found: Assembled, report: Callable[[str], None], *, nearly: bool
) -> Assembled:
    if not nearly:
        try:
            _check_plain(config, found.completed)
        except CodecError as error:
            remedy = "thinpipe export RUN --out OUT --plain leaves them out, and says what that costs"
            raise ConfigError(f"{error}; {remedy}") from None
    for other in range(config.lanes.count):
        if other != lane:
            _check_alike(run, config, lane, other, found, report)
    method, seed = parse_context(config.context.method), config.run.seed
    return replace(found, weights=method.plain_weights(found.weights, seed=seed, step=_step(found.completed)))


def is_plain(config: RunConfig, completed: int) -> bool:
    """Whether the model of a run of these settings is one of plain projections after so many steps."""
    try:
        _check_plain(config, completed)
    except CodecError:
        return False
    return True


def _check_plain(config: RunConfig, completed: int) -> None:
    if config.context.method:
        parse_context(config.context.method).check_plain(_step(completed), config.run.steps)


def _step(completed: int) -> int:
    """After which an evaluation would measure this state."""
    return max(0, completed - 1)


def _check_alike(
    run: Path, config: RunConfig, lane: int, other: int, found: Assembled, report: Callable[[str], None]
) -> None:
    own, place = of_lane(config, run, other)
    try:
        beside = assemble(place, step=found.completed, config=own, report=report)
    except CheckpointError as error:
        report(f"lane {other} is not compared with lane {lane}: {str(error).partition(';')[0]}")
        return
    pairs = [(found.weights, beside.weights), *zip(found.tokens, beside.tokens, strict=True)]
    for one, two in zip(found.boundaries, beside.boundaries, strict=True):
        pairs += [(one.sender, two.sender), (one.receiver, two.receiver)]
        if one.table is not None and two.table is not None:
            pairs.append(({"table": one.table}, {"table": two.table}))
    for one, two in pairs:
        for name, tensor in one.items():
            if not torch.equal(tensor, two[name]):
                raise AssembleError(
                    f"lanes {min(lane, other)} and {max(lane, other)} differ after {found.completed} steps, in "
                    f"'{name}', and so are no parts of one model; take a step after which they had averaged (--step)"
                )


def on_one_node(found: Assembled) -> Assembled:
    """`found`, which has plain projections, with settings and states of a run that holds whole sequences in one
    lane."""
    config = found.config
    if not config.context.method:
        return found
    alone = {"lanes": config.lanes.model_copy(update={"count": 1}), "context": ContextSection()}
    snapshots = [replace(each, tensors=_plain_state(each, found)) for each in found.snapshots]
    return replace(found, config=config.model_copy(update=alone), snapshots=snapshots)


def _plain_state(snapshot: StageSnapshot, found: Assembled) -> dict[str, torch.Tensor]:
    """Without rounds, and without what is no weight any more."""
    kept = {}
    for name, tensor in snapshot.tensors.items():
        kind, _, parameter = name.partition("/")
        if kind == "weight" and parameter in found.weights:
            kept[name] = found.weights[parameter]
        elif not name.startswith(_ROUNDS) and not _of_projection(parameter, found):
            kept[name] = tensor
    return kept


def _of_projection(parameter: str, found: Assembled) -> bool:
    """Whether a method had that parameter beside a projection's weight."""
    return parameter not in found.weights and f"{parameter.rpartition('.')[0]}.weight" in found.weights
