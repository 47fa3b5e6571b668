"""Question and answer at the rendezvous of a swarm: where the DHT is, which run it has, and "can you reach me?".

To enter a DHT one needs an address that contains the peer's key, which nobody wants to type. So each node, and each
bootstrap, answers on its own gRPC port (method Swarm) to whoever knows its host:port. The answer also holds the run's
configuration, so a new machine needs nothing else. There is one question and one answer, both small maps with strict
bounds (`protocol.strict_msgpack`).

`Reach` asks the other side to connect back: only that shows whether an announced address works. It is answered only for
the asker's own machine, or a rendezvous would scan its network for strangers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import Fault, RemoteProtocolError
from .messages import PROTOCOL_VERSION
from .node_record import CONFIGURATION_BYTES_MAX, RUN_SCHEMA, is_endpoint
from .strict_msgpack import Check, number, pack, text, texts, unpack

REQUEST_BYTES_MAX = 512
ADDRESSES_MAX = 16
ADDRESS_CHARACTERS_MAX = 512
TELL_BYTES_MAX = CONFIGURATION_BYTES_MAX + ADDRESSES_MAX * (ADDRESS_CHARACTERS_MAX + 8) + 1024
WHY_CHARACTERS_MAX = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousRequest:
    """Who are you? reach: and can you reach me there? ("": no.) incarnation: the node that has to answer there."""

    reach: str = ""
    incarnation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousResponse:
    """addresses: multiaddrs of the DHT here. run, configuration, toml: of the run, "" where none is known.

    incarnation: of the node, 0: a lone bootstrap. dialled_back: "yes", or why the asker cannot be reached; "": that was
    not asked, or not tried.
    """

    addresses: tuple[str, ...]
    run: str = ""
    configuration: str = ""
    toml: str = ""
    incarnation: int = 0
    dialled_back: str = ""


_REQUEST: dict[str, Check] = {
    "version": number(0, 2**32),
    "reach": lambda value: value == "" or is_endpoint(value),
    "incarnation": number(0, 2**64),
}
_TELL: dict[str, Check] = {
    "version": number(0, 2**32),
    "addresses": texts(ADDRESSES_MAX, ADDRESS_CHARACTERS_MAX),
    "run": lambda value: value == "" or RUN_SCHEMA["run"](value),
    "configuration": lambda value: value == "" or RUN_SCHEMA["configuration"](value),
    "toml": text(CONFIGURATION_BYTES_MAX, lines=True),
    "incarnation": number(0, 2**64),
    "dialled_back": text(WHY_CHARACTERS_MAX),
}


def encode_request(request: RendezvousRequest) -> bytes:
    """Raises LocalProtocolError for what no rendezvous would take."""
    return pack("question", _REQUEST, {"version": PROTOCOL_VERSION, **asdict(request)}, bytes_max=REQUEST_BYTES_MAX)


def decode_request(raw: bytes) -> RendezvousRequest:
    """Raises RemoteProtocolError."""
    return RendezvousRequest(**_same_version(unpack("question", _REQUEST, raw, bytes_max=REQUEST_BYTES_MAX)))


def encode_response(response: RendezvousResponse) -> bytes:
    """Raises LocalProtocolError for what nobody would take."""
    values = {"version": PROTOCOL_VERSION, **asdict(response), "addresses": list(response.addresses)}
    return pack("answer", _TELL, values, bytes_max=TELL_BYTES_MAX)


def decode_response(raw: bytes) -> RendezvousResponse:
    """Raises RemoteProtocolError."""
    values = _same_version(unpack("answer", _TELL, raw, bytes_max=TELL_BYTES_MAX))
    return RendezvousResponse(**{**values, "addresses": tuple(values["addresses"])})


def _same_version(values: dict[str, Any]) -> dict[str, Any]:
    theirs = values.pop("version")
    if theirs != PROTOCOL_VERSION:
        raise RemoteProtocolError(
            Fault.PROTOCOL_VERSION,
            f"protocol version {theirs} there, {PROTOCOL_VERSION} here; install the same version of thinpipe on both",
        )
    return values
