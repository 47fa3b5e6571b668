"""Addresses in the DHT: the part of multiaddrs (https://multiformats.io/multiaddr) that a swarm over TCP needs.

`/ip4/192.0.2.7/tcp/7002/p2p/Qm…`: host, port, and the digest of the peer's key, so that nobody else can answer there.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, replace

_TCP = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[A-Za-z0-9._:-]{1,253})/tcp/(?P<port>[0-9]{1,5})"
    r"(/p2p/(?P<peer>[A-Za-z0-9]{20,100}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiaddr:
    """host: an IP address, or a name. peer: "" for an address to listen on."""

    host: str
    port: int
    peer: str = ""

    @classmethod
    def parse(cls, text: str) -> Multiaddr | None:
        """None for anything else than TCP on a host."""
        found = _TCP.fullmatch(text)
        if found is None or int(found["port"]) > 65535:
            return None
        if found["kind"] in ("ip4", "ip6") and _version(found["host"]) != int(found["kind"][2]):
            return None
        return cls(host=found["host"], port=int(found["port"]), peer=found["peer"] or "")

    def __str__(self) -> str:
        version = _version(self.host)
        kind = f"ip{version}" if version else "dns"
        return f"/{kind}/{self.host}/tcp/{self.port}" + (f"/p2p/{self.peer}" if self.peer else "")

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or (_version(self.host) > 0 and ipaddress.ip_address(self.host).is_loopback)


def _version(host: str) -> int:
    """4 or 6; 0 for a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


def is_wildcard(host: str) -> bool:
    """Whether one listens there for all of the machine's addresses."""
    return _version(host) > 0 and ipaddress.ip_address(host).is_unspecified


def seen_from(door_host: str, told: tuple[str, ...]) -> list[str]:
    """Where to dial a peer whose rendezvous was reached at `door_host` and told these multiaddrs: at that host, with
    the
    ports that it told, since it was reached there, and at what else it told that is not its own loopback. Others than
    those of TCP are left out."""
    known = [each for each in map(Multiaddr.parse, told) if each and each.peer]
    near = Multiaddr(host=door_host, port=1).loopback
    found = [replace(each, host=door_host) for each in known]
    found += [each for each in known if near or not each.loopback]
    return list(dict.fromkeys(map(str, found)))


def source_host(towards: str, port: int) -> str:
    """The address by which this machine reaches `towards`. Raises OSError."""
    family, _, _, _, where = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(where)
        return str(probe.getsockname()[0])


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
