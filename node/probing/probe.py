"""`thinpipe probe`: measures rate and round trip of the path between two machines, both ways, before a run.

The other end is `thinpipe probe --listen` or the listener of any node. What crosses is what a run's tensors would meet:
gRPC on a real socket, shaped in user space if a link is given. The side that receives measures, over the steady part of
a bounded transfer: the head, in which TCP looks for its rate, is left out. Why not iperf3: it measures the path and not
what gRPC makes of it, needs a port of its own, and knows nothing of the cap that a run will have.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console

from ...protocol.path_probe import SECONDS_MAX
from ...sim.links.link_check import LinkCheck, round_trip_warning
from ...sim.links.shaper import LinkError, LinkProfile
from ...sim.reports.run_console import probe_table
from ..addresses import ListenError, check_listen, split_address
from ..links.probe_server import ProbeService, profile_of
from ..links.transport import probe_handler, serving
from ..security.policy import PLAIN, Security
from .probe_client import Findings, ask
from .reach import ProbeError

SECONDS_LEAST = 0.2
DEADLINE_S = 10.0  # for the other side to be there, at each of the steps there


def probe(address: str, link: str, seconds: float, security: Security = PLAIN) -> dict[str, Any]:
    """Measure the path to `address`; returns the figures, with a line for each that is not as configured.

    link: how both sides shape what they send, `none` for not at all. seconds: for each direction. Raises ProbeError.
    """
    try:
        profile = LinkProfile.parse(link)
        if profile.kernel:
            raise LinkError(
                f"--link {link}: a probe measures a cap of the kernel but does not set one; say --link none"
            )
        split_address(address)
    except (LinkError, ListenError) as error:
        raise ProbeError(str(error), 2) from None
    if not (math.isfinite(seconds) and SECONDS_LEAST <= seconds <= SECONDS_MAX):
        raise ProbeError(f"--seconds {seconds:g} is not between {SECONDS_LEAST:g} and {SECONDS_MAX:g}", 2)
    found = asyncio.run(ask(address, profile, seconds, deadline_s=DEADLINE_S, security=security))
    return figures(address, found)


def figures(address: str, found: Findings) -> dict[str, Any]:
    """What is printed, and every line that has to be said about it."""
    profile, wish, terms = found.profile, found.wish, found.terms
    trips, down, up = found.trips, found.down, found.up
    rate_up, theirs = profile.rate_bits_per_s, profile_of(terms)
    measured_up = up.bytes * 8 / (up.microseconds / 1e6) if up and up.bytes and up.microseconds else None
    checks = {
        "up": LinkCheck(name="up", configured_bits_per_s=rate_up, measured_bits_per_s=measured_up),
        "down": LinkCheck(
            name="down",
            configured_bits_per_s=theirs.rate_bits_per_s,
            measured_bits_per_s=down.bits_per_s() if down else None,
        ),
    }
    median_s, configured_s = statistics.median(trips), profile.latency_s + theirs.latency_s
    lines = [check.warning for check in checks.values()]
    if configured_s:
        lines.append(round_trip_warning("round trip", configured_s, median_s))
    if terms.round_trips_only:
        lines.append(f"{address} is in a run, so rates are not measured: a probe must not fill its link")
    elif None in (measured_up, checks["down"].measured_bits_per_s):
        lines.append(f"too few bytes crossed in {terms.seconds:g} s to measure a rate; raise --seconds")
    unlike = [
        name for name in ("rate_bits_per_s", "latency_us", "jitter_us") if getattr(wish, name) != getattr(terms, name)
    ]
    if unlike:
        lines.append(f"{address} limits what it sends to {theirs}, its own setting, and not to {profile}")
    sizes = {"up": (up.bytes, up.microseconds / 1e6) if up else (0, 0.0)}
    sizes["down"] = (down.steady_bytes, round(down.steady_s, 6)) if down else (0, 0.0)
    return {
        "address": address,
        "link": str(profile),
        "seconds": terms.seconds,
        "in_a_run": terms.round_trips_only,
        "round_trip": {
            "configured_s": configured_s or None,
            "median_s": round(median_s, 6),
            "least_s": round(min(trips), 6),
            "count": len(trips),
        },
        **{
            name: {
                "configured_bits_per_s": check.configured_bits_per_s,
                "measured_bits_per_s": check.measured_bits_per_s,
                "deviation": check.deviation,
                "steady_bytes": sizes[name][0],
                "steady_s": sizes[name][1],
            }
            for name, check in checks.items()
        },
        "warnings": [line for line in lines if line],
    }


def print_probe(address: str, link: str, seconds: float, *, as_json: bool, security: Security = PLAIN) -> None:
    """`probe`, for people (a table; warnings on stderr) or as JSON on stdout. Raises ProbeError."""
    found = probe(address, link, seconds, security)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console(markup=False).print(probe_table(found))
    for line in found["warnings"]:
        print(f"thinpipe: warning: {line}", file=sys.stderr)


def listen(address: str, *, once: bool, security: Security = PLAIN) -> None:
    """Answer probes on `address` until Ctrl-C; `once`: until one is complete. Raises ProbeError."""
    try:
        check_listen(address)
        with suppress(KeyboardInterrupt):  # how it is ended
            asyncio.run(_listen(address, once=once, security=security))
    except ListenError as error:
        raise ProbeError(str(error), 2) from None


async def _listen(address: str, *, once: bool, security: Security) -> None:
    service = ProbeService(busy=lambda: False)
    door = probe_handler(service, lambda _, line: print(f"thinpipe: {line}", file=sys.stderr, flush=True), security)
    async with serving(address, {"Probe": door}, security) as port:
        here = f"{address.rpartition(':')[0]}:{port}"
        print(f"answers probes at {here} until Ctrl-C; from elsewhere: thinpipe probe --to {here}", flush=True)
        await (service.answered if once else asyncio.Event()).wait()
