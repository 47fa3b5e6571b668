"""Any stage may be lost at any frame, as often as one likes: the run ends in the bits of the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults import Drain, During, Frame, Kill, Pause, Phase, Slow, draw
from .faults_reference import FRAMES, SETTINGS, STAGES, STEPS, assert_equal
from .in_memory import Outcome, run_reference

SCHEDULES = 20  # of `make test`
MANY = 300  # of `make test-schedules`


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    return run_reference(tiny(SETTINGS), tmp_path_factory.mktemp("reference"))


def test_undisturbed(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path) -> None:
    ended = run_cluster(tiny(SETTINGS), tmp_path, [], hurry=True)
    assert_equal(ended, undisturbed)
    assert ended.generations == 1
    assert ended.seconds < 1  # nobody waited for anything
    assert not ended.said
    assert FRAMES <= ended.frames <= FRAMES + 100


@pytest.mark.slow
def test_the_same_seed_tells_the_same_story(tiny: TinyConfig, tmp_path: Path) -> None:
    """And another one another: the order of events is the seed's and not the machine's."""
    faults = draw(5, stages=STAGES, steps=STEPS, frames=FRAMES, count=3)
    first, again, other = (
        run_cluster(tiny(SETTINGS), tmp_path / name, faults, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert (first.frames, first.seconds, first.happened) == (again.frames, again.seconds, again.happened)
    assert first.seconds != other.seconds


@pytest.mark.pairwise(3, slow=5)
@pytest.mark.parametrize("frame", range(5, FRAMES, 44))
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_drained_run_goes_on_where_it_ended(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, frame: int, stage: int
) -> None:
    """All end after the same step, whoever asked and whenever; the rest is done later, by other processes."""
    config = tiny(SETTINGS | {"checkpoint.every": 4})  # so that the last step is seldom one that is written anyway
    first = run_cluster(config, tmp_path, [Drain(at=Frame(number=frame), stage=stage)])
    done = {len(losses) for losses in first.losses}
    assert len(done) == 1
    assert done.pop() <= STEPS
    assert_equal(run_cluster(config, tmp_path, [], resume=True), undisturbed)


def test_a_finished_run_can_be_resumed_and_has_nothing_to_do(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    run_cluster(tiny(SETTINGS), tmp_path, [])
    ended = run_cluster(tiny(SETTINGS), tmp_path, [], resume=True)
    assert_equal(ended, undisturbed)
    assert ended.generations == 2


def test_without_checkpoints_a_loss_begins_the_run_again(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    config = tiny(SETTINGS | {"checkpoint.every": 0})
    ended = run_cluster(config, tmp_path, [Kill(at=Frame(number=FRAMES // 2), stage=1)])
    assert_equal(ended, undisturbed)
    assert [rollback["completed"] for rollback in ended.rollbacks] == [0]


def story(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, seed: int) -> None:
    """Three faults of any kind at any moment. One that is due when all is over, or of a stage that is away, is
    spared."""
    faults = draw(seed, stages=STAGES, steps=STEPS, frames=FRAMES, count=3)
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults, seed=seed)
    assert_equal(ended, undisturbed)
    lost = [fault for fault in ended.happened if isinstance(fault, Kill)]
    assert ended.generations >= 1 + bool(lost)
    certain = [fault for fault in faults if isinstance(fault.at, Frame) and fault.at.number < FRAMES // 2]
    assert ended.happened or not certain


@pytest.mark.pairwise(3, slow=6)
@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_schedules_at_random(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, seed: int) -> None:
    story(tiny, undisturbed, tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SCHEDULES, SCHEDULES + MANY))
def test_many_schedules_at_random(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, seed: int) -> None:
    story(tiny, undisturbed, tmp_path, seed)


@pytest.mark.pairwise(3, slow=4)
@pytest.mark.parametrize("later", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("frame", [60, 93, 132])
def test_a_drain_survives_the_loss_of_whoever_knew_of_it(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, frame: int, later: int
) -> None:
    config = tiny(SETTINGS)
    faults = [Drain(at=Frame(number=frame), stage=0), Kill(at=Frame(number=frame + later), stage=0)]
    first = run_cluster(config, tmp_path, list(faults))
    assert first.happened == faults
    assert len({len(losses) for losses in first.losses}) == 1
    assert_equal(run_cluster(config, tmp_path, [], resume=True), undisturbed)


def test_who_sleeps_in_the_middle_of_a_frame_keeps_the_wire_from_nobody(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    """A wire that is slow, a sender that is stopped while a frame of it is under way, and a successor on the same
    wire, for whom the sleeper waits."""
    asleep = During(stage=0, step=4, phase=Phase.CHECKPOINT)
    faults = [
        Slow(at=Frame(number=221), boundary=1, bits_per_s=12_005.2, seconds=20.0),
        Pause(at=asleep, stage=1, seconds=2.0, replaced=True),
    ]
    ended = run_cluster(tiny(SETTINGS), tmp_path, list(faults), seed=65)
    assert_equal(ended, undisturbed)
    assert set(ended.happened) == set(faults)
