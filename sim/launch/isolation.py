"""A local swarm in network namespaces, one node in each, whose links the kernel caps instead of the transport.

The transport's own shaper caps what thinpipe sends; here tbf caps whatever passes the node's interface, headers, TCP's
acknowledgements and other programs included, both ways (see netns.py). A node has one interface for its
neighbours and for its own stage in other lanes, as a machine at the end of one thin line does, where `--link` gives
each a wire of its own: so the same number is a thinner swarm, and `thinpipe plan --rule shared` is the nearer plan.

Delay is netem's where the kernel has it (tried, not guessed). Where it has not, the transport's delay line does that
part, and the nodes are told which part is whose: they need the whole link to size their windows and to verify the cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..links import tc
from ..links.netns import Network, network
from ..links.shaper import LinkProfile
from .end_signals import ending_as_ctrl_c

PORT = 7001  # the same in every namespace


@dataclass(frozen=True, slots=True)
class Isolation:
    """Where the nodes of a swarm run, and how much of `link` the kernel does."""

    network: Network
    link: LinkProfile

    def record(self) -> dict[str, Any]:
        """For summary.json; `sent_` is what the kernel has counted on all nodes' interfaces, whole frames."""
        kernel, link = self.link.kernel, self.link
        delay = "netem" if kernel == "all" else "transport"
        counters = [self.network.counters(index) for index in range(len(self.network.nodes))]
        return {
            "by": "netns",
            "rate": "tbf" if kernel else None,
            "delay": delay if link.latency_s else None,
            "sent_bytes": sum(each.sent_bytes for each in counters),
            "sent_packets": sum(each.sent_packets for each in counters),
        }

    def __str__(self) -> str:
        link = self.link
        rate = f"{replace(link, latency_s=0.0, jitter_s=0.0, kernel='')} by tbf" if link.kernel else "no cap"
        delay = "netem" if link.kernel == "all" else "the transport, as this kernel has no netem"
        said = f"; {link.latency_s * 1000:g} ms by {delay}" if link.latency_s else ""
        return f"{len(self.network.nodes)} network namespaces, each interface with {rate}, both ways{said}"


@contextmanager
def isolated(nodes: int, profile: LinkProfile) -> Iterator[Isolation]:
    """Namespaces for so many `nodes`, while the body runs. Raises KernelLinkError with one line where that cannot be:
    no root, no `ip` or `tc`, a cap that the kernel refuses, more nodes than fit. Whatever ends the process otherwise,
    but for SIGKILL, ends the body as Ctrl-C does, and nothing stays behind."""
    with ending_as_ctrl_c(), _isolated(nodes, profile) as made:
        yield made


@contextmanager
def _isolated(nodes: int, profile: LinkProfile) -> Iterator[Isolation]:
    tc.require("ip", "tc")
    if profile.rate_bits_per_s is None:  # nothing to cap; a delay alone is the transport's
        by_kernel, link = LinkProfile(rate_bits_per_s=None), profile
    elif not profile.latency_s or tc.has_netem():
        by_kernel, link = profile, replace(profile, kernel="all")
    else:
        by_kernel, link = replace(profile, latency_s=0.0, jitter_s=0.0), replace(profile, kernel="rate")
    with network(nodes, by_kernel) as made:
        yield Isolation(made, link)
