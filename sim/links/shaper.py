"""The link model in user space: a token bucket, then a delay line, on the caller's clock.

A thin link is two things: a rate (a frame's bits take time to leave) and a latency (each bit takes time to travel). The
bucket holds at most `burst_bytes` of credit, filled at the rate; a frame departs when the credit covers it, and a frame
larger than the bucket waits for the difference, so every size passes. It arrives one latency later, never before its
predecessor: gRPC on TCP does not reorder. The model is netem's and tbf's (tc-netem(8), tc-tbf(8)), and so is the
spelling, so that one `LinkProfile` means the same here and in the kernel.

Everything is computed from ideal times, never from when the caller woke up: `admit` takes the moment at which the frame
*could* first have gone. A shaper that sleeps `bytes / rate` after each frame instead loses every late wake-up for good:
at 300 Mb/s a 128 KiB frame lasts 3.5 ms, so waking 1 ms late costs a fifth of the link.

Nothing can overtake a frame once it is admitted, so the caller admits a frame only when the wire is free, and asks the
queue at that moment, control frames first:

    while queue:
        free_s = shaper.wire_free_at(queue.ready_s())
        if free_s > now_s:
            break                                   # sleep until free_s, or until something is pushed
        entry = queue.pop(at_s=free_s)              # what an ideal sender would have picked at free_s
        passage = shaper.admit(entry.nbytes, entry.enqueued_s)
        ...                                         # hand entry.item over at max(now_s, passage.arrive_s)

All traffic to one peer goes through one Shaper: two would pass twice the rate.
"""

from __future__ import annotations

import math
import random as random_module
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")

# One HTTP/2 DATA frame (RFC 9113, section 6.5.2), the smallest unit in which gRPC writes a tensor: a bucket below it
# buys no smoothness, and above it lets short messages pass uncapped. (tbf in the kernel needs rate / HZ, some 150 kB at
# 300 Mb/s, because it acts on timer ticks; ideal times need no such allowance.)
DEFAULT_BURST_BYTES = 16384

_RATE_UNITS = {"gbit": Decimal(10**9), "mbit": Decimal(10**6), "kbit": Decimal(1000)}  # decimal, as in tc(8)
_TIME_UNITS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")}
_SIZE_UNITS = {"mb": Decimal(1024**2), "kb": Decimal(1024), "b": Decimal(1)}  # tc(8): sizes count in 1024s
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?([a-z]+)")
Kernel = Literal["", "rate", "all"]
_EXAMPLE = "write it as 300mbit,25ms or 80mbit,50ms,jitter=2ms,burst=64kb, or none"


class LinkError(ValueError):
    """A link profile is malformed; the message is one line with an example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """One direction of a link. `str` gives the canonical spelling and `parse` reads it back exactly.

    rate_bits_per_s: None is uncapped. latency_s: one way. jitter_s: arrivals vary by ± this much, uniformly, as with
    netem; at most the latency. burst_bytes: what an idle link passes at once; meaningless, so refused, without a rate.
    kernel: what of it the operating system does already (`sim.links.tc`): nothing, the rate, or all of it; what is left
    is `applied` by the transport, which knows the whole. Raises LinkError.
    """

    rate_bits_per_s: float | None
    latency_s: float = 0.0
    jitter_s: float = 0.0
    burst_bytes: int = DEFAULT_BURST_BYTES
    kernel: Kernel = ""

    def __post_init__(self) -> None:
        rate = self.rate_bits_per_s
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise LinkError(f"link rate {rate} bit/s is not a positive number; {_EXAMPLE}")
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise LinkError(f"link latency {self.latency_s} s is not 0 or more; {_EXAMPLE}")
        if not 0 <= self.jitter_s <= self.latency_s:
            raise LinkError(
                f"link jitter {self.jitter_s} s is not between 0 and latency {self.latency_s} s; {_EXAMPLE}"
            )
        if not 1 <= self.burst_bytes < 2**32:  # tc(8) stores sizes in 32 bits
            raise LinkError(f"link burst {self.burst_bytes} bytes is not between 1 and 2**32 - 1; {_EXAMPLE}")
        if rate is None and self.burst_bytes != DEFAULT_BURST_BYTES:
            raise LinkError(f"link burst {self.burst_bytes} bytes does nothing without a rate; {_EXAMPLE}")
        if rate is None and self.kernel:
            raise LinkError(f"link kernel={self.kernel} says nothing without a rate; {_EXAMPLE}")

    @classmethod
    def parse(cls, text: str) -> LinkProfile:
        """Read `rate,latency[,jitter=time][,burst=size][,kernel=rate|all]`, each part optional, any case, or `none`.

        Rates in kbit, mbit, gbit (1000s), times in us, ms, s, sizes in b, kb, mb (1024s, as tc). Raises LinkError.
        """
        if text.strip().lower() == "none":
            return cls(rate_bits_per_s=None)
        values: dict[str, Decimal] = {}
        kernel: Kernel = ""
        for part in text.lower().split(","):
            key, equals, said = (word.strip() for word in part.partition("="))
            if equals and key == "kernel":
                again, kernel = kernel, "rate" if said == "rate" else "all" if said == "all" else ""
                if again or not kernel:
                    raise LinkError(f"link {text!r}: kernel={said} is neither rate nor all, said once; {_EXAMPLE}")
                continue
            field, value = _read_part(part.strip(), text)
            if field in values:
                raise LinkError(f"link {text!r} says its {field} twice; {_EXAMPLE}")
            values[field] = value
        burst = values.get("burst", Decimal(DEFAULT_BURST_BYTES))
        if burst != burst.to_integral_value():
            raise LinkError(f"link {text!r} has a burst of {burst} bytes, not a whole number; {_EXAMPLE}")
        return cls(
            rate_bits_per_s=float(values["rate"]) if "rate" in values else None,
            latency_s=float(values.get("latency", 0)),
            jitter_s=float(values.get("jitter", 0)),
            burst_bytes=int(burst),
            kernel=kernel,
        )

    @property
    def applied(self) -> LinkProfile:
        """What of it is left for the transport to do."""
        if not self.kernel:
            return self
        unshaped = replace(self, rate_bits_per_s=None, burst_bytes=DEFAULT_BURST_BYTES, kernel="")
        return replace(unshaped, latency_s=0.0, jitter_s=0.0) if self.kernel == "all" else unshaped

    def __str__(self) -> str:
        parts = []
        if self.rate_bits_per_s is not None:
            parts.append(_spell(self.rate_bits_per_s, _RATE_UNITS))
        if self.latency_s:
            parts.append(_spell(self.latency_s, _TIME_UNITS))
        if self.jitter_s:
            parts.append(f"jitter={_spell(self.jitter_s, _TIME_UNITS)}")
        if self.burst_bytes != DEFAULT_BURST_BYTES:
            parts.append(f"burst={_spell_size(self.burst_bytes)}")
        if self.kernel:
            parts.append(f"kernel={self.kernel}")
        return ",".join(parts) or "none"

    def serialisation_s(self, nbytes: int) -> float:
        """How long `nbytes` occupy the wire at the rate; 0 when uncapped."""
        return 0.0 if self.rate_bits_per_s is None else nbytes * 8 / self.rate_bits_per_s

    def bandwidth_delay_product_bytes(self, round_trip_s: float | None = None) -> int | None:
        """Bytes that fill the link for a round trip (default: twice the latency), rounded up; None when uncapped."""
        if self.rate_bits_per_s is None:
            return None
        return math.ceil(self.rate_bits_per_s * (2 * self.latency_s if round_trip_s is None else round_trip_s) / 8)


def _read_part(part: str, text: str) -> tuple[str, Decimal]:
    key, equals, quantity = part.rpartition("=")
    match = _QUANTITY.fullmatch(quantity.strip())
    if match is None:
        raise LinkError(f"link {text!r}: {part!r} is not a number with a unit; {_EXAMPLE}")
    number, unit = match.groups()
    choices = {"jitter": _TIME_UNITS, "burst": _SIZE_UNITS} if equals else {"rate": _RATE_UNITS, "latency": _TIME_UNITS}
    if equals and key.strip() not in choices:
        raise LinkError(
            f"link {text!r}: unknown setting {key.strip()!r}, known are jitter, burst and kernel; {_EXAMPLE}"
        )
    for field, units in choices.items():
        if unit in units and (not equals or field == key.strip()):
            return field, Decimal(number) * units[unit]
    known = choices[key.strip()] if equals else [*_RATE_UNITS, *_TIME_UNITS]
    raise LinkError(f"link {text!r}: unknown unit {unit!r} in {part!r}, known are {', '.join(known)}; {_EXAMPLE}")


def _spell(value: float, units: dict[str, Decimal]) -> str:
    """In the largest unit that leaves at least 1. Decimal shifts are exact, so the spelling reads back to the bit."""
    exact = Decimal(repr(float(value)))
    unit = next((name for name, factor in units.items() if exact >= factor), list(units)[-1])
    return f"{(exact / units[unit]).normalize():f}{unit}"


def _spell_size(nbytes: int) -> str:
    unit = next(name for name, factor in _SIZE_UNITS.items() if nbytes % int(factor) == 0)
    return f"{nbytes // int(_SIZE_UNITS[unit])}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """When a frame's last bit leaves the bucket and when it reaches the peer, on the caller's clock.

    paid_from_s: since when the rate earned what the frame took. Before it was there, if the bucket held credit.
    """

    depart_s: float
    arrive_s: float
    paid_from_s: float


class Shaper:
    """One direction of one link. `random` gives jitter: a seed, or a callable returning values in [0, 1)."""

    def __init__(self, profile: LinkProfile, *, random: Callable[[], float] | int = 0) -> None:
        self.profile = profile
        self.passed_bytes = 0
        self._random = random_module.Random(random).random if isinstance(random, int) else random
        self._empty_s = -math.inf  # when the bucket held no credit; credit at t is rate * (t - _empty_s), up to burst
        self._depart_s = -math.inf  # of the last frame
        self._arrive_s = -math.inf

    def wire_free_at(self, eligible_at_s: float) -> float:
        """When a frame that is eligible at that time can be put on the wire, all admitted ones having left it."""
        return max(eligible_at_s, self._depart_s)

    def admit(self, nbytes: int, eligible_at_s: float) -> Passage:
        """Put the next frame on the wire; call order is wire order, and what is admitted cannot be overtaken.

        eligible_at_s is when the frame could first have gone: enqueued, and its window open. It may lie in the past, as
        may the answer; the caller acts at once then, and the link has lost nothing. Raises ValueError below 0 bytes.
        """
        if nbytes < 0:
            raise ValueError(f"a frame of {nbytes} bytes cannot pass a link; the size must be 0 or more")
        start_s = self.wire_free_at(eligible_at_s)
        fill_s = self.profile.serialisation_s(self.profile.burst_bytes)
        paid_from_s = max(self._empty_s, start_s - fill_s)
        self._empty_s = paid_from_s + self.profile.serialisation_s(nbytes)
        self._depart_s = max(start_s, self._empty_s)
        delay_s = self.profile.latency_s
        if self.profile.jitter_s:
            delay_s += self.profile.jitter_s * (2 * self._random() - 1)
        self._arrive_s = max(self._arrive_s, self._depart_s + delay_s)
        self.passed_bytes += nbytes
        return Passage(depart_s=self._depart_s, arrive_s=self._arrive_s, paid_from_s=paid_from_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Generic[Item]):
    """One frame in the queue, with what the shaper needs to know."""

    item: Item
    nbytes: int
    control: bool
    enqueued_s: float


class WireQueue(Generic[Item]):
    """Frames that wait for the wire: control ahead of tensors, first in first out within each."""

    def __init__(self) -> None:
        self.queued_bytes = 0
        self._control: deque[Queued[Item]] = deque()
        self._tensor: deque[Queued[Item]] = deque()

    def __len__(self) -> int:
        return len(self._control) + len(self._tensor)

    def push(self, item: Item, nbytes: int, *, control: bool, now_s: float) -> None:
        entry = Queued(item=item, nbytes=nbytes, control=control, enqueued_s=now_s)
        (self._control if control else self._tensor).append(entry)
        self.queued_bytes += nbytes

    def ready_s(self, *, control_only: bool = False) -> float:
        """When the frame that has waited longest was pushed; inf when none may go."""
        return min((queue[0].enqueued_s for queue in self._waiting(control_only)), default=math.inf)

    def peek(self, *, at_s: float = math.inf, control_only: bool = False) -> Queued[Item] | None:
        """What `pop` would take; None when none may go."""
        queue = self._next(at_s, control_only)
        return queue[0] if queue else None

    def peek_tensor(self) -> Queued[Item] | None:
        """The tensor frame that goes next, control frames ahead of it or not: what a window has to fit."""
        return self._tensor[0] if self._tensor else None

    def pop(self, *, at_s: float = math.inf, control_only: bool = False) -> Queued[Item]:
        """Take the frame that goes next; control_only: the window for tensors is closed.

        at_s: choose among what had been pushed by then, the first to come where nothing had; so a sender that wakes
        late does not let the wire idle in the past. Raises IndexError when none may go.
        """
        entry = self._next(at_s, control_only).popleft()
        self.queued_bytes -= entry.nbytes
        return entry

    def _waiting(self, control_only: bool) -> list[deque[Queued[Item]]]:
        return [queue for queue in ((self._control,) if control_only else (self._control, self._tensor)) if queue]

    def _next(self, at_s: float, control_only: bool) -> deque[Queued[Item]]:
        # Lateness at at_s (0: it was there in time) comes before class; of equals, min() takes the first, control.
        waiting = self._waiting(control_only)
        return min(waiting, key=lambda queue: max(0.0, queue[0].enqueued_s - at_s), default=self._control)


class BusyMeter:
    """The rate that a link delivered while its queue was not empty: what says whether a cap holds, and binds.

    Bytes over the whole run would measure the schedule, not the link. Times may be ideal (`Passage.depart_s`, which may
    lie ahead of the clock; overlap counts once) or, to verify a cap, when frames really left. A lone short message then
    measures how late its sender woke up, so intervals with fewer than `least_bytes` are dropped when they end.

    An idle link passes its burst at once. The rate earned that credit while the link idled, so the time in which it did
    belongs to the interval: `passed` begins one at `Passage.paid_from_s`. Begun at the first frame instead, an interval
    would read high by its credit: 16 KiB are a tenth of a message of `tiny`. Credit subtracted from the bytes instead
    would come to the same where the cap binds, and read too low where the path is slower than the cap.
    """

    def __init__(self, *, least_bytes: int = 0) -> None:
        self._least_bytes = least_bytes
        self._before = (0.0, 0, -math.inf)  # busy_s, busy_bytes and _counted_s when the interval began
        self.busy_s = 0.0
        self.busy_bytes = 0
        self.intervals = 0
        self.busy = False
        self._counted_s = -math.inf  # busy_s covers everything up to here
        self._last_left_s = 0.0  # of the last frame in `passed`

    def passed(self, nbytes: int, *, enqueued_s: float, paid_from_s: float, left_s: float, tensor: bool) -> None:
        """A frame has left at `left_s`, which was queued at `enqueued_s`. Begins and ends intervals by itself.

        The queue was not empty since the last frame left if this one waited by then; otherwise a new interval began
        when it was queued, or when its credit was earned. A control frame alone is no interval: nobody waited for
        bandwidth.
        """
        waited = enqueued_s <= self._last_left_s
        if tensor and not (self.busy and waited):
            if self.busy:
                self.end(self._last_left_s)
            self.begin(min(max(enqueued_s, self._last_left_s), paid_from_s))
        if self.busy and (tensor or waited):
            self.delivered(nbytes, left_s)
            self._last_left_s = left_s

    def begin(self, now_s: float) -> None:
        """The queue is no longer empty. Raises ValueError when it was not."""
        if self.busy:
            raise ValueError(f"begin at {now_s} s while busy; call begin only when the queue was empty")
        self.busy = True
        self.intervals += 1
        self._before = (self.busy_s, self.busy_bytes, self._counted_s)
        self._counted_s = max(self._counted_s, now_s)

    def delivered(self, nbytes: int, now_s: float) -> None:
        """A frame has left. Raises ValueError outside of an interval."""
        self._count_to(now_s, "delivered")
        self.busy_bytes += nbytes

    def end(self, now_s: float) -> None:
        """The last frame has left and none waits. Raises ValueError outside of an interval."""
        self._count_to(now_s, "end")
        self.busy = False
        if self.busy_bytes - self._before[1] < self._least_bytes:
            self.busy_s, self.busy_bytes, self._counted_s = self._before
            self.intervals -= 1

    def rate_bits_per_s(self) -> float | None:
        """None before anything was delivered in a time above zero."""
        return self.busy_bytes * 8 / self.busy_s if self.busy_bytes and self.busy_s > 0 else None

    def _count_to(self, now_s: float, what: str) -> None:
        if not self.busy:
            raise ValueError(f"{what} at {now_s} s while idle; call begin when the queue becomes non-empty")
        self.busy_s += max(0.0, now_s - self._counted_s)
        self._counted_s = max(self._counted_s, now_s)
