"""`thinpipe checkpoint ls|verify`: list and verify the checkpoints of a run, without changing anything."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, configuration, fail

checkpoint = typer.Typer(
    help="List or verify the checkpoints of a run, without changing anything.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run: its --out, which holds run.toml.")]


@checkpoint.command("ls")
def checkpoint_ls(run: Run, as_json: Json = False) -> None:
    """List the checkpoints by step: which stages have one, and whether the run can resume from it.

    Only manifests and file lengths are checked; `verify` also reads the tensors. A line says whether the run is under
    way, has ended or was broken off: while it is under way, new checkpoints come and old ones go.
    """
    _show_checkpoints(run, as_json, thorough=False)


@checkpoint.command("verify")
def checkpoint_verify(run: Run, as_json: Json = False) -> None:
    """Read every checkpoint and compare its digests with its manifest.

    Exit code 1 if any is damaged, or there is none, 2 if RUN is not the directory of a run.
    """
    if _show_checkpoints(run, as_json, thorough=True):
        raise typer.Exit(1)


def _show_checkpoints(run: Path, as_json: bool, *, thorough: bool) -> int:
    """Print what is there. Returns how many faults there are: each that is damaged has its line on stderr, and so has
    it that there is nothing to verify."""
    if not (run / "run.toml").is_file():
        fail(f"{run} is not the directory of a run: it holds no run.toml; name the --out of a run", 2)
    settings = configuration(run / "run.toml", {}, None)
    from ..node.checkpoints.listing import checkpoint_table, list_checkpoints
    from ..node.checkpoints.manifest import CheckpointError

    directory = settings.checkpoint.path(run)
    try:
        found = list_checkpoints(directory, run=settings.run.name, stages=settings.pipeline.stages, thorough=thorough)
    except CheckpointError as error:
        fail(str(error), 1)
    from ..sim.reports.liveness import liveness

    alive = liveness(run, time.time())
    if as_json:
        tree = {"directory": str(directory), "verified": thorough, "run": alive.record(), "checkpoints": found}
        print(json.dumps(tree, indent=2))
    elif not found:
        print(f"no checkpoints in {directory}; set checkpoint.every to have some")
    else:
        from rich.console import Console

        Console().print(checkpoint_table(found))
    if not as_json:
        more = "; checkpoints come and go" if alive.state == "under way" else ""
        print(f"the run {alive.line()}{more}")
    damaged = [held["problem"] for row in found for held in row["stages"] if held["state"] == "damaged"]
    for line in damaged:
        print(f"thinpipe: {line}", file=sys.stderr)
    if thorough and not found:
        print(f"thinpipe: there is no checkpoint in {directory}, so nothing was verified", file=sys.stderr)
        return 1
    return len(damaged)
