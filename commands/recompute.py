"""`thinpipe recompute`: do a run again in one process, from its record, and compare the results bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from .common import Json, fail, may_outlast_its_output, one_arithmetic_thread, run_errors, run_toml

Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Directory of the run, with its run.toml and the records (and rounds/) of all stages."
    ),
]


def recompute(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the records of the recomputation in this new directory. (they are removed)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do a run that has ended again, in one process, and compare: losses, averaging rounds, digests of all weights.

    What a run comes to follows from its settings, its text, and who took part in which averaging rounds, which is on
    record; whatever was lost on the way leaves no trace. The processor must be of the type that the run had. Exit code
    0 if all is equal, 1 if not.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
    run_toml(run, "recompute")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out} is there already; choose another one", 2)
    from rich.console import Console
    from rich.progress import Progress

    from ..node.preparation import BAD_INPUT
    from ..node.recomputed_run import recomputable
    from ..node.recomputed_run import recompute as again
    from ..node.run_directory import LocalRunError
    from ..node.stage_failure import FAILED

    console = Console(stderr=as_json, markup=False, highlight=False)
    with TemporaryDirectory(prefix="thinpipe-") as aside, run_errors(out or run):
        try:
            config, corpus = recomputable(run)
            with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task("steps", total=config.run.steps)
                found = again(run, out or Path(aside), config, corpus, lambda *_: progress.advance(task))
        except BAD_INPUT as error:
            raise LocalRunError(str(error), 2) from None
        except FAILED as error:
            raise LocalRunError(f"{run} cannot be computed again here: {error}", 1) from None
    for line in found.members():
        console.print(line, soft_wrap=True)
    for each in found.lanes:
        console.print(f"{each.name(len(found.lanes))}: {each.words()}", soft_wrap=True)
    if as_json:
        print(json.dumps(found.record(), indent=2))
    if not found.equal:
        raise typer.Exit(1)
