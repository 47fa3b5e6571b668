"""Small msgpack maps with a schema that both sides know, for the records in the DHT and the messages of the rendezvous.

Every key must be there and no other, and every value has exactly the type that the schema says (a bool is no
number, an integer no float) and lies within its bounds. So what has been read needs no second look, and what a stranger
can make this node hold is bounded by the bytes that it may send. Why not pydantic: its coercions are meant for people
who write files; here "1" for 1 is a fault. Both directions follow one rule: `pack` refuses whatever `unpack` would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from .errors import Fault, LocalProtocolError, RemoteProtocolError

Check = Callable[[Any], bool]
LIST_MAX = 64  # entries of a list, whatever its schema says


def number(least: int, below: int) -> Check:
    """An integer from `least` to below `below`."""
    return lambda value: type(value) is int and least <= value < below


def real(least: float, most: float) -> Check:
    """A finite float within bounds."""
    return lambda value: type(value) is float and math.isfinite(value) and least <= value <= most


def text(characters_max: int, *, lines: bool = False) -> Check:
    """Text that may be printed on somebody's terminal; lines: with line breaks and tabs in it."""

    def check(value: Any) -> bool:
        if type(value) is not str or len(value) > characters_max:
            return False
        return (value.translate({10: " ", 9: " "}) if lines else value).isprintable()

    return check


def texts(count_max: int, characters_max: int) -> Check:
    """A list of such texts."""
    one = text(characters_max)
    return lambda value: type(value) is list and len(value) <= count_max and all(map(one, value))


def pack(what: str, schema: Mapping[str, Check], values: Mapping[str, Any], *, bytes_max: int) -> bytes:
    """The map as bytes. Raises LocalProtocolError for what no peer would take."""
    try:
        raw = msgpack.packb(dict(values))
        assert raw is not None
        unpack(what, schema, raw, bytes_max=bytes_max)
    except RemoteProtocolError as error:
        raise LocalProtocolError(error.fault, f"this {what} cannot be told: {error.reason}") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalProtocolError(Fault.MALFORMED, f"this {what} cannot be told: {type(error).__name__}") from None
    return raw


def unpack(what: str, schema: Mapping[str, Check], raw: bytes, *, bytes_max: int) -> dict[str, Any]:
    """The map. Raises RemoteProtocolError and nothing else, whatever the bytes."""
    if len(raw) > bytes_max:
        raise RemoteProtocolError(Fault.OVERSIZED, f"a {what} of {len(raw)} bytes, at most {bytes_max}")
    try:
        values = msgpack.unpackb(
            raw,
            strict_map_key=True,
            raw=False,
            use_list=True,
            max_map_len=len(schema),
            max_array_len=LIST_MAX,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds, by input
        raise RemoteProtocolError(Fault.MALFORMED, f"a {what} that is not msgpack: {type(error).__name__}") from None
    if type(values) is not dict:
        raise RemoteProtocolError(Fault.MALFORMED, f"a {what} that is a {type(values).__name__}, not a map")
    if values.keys() != schema.keys():
        odd = sorted(map(repr, values.keys() ^ schema.keys()))[:4]
        names = ", ".join(name if name.isprintable() else ascii(name) for name in odd)
        raise RemoteProtocolError(Fault.MALFORMED, f"a {what} with other fields than those known ({names[:120]})")
    for name, check in schema.items():
        if not check(values[name]):
            raise RemoteProtocolError(Fault.MALFORMED, f"a {what} whose '{name}' is out of bounds")
    return values
