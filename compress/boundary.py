"""What a codec is: an in-graph half and a byte half, and the spec strings that name them.

A codec compresses what crosses one pipeline boundary. Its *in-graph half* is what autograd sees: `Sender.encode` at the
upstream stage maps hidden states (B, T, D) to a narrower wire tensor (B, T, W), `Receiver.decode` at the downstream
stage maps it back; whatever is learned by gradient lives there. Its *byte half* is a `ByteFormat`: `pack` turns a wire
tensor into bytes, `unpack` turns them back, and autograd passes straight through, because the receiver differentiates
with respect to what it unpacked and sends that gradient back, packed, as dL/dZ (Bengio et al., arXiv 1308.3432).
Protocol NanoGPT splits its codecs the same way.

Why two objects and not one module that compresses: the halves of a boundary live on different machines and share
nothing but bytes, the two directions are packed independently, and any projection combines with any format.

Why a `Key` and not a random generator: what a message contains may depend on (seed, boundary, direction, step,
microbatch) and codec state, never on the order in which messages were packed; with a counter-based generator (Salmon et
al., SC'11, Philox) a resent, reordered or recomputed message has the same bits.

Spec strings: `name[:key=value,...]`, such as `bf16`, `identity` or `mapl:r=64,anchors=factorized`. The options of a
codec or format are the keyword parameters of its constructor, typed by their annotations. The name of a byte format
alone means the identity codec with that format both ways.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn


class CodecError(ValueError):
    """A payload that cannot be what was agreed, a tensor that must not be sent, or a spec that names no codec."""


class Direction(enum.IntEnum):
    """FORWARD carries activations downstream, BACKWARD gradients upstream."""

    FORWARD = 0
    BACKWARD = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """All that a message's content may depend on beside the tensor and codec state."""

    seed: int
    boundary: int
    direction: Direction
    step: int
    microbatch: int

    def __post_init__(self) -> None:
        for name in ("seed", "boundary", "step", "microbatch"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"Key.{name} = {getattr(self, name)} is outside [0, 2**63)")

    def generator(self, stream: int = 0) -> np.random.Philox:
        """A counter-based generator that is this key's own; its raw stream is fixed for good (NumPy's NEP 19).

        The fields fill Philox's key and the upper words of its counter, so no two keys or streams ever overlap.
        `stream` separates independent uses under one key.
        """
        return np.random.Philox(
            key=np.array([self.seed, self.boundary << 1 | self.direction], dtype=np.uint64),
            counter=np.array([0, self.microbatch, self.step, stream], dtype=np.uint64),
        )

    def __str__(self) -> str:
        what = f"{self.direction.name} tensor of boundary {self.boundary}"
        return f"{what}, step {self.step}, microbatch {self.microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One packed tensor. `codec` is the byte format's id, `header` is msgpack-able (small ints, strings, lists)."""

    codec: str
    header: dict[str, Any]
    body: bytes


class ByteFormat(ABC):
    """The byte half: tensor <-> bytes. One instance serves one direction of one boundary (it may have state)."""

    id: str  # on the wire

    @abstractmethod
    def pack(self, z: Tensor, key: Key) -> Payload:
        """Bytes of a tensor of any floating dtype, on any device; `z` is not changed and its graph not followed.

        Raises CodecError for a value that is not finite, or not finite in this format, naming it and `key`.
        """

    @abstractmethod
    def unpack(
        self, payload: Payload, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The tensor that was packed, up to rounding; its memory is its own. `shape` and `dtype` are what the LOCAL
        configuration expects: all sizes are checked against them before anything is allocated.

        Raises CodecError for another format's payload, another shape, a wrong length, or a scale or value out of range.
        """

    @abstractmethod
    def body_bytes(self, shape: tuple[int, ...]) -> int:
        """Exact length of `Payload.body` for a tensor of this shape."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Named tensors that a checkpoint has to hold; a format without state has none."""
        return {}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises CodecError for tensors that this format does not have."""
        if state:
            raise CodecError(f"format '{self.id}' has no state, but was given {reprlib.repr(sorted(state))}")

    def check(self, payload: Payload, shape: tuple[int, ...]) -> None:
        """Refuse, before anything is allocated, a payload that is not this format's or not of this shape."""
        if payload.codec != self.id:
            raise CodecError(f"payload has format {reprlib.repr(payload.codec)}, agreed was '{self.id}'")
        header: Any = payload.header
        if not isinstance(header, dict) or "shape" not in header:
            raise CodecError(f"{self.id} payload's header has no shape: {reprlib.repr(header)}")
        if header["shape"] != list(shape):
            raise CodecError(
                f"{self.id} payload has shape {reprlib.repr(header['shape'])}, expected {list(shape)}; "
                "both nodes must run the same configuration"
            )
        body: Any = payload.body
        if not isinstance(body, bytes):
            raise CodecError(f"{self.id} payload's body is {type(body).__name__}, not bytes")
        if len(body) != self.body_bytes(shape):
            raise CodecError(
                f"{self.id} payload has {len(body)} bytes, expected {self.body_bytes(shape)} for shape {list(shape)}"
            )


class Sender(nn.Module, ABC):
    """The in-graph half at the upstream stage."""

    @abstractmethod
    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) and their token ids (B, T), int64, to the wire tensor (B, T, W)."""


class Receiver(nn.Module, ABC):
    """The in-graph half at the downstream stage."""

    @abstractmethod
    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        """The wire tensor (B, T, W) and the token ids (B, T), int64, to hidden states (B, T, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryContext:
    """What a half may know when it is built; equal at both ends, so both draw equal initial values from it."""

    seed: int
    boundary: int  # 0-based: boundary b lies between stages b and b + 1
    width: int  # D, of the hidden states
    vocab_size: int


class Codec(ABC):
    """A method: builds the two in-graph halves and says which byte formats suit them. Holds options, never state."""

    name: str
    default_forward: str  # spec of the byte format of activations
    default_backward: str  # and of gradients

    @abstractmethod
    def wire_width(self, width: int) -> int:
        """W, the numbers per token that cross the boundary, for hidden states of `width`."""

    @abstractmethod
    def sender(self, context: BoundaryContext) -> Sender:
        """The upstream half. A node builds only its own side; nothing is shared with the other."""

    @abstractmethod
    def receiver(self, context: BoundaryContext) -> Receiver:
        """The downstream half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryCodec:
    """One boundary's codec and its two byte formats. Call `parse_codec` once per boundary: formats may have state."""

    codec: Codec
    forward: ByteFormat
    backward: ByteFormat

    def format(self, direction: Direction) -> ByteFormat:
        return self.forward if direction is Direction.FORWARD else self.backward


_CODECS: dict[str, type[Codec]] = {}
_FORMATS: dict[str, type[ByteFormat]] = {}
_BUILT_IN = ("formats", "identity")  # modules of this package that register something

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
    name = spec.partition(":")[0].strip()
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
    name = spec.partition(":")[0].strip()
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
