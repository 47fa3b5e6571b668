"""Which lane of a run to take out: the one that the user names, else the first of those that have come furthest.

Lanes that come to the end have the same weights, so it matters for a run that is under way, or was broken off, whose
lanes have gone different ways since the last round; and for a lane that was left out and did not come back, which has
older ones.
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
    """The lane that is asked for. Where none is: that of which all stages have the newest checkpoint (or one after
    `step` steps), of several the first, which `report` is told. With `of_lane` of it.

    config: in the place of run.toml. Raises ConfigError.
    """
    config = with_start(config or load_config(run / "run.toml"), run)
    if lane is not None:
        check_lane(config, lane)
        return lane, *of_lane(config, run, lane)
    lanes = all_lanes(config, run)
    if len(lanes) == 1:
        return 0, *lanes[0]
    newest = [_newest(*place, step) for place in lanes]
    chosen = newest.index(max(newest))
    if report and not config.context.method:  # lanes that hold chunks are parts of one model
        report(f"lane {chosen} of {len(lanes)} is taken; {run}/lane-N names another")
    return chosen, *lanes[chosen]


def _newest(config: RunConfig, directory: Path, step: int | None) -> int:
    """Steps after which all stages have a checkpoint: the most, or `step`; -1: there is none."""
    try:
        held = steps_held(config.checkpoint.path(directory), run=config.run.name, stages=config.pipeline.stages)
    except CheckpointError:
        return -1
    common = set.intersection(*map(set, held))
    return max(common if step is None else common & {step}, default=-1)
