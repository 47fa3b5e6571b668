"""run.toml and the command line's `--set`: from text to a `RunConfig` and back.

A file is a table for each section of `node.config`. What nobody knows is refused with the nearest name that there is;
of several faults the first is said, in one line. Why not pydantic's own words for an unknown key: they name neither the
section nor what was meant.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from .config import ConfigError, RunConfig


def known_keys() -> list[str]:
    """All settings as `section.key`."""
    return [
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        for key in type(field.default).model_fields
    ]


def _nearest(key: str, candidates: list[str]) -> str:
    found = difflib.get_close_matches(key, candidates, n=1, cutoff=0.4)
    if not found:  # the right key under the wrong section is the other common slip
        found = [name for name in candidates if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; the nearest known one is '{found[0]}'" if found else f"; known: {', '.join(candidates)}"


def _check_known(tree: dict[str, Any]) -> None:
    sections = list(RunConfig.model_fields)
    for section, table in tree.items():
        if section not in sections:
            raise ConfigError(f"unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"'{section}' is a section: write it as a table, [{section}]")
        for key in table:
            if f"{section}.{key}" not in known_keys():
                raise ConfigError(f"unknown setting '{section}.{key}'{_nearest(f'{section}.{key}', known_keys())}")


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Check a plain tree of settings. Raises ConfigError with one line that names the first fault."""
    _check_known(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        got = f" (got {brief(first['input'])})" if where else ""
        raise ConfigError(f"{where}: {message}{got}" if where else message) from None


def brief(value: object) -> str:
    """It as a person reads it in an error: orders of a schedule may be thousands of letters."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:80]}... ({len(text):,} characters)"


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a run.toml; `overrides` maps `section.key` to a value and wins. Raises ConfigError."""
    return parse_config(merge(read_toml(path), overrides or {}))


def read_toml(path: Path) -> dict[str, Any]:
    """The raw tree of a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def merge(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with `section.key` overrides laid over it. Raises ConfigError for an unknown key."""
    merged = {name: dict(table) if isinstance(table, dict) else table for name, table in tree.items()}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if name not in known_keys():
            raise ConfigError(f"unknown setting '{name}'{_nearest(name, known_keys())}")
        merged.setdefault(section, {})[key] = value
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` from the command line; the value is TOML, a bare word is a string. Raises ConfigError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set wants section.key=value, got '{text}'")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def dump_config(config: RunConfig) -> str:
    """The resolved settings as TOML; keys that are unset are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
