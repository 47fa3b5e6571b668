"""What is said while a text is prepared, and what is known of it afterwards.

What: `Preparing` is called with what is being done, how much of it is done and of how much; whoever has a screen or a
log shows it. `Found` is what a corpus turned out to hold, kept beside its ids in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# (what, done, of how much); 0 of how much: nobody knows. Bytes of the input where both are given, else characters.
Preparing = Callable[[str, int, int], None]


def silently(what: str, done: int, total: int) -> None:
    """Nobody looks."""
    del what, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a corpus holds. dropped: characters that its tokenizer left out, with how often; first_dropped: where."""

    documents: int
    heldout_documents: int
    characters: int
    tokens: int
    heldout_tokens: int
    largest_id: int
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Found:
        """Raises OSError, ValueError, TypeError or KeyError for a file that is not whole."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Found(**fields)

    def line(self, source: str, end_token: str, end_said_by: str) -> str:
        """For people, at the start of a run."""
        own = f"{self.documents:,} document{'' if self.documents == 1 else 's'}"
        return (
            f"{source}: {own}, {self.tokens:,} tokens, {self.heldout_tokens:,} of them held out; documents end with "
            f"{end_token} ({end_said_by})"
        )
