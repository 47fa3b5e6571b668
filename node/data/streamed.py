"""A Hugging Face dataset, read over the network as it is needed, in an order that can be found again.

What: `hf:NAME` or `hf:NAME:CONFIG` (NAME may be a local directory that `datasets` can load). Training documents of the
split `train` are taken in blocks of up to 1,024; a block is shuffled under the key (seed, block), joined, and cut into
windows. Held out are the first documents whose content hashes below the share, and they are never trained on.

How: a block is a unit that can be re-read alone: it starts at a known state of the dataset (file and row, as
`IterableDataset.state_dict` gives it), carries no ids over to the next, and the number of its windows does not depend
on its order. Where each block starts is kept beside the tokenizer in the cache, so that a restart opens the right file
at the right row; without that list the stream is wound forward from its beginning, to the same tokens.

Why not the dataset's own `shuffle(buffer_size=...)`? Its buffer is not part of its state: after a resume it is filled
anew, and the run sees other tokens than the one that never stopped. The price of blocks is that documents mix within a
block only, and that up to T ids at each block's end are not used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataSection
from .cache import build_once, cache_directory, content_key, make_directory
from .corpus import Corpus, random_order
from .documents import DataError, Source, files_digest, first_line, is_heldout, quiet_datasets, text_of
from .known_ids import known_ids
from .tokens import (
    Vocabulary,
    batches_of_texts,
    is_whole_array,
    load_vocabulary,
    map_tokens,
    write_tokens,
)

_BLOCK_DOCUMENTS = 1024
_BLOCK_CHARACTERS = 16 * 2**20
_SAMPLE_CHARACTERS = 12 * 2**20  # what the BPE may read of a stream that has no known size


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockStart:
    """Where a block begins: the number of windows before it, those of them in its epoch, and the dataset's state."""

    first: int
    in_epoch: int
    state: dict[str, Any] | None  # None: the beginning of the dataset


def open_stream(settings: DataSection, *, vocab_size: int, seed: int, tokenizer: Path | None = None) -> Corpus:
    """Open `hf:NAME`; `tokenizer` as in `open_corpus`. Raises DataError when it cannot be reached, has no `train` split
    or no such field."""
    stream, source, version = _opened(settings)
    vocabulary = load_vocabulary(settings, source, vocab_size, tokenizer)
    digest = content_key("streamed tokens", vocabulary.digest, source.digest)
    directory = cache_directory(settings)
    corpus = StreamedCorpus(
        stream, vocabulary, settings, digest=digest, seed=seed, directory=directory, version=version
    )
    corpus.known = known_ids(vocabulary.tokenizer, vocabulary.size, vocabulary.end_id, vocab_size)
    return corpus


def stream_vocabulary(settings: DataSection, vocab_size: int) -> Vocabulary:
    """The tokenizer of `hf:NAME`. Raises DataError as `open_stream` does."""
    return load_vocabulary(settings, _opened(settings)[1], vocab_size)


def stream_documents(settings: DataSection) -> Iterator[str]:
    """All documents of such a dataset, in its order. Raises DataError, as `open_stream` does."""
    stream = _opened(settings)[0]
    stream.rewind(None)
    while (text := stream.next()) is not None:
        if text:
            yield text


def _opened(settings: DataSection) -> tuple[_Documents, Source, str]:
    """The documents, what they are for the tokenizer, and the version of the library that reads them."""
    directory = cache_directory(settings)
    name, _, config = settings.source.removeprefix("hf:").partition(":")
    local = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) and not local.is_dir():
        raise DataError(f"there is no directory {local}; set data.source to a dataset's directory, or hf:NAME of a hub")
    make_directory(directory)  # else `datasets` reports it, as a fault of the dataset
    with _reported(settings.source), quiet_datasets() as datasets:
        builder = datasets.load_dataset_builder(
            str(local) if local.is_dir() else name, config or None, cache_dir=str(directory / "datasets")
        )
        splits = list(builder.info.splits or {}) or list(builder.config.data_files or {})
        version = datasets.__version__
    if splits and "train" not in splits:
        raise DataError(
            f"{settings.source} has no split 'train', only {', '.join(map(str, splits))}; choose another dataset"
        )
    if local.is_dir():
        revision = files_digest(sorted(path for path in local.rglob("*") if path.is_file()))
    else:
        revision = str(builder.hash)  # the commit
    stream = _Documents(lambda: builder.as_streaming_dataset(split="train"), settings.text_field, settings.source)
    where = "local" if local.is_dir() else name
    source = Source(
        name=settings.source,
        digest=content_key("stream", where, config, revision, settings.text_field),
        size_bytes=0,
        read=lambda: stream.sample(_SAMPLE_CHARACTERS),
    )
    return stream, source, version


@contextlib.contextmanager
def _reported(source: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # network, hub, file and parser faults have no common ancestor
        local = Path(source.removeprefix("hf:").partition(":")[0]).expanduser().is_dir()
        remedy = "check the files there" if local else "check its name, the network"
        raise DataError(
            f"cannot read the dataset {source}: {first_line(error)}; {remedy} and data.text_field"
        ) from None


class _Documents:
    """The texts of a streamed dataset from any state that it was in. Raises DataError for faults of any kind."""

    def __init__(self, open_dataset: Callable[[], Any], field: str, source: str):
        self._open = open_dataset
        self._field = field
        self.source = source
        self._dataset: Any = None
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._number = 0

    def rewind(self, state: dict[str, Any] | None) -> None:
        with _reported(self.source), quiet_datasets():
            self._dataset = self._open()
            if state is not None:
                self._dataset.load_state_dict(state)
            self._rows = iter(self._dataset)
            self._number = 0

    def state(self) -> dict[str, Any]:
        return self._dataset.state_dict()

    def next(self) -> str | None:
        """The next document, '' for an empty one, None at the end."""
        with _reported(self.source):
            record = next(self._rows, None)
            self._number += 1
            return None if record is None else text_of(record, self._field, self._number, self.source)

    def sample(self, characters: int) -> Iterator[str]:
        """Documents from the beginning until that many characters were given."""
        self.rewind(None)
        while characters > 0 and (text := self.next()) is not None:
            if text:
                characters -= len(text)
                yield text


class StreamedCorpus(Corpus):
    """Windows of a stream. One block is in memory; asking for an earlier or later one reads from its start."""

    def __init__(
        self,
        documents: _Documents,
        vocabulary: Vocabulary,
        settings: DataSection,
        *,
        digest: str,
        seed: int,
        directory: Path,
        version: str,
    ):
        length = settings.sequence_length
        wanted = settings.heldout_sequences * length + 1
        path = directory / f"heldout-{content_key(digest, wanted)[:32]}.npy"

        def build(asides: list[Path]) -> None:
            ids = _read_heldout(documents, vocabulary, wanted)
            write_tokens(asides[0], [ids], length=len(ids), dtype=vocabulary.dtype)

        build_once([path], is_whole_array, build)
        super().__init__(
            map_tokens(path),
            name=f"{documents.source} (the documents that hash below the held-out share)",
            digest=digest,
            tokenizer_json=vocabulary.content,
            sequence_length=length,
            heldout_sequences=settings.heldout_sequences,
        )
        self._documents = documents
        self._vocabulary = vocabulary
        self._seed = seed
        # the state's layout belongs to the version of `datasets` that wrote it
        key = content_key("blocks", digest, length, version, _BLOCK_DOCUMENTS, _BLOCK_CHARACTERS)
        self._list = directory / f"blocks-{key[:32]}.jsonl"
        self._starts = _load_starts(self._list)
        self._reading: int | None = None  # the block that the open stream stands before
        self._block = -1  # the block whose windows are in memory
        self._windows_NT = np.empty((0, length + 1), dtype=np.int32)

    def _sequences(self, first: int, count: int) -> np.ndarray:
        out_BT = np.empty((count, self.sequence_length + 1), dtype=np.int32)
        for row in range(count):
            out_BT[row] = self._window(first + row)
        return out_BT

    def _window(self, number: int) -> np.ndarray:
        if self._block < 0 or not 0 <= number - self._starts[self._block].first < len(self._windows_NT):
            # the last known start at or before the window; from there on blocks are read and their successors noted
            known = [start.first for start in self._starts]
            self._load(int(np.searchsorted(known, number, side="right")) - 1)
            while number >= self._starts[self._block].first + len(self._windows_NT):
                self._load(self._block + 1)
        return self._windows_NT[number - self._starts[self._block].first]

    def _load(self, block: int) -> None:
        start = self._starts[block]
        if self._reading != block:
            self._documents.rewind(start.state)
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
            following = _BlockStart(first=start.first + len(windows), in_epoch=in_epoch, state=self._documents.state())
        self._block, self._windows_NT = block, windows
        self._reading = None if text is None else block + 1
        if block + 1 == len(self._starts):
            self._starts.append(following)
            _save_start(self._list, block + 1, following)

    def _cut(self, texts: list[str]) -> np.ndarray:
        ids = [document for group in batches_of_texts(texts) for document in self._vocabulary.encode(group)]
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=self._vocabulary.dtype)
        length = self.sequence_length
        starts_N1 = np.arange(max(0, (len(tokens) - 1) // length))[:, None] * length
        return tokens[starts_N1 + np.arange(length + 1)].astype(np.int32)


def _read_heldout(documents: _Documents, vocabulary: Vocabulary, wanted: int) -> np.ndarray:
    """The first `wanted` ids of documents that are held out, fewer where the dataset ends before."""
    documents.rewind(None)
    parts, total = [np.empty(0, dtype=vocabulary.dtype)], 0
    while total < wanted and (text := documents.next()) is not None:
        if text and is_heldout(text):
            parts += vocabulary.encode([text])
            total += len(parts[-1])
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
