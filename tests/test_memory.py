"""A stage holds no more after many steps than after a few: nothing of a step stays, and what is free is given back."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node import lifecycle
from thinpipe.node.allocator import give_back_free_memory
from thinpipe.node.metrics import MetricsWriter

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


def test_free_memory_is_given_back_with_each_checkpoint(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(lifecycle, "give_back_free_memory", lambda: asked.append(True))
    monkeypatch.setattr(lifecycle, "TIDY_EVERY", 4)
    for every, times in ((2, 3), (0, 1)):
        asked.clear()
        overrides = {"pipeline.stages": 2, "run.steps": 6, "checkpoint.every": every}
        run_cluster(tiny(overrides), tmp_path / str(every), [])
        assert len(asked) == 2 * times  # of two stages


def test_giving_back_needs_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert give_back_free_memory() in (True, False)
    monkeypatch.setattr("thinpipe.node.allocator._trim", lambda: None)
    assert give_back_free_memory() is False
