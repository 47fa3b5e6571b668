"""The answering side of a probe: one probe at a time, within its own limits, and no filler during training.

A node that has met a neighbour answers round trips only: filler would delay tensors, and would measure only what they
leave. Before that, and in `thinpipe probe --listen`, both directions are filled. A probe under way when the neighbour
comes is broken off with the next frame. Every wait has a deadline, what comes is dropped, and what is sent is one block
of bytes made at the start, so a peer only decides when it leaves.

`Pacer` is both sides' way of sending: the link model of `sim.links.shaper`, with all filler queued from the beginning.
A frame's ideal times follow from the one before it, so a late wake-up costs nothing, and a loop that sleeps until each
frame's arrival needs no delay line beside it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from ... import __version__
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.path_probe import (
    FILLER_BYTES_MAX,
    LATENCY_S_MAX,
    SECONDS_MAX,
    DialBackResult,
    Done,
    Echo,
    Filler,
    InfoRequest,
    InfoResponse,
    Measured,
    Outcome,
    ProbeBusy,
    ProbePhase,
    ProbeResponder,
    Terms,
    Turn,
    decode_probe,
    dial_back_proof,
    encode_probe,
    filler_frame,
)
from ...protocol.wire_size import framed_bytes
from ...sim.links.link_check import SteadyRate
from ...sim.links.shaper import DEFAULT_BURST_BYTES, LinkProfile, Shaper
from ..addresses import host_of
from .link import Read
from .outgoing import Write

WAIT_S = 10.0  # for one frame to come or go
DIAL_S = 5.0  # to be there, when a visitor is dialled back
WHOLE_S = 2 * (SECONDS_MAX + LATENCY_S_MAX) + 4 * WAIT_S  # for a probe
HEAD_SHARE = 0.25  # of a direction's time or bytes: not counted
FILLER_BYTES_LEAST = 4 * 1024
FILLER_BYTES = 32 * 1024  # where no rate is known: small beside a thin link's second, large beside a call's cost


def profile_of(terms: Terms) -> LinkProfile:
    """How a side shapes what it sends by these terms, which are within limits."""
    rate = terms.rate_bits_per_s
    return LinkProfile(
        rate_bits_per_s=float(rate) if rate else None,
        latency_s=terms.latency_us / 1e6,
        jitter_s=terms.jitter_us / 1e6,
        burst_bytes=terms.burst_bytes if rate else DEFAULT_BURST_BYTES,
    )


def meter_of(terms: Terms) -> SteadyRate:
    return SteadyRate(skip_s=HEAD_SHARE * terms.seconds, skip_bytes=HEAD_SHARE * terms.bytes)


class Pacer:
    """Sends through a shaper of its own."""

    def __init__(
        self, profile: LinkProfile, write: Write, *, clock: Callable[[], float] = time.monotonic, seed: int = 0
    ) -> None:
        self._shaper, self.write, self._clock = Shaper(profile, random=seed), write, clock
        rate = profile.rate_bits_per_s
        size = FILLER_BYTES if rate is None else int(rate / 8 * 0.005)
        size = max(FILLER_BYTES_LEAST, min(FILLER_BYTES_MAX, size))
        self._filler = filler_frame(os.urandom(size))  # what compresses well would measure something else
        self._filler_bytes = size

    async def say(self, frame: bytes, eligible_s: float | None = None) -> float:
        """Send one frame when the shaper lets go of it; returns when it ideally left. Raises TimeoutError."""
        passage = self._shaper.admit(framed_bytes(len(frame)), self._clock() if eligible_s is None else eligible_s)
        async with asyncio.timeout(max(0.0, passage.arrive_s - self._clock()) + WAIT_S):
            await asyncio.sleep(max(0.0, passage.arrive_s - self._clock()))
            await self.write(frame)
        return passage.depart_s

    async def fill(self, terms: Terms, go_on: Callable[[], None]) -> None:
        """Filler, as much as the terms and the shaper let through, then Done. `go_on` raises what breaks it off."""
        began, left = self._clock(), terms.bytes
        capped = self._shaper.profile.rate_bits_per_s is not None
        while left >= self._filler_bytes:
            go_on()
            departed = await self.say(self._filler, began if capped else None)
            left -= self._filler_bytes
            behind = self._clock() - began - self._shaper.profile.latency_s
            if max(departed - began, behind) >= terms.seconds:
                break
        await self.say(encode_probe(Done()))


async def dial_back(host: str, port: int, words: bytes) -> Outcome:
    """Connect, say that, and hang up. host "": nobody knows where the visit came from, and nobody is dialled."""
    if not host:
        return Outcome.UNREACHABLE
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(words)
                await writer.drain()
            finally:
                writer.close()
    except TimeoutError:
        return Outcome.SILENT
    except ConnectionRefusedError:
        return Outcome.REFUSED
    except OSError:
        return Outcome.UNREACHABLE
    return Outcome.CONNECTED


class ProbeService:
    """Answers probes, for one listener. busy: whether this node is in a run, so that a probe must not fill its link."""

    def __init__(self, *, busy: Callable[[], bool], terms_timeout_s: float = WAIT_S, wait_s: float = WAIT_S) -> None:
        self.answered = asyncio.Event()  # a probe has come to its end, however
        self._busy, self._terms_timeout_s, self._wait_s = busy, terms_timeout_s, wait_s
        self._taken = False
        self._dialling = False

    async def serve(self, read: Read, write: Write, peer: str = "") -> None:
        """One stream, to its end. peer: where it comes from, in gRPC's spelling. Raises RemoteProtocolError, which the
        peer is still to be told."""
        only = self._busy()
        rules = ProbeResponder(round_trips_only=only)
        raw = await self._next(read, self._terms_timeout_s, "no terms")
        if raw is None:
            return None
        terms = rules.receive(decode_probe(raw))
        if isinstance(terms, InfoRequest):
            return await self._visited(terms, write, host_of(peer))
        if self._taken:  # only now: who says nothing takes nobody's place
            raise ProbeBusy("another probe is under way here, and two would share the path; try again in a moment")
        self._taken = True
        try:
            async with asyncio.timeout(WHOLE_S):
                assert isinstance(terms, Terms)
                await self._answer(rules, terms, read, write)
        except TimeoutError:
            raise RemoteProtocolError(Fault.TIMEOUT, f"the probe is not complete within {WHOLE_S:g} s") from None
        finally:
            self._taken = False
            self.answered.set()

    async def _visited(self, info_request: InfoRequest, write: Write, host: str) -> None:
        """Answer, and dial back where the visit comes from, one at a time."""
        about = InfoResponse(version=__version__, unix_us=time.time_ns() // 1000, seen_as=host, in_a_run=self._busy())
        async with asyncio.timeout(WAIT_S):
            await write(encode_probe(about))
        if not info_request.port:
            return
        if self._dialling:
            raise ProbeBusy("this node is connecting back to another machine; try again in a moment")
        self._dialling = True
        try:
            outcome = await dial_back(host, info_request.port, dial_back_proof(info_request.token))
        finally:
            self._dialling = False
        async with asyncio.timeout(WAIT_S):
            await write(encode_probe(DialBackResult(outcome)))

    async def _next(self, read: Read, timeout_s: float, what: str) -> bytes | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await read()
        except TimeoutError:
            raise RemoteProtocolError(Fault.TIMEOUT, f"{what} within {timeout_s:g} s") from None

    async def _answer(self, rules: ProbeResponder, terms: Terms, read: Read, write: Write) -> None:
        pacer, meter = Pacer(profile_of(terms), write, seed=1), meter_of(terms)

        def go_on() -> None:
            if self._busy() and not terms.round_trips_only:
                raise ProbeBusy("this node has met its neighbour and begins to train; a probe must not fill its link")

        await pacer.say(encode_probe(terms))
        while rules.phase is not ProbePhase.OVER:
            raw = await self._next(read, self._wait_s, "no frame")
            if raw is None:
                return
            go_on()
            match rules.receive(decode_probe(raw)):
                case Echo() as echo:
                    await pacer.say(encode_probe(echo))
                case Turn():
                    await pacer.fill(terms, go_on)
                case Filler():
                    meter.add(framed_bytes(len(raw)), time.monotonic())
                case _:
                    measured = Measured(meter.steady_bytes, int(meter.steady_s * 1e6))
                    await pacer.say(encode_probe(measured))
