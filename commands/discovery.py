"""`thinpipe dht` and `thinpipe status`: a bootstrap node of the distributed hash table (DHT), and what nodes announced
there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Insecure,
    Json,
    KeysDirectory,
    configuration,
    fail,
    may_outlast_its_output,
    one_arithmetic_thread,
)

Joins = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        help="Join the swarm by this host:port, of any of its nodes or bootstraps, or by a multiaddr. "
        "Repeat it for more; each is tried.",
    ),
]
Announce = Annotated[
    str | None,
    typer.Option(
        help="host:port at which others reach this machine, if it is behind NAT or a port mapping. (its own address)"
    ),
]
DhtPort = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, help="Port of the DHT itself. (the one after --listen if it is free, else any free one)"
    ),
]


def dht(
    listen: Annotated[str, typer.Option(help="host:port at which other nodes join.")] = "0.0.0.0:7000",
    join: Joins = None,
    announce: Announce = None,
    dht_port: DhtPort = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The run.toml of a run, to offer to nodes that join. (none)")
    ] = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
) -> None:
    """Run a bootstrap node: a member of the DHT that serves no stage. It gives new nodes an address to join.

    It runs until Ctrl-C. The swarm goes on without it.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
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
    run: Annotated[str | None, typer.Option(help="Name of the run, if the DHT has several.")] = None,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Print the state of a swarm: for each stage its node, what the node does, its step and its speed."""
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
