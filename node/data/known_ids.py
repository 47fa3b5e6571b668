"""Ids of a text that a model does not have.

A tokenizer with more ids than its model is no fault by itself: published pairs differ by added tokens that no text has.
So where it has more, the ids of the text are what is looked at: a little of it before it is tokenised, since the wrong
tokenizer shows in the first lines and tokenising takes minutes, and then all that there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .local_files import DataError

FIRST_CHARACTERS = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownIds:
    """Ids below `count` are the model's; of a tokenizer with more."""

    tokenizer: Tokenizer
    count: int

    def check(self, ids: np.ndarray) -> None:
        """Raises DataError for an id that the model does not have."""
        if len(ids) and (worst := int(ids.max())) >= self.count:
            raise DataError(
                f"the text has token {worst} ({self.tokenizer.id_to_token(worst)!r}), but the model's vocabulary ends "
                f"at {self.count - 1}; use the model's own tokenizer (data.tokenizer)"
            )

    def check_beginning(self, documents: Iterable[str]) -> None:
        """Raises DataError as `check` does, for the first documents of a text."""
        left = FIRST_CHARACTERS
        for text in documents:
            try:
                ids = self.tokenizer.encode(text[:left], add_special_tokens=False).ids
            except Exception as error:  # the library raises nothing narrower
                said = " ".join(str(error).split())
                raise DataError(
                    f"the tokenizer cannot spell the text: {said}; choose one that has an unknown token or falls back "
                    "to bytes"
                ) from None
            self.check(np.array(ids))
            left -= len(text)
            if left <= 0:
                return


def known_ids(tokenizer: Tokenizer, size: int, end_id: int, model_size: int) -> KnownIds | None:
    """What to look at of a text in a tokenizer of `size` ids, whose documents end with `end_id`; None: nothing, the
    model has them all. Raises DataError where even the end of a document is none of its own."""
    if size <= model_size:
        return None
    found = KnownIds(tokenizer=tokenizer, count=model_size)
    found.check(np.array([end_id]))
    return found
