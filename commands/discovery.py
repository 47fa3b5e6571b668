"""`thinpipe dht`: a bootstrap of its own. `thinpipe status`: who serves which stage, as the nodes themselves tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Insecure, Json, KeysDirectory, configuration, fail, one_arithmetic_thread

Joins = Annotated[
    list[str] | None,
    typer.Option("--join", help="host:port of any node or bootstrap of a swarm, or a multiaddr; several are tried."),
]
Announce = Annotated[
    str | None,
    typer.Option(help="host:port under which others reach this machine, behind a NAT or a port map."),
]
DhtPort = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Port of the DHT's own. (the one after --listen, if that is free, or any)"),
]


def dht(
    listen: Annotated[str, typer.Option(help="host:port where others join.")] = "0.0.0.0:7000",
    join: Joins = None,
    announce: Announce = None,
    dht_port: DhtPort = None,
    config: Annotated[Path | None, typer.Option("--config", help="Tell of this run to who joins.")] = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
) -> None:
    """Run a bootstrap: a member of the DHT that serves no stage, until Ctrl-C. The swarm outlives it."""
    one_arithmetic_thread()
    run = configuration(config, {}, None) if config else None
    from ..node.addresses import ListenError
    from ..node.config import ConfigError
    from ..node.discovery.bootstrap import serve
    from ..node.discovery.client import DiscoveryError
    from ..node.discovery.entry_points import choose_for
    from ..node.security.key_directory import KeysError

    try:
        security = choose_for(join or (), keys, insecure=insecure, listen=listen)
        serve(listen, tuple(join or ()), announce, dht_port, run, security)
    except DiscoveryError as error:
        fail(str(error), error.exit_code)
    except (ConfigError, KeysError, ListenError) as error:
        fail(str(error), 2)


def status(
    join: Joins = None,
    run: Annotated[str | None, typer.Option(help="Which run, where several are told of.")] = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Print the swarm: each stage's node, what it does, how far and how fast it is."""
    one_arithmetic_thread()
    if not join:
        fail("say whom to ask: --join host:port of any node or bootstrap", 2)
    from ..node.addresses import ListenError
    from ..node.config import ConfigError
    from ..node.discovery.client import DiscoveryError
    from ..node.discovery.entry_points import choose_for
    from ..node.discovery.status import find_status, status_table
    from ..node.security.key_directory import KeysError

    try:
        found = find_status(tuple(join), run, choose_for(join, keys, insecure=insecure))
    except DiscoveryError as error:
        fail(str(error), error.exit_code)
    except (ConfigError, KeysError, ListenError) as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        Console().print(status_table(found))
