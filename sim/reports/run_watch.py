"""What a run is doing, from its records as they grow: steps done, lanes that were left out, nodes that found their
place again. For who does something to it at certain moments (`sim.launch.fault_injection`).

Each file is read from where the last look ended, so a look costs no more in a long run than in a short one.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from .lanes import lane_path
from .record_tail import RecordTail

RECENT = 10  # steps


class RunWatch:
    """All nodes of the run in `run`. lane_steps: how many steps each lane has done at most. rolled_back_s: by node, as
    numbered in a swarm, when it took part in a new generation last. step_seconds: of the newest steps."""

    def __init__(self, run: Path, *, lanes: int, stages: int) -> None:
        self.lane_steps = [0] * lanes
        self.rolled_back_s = [0.0] * (lanes * stages)
        self.step_seconds: deque[float] = deque(maxlen=RECENT)
        self._stages, self._rounds = stages, 0
        self._members: dict[int, tuple[float, list[int]]] = {}  # by lane: when it wrote last who they are
        self._tails = [
            RecordTail(lane_path(run, lane, lanes) / f"stage-{stage}.jsonl")
            for lane in range(lanes)
            for stage in range(stages)
        ]

    def look(self) -> None:
        """Read what is new."""
        for node, tail in enumerate(self._tails):
            for record in tail.read():
                self._take(node, record)

    @property
    def steps_done(self) -> int:
        """By the lane that is furthest."""
        return max(self.lane_steps)

    @property
    def progress(self) -> tuple[object, ...]:
        """Something else whenever any lane has done a step that it had not done before, or has used a round."""
        return (*self.lane_steps, self._rounds)

    def is_left_out(self, lane: int) -> bool:
        """Whether the others go on without that lane, by what one of them wrote last."""
        said = [found for by, found in self._members.items() if by != lane]
        return bool(said) and lane not in max(said, key=lambda found: found[0])[1]

    def _take(self, node: int, record: dict[str, Any]) -> None:
        lane, stage = divmod(node, self._stages)
        match record["event"]:
            case "step" if stage == 0:
                self.lane_steps[lane] = max(self.lane_steps[lane], record["step"] + 1)
                self.step_seconds.append(record["seconds"])
            case "round" if stage == 0:
                self._rounds += 1
            case "rollback":
                self.rolled_back_s[node] = record["time_s"]
            case "members":
                self._members[lane] = record["time_s"], record["members"]
            case _:
                pass
