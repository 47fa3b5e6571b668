"""Tokens: a vocabulary, and the corpus written once in it.

What: `load_vocabulary` reads the user's tokenizer or trains a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909;
over bytes as in GPT-2, so that no text is unknown). `tokenize_once` writes a source as two flat arrays of ids, training
and held-out, which are then mapped into memory read-only: a window costs one slice.

How: what is made here lands in the cache (cache.py) under the digest of what it was made from. A document is encoded in
parts (pieces.py), so that one huge file fits into memory and gives the same ids in every format. Files are written and
not mapped: on a full disk a write fails with a word, a mapped page with a signal.

Why hold out by the hash of a document and not the last documents of the list? Files come in an order (alphabetical,
by date, by author), and the end of it is not like the rest. Only where the hash cannot give a fair share, such as a
single file, the end of the text is held out.
"""

from __future__ import annotations

import itertools
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config_sections import DataSection
from .cache import build_once, cache_directory, content_key
from .documents import HELDOUT_SHARE, HeldoutRule, Source
from .local_files import DataError
from .pieces import pieces, short_runs
from .preparing import Found, Preparing, silently
from .readers import Part
from .vocabulary import END_OF_TEXT, Vocabulary, read_vocabulary

DEFAULT_VOCABULARY = 4096
SMALLEST_BPE = 257  # 256 bytes and the end of text

_SAMPLE_BYTES = 12 * 2**20  # of text for training the BPE; more changes a 4k..64k vocabulary very little
_SAMPLE_PIECE_CHARACTERS = 2**16
_BATCH_CHARACTERS = 2**20
_FAIR_SHARE = (0.01, 0.2)  # of all tokens; outside of it the hash of documents gave no usable held-out part
_WRITE_TOKENS = 2**22  # at a time


def batches_of_parts(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts of documents in groups that are large enough to encode well and small enough to hold."""
    group: list[Part] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part.text)
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


def is_whole(path: Path) -> bool:
    """Of what `tokenize_once` writes."""
    try:
        map_tokens(path) if path.suffix == ".npy" else Found.read(path)
    except (OSError, ValueError, EOFError, TypeError, KeyError):
        return False
    return True


def write_tokens(path: Path, parts: Iterable[np.ndarray], *, length: int, dtype: np.dtype[Any]) -> None:
    """Join flat arrays, `length` ids in all, into one .npy file of exactly this name. Raises OSError."""
    header = {**header_data_from_array_1_0(np.empty(0, dtype)), "shape": (length,)}
    with path.open("wb") as file:
        write_array_header_1_0(file, header)
        for part in parts:
            for start in range(0, len(part), _WRITE_TOKENS):
                file.write(np.ascontiguousarray(part[start : start + _WRITE_TOKENS], dtype).data)


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
    settings: DataSection, source: Source | None, vocab_size: int, report: Preparing = silently
) -> Vocabulary:
    """The user's tokenizer, for which no source is needed, or a BPE of at most `vocab_size` ids trained once on the
    source. Raises DataError."""
    if settings.tokenizer is not None:
        return read_vocabulary(settings.tokenizer)
    wanted_vocabulary(settings, vocab_size)
    assert source is not None
    directory = cache_directory(settings)
    path = directory / f"tokenizer-{content_key('bpe', source.digest, vocab_size)[:32]}.json"

    def is_tokenizer(candidate: Path) -> bool:
        try:
            read_vocabulary(candidate)
        except DataError:
            return False
        return True

    def build(asides: list[Path]) -> None:
        asides[0].write_text(_train(source, vocab_size, report).to_str(pretty=True), encoding="utf-8")

    build_once([path], is_tokenizer, build)
    return replace(
        read_vocabulary(path), name="the tokenizer of this text", end_said_by="a tokenizer trained on this text"
    )


def _train(source: Source, vocab_size: int, report: Preparing) -> Tokenizer:
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
    tokenizer.train_from_iterator(_sample(source, report), trainer)
    return tokenizer


def _sample(source: Source, report: Preparing) -> Iterator[str]:
    """About _SAMPLE_BYTES of text, spread evenly over the source.

    Held-out documents too: which merges exist says next to nothing about a text, and in a source of few documents the
    one that hashes below the share may be most of it.
    """
    fraction = min(1.0, _SAMPLE_BYTES / max(1, source.size_bytes))
    seen = taken = 0
    for part in source.read():
        for piece, _ in pieces(part.text, _SAMPLE_PIECE_CHARACTERS):
            if taken <= fraction * seen:
                yield from short_runs(piece)
                taken += len(piece)
            seen += len(piece)
            if taken >= _SAMPLE_BYTES:
                report("training the tokenizer", 0, 0)
                return
        report("reading a sample for the tokenizer", part.read_bytes if source.size_bytes else seen, source.size_bytes)
    report("training the tokenizer", 0, 0)


def tokenize_once(
    source: Source, vocabulary: Vocabulary, directory: Path, report: Preparing
) -> tuple[np.ndarray, np.ndarray, Found, str]:
    """Flat arrays of training and held-out ids, what was found, and the digest of all. Raises DataError for an empty
    source, and for a text that the tokenizer cannot spell."""
    digest = content_key("tokens", vocabulary.digest, source.digest)
    paths = [directory / f"tokens-{digest[:32]}-{part}.npy" for part in ("train", "heldout")]
    paths.append(directory / f"corpus-{digest[:32]}.json")
    build_once(paths, is_whole, lambda asides: _Tokenizing(source, vocabulary, report).write(asides))
    return map_tokens(paths[0]), map_tokens(paths[1]), Found.read(paths[2]), digest


class _Tokenizing:
    """A source on its way into arrays: first all ids in one scratch file, then sorted into the two parts."""

    def __init__(self, source: Source, vocabulary: Vocabulary, report: Preparing) -> None:
        self._source, self._vocabulary, self._report = source, vocabulary, report
        self._lengths, self._held = array("q"), array("b")  # of each document: tokens, and whether it is held out
        self._characters = 0
        self._largest_id = vocabulary.end_id
        self._dropped: Counter[str] = Counter()
        self._first_dropped = ""

    def write(self, paths: list[Path]) -> None:
        """Training ids, held-out ids, and what was found."""
        with tempfile.TemporaryFile(dir=paths[0].parent) as scratch:
            self._encode(scratch)
            scratch.flush()
            total = sum(self._lengths)
            if not total:
                raise DataError(f"{self._source.name} holds no text at all; set data.source to some")
            tokens = np.memmap(scratch, dtype=self._vocabulary.dtype, mode="r", shape=(total,))
            heldout = sum(length for length, flag in zip(self._lengths, self._held, strict=True) if flag)
            held_documents = sum(self._held)
            if _FAIR_SHARE[0] <= heldout / total <= _FAIR_SHARE[1]:
                parts = [self._documents_of_part(tokens, flag) for flag in (0, 1)]
            else:
                heldout, held_documents = max(1, round(HELDOUT_SHARE * total)), 0
                parts = [iter([tokens[: total - heldout]]), iter([tokens[total - heldout :]])]
            for path, arrays, length in zip(paths[:2], parts, (total - heldout, heldout), strict=True):
                write_tokens(path, arrays, length=length, dtype=self._vocabulary.dtype)
        found = Found(
            documents=len(self._lengths),
            heldout_documents=held_documents,
            characters=self._characters,
            tokens=total,
            heldout_tokens=heldout,
            largest_id=self._largest_id,
            dropped=dict(sorted(self._dropped.items())),
            first_dropped=self._first_dropped,
        )
        found.write(paths[2])

    def _encode(self, scratch: Any) -> None:
        length, rule, vocabulary = 0, HeldoutRule(), self._vocabulary
        for parts in batches_of_parts(self._source.read()):
            number = len(self._lengths)
            for part in parts:
                self._count_dropped(part, f"document {number + 1}")
                number += part.ends
            for part, ids in zip(parts, vocabulary.encode_parts([part.text for part in parts]), strict=True):
                if part.ends:
                    ids = np.append(ids, vocabulary.dtype.type(vocabulary.end_id))
                if len(ids):
                    self._largest_id = max(self._largest_id, int(ids.max()))
                scratch.write(ids.data)
                length += len(ids)
                rule.update(part.text)
                if part.ends:
                    self._lengths.append(length)
                    self._held.append(rule.holds_out)
                    length, rule = 0, HeldoutRule()
            size = self._source.size_bytes
            self._report("tokenising", parts[-1].read_bytes if size else self._characters, size)

    def _count_dropped(self, part: Part, where: str) -> None:
        self._characters += len(part.text)
        if dropped := self._vocabulary.dropped(part.text, where):
            self._dropped.update(dropped)
            self._first_dropped = self._first_dropped or where

    def _documents_of_part(self, tokens: np.ndarray, part: int) -> Iterator[np.ndarray]:
        """The ids of the documents that are held out (1) or not (0), neighbours together."""
        end = 0
        for flag, documents in itertools.groupby(zip(self._lengths, self._held, strict=True), key=lambda each: each[1]):
            start, end = end, end + sum(length for length, _ in documents)
            if flag == part:
                yield tokens[start:end]
