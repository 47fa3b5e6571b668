"""The address at which a node serves its figures over HTTP, spelled alike in settings, options and readers.

`9100` is a port that only this machine can reach, because others should see a run's losses only if somebody says so.
`0.0.0.0:9100` serves them to all. In a swarm on one machine, stage N uses the port plus N, and the stages of the next
lane the ports behind those.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"


class MetricsAddressError(ValueError):
    """No such address, or it cannot be had; one line."""


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """port 0: any that is free."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> MetricsAddress:
        """Of PORT, host:port or [IPv6]:port. Raises MetricsAddressError."""
        host, colon, port = text.strip().rpartition(":")
        if (colon and not host) or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
            raise MetricsAddressError(f"'{text}' is neither a port nor host:port, such as 9100 or 0.0.0.0:9100")
        host = host.removeprefix("[").removesuffix("]") or LOOPBACK
        try:
            host.encode("idna")  # as resolvers are asked, where it would be no OSError
        except UnicodeError:
            raise MetricsAddressError(f"'{text}': no machine can be known as '{host}'; check the name") from None
        return cls(host, int(port))

    def of_stage(self, stage: int) -> MetricsAddress:
        """That of stage `stage` where this is stage 0's. Raises MetricsAddressError past the last port."""
        port = self.port and self.port + stage
        if port > 65535:
            raise MetricsAddressError(f"port {self.port} + {stage} for stage {stage} is past 65535; choose a lower one")
        return MetricsAddress(self.host, port)

    def of_node(self, stage: int, lane: int, stages: int) -> MetricsAddress:
        """That of stage `stage` in lane `lane`, of lanes with so many stages, where this is stage 0's of lane 0. Raises
        as `of_stage`."""
        return self.of_stage(lane * stages + stage)

    def check_free(self) -> None:
        """Raises MetricsAddressError unless this machine could listen here now."""
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(where)
                probe.listen()
        except OSError as error:
            raise self.taken(error) from None

    def taken(self, error: OSError) -> MetricsAddressError:
        """What to say when listening here has failed."""
        why = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        if isinstance(error, socket.gaierror):
            why = f"no machine is known as '{self.host}'"
        return MetricsAddressError(f"cannot serve figures at {self}: {why}; choose another --prometheus, or omit it")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
