"""Which lane of a run to take out: the one that the user names, else the first that has a whole checkpoint.

Lanes end with the same weights, so it matters only for a run that is under way, or was broken off: then its lanes have
gone different ways since the last round, and may have gone on to different steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .checkpoints.listing import steps_held
from .checkpoints.manifest import CheckpointError
from .config import RunConfig
from .config_file import load_config
from .run_directory import with_start
from .run_lanes import all_lanes, check_lane, of_lane


def chosen_lane(
    run: Path,
    lane: int | None,
    *,
    config: RunConfig | None = None,
    step: int | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[int, RunConfig, Path]:
    """The lane that is asked for, or where none is the first of which all stages have a checkpoint (after `step`
    steps), which `report` is told; with `of_lane` of it. config: in the place of run.toml. Raises ConfigError."""
    config = with_start(config or load_config(run / "run.toml"), run)
    if lane is not None:
        check_lane(config, lane)
        return lane, *of_lane(config, run, lane)
    lanes = all_lanes(config, run)
    if len(lanes) == 1:
        return 0, *lanes[0]
    chosen = next((number for number, place in enumerate(lanes) if _complete(*place, step)), 0)
    if report:
        report(f"lane {chosen} of {len(lanes)} is taken; {run}/lane-N names another")
    return chosen, *lanes[chosen]


def _complete(config: RunConfig, directory: Path, step: int | None) -> bool:
    try:
        held = steps_held(config.checkpoint.path(directory), run=config.run.name, stages=config.pipeline.stages)
    except CheckpointError:
        return False
    common = set.intersection(*map(set, held))
    return bool(common) if step is None else step in common
