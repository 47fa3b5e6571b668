"""`thinpipe dht`: a member of the DHT that serves no stage and answers at the swarm's rendezvous, so that others can
join.

It keeps nothing that the swarm needs. Members know each other once they have joined, so they do not notice its end. A
node that comes later joins by any of them.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence

from ...protocol.node_record import RunRecord
from ...protocol.rendezvous_messages import ADDRESSES_MAX, RendezvousResponse
from ..addresses import check_listen, is_loopback
from ..config import RunConfig
from ..links.transport import serving
from ..security.policy import Security
from .client import Discovery, DiscoveryError
from .entry_points import EntryPoints, MemberAddresses, ask_all_rendezvous, place
from .joining import free_port, say
from .rendezvous import RendezvousAnswer, rendezvous_handler
from .shared_config import shareable, short

LOOK_EVERY_S = 30.0
LEASE_S = 3600.0


def serve(
    listen: str,
    join: Sequence[str],
    announce: str | None,
    dht_port: int | None,
    config: RunConfig | None,
    security: Security,
) -> None:
    """Until SIGINT or SIGTERM. Raises DiscoveryError, ListenError and ConfigError."""
    entry = ask_all_rendezvous(join, say, security) if join else EntryPoints(rendezvous=(), peers=())
    run = shareable(config) if config else None
    here = place(listen, announce, dht_port, free_port, entry.source_host())
    check_listen(here.listen)
    discovery = Discovery.begin(entry.peers, listen=here.dht_listen, announce=here.dht_announce).ready()
    try:
        asyncio.run(_serve(here, discovery, run, entry, security))
    finally:
        discovery.close()


async def _serve(
    here: MemberAddresses, discovery: Discovery, run: RunRecord | None, entry: EntryPoints, security: Security
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    known = [run] if run else [each for each in map(_run_of, entry.rendezvous) if each]

    def answer() -> RendezvousResponse:
        addresses = discovery.addresses[:ADDRESSES_MAX]
        if not known:
            return RendezvousResponse(addresses=addresses)
        of = known[0]
        return RendezvousResponse(addresses=addresses, run=of.run, configuration=of.configuration, toml=of.toml)

    def report(_: str, line: str) -> None:
        print(f"thinpipe: {line}", file=sys.stderr, flush=True)

    async with serving(here.listen, {"Swarm": rendezvous_handler(answer, report, security)}, security):
        of = f"run '{run.run}', fingerprint {short(run.configuration)}" if run else "no run of its own"
        print(f"a bootstrap of the DHT at {here.endpoint} ({of}), until Ctrl-C; to join:", flush=True)
        print(f"  {how_to_join(here.endpoint, security)}", flush=True)
        if is_loopback(here.endpoint):
            print("  (on this machine only: for others, say --listen or --announce with an address that they reach)")
        for address in discovery.addresses:
            print(f"  or by --join {address}", flush=True)
        waiting = asyncio.ensure_future(stop.wait())
        try:
            while not waiting.done():
                await _keep(discovery, run, known)
                await asyncio.wait([waiting], timeout=LOOK_EVERY_S)
        finally:
            waiting.cancel()


def how_to_join(endpoint: str, security: Security) -> str:
    """The command that works on another machine as it stands, in a shell; but for the directory of its own keys."""
    how = " --keys DIR" if security.keys else " --insecure" if security.insecure and not is_loopback(endpoint) else ""
    return f"thinpipe node --join {shlex.quote(endpoint)} --stage auto{how}"


def _run_of(rendezvous: RendezvousAnswer) -> RunRecord | None:
    response = rendezvous.response
    return (
        RunRecord(run=response.run, configuration=response.configuration, toml=response.toml) if response.run else None
    )


async def _keep(discovery: Discovery, run: RunRecord | None, known: list[RunRecord]) -> None:
    """Announce the run, or find the one that is announced here. Raises DiscoveryError if there is no DHT any more."""
    try:
        if run:
            await asyncio.to_thread(discovery.publish_run, run, lease_s=LEASE_S)
        elif not known:
            found, _ = await asyncio.to_thread(discovery.runs)
            known += found if len(found) == 1 else []
        elif not discovery.alive:  # nothing was asked of it
            raise DiscoveryError("the DHT's process has ended; start this bootstrap again")
    except DiscoveryError as error:
        if not discovery.alive:
            raise
        print(f"thinpipe: {error}", file=sys.stderr, flush=True)
