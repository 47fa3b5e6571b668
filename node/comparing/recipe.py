"""A recipe: a name, what crosses the boundaries, and settings of its own. What one row of a comparison trains with.

    NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]

such as `dense=bf16` or `faster=mapl:r=32 int4 int4 optim.muon_lr=0.04`. Settings for all recipes come first and a
recipe's own win. Why one text and not an option for each part: a comparison has several recipes, and options that are
repeated in parallel can no longer be told apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..codec_words import codec_settings
from ..config import ConfigError, RunConfig
from ..config_file import merge, parse_config, parse_override

METAVAR = "NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")  # a part of a directory's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one row trains with."""

    name: str
    codec: str
    formats: tuple[str, ...] = ()  # FORWARD, then BACKWARD, as far as given
    settings: tuple[str, ...] = ()  # SECTION.KEY=VALUE, for this recipe only

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Raises ConfigError for what is not spelt as METAVAR says."""
        name, equals, rest = text.partition("=")
        name = name.strip()
        codec, *words = rest.split() or [""]
        # An option of a format has an equals sign too, but after the format's name and a colon.
        is_setting = ["=" in word and ":" not in word.partition("=")[0] for word in words]
        formats = words[: is_setting.index(True)] if True in is_setting else words
        if not (name and equals and codec) or len(formats) > 2 or not all(is_setting[len(formats) :]):
            raise ConfigError(f"a recipe is {METAVAR}, got '{text}'")
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"recipe '{name}': its runs are kept under this name; use letters, digits and . + _ -, such as r32"
            )
        return cls(name=name, codec=codec, formats=tuple(formats), settings=tuple(words[len(formats) :]))

    @property
    def spec(self) -> str:
        """As after `--codec`."""
        return " ".join((self.codec, *self.formats))

    def own(self) -> dict[str, Any]:
        """Its own settings by `section.key`. Raises ConfigError."""
        return dict(map(parse_override, self.settings))

    def config(self, shared: dict[str, Any], seed: int) -> RunConfig:
        """Of its run with this seed. shared: settings of all recipes, by `section.key`. Raises ConfigError, which names
        the recipe."""
        try:
            return parse_config(merge({}, {"run.seed": seed, **shared, **codec_settings(self.spec), **self.own()}))
        except ValueError as error:  # of schedules too, which have their own
            raise ConfigError(f"recipe '{self.name}': {error}") from None


def check_names(recipes: Sequence[Recipe]) -> None:
    """Raises ConfigError for two of one name."""
    for name, count in Counter(recipe.name for recipe in recipes).items():
        if count > 1:
            raise ConfigError(
                f"two recipes are called '{name}'; their runs would share a directory: give each a name of its own"
            )
