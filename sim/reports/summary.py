"""From the nodes' records to one summary. Reads JSON lines, writes `summary.json`, invents nothing.

The ratio is always `dense bf16 bytes, both ways / all framed bytes, both ways`: the numerator is what an uncompressed
pipeline would have to move (2 bytes x width x tokens x 2 directions x boundaries), the denominator everything that the
nodes sent in training: tensors, token ids, envelopes, acknowledgements, HTTP/2 framing, resent frames; also what was
sent in vain, for steps that a rewind took back (`repeated_steps`). Evaluation, the probe at the start and all that
lanes send each other (`averaging`, and of lanes that hold chunks `context`) have rows of their own outside the ratio: a
dense pipeline would send none of it.
Bytes are counted once, where they are sent. A run of several lanes: `sim.reports.lanes_summary`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .lanes import CONTEXT_LINK, LATERAL, between_lanes, is_context, is_lateral, node_name
from .wording import counted

CURVE_POINTS = 200
AVERAGING = "averaging"
CONTEXT = ("context", "context_gradient")  # keys and values between the chunks of sequences, and what comes back
OUTSIDE_RATIO = ("evaluation", "probe", "checkpoint_copy", AVERAGING, *CONTEXT)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of one stage's file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def mode_of(run: Path) -> Literal["swarm", "one-process"] | None:
    """Who made the records of the stages of one lane: the nodes of a swarm, which first of all say where they listen,
    or one process for all stages, which begins with the text. None where they do not tell."""
    head = next(iter(read_records(run / "stage-0.jsonl")), {}).get("event")
    return "swarm" if head == "start" else "one-process" if head == "data" else None


def dense_bytes(*, width: int, tokens: int, stages: int) -> int:
    """What an uncompressed bf16 pipeline moves, both ways, over all boundaries."""
    return dense_bytes_one_way(width=width, tokens=tokens) * 2 * (stages - 1)


def dense_bytes_one_way(*, width: int, tokens: int) -> int:
    """The same over one boundary in one direction: bf16 is two bytes."""
    return 2 * width * tokens


def total_by_kind(records: Iterable[dict[str, Any]]) -> Counter[str]:
    """Sum of the newest `sent_bytes` of several stages' records; they are running totals."""
    total: Counter[str] = Counter()
    for record in records:
        for name, rows in record["sent_bytes"].items():
            total.update(_rows(rows, LATERAL if is_lateral(name) else CONTEXT_LINK if is_context(name) else None))
    return total


def _rows(rows: dict[str, int], between: str | None) -> dict[str, int]:
    """Bytes by kind. between: what kind of link between lanes it is, if one; whatever crosses a lateral link is there
    for the averaging, the acknowledgements too; and of a context link for keys and values, but for what has a row."""
    if between is None:
        return rows
    if between == LATERAL:
        return {AVERAGING: sum(rows.values())}
    apart = {kind: count for kind, count in rows.items() if kind in OUTSIDE_RATIO and kind != CONTEXT[0]}
    return {CONTEXT[0]: sum(rows.values()) - sum(apart.values()), **apart}


def steps_of(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step records that count, in order: each step's newest, and none past the end. (A step that was gone back
    behind may be done again and recorded, or be taken up from an older generation's checkpoint, which has the same
    bits.)"""
    done: dict[int, dict[str, Any]] = {}
    end: int | None = None
    for record in records:
        if record["event"] == "start":
            end = None  # of an earlier life
        elif record["event"] == "step":
            done[record["step"]] = record
        elif record["event"] == "end":
            end = record["steps"]
    return [done[step] for step in sorted(done) if end is None or step < end]


def sent_by(records: Iterable[dict[str, Any]]) -> Counter[str]:
    """Bytes by kind that all the processes sent that wrote `records`, one after the other: each counts from zero, and
    of one that was lost the newest count stands."""
    total: Counter[str] = Counter()
    newest: Counter[str] = Counter()
    for record in records:
        if record["event"] == "start":
            total.update(newest)
            newest = Counter()
        elif record["event"] == "step":
            newest = total_by_kind([record])
        elif record["event"] == "end":
            newest = Counter()
            for link in record["links"]:
                newest.update(_rows(link["sent_bytes"], between_lanes(link)))
    total.update(newest)
    return total


def end_of(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """How the newest of the processes that wrote `records` ended the run; None while it has not."""
    end: dict[str, Any] | None = None
    for record in records:
        if record["event"] in ("start", "end"):
            end = record if record["event"] == "end" else None
    return end


def loss_curve(steps: list[dict[str, Any]]) -> list[list[float]]:
    """[steps done, loss] of the records, in order; of a long run the means of CURVE_POINTS stretches, at their ends."""
    count = min(len(steps), CURVE_POINTS)
    edges = [index * len(steps) // count for index in range(count + 1)] if count else []
    stretches = [steps[start:end] for start, end in itertools.pairwise(edges)]
    return [[part[-1]["step"] + 1, sum(record["loss"] for record in part) / len(part)] for part in stretches]


def lacking(steps: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The stages whose records have fewer steps than were done: those of a process before them stayed on a machine
    that was lost, and with them what it sent."""
    done = {record["step"] for of_stage in steps for record in of_stage}
    return [
        {
            "stage": stage,
            "first_step": of_stage[0]["step"] if of_stage else None,
            "steps": len(of_stage),
            "of_steps": len(done),
        }
        for stage, of_stage in enumerate(steps)
        if len(of_stage) < len(done)
    ]


def name_of(summary: dict[str, Any], entry: dict[str, Any]) -> str:
    """Of the node that an entry of the summary is about: `stage 2`, or `stage 2 of lane 0`."""
    return node_name(entry["stage"], entry.get("lane", 0), len(summary.get("lanes", [None])))


def lacking_lines(summary: dict[str, Any]) -> list[str]:
    """For people, who count steps from 1; one a stage."""
    return [
        f"{name_of(summary, found)}: its records have {found['steps']} of {found['of_steps']} steps"
        + ("" if found["first_step"] is None else f", the first is step {found['first_step'] + 1}")
        + "; what it sent in the others was not kept, so bytes/token and ratio are unknown"
        for found in summary["lacking"]
    ]


def checkpoint_lines(summary: dict[str, Any]) -> list[str]:
    """For people: what went wrong with checkpoints; one a stage."""
    by_node: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for fault in summary["faults"]:
        if fault["code"] == "checkpoint":
            by_node.setdefault((fault.get("lane", 0), fault["stage"]), []).append(fault)
    return [
        f"{name_of(summary, faults[-1])}: {counted(len(faults), 'fault')} of checkpoints, the last: "
        f"{faults[-1]['reason']}"
        for _, faults in sorted(by_node.items())
    ]


class NotEnded(ValueError):
    """A stage wrote no end: the run is under way, or was broken off."""


def summarise(run: Path, *, stages: int, width: int, mode: str, of_steps: int | None = None) -> dict[str, Any]:
    """The content of summary.json. `mode` is "swarm" or "one-process". of_steps: those of a whole run. Raises NotEnded
    if a stage did not end, and ValueError if nothing was done. Where the records of a stage lack steps, bytes/token and
    ratio are None: tokens would be counted whose bytes are not."""
    return summary_of(records_of(run, stages), run, width=width, mode=mode, of_steps=of_steps)


def records_of(run: Path, stages: int) -> list[list[dict[str, Any]]]:
    """Of every stage, in order."""
    return [read_records(run / f"stage-{stage}.jsonl") for stage in range(stages)]


def summary_of(
    by_stage: list[list[dict[str, Any]]], run: Path, *, width: int, mode: str, of_steps: int | None
) -> dict[str, Any]:
    """The same of records that were read from `run`."""
    stages = len(by_stage)
    ends: list[dict[str, Any]] = []
    steps: list[list[dict[str, Any]]] = []
    for stage, records in enumerate(by_stage):
        end = end_of(records)
        if end is None:
            raise NotEnded(f"stage {stage} wrote no end record in {run}: the run did not finish")
        ends.append(end)
        steps.append(steps_of(records))
    head = steps[0]
    if not any(steps):
        raise ValueError(f"the run in {run} ended before its first step; go on with --resume")
    if not head:
        raise ValueError(f"the records of stage 0 in {run} have no step: those of the process before it are missing")
    tokens = sum(record["tokens"] for record in head)
    train_s = sum(record["seconds"] for record in by_stage[0] if record["event"] == "step")  # what was done twice too
    sent: Counter[str] = Counter()
    for records in by_stage:
        sent.update(sent_by(records))
    lacks = lacking(steps)
    in_ratio = sum(count for kind, count in sent.items() if kind not in OUTSIDE_RATIO)
    dense = dense_bytes(width=width, tokens=tokens, stages=stages)
    evaluations = [record for record in by_stage[0] if record["event"] == "evaluation"]
    last = head[-max(1, len(head) // 10) :]
    return {
        "state": "ended",
        "mode": mode,
        "steps": len(head),
        "completed": head[-1]["step"] + 1,  # with those before these records, of a run that was converted
        "of_steps": of_steps,
        "repeated_steps": sum(record["event"] == "step" for record in by_stage[0]) - len(head),
        "tokens": tokens,
        "tokens_per_step": head[-1]["tokens"],
        "parameters": sum(end.get("parameters", 0) for end in ends) or None,
        "data": _data_of(by_stage[0]),
        "first_loss": head[0]["loss"],
        "train_loss": sum(record["loss"] for record in last) / len(last),
        "val_loss": evaluations[-1]["val_loss"] if evaluations else None,
        "loss_curve": loss_curve(head),
        "evaluations": [[record["step"] + 1, record["val_loss"]] for record in evaluations],
        "train_s": train_s,
        "tokens_per_s": tokens / train_s,
        "bytes": {**dict(sorted(sent.items())), "total": in_ratio},
        "bytes_per_token": None if lacks else in_ratio / tokens,
        "dense_bf16_bytes": dense,
        "ratio": dense / in_ratio if in_ratio and not lacks else None,
        "lacking": lacks,
        "boundaries": _boundaries(ends, [of_stage[-1].get("codec", {}) if of_stage else {} for of_stage in steps]),
        "link_check": [
            {"stage": stage, **check}
            for stage, records in enumerate(by_stage)
            for check in next((r.get("link_check", []) for r in reversed(records) if r["event"] == "ready"), [])
        ],
        "stages": [
            {
                "layers": end["layers"],
                "compute_share": end["compute_s"] / end["train_s"] if end["train_s"] else 0.0,
                "cpu_s": end["cpu_s"],
                "compute_s": end["compute_s"],
                "codec_s": end["codec_s"],
                "wait_s": end["wait_s"],
                "peak_rss_bytes": end["peak_rss_bytes"],
                "state_bytes": end["state_bytes"],
                "state_sha256": end["state_sha256"],
            }
            for end in ends
        ],
        "rollbacks": [record for record in by_stage[0] if record["event"] == "rollback"],
        "faults": [fault for _, fault in faults_of(by_stage)],
    }


def faults_of(by_stage: list[list[dict[str, Any]]]) -> list[tuple[float, dict[str, Any]]]:
    """Of all stages, each with when it was (seconds since 1970), in that order."""
    found = [
        (record["time_s"], {"stage": stage, "code": record["code"], "reason": record["reason"]})
        for stage, records in enumerate(by_stage)
        for record in records
        if record["event"] == "fault"
    ]
    return sorted(found, key=lambda each: each[0])


def _data_of(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the text of the run holds, as the newest process that opened it said."""
    found = next((record for record in reversed(records) if record["event"] == "data"), None)
    return found and {key: value for key, value in found.items() if key not in ("event", "time_s")}


def _boundaries(ends: list[dict[str, Any]], codecs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """One entry a boundary; its headline figures are those of the direction that used the link more. `codec`: what was
    learned there at the last step, as the stage above said, and of gradients the stage below."""
    boundaries = []
    for boundary, (above, below) in enumerate(itertools.pairwise(codecs)):
        codec = {name: value for name, value in above.items() if not name.startswith("gradient_")}
        codec |= {name: value for name, value in below.items() if name.startswith("gradient_")}
        ways = {
            link["direction"]: {key: value for key, value in link.items() if key not in ("boundary", "direction")}
            for end in ends
            for link in end["links"]
            if link.get("boundary") == boundary
        }
        busier = max(ways.values(), key=lambda way: sum(way["sent_bytes"].values()))
        boundaries.append(
            {
                "boundary": boundary,
                "configured_bits_per_s": busier["configured_bits_per_s"],
                "measured_bits_per_s": busier["measured_bits_per_s"],
                "utilisation": busier["utilisation"],
                "codec": codec,
                **ways,
            }
        )
    return boundaries


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
