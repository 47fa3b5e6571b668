"""A place in the grid of a run: one stage of one lane, which one node serves.

Both numbers travel together wherever it is asked who may be somewhere (certificates) or who is (the DHT): a stage alone
names as many nodes as there are lanes. In a run of one lane that is lane 0.
"""

from __future__ import annotations

from typing import NamedTuple

LANES_MAX = 64  # of a run


class GridPlace(NamedTuple):
    stage: int
    lane: int = 0


def grid(stages: int, lanes: int) -> list[GridPlace]:
    """All places of a run, lane after lane."""
    return [GridPlace(stage, lane) for lane in range(lanes) for stage in range(stages)]
