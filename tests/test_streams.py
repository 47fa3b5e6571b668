"""Streamed datasets: through hiccups of their source, one block ahead, and never on the event loop."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.data import DataError, SourceLost, document_streams, readers, streamed
from thinpipe.node.data.batches import draw
from thinpipe.node.data.document_streams import PATIENCE_S, FileDocuments, Patience, PatientDocuments
from thinpipe.node.long_preparation import in_daemon
from thinpipe.node.preparation import BAD_INPUT
from thinpipe.node.stage_failure import FAILED
from thinpipe.protocol.messages import Kind

from .corpora import open_it, texts, write_jsonl

SHAPE = {"microbatches": 2, "batch_size": 7}


class Clock:
    """A pause only moves it."""

    def __init__(self) -> None:
        self.now, self.pauses, self.said = 0.0, list[float](), list[str]()

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def patience(self) -> Patience:
        return Patience("hf:set", clock=lambda: self.now, pause=self.pause, say=self.said.append)


class Flaky:
    """Documents whose source is away for so many calls, before that one."""

    def __init__(self, docs: list[str], away: dict[int, int], error: Exception | None = None) -> None:
        self.source = "hf:set"
        self._docs, self._at, self._calls = docs, 0, 0
        self._away, self._error = away, error or ConnectionResetError(104, "reset by peer")

    def rewind(self, state: dict[str, Any] | None) -> None:
        self._at = state["row"] if state else 0

    def state(self) -> dict[str, Any]:
        return {"row": self._at}

    def next(self) -> str | None:
        if self._away.get(self._at, 0) > 0:
            self._away[self._at] -= 1
            self._at = 10**6  # a broken reader knows nothing any more
            raise self._error
        self._at += 1
        return self._docs[self._at - 1] if self._at <= len(self._docs) else None


def all_of(documents: PatientDocuments, every: int = 5) -> list[str]:
    found: list[str] = []
    documents.rewind(None)
    while (text := documents.next()) is not None:
        found.append(text)
        if len(found) % every == 0:
            documents.state()
    return found


def test_a_source_that_is_away_for_a_moment_is_waited_for():
    docs, clock = [str(i) for i in range(23)], Clock()
    documents = PatientDocuments(Flaky(docs, {0: 1, 3: 2, 7: 1, 10: 3, 22: 1}), clock.patience())
    assert all_of(documents) == docs
    assert clock.pauses == [1, 1, 2, 1, 1, 2, 4, 1]
    assert clock.said[:2] == [
        "hf:set cannot be read for the moment: [Errno 104] reset by peer; trying again for 240 s",
        "hf:set can be read again, after 1 s",
    ]


def test_one_that_stays_away_ends_the_node_so_that_it_is_started_again():
    clock = Clock()
    documents = PatientDocuments(Flaky(["a"], {0: 10**9}), clock.patience())
    documents.rewind(None)
    with pytest.raises(SourceLost, match=r"hf:set could not be read for 240 s: .*reset by peer; go on when it can be"):
        documents.next()
    assert PATIENCE_S <= clock.now < PATIENCE_S + 60
    assert max(clock.pauses) == 30
    assert issubclass(SourceLost, FAILED)  # exit code 1
    assert not issubclass(SourceLost, BAD_INPUT)


class Answer(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (FileNotFoundError(2, "No such file or directory"), True),  # a shard that is away for a moment
        (TimeoutError("timed out"), True),
        (Answer(503), True),
        (Answer(429), True),
        (Answer(404), False),
        (Answer(401), False),
        (PermissionError(13, "Permission denied"), False),
        (ValueError("no such column"), False),
        (DataError("line 3 is not valid JSON"), False),
    ],
    ids=repr,
)
def test_what_may_pass_and_what_stays(error, passes):
    clock = Clock()
    documents = PatientDocuments(Flaky(["a"], {0: 1}, error), clock.patience())
    if passes:
        assert all_of(documents) == ["a"]
        return
    with pytest.raises(DataError) as caught:
        all_of(documents)
    assert str(error).partition("] ")[2] in str(caught.value)
    assert clock.pauses == []


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(streamed, "_BLOCK_DOCUMENTS", 12)
    docs = texts()
    for k in range(5):
        write_jsonl(tmp_path / "dataset" / f"train-{k}.jsonl", docs[32 * k : 32 * (k + 1)])
    return f"hf:{tmp_path / 'dataset'}"


def batches(corpus: Any, steps: int) -> np.ndarray:
    return np.concatenate([corpus.batch(step, part, **SHAPE) for step in range(steps) for part in range(2)])


def test_a_shard_that_goes_and_comes_changes_no_bit(shards, tmp_path, monkeypatch):
    undisturbed = batches(open_it(tmp_path, shards), 200)
    luck, texts_of = random.Random(5), readers.texts_of

    def shaky(*given: Any, **named: Any) -> Any:
        breaks = luck.random() < 0.5
        for number, row in enumerate(texts_of(*given, **named)):
            if breaks and number == 7:
                raise FileNotFoundError(2, "No such file or directory")
            yield row

    monkeypatch.setattr(document_streams, "texts_of", shaky)
    clock = Clock()
    monkeypatch.setattr(streamed, "PatientDocuments", lambda documents: PatientDocuments(documents, clock.patience()))
    np.testing.assert_array_equal(batches(open_it(tmp_path, shards), 200), undisturbed)
    assert clock.pauses


def test_the_next_block_is_read_while_one_is_trained_on(shards, tmp_path):
    corpus = open_it(tmp_path, shards)
    assert isinstance(corpus, streamed.StreamedCorpus)
    corpus.batch(0, 0, microbatches=1, batch_size=1)
    assert corpus._ahead
    block, ahead = corpus._ahead
    assert block == corpus._block + 1
    windows = ahead.result(timeout=30)
    following = corpus._starts[block].first
    np.testing.assert_array_equal(corpus.batch(following, 0, microbatches=1, batch_size=1)[0], windows[0])
    assert corpus._block == block


def test_a_fault_ahead_is_said_when_its_block_is_due(shards, tmp_path):
    corpus = open_it(tmp_path, shards)
    assert isinstance(corpus, streamed.StreamedCorpus)
    first = corpus.batch(0, 0, microbatches=1, batch_size=1)
    assert corpus._ahead
    corpus._ahead[1].exception(timeout=30)
    path = tmp_path / "dataset" / "train-4.jsonl"
    path.write_text("{broken\n")
    np.testing.assert_array_equal(corpus.batch(0, 0, microbatches=1, batch_size=1), first)
    with pytest.raises(DataError, match=r"train-4\.jsonl line 1 is not valid JSON"):
        batches(corpus, 200)


def test_a_source_that_was_away_while_it_was_read_ahead_is_asked_again(shards, tmp_path):
    wanted = batches(open_it(tmp_path, shards), 40)
    corpus = open_it(tmp_path, shards)
    assert isinstance(corpus, streamed.StreamedCorpus)
    corpus.batch(0, 0, microbatches=1, batch_size=1)
    assert corpus._ahead
    block, ahead = corpus._ahead
    ahead.exception(timeout=30)
    gave_up: Future[np.ndarray] = Future()
    gave_up.set_exception(SourceLost("away"))
    corpus._ahead, corpus._reading = (block, gave_up), None
    np.testing.assert_array_equal(batches(corpus, 40), wanted)


def test_two_draws_at_once_give_what_each_gives_alone(shards, tmp_path):
    """A draw that was given up for a rewind may still be under way when the next begins."""
    alone = batches(open_it(tmp_path, shards), 40)
    corpus = open_it(tmp_path, shards)
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: batches(corpus, 40)}), daemon=True)
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in found.values():
        np.testing.assert_array_equal(each, alone)
    assert len(found) == 3


def test_a_draw_that_waits_holds_up_no_event_loop(shards, tmp_path):
    """The loop hears heartbeats meanwhile: here, it is the loop that ends the wait."""
    corpus = open_it(tmp_path, shards)
    assert corpus.draws_slowly
    config = parse_config(
        merge({}, {"data.sequence_length": 16, "pipeline.batch_size": 8, "pipeline.microbatches": 2, "model.layers": 2})
    )
    let_go = threading.Event()
    wait, real = let_go.wait, corpus._sequences

    def slow(first: int, count: int) -> np.ndarray:
        assert wait(30)
        return real(first, count)

    corpus._sequences = slow  # pyright: ignore[reportAttributeAccessIssue]

    async def train() -> np.ndarray:
        drawing = asyncio.create_task(in_daemon(lambda: draw(corpus, config, Kind.ACTIVATION, 0, 1)))
        await asyncio.sleep(0)
        assert not drawing.done()
        let_go.set()
        return await drawing

    ids_BS = asyncio.run(train())
    np.testing.assert_array_equal(ids_BS, corpus.batch(0, 1, microbatches=2, batch_size=4))


def test_a_fault_in_a_thread_reaches_who_waits():
    async def wait() -> None:
        await in_daemon(fail)

    def fail() -> None:
        raise DataError("why")

    with pytest.raises(DataError, match=r"^why$"):
        asyncio.run(wait())


def test_files_are_gone_on_with_at_any_row(shards, tmp_path):
    paths = sorted((tmp_path / "dataset").iterdir())
    whole, states = FileDocuments(paths, "jsonl", "text", shards), []
    whole.rewind(None)
    found: list[str] = []
    while True:
        states.append(whole.state())
        text = whole.next()
        if text is None:
            break
        found.append(text)
    assert found == texts()
    for number, state in reversed(list(enumerate(states))):
        whole.rewind(state)
        assert whole.next() == (found[number] if number < len(found) else None)


def test_what_is_no_jsonl_goes_through_the_library(tmp_path):
    """Other kinds are streamed by `datasets` (text by its lines), and any block of them can be gone back to."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text("\n".join(text.replace("\n", " ") for text in texts()))
    source = f"hf:{tmp_path / 'set'}"
    reading = open_it(tmp_path, source)
    sequential = batches(reading, 20)
    again = open_it(tmp_path, source)
    for step in (17, 3, 19):
        np.testing.assert_array_equal(again.batch(step, 1, **SHAPE), sequential[14 * step + 7 : 14 * step + 14])
