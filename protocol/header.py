"""A codec's header: a small map that travels as msgpack inside a message's head, and the checks that keep it small.

What a codec sends beside its bytes (shape, versions, scales) depends on the codec, so the envelope has no fields for
it. It is the one place where a peer chooses a *structure*, and msgpack amplifies: one byte on the wire can be
an empty map of 64 bytes in memory, and a claim of a long array makes the parser set that much aside. So the number of
values, their depth and their kinds are bounded as well as the bytes. Why not JSON: no bytes, no exact floats. Why not
pickle: it runs code from its input.

Both directions follow one rule: `encode_header` refuses whatever `decode_header` would. A header that only the peer
refuses would be kept, sent again after the reconnect, and refused for ever.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from .errors import Fault, LocalProtocolError, RemoteProtocolError

HEADER_BYTES_MAX = 4096  # a codec's header is a handful of small values
HEADER_VALUES_MAX = 256  # keys, values and containers together, at about 80 bytes of memory each
HEADER_DEPTH_MAX = 8
TEXT_CHARACTERS_MAX = 512  # of a refusal's reason, a run id, a codec id: they get printed


def encode_header(codec: str, header: dict[str, Any]) -> bytes:
    """msgpack of `header`; an empty one is no bytes at all. Raises LocalProtocolError for what no peer would take."""
    if not header:
        return b""
    try:
        raw = msgpack.packb(header)
        assert raw is not None
        decode_header(raw)
    except RemoteProtocolError as error:
        raise LocalProtocolError(error.fault, f"the header of codec '{codec}' cannot be sent: {error.reason}") from None
    except Exception as error:  # TypeError, ValueError, OverflowError or RecursionError, by value
        raise LocalProtocolError(
            Fault.MALFORMED, f"the header of codec '{codec}' is not msgpack-able: {type(error).__name__}: {error}"
        ) from None
    return raw


def decode_header(raw: bytes) -> dict[str, Any]:
    """The map, with text keys. Raises RemoteProtocolError: malformed, oversized, or a value that is not finite."""
    if not raw:
        return {}
    if len(raw) > HEADER_BYTES_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a codec header of {len(raw)} bytes, at most {HEADER_BYTES_MAX}")
    try:
        header = msgpack.unpackb(
            raw,
            strict_map_key=True,
            raw=False,
            use_list=True,
            max_array_len=HEADER_VALUES_MAX,
            max_map_len=HEADER_VALUES_MAX,
        )
    except Exception as error:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds, by input
        raise RemoteProtocolError(Fault.MALFORMED, f"the codec header is not msgpack: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise RemoteProtocolError(Fault.MALFORMED, f"the codec header is a {type(header).__name__}, not a map")
    _check_values(header)
    return header


def check_text(what: str, text: str) -> None:
    """Raises RemoteProtocolError for a text that is too long or unfit to be printed on somebody's terminal."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a {what} of {len(text)} characters, at most {TEXT_CHARACTERS_MAX}")
    if not text.isprintable():
        raise RemoteProtocolError(Fault.MALFORMED, f"a {what} with control characters: {text[:40]!a}")


def printable(text: str) -> str:
    """As much of a text as `check_text` lets through, for a refusal, which must arrive whatever it quotes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:TEXT_CHARACTERS_MAX])


def _check_values(header: dict[str, Any]) -> None:
    """Walks without recursion, so that depth is a finding here and not a RecursionError in whoever reads it later."""
    count = 0
    level: list[Any] = [header]
    for _depth in range(HEADER_DEPTH_MAX + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise RemoteProtocolError(Fault.MALFORMED, "the codec header has a key that is not text")
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                check_text("text in a codec header", value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise RemoteProtocolError(Fault.PAYLOAD, f"the codec header holds {value}")
            elif not isinstance(value, float | int | bytes | None):  # msgpack's extensions, timestamps among them
                raise RemoteProtocolError(Fault.MALFORMED, f"the codec header holds a {type(value).__name__}")
        count += len(level)
        if count > HEADER_VALUES_MAX:
            raise RemoteProtocolError(Fault.OVERSIZED, f"a codec header of more than {HEADER_VALUES_MAX} values")
        if not below:
            return
        level = below
    raise RemoteProtocolError(Fault.OVERSIZED, f"a codec header more than {HEADER_DEPTH_MAX} levels deep")
