"""A cell of a throughput benchmark: a swarm of real node processes over a link that is verified, and its figures.

A cell is one run at one codec, schedule, link and number of lanes. The first step warms up; then come three windows of
whole steps, and tokens/s has to agree between them, or it is no steady state. A cell counts only if each link was
probed and delivered what it was set to, and, where compute is emulated, if the machine kept up: a thread that sleeps
wakes up late on a machine that is too busy, and then the benchmark would measure the machine. Everything is read from
the records that the nodes write.

Where steps overlap, some more fill the pipeline before the windows, and as many after them have it run empty.

Where lanes average, a window is as many steps as lie between some rounds, so that each has as many of them. The warm-up
lasts until the first one can have been used, and the round of everything at the run's end is behind all windows.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports.lanes import between_lanes, is_lateral, lane_path
from ..reports.summary import AVERAGING, CONTEXT, OUTSIDE_RATIO, read_records, total_by_kind
from .fork_server import ForkServer
from .local_swarm import run_swarm

WARM_UP_STEPS = 1
OVERLAP_STEPS = 2  # more of them, and as many at the end, where steps overlap
WINDOWS = 3
STEADY_WITHIN = 0.03  # (fastest - slowest) / mean of the windows
CAP_WITHIN = 0.10
LATE_WITHIN = 0.03  # of the windows' time, so what it can have cost
CPU_WITHIN = 0.70  # of all cores: up to 0.6, cells agree with the plan; from 0.75 on they measure the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run. `window_steps`: steps of each window. `emulated`: stages sleep, so the pace has to be kept. `delay`: of
    the rounds of several lanes, in steps. `overlaps`: whether a step begins before the one before it has ended."""

    name: str
    stages: int
    window_steps: int
    emulated: bool
    lanes: int = 1
    delay: int = 0
    overlaps: bool = False

    @property
    def warm_up_steps(self) -> int:
        return WARM_UP_STEPS + self.delay + OVERLAP_STEPS * self.overlaps

    @property
    def steps(self) -> int:
        after = (self.lanes > 1) + OVERLAP_STEPS * self.overlaps
        return self.warm_up_steps + WINDOWS * self.window_steps + after


def run_cell(directory: Path, cell: Cell, forks: ForkServer | None = None) -> dict[str, Any]:
    """Run the swarm of `directory`/run.toml and measure it. forks: what its nodes are forked from. Raises SwarmError;
    ValueError for records that lack a step."""
    run_swarm(directory, stages=cell.stages, lanes=cell.lanes, forks=forks)
    return measure(directory, cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """What one node wrote. steps: from the last one of the warm-up to the last one of the windows."""

    lane: int
    stage: int
    steps: list[dict[str, Any]]
    links: list[dict[str, Any]]  # at its end
    checks: list[dict[str, Any]]
    peak_rss_bytes: int

    @property
    def wall_s(self) -> float:
        return self.steps[-1]["time_s"] - self.steps[0]["time_s"]

    def total(self, name: str) -> float:
        return sum(step[name] for step in self.steps[1:])

    def sent(self, name: str) -> Counter[str]:
        """Framed bytes of the link of that name in the windows, by kind."""
        before, after = (Counter(self.steps[at]["sent_bytes"][name]) for at in (0, -1))
        after.subtract(before)
        return after


def _read(directory: Path, cell: Cell, lane: int, stage: int) -> _Node:
    records = read_records(lane_path(directory, lane, cell.lanes) / f"stage-{stage}.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    ends = [record for record in records if record["event"] == "end"]
    if len(steps) != cell.steps or len(ends) != 1:
        raise ValueError(f"{directory} has not all of its {cell.steps} steps on record")
    first = cell.warm_up_steps - 1
    return _Node(
        lane=lane,
        stage=stage,
        steps=steps[first : first + WINDOWS * cell.window_steps + 1],
        links=ends[0]["links"],
        checks=[check for record in records if record["event"] == "ready" for check in record["link_check"]],
        peak_rss_bytes=ends[0]["peak_rss_bytes"],
    )


def measure(directory: Path, cell: Cell) -> dict[str, Any]:
    """The figures of a run on record, with `problems`: why they do not count, in words. tokens/s are of all lanes
    together, `stages` has means over lanes. Raises ValueError for records that lack a step."""
    nodes = [_read(directory, cell, lane, stage) for lane in range(cell.lanes) for stage in range(cell.stages)]
    heads = [node for node in nodes if node.stage == 0]
    tokens = cell.window_steps * heads[0].steps[0]["tokens"]
    windows = [sum(of_window) for of_window in zip(*(_windows(head, cell, tokens) for head in heads), strict=True)]
    wall_s = statistics.mean(head.wall_s for head in heads)
    all_tokens, sent = WINDOWS * tokens * cell.lanes, _moved(nodes)
    in_ratio = sum(count for kind, count in sent.items() if kind not in OUTSIDE_RATIO)
    cpu_s = sum(node.total("cpu_s") for node in nodes)

    def share(name: str, stage: int) -> float:
        return statistics.mean(node.total(name) for node in nodes if node.stage == stage) / wall_s

    checks = {
        (node.lane, check["boundary"], check["direction"]): check["measured_bits_per_s"]
        for node in nodes
        for check in node.checks
        if "boundary" in check
    }
    figures: dict[str, Any] = {
        "tokens_per_s": sum(WINDOWS * tokens / head.wall_s for head in heads),
        "windows": windows,
        "spread": (max(windows) - min(windows)) / statistics.mean(windows),
        "step_s": wall_s / (WINDOWS * cell.window_steps),
        "bytes_per_token": in_ratio / all_tokens,
        "averaging_bytes_per_token": sent[AVERAGING] / all_tokens,
        "context_bytes_per_token": sum(sent[kind] for kind in CONTEXT) / all_tokens,
        "stages": [
            {name: share(name, stage) for name in ("compute_s", "codec_s", "wait_s", "cpu_s")}
            for stage in range(cell.stages)
        ],
        "peak_rss_bytes": [node.peak_rss_bytes for node in nodes],
        "links": [_link(link, checks, node, wall_s) for node in nodes for link in node.links],
        "cpu_s_per_gb": cpu_s / ((in_ratio + sum(sent[kind] for kind in (AVERAGING, *CONTEXT))) / 1e9),
        "cpu_share": cpu_s / wall_s / (os.cpu_count() or 1),
    }
    if cell.emulated:
        figures["late_share"] = max(sum(step["codec"]["late_s"] for step in node.steps[1:]) for node in nodes) / wall_s
    used = [link["utilisation"] for link in figures["links"] if link["utilisation"] is not None]
    figures["utilisation"] = max(used, default=None)
    figures["problems"] = list(_problems(figures, cell))
    return figures


def _windows(head: _Node, cell: Cell, tokens: int) -> list[float]:
    """tokens/s of one lane in each window."""
    marks = [head.steps[window * cell.window_steps]["time_s"] for window in range(WINDOWS + 1)]
    return [tokens / (after - before) for before, after in itertools.pairwise(marks)]


def _moved(nodes: list[_Node]) -> Counter[str]:
    """Framed bytes that all nodes sent in the windows, by kind."""
    sent = total_by_kind(node.steps[-1] for node in nodes)
    sent.subtract(total_by_kind(node.steps[0] for node in nodes))
    return sent


def _link(
    link: dict[str, Any], checks: dict[tuple[int, int, str], float | None], node: _Node, wall_s: float
) -> dict[str, Any]:
    """One direction of a boundary, or of a link between lanes, in the windows. checks: what the probes at the start
    measured, of boundaries."""
    rate = link["configured_bits_per_s"]
    if (peer := link.get("peer_lane")) is not None:
        one, other = sorted((node.lane, peer))
        name = f"{between_lanes(link)} {node.stage}: lane {one}-{other}"
        where = {"lane": node.lane, "peer_lane": peer, "stage": node.stage}
        probed = {}
    else:
        boundary, direction = link["boundary"], link["direction"]
        name = f"boundary {boundary}-{boundary + 1}"
        where = {"lane": node.lane, "boundary": boundary, "direction": direction}
        probed = {"measured_bits_per_s": checks.get((node.lane, boundary, direction))}
    lateral = "peer_lane" in link
    outside = set(OUTSIDE_RATIO) - set(CONTEXT) if lateral and not is_lateral(name) else OUTSIDE_RATIO
    moved = sum(count for kind, count in node.sent(name).items() if is_lateral(name) or kind not in outside)
    return {
        **where,
        "name": name if lateral else f"{name} {link['direction']}",
        "configured_bits_per_s": rate,
        **probed,
        "busy_bits_per_s": link["measured_bits_per_s"],
        "utilisation": moved * 8 / (rate * wall_s) if rate else None,
    }


def _problems(figures: dict[str, Any], cell: Cell) -> Any:
    if figures["spread"] > STEADY_WITHIN:
        yield f"no steady state: windows differ by {figures['spread']:.1%}, {STEADY_WITHIN:.0%} are allowed"
    for link in figures["links"]:
        configured, busy = link["configured_bits_per_s"], link["busy_bits_per_s"]
        if not configured:
            continue
        name = link["name"] if cell.lanes == 1 or "peer_lane" in link else f"{link['name']} of lane {link['lane']}"
        measured = link.get("measured_bits_per_s", configured)  # lateral links are not probed
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
