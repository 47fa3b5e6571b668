"""A measurement of the path between two machines: its frames, its bounds, and the rules of the side that answers.

The asking side opens a stream of the method Probe and sends its terms. The other side answers with the terms that it
accepts: the same numbers, reduced to its own limits. Then follow, in this order: echoes, one at a time; a turn, after
which the answering side sends filler until it is done; filler of the asking side until that is done; and how much of
that arrived. The receiver of filler measures, because a sender sees only how fast its own buffers take what it writes.

Or it sends an info request: who are you, what is your time, can you connect back to me? A machine cannot see by itself
whether others can reach it. The other side connects to the address from which the request came and to no other, sends a
proof there that the asker can tell from a stranger's, and closes. So nobody can use it to reach another machine.

Why not in the streams of a run: a path is measured before there is a run, by anyone who can reach the port, so nothing
of a run may depend on it. So only the limits of this side count: large terms are reduced and allocate nothing, and what
goes beyond the terms is refused. `decode_probe` raises RemoteProtocolError and nothing else, whatever the bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import Enum, IntEnum

from google.protobuf.message import DecodeError

from . import stage_pb2 as pb
from .errors import Fault, RemoteProtocolError
from .header import check_text
from .messages import PROTOCOL_VERSION, Refusal

SECONDS_MAX = 10.0  # that a direction is filled
BYTES_MAX = 256 * 2**20  # that it is filled with
ECHOES_MAX = 64
LATENCY_S_MAX = 1.0
RATE_BITS_PER_S = (10_000, 10**12)  # that a side shapes by
BURST_BYTES_MAX = 2**24
FILLER_BYTES_MAX = 64 * 1024  # in a frame
TOKEN_BYTES = 16
PROBE_FRAME_BYTES_MAX = FILLER_BYTES_MAX + 2**13  # or a refusal, whose texts are bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a path is measured. rate_bits_per_s 0: what is sent is not shaped. round_trips_only: no filler."""

    milliseconds: int
    bytes: int = BYTES_MAX
    rate_bits_per_s: int = 0
    latency_us: int = 0
    jitter_us: int = 0
    burst_bytes: int = 0
    round_trips_only: bool = False
    protocol_version: int = PROTOCOL_VERSION

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000

    def within_limits(self) -> Terms:
        """The same, cut down to what this side takes part in."""
        least, most = RATE_BITS_PER_S
        latency_us = min(self.latency_us, int(LATENCY_S_MAX * 1e6))
        return replace(
            self,
            milliseconds=min(self.milliseconds, int(SECONDS_MAX * 1000)),
            bytes=min(self.bytes, BYTES_MAX),
            rate_bits_per_s=max(least, min(self.rate_bits_per_s, most)) if self.rate_bits_per_s else 0,
            latency_us=latency_us,
            jitter_us=min(self.jitter_us, latency_us),
            burst_bytes=max(1, min(self.burst_bytes, BURST_BYTES_MAX)) if self.rate_bits_per_s else 0,
            protocol_version=PROTOCOL_VERSION,
        )


@dataclass(frozen=True, slots=True)
class Echo:
    number: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Now the answering side sends."""


@dataclass(frozen=True, slots=True)
class Filler:
    """Its data is of no use; `decode_probe` keeps the length alone."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """All filler is sent."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came in the steady part, and in which time; 0 us: too little to tell."""

    bytes: int
    microseconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoRequest:
    """port 0: do not dial back. version: of the program. token: `TOKEN_BYTES` that nobody else knows."""

    port: int
    token: bytes
    version: str
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoResponse:
    """unix_us: the clock there. seen_as: the address that the visit came from."""

    version: str
    unix_us: int
    seen_as: str
    in_a_run: bool
    protocol_version: int = PROTOCOL_VERSION


class Outcome(IntEnum):
    """Of dialling back."""

    CONNECTED = 1
    REFUSED = 2  # nobody listens there
    SILENT = 3  # no answer in time
    UNREACHABLE = 4  # no way there


@dataclass(frozen=True, slots=True)
class DialBackResult:
    outcome: Outcome


ProbeMessage = Terms | Echo | Turn | Filler | Done | Measured | InfoRequest | InfoResponse | DialBackResult | Refusal


def dial_back_proof(token: bytes) -> bytes:
    """The bytes sent on a connection back. They prove that the answering side made it, and the asking side cannot
    choose what is sent to a port of its address."""
    return b"thinpipe " + hashlib.sha256(b"thinpipe knock " + token).hexdigest().encode() + b"\n"


class ProbeBusy(RemoteProtocolError):
    """The peer broke no rule, but this side will not go on: told to the peer, and no fault to report."""

    def __init__(self, reason: str) -> None:
        super().__init__(Fault.UNEXPECTED, reason)


_TERMS = [field.name for field in pb.ProbeTerms.DESCRIPTOR.fields]


def encode_probe(said: Terms | Echo | Turn | Done | Measured | InfoRequest | InfoResponse | DialBackResult) -> bytes:
    match said:
        case Terms():
            values = {name: getattr(said, name) for name in _TERMS}
            terms = pb.ProbeTerms(**{**values, "round_trips_only": int(said.round_trips_only)})
            return pb.ProbeFrame(terms=terms).SerializeToString()
        case Echo():
            return pb.ProbeFrame(echo=pb.ProbeEcho(number=said.number)).SerializeToString()
        case Turn():
            return pb.ProbeFrame(turn=pb.ProbeTurn()).SerializeToString()
        case Done():
            return pb.ProbeFrame(done=pb.ProbeDone()).SerializeToString()
        case Measured():
            measured = pb.ProbeMeasured(bytes=said.bytes, microseconds=said.microseconds)
            return pb.ProbeFrame(measured=measured).SerializeToString()
        case InfoRequest():
            info_request = pb.ProbeInfoRequest(
                protocol_version=said.protocol_version, version=said.version, port=said.port, token=said.token
            )
            return pb.ProbeFrame(info_request=info_request).SerializeToString()
        case InfoResponse():
            info_response = pb.ProbeInfoResponse(
                protocol_version=said.protocol_version,
                version=said.version,
                unix_us=said.unix_us,
                seen_as=said.seen_as,
                in_a_run=int(said.in_a_run),
            )
            return pb.ProbeFrame(info_response=info_response).SerializeToString()
        case DialBackResult():
            return pb.ProbeFrame(dial_back_result=pb.ProbeDialBackResult(outcome=said.outcome)).SerializeToString()


def filler_frame(data: bytes) -> bytes:
    return pb.ProbeFrame(filler=pb.ProbeFiller(data=data)).SerializeToString()


def decode_probe(raw: bytes) -> ProbeMessage:
    """Parse one frame. Raises RemoteProtocolError (malformed, oversized) and nothing else."""
    if len(raw) > PROBE_FRAME_BYTES_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a frame of {len(raw)} bytes, at most {PROBE_FRAME_BYTES_MAX} here")
    frame = pb.ProbeFrame()
    try:
        frame.ParseFromString(raw)
    except DecodeError:
        raise RemoteProtocolError(Fault.MALFORMED, f"{len(raw)} bytes are not a frame: {raw[:16].hex()}…") from None
    # These are the frames that say a version, and another one may have more to say in them.
    versions = [
        getattr(frame, name).protocol_version
        for name in ("terms", "info_request", "info_response")
        if frame.HasField(name)
    ]
    other_version = any(version != PROTOCOL_VERSION for version in versions)
    frame.DiscardUnknownFields()
    if frame.ByteSize() != len(raw) and not other_version:
        raise RemoteProtocolError(Fault.MALFORMED, f"{len(raw)} bytes, of which one frame takes {frame.ByteSize()}")
    match frame.WhichOneof("body"):
        case "terms":
            if frame.terms.round_trips_only > 1:
                raise RemoteProtocolError(Fault.MALFORMED, f"round_trips_only = {frame.terms.round_trips_only}")
            values = {name: getattr(frame.terms, name) for name in _TERMS}
            return Terms(**{**values, "round_trips_only": bool(frame.terms.round_trips_only)})
        case "refusal":
            check_text("code", frame.refusal.code)
            check_text("reason", frame.refusal.reason)
            return Refusal(code=frame.refusal.code, reason=frame.refusal.reason)
        case "echo":
            return Echo(frame.echo.number)
        case "turn":
            return Turn()
        case "filler":
            return Filler(len(frame.filler.data))
        case "done":
            return Done()
        case "measured":
            return Measured(frame.measured.bytes, frame.measured.microseconds)
        case "info_request":
            return _info_request(frame.info_request)
        case "info_response":
            return _info_response(frame.info_response)
        case "dial_back_result":
            if frame.dial_back_result.outcome not in list(Outcome):
                raise RemoteProtocolError(Fault.MALFORMED, f"outcome = {frame.dial_back_result.outcome}")
            return DialBackResult(Outcome(frame.dial_back_result.outcome))
        case _:
            raise RemoteProtocolError(Fault.MALFORMED, f"a frame of {len(raw)} bytes with no known body")


def _info_request(info_request: pb.ProbeInfoRequest) -> InfoRequest:
    check_text("version", info_request.version)
    if info_request.port > 65535 or len(info_request.token) != TOKEN_BYTES:
        raise RemoteProtocolError(
            Fault.MALFORMED, f"port {info_request.port}, a token of {len(info_request.token)} bytes"
        )
    return InfoRequest(
        port=info_request.port,
        token=info_request.token,
        version=info_request.version,
        protocol_version=info_request.protocol_version,
    )


def _info_response(info_response: pb.ProbeInfoResponse) -> InfoResponse:
    check_text("version", info_response.version)
    check_text("address", info_response.seen_as)
    if info_response.in_a_run > 1:
        raise RemoteProtocolError(Fault.MALFORMED, f"in_a_run = {info_response.in_a_run}")
    return InfoResponse(
        version=info_response.version,
        unix_us=info_response.unix_us,
        seen_as=info_response.seen_as,
        in_a_run=bool(info_response.in_a_run),
        protocol_version=info_response.protocol_version,
    )


class ProbePhase(Enum):
    """Of the side that answers."""

    TERMS = "awaiting terms"
    ECHOES = "echoing"
    TAKING = "taking filler"
    OVER = "finished"


class ProbeResponder:
    """What the side that answers makes of each frame: the answer, or a RemoteProtocolError.

    After a Turn it is this side's turn to send; what the peer says meanwhile is looked at afterwards.
    """

    def __init__(self, *, round_trips_only: bool) -> None:
        self.phase = ProbePhase.TERMS
        self.terms = Terms(milliseconds=0)
        self.filler_bytes = 0  # that came
        self._round_trips_only = round_trips_only
        self._echoes = 0

    def receive(self, said: ProbeMessage) -> Terms | Echo | Turn | Filler | Done | InfoRequest:
        """What the caller does with each result. Terms, Echo: send it. Turn: send filler and Done. Filler: count it.
        Done: send what was measured. InfoRequest, of any version: send InfoResponse; if there is a port, connect to
        it and send the result."""
        match self.phase, said:
            case ProbePhase.TERMS, Terms():
                if said.protocol_version != PROTOCOL_VERSION:
                    reason = f"version {said.protocol_version} asks, version {PROTOCOL_VERSION} is here"
                    raise RemoteProtocolError(Fault.PROTOCOL_VERSION, reason)
                self.phase = ProbePhase.ECHOES
                only = self._round_trips_only or said.round_trips_only
                self.terms = replace(said.within_limits(), round_trips_only=only)
                return self.terms
            case ProbePhase.TERMS, InfoRequest():
                self.phase = ProbePhase.OVER
                return said
            case ProbePhase.ECHOES, Echo() if self._echoes < ECHOES_MAX:
                self._echoes += 1
                return said
            case ProbePhase.ECHOES, Turn() if not self.terms.round_trips_only:
                self.phase = ProbePhase.TAKING
                return said
            case ProbePhase.TAKING, Filler():
                self.filler_bytes += said.nbytes
                if self.filler_bytes > self.terms.bytes:
                    reason = f"filler of {self.filler_bytes} bytes, the terms say {self.terms.bytes}"
                    raise RemoteProtocolError(Fault.OVERSIZED, reason)
                return said
            case ProbePhase.TAKING, Done():
                self.phase = ProbePhase.OVER
                return said
            case _:
                kind = type(said).__name__.lower()
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {kind} from a peer while {self.phase.value}")
