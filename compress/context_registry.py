"""Names of the ways in which keys and values cross to other chunks, and what their spec strings build."""

from __future__ import annotations

from .byte_format import CodecError
from .context_method import ContextMethod
from .full_context import FullContext
from .mixture_of_subspaces import MixtureOfSubspaces
from .registry import parse_format
from .spec_strings import built, nearest

USUAL_WIDTH = 2**10  # of what a format packs, where the width itself does not matter
METHODS: dict[str, type[ContextMethod]] = {each.name: each for each in (FullContext, MixtureOfSubspaces)}


def parse_context(spec: str) -> ContextMethod:
    """A method from `full` or `mos:key=value,...`. Raises CodecError for an unknown name, option, value or byte
    format."""
    name = spec.partition(":")[0].strip()
    if name not in METHODS:
        raise CodecError(f"unknown context method '{name}'{nearest(name, list(METHODS))}")
    method = built(METHODS[name], "context method", spec)
    for each in (method.format, method.backward):
        if each:
            _check_format(each, method.name)
    return method


def _check_format(spec: str, method: str) -> None:
    fmt = parse_format(spec)
    if fmt.remembers or fmt.table(USUAL_WIDTH) is not None:
        raise CodecError(
            f"context method '{method}': format '{spec}' learns from what it packed before; choose one without that, "
            "such as bf16, int8 or int4"
        )
