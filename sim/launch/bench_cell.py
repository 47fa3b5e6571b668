"""A cell of a throughput benchmark: a swarm of real node processes over a link that is verified, and its figures.

A cell is one run at one codec, schedule and link. The first step warms up; then come three windows of whole steps, and
tokens/s has to agree between them, or it is no steady state. A cell counts only if each link was probed and delivered
what it was set to, and, where compute is emulated, if the machine kept up: a thread that sleeps wakes up late on
a machine that is too busy, and then the benchmark would measure the machine. Everything is read from the records that
the nodes write.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports.summary import OUTSIDE_RATIO, read_records, total_by_kind
from .local_swarm import run_swarm

WARM_UP_STEPS = 1
WINDOWS = 3
STEADY_WITHIN = 0.03  # (fastest - slowest) / mean of the windows
CAP_WITHIN = 0.10
LATE_WITHIN = 0.03  # of the windows' time, so what it can have cost
CPU_WITHIN = 0.70  # of all cores: up to 0.6, cells agree with the plan; from 0.75 on they measure the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run. `window_steps`: steps of each window. `emulated`: stages sleep, so the pace has to be kept."""

    name: str
    stages: int
    window_steps: int
    emulated: bool

    @property
    def steps(self) -> int:
        return WARM_UP_STEPS + WINDOWS * self.window_steps


def run_cell(directory: Path, cell: Cell) -> dict[str, Any]:
    """Run the swarm of `directory`/run.toml and measure it. Raises SwarmError; ValueError for records that lack a
    step."""
    run_swarm(directory, stages=cell.stages)
    return measure(directory, cell)


def measure(directory: Path, cell: Cell) -> dict[str, Any]:
    """The figures of a run on record, with `problems`: why they do not count, in words."""
    records = [read_records(directory / f"stage-{stage}.jsonl") for stage in range(cell.stages)]
    steps = [[record for record in of if record["event"] == "step"] for of in records]
    ends = [record for of in records for record in of if record["event"] == "end"]
    checks = {
        (check["boundary"], check["direction"]): check["measured_bits_per_s"]
        for of in records
        for record in of
        if record["event"] == "ready"
        for check in record["link_check"]
    }
    if any(len(of) != cell.steps for of in steps) or len(ends) != cell.stages:
        raise ValueError(f"{directory} has not all of its {cell.steps} steps on record")
    head, first = steps[0], WARM_UP_STEPS - 1
    marks = [head[first + window * cell.window_steps]["time_s"] for window in range(WINDOWS + 1)]
    tokens = cell.window_steps * head[0]["tokens"]
    windows = [tokens / (after - before) for before, after in itertools.pairwise(marks)]
    wall_s = marks[-1] - marks[0]
    kept = [of[WARM_UP_STEPS:] for of in steps]

    def total(name: str, stage: int) -> float:
        return sum(step[name] for step in kept[stage])

    figures: dict[str, Any] = {
        "tokens_per_s": WINDOWS * tokens / wall_s,
        "windows": windows,
        "spread": (max(windows) - min(windows)) / statistics.mean(windows),
        "step_s": wall_s / (WINDOWS * cell.window_steps),
        "bytes_per_token": _moved(steps, first) / (WINDOWS * tokens),
        "stages": [
            {name: total(name, stage) / wall_s for name in ("compute_s", "codec_s", "wait_s", "cpu_s")}
            for stage in range(cell.stages)
        ],
        "peak_rss_bytes": [end["peak_rss_bytes"] for end in ends],
        "links": [_link(link, checks, steps, first, wall_s) for end in ends for link in end["links"]],
    }
    moved_gb = figures["bytes_per_token"] * WINDOWS * tokens / 1e9
    figures["cpu_s_per_gb"] = sum(stage["cpu_s"] for stage in figures["stages"]) * wall_s / moved_gb
    figures["cpu_share"] = sum(stage["cpu_s"] for stage in figures["stages"]) / (os.cpu_count() or 1)
    if cell.emulated:
        figures["late_share"] = max(sum(step["codec"]["late_s"] for step in of) for of in kept) / wall_s
    used = [link["utilisation"] for link in figures["links"] if link["utilisation"] is not None]
    figures["utilisation"] = max(used, default=None)
    figures["problems"] = list(_problems(figures, cell))
    return figures


def _moved(steps: list[list[dict[str, Any]]], first: int) -> int:
    """Framed bytes of training that all stages sent in the windows."""

    def counted(records: list[dict[str, Any]]) -> Counter[str]:
        return total_by_kind(records)

    sent = counted([of[-1] for of in steps])
    sent.subtract(counted([of[first] for of in steps]))
    return sum(count for kind, count in sent.items() if kind not in OUTSIDE_RATIO)


def _link(
    link: dict[str, Any],
    checks: dict[tuple[int, str], float | None],
    steps: list[list[dict[str, Any]]],
    first: int,
    wall_s: float,
) -> dict[str, Any]:
    """One direction of a boundary in the windows. checks: what the probes at the start measured."""
    boundary, rate = link["boundary"], link["configured_bits_per_s"]
    sender = boundary if link["direction"] == "forward" else boundary + 1
    name = f"boundary {boundary}-{boundary + 1}"
    before, after = (steps[sender][at]["sent_bytes"][name] for at in (first, -1))
    moved = sum(count - before.get(kind, 0) for kind, count in after.items() if kind not in OUTSIDE_RATIO)
    return {
        "boundary": boundary,
        "direction": link["direction"],
        "configured_bits_per_s": rate,
        "measured_bits_per_s": checks.get((boundary, link["direction"])),
        "busy_bits_per_s": link["measured_bits_per_s"],
        "utilisation": moved * 8 / (rate * wall_s) if rate else None,
    }


def _problems(figures: dict[str, Any], cell: Cell) -> Any:
    if figures["spread"] > STEADY_WITHIN:
        yield f"no steady state: windows differ by {figures['spread']:.1%}, {STEADY_WITHIN:.0%} are allowed"
    for link in figures["links"]:
        configured, measured, busy = (link[f"{name}_bits_per_s"] for name in ("configured", "measured", "busy"))
        if not configured:
            continue
        name = f"boundary {link['boundary']}-{link['boundary'] + 1} {link['direction']}"
        if measured is None or abs(measured / configured - 1) > CAP_WITHIN:
            found = "nothing" if measured is None else f"{measured / 1e6:.1f} Mb/s"
            yield f"{name}: the probe measured {found}, the link is set to {configured / 1e6:.1f} Mb/s"
        if busy and busy / configured - 1 > CAP_WITHIN:
            yield f"{name}: {busy / 1e6:.1f} Mb/s passed, the link is set to {configured / 1e6:.1f} Mb/s"
    if not cell.emulated:
        return
    if figures["late_share"] > LATE_WITHIN:
        yield f"the machine did not keep the pace: compute was late for {figures['late_share']:.1%} of the time"
    if figures["cpu_share"] > CPU_WITHIN:
        yield f"the machine did not keep the pace: {figures['cpu_share']:.0%} of its cores were busy"
