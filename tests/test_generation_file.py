"""The newest generation of a stage, on its disk: what was written is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from thinpipe.node.checkpoints.generation_file import GENERATION
from thinpipe.node.checkpoints.manifest import CheckpointError
from thinpipe.protocol.control_messages import STEP_MAX

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults import Phase, kill
from .faults_reference import SETTINGS, STAGES


def test_what_was_written_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "stage-1"
    assert GENERATION.read(directory) == 0
    for generation in (1, 12, STEP_MAX - 1):
        GENERATION.write(directory, generation)
        assert GENERATION.read(directory) == generation
    assert [path.name for path in directory.iterdir()] == [GENERATION.name]


@pytest.mark.parametrize("text", ["", "seven", "-1", str(STEP_MAX), "1 2", "1.5"])
def test_what_names_no_generation_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / GENERATION.name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{GENERATION.name} names no generation \(.*\); delete it"):
        GENERATION.read(tmp_path)


def test_a_disk_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"generation cannot be written: .*; make room there"):
        GENERATION.write(tmp_path / "file", 1)


def test_no_number_is_used_twice_though_no_checkpoint_has_it(tiny: TinyConfig, tmp_path: Path) -> None:
    """As after two losses with no checkpoint between them, and a power cut."""
    run_cluster(tiny(SETTINGS), tmp_path, [kill(1, 3, Phase.MID_BACKWARD)])
    for stage in range(STAGES):
        directory = tmp_path / "checkpoints" / f"stage-{stage}"
        assert GENERATION.read(directory) == 1
        for manifest in directory.glob("step-*/manifest.json"):
            if json.loads(manifest.read_text())["generation"]:
                shutil.rmtree(manifest.parent)
    ended = run_cluster(tiny(SETTINGS), tmp_path, [], resume=True)
    assert {rollback["generation"] for rollback in ended.rollbacks} == {1, 2}  # both runs' records
