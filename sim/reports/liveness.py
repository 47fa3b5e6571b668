"""Whether a run goes on, has ended, or was broken off: what its records and this machine's processes say of it.

A run has ended when the newest process of every stage wrote its end. It is under way while anybody can still write: the
process that a stage's records name is there, or, where that is on another machine, its records are recent. Everything
else has not ended, and only `--resume` brings it further. Why not the lock of whoever trains there: nodes that were
started by hand hold none, and another machine's disk may know no locks; records name machine and process anyway.
`thinpipe top` judges each stage by the same rules (`sim.reports.top_data`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .lanes import node_name
from .top_data import OVER, StageView, TopError, directories

State = Literal["not begun", "under way", "ended", "not ended"]
STARTING_S = 1800.0  # without a record: a node elsewhere that is only starting says nothing for long


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """completed: steps that every stage has done, of `steps` (None: not known). stages: {"stage", "state", "completed",
    "note"} each, where there is anything to say; state is as in `thinpipe top`, or "no records". In a run of several
    lanes each has its "lane" too, and those of lane 0 come first."""

    state: State
    completed: int
    steps: int | None
    stages: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"state": self.state, "completed": self.completed, "steps": self.steps, "stages": self.stages}

    def line(self) -> str:
        """For people: `is under way, after 120 of 2000 steps (stage 0 training, stage 1 training)`. Of several lanes
        each has its words: `(lane 0 ended; lane 1: stage 0 ended, stage 1 training)`."""
        if self.state == "not begun":
            return "has not begun: no stage has records here"
        words = {
            "under way": "is under way",
            "ended": "has ended",
            "not ended": "has not ended, and nobody works on it",
        }
        of = "" if self.steps is None else f" of {self.steps}"
        lanes = sorted({stage["lane"] for stage in self.stages if "lane" in stage})
        of_lanes = [(f"lane {lane}", [stage for stage in self.stages if stage["lane"] == lane]) for lane in lanes]
        told = "; ".join(_of_lane(*each) for each in of_lanes) if lanes else _each(self.stages)
        return f"{words[self.state]}, after {self.completed}{of} steps ({told})"


def liveness(run: Path, now_s: float) -> Liveness:
    """Of the run whose run.toml and records are in `run`; now_s: seconds since 1970. Changes nothing."""
    try:
        swarms = [directory.look(now_s) for directory in directories(run)]
    except TopError:
        return Liveness(state="not begun", completed=0, steps=None, stages=[])
    rows = [
        {**({"lane": lane} if len(swarms) > 1 else {}), **_row(stage, swarm.stages.get(stage))}
        for lane, swarm in enumerate(swarms)
        for stage in range(max(each.size for each in swarms))
    ]
    seen = [each for swarm in swarms for each in swarm.stages.values()]
    if not seen:
        state: State = "not begun"
    elif all(row["state"] == "ended" for row in rows):
        state = "ended"
    else:
        state = "under way" if any(_works(each, now_s) for each in seen) else "not ended"
    steps = max((each.figures.steps or 0 for each in seen), default=0) or None
    return Liveness(state=state, completed=min((row["completed"] for row in rows), default=0), steps=steps, stages=rows)


def served_here(run: Path, now_s: float) -> dict[str, int]:
    """The stages that processes of this machine serve, by name, and which do, as far as records say. Changes
    nothing."""
    try:
        swarms = [directory.look(now_s) for directory in directories(run)]
    except TopError:
        return {}
    return {
        node_name(stage, lane, len(swarms)): seen.figures.process
        for lane, swarm in enumerate(swarms)
        for stage, seen in sorted(swarm.stages.items())
        if seen.here and seen.state not in OVER and seen.figures.process
    }


def _each(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"stage {row['stage']} {row['state']}" + (f": {row['note']}" if row["note"] else "") for row in rows
    )


def _of_lane(name: str, rows: list[dict[str, Any]]) -> str:
    states = {(row["state"], row["note"]) for row in rows}
    return f"{name} {rows[0]['state']}" if len(states) == 1 and not rows[0]["note"] else f"{name}: {_each(rows)}"


def _row(stage: int, seen: StageView | None) -> dict[str, Any]:
    if seen is None:
        return {"stage": stage, "state": "no records", "completed": 0, "note": ""}
    return {"stage": stage, "state": seen.state, "completed": seen.figures.completed, "note": seen.note}


def _works(seen: StageView, now_s: float) -> bool:
    """Whether somebody may write more. A process here that is silent may be paused: it is there."""
    if seen.state in OVER or seen.figures.last_record_s is None:
        return False
    if seen.here:
        return True
    silent_s = now_s - seen.figures.last_record_s
    return not seen.note and not (seen.state == "starting" and silent_s > STARTING_S)
