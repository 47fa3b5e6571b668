"""Where tokens come from: from the settings to an open corpus.

What: `data.source` is local files, a streamed Hugging Face dataset, or the embedded default. Only stage 0 opens it; the
other stages need `vocabulary_size` alone, which trains nothing and reads at most a tokenizer file.

How: documents.py yields texts (of local_files.py, by readers.py), tokens.py makes ids of them once and caches both the
tokenizer and the ids, corpus.py cuts and orders windows; streamed.py does the last two for a dataset that is not on
this machine. Why tokenize ahead and not while training? A stage of a thin pipeline has compute to spare, but the ids of
one corpus are then the same array for every run, seed and sequence length, and a batch is a few slices of mapped
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..config_sections import DataSection
from .cache import cache_directory
from .corpus import Corpus, LocalCorpus
from .document_streams import SourceLost
from .documents import check_source, open_source
from .known_ids import known_ids
from .local_files import DataError
from .preparing import Preparing, silently
from .readers import whole_documents
from .streamed import open_stream, stream_documents, stream_vocabulary
from .tokens import load_vocabulary, tokenize_once, wanted_vocabulary
from .vocabulary import Vocabulary, dropped_line, read_vocabulary

__all__ = [
    "Corpus",
    "DataError",
    "Preparing",
    "SourceLost",
    "Vocabulary",
    "check_source",
    "open_corpus",
    "open_documents",
    "open_vocabulary",
    "read_vocabulary",
    "silently",
    "vocabulary_size",
]


def vocabulary_size(settings: DataSection, wanted: int | None) -> int:
    """Rows of the embedding: `wanted` (model.vocab_size) if given, else the tokenizer file's own size, else 4096.

    Raises DataError when the tokenizer cannot be read or needs more than `wanted`.
    """
    return wanted_vocabulary(settings, wanted)


def open_corpus(settings: DataSection, *, vocab_size: int, seed: int, report: Preparing = silently) -> Corpus:
    """Prepare the corpus (once; then from the cache) and open it. Every id is below `vocab_size`, also where the
    tokenizer has more; of a dataset that is streamed, each is looked at when it is drawn.

    Several processes may call this at once. `report` is told what is being done. Raises DataError, and SourceLost for a
    streamed dataset that stayed away.
    """
    if settings.source.startswith("hf:"):
        return open_stream(settings, vocab_size=vocab_size, seed=seed, report=report)
    directory = cache_directory(settings)
    report("reading the files", 0, 0)
    source = open_source(settings)
    vocabulary = load_vocabulary(settings, source, vocab_size, report)
    known = known_ids(vocabulary.tokenizer, vocabulary.size, vocabulary.end_id, vocab_size)
    if known:
        known.check_beginning(part.text for part in source.read())
    train, heldout, found, digest = tokenize_once(source, vocabulary, directory, report)
    if known:
        known.check(np.array([found.largest_id]))
    corpus = LocalCorpus(
        train,
        heldout,
        name=source.name,
        digest=digest,
        seed=seed,
        sequence_length=settings.sequence_length,
        heldout_sequences=settings.heldout_sequences,
    )
    corpus.tokenizer_files = vocabulary.files()
    corpus.found, corpus.line = found, found.line(source.name, vocabulary.end_token, vocabulary.end_said_by)
    dropped = dropped_line(vocabulary.name, found.dropped, found.characters, found.first_dropped)
    corpus.warnings = tuple(filter(None, (source.remark, dropped)))
    return corpus


def open_vocabulary(settings: DataSection, *, vocab_size: int) -> Vocabulary:
    """The tokenizer of the corpus alone: from its file, from the cache, or trained once. Raises DataError where that
    needs a text that is not there."""
    if settings.tokenizer is not None:
        return load_vocabulary(settings, None, vocab_size)
    if settings.source.startswith("hf:"):
        return stream_vocabulary(settings, vocab_size)
    return load_vocabulary(settings, open_source(settings), vocab_size)


def open_documents(settings: DataSection) -> tuple[str, Callable[[], Iterator[str]]]:
    """What `data.source` is called, and its documents, from the first one again at each call. Raises DataError."""
    if settings.source.startswith("hf:"):
        return settings.source, lambda: stream_documents(settings)
    source = open_source(settings)
    return source.name, lambda: whole_documents(source.read())
