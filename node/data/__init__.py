"""Where tokens come from: from the settings to an open corpus.

What: `data.source` is local files, a streamed Hugging Face dataset, or the embedded default. Only stage 0 opens it; the
other stages need `vocabulary_size` alone, which trains nothing and reads at most a tokenizer file.

How: documents.py yields texts, tokens.py makes ids of them once and caches both the tokenizer and the ids, corpus.py
cuts and orders windows; streamed.py does the last two for a dataset that is not on this machine. Why tokenize ahead and
not while training? A stage of a thin pipeline has compute to spare, but the ids of one corpus are then the same array
for every run, seed and sequence length, and a batch is a few slices of mapped memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import DataSection
from .cache import cache_directory
from .corpus import Corpus, LocalCorpus
from .documents import DataError, check_source, open_source
from .known_ids import known_ids
from .streamed import open_stream, stream_documents, stream_vocabulary
from .tokens import Vocabulary, load_vocabulary, read_vocabulary, tokenize_once, wanted_vocabulary

__all__ = [
    "Corpus",
    "DataError",
    "Vocabulary",
    "check_source",
    "open_corpus",
    "open_documents",
    "open_vocabulary",
    "read_vocabulary",
    "vocabulary_size",
]


def vocabulary_size(settings: DataSection, wanted: int | None) -> int:
    """Rows of the embedding: `wanted` (model.vocab_size) if given, else the tokenizer file's own size, else 4096.

    Raises DataError when the tokenizer cannot be read or needs more than `wanted`.
    """
    return wanted_vocabulary(settings, wanted)


def open_corpus(settings: DataSection, *, vocab_size: int, seed: int, tokenizer: Path | None = None) -> Corpus:
    """Prepare the corpus (once; then from the cache) and open it. Every id is below `vocab_size`, also where the
    tokenizer has more; of a dataset that is streamed, each is looked at when it is drawn. tokenizer: one to use where
    the settings name none; else a BPE is trained on the text.

    Several processes may call this at once. Raises DataError.
    """
    if settings.source.startswith("hf:"):
        return open_stream(settings, vocab_size=vocab_size, seed=seed, tokenizer=tokenizer)
    directory = cache_directory(settings)
    source = open_source(settings, directory)
    vocabulary = load_vocabulary(settings, source, vocab_size, tokenizer)
    known = known_ids(vocabulary.tokenizer, vocabulary.size, vocabulary.end_id, vocab_size)
    if known:
        known.check_beginning(source.read())
    train, heldout, digest = tokenize_once(source, vocabulary, directory)
    if known:
        known.check(train)
        known.check(heldout)
    return LocalCorpus(
        train,
        heldout,
        name=source.name,
        digest=digest,
        tokenizer_json=vocabulary.content,
        seed=seed,
        sequence_length=settings.sequence_length,
        heldout_sequences=settings.heldout_sequences,
    )


def open_vocabulary(settings: DataSection, *, vocab_size: int, tokenizer: Path | None = None) -> Vocabulary:
    """The tokenizer of the corpus alone: from its file, `tokenizer` if none is named, from the cache, or trained once.
    Raises DataError where that needs a text that is not there."""
    if settings.tokenizer or tokenizer:
        return load_vocabulary(settings, None, vocab_size, tokenizer)
    if settings.source.startswith("hf:"):
        return stream_vocabulary(settings, vocab_size)
    return load_vocabulary(settings, open_source(settings, cache_directory(settings)), vocab_size)


def open_documents(settings: DataSection) -> tuple[str, Callable[[], Iterator[str]]]:
    """What `data.source` is called, and its documents, from the first one again at each call. Raises DataError."""
    if settings.source.startswith("hf:"):
        return settings.source, lambda: stream_documents(settings)
    source = open_source(settings, cache_directory(settings))
    return source.name, source.read
