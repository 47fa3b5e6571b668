"""Texts of any size and shape: bounded memory, time in proportion, progress, a disk that fills."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from thinpipe.node.data import DataError, cache, pieces, readers, silently, tokens
from thinpipe.node.data.documents import Source, is_heldout
from thinpipe.node.data.preparing import Found
from thinpipe.node.data.vocabulary import read_vocabulary
from thinpipe.sim.reports.preparation_console import EVERY_S, PreparationDisplay

from .corpora import byte_level, fault, open_it, save, settings, texts, the_tokenizer, write_jsonl

# --- runs without a space, from which a tokenizer learns ---


def test_ordinary_text_is_not_cut():
    for text in ("", "a", "some words\n" * 9000, "x" * pieces.RUN_CHARACTERS, " " * pieces.RUN_CHARACTERS):
        assert pieces.short_runs(text) == ([text] if text else [])


@pytest.mark.parametrize("around", ["", "before ", "a\n"])
def test_a_run_without_a_space_is_cut_and_nothing_is_lost(around):
    most = pieces.RUN_CHARACTERS
    for run in ("ACGT" * most, " " * (3 * most + 7), "x" * (most + 1), "a" * (2 * most) + " " * (2 * most)):
        found = pieces.short_runs(around + run + around)
        assert "".join(found) == around + run + around
        for piece in found:
            words = piece.split()
            assert not words or max(map(len, words)) <= most
            assert len(piece) - len(piece.lstrip()) <= most
        assert len(found) >= len(run) // most


def test_the_ids_of_a_text_are_the_tokenizers_own(tmp_path):
    vocabulary = read_vocabulary(save(tmp_path / "model", byte_level()))
    docs = [*texts(20), "ACGT" * 5000, " " * 9000 + "x"]
    for ids, text in zip(vocabulary.encode(docs), docs, strict=True):
        own = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids.tolist() == [*own, vocabulary.end_id]


def test_letters_on_one_line_are_prepared_in_seconds(tmp_path):
    path = tmp_path / "dna.txt"
    path.write_text("".join(random.Random(1).choices("ACGT", k=400_000)))
    began = time.process_time()
    corpus = open_it(tmp_path, path, vocab_size=1024)
    assert time.process_time() - began < 10  # a minute where the line is one word
    assert corpus.found
    assert corpus.found.characters == 400_000
    ids = [np.load(next((tmp_path / "cache").glob(f"*-{part}.npy"))) for part in ("train", "heldout")]
    assert the_tokenizer(tmp_path / "cache").decode(np.concatenate(ids).tolist()) == path.read_text()


# --- size ---


def test_a_document_in_many_parts_is_one(tmp_path, monkeypatch):
    """As one file that is read in parts, as one row, and cut anywhere: the same ids, counts and held-out share."""
    docs = ["".join(texts(40)), *texts(30)]
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 3000)
    vocabulary = read_vocabulary(save(tmp_path / "model", byte_level()))
    found = []
    for number, characters in enumerate((2**20, 4000, 100)):
        source = Source(
            name="docs",
            digest=str(number),
            size_bytes=1,
            read=lambda characters=characters: (
                readers.Part(piece, last, 1) for text in docs for piece, last in pieces.pieces(text, characters)
            ),
        )
        found.append(tokens.tokenize_once(source, vocabulary, tmp_path / "cache", silently))
    for train, heldout, counted, _ in found:
        assert counted.documents == 31
        assert counted.heldout_documents in (0, sum(map(is_heldout, docs)))
        assert counted.characters == sum(map(len, docs))
        assert counted.tokens == len(train) + len(heldout)
        ends = int((np.concatenate([train, heldout]) == vocabulary.end_id).sum())
        assert ends == 31


PEAK = """
import resource, sys
from thinpipe.node.config_sections import DataSection
from thinpipe.node.data import open_corpus

section = DataSection(source=sys.argv[1], cache=sys.argv[2], tokenizer=sys.argv[3], sequence_length=16)
open_corpus(section, vocab_size=300, seed=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_document(tmp_path):
    """Of 4 and of 20 MB on few lines: the peak of a process of its own."""
    folder = save(tmp_path / "model", byte_level())
    line = " ".join(texts(60)).replace("\n", " ")
    peaks = []
    for megabytes in (4, 20):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("\n".join([line] * (megabytes * 10**6 // len(line))))
        command = [sys.executable, "-c", PEAK, path, tmp_path / "cache", folder]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks  # MiB


# --- progress ---


def test_what_takes_time_is_told(tmp_path):
    told: list[tuple[str, int, int]] = []
    path = write_jsonl(tmp_path / "rows.jsonl", texts())
    from thinpipe.node.data import open_corpus

    section = settings(tmp_path, path)
    open_corpus(section, vocab_size=300, seed=1, report=lambda *each: told.append(each))
    size = path.stat().st_size
    assert [what for what, *_ in told if what != told[1][0]] == [
        "reading the files",
        "training the tokenizer",
        "tokenising",
    ]
    assert told[-1] == ("tokenising", size, size)
    told.clear()
    open_corpus(section, vocab_size=300, seed=1, report=lambda *each: told.append(each))
    assert [what for what, *_ in told] == ["reading the files"]


def lines_of(display_for_s: list[float], total: int) -> list[str]:
    """What a log gets of a text that is tokenised, with a report at each of these times."""
    now = 0.0
    console = Console(width=40, force_terminal=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, PreparationDisplay(console, "a/[b]/c.txt", clock=lambda: now) as display:
        for number, now in enumerate(display_for_s, start=1):  # noqa: B007 (the clock)
            display.report("tokenising", number * 10**6, total)
    return console.export_text().splitlines()


def test_a_log_gets_a_line_now_and_then():
    assert lines_of([0.1, 3.0, 9.9], total=10**7) == []
    times = [float(second) for second in range(1, 36)]
    assert lines_of(times, total=50 * 10**6) == [
        f"preparing a/[b]/c.txt: tokenising, {share}" for share in ("20%", "40%", "60%")
    ]
    assert lines_of([EVERY_S], total=0) == ["preparing a/[b]/c.txt: tokenising, 1.0 million characters"]


def test_a_terminal_gets_a_bar():
    console = Console(width=100, force_terminal=True, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, PreparationDisplay(console, "a/[b]/c.txt") as display:
        display.report("tokenising", 30, 120)
        assert display._progress
        display._progress.refresh()
    assert "preparing a/[b]/c.txt: tokenising" in (text := console.export_text())
    assert "25%" in text


# --- a disk that fills ---


class SmallDisk:
    """The most that a file of this process may hold; more is an error of writing, as on a full disk."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.mark.parametrize("size", [20_000, 5_000])
def test_tokens_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path, size):
    folder = save(tmp_path / "model", byte_level())
    path = write_jsonl(tmp_path / "rows.jsonl", texts(400))
    with SmallDisk(size):
        said = fault(tmp_path, path, tokenizer=folder)
    assert said.startswith(f"cannot write to the cache directory {tmp_path / 'cache'}: File too large; ")
    assert not [left for left in (tmp_path / "cache").iterdir() if left.suffix != ".lock"]
    open_it(tmp_path, path, tokenizer=folder)


def test_a_full_disk_is_told_with_its_remedy(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "write_tokens", full)
    said = fault(tmp_path, write_jsonl(tmp_path / "rows.jsonl", texts()))
    assert said == (
        f"cannot write to the cache directory {tmp_path / 'cache'}: No space left on device; make room, or set "
        "data.cache or THINPIPE_CACHE to a directory that has some"
    )


def test_the_next_build_removes_what_a_dead_one_left(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    # of another corpus, by a process that was killed
    left = directory / "tokens-0123-train.npy.1-999999-0a0b0c0d.aside"
    left.write_bytes(b"half of it")
    alive = directory / "tokens-4567-train.npy.0-999999-0a0b0c0d.aside"
    alive.write_bytes(b"half so far")
    with cache._locked(directory / "tokens-4567-train.npy.lock") as locked:
        assert locked
        cache.build_once([directory / "new.json"], Path.exists, lambda paths: [path.touch() for path in paths] and None)
        assert not left.exists()
        assert alive.exists()
    cache.sweep(directory)
    assert not alive.exists()


# --- what was found ---


def test_a_run_knows_what_its_text_holds(tmp_path):
    docs = texts()
    corpus = open_it(tmp_path, write_jsonl(tmp_path / "rows.jsonl", docs))
    found = corpus.found
    assert found
    assert (found.documents, found.heldout_documents) == (len(docs), sum(map(is_heldout, docs)))
    assert found.characters == sum(map(len, docs))
    assert found.largest_id < 300
    assert corpus.line == (
        f"{tmp_path / 'rows.jsonl'}: 160 documents, {found.tokens:,} tokens, {found.heldout_tokens:,} of them held "
        "out; documents end with <|endoftext|> (a tokenizer trained on this text)"
    )
    assert corpus.record()["documents"] == 160


@pytest.mark.parametrize("content", ["", "{}", '{"documents": 1}', "[]"])
def test_a_torn_count_is_made_again(tmp_path, content):
    path = write_jsonl(tmp_path / "rows.jsonl", texts())
    found = open_it(tmp_path, path).found
    (counted,) = (tmp_path / "cache").glob("corpus-*.json")
    counted.write_text(content)
    assert open_it(tmp_path, path).found == found == Found.read(counted)


def test_another_error_of_a_build_passes_through(tmp_path):
    def build(_: list[Path]) -> None:
        raise DataError("why")

    with pytest.raises(DataError, match=r"^why$"):
        cache.build_once([tmp_path / "x"], Path.exists, build)
