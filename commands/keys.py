"""`thinpipe keys init|issue|show`: the certificate authority of a run, and the certificates of its nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, configuration, fail, from_home

keys = typer.Typer(
    help="Make and show the keys with which the nodes of a run identify each other (mutual TLS).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@keys.command("init")
@from_home
def keys_init(
    run: Annotated[str | None, typer.Option("--run", help="Name of the run: run.name in its run.toml.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Instead of --run: the run.toml that holds the name.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the key and the certificate of the authority.")] = Path(
        "keys"
    ),
    days: Annotated[
        int, typer.Option(help="Days until the authority expires. Its certificates expire no later.")
    ] = 365,
) -> None:
    """Make the certificate authority of a run. Its key stays on this machine; no node needs it."""
    if (run is None) == (config is None):
        fail("say whose authority: --run NAME or --config run.toml", 2)
    name = configuration(config, {"run.name": run}, None).run.name
    from ..node.security.certificates import spell_moment
    from ..node.security.key_directory import AUTHORITY_KEY, KeysError, clock, init

    try:
        said = init(name, out, days=days, now=clock())
    except KeysError as error:
        fail(str(error), 2)
    print(f"authority of run '{said.run}' in {out}, until {spell_moment(said.ends)}; keep {out / AUTHORITY_KEY} here")
    print(f"next, for each machine: thinpipe keys issue --authority {out} --stages 0-3 --out node-a")


@keys.command("issue")
@from_home
def keys_issue(
    stages: Annotated[str, typer.Option(help="Stages that the node may serve, such as 3, 0-3 or 0,2,4-6.")],
    out: Annotated[Path, typer.Option(help="Directory for the node's key and certificate. Copy it to that machine.")],
    lanes: Annotated[
        str | None, typer.Option(help="Lanes in which it may serve them, such as 0 or 0,2. (all)", show_default=False)
    ] = None,
    authority: Annotated[Path, typer.Option(help="Directory that `thinpipe keys init` wrote.")] = Path("keys"),
    days: Annotated[int, typer.Option(help="Days until the certificate expires.")] = 30,
) -> None:
    """Issue a node's key and certificate, with a copy of the authority's certificate."""
    from ..node.security.certificates import spell_moment
    from ..node.security.key_directory import KeysError, clock, issue, parse_lanes, parse_stages

    try:
        within = parse_lanes(lanes)
        said = issue(parse_stages(stages), authority, out, lanes=within, days=days, now=clock())
    except KeysError as error:
        fail(str(error), 2)
    print(f"{out}: for {said}, until {spell_moment(said.ends)}")


@keys.command("show")
@from_home
def keys_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that keys init or keys issue wrote.")],
    as_json: Json = False,
) -> None:
    """Show what the keys in DIR are for and when they expire. Exit code 1 if nodes would refuse them."""
    from ..node.security.key_directory import KeysError, clock, describe

    try:
        found = describe(directory, now=clock())
    except KeysError as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        begins, ends = (found[name][:16].replace("T", " ") for name in ("begins", "ends"))
        what = "authority"
        if found["kind"] == "node":
            what = f"stages    {found['stages'] or 'none'}\nlanes     {found['lanes']}"
        left = f"{found['days_left']:g} days left" if found["days_left"] > 0 else "over"
        print(
            f"run       {found['run']}\n{what}\nvalid     {begins} to {ends} UTC ({left})\nsha256    {found['sha256']}"
        )
    if found["problem"]:
        print(f"thinpipe: {found['problem']}", file=sys.stderr)
        raise typer.Exit(1)
