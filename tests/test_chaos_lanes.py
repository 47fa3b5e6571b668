"""`thinpipe chaos` over several lanes, as real processes: whatever happens to them, one process makes the same of the
log of who took part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .preloaded import start

SMALL = {
    "model.width": 64,
    "model.layers": 2,
    "model.vocab_size": 512,
    "pipeline.batch_size": 4,
    "pipeline.microbatches": 2,
    "data.heldout_sequences": 4,
    "lanes.round_timeout_s": 2,
}
END_S = 280.0


def chaos(out: Path, *options: str) -> dict[str, Any]:
    """chaos.json of a run that came through."""
    settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    told, words = out / "told", out / "words"
    with told.open("w") as stdout, words.open("w") as stderr:
        process = start(["chaos", "--json", "--out", str(out), *settings, *options], stdout, stderr)
    assert process.wait(END_S) == 0, words.read_text()
    assert json.loads(told.read_text()) == json.loads((out / "chaos.json").read_text())
    return json.loads(told.read_text())


def check(found: dict[str, Any], faults: int) -> None:
    assert sum(found["faults"].values()) == len(found["injected"]) == faults
    assert found["recomputed"]["equal"]
    for lane in found["recomputed"]["lanes"]:
        assert lane["ended"] or lane["lane"] in found["away_at_the_end"]
        assert all(lane["states_equal"])


@pytest.mark.slow
def test_lanes_are_lost_cut_off_and_come_back(tmp_path: Path) -> None:
    found = chaos(
        tmp_path, *("--lanes", "3", "--stages", "2", "--steps", "120", "--kills", "5", "--seed", "3"),
        *("--kinds", "kill,cut,lane,lateral,outage"),
    )  # fmt: skip
    check(found, 5)
    assert any(len(each["members"]) < 3 for each in found["recomputed"]["members"])


@pytest.mark.slow
def test_a_group_of_chunks_goes_back_together(tmp_path: Path) -> None:
    found = chaos(
        tmp_path, *("--chunks", "2", "--stages", "2", "--steps", "60", "--kills", "4"),
        *("--kinds", "kill,twice,cut,lateral"),
    )  # fmt: skip
    check(found, 4)
    assert not found["away_at_the_end"]


@pytest.mark.long
def test_two_lanes_of_one_stage(tmp_path: Path) -> None:
    found = chaos(
        tmp_path, *("--lanes", "2", "--stages", "1", "--steps", "300", "--kills", "6"),
        *("--kinds", "twice,lane,lateral,outage"),
    )  # fmt: skip
    check(found, 6)
