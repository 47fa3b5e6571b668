"""`thinpipe top`: a swarm while it trains, and after. `thinpipe doctor`: a machine, before it hosts a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Config, Insecure, KeysDirectory, configuration, fail, one_arithmetic_thread


def top(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Directories of runs (--out).")] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Nodes elsewhere, by their --prometheus: host:port, with commas between them."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two frames.")] = 0.5,
) -> None:
    """Watch a swarm: stages, loss, tokens/s, links, ratio, learned tables, faults. Ctrl-C ends it.

    RUN is read from its records, whether it trains or has ended; stages that write elsewhere are added as further
    directories, or over HTTP with --prometheus. Where the output is no terminal, one frame is printed.
    """
    from ..sim.reports.top import TopError, sources
    from ..sim.reports.top_console import show

    addresses = [address for address in (prometheus or "").split(",") if address.strip()]
    if not (runs or addresses):
        fail("say what to watch: the directory of a run (its --out), or --prometheus host:port", 2)
    try:
        watched = sources(runs or [], addresses)
    except TopError as error:
        fail(str(error), 2)
    if not show(watched, once=once, every_s=every):
        fail(f"none of {', '.join(addresses)} answers; are they nodes with --prometheus, reachable from here?", 1)


def doctor(
    listen: Annotated[str | None, typer.Option(help="host:port where this node is to listen.")] = None,
    to: Annotated[
        str | None, typer.Option(help="host:port of a neighbour: a probe --listen there, or a node's listener.")
    ] = None,
    config: Config = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    out: Annotated[Path | None, typer.Option(help="Where the node is to write. (beside run.toml, else here)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")] = False,
) -> None:
    """Examine this machine: ports, reachability, clock, versions, cores, memory, disk, GPU, root, tc.

    With --to the neighbour there is asked to dial this machine's --listen back: whether a port can be reached is seen
    from the other side alone. Each finding has its remedy. Exit code 1: there is a fault.
    """
    one_arithmetic_thread()
    settings = configuration(config, {}, None) if config else None
    from ..node.addresses import ListenError
    from ..node.model import ModelError
    from ..node.probing.doctor import Questions
    from ..node.probing.doctor import doctor as examine

    directory = out or (config.parent if config else Path())
    questions = Questions(listen=listen, to=to, keys=keys, insecure=insecure, config=settings, out=directory)
    try:
        healthy = examine(questions, as_json=as_json)
    except (ListenError, ModelError) as error:
        fail(str(error), 2)
    if not healthy:
        raise typer.Exit(1)
