"""Tokens: a vocabulary, and the corpus written once in it.

What: `load_vocabulary` reads the user's tokenizer.json or trains a byte-level BPE (Sennrich et al. 2016, arXiv
1508.07909; over bytes as in GPT-2, so that no text is unknown). `tokenize_once` writes a source as two flat arrays of
ids, training and held-out, which are then mapped into memory read-only: a window costs one slice.

How: what is made here lands in the cache (cache.py) under the digest of what it was made from. A document is encoded in
pieces of about a million characters, cut at line ends by a rule that sees the text alone, so that one huge file fits
into memory and gives the same ids in every format.

Why hold out by the hash of a document and not the last documents of the list? Files come in an order (alphabetical,
by date, by author), and the end of it is not like the rest. Only where the hash cannot give a fair share, such as a
single file, the end of the text is held out.
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import DataSection
from .cache import build_once, cache_directory, content_key
from .documents import HELDOUT_SHARE, DataError, Source, first_line, is_heldout

DEFAULT_VOCABULARY = 4096
SMALLEST_BPE = 257  # 256 bytes and the end of text
END_OF_TEXT = "<|endoftext|>"

# what published tokenizers call it, most particular first
_END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # full-width bars: DeepSeek's own spelling
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[SEP]",
)
_SAMPLE_BYTES = 12 * 2**20  # of text for training the BPE; more changes a 4k..64k vocabulary very little
_PIECE_CHARACTERS = 2**20  # an encoding needs some 100 bytes a character, so long documents are cut at a line's end
_BATCH_CHARACTERS = 4 * 2**20
_FAIR_SHARE = (0.01, 0.2)  # of all tokens; outside of it the hash of documents gave no usable held-out part


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer, the number of ids that it needs, the id that ends a document, its file, and that file's content and
    digest."""

    tokenizer: Tokenizer
    size: int
    end_id: int
    path: Path
    digest: str
    content: bytes = b""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.size <= 2**16 else np.uint32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each document, ended by `end_id`."""
        pieces = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(text, _PIECE_CHARACTERS)]
        coded = self.tokenizer.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in texts]
        for (number, _), encoding in zip(pieces, coded, strict=True):
            ids[number].extend(encoding.ids)
        return [np.array([*document, self.end_id], dtype=self.dtype) for document in ids]


def _pieces(text: str, characters: int) -> Iterator[str]:
    start = 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters, start + 2 * characters) + 1 or start + characters
        yield text[start:end]
        start = end
    yield text[start:]


def batches_of_texts(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in groups that are large enough to encode well and small enough to hold."""
    group: list[str] = []
    characters = 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def map_tokens(path: Path) -> np.ndarray:
    """A flat array of ids, mapped read-only. Raises OSError, ValueError or EOFError unless it is whole."""
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.ndim != 1 or path.stat().st_size != tokens.offset + tokens.nbytes:
        raise ValueError(f"{path} has the wrong size")
    return tokens


def is_whole_array(path: Path) -> bool:
    try:
        map_tokens(path)
    except (OSError, ValueError, EOFError):
        return False
    return True


def write_tokens(path: Path, parts: Iterable[np.ndarray], *, length: int, dtype: np.dtype[Any]) -> None:
    """Join flat arrays, `length` ids in all, into one .npy file of exactly this name."""
    tokens = open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    start = 0
    for part in parts:
        tokens[start : start + len(part)] = part
        start += len(part)
    tokens.flush()


def wanted_vocabulary(settings: DataSection, wanted: int | None) -> int:
    """Rows the model's embedding needs. Raises DataError when `wanted` (model.vocab_size) is too small."""
    if settings.tokenizer is not None:
        own, said = read_vocabulary(settings.tokenizer).size, f"the tokenizer {settings.tokenizer}"
    else:
        own, said = SMALLEST_BPE, "a byte-level BPE"
        wanted = DEFAULT_VOCABULARY if wanted is None else wanted
    if wanted is not None and wanted < own:
        raise DataError(f"model.vocab_size = {wanted} is too small: {said} needs {own}; raise it or leave it out")
    return own if wanted is None else wanted


def load_vocabulary(
    settings: DataSection, source: Source | None, vocab_size: int, tokenizer: Path | None = None
) -> Vocabulary:
    """The user's tokenizer, else `tokenizer`, for which no source is needed; else a BPE of at most `vocab_size` ids
    trained once on the source. Raises DataError."""
    if given := settings.tokenizer or tokenizer:
        return read_vocabulary(given)
    wanted_vocabulary(settings, vocab_size)
    assert source is not None
    directory = cache_directory(settings)
    path = directory / f"tokenizer-{content_key('bpe', source.digest, vocab_size)[:32]}.json"

    def is_whole(candidate: Path) -> bool:
        try:
            read_vocabulary(candidate)
        except DataError:
            return False
        return True

    def build(asides: list[Path]) -> None:
        asides[0].write_text(_train(source, vocab_size).to_str(pretty=True), encoding="utf-8")

    build_once([path], is_whole, build)
    return read_vocabulary(path)


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a tokenizer.json, or a directory that has one. Raises DataError."""
    try:
        file = path.expanduser()
        content = (file / "tokenizer.json" if file.is_dir() else file).read_bytes()
        tokenizer = Tokenizer.from_str(content.decode())
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; check data.tokenizer") from None
    except Exception as error:  # the library raises bare Exception for a file that it does not understand
        raise DataError(
            f"{path} is not a tokenizer.json: {first_line(error)}; save one with the tokenizers library"
        ) from None
    # text that happens to spell a special token is text: only this module ends documents
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    end = next((ids[name] for name in _END_NAMES if name in ids), None)
    if end is None:
        raise DataError(f"the tokenizer {path} has no end-of-text token; add one of {', '.join(_END_NAMES)}")
    return Vocabulary(
        tokenizer=tokenizer,
        size=max(ids.values()) + 1,
        end_id=end,
        path=path.expanduser(),
        digest=hashlib.sha256(content).hexdigest(),
        content=content,
    )


def _train(source: Source, vocab_size: int) -> Tokenizer:
    """The same bytes for the same text, on any number of cores: counts are summed and ties broken by id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(source), trainer)
    return tokenizer


def _sample(source: Source) -> Iterator[str]:
    """About _SAMPLE_BYTES of text, spread evenly over the source.

    Held-out documents too: which merges exist says next to nothing about a text, and in a source of few documents the
    one that hashes below the share may be most of it.
    """
    fraction = min(1.0, _SAMPLE_BYTES / max(1, source.size_bytes))
    seen = taken = 0
    for text in source.read():
        for piece in _pieces(text, 2**16):
            if taken <= fraction * seen:
                yield piece
                taken += len(piece)
            seen += len(piece)
            if taken >= _SAMPLE_BYTES:
                return


def tokenize_once(source: Source, vocabulary: Vocabulary, directory: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Flat arrays of training and held-out ids, and the digest of both. Raises DataError for an empty source."""
    digest = content_key("tokens", vocabulary.digest, source.digest)
    paths = [directory / f"tokens-{digest[:32]}-{part}.npy" for part in ("train", "heldout")]
    build_once(paths, is_whole_array, lambda asides: _tokenize(source, vocabulary, asides))
    train, heldout = (map_tokens(path) for path in paths)
    return train, heldout, digest


def _tokenize(source: Source, vocabulary: Vocabulary, paths: list[Path]) -> None:
    lengths, held = array("q"), array("b")
    with tempfile.TemporaryFile(dir=paths[0].parent) as scratch:
        for texts in batches_of_texts(source.read()):
            for text, ids in zip(texts, vocabulary.encode(texts), strict=True):
                scratch.write(ids.data)
                lengths.append(len(ids))
                held.append(is_heldout(text))
        scratch.flush()
        total = sum(lengths)
        if not total:
            raise DataError(f"{source.name} holds no text at all; set data.source to some")
        tokens = np.memmap(scratch, dtype=vocabulary.dtype, mode="r", shape=(total,))
        of_part = [sum(n for n, flag in zip(lengths, held, strict=True) if flag == part) for part in (0, 1)]
        if _FAIR_SHARE[0] <= of_part[1] / total <= _FAIR_SHARE[1]:
            parts = [_documents_of_part(tokens, lengths, held, part) for part in (0, 1)]
        else:
            of_part[1] = max(1, round(HELDOUT_SHARE * total))
            of_part[0] = total - of_part[1]
            parts = [iter([tokens[: of_part[0]]]), iter([tokens[of_part[0] :]])]
        for path, arrays, length in zip(paths, parts, of_part, strict=True):
            write_tokens(path, arrays, length=length, dtype=vocabulary.dtype)


def _documents_of_part(tokens: np.ndarray, lengths: array[int], held: array[int], part: int) -> Iterator[np.ndarray]:
    end = 0
    for length, flag in zip(lengths, held, strict=True):
        end += length
        if flag == part:
            yield tokens[end - length : end]
