"""Addresses as people write them, host:port: parsing them, testing them, and whether other machines can reach them."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import unquote


class ListenError(ValueError):
    """The address cannot be listened on."""


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of host:port or [IPv6]:port. Raises ListenError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ListenError(f"'{address}' is not host:port, such as 127.0.0.1:7001")
    return host.removeprefix("[").removesuffix("]"), int(port)


def lateral_addresses(given: Sequence[str], lane: int, lanes: int) -> dict[int, str]:
    """By lane, of LANE=host:port each: where a stage's nodes in the lower lanes listen. Raises ListenError for what is
    none, for a lane that is not lower than `lane`, one that is given twice, and for one that is missing."""
    found: dict[int, str] = {}
    for text in given:
        number, equals, address = text.partition("=")
        if not (equals and number.isascii() and number.isdecimal()):
            raise ListenError(f"'{text}' is not LANE=host:port, such as 0=stage2.example:7002")
        split_address(address)
        other = int(number)
        if other >= lanes:
            raise ListenError(f"--lateral {text}: there is no lane {other}; the run has {lanes}, from 0")
        if other >= lane:
            why = "which is this node's own" if other == lane else "whose node dials this one"
            raise ListenError(f"--lateral {text}: that is lane {other}, {why}; name lanes below {lane} only")
        if other in found:
            raise ListenError(f"--lateral names lane {other} twice, at {found[other]} and {address}; omit one")
        found[other] = address
    if missing := [str(other) for other in range(lane) if other not in found]:
        raise ListenError(
            f"a node of lane {lane} dials its stage in every lower lane: say where those of lane {', '.join(missing)} "
            f"listen, --lateral {missing[0]}=host:port"
        )
    return dict(sorted(found.items()))


def check_listen(address: str) -> None:
    """Raises ListenError unless this machine could listen on `address` now."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(where)
            probe.listen()
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ListenError(f"cannot listen on {address}: {reason}; choose another --listen") from None
    except UnicodeError:  # of a name that is none, such as a..b
        raise ListenError(
            f"cannot listen on {address}: no machine is known as '{host}'; choose another --listen"
        ) from None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches host:port. A name other than localhost is not looked up: what it means may
    change. Raises ListenError."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(peer: str) -> str:
    """The address in gRPC's `ipv4:1.2.3.4:567` or `ipv6:%5B::1%5D:567`; "" for what is none."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    return host if kind in ("ipv4", "ipv6") else ""
