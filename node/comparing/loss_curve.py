"""Held-out loss against steps, tokens and bytes, and when a curve reaches a loss.

The **steps to a loss** are where the mean curve of all seeds first is at or below it, on straight lines between
evaluations. Before the first evaluation nothing is known, so the answer is never earlier than that; a curve that is
never there has no answer, which is an outcome and not an error. Why the mean curve and not the mean of each seed's
answer: half of the seeds of the worst recipe end above its own mean, and would have no answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sim.reports.lanes import lane_path
from ...sim.reports.summary import OUTSIDE_RATIO, read_records, steps_of, total_by_kind

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last one for all that are more, which
# makes an interval too wide by 4 % at most.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An evaluation, of all lanes together. sent_bytes: framed bytes of training until then, of all boundaries, both
    ways; what lanes average is no part of them."""

    step: int  # steps done
    tokens: int
    sent_bytes: float
    loss: float


def curve_of(run: Path, summary: dict[str, Any], stages: int, lanes: int = 1) -> list[Point]:
    """Of a run on record."""
    paths = [lane_path(run, lane, lanes) / f"stage-{stage}.jsonl" for lane in range(lanes) for stage in range(stages)]
    by_node = [steps_of(read_records(path)) for path in paths]
    points: list[Point] = []
    for done, loss in summary["evaluations"]:
        sent = total_by_kind(steps[done - 1] for steps in by_node)
        moved = sum(count for kind, count in sent.items() if kind not in OUTSIDE_RATIO)
        points.append(Point(step=done, tokens=done * summary["tokens_per_step"], sent_bytes=moved, loss=loss))
    return points


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Of runs that were evaluated at the same steps."""
    return [
        Point(
            step=each[0].step,
            tokens=each[0].tokens,
            sent_bytes=statistics.fmean(point.sent_bytes for point in each),
            loss=statistics.fmean(point.loss for point in each),
        )
        for each in zip(*curves, strict=True)
    ]


def steps_to(curve: Sequence[Point], loss: float) -> float | None:
    """The steps until the curve first is at or below `loss`; None: never."""
    before: Point | None = None
    for point in curve:
        if point.loss <= loss:
            if before is None or not math.isfinite(before.loss) or not math.isfinite(point.loss):
                return float(point.step)
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.step + share * (point.step - before.step)
        before = point
    return None


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean (Student's t); NaN for one value, and for what has none."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    quantile = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def over_first(losses: Sequence[float], first: Sequence[float]) -> list[float]:
    """By how many per cent each loss is above that of the first recipe with the same seed."""
    return [100 * (loss / base - 1) for loss, base in zip(losses, first, strict=True)]
