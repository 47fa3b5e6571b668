"""The totals of one process over all generations: what it spent, sent and received, for its last record.

Links and their meters are made anew with each generation; what they counted is added here when the generation is over.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ..sim.reports.summary import OUTSIDE_RATIO
from .links.link import Link
from .run_records import Lap, Stopwatch


@dataclass(slots=True)
class _Earlier:
    """Of one link, in the generations before this one."""

    received_bytes: int = 0
    busy_s: float = 0.0
    busy_bytes: int = 0


@dataclass(slots=True)
class RunTotals:
    """train_s, cpu_s: of steps. watch: what its threads did."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    train_s: float = 0.0
    cpu_s: float = 0.0
    _counted: dict[str, int] = field(default_factory=dict)  # by link: bytes of training up to the last step
    _links: defaultdict[str, _Earlier] = field(default_factory=lambda: defaultdict(_Earlier))

    def step(self, lap: Lap) -> dict[str, float]:
        """A step is done; returns what the threads spent on it."""
        self.train_s += lap.seconds
        self.cpu_s += lap.cpu_s
        return self.watch.take()

    def close(self, link: Link) -> None:
        """The link's generation is over."""
        earlier, meter = self._links[link.name], link.meter
        self._counted[link.name] = _training_bytes(link)
        earlier.received_bytes += link.received_bytes
        earlier.busy_s += meter.busy_s
        earlier.busy_bytes += meter.busy_bytes

    def record(self, link: Link) -> dict[str, Any]:
        """What this node sent over one boundary, and how fast while its queue was not empty."""
        # Where the kernel holds the rate, when bytes leave here says nothing of it; the probe at the start does.
        blind = bool(link.profile.kernel)
        rate, (busy_s, busy_bytes) = link.profile.rate_bits_per_s, self._busy(link)
        return {
            **link.way,
            "link": str(link.profile),
            "configured_bits_per_s": rate,
            "measured_bits_per_s": busy_bytes * 8 / busy_s if busy_s and not blind else None,
            "busy_s": round(busy_s, 6),
            "utilisation": _training_bytes(link) * 8 / (rate * self.train_s) if rate and self.train_s else None,
            "sent_bytes": dict(link.sent),
            "received_bytes": self._received(link),
        }

    def step_record(self, link: Link, seconds: float) -> dict[str, Any]:
        """The same as it is at the end of a step that took `seconds`. used: what training sent, over that time."""
        before, now = self._counted.get(link.name, 0), _training_bytes(link)
        self._counted[link.name] = now
        busy_s, busy_bytes = self._busy(link)
        return {
            **link.way,
            "configured_bits_per_s": link.profile.rate_bits_per_s,
            "measured_bits_per_s": round(busy_bytes * 8 / busy_s) if busy_s and not link.profile.kernel else None,
            "used_bits_per_s": round((now - before) * 8 / seconds),
            "received_bytes": self._received(link),
        }

    def _busy(self, link: Link) -> tuple[float, int]:
        """Seconds in which its queue was not empty, and what left in them."""
        earlier, meter = self._links[link.name], link.meter
        return earlier.busy_s + meter.busy_s, earlier.busy_bytes + meter.busy_bytes

    def _received(self, link: Link) -> int:
        return self._links[link.name].received_bytes + link.received_bytes


def _training_bytes(link: Link) -> int:
    return sum(count for kind, count in link.sent.items() if kind not in OUTSIDE_RATIO)
