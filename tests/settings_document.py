"""docs/settings.md from the settings themselves: `python -m tests.settings_document` writes its tables.

Name, default and bounds of a setting are the code's (`node/config_sections.py`), and so is what is said of it: the
description of its pydantic field. A setting without one is an error, and so is a section that the document lacks: the
document cannot fall behind. The text around the tables is written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from thinpipe.node.config import RunConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEADING = ("setting", "default", "values", "shared", "what it is")
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def _number(value: float, name: str) -> str:
    """In full, as run.toml has it; sizes in MiB beside it."""
    if isinstance(value, float):
        return f"{value:g}"
    if value >= 2**62:
        return f"2^{value.bit_length() - 1}"
    if "bytes" in name and value:
        return f"{value} ({value / 2**20:g} MiB)"
    return str(value)


def _default(value: Any, name: str) -> str:
    match value:
        case None:
            return "unset"
        case bool():
            return str(value).lower()
        case int() | float():
            return _number(value, name)
        case ():
            return "unset"
        case _:
            return f'"{value}"'


def _values(field: FieldInfo, name: str) -> str:
    """The type in words, and the bounds."""
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    (kind,) = kinds
    if get_origin(kind) is tuple:
        return "list of pairs" if get_origin(get_args(kind)[0]) is tuple else "list of numbers"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    bounds = [
        f"{sign} {_number(getattr(limit, type(limit).__name__.lower()), name)}"
        for limit in field.metadata
        if (sign := _SIGNS.get(type(limit)))
    ]
    assert kind is not None
    return ", ".join([_WORDS[kind], *bounds])


def tables() -> dict[str, list[tuple[str, ...]]]:
    """By section; the first row is the heading. Raises ValueError for a setting of which nothing is said."""
    shared = RunConfig().shared()
    found: dict[str, list[tuple[str, ...]]] = {}
    for section, whole in RunConfig.model_fields.items():
        settings: type[BaseModel] = type(whole.default)
        found[section] = [HEADING]
        for name, field in settings.model_fields.items():
            if not field.description:
                raise ValueError(
                    f"node/config_sections.py says nothing of {section}.{name}: give its Field a description"
                )
            cells = (
                f"`{section}.{name}`",
                _default(field.default, name),
                _values(field, name),
                "yes" if name in shared.get(section, {}) else "",
                field.description,
            )
            found[section].append(tuple(cell.replace("|", "\\|") for cell in cells))
    return found


def filled(document: str) -> str:
    """The document with the tables of now. Raises ValueError for a table that it lacks, or that is none."""
    left = tables()

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in left:
            raise ValueError(f"there is no section '{name}', or it comes twice")
        heading, *rows = left.pop(name)
        lines = [heading, tuple("---" for _ in heading), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"<!-- settings: {name} -->\n{table}\n<!-- end -->"

    document = re.sub(r"<!-- settings: (\w+) -->\n.*?<!-- end -->", fill, document, flags=re.DOTALL)
    if left:
        raise ValueError(f"the document has no place for {', '.join(left)}")
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"docs/{DOCUMENT.name}: {len(tables())} sections")
