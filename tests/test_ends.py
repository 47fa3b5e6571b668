"""Beginnings and ends of a swarm, in memory on a clock that jumps: whoever is late or fails, all end, and know why."""

from __future__ import annotations

import asyncio
import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.data import Corpus, DataError
from thinpipe.node.optim import NonFiniteGradient
from thinpipe.protocol.control_messages import Failed, Heartbeat
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.rollback import Rollback
from thinpipe.protocol.rollback_actions import End, Send

from .builders import identity
from .cluster import Late, run_cluster, run_to_failure
from .conftest import TinyConfig
from .faults import Cut, Drain, Frame, Kill, Phase, fail
from .faults import Fault as Mishap
from .faults_reference import SETTINGS, STAGES, assert_equal
from .in_memory import Outcome, run_reference

ONE_STEP = SETTINGS | {"run.steps": 1, "run.eval_every": 0}
FRAMES = (31, 7, 49, 19, 61, 1, 13, 25, 37, 43, 55)  # of the seventy or so that a run of one step takes
SOON_S = 15.0  # within which all end: no deadline of minutes is waited for

# -- a run that is over before the control streams have met ---------------------------------------------------------

STREAMS = list(itertools.product(range(STAGES - 1), (True, False)))  # boundary, and down
LATE_S = (0.0, 1.0, 11.0)  # in time; after the run's work; after the greeting was given up


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    return run_reference(tiny(ONE_STEP), tmp_path_factory.mktemp("reference"))


@pytest.mark.pairwise(4, slow=16)
@pytest.mark.parametrize("c", LATE_S)
@pytest.mark.parametrize("b", LATE_S)
@pytest.mark.parametrize("a", LATE_S)
@pytest.mark.parametrize("d", LATE_S)
def test_neighbours_that_meet_late_are_waited_for(
    tiny: TinyConfig, one_step: Outcome, tmp_path: Path, a: float, b: float, c: float, d: float
) -> None:
    """Each half of each control stream may come to life after all the work is done."""
    late: Late = dict(zip(STREAMS, (a, b, c, d), strict=True))
    ended = run_cluster(tiny(ONE_STEP), tmp_path, [], late=late)
    assert_equal(ended, one_step)
    assert ended.seconds < max(late.values()) + SOON_S, ended.said
    assert not ended.said_of("has finished; it waited")


@pytest.mark.pairwise(3, slow=6)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("boundary", range(STAGES - 1))
def test_a_connection_that_breaks_in_a_run_of_one_step(
    tiny: TinyConfig, one_step: Outcome, tmp_path: Path, boundary: int, frame: int
) -> None:
    faults: list[Mishap] = [Cut(at=Frame(number=frame), boundary=boundary)]
    ended = run_cluster(tiny(ONE_STEP), tmp_path, faults, seed=frame, late={(1 - boundary, False): 1.0})
    assert_equal(ended, one_step)
    assert ended.seconds < 2 * SOON_S, ended.said


@pytest.mark.pairwise(3, slow=8)
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_stage_that_is_lost_in_a_run_of_one_step(
    tiny: TinyConfig, one_step: Outcome, tmp_path: Path, stage: int, frame: int
) -> None:
    """Also one whose neighbour is through and has never met it on its control stream."""
    faults: list[Mishap] = [Kill(at=Frame(number=frame), stage=stage)]
    ended = run_cluster(tiny(ONE_STEP), tmp_path, faults, seed=frame, late={(0, False): 1.0, (1, True): 1.0})
    assert_equal(ended, one_step)
    assert ended.seconds < 4 * SOON_S, ended.said


# -- a stage that fails ----------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Exception, str]] = {
    "not finite": (NonFiniteGradient("step 3: the gradient of 'x' is not finite"), "step 3: the gradient of 'x'"),
    "disk": (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    "a bug": (AssertionError(), "AssertionError"),
    "a bug with words": (KeyError("layers\n\x1b[31m"), r"KeyError: 'layers\n\x1b[31m'"),
    "no text": (ZeroDivisionError("a" * 1000), "ZeroDivisionError: " + "a" * 400),
}


def in_one_place(lines: list[str], stage: int, words: str) -> None:
    """The stage's own line, and that of the others, which name it."""
    own = lines.pop(stage)
    assert own.isprintable() or own.split() == words.split() or "layers" in own
    for line in lines:
        assert line.startswith(f"stage {stage} failed after "), line
        assert words in line
        assert line.isprintable()


@pytest.mark.pairwise(3, slow=10)
@pytest.mark.parametrize("phase", [Phase.MID_BACKWARD, Phase.BEFORE_COMMIT, Phase.SNAPSHOT])
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("stage", range(STAGES))
def test_all_end_with_the_reason_of_the_one_that_fails(
    tiny: TinyConfig, tmp_path: Path, stage: int, kind: str, phase: Phase
) -> None:
    error, words = ERRORS[kind]
    ended = run_to_failure(tiny(SETTINGS), tmp_path, [fail(stage, 3, phase, error)])
    assert max(ended.seconds) < SOON_S
    in_one_place(ended.lines, stage, words)
    for records in ended.records:
        (found,) = [record for record in records if record["event"] == "failed"]
        assert (found["stage"], found["told"], found["replays"]) == (stage, True, kind != "disk")
        assert words in found["reason"]
        assert found["completed_steps"] == 3 if phase is not Phase.SNAPSHOT else found["completed_steps"] in (3, 4)


@pytest.mark.parametrize("boundary", range(STAGES - 1))
def test_a_neighbour_whose_connection_breaks_at_that_moment_is_told_when_it_is_back(
    tiny: TinyConfig, tmp_path: Path, boundary: int
) -> None:
    failing = fail(1, 3, Phase.BEFORE_COMMIT, OSError(5, "Input/output error"))
    ended = run_to_failure(tiny(SETTINGS), tmp_path, [Cut(at=failing.at, boundary=boundary), failing])
    assert max(ended.seconds) < SOON_S
    in_one_place(ended.lines, 1, "Input/output error")


@pytest.mark.parametrize("stage", range(STAGES))
def test_a_neighbour_that_has_not_met_the_control_stream_yet_is_told_when_it_does(
    tiny: TinyConfig, tmp_path: Path, stage: int
) -> None:
    """A failure in the first step may be faster than a greeting."""
    late: Late = dict.fromkeys(STREAMS, 2.0)
    ended = run_to_failure(tiny(SETTINGS), tmp_path, [fail(stage, 0, Phase.BEFORE_COMMIT, OSError("no"))], late=late)
    assert max(ended.seconds) < SOON_S
    in_one_place(ended.lines, stage, "no")


def test_a_stage_that_fails_before_the_control_streams_have_met_leaves_nobody_without_a_word(
    tiny: TinyConfig, tmp_path: Path
) -> None:
    """Below it nobody has met it yet: that one ends when it cannot connect, or is not connected to, in time."""
    config = tiny(SETTINGS | {"link.connect_timeout_s": 20.0, "link.replacement_timeout_s": 60.0})
    late: Late = {(1, True): 1000.0}
    ended = run_to_failure(config, tmp_path, [fail(1, 0, Phase.BEFORE_COMMIT, AssertionError())], late=late)
    assert ended.lines[0].startswith("stage 1 failed after 0 steps: AssertionError")
    assert "waited" in ended.lines[2]
    assert max(ended.seconds[:2]) < SOON_S


def chain(*, joining: int | None = None) -> list[Rollback]:
    """Three machines that have met."""
    machines = [Rollback(identity(stage, 3), joining=stage == joining) for stage in range(3)]
    for upper, lower in itertools.pairwise(machines):
        upper.meet("below", lower.greeting())
        lower.meet("above", upper.greeting())
    return machines


def test_the_reason_goes_both_ways_and_is_passed_on() -> None:
    machines = chain()
    failure = Failed(stage=1, completed_steps=0, reason="no such luck", replays=True)
    assert machines[1].fail("no such luck", replays=True) == [
        Send(side="above", frame=failure),
        Send(side="below", frame=failure),
    ]
    assert machines[1].fail("and another", replays=True) == []
    assert machines[0].receive("below", failure) == [End(failure=failure)]
    other = chain()
    assert other[1].receive("below", Failed(stage=2, completed_steps=0, reason="x")) == [
        Send(side="above", frame=Failed(stage=2, completed_steps=0, reason="x")),
        End(failure=Failed(stage=2, completed_steps=0, reason="x")),
    ]


def test_whoever_connects_to_a_stage_that_has_failed_is_told_unless_it_begins_anew() -> None:
    machines = chain()
    machines[1].fail("no such luck", replays=False)
    machines[1].part("above")
    failure = Failed(stage=1, completed_steps=0, reason="no such luck")
    assert machines[1].meet("above", machines[0].greeting()) == [Send(side="above", frame=failure)]
    machines[1].part("below")
    with pytest.raises(RemoteProtocolError, match="stage 1 has failed, and this process ends with it") as refused:
        machines[1].meet("below", Rollback(identity(2, 3, incarnation=9), joining=True).greeting())
    assert refused.value.fault is Fault.STOPPED


def test_a_process_that_is_no_member_cannot_end_the_run() -> None:
    """A replacement with the wrong settings, or without a disk: the others wait for a better one."""
    machines = chain(joining=1)
    assert machines[1].fail("no disk", replays=False) == []
    for machine, side in ((machines[0], "below"), (machines[2], "above")):
        with pytest.raises(RemoteProtocolError, match="by a process in no generation") as refused:
            machine.receive(side, Failed(stage=1, completed_steps=0, reason="no disk"))  # pyright: ignore[reportArgumentType]
        assert refused.value.fault is Fault.UNEXPECTED
        assert machine.failure is None


@pytest.mark.parametrize(("side", "stage"), [("above", 1), ("above", 2), ("below", 1), ("below", 0), ("below", 3)])
def test_a_failure_comes_from_where_the_stage_is(side: Any, stage: int) -> None:
    machine = chain()[1]
    with pytest.raises(RemoteProtocolError, match=f"stage {stage} cannot have failed") as refused:
        machine.receive(side, Failed(stage=stage, completed_steps=0, reason="x"))
    assert refused.value.fault is Fault.MALFORMED
    assert machine.failure is None


# -- data that takes long --------------------------------------------------------------------------------------------


def takes(seconds: float) -> Any:
    async def opened(corpus: Corpus) -> Corpus:
        await asyncio.sleep(seconds)
        return corpus

    return opened


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: TinyConfig) -> Outcome:
    return run_reference(tiny(SETTINGS), tmp_path_factory.mktemp("reference"))


def test_a_stage_that_prepares_its_data_is_waited_for(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far longer than any deadline, and everybody says so now and then."""
    ended = run_cluster(tiny(SETTINGS), tmp_path, [], open_corpus=takes(2000))
    assert_equal(ended, undisturbed)
    assert 2000 < ended.seconds < 2010
    said = capsys.readouterr().out
    assert "stage 0 prepares its data, 2 s so far" in said
    assert "stage 2 waits for stage 0, which prepares its data, " in said
    assert 30 <= said.count("stage 1 waits for stage 0") <= 34


def test_a_stage_that_takes_the_place_of_the_first_may_prepare_its_data_too(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    """On another machine, where nothing is in the cache."""
    times = iter((0.0, 2000.0))
    ended = run_cluster(
        tiny(SETTINGS),
        tmp_path,
        [Kill(at=Frame(number=120), stage=0)],
        open_corpus=lambda corpus: takes(next(times))(corpus),
    )
    assert_equal(ended, undisturbed)
    assert 2000 < ended.seconds < 2060


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_run_that_is_told_to_end_does_not_wait_for_its_data(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, stage: int
) -> None:
    """SIGTERM to any node, after so many signs of life."""
    faults: list[Mishap] = [Drain(at=Frame(number=40), stage=stage)]
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults, open_corpus=takes(2000))
    assert ended.seconds < 60
    assert ended.losses == [[], [], []]
    assert_equal(run_cluster(tiny(SETTINGS), tmp_path, [], resume=True), undisturbed)


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("stage", range(STAGES))
def test_a_resumed_run_that_is_told_to_end_before_its_data_are_there_says_what_it_had_done(
    tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    """Stage 0 has no text by then, and knows of no step but its own checkpoints'; all go on from what all have."""
    run_cluster(tiny(SETTINGS), tmp_path, [Drain(at=Frame(number=120), stage=0)])
    done = {line for line in capsys.readouterr().out.splitlines() if "can be resumed" in line}
    (said,) = done
    assert said != "the run stops after 0 steps and can be resumed"
    faults: list[Mishap] = [Drain(at=Frame(number=40), stage=stage)]
    ended = run_cluster(tiny(SETTINGS), tmp_path, faults, resume=True, open_corpus=takes(2000))
    assert ended.seconds < 60
    assert [line for line in capsys.readouterr().out.splitlines() if "can be resumed" in line] == [said] * STAGES
    assert_equal(run_cluster(tiny(SETTINGS), tmp_path, [], resume=True), undisturbed)


def test_data_that_cannot_be_prepared_ends_all_with_the_reason(tiny: TinyConfig, tmp_path: Path) -> None:
    async def fails(_: Corpus) -> Corpus:
        await asyncio.sleep(500)
        raise DataError("corpus.jsonl, line 7: no field 'text'; set data.text_field")

    ended = run_to_failure(tiny(SETTINGS), tmp_path, [], open_corpus=fails)
    assert ended.lines[0] == "corpus.jsonl, line 7: no field 'text'; set data.text_field"
    for line in ended.lines[1:]:
        assert line == f"stage 0 failed after 0 steps: {ended.lines[0]}"
    assert 500 <= max(ended.seconds) < 500 + SOON_S


@pytest.mark.parametrize("noticed", ["before its text is open", "afterwards"])
def test_who_comes_by_mistake_with_other_data_ends_alone(
    noticed: str, tiny: TinyConfig, undisturbed: Outcome, tmp_path: Path
) -> None:
    """All others were started with --resume. It finds out when it meets them, and then its text is the wrong one."""
    ended = run_cluster(tiny(SETTINGS), tmp_path, [Drain(at=Frame(number=120), stage=0)])
    assert ended.checkpoints[0]
    opened: list[Corpus] = []

    async def open_corpus(corpus: Corpus) -> Corpus:
        opened.append(corpus)
        if len(opened) > 1:
            return corpus
        if noticed == "afterwards":
            other = copy.copy(corpus)
            other.digest = "0" * 64
            return other
        await asyncio.sleep(100)
        raise DataError("no such text")

    again = run_cluster(tiny(SETTINGS), tmp_path, [], resume=True, open_corpus=open_corpus, mistaken=0)
    ((stage, line),) = again.fenced
    assert stage == 0
    assert line.startswith("AnotherText: data.source has changed" if noticed == "afterwards" else "DataError: no such")
    assert len(opened) == 2
    assert [of[-1] for of in again.losses] == [of[-1] for of in undisturbed.losses]
    assert again.state_sha256 == undisturbed.state_sha256


def test_whoever_hangs_is_not_taken_for_one_that_prepares() -> None:
    """The word has to come with each sign of life: a stage that is gone prepares nothing."""
    machines = chain()
    machines[0].heartbeats.preparing = True
    machines[1].receive("above", machines[0].heartbeat("below"))
    machines[2].receive("above", machines[1].heartbeat("below"))
    assert [machine.heartbeats.prepares for machine in machines] == [1, 1, 1]
    machines[1].part("above")
    machines[2].receive("above", machines[1].heartbeat("below"))
    assert [machine.heartbeats.prepares for machine in machines] == [1, 0, 0]
    with pytest.raises(RemoteProtocolError, match="stage 3 cannot prepare its data"):
        machines[2].receive("above", Heartbeat(generation=0, completed_steps=0, preparing=4))
