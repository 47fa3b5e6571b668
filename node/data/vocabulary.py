"""A tokenizer's files, and what this project needs of them: ids of a text, and the id that ends a document.

What: `read_vocabulary` reads a tokenizer.json, or a directory in Hugging Face's layout that has one. `Vocabulary` codes
texts, and counts what the tokenizer leaves out of them.

How: the token that ends a document is what the files beside the tokenizer say (`eos_token` of tokenizer_config.json,
else `eos_token_id` of the model's config.json), and only where they say nothing one of the names that published
tokenizers use. Why not those names alone? A tokenizer may have several of them, one for padding, and a model that was
trained to end with another one would have to learn it anew.

Some tokenizers have neither an unknown token nor bytes to spell with. One kind then refuses a text, the other drops
characters without a word, so each character is tried once, by itself, before it is met in a text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .local_files import DataError, expanded, first_line
from .pieces import pieces

END_OF_TEXT = "<|endoftext|>"
# what published tokenizers call it, most particular first
END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # full-width bars: DeepSeek's own spelling
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[SEP]",
)
_CHARACTERS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer, the number of ids that it needs, the id that ends a document, and the digest of what both are from.

    path: of the tokenizer.json, and its content. said: what tokenizer_config.json beside it says. name: for people.
    end_said_by: which file names the end of a document, or "its name".
    """

    tokenizer: Tokenizer
    size: int
    end_id: int
    digest: str
    path: Path = Path("tokenizer.json")
    content: bytes = b""
    said: dict[str, Any] = field(default_factory=dict)
    name: str = "the tokenizer"
    end_said_by: str = "its name"
    _spelled: dict[str, bool] = field(default_factory=dict)  # characters that were tried: False: dropped

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)

    @property
    def end_token(self) -> str:
        return self.tokenizer.id_to_token(self.end_id) or str(self.end_id)

    def files(self) -> dict[str, bytes]:
        """All that makes it the same tokenizer, with the same end of a document, in another directory: its files there,
        by name."""
        told = json.dumps({**self.said, "eos_token": self.end_token}, indent=2) + "\n"
        return {"tokenizer.json": self.content, "tokenizer_config.json": told.encode()}

    def bare(self) -> Vocabulary:
        """The same without the tokens that it would put around a text by itself: for a model that has never seen them,
        because it was trained on ids of `encode` alone."""
        if self.tokenizer.encode("a").ids == self.tokenizer.encode("a", add_special_tokens=False).ids:
            return self
        tokenizer = _opened(self.content)
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        content = tokenizer.to_str(pretty=True).encode()
        return replace(self, tokenizer=tokenizer, content=content, digest=_digest(content, self.end_id))

    def encode(self, documents: list[str]) -> list[np.ndarray]:
        """The ids of each document, ended by `end_id`. Raises DataError."""
        end = np.array([self.end_id], dtype=self.dtype)
        return [np.concatenate([*self.encode_parts([piece for piece, _ in pieces(text)]), end]) for text in documents]

    def encode_parts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without an end. Texts are as long as `pieces` makes them. Raises DataError."""
        try:
            coded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.name} cannot encode a text: {first_line(error)}; choose another one") from None
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in coded]

    def dropped(self, text: str, where: str) -> Counter[str]:
        """The characters of `text` that the tokenizer leaves out, with their numbers. White space, which may only tell
        words apart, does not count. Raises DataError for a character that the tokenizer refuses; `where` is said."""
        there = set(text)
        for character in sorted(there - self._spelled.keys()):
            self._spelled[character] = character.isspace() or self._spells(character, where)
        return Counter({each: text.count(each) for each in there if not self._spelled[each]})

    def _spells(self, character: str, where: str) -> bool:
        try:
            return bool(self.tokenizer.encode(character, add_special_tokens=False).ids)
        except Exception as error:  # as above
            raise DataError(
                f"{self.name} cannot spell {character!r} in {where}: {first_line(error)}; choose one that has an "
                "unknown token or falls back to bytes"
            ) from None


def dropped_line(vocabulary_name: str, dropped: dict[str, int], characters: int, first: str) -> str | None:
    """What a tokenizer left out of a corpus of so many characters, for people; None for nothing."""
    if not dropped:
        return None
    most = sorted(dropped, key=lambda each: (-dropped[each], each))
    named = " ".join(map(repr, most[:_CHARACTERS_SHOWN])) + (" ..." if len(most) > _CHARACTERS_SHOWN else "")
    return (
        f"{vocabulary_name} drops {sum(dropped.values()):,} of {characters:,} characters ({named}; the first in "
        f"{first}): it has no token for them; choose one that falls back to bytes to keep them"
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a tokenizer.json, or of a directory with one. Raises DataError."""
    file = expanded(path)
    if file.is_dir():
        file = file / "tokenizer.json"
        if not file.exists():
            raise DataError(f"the directory {path} has no tokenizer.json; save one there, or name a file")
    try:
        content = file.read_bytes()
        tokenizer = _opened(content)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; check data.tokenizer") from None
    except Exception as error:  # the library raises bare Exception for a file that it does not understand
        raise DataError(
            f"{file} is not a tokenizer.json: {first_line(error)}; save one with the tokenizers library"
        ) from None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    name = f"the tokenizer {path}"
    said = _read_json(file.with_name("tokenizer_config.json")) if file.name == "tokenizer.json" else {}
    end, said_by = _end_of_document(tokenizer, ids, file, name, said)
    return Vocabulary(
        tokenizer=tokenizer,
        size=max(ids.values()) + 1,
        end_id=end,
        digest=_digest(content, end),
        path=file,
        content=content,
        said=said,
        name=name,
        end_said_by=said_by,
    )


def _opened(content: bytes) -> Tokenizer:
    """Raises what the library does, for bytes that are no tokenizer.json."""
    tokenizer = Tokenizer.from_str(content.decode())
    # text that happens to spell a special token is text: only this project's code ends documents
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _digest(content: bytes, end_id: int) -> str:
    digest = hashlib.sha256(content)
    digest.update(str(end_id).encode())
    return digest.hexdigest()


def _end_of_document(
    tokenizer: Tokenizer, ids: dict[str, int], file: Path, name: str, own: dict[str, Any]
) -> tuple[int, str]:
    """The id, and who says so. Files beside a tokenizer are its own where it has the name that goes with them.
    own: what tokenizer_config.json says."""
    model = _read_json(file.with_name("config.json")) if file.name == "tokenizer.json" else {}
    stated = token_in(own, "eos_token")
    if stated is not None:
        if stated not in ids:
            raise DataError(
                f"{file.with_name('tokenizer_config.json')} names {stated!r} as eos_token, which {name} does not have; "
                "mend one of the two"
            )
        return ids[stated], "tokenizer_config.json"
    # A model that never had a tokenizer may name any id there; one that ends texts is a token of its own.
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {ids[known] for known in END_NAMES if known in ids}
    given = model.get("eos_token_id")
    for number in given if isinstance(given, list) else [given]:
        if isinstance(number, int) and number in special:
            return number, "config.json"
    padding = token_in(own, "pad_token")
    end = next((ids[known] for known in END_NAMES if known in ids and known != padding), None)
    if end is None:
        raise DataError(f"{name} has no end-of-text token; add one of {', '.join(END_NAMES)}")
    return end, "its name"


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file. Raises DataError for one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}; mend or remove it") from None
    return found if isinstance(found, dict) else {}


def token_in(settings: dict[str, Any], key: str) -> str | None:
    """A token as it is written there: a text, or an object with its content."""
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
