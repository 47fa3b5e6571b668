"""A list of the checkpoints that a run has on this machine, over all its stages, for people and scripts.

Only what all stages have of one step, written under one configuration, can be resumed. Nothing is changed here, and the
configuration's digest is compared between the stages only: to compute the run's own takes its model and its data.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.table import Table

from .manifest import COPIES, CheckpointError, Fingerprint, OtherFormat
from .store import CheckpointStore


def list_checkpoints(directory: Path, *, run: str, stages: int, thorough: bool) -> list[dict[str, Any]]:
    """All checkpoints of a run, for people and scripts: a row for each step, ascending, of {"step", "resumable",
    "stages": [{"stage", "state", "bytes", "generation", "configuration", "problem"}]}; the state is "ok", "missing",
    "damaged" or "other format".

    `thorough`: compare the digests of the tensors too. Raises CheckpointError for a directory that cannot be listed.
    """
    fingerprint = Fingerprint(run=run, stages=stages, configuration=None)
    stores = [CheckpointStore(directory, stage=stage, fingerprint=fingerprint) for stage in range(stages)]
    present = [set(store.numbers()) for store in stores]
    rows = []
    for step in sorted(set().union(*present)):
        held = [_look(store, step, thorough, step in own) for store, own in zip(stores, present, strict=True)]
        configurations = {one["configuration"] for one in held}  # None where it is not ok
        rows.append(
            {"step": step, "resumable": len(configurations) == 1 and None not in configurations, "stages": held}
        )
    return rows


def _look(store: CheckpointStore, completed: int, thorough: bool, present: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": store.stage, "state": "missing", "bytes": None, "generation": None}
    row |= {"configuration": None, "problem": None}
    if not present:
        return row
    try:
        manifest = store.verify(completed) if thorough else store.manifest(completed)
    except CheckpointError as error:
        state = "other format" if isinstance(error, OtherFormat) else "damaged"
        return row | {"state": state, "problem": str(error)}
    fields = {"bytes": manifest.file_bytes, "generation": manifest.generation, "configuration": manifest.configuration}
    return row | {"state": "ok", **fields}


def steps_held(directory: Path, *, run: str, stages: int) -> list[dict[int, set[str]]]:
    """By stage: the steps of which it has a checkpoint there, or a neighbour a copy, and under which configurations
    they were written. Looks at manifests and lengths alone. Raises CheckpointError for a directory that cannot be
    listed."""
    found = [defaultdict[int, set[str]](set) for _ in range(stages)]
    for place in (directory, directory / COPIES):
        for row in list_checkpoints(place, run=run, stages=stages, thorough=False):
            for held in row["stages"]:
                if held["state"] == "ok":
                    found[held["stage"]][row["step"]].add(held["configuration"])
    return [dict(of_stage) for of_stage in found]


def other_format(directory: Path, *, run: str, stages: int) -> str | None:
    """What is said of the newest checkpoint there that another version of thinpipe wrote; None without one. Raises
    CheckpointError for a directory that cannot be listed."""
    rows = list_checkpoints(directory, run=run, stages=stages, thorough=False)
    told = [held["problem"] for row in rows for held in row["stages"] if held["state"] == "other format"]
    return told[-1] if told else None


def checkpoint_table(rows: list[dict[str, Any]], title: str = "checkpoints") -> Table:
    """`list_checkpoints` as a table: a row for each step, a column for each stage."""
    table = Table(title=title)
    table.add_column("step", justify="right")
    for held in rows[0]["stages"]:
        table.add_column(f"stage {held['stage']}", justify="right")
    table.add_column("resumable")
    for row in rows:
        cells = [f"{held['bytes'] / 1e6:.1f} MB" if held["state"] == "ok" else held["state"] for held in row["stages"]]
        table.add_row(str(row["step"]), *cells, "yes" if row["resumable"] else "no")
    return table
