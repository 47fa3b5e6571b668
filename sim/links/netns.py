"""Several network namespaces on one machine, joined by a switch, each behind a thin link that the kernel caps.

        node 0 namespace        switch namespace        node 1 namespace
        eth0 [tbf]  <-- veth -->  [tbf] port0
                                       bridge
                                  [tbf] port1  <-- veth -->  [tbf] eth0

A namespace has interfaces, addresses and counters of its own, so what runs in one sees nothing but its thin link: any
program, not only thinpipe. The tbf of eth0 caps what a node sends, the one of its port what it receives. A node with
two neighbours sends to both through one link, as an office does; `--link` in user space caps each neighbour apart.

The bridge lives in a namespace too, not between the machine's own interfaces, where its firewall would have a say. So
everything is gone when the namespaces are: `network` takes them away at the end, after errors and Ctrl-C too, and ends
what still runs in them. Names hold the process and when it was started, so two runs do not meet; what a killed process
(SIGKILL) left behind is taken away by the next one. Why not containers or Mininet: this is a dozen calls of `ip`.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count

from . import tc
from .shaper import LinkProfile
from .tc import KernelLinkError, namespace_name, require, run, started

_NAME = re.compile(r"^thinpipe-(\d+)-(?:at(\d+)-)?\S+", re.MULTILINE)
_SERIAL = count()
NODES_MAX = 250  # in a /24


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Of a node's eth0, as its kernel counts: whole frames, headers included."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int


@dataclass(slots=True)
class Network:
    """`nodes` names of namespaces, one a machine; `addresses` how they reach each other."""

    nodes: list[str]
    switch: str
    addresses: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.addresses = [f"10.77.0.{index + 1}" for index in range(len(self.nodes))]

    def prefix(self, index: int) -> list[str]:
        """Put before a command, this runs it on that node; the process keeps the id that its starter sees."""
        return ["ip", "netns", "exec", self.nodes[index]]

    def cap(self, profile: LinkProfile) -> None:
        """Every node's link, both ways, from now on; `none` takes the cap off. The latency is on the sender's end
        alone, or it would count twice. Raises KernelLinkError."""
        prompt = replace(profile, latency_s=0.0, jitter_s=0.0)
        for index, node in enumerate(self.nodes):
            tc.cap("eth0", profile, namespace=node)
            tc.cap(f"port{index}", prompt, namespace=self.switch)

    def counters(self, index: int) -> Counters:
        """What has passed that node's link since it is there."""
        names = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")
        files = [f"/sys/class/net/eth0/statistics/{name}" for name in names]
        sent, received, sent_packets, received_packets = map(int, run([*self.prefix(index), "cat", *files]).split())
        return Counters(
            sent_bytes=sent, received_bytes=received, sent_packets=sent_packets, received_packets=received_packets
        )


def check() -> None:
    """Try whether namespaces, veth pairs, a bridge and tbf can be had. Raises KernelLinkError with one line."""
    with network(1, LinkProfile(rate_bits_per_s=1e8)):
        pass


@contextmanager
def network(nodes: int, profile: LinkProfile) -> Iterator[Network]:
    """`nodes` machines behind links that are capped so. Raises KernelLinkError with one line where that cannot be."""
    if not 1 <= nodes <= NODES_MAX:
        raise KernelLinkError(f"a network of {nodes} nodes; between 1 and {NODES_MAX} fit")
    require("ip", "tc")
    _sweep()
    name = namespace_name(str(next(_SERIAL)))
    made = Network([f"{name}-node{index}" for index in range(nodes)], f"{name}-switch")
    try:
        _build(made)
        made.cap(profile)
        yield made
    finally:
        with _undisturbed():
            _remove([*made.nodes, made.switch])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that end a process wait until the body is done, so that even two Ctrl-C leave nothing behind."""
    if threading.current_thread() is not threading.main_thread():  # where signals are handled
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _build(made: Network) -> None:
    switch = ["ip", "-n", made.switch]
    run(["ip", "netns", "add", made.switch])
    run([*switch, "link", "add", "bridge", "type", "bridge"])
    run([*switch, "link", "set", "bridge", "up"])
    for index, (node, address) in enumerate(zip(made.nodes, made.addresses, strict=True)):
        port = f"port{index}"
        run(["ip", "netns", "add", node])
        run([*switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node])
        run([*switch, "link", "set", port, "master", "bridge", "up"])
        run(["ip", "-n", node, "link", "set", "lo", "up"])
        run(["ip", "-n", node, "address", "add", f"{address}/24", "dev", "eth0"])
        run(["ip", "-n", node, "link", "set", "eth0", "up"])


def existing() -> set[str]:
    """The names of all namespaces that this module made, in whatever process."""
    return {match.group() for match in _NAME.finditer(run(["ip", "netns", "list"]))}


def _remove(names: list[str]) -> None:
    """End what runs in them and remove them. One that is gone already is no error, because another process may clean up
    at the same time. One that cannot be removed does not stop the rest; the next start tries it again."""
    for name in sorted(existing() & set(names)):
        with suppress(KernelLinkError):
            for pid in run(["ip", "netns", "pids", name]).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        with suppress(KernelLinkError):
            run(["ip", "netns", "del", name])


def _sweep() -> None:
    """Take away what belongs to processes that are no longer there."""
    for name in existing():
        match = _NAME.match(name)
        assert match
        since = started(int(match[1]))
        if since is None or (match[2] and since != int(match[2])):
            _remove([name])
