"""One summary of a run of several lanes: each lane's own, put together, and what the averaging between them took.

Every lane is summarised as a run of its own (`sim.reports.summary`). Losses of the whole are means over lanes, since
each lane has as much of the data; tokens, bytes and tokens/s are sums. Bytes of the averaging are no part of the ratio,
which compares a chain of stages with a dense one: they stand beside it, a token. `lanes` holds the figures by lane.

Lanes have to agree on every round: which of them gave something to it, and what. So a round whose digest differs
between two lanes is named: from then on they are not one model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lanes import lane_path, node_name
from .summary import AVERAGING, CONTEXT, faults_of, records_of, summary_of
from .wording import counted

OF_LANE = ("steps", "repeated_steps", "tokens", "first_loss", "train_loss", "val_loss", "train_s", "tokens_per_s")
OF_LANE += ("bytes", "bytes_per_token", "ratio")
JOINED = ("boundaries", "link_check", "lacking", "rollbacks")  # lists of entries, which then say their lane


def summarise_run(
    run: Path, *, lanes: int, stages: int, width: int, mode: str, of_steps: int | None = None
) -> dict[str, Any]:
    """The content of summary.json, of a run of any number of lanes; the rest as `summarise`, and what it raises."""
    paths = [lane_path(run, lane, lanes) for lane in range(lanes)]
    records = [records_of(path, stages) for path in paths]
    each = [
        summary_of(of_lane, path, width=width, mode=mode, of_steps=of_steps)
        for of_lane, path in zip(records, paths, strict=True)
    ]
    if lanes == 1:
        return each[0]
    sent: Counter[str] = Counter()
    for found in each:
        sent.update({kind: count for kind, count in found["bytes"].items() if kind != "total"})
    tokens, in_ratio = sum(found["tokens"] for found in each), sum(found["bytes"]["total"] for found in each)
    dense, lacks = sum(found["dense_bf16_bytes"] for found in each), any(found["lacking"] for found in each)
    # Lanes work beside each other; in one process they take turns.
    spent_s = [found["train_s"] for found in each]
    train_s = sum(spent_s) if mode == "one-process" else max(spent_s)
    timed = sorted(
        ((time_s, lane, fault) for lane, of_lane in enumerate(records) for time_s, fault in faults_of(of_lane)),
        key=lambda found: found[:2],
    )
    rows = {name: [{"lane": lane, **row} for lane, found in enumerate(each) for row in found[name]] for name in JOINED}
    rows["stages"] = [
        {"lane": lane, "stage": stage, **row}
        for lane, found in enumerate(each)
        for stage, row in enumerate(found["stages"])
    ]
    return {
        **each[0],
        **rows,
        "steps": min(found["steps"] for found in each),
        "completed": min(found["completed"] for found in each),
        "repeated_steps": sum(found["repeated_steps"] for found in each),
        "tokens": tokens,
        "tokens_per_step": sum(found["tokens_per_step"] for found in each),
        "first_loss": _mean([found["first_loss"] for found in each]),
        "train_loss": _mean([found["train_loss"] for found in each]),
        "val_loss": _mean([found["val_loss"] for found in each]),
        "loss_curve": _mean_curve([found["loss_curve"] for found in each]),
        "evaluations": _mean_curve([found["evaluations"] for found in each]),
        "train_s": train_s,
        "tokens_per_s": tokens / train_s,
        "bytes": {**dict(sorted(sent.items())), "total": in_ratio},
        "bytes_per_token": None if lacks else in_ratio / tokens,
        "dense_bf16_bytes": dense,
        "ratio": dense / in_ratio if in_ratio and not lacks else None,
        "context": _context(sent, tokens),
        "averaging": _averaging(records, sent[AVERAGING], tokens),
        "lanes": [{"lane": lane, **{name: found[name] for name in OF_LANE}} for lane, found in enumerate(each)],
        "faults": [{"lane": lane, **fault} for _, lane, fault in timed],
    }


def averaging_lines(summary: dict[str, Any]) -> list[str]:
    """For people: rounds on which lanes do not agree, and such as not all lanes took part in."""
    found = summary.get("averaging")
    if not found:
        return []
    lines = [
        f"stage {each['stage']}: lanes {', '.join(map(str, each['lanes']))} used different contributions in round "
        f"{each['round']}, so they are not one model from then on; begin again from a checkpoint before it"
        for each in found["disagreements"][:1]
    ]
    if not found["rounds"]:
        lines.append("no round is on record: the lanes have averaged nothing, and each is a model of its own")
    if found["incomplete_rounds"]:
        lines.append(f"{counted(found['incomplete_rounds'], 'round')} of {found['rounds']} without all lanes")
    return lines


def _averaging(records: Sequence[Sequence[Sequence[dict[str, Any]]]], sent: int, tokens: int) -> dict[str, Any]:
    """Of all lanes' and stages' records. Of a round that was used again after a rewind the newest record stands."""
    used: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}  # (round, stage) -> lane -> record
    waited: list[dict[str, Any]] = []
    for lane, of_lane in enumerate(records):
        for stage, of_node in enumerate(of_lane):
            rounds = [record for record in of_node if record["event"] == "round"]
            for record in rounds:
                used.setdefault((record["number"], stage), {})[lane] = record
            waited.append({"lane": lane, "stage": stage, "wait_s": sum(record["waited_s"] for record in rounds)})
    members = {number: set[int]() for number, _ in used}
    for (number, _), by_lane in used.items():
        members[number] |= {len(record["members"]) for record in by_lane.values()}
    return {
        "rounds": len(members),
        "incomplete_rounds": sum(min(counts) < len(records) for counts in members.values()),
        "disagreements": [
            {"round": number, "stage": stage, "lanes": sorted(by_lane)}
            for (number, stage), by_lane in sorted(used.items())
            if len({(record["digest"], *record["members"]) for record in by_lane.values()}) > 1
        ],
        "bytes": sent,
        "bytes_per_token": sent / tokens,
        "waited": waited,
    }


def _context(sent: Counter[str], tokens: int) -> dict[str, Any] | None:
    """Of lanes that hold chunks: what keys and values took, and their gradients; None for other lanes."""
    rows = {kind: sent[kind] for kind in CONTEXT}
    total = sum(rows.values())
    return {**rows, "bytes": total, "bytes_per_token": total / tokens} if total else None


def wait_words(summary: dict[str, Any]) -> str:
    """Which node waited longest for the others' contributions, and how long."""
    most = max(summary["averaging"]["waited"], key=lambda each: each["wait_s"])
    if not most["wait_s"]:
        return "-"
    return f"{most['wait_s']:.1f} s ({node_name(most['stage'], most['lane'], len(summary['lanes']))})"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[steps done, loss] where all lanes have one, in order."""
    by_step = [{point[0]: point[1] for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in by_step)))
    return [[step, sum(curve[step] for curve in by_step) / len(by_step)] for step in common]
