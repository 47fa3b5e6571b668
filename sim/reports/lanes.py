"""What reports have to know of lanes: where the records of each are, what nodes and links of them are called.

A lane is a whole chain of stages with its own part of the data. In the directory of a run of several, each lane has a
directory `lane-N` with what a run of one lane has in its own: records, logs, checkpoints. What is of the run as a whole
(settings, summary, lock, text) stands once, above them. So all that reads or writes one chain works on one directory,
however many lanes there are, and a run of one lane looks as if there were no such thing.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from ...protocol.grid_place import LANES_MAX
from .quantities import lane_number

LATERAL, CONTEXT_LINK = "lateral", "context"
_BETWEEN_LANES = re.compile(
    r"(?:lateral|context) (?P<stage>[0-9]{1,4}): lane (?P<one>[0-9]{1,2})-(?P<other>[0-9]{1,2})"
)


def lane_path(run: Path, lane: int, lanes: int) -> Path:
    """Where lane `lane` of the run in `run` keeps its records."""
    return run if lanes == 1 else run / lane_directory(lane)


def lane_directory(lane: int) -> str:
    """What a lane's directory is called in that of a run of several."""
    return f"lane-{lane}"


def lanes_of(run: Path) -> int:
    """How many the run has, by its run.toml; 1 where that does not say it."""
    try:
        tree = tomllib.loads((run / "run.toml").read_text(encoding="utf-8"))
        return lane_number(tree["lanes"]["count"] - 1) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def node_name(stage: int, lane: int, lanes: int) -> str:
    """`stage 2`, and where there are several lanes `stage 2 of lane 0`."""
    return f"stage {stage}" if lanes == 1 else f"stage {stage} of lane {lane}"


def is_lateral(name: str) -> bool:
    """Whether a link of that name joins two lanes, as `lateral 2: lane 0-1` does, and not two stages."""
    return name.startswith("lateral ")


def between_lanes(link: dict[str, Any]) -> str | None:
    """Which kind of link between lanes the record of one is about; None: it joins two stages. Raises ValueError for
    one that is not known."""
    if "peer_lane" not in link:
        return None
    kind = str(link.get("direction", LATERAL))
    if kind not in (LATERAL, CONTEXT_LINK):
        raise ValueError(kind)
    return kind


def context_link_name(stage: int, lane: int, other: int) -> str:
    """Of the link by which two lanes exchange keys and values at that stage: `context 2: lane 0-1`."""
    return f"context {stage}: lane {min(lane, other)}-{max(lane, other)}"


def is_context(name: str) -> bool:
    """Whether a link of that name carries keys and values between two lanes, as `context 2: lane 0-1` does."""
    return name.startswith("context ")


def other_lane(name: str, own: int) -> int:
    """The lane at the other end of the lateral or context link of that name. Raises ValueError for what is none of lane
    `own`."""
    found = _BETWEEN_LANES.fullmatch(name)
    ends = [lane_number(int(found[end])) for end in ("one", "other")] if found else []
    if own not in ends or ends[0] == ends[1]:
        kind = CONTEXT_LINK if is_context(name) else LATERAL
        raise ValueError(f"'{name}' is no {kind} link of lane {own}, of {LANES_MAX} lanes at most")
    return ends[1 - ends.index(own)]
