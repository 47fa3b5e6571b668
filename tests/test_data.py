"""Where tokens come from: readers, the cached tokenizer and ids, the order of training, the held-out part."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.node.config_sections import DataSection
from thinpipe.node.data import (
    DataError,
    cache,
    documents,
    open_corpus,
    pieces,
    readers,
    silently,
    streamed,
    tokens,
    vocabulary_size,
)
from thinpipe.node.data.corpus import Corpus, LocalCorpus, random_order
from tokenizers import Tokenizer

from .corpora import (
    LENGTH,
    VOCABULARY,
    fault,
    open_it,
    settings,
    texts,
    the_tokenizer,
    write_jsonl,
    write_parquet,
    write_text,
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", texts())


def parts_of(docs: list[str]) -> Callable[[], Iterator[readers.Part]]:
    return lambda: (readers.Part(text, True, 0) for text in docs)


# --- readers ---


def test_all_formats_give_the_same_tokens_for_the_same_documents(tmp_path):
    docs = texts()
    sources = [
        write_text(tmp_path / "texts", docs),
        write_jsonl(tmp_path / "rows.jsonl", docs),
        write_jsonl(tmp_path / "rows.jsonl.gz", docs),
        write_parquet(tmp_path / "rows.parquet", docs),
        write_jsonl(tmp_path / "split" / "a.jsonl", docs[:70]).parent,
    ]
    write_jsonl(tmp_path / "split" / "b.jsonl", docs[70:])
    (tmp_path / "split" / "README").write_text("not data")
    batches, heldouts = [], []
    for source in sources:
        corpus = open_it(tmp_path, source)
        batches.append(corpus.batch(3, 1, microbatches=2, batch_size=64))
        heldouts.append(corpus.heldout_batch(0, 8))
    for batch, heldout in zip(batches[1:], heldouts[1:], strict=True):
        np.testing.assert_array_equal(batch, batches[0])
        np.testing.assert_array_equal(heldout, heldouts[0])


def test_ids_are_the_documents_joined_by_the_end_of_text(tmp_path):
    docs = texts()
    corpus = open_it(tmp_path, write_text(tmp_path / "texts", docs))
    tokenizer = the_tokenizer(tmp_path / "cache")
    end = tokenizer.token_to_id("<|endoftext|>")
    (train,) = (tmp_path / "cache").glob("tokens-*-train.npy")
    (heldout,) = (tmp_path / "cache").glob("tokens-*-heldout.npy")

    def documents_in(path: Path) -> list[str]:
        ids = np.load(path)
        assert ids.dtype == np.uint16
        assert ids[-1] == end
        cuts = np.flatnonzero(ids == end) + 1
        return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in np.split(ids, cuts)[:-1]]

    assert documents_in(train) == [text for text in docs if not documents.is_heldout(text)]
    assert documents_in(heldout) == [text for text in docs if documents.is_heldout(text)]
    assert 0 < len(documents_in(heldout)) < len(docs) / 5
    assert corpus.batch(0, 0, microbatches=1, batch_size=3).max() < VOCABULARY


def test_another_text_field_and_null_rows(tmp_path):
    docs = texts()
    rows = [json.dumps({"body": text}) for text in docs]
    rows.insert(5, json.dumps({"body": None}))
    rows.insert(9, json.dumps({"body": ""}))
    (tmp_path / "holes.jsonl").write_text("\n".join(rows) + "\n")
    whole = open_it(tmp_path, write_jsonl(tmp_path / "whole.jsonl", docs, "body"), text_field="body")
    holes = open_it(tmp_path, tmp_path / "holes.jsonl", text_field="body")
    np.testing.assert_array_equal(
        whole.batch(0, 0, microbatches=1, batch_size=50), holes.batch(0, 0, microbatches=1, batch_size=50)
    )


# --- the embedded default ---


@pytest.mark.slow
def test_stdlib_needs_nothing_and_is_prepared_once(tmp_path, monkeypatch):
    monkeypatch.setenv("THINPIPE_CACHE", str(tmp_path / "from_environment"))
    section = DataSection(sequence_length=128)
    corpus = open_corpus(section, vocab_size=512, seed=1)
    assert isinstance(corpus, LocalCorpus)
    assert corpus.windows * 128 > 1_000_000
    assert corpus.heldout_sequences == 64
    made = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_files(tmp_path)}
    assert len(made) == 4
    batch = corpus.batch(0, 0, microbatches=1, batch_size=8)
    (path,) = (tmp_path / "from_environment").glob("tokenizer-*.json")
    tokenizer = Tokenizer.from_file(str(path))
    decoded = tokenizer.decode_batch(batch.tolist())
    assert any("self" in text or "def " in text for text in decoded)

    again = open_corpus(section, vocab_size=512, seed=1)
    assert again.digest == corpus.digest
    np.testing.assert_array_equal(again.batch(0, 0, microbatches=1, batch_size=8), batch)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_files(tmp_path)} == made


def cache_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "from_environment").iterdir() if path.suffix in (".npy", ".json")]


def test_stdlib_leaves_out_tests_tables_and_what_the_machine_added():
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in documents._stdlib_files()]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "encodings"}
    assert not [name for name in names if "_sysconfigdata" in name]


# --- the order of training ---


def numbered(windows: int, seed: int = 1, length: int = 4) -> LocalCorpus:
    """A corpus whose ids are their own positions, so that a window says where it was cut."""
    return LocalCorpus(
        np.arange(windows * length + 1, dtype=np.uint32),
        np.arange(1_000_000, 1_000_000 + 10 * length + 3, dtype=np.uint32),
        name="numbers",
        digest="0" * 64,
        seed=seed,
        sequence_length=length,
        heldout_sequences=4,
    )


@given(
    windows=st.integers(1, 40),
    microbatches=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_epoch_takes_each_window_exactly_once(windows, microbatches, batch_size, seed):
    corpus = numbered(windows, seed)
    steps = -(-3 * windows // (microbatches * batch_size))
    rows = np.concatenate(
        [
            corpus.batch(step, part, microbatches=microbatches, batch_size=batch_size)
            for step in range(steps)
            for part in range(microbatches)
        ]
    )
    assert rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in range(3):
        starts = rows[epoch * windows : (epoch + 1) * windows, 0]
        assert sorted(starts) == list(range(0, 4 * windows, 4))


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    def epoch_of(corpus: LocalCorpus, number: int) -> list[int]:
        return corpus.batch(number, 0, microbatches=1, batch_size=50)[:, 0].tolist()

    first = epoch_of(numbered(50, seed=1), 0)
    assert first == epoch_of(numbered(50, seed=1), 0)
    assert first != epoch_of(numbered(50, seed=2), 0)
    assert first != epoch_of(numbered(50, seed=1), 1)
    assert first != sorted(first)


def test_order_is_fixed_for_ever():
    # written down once: a run that is resumed under another numpy must see the same order
    assert random_order(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert random_order(8, 2**63 - 1, 5).tolist() == [5, 3, 6, 1, 7, 0, 2, 4]


def test_any_step_can_be_asked_for_in_any_order():
    corpus = numbered(11)
    shape = {"microbatches": 3, "batch_size": 2}
    wanted = [(step, part) for step in range(9) for part in range(3)]
    forward = {key: corpus.batch(*key, **shape) for key in wanted}
    corpus.seek(7)
    assert corpus.position == 7
    for key in reversed(wanted):
        np.testing.assert_array_equal(corpus.batch(*key, **shape), forward[key])
        assert corpus.position == key[0]


def test_a_step_is_the_same_sequences_however_it_is_cut():
    corpus = numbered(23)
    whole = corpus.batch(2, 0, microbatches=1, batch_size=12)
    parts = [corpus.batch(2, part, microbatches=4, batch_size=3) for part in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("step", "part", "batch_size"), [(-1, 0, 1), (0, 2, 1), (0, -1, 1), (0, 0, 0)])
def test_a_batch_that_is_none_is_refused(step, part, batch_size):
    with pytest.raises(ValueError, match="count steps and microbatches from 0"):
        numbered(5).batch(step, part, microbatches=2, batch_size=batch_size)


# --- held out ---


def test_heldout_is_evenly_spaced_and_fixed():
    corpus = numbered(5)
    starts = np.concatenate([corpus.heldout_batch(0, 3), corpus.heldout_batch(1, 3)])[:, 0] - 1_000_000
    assert starts.tolist() == [0, 8, 20, 28]
    assert corpus.heldout_batch(1, 3).shape == (1, 5)
    with pytest.raises(IndexError, match="no held-out batch 2"):
        corpus.heldout_batch(2, 3)


def test_heldout_does_not_depend_on_the_seed_and_never_meets_training(rows, tmp_path):
    one, two = (open_it(tmp_path, rows, seed=seed) for seed in (1, 2))
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.heldout_batch(0, 8), two.heldout_batch(0, 8))
    tokenizer = the_tokenizer(tmp_path / "cache")
    trained = tokenizer.decode(np.concatenate(np.load(next((tmp_path / "cache").glob("*-train.npy")))[None]).tolist())
    titles = [text.splitlines()[0] for text in texts() if documents.is_heldout(text)]
    assert titles
    assert not [title for title in titles if f"{title}\n" in trained]


def test_a_single_file_holds_out_its_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(3000)))
    corpus = open_it(tmp_path, path)
    train, heldout = (np.load(next((tmp_path / "cache").glob(f"*-{part}.npy"))) for part in ("train", "heldout"))
    assert len(heldout) == round(0.05 * (len(train) + len(heldout)))
    tokenizer = the_tokenizer(tmp_path / "cache")
    assert tokenizer.decode([*train, *heldout]) == path.read_text()
    assert corpus.heldout_sequences == 8
    # the last training window ends before the first held-out id
    assert isinstance(corpus, LocalCorpus)
    assert corpus.windows * LENGTH + 1 <= len(train)


def test_heldout_uses_as_many_as_exist(rows, tmp_path):
    corpus = open_it(tmp_path, rows, heldout_sequences=10_000)
    heldout = np.load(next((tmp_path / "cache").glob("*-heldout.npy")))
    assert corpus.heldout_sequences == (len(heldout) - 1) // LENGTH < 10_000


# --- vocabulary ---


def test_vocabulary_size_without_a_file(tmp_path):
    section = settings(tmp_path, "stdlib")
    assert vocabulary_size(section, None) == 4096
    assert vocabulary_size(section, 999) == 999
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=r"model.vocab_size = 256 is too small: a byte-level BPE needs 257"):
        vocabulary_size(section, 256)


def test_a_tokenizer_file_of_the_user(rows, tmp_path):
    open_it(tmp_path, rows)
    path = tmp_path / "mine.json"
    the_tokenizer(tmp_path / "cache").save(str(path))
    section = settings(tmp_path, rows, tokenizer=path)
    assert vocabulary_size(section, None) == VOCABULARY
    assert vocabulary_size(section, 512) == 512
    with pytest.raises(DataError, match=r"model.vocab_size = 299 is too small: the tokenizer .*mine.json needs 300"):
        vocabulary_size(section, 299)
    trained = open_it(tmp_path, rows).batch(0, 0, microbatches=1, batch_size=9)
    given_file = open_corpus(section, vocab_size=512, seed=1).batch(0, 0, microbatches=1, batch_size=9)
    np.testing.assert_array_equal(trained, given_file)


def test_wide_vocabularies_are_stored_in_more_bytes():
    wide = tokens.Vocabulary(tokenizer=Tokenizer.from_str(TINY_TOKENIZER), size=65537, end_id=65536, digest="")
    assert wide.encode(["ab"])[0].tolist() == [0, 1, 65536]
    assert wide.encode(["ab"])[0].dtype == np.uint32


TINY_TOKENIZER = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})


@given(st.text(alphabet="ab\n", max_size=300), st.integers(1, 20))
def test_pieces_of_a_long_document_are_the_document(text, characters):
    found = list(pieces.pieces(text, characters))
    assert "".join(piece for piece, _ in found) == text
    assert all(len(piece) <= 2 * characters for piece, _ in found)
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    in_chunks = [text[start : start + 3] for start in range(0, len(text), 3)]
    assert list(pieces.pieces_of_stream(in_chunks, characters)) == found


def test_the_tokenizer_is_trained_on_all_of_a_source_evenly(monkeypatch):
    docs = [f"{i:04d} " * 2000 for i in range(200)]
    monkeypatch.setattr(tokens, "_SAMPLE_BYTES", 200_000)
    source = documents.Source(name="docs", digest="", size_bytes=200 * 10_000, read=parts_of(docs))
    taken = [int(text[:4]) for text in tokens._sample(source, silently)]
    assert len(taken) == 20
    assert max(taken) >= 180
    assert set(np.diff(taken)) <= {9, 10, 11}
    # of one huge document a part is taken, and its end is not forgotten
    book = "".join(docs)
    one = documents.Source(name="book", digest="", size_bytes=len(book), read=parts_of([book]))
    taken_of_one = list(tokens._sample(one, silently))
    assert 150_000 < sum(map(len, taken_of_one)) < 350_000
    assert int(taken_of_one[-1][:4]) > 150


TRAIN = """
import sys
from pathlib import Path
from thinpipe.node.data import documents, readers, silently as print_nothing, tokens

docs = Path(sys.argv[1]).read_text().split("~")
parts = [readers.Part(text, True, 0) for text in docs]
source = documents.Source(name="docs", digest="", size_bytes=len(docs), read=lambda: iter(parts))
tokenizer = tokens._train(source, 1000, print_nothing)
print(tokenizer.to_str(), [encoding.ids for encoding in tokenizer.encode_batch_fast(docs)])
"""


def test_the_tokenizer_does_not_depend_on_the_number_of_cores(tmp_path):
    (tmp_path / "docs").write_text("~".join(texts(800)))
    said = [
        subprocess.run(
            [sys.executable, "-c", TRAIN, tmp_path / "docs"],
            env=os.environ | {"TOKENIZERS_PARALLELISM": parallel},
            check=True,
            capture_output=True,
        ).stdout
        for parallel in ("true", "false")
    ]
    assert len(said[0]) > 100_000
    assert said[0] == said[1]


# --- the cache ---


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("to*.*[ny]")}


def test_the_second_open_builds_nothing(rows, tmp_path):
    first = open_it(tmp_path, rows)
    made = snapshot(tmp_path / "cache")
    assert len(made) == 3
    second = open_it(tmp_path, rows, seed=9, sequence_length=8)
    assert snapshot(tmp_path / "cache") == made
    assert first.digest == second.digest


def test_another_source_or_vocabulary_is_another_entry(rows, tmp_path):
    digests = {open_it(tmp_path, rows).digest, open_it(tmp_path, rows, vocab_size=310).digest}
    write_jsonl(rows, [*texts(), "one more"])
    digests.add(open_it(tmp_path, rows).digest)
    assert len(digests) == 3


@pytest.mark.parametrize("part", ["train.npy", "heldout.npy", "json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "gone"])
def test_a_torn_entry_is_rebuilt(rows, tmp_path, part, damage):
    whole = open_it(tmp_path, rows)
    batch = whole.batch(0, 0, microbatches=1, batch_size=5)
    (path,) = (tmp_path / "cache").glob(f"to*{part}")
    content = path.read_bytes()
    path.unlink()  # the open corpus keeps the old file mapped
    if damage != "gone":
        path.write_bytes({"cut": content[:-7], "longer": content + b"xx", "empty": b""}[damage])
    again = open_it(tmp_path, rows)
    assert path.read_bytes() == content
    np.testing.assert_array_equal(again.batch(0, 0, microbatches=1, batch_size=5), batch)


def test_what_a_dead_builder_left_is_cleaned_and_locks_are_optional(rows, tmp_path, monkeypatch):
    open_it(tmp_path, rows)
    (path,) = (tmp_path / "cache").glob("*-train.npy")
    left = path.with_name(f"{path.name}.1-1-dead.aside")
    for flock in (fcntl.flock, refuse):
        monkeypatch.setattr(cache, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
        path.unlink()
        left.write_bytes(b"half")
        open_it(tmp_path, rows)
        assert path.exists()
        # without a lock it may belong to a builder that lives
        assert left.exists() == (flock is refuse)
    left.unlink()
    assert not list((tmp_path / "cache").glob("*.aside"))


def refuse(*_: object) -> None:
    raise OSError("no locks here")


CONCURRENT = """
import hashlib, sys
import datasets
from thinpipe.node.data import tokens
from thinpipe.node.config_sections import DataSection
from thinpipe.node.data import open_corpus

train = tokens._train
def counted(*arguments):
    print("trained", file=sys.stderr)
    return train(*arguments)
tokens._train = counted

print("ready", flush=True)
sys.stdin.readline()
corpus = open_corpus(DataSection(source=sys.argv[1], cache=sys.argv[2], sequence_length=16), vocab_size=2000, seed=1)
batch = corpus.batch(0, 0, microbatches=1, batch_size=200)
print(corpus.digest, hashlib.sha256(batch.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", texts(3000))
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT, source, tmp_path / "cache"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home")},
        )
        for _ in range(2)
    ]
    try:
        for builder in builders:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "ready\n"
        for builder in builders:
            assert builder.stdin is not None
            builder.stdin.write("go\n")
            builder.stdin.flush()
        said = [builder.communicate(timeout=120) for builder in builders]
    finally:
        for builder in builders:
            builder.kill()
            builder.communicate()  # also closes its pipes
    assert [builder.returncode for builder in builders] == [0, 0], said
    assert said[0][0] == said[1][0]
    # one worked, the other waited
    assert sum(errors.count("trained") for _, errors in said) == 1
    corpus = open_it(tmp_path, source, vocab_size=2000)
    batch = corpus.batch(0, 0, microbatches=1, batch_size=200)
    assert said[0][0].split() == [corpus.digest, hashlib.sha256(batch.tobytes()).hexdigest()]
    assert not list((tmp_path / "cache").glob("*.aside"))
    # nor does `datasets` write anywhere else
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "home").exists()


# --- streams ---


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of five files, in blocks that are small enough to be many."""
    monkeypatch.setattr(streamed, "_BLOCK_DOCUMENTS", 12)
    docs = texts()
    for k in range(5):
        write_jsonl(tmp_path / "dataset" / f"train-{k}.jsonl", docs[32 * k : 32 * (k + 1)])
    return f"hf:{tmp_path / 'dataset'}"


SHAPE = {"microbatches": 2, "batch_size": 7}


def test_a_stream_trains_on_every_document_but_the_heldout_ones(shards, tmp_path):
    corpus = open_it(tmp_path, shards)
    tokenizer = the_tokenizer(tmp_path / "cache")
    seen = np.concatenate([corpus.batch(step, part, **SHAPE) for step in range(150) for part in range(2)])
    assert isinstance(corpus, streamed.StreamedCorpus)
    epochs = [start.first for start in corpus._starts if start.in_epoch == 0]
    assert len(epochs) > 2
    first_epoch, second_epoch = (seen[a:b] for a, b in itertools.pairwise(epochs[:3]))
    training = {text.splitlines()[0] for text in texts() if not documents.is_heldout(text)}
    heldout = {text.splitlines()[0] for text in texts() if documents.is_heldout(text)}
    for windows in (first_epoch, second_epoch):
        told = tokenizer.decode(windows[:, :-1].ravel().tolist(), skip_special_tokens=False)
        found = {line.strip() for line in told.replace("<|endoftext|>", "\n").splitlines()}
        # a title whose document was cut by the end of a block may lack its beginning
        assert len(found & training) > 0.9 * len(training)
        assert not found & heldout
    # the same windows of a block in another order, so the same count
    assert len(first_epoch) == len(second_epoch)
    assert (first_epoch != second_epoch).any()
    told = tokenizer.decode(corpus.heldout_batch(0, 8).ravel().tolist())
    assert [title for title in heldout if title in told]


def test_seek_in_a_stream_equals_reading_on(shards, tmp_path):
    reading = open_it(tmp_path, shards)
    wanted = [(step, part) for step in range(120) for part in range(2)]
    sequential = {key: reading.batch(*key, **SHAPE) for key in wanted}
    (listed,) = (tmp_path / "cache").glob("blocks-*.jsonl")
    assert len(listed.read_text().splitlines()) > 20
    orders = {"noted": [(97, 1), (3, 0), (119, 1), (50, 0), (50, 1), (0, 0)], "unknown": [(97, 1), (3, 0), (60, 1)]}
    for known, keys in orders.items():
        if known == "unknown":
            listed.unlink()
        for key in keys:
            corpus = open_it(tmp_path, shards)
            corpus.seek(key[0])
            np.testing.assert_array_equal(corpus.batch(*key, **SHAPE), sequential[key])
        corpus = open_it(tmp_path, shards)
        for key in keys:  # to and fro in one process
            np.testing.assert_array_equal(corpus.batch(*key, **SHAPE), sequential[key])


def test_every_block_can_be_resumed(shards, tmp_path):
    reading = open_it(tmp_path, shards)
    sequential = np.concatenate([reading.batch(step, 0, microbatches=1, batch_size=16) for step in range(90)])
    assert isinstance(reading, streamed.StreamedCorpus)
    for start in reading._starts[:-1]:
        if start.first < len(sequential):
            corpus = open_it(tmp_path, shards)
            found = corpus.batch(start.first, 0, microbatches=1, batch_size=1)
            np.testing.assert_array_equal(found[0], sequential[start.first])


def read_ahead(corpus: Corpus, step: int) -> np.ndarray:
    """A batch, once the block after it is read and noted, too."""
    assert isinstance(corpus, streamed.StreamedCorpus)
    ids_BS = corpus.batch(step, 0, **SHAPE)
    assert corpus._ahead
    corpus._ahead[1].result(timeout=60)
    return ids_BS


def test_a_stream_winds_from_its_beginning_where_the_list_is_odd(shards, tmp_path):
    expected = read_ahead(open_it(tmp_path, shards), 40)
    (listed,) = (tmp_path / "cache").glob("blocks-*.jsonl")
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join([*lines[:2], lines[1], '{"block": 3, "fir\n', "[]\n", *lines[4:]]))
    np.testing.assert_array_equal(read_ahead(open_it(tmp_path, shards), 40), expected)
    # the gap was filled behind the torn line
    known = [
        json.loads(line)["block"]
        for line in listed.read_text().splitlines()
        if line.startswith('{"block": ') and line.endswith("}")
    ]
    assert set(known) == set(range(1, len(lines) + 1))


def test_the_order_of_a_stream_depends_on_the_seed_and_its_heldout_part_does_not(shards, tmp_path):
    one, same, two = (open_it(tmp_path, shards, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.batch(0, 0, **SHAPE), same.batch(0, 0, **SHAPE))
    assert (one.batch(0, 0, **SHAPE) != two.batch(0, 0, **SHAPE)).any()
    np.testing.assert_array_equal(one.heldout_batch(0, 8), two.heldout_batch(0, 8))
    assert one.digest == two.digest


def test_a_stream_that_ends_with_a_block(tmp_path, monkeypatch):
    docs = [text for text in texts() if not documents.is_heldout(text)][:24]
    docs.append(next(text for text in texts() if documents.is_heldout(text)))
    monkeypatch.setattr(streamed, "_BLOCK_DOCUMENTS", 12)
    write_jsonl(tmp_path / "dataset" / "train.jsonl", docs[-1:] + docs[:-1])
    source = f"hf:{tmp_path / 'dataset'}"
    reading = open_it(tmp_path, source)
    sequential = np.concatenate([reading.batch(step, 0, microbatches=1, batch_size=16) for step in range(40)])
    resumed = open_it(tmp_path, source)
    for step in range(39, -1, -3):
        np.testing.assert_array_equal(
            resumed.batch(step, 0, microbatches=1, batch_size=16), sequential[16 * step : 16 * step + 16]
        )


# --- errors ---


def test_error_missing_file(tmp_path):
    said = fault(tmp_path, tmp_path / "nowhere.jsonl")
    assert said.startswith(f"no such file or directory: {tmp_path / 'nowhere.jsonl'}; set data.source")


def test_error_directories_without_data(tmp_path):
    (tmp_path / "void").mkdir()
    assert "holds no files" in fault(tmp_path, tmp_path / "void")
    write_jsonl(tmp_path / "void" / "a.jsonl", ["x"])
    assert "holds no parquet files, only jsonl; change data.format" in fault(
        tmp_path, tmp_path / "void", format="parquet"
    )
    write_parquet(tmp_path / "void" / "a.parquet", ["x"])
    assert "holds both jsonl and parquet files; choose one with data.format" in fault(tmp_path, tmp_path / "void")


def test_error_empty_corpus(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert (
        fault(tmp_path, tmp_path / "empty.txt")
        == f"{tmp_path / 'empty.txt'} holds no text at all; set data.source to some"
    )
    assert "holds no text at all" in fault(tmp_path, write_jsonl(tmp_path / "void.jsonl", ["", ""]))


def test_error_fewer_tokens_than_a_window(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    said = fault(tmp_path, tmp_path / "short.txt")
    assert f"{tmp_path / 'short.txt'} gives" in said
    assert "one sequence needs 17; give more text or lower data.sequence_length" in said
    (tmp_path / "short.txt").write_text("".join(map(str, range(60))))
    said = fault(tmp_path, tmp_path / "short.txt")
    assert said.startswith(f"the held-out part of {tmp_path / 'short.txt'} has")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_error_missing_field(tmp_path, write):
    path = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}", texts(9), "body")
    assert fault(tmp_path, path) == f"no field 'text' in {path}, only body, id; set data.text_field"
    streamed_from = write(tmp_path / "set" / f"train{path.suffix}", texts(9), "body")
    assert fault(tmp_path, f"hf:{streamed_from.parent}") == fault(tmp_path, path).replace(str(path), str(streamed_from))


def test_error_field_that_is_not_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", texts(9))
    assert f"{path} line 1 holds" in fault(tmp_path, path, text_field="id")
    assert "holds int, not text, in 'id'; set data.text_field" in fault(tmp_path, path, text_field="id")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "is not valid JSON: Unterminated string"),
        ("[1, 2]", "is list, not an object"),
        ("plain words", "is not valid JSON"),
    ],
)
def test_error_malformed_jsonl_line(tmp_path, line, said, capfd):
    path = write_jsonl(tmp_path / "rows.jsonl", texts(20))
    lines = path.read_text().splitlines()
    lines[12] = line
    path.write_text("\n".join(lines) + "\n")
    assert f"{path} line 13 {said}" in fault(tmp_path, path)
    assert capfd.readouterr() == ("", "")


def test_error_text_that_is_not_utf8(tmp_path):
    folder = write_text(tmp_path / "texts", texts(4))
    (folder / "odd.txt").write_bytes(b"fine so far\n\xff\xfe")
    assert f"{folder / 'odd.txt'} is not UTF-8 text" in fault(tmp_path, folder)


def test_error_file_that_is_not_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_text("no columns here")
    assert f"{tmp_path / 'rows.parquet'} is not a parquet file" in fault(tmp_path, tmp_path / "rows.parquet")


def test_error_tokenizer(rows, tmp_path):
    path = tmp_path / "tokenizer.json"
    assert f"cannot read the tokenizer {path}: No such file" in fault(tmp_path, rows, tokenizer=path)
    path.write_text("{}")
    assert f"{path} is not a tokenizer.json" in fault(tmp_path, rows, tokenizer=path)
    path.write_text(TINY_TOKENIZER)
    assert f"the tokenizer {path} has no end-of-text token" in fault(tmp_path, rows, tokenizer=path)


def test_error_vocabulary_too_small_for_a_corpus(rows, tmp_path):
    assert "model.vocab_size = 100 is too small" in fault(tmp_path, rows, vocab_size=100)


def test_error_cache_that_cannot_be_written(rows, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for source in (rows, f"hf:{write_jsonl(tmp_path / 'set' / 'train.jsonl', texts()).parent}"):
        said = fault(tmp_path, source, cache=tmp_path / "file" / "cache")
        assert said.startswith(
            f"cannot write to the cache directory {tmp_path / 'file' / 'cache'}: Not a directory; set"
        )


def test_error_stream_without_enough(tmp_path):
    source = f"hf:{write_jsonl(tmp_path / 'set' / 'train.jsonl', ['one', 'two']).parent}"
    assert "the held-out part of hf:" in fault(tmp_path, source)


def test_error_dataset_without_a_training_split(tmp_path):
    source = f"hf:{write_jsonl(tmp_path / 'set' / 'test.jsonl', texts(9)).parent}"
    assert fault(tmp_path, source) == f"{source} has no split 'train', only test; choose another dataset"


def test_error_malformed_line_in_a_stream(tmp_path):
    path = write_jsonl(tmp_path / "set" / "train.jsonl", texts())
    path.write_text(path.read_text() + "{broken\n")
    assert fault(tmp_path, f"hf:{path.parent}").startswith(f"{path} line 161 is not valid JSON")


def test_a_failed_build_leaves_nothing_that_looks_whole(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", texts(20))
    whole = path.read_text()
    path.write_text(whole + "{broken\n")
    fault(tmp_path, path)
    assert not [left for left in (tmp_path / "cache").iterdir() if left.suffix in (".npy", ".json", ".aside")]
