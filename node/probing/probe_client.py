"""The asking side of a probe: one stream, from the terms to what the other side measured.

Input is bounded here as on the other side: the accepted terms cannot exceed the requested ones, filler beyond them ends
the probe, and every wait has a deadline. Why the other side is believed about what it received: nobody else can see it,
and a lie spoils nothing but a figure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio

from ... import __version__
from ...protocol.errors import ProtocolError, RefusedError
from ...protocol.messages import Refusal
from ...protocol.path_probe import (
    DialBackResult,
    Done,
    Echo,
    Filler,
    InfoRequest,
    InfoResponse,
    Measured,
    Outcome,
    ProbeMessage,
    Terms,
    Turn,
    decode_probe,
    encode_probe,
)
from ...protocol.wire_size import framed_bytes
from ...sim.links.link_check import SteadyRate
from ...sim.links.shaper import LinkProfile
from ..links.outgoing import Write
from ..links.probe_server import WAIT_S, Pacer, Read, meter_of
from ..links.transport import PROBE_METHOD
from ..security.policy import PLAIN, Security
from .reach import REMEDY, ProbeError, reachable, stream, within

ECHOES = 20
ECHOES_LEAST, ECHOES_S = 3, 2.0  # so many at least, and then no more after this time
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """profile: how this side shaped; terms: how the other did. trips: seconds. down, up: None if not measured."""

    profile: LinkProfile
    wish: Terms
    terms: Terms
    trips: list[float]
    down: SteadyRate | None
    up: Measured | None


async def ask(
    address: str, profile: LinkProfile, seconds: float, *, deadline_s: float = WAIT_S, security: Security = PLAIN
) -> Findings:
    """Measure the path to `address`, `seconds` in each direction, both sides shaping by `profile`.

    deadline_s: for the other side to be there. Raises ProbeError.
    """
    wish = Terms(
        milliseconds=int(seconds * 1000),
        rate_bits_per_s=int(profile.rate_bits_per_s or 0),
        latency_us=int(profile.latency_s * 1e6),
        jitter_us=int(profile.jitter_s * 1e6),
        burst_bytes=profile.burst_bytes if profile.rate_bits_per_s else 0,
    )
    with _named(address):
        target = await reachable(address, deadline_s)
        async with stream(address, target, PROBE_METHOD, deadline_s, security) as (read, write):
            return await _Conversation(address, profile, wish, read, write, deadline_s).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Visited:
    """offset_s: how far the clock there is ahead of ours, give or take half the round trip. outcome: None if nothing
    was to be dialled."""

    about: InfoResponse
    round_trip_s: float
    offset_s: float
    outcome: Outcome | None


async def visit(
    address: str, *, port: int, token: bytes, deadline_s: float = WAIT_S, security: Security = PLAIN
) -> Visited:
    """Ask the node at `address` who it is, how late it is there, and to dial `port` of this machine (0: not).

    token: `TOKEN_BYTES`; the other side proves with it that it dialled (`dial_back_proof`). Raises ProbeError.
    """
    with _named(address):
        target = await reachable(address, deadline_s)
        async with stream(address, target, PROBE_METHOD, deadline_s, security) as (read, write):

            async def hear(kind: type[T], what: str) -> T:
                raw = await within(deadline_s, read(), f"{address} {what}")
                if raw is None:
                    raise ConnectionError("the stream ended")
                said = decode_probe(raw)
                if isinstance(said, Refusal):
                    raise RefusedError(said.code, said.reason)
                if not isinstance(said, kind):
                    raise ConnectionError("an unexpected frame")
                return said

            asked_s, began = time.time(), time.monotonic()
            visiting = write(encode_probe(InfoRequest(port=port, token=token, version=__version__)))
            await within(deadline_s, visiting, f"{address} takes no visit")
            about = await hear(InfoResponse, "does not say who it is")
            trip_s = time.monotonic() - began
            dialled = await hear(DialBackResult, "does not send the result of connecting back") if port else None
            return Visited(
                about=about,
                round_trip_s=trip_s,
                offset_s=about.unix_us / 1e6 - asked_s - trip_s / 2,
                outcome=dialled and dialled.outcome,
            )


@contextmanager
def _named(address: str) -> Iterator[None]:
    """What can go wrong on the way, as a ProbeError that says which of it it was."""
    try:
        yield
    except RefusedError as error:
        raise ProbeError(f"{address} refuses the probe: {error}", 1) from None
    except ProtocolError as error:
        raise ProbeError(f"{address} answers, but not like a probe: {error}", 2) from None
    except grpc.aio.AioRpcError as error:
        raise _broken(address, error) from None
    except TimeoutError:
        raise ProbeError(f"{address} accepted the probe and then did not answer in time; try again", 1) from None
    except (ConnectionError, asyncio.InvalidStateError):
        raise ProbeError(f"{address} ended the probe before it was complete; try again", 1) from None


def _broken(address: str, error: grpc.aio.AioRpcError) -> ProbeError:
    if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return ProbeError(f"what answers at {address} speaks gRPC but answers no probe: {REMEDY}", 2)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ProbeError(f"{address} serves as many streams as it accepts; try again in a moment", 1)
    return ProbeError(f"the connection to {address} broke ({error.details()}); try again", 1)


class _Conversation:
    """The side that asks: terms, echoes, the other side's filler, its own, and the result."""

    def __init__(
        self, address: str, profile: LinkProfile, wish: Terms, read: Read, write: Write, deadline_s: float
    ) -> None:
        self._address, self._profile, self._wish, self._deadline_s = address, profile, wish, deadline_s
        self._read, self._pacer = read, Pacer(profile, write)

    async def run(self) -> Findings:
        asking = self._pacer.say(encode_probe(self._wish))
        await within(self._deadline_s + self._profile.latency_s, asking, f"{self._address} takes no probe")
        terms = await within(
            self._deadline_s + self._profile.latency_s, self._hear(Terms), f"{self._address} answers no probe"
        )
        terms = self._acceptable(terms)
        trips = await self._echoes()
        down = up = None
        if not terms.round_trips_only:
            down = await self._down(terms)
            up = await self._up(terms)
        return Findings(profile=self._profile, wish=self._wish, terms=terms, trips=trips, down=down, up=up)

    def _acceptable(self, terms: Terms) -> Terms:
        """At most what was asked for: the other side's word does not decide how long and how much is sent from here."""
        kept = terms.within_limits()
        return Terms(
            milliseconds=min(kept.milliseconds, self._wish.milliseconds),
            bytes=min(kept.bytes, self._wish.bytes),
            rate_bits_per_s=kept.rate_bits_per_s,
            latency_us=kept.latency_us,
            jitter_us=kept.jitter_us,
            burst_bytes=kept.burst_bytes,
            round_trips_only=kept.round_trips_only,
        )

    async def _hear(self, kind: type[T]) -> T:
        """The next frame, which has to be of that kind. Raises RefusedError, RemoteProtocolError, ConnectionError."""
        said, _ = await self._next()
        if not isinstance(said, kind):
            raise ConnectionError("an unexpected frame")
        return said

    async def _next(self, timeout_s: float = 2 * WAIT_S) -> tuple[ProbeMessage, int]:
        async with asyncio.timeout(timeout_s):
            raw = await self._read()
        if raw is None:
            raise ConnectionError("the stream ended")
        said = decode_probe(raw)
        if isinstance(said, Refusal):
            raise RefusedError(said.code, said.reason)
        return said, framed_bytes(len(raw))

    async def _echoes(self) -> list[float]:
        """Round trips in seconds; the first, which warms the path, is left out."""
        began, trips = time.monotonic(), list[float]()
        for number in range(ECHOES + 1):
            if number > ECHOES_LEAST and time.monotonic() - began > ECHOES_S:
                break
            sent = time.monotonic()
            await self._pacer.say(encode_probe(Echo(number)))
            if (await self._hear(Echo)).number != number:
                raise ConnectionError("an unexpected echo")
            trips.append(time.monotonic() - sent)
        return trips[1:]

    async def _down(self, terms: Terms) -> SteadyRate:
        meter = meter_of(terms)
        await self._pacer.say(encode_probe(Turn()))
        async with asyncio.timeout(terms.seconds + 2 * WAIT_S):
            while True:
                said, nbytes = await self._next()
                if isinstance(said, Done):
                    return meter
                if not isinstance(said, Filler) or meter.total_bytes > 2 * terms.bytes + 2**20:
                    raise ConnectionError("an unexpected frame")
                meter.add(nbytes, time.monotonic())

    async def _up(self, terms: Terms) -> Measured:
        """The other side's word of what came; it is asked for in the time that this side's buffers may take."""
        refused = asyncio.ensure_future(self._next(terms.seconds + 2 * WAIT_S))

        def go_on() -> None:
            if refused.done():
                refused.result()  # raises what it was; anything else comes too early
                raise ConnectionError("an unexpected frame")

        try:
            sending = Pacer(self._profile, self._pacer.write)
            await sending.fill(terms, go_on)
            said, _ = await refused
        finally:
            refused.cancel()
        if not isinstance(said, Measured):
            raise ConnectionError("an unexpected frame")
        return said
