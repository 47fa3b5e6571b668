"""`thinpipe summary`: summarise a run from its records, at any time after it has ended."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .common import Json, configuration, fail, one_arithmetic_thread, run_toml

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Directory of the run, with its run.toml and the records of all stages.")
]


def summary(
    run: Run,
    write: Annotated[bool, typer.Option("--write", help="Also write RUN/summary.json, as `up` does. (off)")] = False,
    as_json: Json = False,
) -> None:
    """Print the summary of a run from its records: losses, tokens/s, bytes, links, a digest of each stage's state.

    Use it for nodes that `up` did not start. If each machine has its own directory, copy every stage-N.jsonl into one
    (of a run of several lanes, into lane-0, lane-1, ... in it).
    A run that is under way, or was broken off, has no summary yet: exit code 1, with what each stage does (--json:
    "state"). If records of a lost machine are missing, a line says so, and bytes/token and ratio are unknown. Exit code
    2 if RUN is not the directory of a run.
    """
    one_arithmetic_thread()
    settings = configuration(run_toml(run, "summary"), {}, None)
    from ..node.measuring.dense_comparison import add_comparison
    from ..node.preparation import BAD_INPUT, resolve_architecture
    from ..sim.reports.lanes import lane_path
    from ..sim.reports.lanes_summary import averaging_lines, summarise_run
    from ..sim.reports.summary import NotEnded, checkpoint_lines, lacking_lines, mode_of, write_summary

    try:
        width = resolve_architecture(settings).hidden_size
        found = summarise_run(
            run,
            lanes=settings.lanes.count,
            stages=settings.pipeline.stages,
            width=width,
            mode=mode_of(lane_path(run, 0, settings.lanes.count)) or "one-process",
            of_steps=settings.run.steps,
        )
    except BAD_INPUT as error:
        fail(str(error), 2)
    except NotEnded as error:
        _not_ended(run, str(error), as_json=as_json)
    except ValueError as error:
        fail(str(error), 1)
    add_comparison(found, run, settings)
    for line in (*lacking_lines(found), *checkpoint_lines(found), *averaging_lines(found)):
        print(f"thinpipe: warning: {line}", file=sys.stderr)
    if write:
        try:
            write_summary(run, found)
        except OSError as error:
            fail(f"cannot write {run}/summary.json: {error.strerror}; omit --write to see it alone", 2)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from ..sim.reports.run_console import closing_lines, summary_tables

    console = Console(markup=False)
    console.print(*summary_tables(found), sep="\n")
    for line in closing_lines(found, run):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _not_ended(run: Path, why: str, *, as_json: bool) -> NoReturn:
    """Say how far a run is that has no summary, and end with 1."""
    from ..sim.reports.liveness import liveness

    found = liveness(run, time.time())
    remedy = {
        "under way": f"thinpipe top {run} watches it",
        "not ended": f"thinpipe up --resume {run} goes on with a run of `up`; else start its nodes again with --resume",
    }
    if as_json:
        print(json.dumps({**found.record(), "problem": why}, indent=2))
    line = f"{run} {found.line()}; no summary yet"
    fail("; ".join(part for part in (line, remedy.get(found.state)) if part), 1)
