"""How a long text is cut before a tokenizer sees it.

What: `pieces` cuts a document into parts of about a million characters, `short_runs` cuts a text where it has thousands
of characters without a space (or of nothing but space), for a tokenizer that is trained on it.

How: a part ends at a line's end where there is one, by a rule that sees the text alone, so that a document gives the
same ids in every format and is never in memory whole. A run is cut after every RUN_CHARACTERS. Why at all? What lies
between two spaces is one word, and learning merges takes time that grows with the square of a word: half a megabyte of
DNA on one line took a minute. Ordinary text has no such word, so the tokenizer that is learned from it is the same. To
apply merges takes time in proportion, so a text that is coded is not cut in this way, and its ids are the tokenizer's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 2**20  # an encoding needs some 100 bytes a character
RUN_CHARACTERS = 2**12
# Only where a run begins, or each of its characters would be tried as a beginning.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{RUN_CHARACTERS + 1},}}|(?<!\s)\s{{{RUN_CHARACTERS + 1},}}")


def pieces(text: str, characters: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool]]:
    """Parts of `text` of up to twice `characters`, and whether each is the last. One at least, which may be empty."""
    start = 0
    while len(text) - start > characters:
        end = _cut(text, start, characters)
        yield text[start:end], False
        start = end
    yield text[start:], True


def pieces_of_stream(chunks: Iterable[str], characters: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool]]:
    """The same parts of a text that comes in chunks, which are not much larger than `characters`."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) >= 2 * characters:  # so much decides where the next part ends
            end = _cut(held, 0, characters)
            yield held[:end], False
            held = held[end:]
    yield from pieces(held, characters)


def _cut(text: str, start: int, characters: int) -> int:
    return text.find("\n", start + characters, start + 2 * characters) + 1 or start + characters


def short_runs(text: str) -> list[str]:
    """Parts of `text` without a run of more than RUN_CHARACTERS without a space, or of space."""
    cuts = [0]
    for run in _LONG_RUN.finditer(text):
        cuts += range(run.start(), run.end(), RUN_CHARACTERS)
    cuts.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(cuts) if end > start]
