"""What ran when, on every stage: one trace file for a viewer, one picture for a reader, one figure for the overlap.

Each node writes its spans in the Chrome trace format on the machine's monotonic clock, so the traces of a local swarm
merge by concatenation (open `trace.json` at ui.perfetto.dev). Why not a sampling profiler: the question is which
message was on the wire while which microbatch was computed, and only the code that moves them knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


def merge(run: Path, stages: int) -> list[dict[str, Any]]:
    """All stages' events as one list, also written to `run`/trace.json."""
    events: list[dict[str, Any]] = []
    for stage in range(stages):
        events.append({"name": "process_name", "ph": "M", "pid": stage, "args": {"name": f"stage {stage}"}})
        events += json.loads((run / f"trace-stage-{stage}.json").read_text())["traceEvents"]
    (run / "trace.json").write_text(json.dumps({"traceEvents": events}))
    return events


def spans(events: Iterable[dict[str, Any]], *, stage: int, lane: str) -> list[dict[str, Any]]:
    """Spans of one stage in the lanes whose name starts with `lane`, by start."""
    found = [e for e in events if e["ph"] == "X" and e["pid"] == stage and e["tid"].startswith(lane)]
    return sorted(found, key=lambda event: event["ts"])


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(one: list[Interval], other: list[Interval]) -> float:
    """Length of the time that lies in both; each list disjoint and sorted."""
    total, index = 0.0, 0
    for start, end in one:
        while index < len(other) and other[index][1] <= start:
            index += 1
        look = index
        while look < len(other) and other[look][0] < end:
            total += min(end, other[look][1]) - max(start, other[look][0])
            look += 1
    return total


def overlap(events: list[dict[str, Any]], stage: int) -> tuple[float, float]:
    """(seconds in which this stage's link was carrying something, share of them in which the stage also computed)."""

    def cover(lane: str) -> list[Interval]:
        return union((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in spans(events, stage=stage, lane=lane))

    sending, computing = cover("boundary"), cover("compute")
    on_the_wire_s = sum(end - start for start, end in sending)
    return on_the_wire_s, (common(sending, computing) / on_the_wire_s if on_the_wire_s else 0.0)


COLOURS = {
    "forward": "#4477aa",
    "backward": "#ee6677",
    "input gradient": "#ee99aa",
    "weight gradient": "#994455",
    "optimizer": "#228833",
    "evaluate": "#bbbbbb",
}


def draw(events: list[dict[str, Any]], stages: int, path: Path, *, window_s: float = 4.0) -> None:
    """A timeline: each stage's compute above what it has on the wire; `window_s` seconds from the middle of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    steps = [e for e in events if e["ph"] == "X" and e["name"] == "optimizer step" and e["pid"] == 0]
    middle = steps[len(steps) // 2]["ts"] if steps else min(e["ts"] for e in events if e["ph"] == "X")
    figure, axes = plt.subplots(figsize=(14, 1 + 1.1 * stages), layout="constrained")
    for stage in range(stages):
        row = stages - 1 - stage
        # One call a colour: matplotlib takes minutes over some ten thousand bars of their own.
        bars: dict[tuple[str, float, float], list[tuple[float, float]]] = {}
        for event in spans(events, stage=stage, lane="compute"):
            colour = next((COLOURS[kind] for kind in COLOURS if event["name"].startswith(kind)), "#999999")
            bars.setdefault((colour, row + 0.45, 0.4), []).append(_bar(event, middle))
        for event in spans(events, stage=stage, lane="boundary"):
            down = event["tid"] == f"boundary {stage}-{stage + 1}"
            colour, low = ("#66ccee", row + 0.22) if down else ("#ccbb44", row)
            bars.setdefault((colour, low, 0.2), []).append(_bar(event, middle))
        for (colour, low, height), found in bars.items():
            shown = [(start, length) for start, length in found if start < window_s and start + length > 0]
            looks: dict[str, Any] = {"edgecolors": "white", "lw": 0.2} if height > 0.2 else {"alpha": 0.7}
            if shown:
                axes.broken_barh(shown, (low, height), facecolors=colour, **looks)
    axes.set_xlim(0, window_s)
    axes.set_yticks([stages - 1 - stage + 0.5 for stage in range(stages)], [f"stage {s}" for s in range(stages)])
    axes.set_xlabel("seconds")
    handles = [Patch(color=colour) for colour in [*COLOURS.values(), "#66ccee", "#ccbb44"]]
    labels = [*COLOURS, "sending down", "sending up"]
    axes.legend(handles, labels, ncols=len(labels), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(event: dict[str, Any], origin_us: float) -> tuple[float, float]:
    return (event["ts"] - origin_us) / 1e6, event["dur"] / 1e6
