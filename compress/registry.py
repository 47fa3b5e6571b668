"""Names of codecs and byte formats, and the spec strings that build them.

Spec strings: `name[:key=value,...]`, such as `bf16`, `rvq:groups=8` or `mapl:r=64,anchors=factorized`. The options of a
codec or format are the keyword parameters of its constructor, typed by their annotations. The name of a byte format
alone means the identity codec with that format both ways.

Why annotations and not a table of options beside each codec: what a constructor takes and what the command line accepts
cannot drift apart.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .byte_format import ByteFormat, CodecError
from .codec_interface import BoundaryCodec, Codec
from .recommended_rates import codec_name

_CODECS: dict[str, type[Codec]] = {}
_FORMATS: dict[str, type[ByteFormat]] = {}
# modules of this package that register something
_BUILT_IN = ("columns", "float_formats", "identity", "integer_formats", "mapl", "mask", "resbm", "rvq", "ssn", "topk")

_C = TypeVar("_C", bound=type[Codec])
_F = TypeVar("_F", bound=type[ByteFormat])


def register_codec(cls: _C) -> _C:
    """Class decorator: `cls.name` becomes a spec name."""
    _register(_CODECS, cls.name, cls)
    return cls


def register_format(cls: _F) -> _F:
    """Class decorator: `cls.id` becomes a spec name."""
    _register(_FORMATS, cls.id, cls)
    return cls


def codec_names() -> list[str]:
    _load_built_in()
    return sorted(_CODECS)


def format_names() -> list[str]:
    _load_built_in()
    return sorted(_FORMATS)


def parse_codec(spec: str, forward: str | None = None, backward: str | None = None) -> BoundaryCodec:
    """A fresh codec and formats from spec strings; without `forward`/`backward` the codec's own formats.

    Raises CodecError for an unknown name, option or value, naming the nearest known one.
    """
    _load_built_in()
    name = codec_name(spec)
    if name in _FORMATS:  # "int8" is the identity codec with int8 both ways
        codec, own_forward, own_backward = _build(_CODECS["identity"], "codec", "identity"), spec, spec
    elif name in _CODECS:
        codec = _build(_CODECS[name], "codec", spec)
        own_forward, own_backward = codec.default_forward, codec.default_backward
    else:
        raise CodecError(f"unknown codec '{name}'{_nearest(name, [*_CODECS, *_FORMATS])}")
    return BoundaryCodec(
        codec=codec,
        forward=parse_format(forward or own_forward),
        backward=parse_format(backward or own_backward),
    )


def parse_format(spec: str) -> ByteFormat:
    """A fresh byte format from its spec string. Raises CodecError as `parse_codec` does."""
    _load_built_in()
    name = codec_name(spec)
    if name not in _FORMATS:
        raise CodecError(f"unknown byte format '{name}'{_nearest(name, list(_FORMATS))}")
    return _build(_FORMATS[name], "byte format", spec)


def _load_built_in() -> None:
    for module in _BUILT_IN:  # late, because these modules import this one
        importlib.import_module(f".{module}", __package__)


def _register(table: dict[str, Any], name: str, cls: type) -> None:
    if name in _CODECS or name in _FORMATS:
        raise ValueError(f"two codecs or formats are called '{name}'")
    table[name] = cls


_T = TypeVar("_T")


def _build(factory: Callable[..., _T], kind: str, spec: str) -> _T:
    name, colon, rest = spec.partition(":")
    name = name.strip()
    known = list(inspect.signature(factory).parameters)
    types = get_type_hints(factory.__init__)  # pyright: ignore[reportFunctionMemberAccess]
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text):
            raise CodecError(f"{kind} '{name}': options are key=value, separated by commas; got '{item.strip()}'")
        if key not in known:
            raise CodecError(f"{kind} '{name}' has no option '{key}'{_nearest(key, known)}")
        if key in options:
            raise CodecError(f"{kind} '{name}': option '{key}' is given twice")
        options[key] = _convert(text, types[key], f"{kind} '{name}': option '{key}'")
    return factory(**options)


def _convert(text: str, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise CodecError(f"{where} cannot be '{text}'{_nearest(text, list(choices))}")
        return choices[text]
    if get_origin(kind) is Union:  # a whole number, or a word
        words = [word for each in get_args(kind) for word in get_args(each)]
        return text if text in words else _convert(text, int, f"{where} may be {' or '.join(words)}, or")
    if kind is bool:
        return _convert(text, Literal["true", "false"], where) == "true"
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CodecError(f"{where} wants {'a whole' if kind is int else 'a finite'} number, got '{text}'")
    return value


def _nearest(name: str, known: list[str]) -> str:
    if not known:
        return "; it has none"
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; the nearest known one is '{found[0]}'" if found else f"; known: {', '.join(sorted(known))}"
