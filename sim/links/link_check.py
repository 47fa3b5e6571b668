"""Does the link have its configured rate and delay? The steady part of a transfer is compared with the link's profile.

The beginning of a transfer is not steady: a bucket passes its burst at once, TCP looks for its rate, and the first
window of bytes leaves before any of it has been received. So the beginning is left out, and the rate is that of the
rest. Configured and measured values are shown side by side everywhere, because a cap that limits less than it says
makes every figure of a run wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.10  # of the configured rate or round trip; a larger difference is reported
ROUND_TRIP_SLACK_S = 0.002  # that late wake-ups add, whatever the latency


class SteadyRate:
    """The rate of a transfer after its head: the first `skip_s` or `skip_bytes`, whichever is over first.

    Constant memory. The frame that ends the head starts the clock and is not counted.
    """

    def __init__(self, *, skip_bytes: float, skip_s: float = math.inf) -> None:
        self._skip_bytes, self._skip_s = skip_bytes, skip_s
        self._first_s: float | None = None
        self._mark: tuple[float, int] | None = None
        self._last_s = 0.0
        self.total_bytes = 0

    def add(self, nbytes: int, now_s: float) -> None:
        """A frame has passed."""
        self.total_bytes += nbytes
        self._first_s = now_s if self._first_s is None else self._first_s
        self._last_s = now_s
        past = self.total_bytes >= self._skip_bytes or now_s - self._first_s >= self._skip_s
        if self._mark is None and past:
            self._mark = (now_s, self.total_bytes)

    @property
    def steady_bytes(self) -> int:
        return self.total_bytes - self._mark[1] if self._mark else 0

    @property
    def steady_s(self) -> float:
        return self._last_s - self._mark[0] if self._mark else 0.0

    def bits_per_s(self) -> float | None:
        """None where too little came to tell."""
        return self.steady_bytes * 8 / self.steady_s if self.steady_bytes and self.steady_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCheck:
    """One direction: the rate that is configured (None: not capped here) and what was measured (None: nothing).

    name: whose, in words. round_trip_s: measured, None where it was not. tries: how often it was measured until it
    agreed.
    """

    name: str
    configured_bits_per_s: float | None
    measured_bits_per_s: float | None
    round_trip_s: float | None = None
    tries: int = 1

    @property
    def deviation(self) -> float | None:
        """Measured over configured, less 1."""
        if self.configured_bits_per_s is None or self.measured_bits_per_s is None:
            return None
        return self.measured_bits_per_s / self.configured_bits_per_s - 1

    @property
    def misses(self) -> bool:
        return self.deviation is not None and abs(self.deviation) > TOLERANCE

    @property
    def warning(self) -> str | None:
        """One line, if it is not what is configured."""
        if not self.misses or self.deviation is None:
            return None
        assert self.configured_bits_per_s
        assert self.measured_bits_per_s
        remedy = (
            "the path itself is slower or busy: configure what it can carry"
            if self.deviation < 0
            else "the cap does not hold: figures of this run would be those of a faster link"
        )
        return (
            f"{self.name}: configured {self.configured_bits_per_s / 1e6:.4g} Mb/s, measured "
            f"{self.measured_bits_per_s / 1e6:.4g} Mb/s ({self.deviation:+.1%}, {TOLERANCE:.0%} is tolerated); {remedy}"
        )

    def __str__(self) -> str:
        if self.configured_bits_per_s is None:
            rate = "not capped here"
        elif self.measured_bits_per_s is None:
            rate = "not measured"
        else:
            rate = f"measured {self.measured_bits_per_s / 1e6:.1f} Mb/s ({self.deviation:+.1%})"
        return rate if self.round_trip_s is None else f"{rate}, round trip {self.round_trip_s * 1000:.1f} ms"

    def record(self) -> dict[str, Any]:
        """For a JSON record."""
        return {
            "name": self.name,
            "configured_bits_per_s": self.configured_bits_per_s,
            "measured_bits_per_s": self.measured_bits_per_s,
            "round_trip_s": self.round_trip_s,
            "tries": self.tries,
            "warning": self.warning,
        }


def round_trip_warning(name: str, configured_s: float, measured_s: float) -> str | None:
    """One line, if a round trip takes another time than the latency of both ways."""
    off_s = abs(measured_s - configured_s)
    if off_s <= TOLERANCE * configured_s + ROUND_TRIP_SLACK_S:
        return None
    return (
        f"{name}: the configured latency makes a round trip of {configured_s * 1000:.4g} ms, measured "
        f"{measured_s * 1000:.4g} ms ({measured_s / configured_s - 1:+.1%}, {TOLERANCE:.0%} is tolerated); "
        "the path's own latency comes on top: configure the difference"
    )
