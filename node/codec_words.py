"""What a person writes after `--codec`: CODEC [FORWARD [BACKWARD]] in one text, or several of those, with commas.

Every command that takes a codec reads it here, so that what works for `bench` works for `up`, and fails alike. The
words themselves (`mapl:r=32`, `rvq:groups=4`) are read by `compress.registry`; this only takes the text apart.
"""

from __future__ import annotations

import re

from .config import ConfigError

SETTINGS = ("codec.codec", "codec.forward", "codec.backward")


def split_codecs(text: str) -> list[str]:
    """`bf16,mapl:r=32,anchors=full,int4` is three: an option follows its codec after a comma. Formats after a space."""
    codecs: list[str] = []
    for part in text.split(","):
        goes_on = codecs and re.match(r"\s*[a-z_]+=", part)
        if goes_on:
            codecs[-1] += "," + part
        elif part.strip():
            codecs.append(part.strip())
    return codecs


def codec_settings(codec: str | None, forward: str | None = None, backward: str | None = None) -> dict[str, str]:
    """The settings that `--codec "mapl rvq int8"`, `--forward` and `--backward` mean; those alone that were given.

    Raises ConfigError for more than three words, none, or a format that is said in both ways.
    """
    words = [] if codec is None else codec.split()
    if codec is not None and not 1 <= len(words) <= len(SETTINGS):
        raise ConfigError(f"--codec '{codec}' has {len(words)} parts; write CODEC, or CODEC FORWARD BACKWARD")
    found: dict[str, str] = dict(zip(SETTINGS, words, strict=False))
    for name, said in (("forward", forward), ("backward", backward)):
        if said is None:
            continue
        if (before := found.setdefault(f"codec.{name}", said)) != said:
            raise ConfigError(f"--codec '{codec}' says {before}, --{name} says {said}; leave one of the two away")
    return found
