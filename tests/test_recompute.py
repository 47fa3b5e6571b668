"""`thinpipe recompute`: a run done again from its record has the same bits, and whatever differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config
from thinpipe.node.lanes.members_file import write_members
from thinpipe.node.one_process import OneProcess
from thinpipe.node.run_corpus import open_run_corpus
from thinpipe.protocol.membership_log import Entry, MembershipLog
from typer.testing import CliRunner

from .conftest import TinyConfig


def left_and_came(rounds: int, *, every: int) -> MembershipLog:
    """Of three lanes: lane 1 is left out of round 1 and back in round 4; lane 2 is left out of round 2, for good.
    every: steps between rounds."""
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 2)).then((0,)).then((0,))
    log = log.then((0, 1), (Entry(lane=1, first=4, begins=4 * every, source=1, copied=every),))
    while log.decided < rounds:
        log = log.then((0, 1))
    return log


def disturbed(tiny: TinyConfig, run: Path, average: str, *, steps: int) -> None:
    """A run that it happened to, of which lane 2 followed the others to the end, as its processes would have left
    it."""
    config = tiny(
        {
            "pipeline.stages": 2,
            "pipeline.batch_size": 4,
            "pipeline.microbatches": 2,
            "model.layers": 2,
            "run.steps": steps,
            "codec.codec": "mapl:r=8,context=0",
            "codec.forward": "rvq:groups=2,codes=16",
            "codec.backward": "rvq:groups=2,codes=16",
            "lanes.count": 3,
            "lanes.average": average,
        }
    )
    run.mkdir()
    (run / "run.toml").write_text(dump_config(config))
    every = 2 if "outer" in average else 1
    log = left_and_came(steps // every, every=every)
    followed = Entry(lane=2, first=log.decided, begins=steps, source=2, copied=2 * every)
    process = OneProcess(config, run, log.expecting((followed,)))
    process.train()
    process.close()
    open_run_corpus(config, run, resume=False).keep(run)
    for lane in range(3):  # the third knows less, and the second went on alone
        known = (
            log,
            MembershipLog.begin(3).then((0, 1, 2)).then((1,)),
            MembershipLog(tuple(each for each in log.stretches if each.first < 2), 2),
        )[lane]
        write_members(run / f"lane-{lane}" / "rounds" / "stage-0" / "members.json", known)
    records = run / "lane-2" / "stage-0.jsonl"
    follows = {"event": "follows", "time_s": 0.0, "completed": followed.copied}
    records.write_text(json.dumps(follows) + "\n" + records.read_text())


@pytest.fixture(scope="module")
def made(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("disturbed") / "run"
    disturbed(tiny, run, "gradients", steps=8)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def done(*arguments: str | Path, code: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["recompute", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return (result.stdout if code != 2 else result.stderr).splitlines()


def alter(path: Path, event: str, change: Callable[[dict[str, Any]], None], *, nth: int = 0) -> None:
    """Another record of that kind in the place of the one that is there."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change([each for each in records if each["event"] == event][nth])
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


def drop_ends(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"end"' not in line))


def test_lanes_that_left_and_came_have_the_same_bits(run: Path, tmp_path: Path) -> None:
    lines = done(run, "--out", tmp_path / "again")
    assert [line for line in lines if line.startswith("lane ")] == [
        f"lane {lane}: equal bit for bit" for lane in range(3)
    ]
    assert lines[0].startswith("round 1: lane 1 is left out")
    assert lines[-4] == "the end: lane 2 had followed the others up to it"
    assert (tmp_path / "again" / "lane-2" / "stage-1.jsonl").exists()
    found = json.loads("\n".join(done(run, "--json")))
    assert (found["equal"], found["followed_to_the_end"]) == (True, [2])


def test_so_do_lanes_whose_rounds_are_far_apart(tiny: TinyConfig, tmp_path: Path) -> None:
    disturbed(tiny, tmp_path / "run", "outer:every=2", steps=12)
    assert done(tmp_path / "run")[-1] == "lane 2: equal bit for bit"


def test_what_differs_is_named(run: Path) -> None:
    alter(run / "lane-1" / "stage-1.jsonl", "end", lambda record: record.update(state_sha256="0" * 64))
    alter(run / "lane-0" / "stage-0.jsonl", "step", lambda record: record.update(loss=1.0), nth=4)
    alter(run / "lane-2" / "stage-0.jsonl", "round", lambda record: record.update(digest="ab"), nth=3)
    lines = done(run, code=1)
    assert lines[-3] == "lane 0: DIFFERENT: loss from step 5 on"
    assert lines[-2] == "lane 1: DIFFERENT: state of stage 1"
    assert lines[-1].startswith("lane 2: DIFFERENT: averaging from round 3 on")


def test_another_log_is_another_run(run: Path) -> None:
    for lane in range(3):
        (run / f"lane-{lane}" / "rounds" / "stage-0" / "members.json").unlink()
    assert all("DIFFERENT" in line for line in done(run, code=1))


def test_a_lane_that_was_given_up_is_not_compared(run: Path) -> None:
    drop_ends(run / "lane-2" / "stage-1.jsonl")
    assert done(run)[-1] == "lane 2: has not come to the end, so there is nothing to compare"


def test_a_lane_that_ended_by_a_log_that_does_not_count_followed_nobody(tiny: TinyConfig, tmp_path: Path) -> None:
    """Lanes 0 and 1 could not hear lane 2 from round 2 on, and all went to their ends."""
    lanes = {"lanes.count": 3, "lanes.average": "gradients"}
    config = tiny({"pipeline.stages": 1, "run.steps": 5, **lanes})
    for name, members in (("run", (0, 1)), ("alone", (2,))):
        log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 1, 2))
        while log.decided < 5:
            log = log.then(members)
        process = OneProcess(config, tmp_path / name, log)
        process.train()
        process.close()
        for lane in range(3):
            write_members(tmp_path / name / f"lane-{lane}" / "rounds" / "stage-0" / "members.json", log)
    run = tmp_path / "run"
    shutil.rmtree(run / "lane-2")
    shutil.copytree(tmp_path / "alone" / "lane-2", run / "lane-2")
    (run / "run.toml").write_text(dump_config(config))
    open_run_corpus(config, run, resume=False).keep(run)
    lines = done(run)
    assert lines[-3:-1] == ["lane 0: equal bit for bit", "lane 1: equal bit for bit"]
    assert lines[-1] == (
        "lane 2: came to the end by a log of its own, which does not count from round 2 on, so there is nothing to "
        "compare"
    )
    assert not any("followed" in line for line in lines)


def test_one_lane_is_a_run_too(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "run.steps": 3})
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text(dump_config(config))
    process = OneProcess(config, run)
    process.train()
    process.close()
    assert done(run) == ["the run: equal bit for bit"]


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (lambda _: None, "--out {run} is there already; choose another one"),
        (lambda run: (run / "run.toml").unlink(), "recompute {run}: there is no run.toml"),
        (
            lambda run: [drop_ends(path) for path in run.glob("lane-*/*.jsonl")],
            "{run} has not come to its end; go on with it first: thinpipe up --resume {run}",
        ),
        (
            lambda run: (run / "lane-0" / "rounds" / "stage-0" / "members.json").write_text("{}"),
            "members.json does not say who took part in which rounds",
        ),
        (
            lambda run: (run / "corpus.json").write_text(
                (run / "corpus.json").read_text().replace('"corpus": "', '"corpus": "00')[:-4]
            ),
            "corpus.json is damaged",
        ),
    ],
    ids=["out", "no run", "not ended", "log", "text"],
)
def test_what_cannot_be_done_again_is_refused(run: Path, breaks: Callable[[Path], Any], expected: str) -> None:
    breaks(run)
    (line,) = done(run, *(["--out", run] if "--out" in expected else []), code=2)
    assert expected.format(run=run) in line


def test_other_text_on_the_way_is_refused(run: Path) -> None:
    record = json.loads((run / "corpus.json").read_text())
    (run / "corpus.json").write_text(json.dumps({**record, "earlier": ["0" * 64]}))
    (line,) = done(run, code=2)
    assert "went on with other text on the way (--data-changed)" in line
