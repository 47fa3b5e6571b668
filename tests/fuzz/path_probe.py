"""A target for what comes with the method Probe: terms, echoes, filler, visits, before anybody has greeted."""

from __future__ import annotations

from functools import partial

from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.path_probe import (
    BYTES_MAX,
    ECHOES_MAX,
    LATENCY_S_MAX,
    PROBE_FRAME_BYTES_MAX,
    RATE_BITS_PER_S,
    SECONDS_MAX,
    TOKEN_BYTES,
    DialBackResult,
    Done,
    Echo,
    Filler,
    InfoRequest,
    InfoResponse,
    Measured,
    Outcome,
    ProbeResponder,
    Terms,
    Turn,
    decode_probe,
    encode_probe,
    filler_frame,
)

from . import mutators
from .judge import Ends, Finding, Target, check_refusal

INPUT_BYTES_MAX = 8 * 1024
PEAK_BYTES = 8 * INPUT_BYTES_MAX + 256 * 1024  # a frame parsed, its texts checked and shown in a refusal
LEAST_BITS_PER_S, MOST_BITS_PER_S = RATE_BITS_PER_S


def _check_terms(terms: Terms) -> None:
    """What this side is about to do for a stranger."""
    rate = terms.rate_bits_per_s
    if terms.seconds > SECONDS_MAX or terms.bytes > BYTES_MAX or terms.latency_us > LATENCY_S_MAX * 1e6:
        raise Finding(f"{terms} was agreed to")
    if terms.jitter_us > terms.latency_us or (rate and not LEAST_BITS_PER_S <= rate <= MOST_BITS_PER_S):
        raise Finding(f"{terms} was agreed to")
    if decode_probe(encode_probe(terms)) != terms:
        raise Finding(f"{terms} is not what its frame says")


def probes(data: bytes) -> Ends:
    """One stream, to its first refusal. Of the first byte, bit 0: this side answers round trips only."""
    only = bool(data and data[0] & 1)
    rules = ProbeResponder(round_trips_only=only)
    taken, echoes = 0, 0
    for _, raw in mutators.cut(data[1:]):
        try:
            said = rules.receive(decode_probe(raw))
        except RemoteProtocolError as error:
            check_refusal(error)
            return Ends(taken, 1)
        taken += 1
        match said:
            case Terms():
                _check_terms(said)
            case InfoRequest() if len(said.token) != TOKEN_BYTES or not said.version.isprintable() or said.port > 65535:
                raise Finding(f"{said} came through")
            case Echo():
                echoes += 1
            case _:
                pass
        sends = isinstance(said, Turn | Filler)
        if echoes > ECHOES_MAX or rules.filler_bytes > rules.terms.bytes or (only and sends):
            raise Finding(f"{said} came through, after {echoes} echoes and {rules.filler_bytes} bytes of filler")
    return Ends(taken, 0)


TERMS = Terms(milliseconds=500, bytes=2**20, rate_bits_per_s=80_000_000, latency_us=20_000, burst_bytes=2**16)
VISIT = InfoRequest(port=7001, token=b"t" * TOKEN_BYTES, version="0.1.0")
ABOUT = InfoResponse(version="0.1.0", unix_us=1, seen_as="192.0.2.7", in_a_run=False)
STORIES: list[list[bytes]] = [
    [encode_probe(said) for said in (TERMS, Echo(0), Echo(1), Turn())]
    + [filler_frame(bytes(500)), filler_frame(b""), encode_probe(Done())],
    [encode_probe(said) for said in (TERMS, Turn(), Done())],
    [encode_probe(VISIT)],
    [encode_probe(said) for said in (ABOUT, DialBackResult(Outcome.SILENT))],
    [encode_probe(Measured(2**20, 10**6))],
]
assert all(len(raw) <= PROBE_FRAME_BYTES_MAX for story in STORIES for raw in story)

PROBING = [
    Target(
        name="probes",
        run=probes,
        mutate=partial(mutators.conversation, change=mutators.probe_frame),
        seeds=[bytes([n % 2]) + mutators.join([(0, raw) for raw in story]) for n, story in enumerate(STORIES)],
        peak_bytes=PEAK_BYTES,
        input_bytes_max=INPUT_BYTES_MAX,
    )
]
