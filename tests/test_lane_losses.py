"""Lanes are lost and come back at any moment, all nodes in memory on the jumping clock.

Whoever comes to the end has what one process makes of the record, and nobody waits for ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.lanes.state_copies import StateCopies
from thinpipe.node.stage_failure import StageFailed

from .conftest import TinyConfig
from .grid_cluster import GridCluster, GridFault, Place, draw_faults, events, judged, run_grid
from .virtual import PROCESS

SMALL: dict[str, Any] = {
    "run.steps": 20,
    "model.width": 32,
    "model.layers": 2,
    "data.sequence_length": 16,
    "data.heldout_sequences": 4,
    "pipeline.stages": 2,
    "pipeline.batch_size": 4,
    "pipeline.microbatches": 2,
    "checkpoint.every": 2,
    "codec.codec": "mapl:r=8,anchors=full,context=0",
    "codec.forward": "int4",
    "codec.backward": "int4",
    "lanes.count": 3,
    "lanes.average": "outer:every=2",
    "lanes.round_timeout_s": 3.0,
}
SEEDS = 1  # of `make test-slow`
MANY = 60  # of `make test-long`


def story(config: RunConfig, out: Path, faults: list[GridFault], seed: int = 0) -> GridCluster:
    """What happens, and that it came out as it has to."""
    grid = run_grid(config, out, faults, seed=seed)
    found = judged(config, out)
    assert found.equal, (found.members(), found.lanes, grid.said)
    return grid


def took_up(config: RunConfig, out: Path, lane: int) -> list[tuple[int, int]]:
    """Whose states that lane took up, and after how many steps."""
    return [(each["lane"], each["completed"]) for each in events(out, config, lane, 0, "took_up")]


def lost_for(seconds: float, lane: int = 0) -> GridFault:
    return GridFault(step=4, kind="lane", lane=lane, stage=0, away_s=seconds)


@pytest.mark.parametrize("seconds", [8.0, pytest.param(9.0, marks=pytest.mark.slow)])
def test_who_comes_back_when_the_others_are_through_takes_up_their_last_state(
    tiny: TinyConfig, tmp_path: Path, seconds: float
) -> None:
    """Their stages have ended their control streams by then, and still have what it needs."""
    config = tiny(SMALL)
    story(config, tmp_path, [lost_for(seconds)])
    assert took_up(config, tmp_path, 0) == [(1, 20)]


@pytest.mark.slow
def test_a_stage_is_lost_while_the_others_take_up_a_state_of_a_later_generation(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 has its part of the other lane's state, and is in its own lane's generation all the same: it has to hear
    stage 1, which has no part yet and meets who takes the place of stage 0."""
    config = tiny(SMALL | {"pipeline.stages": 3, "model.layers": 3})
    fetch, lost = StateCopies.fetch, False

    async def late_above_stage_2(self: StateCopies, lane: int, completed: int) -> None:
        process = PROCESS.get()
        if process and process.stage < 2 and not lost:
            await asyncio.sleep(3)
        await fetch(self, lane, completed)

    def on_event(grid: GridCluster, place: Place, event: str) -> None:
        nonlocal lost
        if event == "took_up" and not lost:
            lost = True
            assert place == (0, 2)
            grid.befall(GridFault(step=0, kind="kill", lane=0, stage=0, away_s=0.3))

    monkeypatch.setattr(StateCopies, "fetch", late_above_stage_2)
    kills = [GridFault(step=step, kind="kill", lane=1, stage=1, away_s=0.3) for step in (1, 2, 9, 13)]
    run_grid(config, tmp_path, [*kills, lost_for(14.0)], on_event=on_event)
    assert lost
    assert judged(config, tmp_path).equal
    assert took_up(config, tmp_path, 0)[-1] == (1, 20)


@pytest.mark.pairwise(0, slow=2)
@pytest.mark.parametrize("seconds", [3.0, 5.0, 6.0, 7.0])
def test_who_comes_back_earlier_trains_again(tiny: TinyConfig, tmp_path: Path, seconds: float) -> None:
    config = tiny(SMALL)
    story(config, tmp_path, [lost_for(seconds)])


@pytest.mark.parametrize("step", [18, pytest.param(24, marks=pytest.mark.slow)])
def test_who_goes_on_by_itself_trains_what_it_had_passed_over(tiny: TinyConfig, tmp_path: Path, step: int) -> None:
    """It was admitted to a round that nobody had made, and on its way there when the only other lane was lost."""
    config = tiny(SMALL | {"lanes.count": 2, "lanes.average": "outer:every=5", "run.steps": 30})
    story(config, tmp_path, [lost_for(4.0, lane=1), replace(lost_for(60.0), step=step)])
    assert [each["step"] for each in events(tmp_path, config, 1, 0, "step")][-1] == 29


@pytest.mark.parametrize("step", [8, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ahead", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["one is ahead", "alike"])
def test_lanes_that_are_told_to_end_do_so_and_go_on_later(
    tiny: TinyConfig, tmp_path: Path, step: int, ahead: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to all, while one lane is in a round to which another one has yet to come, and ends before it."""
    config = tiny(SMALL | {"lanes.count": 2, "lanes.average": "outer:every=5", "lanes.round_timeout_s": 60.0})
    behind = GridFault(step=step - 2, kind="hang", lane=1, stage=0, away_s=3.0)
    told = GridFault(step=step, kind="drain", lane=0, stage=0, away_s=1.0 * ahead)
    grid = run_grid(config, tmp_path, [behind, told] if ahead else [told])
    assert all(grid.drained)
    assert ("which ended before: this lane goes back" in capsys.readouterr().out) == ahead
    assert not any(events(tmp_path, config, lane, stage, "failed") for lane in range(2) for stage in range(2))
    run_grid(config, tmp_path, [], resume=True)
    found = judged(config, tmp_path)
    assert found.equal
    assert not found.members()  # nobody was left out because of it


@pytest.mark.slow
def test_lanes_of_which_none_can_give_what_the_others_lack_end_by_name(tiny: TinyConfig, tmp_path: Path) -> None:
    """All are set back to before what they have promised never to ask for again, as by older copies of their disks."""
    config = tiny(SMALL | {"lanes.count": 2})
    run_grid(config, tmp_path, [GridFault(step=8, kind="drain", lane=0, stage=0)])
    for promise in tmp_path.glob("lane-*/rounds/stage-*/forgot"):
        promise.write_text("9\n")
    words = r"this lane follows the others, from [0-9]+ steps on; for 1800 s nothing has come"
    with pytest.raises((TimeoutError, StageFailed), match=words):
        run_grid(config, tmp_path, [], resume=True)


def random_story(tiny: TinyConfig, out: Path, seed: int) -> None:
    config = tiny(SMALL | {"run.steps": 60, "lanes.average": "outer:every=5"})
    faults = draw_faults(seed, lanes=3, stages=2, steps=60, count=10)
    assert story(config, out, faults, seed).happened


@pytest.mark.slow
@pytest.mark.parametrize("seed", [310, 314])
def test_ten_faults_of_longer_lanes(tiny: TinyConfig, tmp_path: Path, seed: int) -> None:
    """Of a node that is woken while its lane is away, and has its place again; and of one that comes back with
    checkpoints which the other lane's are in the place of."""
    shape = {"lanes.count": 2, "pipeline.stages": 3, "run.steps": 60, "lanes.average": "outer:every=5"}
    faults = draw_faults(seed, lanes=2, stages=3, steps=60, count=10)
    assert story(tiny(SMALL | shape), tmp_path, faults, seed).happened


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_ten_faults(tiny: TinyConfig, tmp_path: Path, seed: int) -> None:
    random_story(tiny, tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEEDS, MANY))
def test_ten_faults_of_many_kinds(tiny: TinyConfig, tmp_path: Path, seed: int) -> None:
    random_story(tiny, tmp_path, seed)
