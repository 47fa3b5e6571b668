"""The command line: it parses options, builds the configuration and calls the node. Each module of commands/ holds the
commands of one kind.

Exit codes: 0 done; 1 the run failed (a node died, or a wait passed its deadline); 2 the input
cannot be used; 130 interrupted.
Every failure is one line on stderr that names the fault, the offender and the remedy.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated

import typer
import typer.core
import typer.main

from . import __version__
from .commands.chaos import chaos
from .commands.checkpoint import checkpoint
from .commands.common import OneLine, from_home, run_as_own_process
from .commands.compare import compare
from .commands.discovery import dht, status
from .commands.export import export
from .commands.hosting import node
from .commands.inference import evaluate, generate
from .commands.keys import keys
from .commands.measuring import bench, plan, probe
from .commands.recompute import recompute
from .commands.reports import summary
from .commands.supervise import supervise
from .commands.training import up
from .commands.watching import doctor, top

app = typer.Typer(
    name="thinpipe",
    cls=OneLine,
    help="Train one language model over many machines that are joined by thin links.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"thinpipe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """What the program takes before the name of a command."""
    del version  # the callback has printed it


COMMANDS = (
    up,
    export,
    node,
    supervise,
    dht,
    status,
    top,
    summary,
    recompute,
    doctor,
    plan,
    bench,
    compare,
    probe,
    chaos,
)
for command in COMMANDS:
    app.command()(from_home(command))
app.command("eval")(from_home(evaluate))
app.command()(from_home(generate))
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(keys, name="keys")


@cache
def _command() -> typer.core.TyperGroup:
    """All commands and their options: a tenth of a second, which nodes that are forked from `up` find done."""
    return typer.main.get_group(app)


def main() -> None:
    """Entry point of the console script. Never returns: this process is the command's alone."""
    run_as_own_process(_command())


if __name__ == "__main__":
    main()
