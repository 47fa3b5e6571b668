"""A stage holds no more after many steps than after a few: nothing of a step stays, and what is free is given back."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node import recovery_loop
from thinpipe.node.checkpoints import background_writer
from thinpipe.node.free_memory import give_back_free_memory
from thinpipe.node.run_records import MetricsWriter

from .cluster import run_cluster
from .conftest import TinyConfig
from .in_memory import run_in_memory

LOOKS, APART = (6, 14, 22), 8  # after which steps, and how many lie between
LEARNED = {
    "codec.codec": "mapl:r=8,anchors=factorized,table=1",
    "codec.forward": "rvq:groups=2,codes=16",
    "codec.backward": "rvq:groups=2,codes=16",
}


def objects() -> Counter[str]:
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


@pytest.mark.slow
def test_no_object_of_a_step_stays(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object kept a step would be eight more of its type from look to look. What is made once, late, is more at one
    look alone; what is under way at the moment differs by a few."""
    counts: list[Counter[str]] = []
    written = MetricsWriter.write

    def write(self: MetricsWriter, event: str, **fields: Any) -> None:
        written(self, event, **fields)
        if event == "step" and fields["step"] in LOOKS and fields["links"][0]["direction"] == "forward":
            counts.append(objects())

    monkeypatch.setattr(MetricsWriter, "write", write)
    run_in_memory(tiny({**LEARNED, "pipeline.stages": 2, "run.steps": LOOKS[-1] + 1}), tmp_path / "run")
    first, second = (later - earlier for earlier, later in pairwise(counts))
    kept = {name: (first[name], second[name]) for name in first if min(first[name], second[name]) >= APART}
    assert not kept


def test_free_memory_is_given_back_after_each_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even after one that could not be written, on the thread that writes."""
    threads: list[str] = []
    monkeypatch.setattr(
        background_writer, "give_back_free_memory", lambda: threads.append(threading.current_thread().name)
    )

    class Store:
        def write(self, snapshot: int, **_: Any) -> int:
            if snapshot == 2:
                raise OSError("No space left on device")
            return 1

    failed: list[str] = []
    made = background_writer.CheckpointWriter(Store(), on_written=lambda *_: None, on_error=failed.append)  # pyright: ignore[reportArgumentType]
    for snapshot in (1, 2):
        made.submit(snapshot, generation=0)  # pyright: ignore[reportArgumentType]
    made.close()
    assert len(failed) == 2  # the first has no `completed` to report, the second no space
    assert threads == ["checkpoint"] * 2


def test_without_checkpoints_it_is_given_back_now_and_then(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(recovery_loop, "give_back_free_memory", lambda: asked.append(True))
    monkeypatch.setattr(recovery_loop, "TIDY_EVERY", 4)
    run_cluster(tiny({"pipeline.stages": 2, "run.steps": 6, "checkpoint.every": 0}), tmp_path, [])
    assert len(asked) == 2  # of two stages


def test_giving_back_needs_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert give_back_free_memory() in (True, False)
    monkeypatch.setattr("thinpipe.node.free_memory._trim", lambda: None)
    assert give_back_free_memory() is False
