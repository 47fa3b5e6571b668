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


def lane_addresses(words: Sequence[str], lane: int) -> dict[int, str]:
    """Where the nodes of a stage in the lanes below `lane` are, of words such as 0=host:port: one for each, in any
    order. Raises ListenError."""
    found: dict[int, str] = {}
    for word in words:
        number, equals, address = word.partition("=")
        if not (equals and number.isascii() and number.isdecimal()):
            raise ListenError(f"'{word}' is not LANE=HOST:PORT, such as 0=127.0.0.1:7001")
        split_address(address)
        if int(number) >= lane or int(number) in found:
            why = "comes twice" if int(number) in found else f"is not below lane {lane}, which dials lower lanes only"
            raise ListenError(f"'{word}': lane {int(number)} {why}")
        found[int(number)] = address
    if missing := [str(other) for other in range(lane) if other not in found]:
        raise ListenError(f"lane {lane} dials all lower lanes: say where {', '.join(missing)} is, as LANE=HOST:PORT")
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
