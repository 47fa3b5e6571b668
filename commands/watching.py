"""`thinpipe top` and `thinpipe doctor`: watch a swarm while it trains, and check a machine before it serves a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Config, Insecure, Json, KeysDirectory, configuration, fail, one_arithmetic_thread


def top(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="Directories of runs: their --out, such as runs/latest."),
    ] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Nodes on other machines: host:port of their --prometheus, separated by commas."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and stop. (off)")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between frames.")] = 0.5,
) -> None:
    """Watch a swarm: stages, loss, tokens/s, links, ratio, learned tables, faults. Ctrl-C ends it.

    It reads the records in RUN, of a run that trains or has ended. For stages that write elsewhere, add their
    directories, or ask the nodes over HTTP with --prometheus. If the output is not a terminal, one frame is printed.
    """
    from ..sim.reports.top_console import show
    from ..sim.reports.top_data import TopError, sources

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
    listen: Annotated[
        str | None, typer.Option(help="host:port at which the node is to listen, such as 0.0.0.0:7001.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="host:port of a neighbour: its node's --listen, or a `thinpipe probe --listen` there."),
    ] = None,
    config: Config = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory in which the node is to write. (beside run.toml, else here)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: ports, reachability, clock, versions, cores, memory, disk, GPU, speed, root, tc.

    With --to, the neighbour is asked to connect back to this machine's --listen: only the other side can tell whether a
    port is reachable. Each finding names its remedy. Exit code 1 if there is a fault.
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
