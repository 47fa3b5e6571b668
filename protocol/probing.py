"""A measurement of the path between two machines: its frames, its bounds, and what the side that answers goes by.

Who asks opens a stream of the method Probe and says its terms; the other side answers with the terms that it will keep
to, which are the wish cut down to its own limits. Then, in this order: echoes, one at a time; a turn, after which the
answering side sends ballast until it is done; ballast of the asking side until that is done; what arrived of it. The
receiver of ballast measures, because a sender sees only how fast its own buffers take what it writes.

Why not in the streams of a run: a path is measured before there is a run, by whoever can reach the port, so nothing of
a run may depend on it. Hence limits of this side alone: a wish of any size is cut down and allocates nothing, and what
goes beyond the terms is refused. `decode_probe` raises RemoteProtocolError and nothing else, whatever the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

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
BALLAST_BYTES_MAX = 64 * 1024  # in a frame
PROBE_FRAME_BYTES_MAX = BALLAST_BYTES_MAX + 2**13  # or a refusal, whose texts are bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a path is measured. rate_bits_per_s 0: what is sent is not shaped. round_trips_only: no ballast."""

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
class Ballast:
    """Its data is of no use; `decode_probe` keeps the length alone."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """All ballast is sent."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came in the steady part, and in which time; 0 us: too little to tell."""

    bytes: int
    microseconds: int


Said = Terms | Echo | Turn | Ballast | Done | Measured | Refusal


class NotNow(RemoteProtocolError):
    """The peer broke no rule, but this side will not go on: told to the peer, and no fault to report."""

    def __init__(self, reason: str) -> None:
        super().__init__(Fault.UNEXPECTED, reason)


_TERMS = [field.name for field in pb.ProbeTerms.DESCRIPTOR.fields]


def encode_probe(said: Terms | Echo | Turn | Done | Measured) -> bytes:
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


def ballast_frame(data: bytes) -> bytes:
    return pb.ProbeFrame(ballast=pb.ProbeBallast(data=data)).SerializeToString()


def decode_probe(raw: bytes) -> Said:
    """Parse one frame. Raises RemoteProtocolError (malformed, oversized) and nothing else."""
    if len(raw) > PROBE_FRAME_BYTES_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a frame of {len(raw)} bytes, at most {PROBE_FRAME_BYTES_MAX} here")
    frame = pb.ProbeFrame()
    try:
        frame.ParseFromString(raw)
    except DecodeError:
        raise RemoteProtocolError(Fault.MALFORMED, f"{len(raw)} bytes are not a frame: {raw[:16].hex()}…") from None
    other_version = frame.HasField("terms") and frame.terms.protocol_version != PROTOCOL_VERSION
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
        case "ballast":
            return Ballast(len(frame.ballast.data))
        case "done":
            return Done()
        case "measured":
            return Measured(frame.measured.bytes, frame.measured.microseconds)
        case _:
            raise RemoteProtocolError(Fault.MALFORMED, f"a frame of {len(raw)} bytes with no known body")


class Phase(Enum):
    """Of the side that answers."""

    TERMS = "awaiting terms"
    ECHOES = "echoing"
    TAKING = "taking ballast"
    OVER = "through"


class Answerer:
    """What the side that answers makes of each frame: the answer, or a RemoteProtocolError.

    After a Turn it is this side's turn to send; what the peer says meanwhile is looked at afterwards.
    """

    def __init__(self, *, round_trips_only: bool) -> None:
        self.phase = Phase.TERMS
        self.terms = Terms(milliseconds=0)
        self.ballast_bytes = 0  # that came
        self._round_trips_only = round_trips_only
        self._echoes = 0

    def receive(self, said: Said) -> Terms | Echo | Turn | Ballast | Done:
        """Terms, Echo: say it. Turn: send ballast and Done. Ballast: count it. Done: say what was measured."""
        match self.phase, said:
            case Phase.TERMS, Terms():
                if said.protocol_version != PROTOCOL_VERSION:
                    reason = f"version {said.protocol_version} asks, version {PROTOCOL_VERSION} is here"
                    raise RemoteProtocolError(Fault.PROTOCOL_VERSION, reason)
                self.phase = Phase.ECHOES
                only = self._round_trips_only or said.round_trips_only
                self.terms = replace(said.within_limits(), round_trips_only=only)
                return self.terms
            case Phase.ECHOES, Echo() if self._echoes < ECHOES_MAX:
                self._echoes += 1
                return said
            case Phase.ECHOES, Turn() if not self.terms.round_trips_only:
                self.phase = Phase.TAKING
                return said
            case Phase.TAKING, Ballast():
                self.ballast_bytes += said.nbytes
                if self.ballast_bytes > self.terms.bytes:
                    reason = f"ballast of {self.ballast_bytes} bytes, the terms say {self.terms.bytes}"
                    raise RemoteProtocolError(Fault.OVERSIZED, reason)
                return said
            case Phase.TAKING, Done():
                self.phase = Phase.OVER
                return said
            case _:
                kind = type(said).__name__.lower()
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {kind} from a peer while {self.phase.value}")
