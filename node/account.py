"""What one process has spent, sent and received over all epochs, so that its last record speaks of all of it.

Links and their meters are made anew with each epoch; what they counted is added here when the epoch is over.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ..sim.report import OUTSIDE_RATIO
from .link import Link
from .metrics import Lap, Stopwatch


@dataclass(slots=True)
class _Earlier:
    """Of one link, in the epochs before this one."""

    received_bytes: int = 0
    busy_s: float = 0.0
    busy_bytes: int = 0


@dataclass(slots=True)
class Account:
    """train_s, cpu_s: of steps. watch: what its threads did."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    train_s: float = 0.0
    cpu_s: float = 0.0
    _links: defaultdict[str, _Earlier] = field(default_factory=lambda: defaultdict(_Earlier))

    def step(self, lap: Lap) -> dict[str, float]:
        """A step is done; returns what the threads spent on it."""
        self.train_s += lap.seconds
        self.cpu_s += lap.cpu_s
        return self.watch.take()

    def close(self, link: Link) -> None:
        """The link's epoch is over."""
        earlier, meter = self._links[link.name], link.meter
        earlier.received_bytes += link.received_bytes
        earlier.busy_s += meter.busy_s
        earlier.busy_bytes += meter.busy_bytes

    def record(self, link: Link) -> dict[str, Any]:
        """What this node sent over one boundary, and how fast while its queue was not empty."""
        # Where the kernel holds the rate, when bytes leave here says nothing of it; the probe at the start does.
        blind = bool(link.profile.kernel)
        rate, earlier, meter = link.profile.rate_bits_per_s, self._links[link.name], link.meter
        training = sum(count for kind, count in link.sent.items() if kind not in OUTSIDE_RATIO)
        busy_s, busy_bytes = earlier.busy_s + meter.busy_s, earlier.busy_bytes + meter.busy_bytes
        return {
            **link.way,
            "link": str(link.profile),
            "configured_bits_per_s": rate,
            "measured_bits_per_s": busy_bytes * 8 / busy_s if busy_s and not blind else None,
            "busy_s": round(busy_s, 6),
            "utilisation": training * 8 / (rate * self.train_s) if rate and self.train_s else None,
            "sent_bytes": dict(link.sent),
            "received_bytes": earlier.received_bytes + link.received_bytes,
        }
