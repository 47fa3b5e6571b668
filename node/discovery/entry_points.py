"""How a machine enters the swarm: from the addresses of --join to a member of the DHT.

An address is the `host:port` of a rendezvous, which is asked for the rest, or a multiaddr. One that answers is enough.
Those that do not are reported and left out, so a list of bootstraps is more reliable than one. A node that is started
before any of them, as happens where a service starts all machines at once, waits a while for the first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...protocol.node_record import is_endpoint
from ..addresses import ListenError, split_address
from ..security.policy import PLAIN, Security, choose
from .client import Discovery, DiscoveryError
from .multiaddr import Multiaddr, host_port, is_wildcard, seen_from, source_host
from .rendezvous import RendezvousAnswer, RendezvousError, ask_rendezvous

PEERS_MAX = 64
ASK_AGAIN_S = 2.0
NOBODY = ("192.0.2.1", 9)  # RFC 5737: the way there is the way out; nothing is sent
Say = Callable[[str], None]


def choose_for(join: Sequence[str], keys: Path | None, *, insecure: bool, listen: str | None = None) -> Security:
    """What --keys and --insecure come to, for these rendezvous addresses. Raises KeysError, and DiscoveryError for what
    is no
    address."""
    for address in join:
        if not _is_multiaddr(address):
            choose(keys, insecure=insecure, dial=address, dial_option="--join")
    return choose(keys, insecure=insecure, listen=listen)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPoints:
    """rendezvous addresses: those that answered. peers: multiaddrs to enter the DHT by."""

    rendezvous: tuple[RendezvousAnswer, ...]
    peers: tuple[str, ...]

    def source_host(self) -> str:
        """The address by which this machine reaches the swarm, or else others."""
        reached = [split_address(rendezvous.address) for rendezvous in self.rendezvous]
        reached += [(each.host, each.port) for each in map(Multiaddr.parse, self.peers) if each]
        for host, port in (*reached, NOBODY):
            try:
                return source_host(host, port)
            except OSError:
                continue
        return "127.0.0.1"


def ask_all_rendezvous(
    join: Sequence[str],
    say: Say,
    security: Security = PLAIN,
    *,
    wait_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> EntryPoints:
    """Ask at all of these addresses at once, and again for `wait_s` while nobody is there. Raises DiscoveryError if
    nothing comes of any: with exit code 1 after a wait, since whoever is waited for may still come."""
    peers: list[str] = []
    rendezvous: list[str] = []
    for address in join:
        (peers if _is_multiaddr(address) else rendezvous).append(address)
    until_s, waited = clock() + wait_s, False
    while True:
        answers = asyncio.run(_ask_all(rendezvous, security)) if rendezvous else []
        found = [answer for answer in answers if isinstance(answer, RendezvousAnswer)]
        failed = [answer for answer in answers if isinstance(answer, RendezvousError)]
        if found or peers:
            break
        line = "; ".join(str(error) for error in failed) or "say where to join: --join host:port"
        may_come = wait_s > 0 and any(error.absent for error in failed)
        if not may_come:
            raise DiscoveryError(line, 2 if all(error.exit_code == 2 for error in failed) else 1)
        if clock() >= until_s:
            raise DiscoveryError(f"{line} (waited {wait_s:g} s for it, link.connect_timeout_s)", 1)
        if not waited:
            say(f"{line}; waits {wait_s:g} s for it")
        waited = True
        sleep(max(0.0, min(ASK_AGAIN_S, until_s - clock())))
    for error in failed:
        say(f"warning: {error}")
    for answer in found:
        peers += seen_from(answer.host, answer.response.addresses)
    if not peers:
        raise DiscoveryError(f"{found[0].address} gives no address of its DHT that this machine can connect to", 1)
    return EntryPoints(rendezvous=tuple(found), peers=tuple(dict.fromkeys(peers))[:PEERS_MAX])


def _is_multiaddr(address: str) -> bool:
    """Otherwise the host:port of a rendezvous. Raises DiscoveryError for what is neither."""
    if address.startswith("/"):
        parsed = Multiaddr.parse(address)
        if parsed is None or not parsed.peer:
            raise DiscoveryError(
                f"--join {address}: not a multiaddr such as /ip4/192.0.2.7/tcp/7002/p2p/Qm...; copy the whole line "
                "that `thinpipe dht` prints, or give host:port",
                2,
            )
        return True
    try:
        split_address(address)
    except ListenError:
        line = f"--join {address}: neither host:port, such as 192.0.2.7:7000, nor a multiaddr"
        raise DiscoveryError(line, 2) from None
    return False


async def _ask_all(rendezvous: Sequence[str], security: Security) -> list[RendezvousAnswer | RendezvousError]:
    async def one(address: str) -> RendezvousAnswer | RendezvousError:
        try:
            return await ask_rendezvous(address, security)
        except RendezvousError as error:
            return error

    return list(await asyncio.gather(*map(one, rendezvous)))


def look_around(join: Sequence[str], say: Say, security: Security) -> tuple[EntryPoints, Discovery]:
    """Enter the DHT only to ask. Raises DiscoveryError."""
    entry = ask_all_rendezvous(join, say, security)
    listen = Multiaddr(host=entry.source_host(), port=0)
    return entry, Discovery.begin(entry.peers, listen=listen, client=True).ready()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberAddresses:
    """Where a member is reached. listen, endpoint: of its gRPC, host:port, by itself and by others. dht_listen,
    dht_announce: of its DHT; None: as it finds out itself."""

    listen: str
    endpoint: str
    dht_listen: Multiaddr
    dht_announce: Multiaddr | None


def place(
    listen: str, announce: str | None, dht_port: int | None, free_port: Callable[[str, int | None], int], source: str
) -> MemberAddresses:
    """Settle all ports before any is told: `free_port(host, wish)` gives one that can be listened on.

    source: the host under which others reach this machine, if nothing else says. Raises ListenError.
    """
    host, port = split_address(listen)
    chosen = port or free_port(host, None)
    if dht_port is None:
        dht_port = free_port(host, port + 1 if 0 < port < 65535 else None)
    inside = source if is_wildcard(host) else host
    endpoint = announce or host_port(inside, chosen)
    outside_host, _ = split_address(endpoint)
    if not is_endpoint(endpoint):
        raise ListenError(
            f"--announce {endpoint}: not a host:port that others could connect to, such as 192.0.2.7:7001"
        )
    announced = Multiaddr(host=outside_host, port=dht_port) if announce else None
    return MemberAddresses(
        listen=host_port(host, chosen),
        endpoint=endpoint,
        dht_listen=Multiaddr(host=host, port=dht_port),
        dht_announce=announced,
    )
