"""Any stage may be lost at any frame, as often as one likes: the run ends in the bits of the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import Fault, faults_of, run_cluster
from .conftest import TinyConfig
from .in_memory import Outcome, run_reference

MAPL = {"codec.codec": "mapl:r=8,anchors=full,every=2,table=1", "codec.forward": "int4", "codec.backward": "int4"}
SETTINGS = {"pipeline.stages": 3, "pipeline.microbatches": 2, "pipeline.batch_size": 4, "run.steps": 6}
SETTINGS |= {"checkpoint.every": 1, "run.eval_every": 3, **MAPL}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    return run_reference(tiny(SETTINGS), tmp_path_factory.mktemp("reference"))


def assert_equal(ended, undisturbed: Outcome) -> None:
    assert ended.losses == undisturbed.losses, ended.faults
    assert ended.val_losses == [values[-1] for values in undisturbed.val_losses]
    assert ended.state_sha256 == undisturbed.state_sha256, ended.faults


def test_undisturbed(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path) -> None:
    ended = run_cluster(tiny(SETTINGS), tmp_path, [])
    assert_equal(ended, undisturbed)
    assert ended.epochs == 1
    assert ended.seconds < 1  # nobody waited for anything


@pytest.mark.parametrize("frame", range(5, 90, 10))
@pytest.mark.parametrize("stage", range(3))
def test_a_drained_run_goes_on_where_it_ended(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, frame: int, stage: int
) -> None:
    """All end after the same step, whoever asked and whenever; the rest is done later, by other processes."""
    config = tiny(SETTINGS | {"checkpoint.every": 4})  # so that the last step is seldom one that is written anyway
    first = run_cluster(config, tmp_path, [Fault(frame=frame, kind="drain", stage=stage)])
    done = {len(losses) for losses in first.losses}
    assert len(done) == 1
    assert done.pop() <= 6
    assert_equal(run_cluster(config, tmp_path, [], resume=True), undisturbed)


def test_a_finished_run_can_be_resumed_and_has_nothing_to_do(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    run_cluster(tiny(SETTINGS), tmp_path, [])
    ended = run_cluster(tiny(SETTINGS), tmp_path, [], resume=True)
    assert_equal(ended, undisturbed)
    assert ended.epochs == 2


def test_without_checkpoints_a_loss_begins_the_run_again(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    config = tiny(SETTINGS | {"checkpoint.every": 0})
    assert_equal(run_cluster(config, tmp_path, [Fault(frame=60, kind="kill", stage=1)]), undisturbed)


@pytest.mark.parametrize("seed", range(30))
def test_losses_at_any_frame(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, seed: int) -> None:
    faults = faults_of(seed, stages=3, count=3, frames=150)
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults)
    assert_equal(ended, undisturbed)
    kills = [fault for fault in faults if fault.kind != "cut" and fault.frame < 60]  # 92 frames, undisturbed
    assert ended.epochs >= 1 + bool(kills)


@pytest.mark.parametrize("later", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("frame", [20, 31, 44])
def test_a_drain_survives_the_loss_of_whoever_knew_of_it(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, frame: int, later: int
) -> None:
    config = tiny(SETTINGS)
    faults = [Fault(frame=frame, kind="drain", stage=0), Fault(frame=frame + later, kind="kill", stage=0)]
    first = run_cluster(config, tmp_path, faults)
    assert len({len(losses) for losses in first.losses}) == 1
    assert_equal(run_cluster(config, tmp_path, [], resume=True), undisturbed)
