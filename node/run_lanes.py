"""One lane of a run, as a run of its own: its directory, and its settings there.

In a run of several lanes each has a directory with what a run of one has in its own (`sim.reports.lanes`). So all that
works on the records or checkpoints of one chain, and knows nothing of lanes, is given that directory and these
settings: an export, an evaluation, a new run that begins from this one. Lanes end with the same weights, so one is as
good to take out as another; before the end they differ, and the user may choose.

Where checkpoints are kept elsewhere (`checkpoint.directory`, as a whole path), each lane has a directory there too, or
they would write over each other's.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..sim.reports.lanes import lane_path
from .config import ConfigError, RunConfig


def check_lane(config: RunConfig, lane: int) -> None:
    """Raises ConfigError for a lane that the run does not have."""
    count = config.lanes.count
    if not 0 <= lane < count:
        told = "1 lane, so only 0" if count == 1 else f"{count} lanes, so 0 to {count - 1}"
        raise ConfigError(f"--lane {lane}: the run has {told}")


def check_text_stays(config: RunConfig, *, data_changed: bool) -> None:
    """Raises ConfigError where a run of several lanes is to go on with other text: steps that one lane does again would
    come out differently, and other lanes have used what it contributed."""
    if data_changed and config.lanes.count > 1:
        raise ConfigError(
            f"--data-changed: a run of {config.lanes.count} lanes goes on with the text that it began with; begin a "
            "new one from it, thinpipe up --from RUN"
        )


def of_lane(config: RunConfig, run: Path, lane: int) -> tuple[RunConfig, Path]:
    """The settings and the directory of lane `lane` of the run in `run`."""
    lanes, directory = config.lanes.count, config.checkpoint.directory
    if lanes > 1 and directory and directory.is_absolute():
        checkpoint = config.checkpoint.model_copy(update={"directory": lane_path(directory, lane, lanes)})
        config = config.model_copy(update={"checkpoint": checkpoint})
    return config, lane_path(run, lane, lanes)


def all_lanes(config: RunConfig, run: Path) -> list[tuple[RunConfig, Path]]:
    """`of_lane` of each."""
    return [of_lane(config, run, lane) for lane in range(config.lanes.count)]


def found_run(named: Path, lane: int | None) -> tuple[Path, int | None]:
    """The directory of the run that the user named, and which lane of it is meant: `runs/demo/lane-1` is lane 1 of
    `runs/demo`. Raises ConfigError where another lane is asked for beside that."""
    match = re.fullmatch(r"lane-([0-9]{1,2})", named.name)
    if (named / "run.toml").is_file() or match is None or not (named.parent / "run.toml").is_file():
        return named, lane
    if lane not in (None, int(match[1])):
        raise ConfigError(f"--lane {lane}, but {named} is lane {match[1]}; omit one of the two")
    return named.parent, int(match[1])
