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

from ..config import DataSection
from .cache import cache_directory
from .corpus import Corpus, LocalCorpus
from .documents import check_source, open_source
from .local_files import DataError
from .preparing import Preparing, silently
from .stream_documents import SourceLost
from .streamed import open_stream
from .tokens import load_vocabulary, tokenize_once, wanted_vocabulary
from .vocabulary import dropped_line

__all__ = [
    "Corpus",
    "DataError",
    "Preparing",
    "SourceLost",
    "check_source",
    "open_corpus",
    "silently",
    "vocabulary_size",
]


def vocabulary_size(settings: DataSection, wanted: int | None) -> int:
    """Rows of the embedding: `wanted` (model.vocab_size) if given, else the tokenizer file's own size, else 4096.

    Raises DataError when the tokenizer cannot be read or needs more than `wanted`.
    """
    return wanted_vocabulary(settings, wanted)


def open_corpus(settings: DataSection, *, vocab_size: int, seed: int, report: Preparing = silently) -> Corpus:
    """Prepare the corpus (once; then from the cache) and open it. Every id is below `vocab_size`.

    Several processes may call this at once. `report` is told what is being done. Raises DataError, and SourceLost for a
    streamed dataset that stayed away.
    """
    if settings.source.startswith("hf:"):
        return open_stream(settings, vocab_size=vocab_size, seed=seed, report=report)
    directory = cache_directory(settings)
    report("reading the files", 0, 0)
    source = open_source(settings)
    vocabulary = load_vocabulary(settings, source, vocab_size, report)
    train, heldout, found, digest = tokenize_once(source, vocabulary, directory, report)
    corpus = LocalCorpus(
        train,
        heldout,
        name=source.name,
        digest=digest,
        seed=seed,
        sequence_length=settings.sequence_length,
        heldout_sequences=settings.heldout_sequences,
    )
    corpus.found, corpus.line = found, found.line(source.name, vocabulary.end_token, vocabulary.end_said_by)
    dropped = dropped_line(vocabulary.name, found.dropped, found.characters, found.first_dropped)
    corpus.warnings = tuple(filter(None, (source.remark, dropped)))
    return corpus
