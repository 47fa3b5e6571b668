"""Names of codecs and byte formats, and what their spec strings build (`compress.spec_strings`).

`bf16`, `rvq:groups=8` or `mapl:r=64,anchors=factorized`. The name of a byte format alone means the identity codec with
that format both ways.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from .byte_format import ByteFormat, CodecError
from .codec_interface import BoundaryCodec, Codec
from .recommended_rates import codec_name
from .spec_strings import built, nearest

_CODECS: dict[str, type[Codec]] = {}
_FORMATS: dict[str, type[ByteFormat]] = {}
# modules of this package that register something
_BUILT_IN = (
    "columns",
    "float_formats",
    "identity",
    "integer_formats",
    "mapl",
    "mask",
    "resbm",
    "rvq",
    "ssn",
    "topk",
    "transform",
)

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
        codec, own_forward, own_backward = built(_CODECS["identity"], "codec", "identity"), spec, spec
    elif name in _CODECS:
        codec = built(_CODECS[name], "codec", spec)
        own_forward, own_backward = codec.default_forward, codec.default_backward
    else:
        raise CodecError(f"unknown codec '{name}'{nearest(name, [*_CODECS, *_FORMATS])}")
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
        raise CodecError(f"unknown byte format '{name}'{nearest(name, list(_FORMATS))}")
    return built(_FORMATS[name], "byte format", spec)


def _load_built_in() -> None:
    for module in _BUILT_IN:  # late, because these modules import this one
        importlib.import_module(f".{module}", __package__)


def _register(table: dict[str, Any], name: str, cls: type) -> None:
    if name in _CODECS or name in _FORMATS:
        raise ValueError(f"two codecs or formats are called '{name}'")
    table[name] = cls
