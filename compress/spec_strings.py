"""Spec strings: `name[:key=value,...]`, the one spelling of whatever is chosen by name and has options.

The options are the keyword parameters of a constructor, typed by their annotations. Why annotations and not a table of
options beside each class: what a constructor takes and what the command line accepts cannot drift apart.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .byte_format import CodecError

_T = TypeVar("_T")


def built(factory: Callable[..., _T], kind: str, spec: str) -> _T:
    """What `factory` makes of the options in `spec`. `kind`, such as "codec", is what an error calls it. Raises
    CodecError for an option that it does not have, one given twice, or a value of another type."""
    name, colon, rest = spec.partition(":")
    name = name.strip()
    types = _options_of(factory)
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text):
            raise CodecError(f"{kind} '{name}': options are key=value, separated by commas; got '{item.strip()}'")
        if key not in types:
            raise CodecError(f"{kind} '{name}' has no option '{key}'{nearest(key, list(types))}")
        if key in options:
            raise CodecError(f"{kind} '{name}': option '{key}' is given twice")
        options[key] = _convert(text, types[key], f"{kind} '{name}': option '{key}'")
    return factory(**options)


@functools.cache
def _options_of(factory: Callable[..., object]) -> dict[str, Any]:
    """The type of each option. Remembered, since reading annotations takes longer than all that is built with them."""
    hints = get_type_hints(factory.__init__)  # pyright: ignore[reportFunctionMemberAccess]
    return {name: hints[name] for name in inspect.signature(factory).parameters}


def _convert(text: str, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise CodecError(f"{where} cannot be '{text}'{nearest(text, list(choices))}")
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


def nearest(name: str, known: list[str]) -> str:
    """The end of an error's line: the known name that was probably meant, or all of them."""
    if not known:
        return "; it has none"
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; the nearest known one is '{found[0]}'" if found else f"; known: {', '.join(sorted(known))}"
