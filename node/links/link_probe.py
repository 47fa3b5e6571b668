"""The probe of a link at its start: it sends filler for a moment and measures the rate of the acknowledgements.

Not the rate at which it leaves: a path that is 12 % slower than the cap takes all that is sent until the window is
full, which is after eight windows, so a sender that watches its own queue sees its own cap. Acknowledgements come at
the pace of what arrived. Each message asks for one at once, and messages are small (5 ms of the link), because an
acknowledgement may have to wait for one that goes the other way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ...protocol.messages import Kind, Message
from ...sim.links.link_check import SteadyRate
from ...sim.links.shaper import LinkProfile

PROBE_S = 0.25  # several times the longest wake-up delay seen on a busy laptop
PROBE_BYTES_MAX = 32 * 2**20  # of links beyond 1 Gb/s
PROBE_MESSAGES_LEAST = 40  # of a thin link; one of them waiting for another is then a few per cent
PROBE_S_MAX = 2.0  # but no longer
HEAD_S, HEAD_BURSTS = 0.05, 4  # a window above the link's product empties a bucket in a few times its size
MESSAGE_S, MESSAGE_BYTES_LEAST = 0.005, 1024
PAUSE_S = 0.1
RATE_LEAST_BITS_PER_S = 100_000.0  # below, the time is too short for messages to be counted


class AcknowledgedRate:
    """What was acknowledged of filler, after the head; framed bytes, as everywhere."""

    def __init__(self, *, head_bytes: int) -> None:
        self._rate = SteadyRate(skip_bytes=head_bytes)
        self._data_bytes = self._framed_bytes = 0

    def stamped(self, data_bytes: int, framed_bytes: int) -> None:
        """A message goes onto the wire."""
        self._data_bytes += data_bytes
        self._framed_bytes += framed_bytes

    def acknowledged(self, unacknowledged_bytes: int, now_s: float) -> None:
        """The other side has said what it has got; so much data it lacks."""
        fresh = self._data_bytes - unacknowledged_bytes - self._rate.total_bytes
        if fresh > 0:
            self._rate.add(fresh, now_s)

    def bits_per_s(self) -> float | None:
        rate = self._rate.bits_per_s()
        return None if rate is None else rate * self._framed_bytes / self._data_bytes


def filler_bytes(rate_bits_per_s: float, burst_bytes: int) -> tuple[int, int, int]:
    """(head, all, one message) of a probe."""
    bytes_per_s = rate_bits_per_s / 8
    message = max(MESSAGE_BYTES_LEAST, int(MESSAGE_S * bytes_per_s))
    head = int(min(HEAD_BURSTS * burst_bytes, bytes_per_s) + min(HEAD_S * bytes_per_s, PROBE_BYTES_MAX / 8))
    steady = max(PROBE_S * bytes_per_s, min(PROBE_MESSAGES_LEAST * message, PROBE_S_MAX * bytes_per_s))
    return head, head + int(min(PROBE_BYTES_MAX, steady)), message


def probe_s(profile: LinkProfile) -> float:
    """How long a probe that agrees takes."""
    if profile.rate_bits_per_s is None or profile.rate_bits_per_s < RATE_LEAST_BITS_PER_S:
        return 0.0
    _, whole, _ = filler_bytes(profile.rate_bits_per_s, profile.burst_bytes)
    return profile.serialisation_s(whole) + 2 * profile.latency_s + PAUSE_S


async def fill(
    start: Callable[[AcknowledgedRate], None],
    send: Callable[[Message], Awaitable[None]],
    until_acknowledged: Callable[[], Awaitable[None]],
    *,
    rate_bits_per_s: float,
    burst_bytes: int,
    message_bytes_max: int,
) -> float | None:
    """One probe of a quiet link: bits/s, None where too little would cross to tell. `start`: count with this."""
    if rate_bits_per_s < RATE_LEAST_BITS_PER_S:
        return None
    head, left, size = filler_bytes(rate_bits_per_s, burst_bytes)
    meter = AcknowledgedRate(head_bytes=head)
    await until_acknowledged()
    start(meter)
    while left > 0:
        filler = bytes(min(left, size, message_bytes_max))
        left -= len(filler)
        await send(Message(kind=Kind.PROBE, step=0, microbatch=0, body=filler))
    await until_acknowledged()
    return meter.bits_per_s()
