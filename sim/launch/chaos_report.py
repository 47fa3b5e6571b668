"""What a disturbed run shows: how long it took to recover from each fault, and whether it came out as it had to.

A run of one lane is compared with the same run undisturbed. Of several lanes, some may have been left out of rounds,
which changes the sums of all. So what it has to come out as is what one process makes of the log of members
(`sim.reports.recomputation`); where nobody was left out, that is the undisturbed run.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ..reports.lanes import lane_path
from ..reports.summary import read_records, steps_of
from .swarm_keeper import Grid, Injected, Story

LOSSES = ("kill", "twice", "sleeper", "disk")  # of a process


def measure(run: Path, story: Story, grid: Grid) -> None:
    """Fill in, from the records, when the run had recovered from each fault."""
    records = [
        read_records(lane_path(run, lane, grid.lanes) / f"stage-{stage}.jsonl")
        for lane in range(grid.lanes)
        for stage in range(grid.stages)
    ]
    steps = sorted(
        (record["time_s"], record["step"])
        for lane in range(grid.lanes)
        for record in records[grid.nodes(lane)[0]]
        if record["event"] == "step"
    )
    for injected in story.injected:
        found = [
            min(
                (r["time_s"] for r in records[node] if r["event"] == "rollback" and r["time_s"] > injected.at_s),
                default=None,
            )
            for node in _lost(injected, grid)
        ]
        injected.back_s = max((moment for moment in found if moment is not None), default=injected.at_s)
        injected.progress_s = next(
            (moment for moment, step in steps if step >= injected.step and moment > injected.back_s), None
        )


def _lost(injected: Injected, grid: Grid) -> list[int]:
    """The nodes whose processes were."""
    kind, node = injected.fault.kind, grid.nodes(injected.lane)[injected.fault.stage]
    if kind == "lane":
        return list(grid.nodes(injected.lane))
    if kind == "twice":
        return [node, injected.fault.second]
    return [node] if kind in ("kill", "sleeper", "disk", "absent") else []


def report(run: Path, undisturbed: Path, story: Story, *, stages: int) -> dict[str, Any]:
    """What happened, and whether the two runs, of one lane, ended alike: the content of chaos.json."""
    measure(run, story, Grid(stages=stages))
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run, undisturbed))
    losses, expected = (
        {r["step"]: r["loss"] for r in steps_of(read_records(each / "stage-0.jsonl"))} for each in (run, undisturbed)
    )
    done = [r for r in read_records(run / "stage-0.jsonl") if r["event"] == "step"]
    alone = [r for r in read_records(undisturbed / "stage-0.jsonl") if r["event"] == "step"]
    step_s = statistics.median(r["seconds"] for r in alone)
    seconds = done[-1]["time_s"] - done[0]["time_s"] if done else 0.0
    undisturbed_s = alone[-1]["time_s"] - alone[0]["time_s"]
    return {
        "stages": stages,
        "steps": len(losses),
        "faults": _counted(story),
        "generations": 1 + max((r["generation"] for r in ours["rollbacks"]), default=0),
        "fenced": story.fenced,
        "steps_replayed": len(done) - len(losses),
        "step_s": step_s,
        "seconds": seconds,
        "seconds_undisturbed": undisturbed_s,
        "throughput_share": undisturbed_s / seconds if seconds else None,
        **_recovery(story, step_s),
        "losses_equal": losses == expected,
        "val_loss_equal": ours["val_loss"] == theirs["val_loss"],
        "state_equal": [
            a["state_sha256"] == b["state_sha256"] for a, b in zip(ours["stages"], theirs["stages"], strict=True)
        ],
    }


def report_lanes(run: Path, recomputed: dict[str, Any], story: Story, grid: Grid) -> dict[str, Any]:
    """The same of a run of several lanes. recomputed: what `node.recomputed_run` says of it."""
    measure(run, story, grid)
    done = [
        record
        for lane in range(grid.lanes)
        for record in read_records(lane_path(run, lane, grid.lanes) / "stage-0.jsonl")
        if record["event"] in ("step", "rollback")
    ]
    steps = [record for record in done if record["event"] == "step"]
    step_s = statistics.median(record["seconds"] for record in steps)
    began_s = min(record["time_s"] for record in steps)
    return {
        "stages": grid.stages,
        "lanes": grid.lanes,
        "steps": 1 + max(record["step"] for record in steps),
        "faults": _counted(story),
        "injected": [
            {
                "kind": each.fault.kind,
                "where": each.fault.where(grid.lanes, each.lane),
                "lane": each.lane,
                "step": each.step,
                "seconds": round(each.at_s - began_s, 3),
                "left_out": each.left_out,
                "to_progress_s": each.progress_s and round(each.progress_s - each.at_s, 3),
            }
            for each in story.injected
        ],
        "generations": 1 + max((r["generation"] for r in done if r["event"] == "rollback"), default=0),
        "fenced": story.fenced,
        "away_at_the_end": story.away,
        "step_s": step_s,
        "seconds": max(record["time_s"] for record in steps) - began_s,
        **_recovery(story, step_s),
        "recomputed": recomputed,
    }


def _counted(story: Story) -> dict[str, int]:
    return dict(Counter(injected.fault.kind for injected in story.injected))


def _recovery(story: Story, step_s: float) -> dict[str, Any]:
    lost = [i for i in story.injected if i.progress_s is not None and i.fault.kind in LOSSES]
    waits = [(i.progress_s or 0) - (i.back_s or 0) for i in lost]
    wholes = [(i.progress_s or 0) - i.at_s for i in lost]
    return {
        "back_to_progress_s": _spread(waits),
        "fault_to_progress_s": _spread(wholes),
        "back_to_progress_steps": _spread([wait / step_s for wait in waits]),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "worst": max(values)} if values else None


def survived(report: dict[str, Any]) -> bool:
    """Whether nothing was lost: all came out as it had to, and of several lanes each that was not away at the end."""
    if again := report.get("recomputed"):
        missing = {each["lane"] for each in again["lanes"] if not each["ended"] or each["apart"] is not None}
        return bool(again["equal"]) and missing <= set(report["away_at_the_end"])
    return bool(report["losses_equal"] and report["val_loss_equal"] and all(report["state_equal"]))
