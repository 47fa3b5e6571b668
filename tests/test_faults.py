"""Each fault in each phase: it really happens, it has the consequence that it should have, and the run ends equal.

One process, virtual time (`tests/cluster.py`), MAPL with dictionaries, three stages. The middle one is hit unless the
place is the point. Phases of a rollback have a loss of the head before them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from thinpipe.node.receive_deadline import LEAST_S

from .cluster import Ended, run_cluster
from .conftest import TinyConfig
from .faults import (
    ROLLBACK,
    SENDING,
    TRAINING,
    Corrupt,
    Cut,
    DiskFull,
    During,
    Fault,
    Kill,
    Pause,
    Phase,
    Slow,
    TornCheckpoint,
    corrupt,
    cut,
    disk_full,
    kill,
    pause,
    slow,
    torn_checkpoint,
)
from .faults_reference import SETTINGS, STAGES, assert_equal
from .in_memory import Outcome, run_reference

STEP = 4  # of 6, counted from 0; the projector's table changes before it
LOSS = kill(0, STEP, Phase.MID_BACKWARD)  # that brings about a rollback
SILENCE_S = 8.0  # after which a neighbour is taken for gone, on an uncapped link
SLOW_BITS_PER_S = 2_000.0  # a part of a tensor takes half a second, a step a minute

# Of the middle stage, or of the boundary below it.
FAULTS: list[Callable[[int | None, Phase], Fault]] = [
    lambda step, phase: kill(1, step, phase),
    lambda step, phase: pause(1, step, phase, seconds=2.0),
    lambda step, phase: pause(1, step, phase, seconds=30.0),
    lambda step, phase: pause(1, step, phase, replaced=True),
    lambda step, phase: cut(1, step, phase),
    lambda step, phase: cut(1, step, phase, half=True),
    lambda step, phase: slow(1, step, phase, bits_per_s=SLOW_BITS_PER_S),
    lambda step, phase: corrupt(1, step, phase),
    lambda step, phase: corrupt(1, step, phase, control=True),
    lambda step, phase: torn_checkpoint(1, step, phase),
    lambda step, phase: disk_full(1, step, phase, writes=1),
]
IN_TRAINING = [fault(STEP, phase) for phase in TRAINING for fault in FAULTS]
IN_A_ROLLBACK = [fault(None, phase) for phase in ROLLBACK for fault in FAULTS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    return run_reference(tiny(SETTINGS), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Ended:
    """The swarm without a fault."""
    return run_cluster(tiny(SETTINGS), tmp_path_factory.mktemp("calm"), [])


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Ended:
    """The swarm with the one loss that brings about a rollback."""
    return run_cluster(tiny(SETTINGS), tmp_path_factory.mktemp("rolled back"), [LOSS])


def loses_a_commit(fault: Fault) -> bool:
    """Whether one is under way, and will not arrive: then one more wave is needed, and not more."""
    if not (isinstance(fault.at, During) and fault.at.phase is Phase.COMMIT):
        return False
    long = isinstance(fault, Pause) and fault.seconds > SILENCE_S
    return long or isinstance(fault, Cut) or (isinstance(fault, Corrupt) and fault.control)


def assert_consequence(fault: Fault, ended: Ended, otherwise: Ended) -> None:
    """What the fault has to lead to beside an equal end. otherwise: the same story without it."""
    assert fault in ended.happened
    more_starts = [ours - theirs for ours, theirs in zip(ended.starts, otherwise.starts, strict=True)]
    match fault:
        case Kill(stage=stage) | TornCheckpoint(stage=stage) | Pause(stage=stage, replaced=True):
            assert more_starts == [int(each == stage) for each in range(STAGES)]
            assert ended.generations > 1
        case Pause() | Cut() | Slow() | Corrupt() | DiskFull():  # nothing is lost, not even a step
            assert not any(more_starts)
            assert ended.generations == otherwise.generations + loses_a_commit(fault)
            assert not ended.fenced
    match fault:
        case TornCheckpoint(stage=stage):
            ((torn, step),) = ended.damaged
            assert torn == stage
            assert ended.said_of(f"stage {stage}", "checkpoint", "damaged", f"step-{step:08d}")
            assert ended.rollbacks[-1]["completed"] < step
        case Pause(replaced=True):
            ((sleeper, words),) = ended.fenced
            assert sleeper == fault.stage
            assert "NeighbourMismatch" in words
            assert "replaced" in words
        case Pause():
            assert ended.seconds >= fault.seconds
            assert bool(ended.said_of("silent")) == (fault.seconds > SILENCE_S)
        case Cut():
            assert ended.meetings[fault.boundary] > otherwise.meetings[fault.boundary]
            if otherwise.generations == 1:
                assert ended.connections[fault.boundary] > otherwise.connections[fault.boundary]
            assert ended.said_of("connection-lost")
        case Slow():
            assert ended.seconds > otherwise.seconds + 1
            assert len(ended.said) == len(otherwise.said)
        case Corrupt(control=False):
            assert ended.said_of("corrupt-chunk")
            assert ended.connections[fault.boundary] > otherwise.connections[fault.boundary]
        case Corrupt():
            assert ended.said_of("malformed-frame")
            assert ended.meetings[fault.boundary] > otherwise.meetings[fault.boundary]
        case DiskFull():
            assert len(ended.said_of("No space left on device", f"stage {fault.stage}")) == fault.writes
            written, usual = ended.checkpoints[fault.stage], otherwise.checkpoints[fault.stage]
            assert len(written) == len(usual) - fault.writes
            assert written[-1] == usual[-1]
        case _:
            pass


@pytest.mark.pairwise(4, slow=20)
@pytest.mark.parametrize("fault", IN_TRAINING, ids=str)
def test_in_training(tiny: TinyConfig, undisturbed: Outcome, calm: Ended, tmp_path: Path, fault: Fault) -> None:
    ended = run_cluster(tiny(SETTINGS), tmp_path, [fault])
    assert_equal(ended, undisturbed)
    assert_consequence(fault, ended, calm)


@pytest.mark.pairwise(4, slow=10)
@pytest.mark.parametrize("fault", IN_A_ROLLBACK, ids=str)
def test_in_a_rollback(
    tiny: TinyConfig, undisturbed: Outcome, rolled_back: Ended, tmp_path: Path, fault: Fault
) -> None:
    ended = run_cluster(tiny(SETTINGS), tmp_path, [LOSS, fault])
    assert_equal(ended, undisturbed)
    assert ended.happened == [LOSS, fault]
    assert_consequence(fault, ended, rolled_back)


ENDS = [kill(stage, STEP, phase) for stage in (0, 2) for phase in TRAINING if stage == 0 or phase not in SENDING]
ENDS += [kill(1, STEP, Phase.CHECKPOINT, point=point) for point in (2, 3, 4)]
ENDS += [kill(stage, STEP, Phase.MID_BACKWARD, point=2) for stage in (1, 2)]  # the stage above has half its gradients


@pytest.mark.pairwise(1, slow=6)
@pytest.mark.parametrize("fault", ENDS, ids=str)
def test_head_and_tail_are_killed(
    tiny: TinyConfig, undisturbed: Outcome, calm: Ended, tmp_path: Path, fault: Fault
) -> None:
    """And the middle at each place of a checkpoint's way to the disk: tensors, manifest, both their names, its own."""
    ended = run_cluster(tiny(SETTINGS), tmp_path, [fault])
    assert_equal(ended, undisturbed)
    assert_consequence(fault, ended, calm)


SPLIT = {**SETTINGS, "pipeline.microbatches": 4}


@pytest.fixture(scope="module")
def undisturbed_whole(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    """With backwards that are not split, which changes no bit."""
    return run_reference(tiny(SPLIT), tmp_path_factory.mktemp("whole"))


# The middle stage does I0 I1 W0 I2 W1 I3 W2 W3, the last one I0 I1 I2 W0 I3 W1 W2 W3.
@pytest.mark.pairwise(1)
@pytest.mark.parametrize(("stage", "point"), [(0, 2), (1, 3), (1, 8), (2, 3), (2, 4)])
def test_a_loss_between_input_and_weight_gradients(
    tiny: TinyConfig, undisturbed_whole: Outcome, tmp_path: Path, stage: int, point: int
) -> None:
    """What waits for its weight gradient belongs to the step that is broken off, on the stages that live on too."""
    fault = kill(stage, STEP, Phase.MID_BACKWARD, point=point)
    ended = run_cluster(tiny({**SPLIT, "pipeline.schedule": "zb"}), tmp_path, [fault])
    assert_equal(ended, undisturbed_whole)
    assert ended.happened == [fault]
    assert ended.generations > 1


# Each stage first, each second and each phase with every other one; the rest of the cube takes its time elsewhere.
TWICE = [
    pytest.param(first, second, phase, marks=[] if (first + second + place) % 3 == 0 else pytest.mark.long)
    for first, second, (place, phase) in itertools.product(range(STAGES), range(STAGES), enumerate(ROLLBACK))
]


@pytest.mark.pairwise(1, slow=3)
@pytest.mark.parametrize(("first", "second", "phase"), TWICE)
def test_a_second_kill_during_the_rollback(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, first: int, second: int, phase: Phase
) -> None:
    """Of any stage, the one that has just come back included."""
    faults = [kill(first, STEP, Phase.MID_BACKWARD), kill(second, None, phase)]
    ended = run_cluster(tiny(SETTINGS), tmp_path, list(faults))
    assert_equal(ended, undisturbed)
    assert ended.happened == faults
    assert ended.starts == [1 + (stage == first) + (stage == second) for stage in range(STAGES)]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_replaced_head_or_tail_wakes_up(tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, stage: int) -> None:
    """The head is refused by who is below it. The tail dials nobody, so it ends when it has waited long enough."""
    fault = pause(stage, STEP, Phase.BEFORE_COMMIT, replaced=True)
    ended = run_cluster(tiny(SETTINGS), tmp_path, [fault])
    assert_equal(ended, undisturbed)
    assert ended.happened == [fault]
    ((sleeper, words),) = ended.fenced
    assert sleeper == stage
    assert ("replaced" if stage == 0 else "TimeoutError") in words


# Each is paused while it waits for what another one computes: the head for gradients, those below for activations.
ASLEEP = [(0, During(stage=2, phase=Phase.MID_BACKWARD, step=STEP))]
ASLEEP += [(stage, During(stage=0, phase=Phase.BEFORE_SEND, step=STEP)) for stage in (1, 2)]


@pytest.mark.parametrize(("stage", "at"), ASLEEP)
def test_who_is_paused_for_longer_than_it_would_wait_goes_on(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, stage: int, at: During
) -> None:
    """On waking all its timers are due, before it has read what came; the others have waited for it."""
    fault = Pause(at=at, stage=stage, seconds=3 * LEAST_S)
    ended = run_cluster(tiny(SETTINGS), tmp_path, [fault])
    assert_equal(ended, undisturbed)
    assert ended.happened == [fault]
    assert (ended.generations, ended.starts) == (1, [1] * STAGES)


@pytest.mark.pairwise(1, slow=3)
@pytest.mark.parametrize("seed", range(8))
def test_a_sleeper_finds_a_neighbour_that_has_just_joined(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, seed: int
) -> None:
    """Who takes the place of a killed neighbour knows of no member: the sleeper must not keep its successor out."""
    sleeper = pause(1, 1, Phase.MID_SEND, replaced=True)
    faults = [sleeper, Kill(at=kill(1, 1, Phase.MID_BACKWARD).at, stage=2, away_s=5.0)]
    ended = run_cluster(tiny(SETTINGS), tmp_path, list(faults), seed=seed)
    assert_equal(ended, undisturbed)
    assert ended.happened == faults
    ((stage, words),) = ended.fenced
    assert stage == 1
    assert "replaced" in words


@pytest.mark.pairwise(1, slow=4)
@pytest.mark.parametrize("how", ["bit", "short", "manifest"])
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_torn_checkpoint_is_left_out(
    tiny: TinyConfig, undisturbed: Outcome, calm: Ended, tmp_path: Path, stage: int, how
) -> None:
    fault = torn_checkpoint(stage, STEP, Phase.BEFORE_COMMIT, how=how)
    ended = run_cluster(tiny(SETTINGS), tmp_path, [fault])
    assert_equal(ended, undisturbed)
    assert_consequence(fault, ended, calm)


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_loss_while_the_disk_is_full_goes_back_further(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, stage: int
) -> None:
    """The lost stage has only what it wrote before; the others have in memory what they may not have on their disks."""
    faults: list[Fault] = [disk_full(stage, 3, Phase.BEFORE_COMMIT, writes=1), kill(stage, 4, Phase.BEFORE_COMMIT)]
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults)
    assert_equal(ended, undisturbed)
    assert ended.happened == faults
    assert len(ended.said_of("No space left on device")) == 1
    (rollback,) = ended.rollbacks
    assert rollback["completed"] == 3
    assert 6 in ended.checkpoints[stage]  # there is room again


@pytest.mark.pairwise(1, slow=4)
@pytest.mark.parametrize("frame", range(1, 6))
@pytest.mark.parametrize("boundary", range(STAGES - 1))
def test_each_word_of_a_rollback_is_cut_short(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, boundary: int, frame: int
) -> None:
    """StartViewChange, DoViewChange, StartView or whatever is under way: who hears half of it says so, and hears it
    again."""
    at = kill(0, None, Phase.STOPPED).at
    faults: list[Fault] = [
        kill(2, STEP, Phase.MID_BACKWARD),
        Corrupt(at=at, boundary=boundary, frame=frame, control=True),
    ]
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults)
    assert_equal(ended, undisturbed)
    assert ended.happened == faults
    assert ended.said_of("malformed-frame")
