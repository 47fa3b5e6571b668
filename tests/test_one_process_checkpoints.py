"""Checkpoints of a run in one process: it goes on, from wherever it was broken off, with the bits of one that was
not."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.checkpoints.manifest import CheckpointError
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.one_process import OneProcess
from thinpipe.node.run_corpus import open_run_corpus
from thinpipe.protocol.schedule import Forward
from typer.testing import CliRunner

from .conftest import TinyConfig

STEPS = 8
MIXTURE = "mos:k=0.25,v=0.5,warm=3,fold=0.25"  # warm in steps 0 to 2, gathers in step 2, angles in 3 to 5, folds from 6


class BrokenOff(Exception):
    pass


def train(config: RunConfig, out: Path, *, ends_in: int | None = None, resume: bool = False) -> tuple[list[Any], Any]:
    """In the directory `out`, on from its checkpoints if `resume`; broken off in step `ends_in`, before anything of it
    is kept. Returns the digest of each stage of each lane, and what `OneProcess.train` does."""
    out.mkdir(exist_ok=True)
    text = open_run_corpus(config, out, resume=resume)

    def end(step: int, loss: float) -> None:
        del loss
        if step == ends_in:
            raise BrokenOff

    with closing(OneProcess(config, out, corpus=text.corpus, resume=resume)) as run:
        run.keep_checkpoints(out, text, resume=resume, report=lambda line: pytest.fail(line)).keep(out)
        try:
            trained = run.train(end)
        except BrokenOff:
            trained = None
        return [[stage.state_sha256() for stage in lane.stages] for lane in run.lanes], trained


def chunks(tiny: TinyConfig, given: dict[str, Any]) -> RunConfig:
    """Two chunks by MIXTURE, unless other settings are given."""
    settings = {
        "run.steps": STEPS,
        "model.layers": 2,
        "pipeline.stages": 2,
        "pipeline.batch_size": 4,
        "pipeline.microbatches": 2,
        "lanes.count": 2,
        "lanes.average": "gradients",
        "context.method": MIXTURE,
        "checkpoint.every": 1,
    }
    return tiny(settings | given)


LANES = {"context.method": "", "lanes.average": "outer:every=4,fragments=2,delay=1"}


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(
    ("settings", "pauses"),
    [
        ({}, (2, 3, 6)),  # in the step that gathers, before the first with subspaces, and before the first that folds
        ({"context.method": "full:format=int8", "codec.codec": "mapl:r=16"}, (5,)),
        ({"lanes.average": "outer:every=3", "pipeline.schedule": "zb"}, (1, 4)),
        ({**LANES, "codec.codec": "mapl:r=16"}, (4, 7)),  # of rounds that are made and not used
        ({"context.method": "", "lanes.count": 1, "codec.codec": "mapl:r=16"}, (3,)),
        ({"context.method": "", "lanes.count": 1, "codec.codec": "mapl:r=16,every=3", "pipeline.delay": 1}, (1, 4, 5)),
    ],
)
def test_a_pause_changes_no_bit(tiny: TinyConfig, tmp_path: Path, settings: Any, pauses: tuple[int, ...]) -> None:
    config = chunks(tiny, settings)
    whole, (losses, val_loss) = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", ends_in=pauses[0])
    for pause in pauses[1:]:
        train(config, tmp_path / "run", ends_in=pause, resume=True)
    state, (rest, evaluated) = train(config, tmp_path / "run", resume=True)
    assert (state, rest, evaluated) == (whole, losses[pauses[-1] :], val_loss)


def test_a_round_that_is_under_way_is_part_of_what_is_gone_on_from(tiny: TinyConfig, tmp_path: Path) -> None:
    """The pauses above would otherwise prove nothing."""
    config = chunks(tiny, LANES | {"run.steps": 4})
    train(config, tmp_path, ends_in=2)
    text = open_run_corpus(config, tmp_path, resume=True)
    with closing(OneProcess(config, corpus=text.corpus)) as run:
        run.keep_checkpoints(tmp_path, text, resume=True, report=lambda line: pytest.fail(line))
        assert [sorted(given) for given in run._given.values()] == [[0, 1]] * 2


def test_a_step_that_is_begun_again_adds_nothing_up_twice(tiny: TinyConfig, tmp_path: Path) -> None:
    """A stage that is set back in the middle of the step that gathers, as a rewind does."""
    config = chunks(tiny, {"run.steps": 5, "pipeline.stages": 1})
    whole, _ = train(config, tmp_path / "whole")
    with closing(OneProcess(config)) as run:
        run._step(0)
        run._step(1)
        kept = [[stage.snapshot() for stage in lane.stages] for lane in run.lanes]
        first = Forward(microbatch=0)
        run._each(lambda lane: lane._together(0, 2, first, (0,)), run.lanes)  # one microbatch of two
        for lane, snapshots in zip(run.lanes, kept, strict=True):
            for stage, snapshot in zip(lane.stages, snapshots, strict=True):
                stage.restore(snapshot)
        run.train()
        assert [[stage.state_sha256() for stage in lane.stages] for lane in run.lanes] == whole


def test_what_one_stage_has_alone_is_not_gone_on_from(tiny: TinyConfig, tmp_path: Path) -> None:
    config = chunks(tiny, {"run.steps": 3, "context.method": "full"})
    state, (losses, _) = train(config, tmp_path)
    shutil.rmtree(tmp_path / "lane-1" / "checkpoints" / "stage-1" / "step-00000003")
    (tmp_path / "lane-0" / "checkpoints" / "stage-0" / "step-00000002" / "state.safetensors").write_bytes(b"")
    text, told = open_run_corpus(config, tmp_path, resume=True), list[str]()
    with closing(OneProcess(config, corpus=text.corpus)) as run:
        run.keep_checkpoints(tmp_path, text, resume=True, report=told.append)
        assert ([stage.completed for lane in run.lanes for stage in lane.stages], len(told)) == ([1] * 4, 1)
        assert run.train()[0] == losses[1:]
        assert [[stage.state_sha256() for stage in lane.stages] for lane in run.lanes] == state


def test_a_disk_that_takes_no_checkpoint_ends_no_run(
    tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> int:
        raise CheckpointError("no space")

    monkeypatch.setattr("thinpipe.node.checkpoints.store.CheckpointStore.write", full)
    config = chunks(tiny, {"run.steps": 1, "lanes.count": 1, "context.method": "", "lanes.average": "gradients"})
    _, (losses, _) = train(config, tmp_path)
    assert len(losses) == 1
    assert capsys.readouterr().err == "stage 0: no space\nstage 1: no space\n"
    assert '"code": "checkpoint", "reason": "no space"' in (tmp_path / "stage-1.jsonl").read_text()


# -- as a command -----------------------------------------------------------------------------------------------------


def up(*options: str) -> Any:
    return CliRunner().invoke(app, ["up", *options])


def test_the_command_goes_on_and_ends_as_if_nothing_had_been(tiny: TinyConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "run.toml").write_text(dump_config(chunks(tiny, {"run.steps": 4, "context.method": "full"})))
    assert up("--one-process", "--config", str(tmp_path / "run.toml"), "--out", str(run)).exit_code == 0
    first = json.loads((run / "summary.json").read_text())
    for newest in run.glob("lane-*/checkpoints/stage-*/step-00000004"):
        shutil.rmtree(newest)
    done = up("--resume", str(run))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"--resume {run}: the run was trained in one process; say --one-process" in done.stderr
    done = up("--one-process", "--resume", str(run))
    assert done.exit_code == 0, done.output
    again = json.loads((run / "summary.json").read_text())
    states = [[stage["state_sha256"] for stage in found["stages"]] for found in (first, again)]
    assert states[0] == states[1]
    alike = ("steps", "completed", "tokens", "train_loss", "val_loss", "mode")
    assert [first[name] for name in alike] == [again[name] for name in alike]
    assert again["repeated_steps"] == 2  # the fourth, of either lane
    assert again["bytes"]["total"] == pytest.approx(first["bytes"]["total"] * 5 / 4, rel=1e-4)  # numbers of steps


def test_a_swarm_is_not_gone_on_with_in_one_process(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny()))
    (tmp_path / "stage-0.jsonl").write_text('{"event": "start"}\n')
    done = up("--one-process", "--resume", str(tmp_path))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"--resume {tmp_path}: the run was trained by a swarm; omit --one-process" in done.stderr
