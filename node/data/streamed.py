"""A Hugging Face dataset, read over the network as it is needed, in an order that can be found again.

What: `hf:NAME` or `hf:NAME:CONFIG` (NAME may be a local directory that `datasets` can load). Training documents of the
split `train` are taken in blocks of up to 1,024; a block is shuffled under the key (seed, block), joined, and cut into
windows. Held out are the first documents whose content hashes below the share, and they are never trained on.

How: a block is a unit that can be re-read alone: it starts at a known state of the documents (document_streams.py),
carries no ids over to the next, and the number of its windows does not depend on its order. While one block is trained
on, a thread reads the next. Where each block starts is kept beside the tokenizer in the cache, so that a restart opens
the right file at the right row; without that list the stream is wound forward from its beginning, to the same tokens.

Why not the dataset's own `shuffle(buffer_size=...)`? Its buffer is not part of its state: after a resume it is filled
anew, and the run sees other tokens than the one that never stopped. The price of blocks is that documents mix within a
block only, and that up to T ids at each block's end are not used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config_sections import DataSection
from .cache import build_once, cache_directory, content_key, make_directory
from .corpus import Corpus, random_order
from .document_streams import DatasetDocuments, Documents, FileDocuments, Patience, PatientDocuments, SourceLost
from .documents import Source, files_digest, is_heldout
from .known_ids import known_ids
from .local_files import DataError, expanded, files_below, format_of
from .pieces import pieces
from .preparing import Preparing, silently
from .readers import Part
from .tokens import batches_of_parts, is_whole, load_vocabulary, map_tokens, write_tokens
from .vocabulary import Vocabulary, dropped_line

_BLOCK_DOCUMENTS = 1024
_BLOCK_CHARACTERS = 16 * 2**20
_SAMPLE_CHARACTERS = 12 * 2**20  # what the BPE may read of a stream that has no known size


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockStart:
    """Where a block begins: the number of windows before it, those of them in its epoch, and the dataset's state."""

    first: int
    in_epoch: int
    state: dict[str, Any] | None  # None: the beginning of the dataset


def open_stream(settings: DataSection, *, vocab_size: int, seed: int, report: Preparing) -> Corpus:
    """Open `hf:NAME`. Raises DataError when there is no such dataset, no `train` split or no such field; SourceLost."""
    stream, source, version = _opened(settings, report)
    vocabulary = load_vocabulary(settings, source, vocab_size, report)
    digest = content_key("streamed tokens", vocabulary.digest, source.digest)
    directory = cache_directory(settings)
    corpus = StreamedCorpus(
        stream, vocabulary, settings, digest=digest, seed=seed, directory=directory, version=version, report=report
    )
    corpus.known = known_ids(vocabulary.tokenizer, vocabulary.size, vocabulary.end_id, vocab_size)
    return corpus


def stream_vocabulary(settings: DataSection, vocab_size: int) -> Vocabulary:
    """The tokenizer of `hf:NAME`. Raises DataError as `open_stream` does."""
    return load_vocabulary(settings, _opened(settings, silently)[1], vocab_size)


def stream_documents(settings: DataSection) -> Iterator[str]:
    """All documents of such a dataset, in its order. Raises DataError, as `open_stream` does."""
    stream = _opened(settings, silently)[0]
    stream.rewind(None)
    while (text := stream.next()) is not None:
        if text:
            yield text


def _opened(settings: DataSection, report: Preparing) -> tuple[PatientDocuments, Source, str]:
    """The documents, what they are for the tokenizer, and the version of what reads them."""
    directory = cache_directory(settings)
    name, _, config = settings.source.removeprefix("hf:").partition(":")
    local = expanded(name)
    if name.startswith(("/", "./", "../", "~")) and not local.is_dir():
        raise DataError(f"there is no directory {local}; set data.source to a dataset's directory, or hf:NAME of a hub")
    make_directory(directory)  # else `datasets` reports it, as a fault of the dataset
    report("asking for the dataset", 0, 0)
    datasets = _quiet_datasets()
    builder = Patience(settings.source).do(
        lambda: datasets.load_dataset_builder(
            str(local) if local.is_dir() else name, config or None, cache_dir=str(directory / "datasets")
        )
    )
    files: dict[str, list[str]] = builder.config.data_files or {}
    splits = list(builder.info.splits or {}) or list(files)
    if splits and "train" not in splits:
        raise DataError(
            f"{settings.source} has no split 'train', only {', '.join(map(str, splits))}; choose another dataset"
        )
    kinds = {format_of(Path(each)) for each in files.get("train", [])}
    if local.is_dir() and len(kinds) == 1 and "text" not in kinds:  # rows of files that are here
        paths = [Path(each) for each in files["train"]]
        documents: Documents = FileDocuments(paths, kinds.pop(), settings.text_field, settings.source)
        version = "files"
    else:
        if hasattr(builder.config, "columns"):  # of parquet: the others are not read, nor need they agree
            builder.config.columns = [settings.text_field]
        documents = DatasetDocuments(
            lambda: builder.as_streaming_dataset(split="train"), settings.text_field, settings.source
        )
        version = datasets.__version__
    revision = files_digest(files_below(local)) if local.is_dir() else str(builder.hash)  # the commit
    stream = PatientDocuments(documents)
    where = "local" if local.is_dir() else name
    source = Source(
        name=settings.source,
        digest=content_key("stream", where, config, revision, settings.text_field),
        size_bytes=0,
        read=lambda: _parts(stream.sample(_SAMPLE_CHARACTERS)),
    )
    return stream, source, version


def _quiet_datasets() -> Any:
    """The `datasets` module, without its log lines and bars: faults are reported once, as a DataError. For good, since
    a thread may be reading whenever it would be undone."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def _parts(texts: Iterable[str]) -> Iterator[Part]:
    return (Part(piece, last, 0) for text in texts for piece, last in pieces(text))


class StreamedCorpus(Corpus):
    """Windows of a stream. One block is in memory, and the next is read by a thread; asking for an earlier or later one
    reads from its start. `batch` may wait for the source: do not call it where others would wait too."""

    draws_slowly = True

    def __init__(
        self,
        documents: PatientDocuments,
        vocabulary: Vocabulary,
        settings: DataSection,
        *,
        digest: str,
        seed: int,
        directory: Path,
        version: str,
        report: Preparing,
    ):
        length = settings.sequence_length
        wanted = settings.heldout_sequences * length + 1
        path = directory / f"heldout-{content_key(digest, wanted)[:32]}.npy"
        self._documents = documents
        self._vocabulary = vocabulary
        self._seed = seed
        self._warned = False
        self.line = (
            f"{documents.source}: read as it is needed, so nobody has counted it; documents end with "
            f"{vocabulary.end_token} ({vocabulary.end_said_by})"
        )

        def build(asides: list[Path]) -> None:
            ids = self._read_heldout(wanted, report)
            write_tokens(asides[0], [ids], length=len(ids), dtype=vocabulary.dtype)

        build_once([path], is_whole, build)
        super().__init__(
            map_tokens(path),
            name=f"{documents.source} (the documents that hash below the held-out share)",
            digest=digest,
            sequence_length=length,
            heldout_sequences=settings.heldout_sequences,
        )
        self.tokenizer_files = vocabulary.files()
        # the state's layout belongs to the version of what wrote it
        key = content_key("blocks", digest, length, version, _BLOCK_DOCUMENTS, _BLOCK_CHARACTERS)
        self._list = directory / f"blocks-{key[:32]}.jsonl"
        self._starts = _load_starts(self._list)
        self._reading: int | None = None  # the block that the open stream stands before
        self._block = -1  # the block whose windows are in memory
        self._windows_NT = np.empty((0, length + 1), dtype=np.int32)
        self._ahead: tuple[int, Future[np.ndarray]] | None = None  # the block that a thread reads
        self._loads = threading.Lock()  # one reads at a time

    def _sequences(self, first: int, count: int) -> np.ndarray:
        out_BT = np.empty((count, self.sequence_length + 1), dtype=np.int32)
        for row in range(count):
            out_BT[row] = self._window(first + row)
        return out_BT

    def _window(self, number: int) -> np.ndarray:
        if self._block < 0 or not 0 <= number - self._starts[self._block].first < len(self._windows_NT):
            # the last known start at or before the window; from there on blocks are read and their successors noted
            known = [start.first for start in self._starts]
            self._take(int(np.searchsorted(known, number, side="right")) - 1)
            while number >= self._starts[self._block].first + len(self._windows_NT):
                self._take(self._block + 1)
        return self._windows_NT[number - self._starts[self._block].first]

    def _take(self, block: int) -> None:
        """Have its windows, and begin to read those of the next block."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[1].done() and isinstance(ahead[1].exception(), SourceLost):
            ahead = None  # that was when it was read ahead; it may be back since
        self._windows_NT = ahead[1].result() if ahead and ahead[0] == block else self._load(block)
        self._block = block
        following: Future[np.ndarray] = Future()

        def read() -> None:
            try:
                following.set_result(self._load(block + 1))
            except BaseException as error:  # for whoever asks for the block; perhaps nobody does
                following.set_exception(error)

        self._ahead = block + 1, following
        threading.Thread(target=read, name="read ahead", daemon=True).start()  # it may wait for a network at the end

    def _load(self, block: int) -> np.ndarray:
        """Windows (N, T + 1) of a block whose start is known; notes that of the next."""
        with self._loads:
            start = self._starts[block]
            if self._reading != block:
                self._documents.rewind(start.state)
            self._reading = None
            texts, characters, text = [], 0, ""
            while len(texts) < _BLOCK_DOCUMENTS and characters < _BLOCK_CHARACTERS:
                text = self._documents.next()
                if text is None:
                    break
                if text and not is_heldout(text):
                    texts.append(text)
                    characters += len(text)
            windows = self._cut([texts[place] for place in random_order(len(texts), self._seed, block)])
            in_epoch = start.in_epoch + len(windows)
            if text is None:  # the end of the dataset: the next block starts it again, in another order
                if not in_epoch:
                    raise DataError(
                        f"{self._documents.source} does not give one training sequence of {self.sequence_length + 1} "
                        "tokens; give more text or lower data.sequence_length"
                    )
                following = _BlockStart(first=start.first + len(windows), in_epoch=0, state=None)
            else:
                state = self._documents.state()
                following = _BlockStart(first=start.first + len(windows), in_epoch=in_epoch, state=state)
                self._reading = block + 1
            if block + 1 == len(self._starts):
                self._starts.append(following)
                _save_start(self._list, block + 1, following)
            return windows

    def _cut(self, texts: list[str]) -> np.ndarray:
        ids = self._encode(texts)
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=self._vocabulary.dtype)
        length = self.sequence_length
        starts_N1 = np.arange(max(0, (len(tokens) - 1) // length))[:, None] * length
        return tokens[starts_N1 + np.arange(length + 1)].astype(np.int32)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of the documents, in parts, each document with its end."""
        found, end = [], np.array([self._vocabulary.end_id], dtype=self._vocabulary.dtype)
        for group in batches_of_parts(_parts(texts)):
            for part in group:
                self._warn_of_dropped(part.text)
            for part, ids in zip(group, self._vocabulary.encode_parts([part.text for part in group]), strict=True):
                found += [ids, end] if part.ends else [ids]
        return found

    def _warn_of_dropped(self, text: str) -> None:
        dropped = self._vocabulary.dropped(text, f"a document of {self._documents.source}: {text[:40]!r}")
        if dropped and not self._warned:
            self._warned = True
            line = dropped_line(self._vocabulary.name, dropped, len(text), f"{text[:40]!r}")
            print(f"thinpipe: warning: {line}", file=sys.stderr, flush=True)

    def _read_heldout(self, wanted: int, report: Preparing) -> np.ndarray:
        """The first `wanted` ids of documents that are held out, fewer where the dataset ends before."""
        self._documents.rewind(None)
        parts, total, characters = [np.empty(0, dtype=self._vocabulary.dtype)], 0, 0
        while total < wanted and (text := self._documents.next()) is not None:
            characters += len(text)
            report("looking for held-out documents", characters, 0)
            if text and is_heldout(text):
                ids = self._encode([text])
                parts += ids
                total += sum(map(len, ids))
        return np.concatenate(parts)[:wanted]


def _load_starts(path: Path) -> list[_BlockStart]:
    """The blocks noted by earlier runs: as many as follow each other without a gap. Odd or torn lines are skipped."""
    starts = [_BlockStart(first=0, in_epoch=0, state=None)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return starts
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["block"] == len(starts):  # two runs may both have noted it
                starts.append(_BlockStart(first=int(row["first"]), in_epoch=int(row["in_epoch"]), state=row["state"]))
    return starts


def _save_start(path: Path, block: int, start: _BlockStart) -> None:
    row = {"block": block, "first": start.first, "in_epoch": start.in_epoch, "state": start.state}
    # only a shortcut for the next restart: a full disk must not end a run for it
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
