"""Which cut would be faster: the same advice from the same records, whoever reads them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.local import run_local
from thinpipe.node.measuring.pipeline_costs import pipeline_costs
from thinpipe.node.measuring.plan import plan
from thinpipe.node.measuring.stage_times import times_recut
from thinpipe.node.preparation import resolve_architecture
from thinpipe.sim.links.pipeline import Boundary, StageTimes
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.links.stage_work import Operations
from thinpipe.sim.reports.cut_advice import PipelineCosts, advice_on_record, advise, cut_advice
from thinpipe.sim.reports.figures import StageFigures
from thinpipe.sim.reports.summary import read_records
from thinpipe.sim.reports.top_data import look, sources
from typer.testing import CliRunner

from .conftest import TinyConfig
from .preloaded import forks
from .test_watch import start, step

COSTS = PipelineCosts(
    operations=Operations(layer_weights=8e5, attention=2e5, head=1e6, codec_end=1e4),
    layers=(2, 2, 2, 2),
    last_layers=0,
    schedule="1f1b",
    microbatches=8,
    boundary=Boundary(forward_bytes=1000, backward_bytes=800, link=LinkProfile.parse("300mbit,25ms")),
)
WORK_S = (0.2, 0.2, 0.2, 0.8)  # of a step of one second; the first step takes long everywhere
LINE = r"stage 3 computes 80% of its time, stage 0 20%: --set pipeline\.cut=2,3,3,0 would give \d\.\dx \(simulated\)"
GO_ON = r"; go on so: thinpipe checkpoint convert .*run --cut 2,3,3,0 --out DIR"


def written(run: Path, *, steps: int = 5, costs: dict[str, Any] | None = None) -> Path:
    """Records of four stages, of which the last one has the head and takes four times as long as the others."""
    run.mkdir()
    (run / "run.toml").write_text("[run]\nsteps = 5\n[pipeline]\nstages = 4\n[checkpoint]\nevery = 2\n")
    for stage, work_s in enumerate(WORK_S):
        told = [start(stage, stages=4, host="elsewhere")]
        told += [{"event": "costs", "time_s": 1.0, **(costs or COSTS.record())}] if stage == 0 else []
        for number in range(steps):
            compute_s = work_s if number else 5.0
            told.append(step(number, sent=0, seconds=1.0 if number else 6.0, compute_s=compute_s, codec_s=0.0))
        (run / f"stage-{stage}.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in told))
    return run


def test_top_and_summary_say_the_same(tmp_path: Path) -> None:
    run = written(tmp_path / "run", steps=9)
    (swarm,) = look(sources([run], []), 120.0)
    shares = [of.figures.compute_share or 0.0 for of in swarm.stages.values()]
    found = advice_on_record(run, shares, run)
    assert found
    assert found["best_layers"] == [2, 3, 3, 0]
    assert found["gain"] > 1.3
    assert swarm.advice == found["line"]
    assert re.fullmatch(LINE.replace("80", r"\d\d").replace("20", r"\d\d") + GO_ON, found["line"])
    told = CliRunner().invoke(app, ["top", "--once", str(run)], env={"COLUMNS": "400"}).stdout
    assert found["line"] in told
    several = advice_on_record(run, shares)  # as of a run of several lanes, which is not converted
    assert several
    assert several["line"] == found["line"].partition(";")[0]


def test_top_knows_it_without_torch(tmp_path: Path) -> None:
    run = written(tmp_path / "run", steps=40)
    program = (
        "import sys; from thinpipe.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "top", "--once", str(run)],
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(LINE, done.stdout), done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_nothing_is_advised_before_all_stages_have_done_a_step_that_counts(tmp_path: Path) -> None:
    run = written(tmp_path / "run", steps=2)
    watched = sources([run], [])
    assert look(watched, 120.0)[0].advice
    with (run / "stage-3.jsonl").open("a") as file:  # a process that takes its place warms up anew
        file.writelines(json.dumps(each) + "\n" for each in (start(3, stages=4), step(2, sent=0)))
    assert look(watched, 120.0)[0].advice is None
    (run / "stage-3.jsonl").unlink()
    assert look(sources([run], []), 120.0)[0].advice is None
    assert advice_on_record(run, [0.2, 0.2, 0.2, 0.8]) is None


def test_the_newest_costs_count(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    with (run / "stage-0.jsonl").open("a") as file:
        file.write(json.dumps({"event": "costs", "time_s": 2.0, **replace(COSTS, layers=(3, 3, 2, 0)).record()}) + "\n")
    found = advice_on_record(run, WORK_S)
    assert found
    assert found["layers"] == [3, 3, 2, 0]


def test_costs_are_read_as_they_were_written() -> None:
    for link in ("none", "300mbit,25ms", "80mbit,50ms,jitter=2ms,burst=64kb"):
        costs = replace(COSTS, boundary=replace(COSTS.boundary, link=LinkProfile.parse(link)))
        assert PipelineCosts.of(json.loads(json.dumps(costs.record()))) == costs


@pytest.mark.parametrize("clip_norm", ["stage", "global"])
def test_a_gain_is_that_of_plan(clip_norm: str, tiny: TinyConfig) -> None:
    """A round trip for the norm of all stages included, which no cut saves."""
    settings = {"pipeline.stages": 2, "pipeline.schedule": "zb", "link.link": "100mbit,200ms"}
    settings |= {"optim.clip_norm": clip_norm}
    config, other = (tiny({**settings, "pipeline.cut": cut}) for cut in ("1,3", "4,0"))
    architecture = resolve_architecture(config)
    times = [StageTimes(forward_s=each, backward_s=2 * each) for each in (0.01, 0.5)]
    costs = pipeline_costs(config, architecture)
    assert costs
    found = cut_advice(costs, times)
    assert found["best_layers"] == [4, 0]
    moved = times_recut(config, other, architecture, times)
    before, after = (plan(*each)[0] for each in ((config, architecture, times), (other, architecture, moved)))
    assert found["gain"] == pytest.approx(after["tokens_per_s"] / before["tokens_per_s"])


@pytest.mark.parametrize(
    "damage",
    [
        {"operations": {"layer_weights": -1.0, "attention": 0.0, "head": 0.0, "codec_end": 0.0}},
        {"operations": {"layer_weights": 1.0}},
        {"operations": None},
        {"layers": [2, 2, 2, -2]},
        {"layers": [1024, 1024]},
        {"layers": [0] * 1025},
        {"layers": []},
        {"layers": 8},
        {"last_layers": 10**9},
        {"schedule": "random"},
        {"microbatches": "8"},
        {"microbatches": float("nan")},
        {"forward_bytes": 1e300},
        {"link": "fast"},
    ],
    ids=str,
)
def test_costs_that_no_run_has_are_passed_over(damage: dict[str, Any], tmp_path: Path) -> None:
    run = written(tmp_path / "run", costs={**COSTS.record(), **damage})
    (swarm,) = look(sources([run], []), 120.0)
    assert swarm.advice is None
    assert swarm.notes == ["stage-0.jsonl: 1 lines are no records and are passed over"]
    assert advice_on_record(run, WORK_S) is None


@pytest.mark.parametrize(
    ("costs", "work_s"),
    [
        (None, WORK_S),
        (replace(COSTS, microbatches=251), WORK_S),  # more than can be simulated while somebody waits
        (COSTS, WORK_S[:3]),
        (COSTS, (0.0, 0.0, 0.0, 0.0)),
        (
            replace(
                COSTS,
                operations=replace(COSTS.operations, layer_weights=0.0, attention=1e-300, head=0.0, codec_end=0.0),
            ),
            (1e300,) * 4,
        ),
        (replace(COSTS, layers=(0, 1, 0, 0)), WORK_S),  # no cut gives both inner stages a layer
    ],
)
def test_who_cannot_tell_says_nothing(costs: PipelineCosts | None, work_s: tuple[float, ...]) -> None:
    assert advise(costs, [[each] for each in work_s], work_s) is None


def test_the_figures_keep_what_a_node_writes() -> None:
    figures = StageFigures(0)
    figures.take({"event": "costs", "time_s": 1.0, **COSTS.record()})
    assert figures.costs == COSTS


@pytest.mark.slow
def test_a_real_swarm_writes_its_costs(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "pipeline.cut": "0,4", "run.steps": 6, "checkpoint.every": 0})
    run = tmp_path / "run"
    summary = run_local(config, run, quiet=True, forks=forks())
    costs = [record for record in read_records(run / "stage-0.jsonl") if record["event"] == "costs"]
    assert [PipelineCosts.of(each) for each in costs] == [pipeline_costs(config, resolve_architecture(config))]
    assert "costs" not in {record["event"] for record in read_records(run / "stage-1.jsonl")}
    assert summary["cut_advice"]["layers"] == [0, 4]
    (swarm,) = look(sources([run], []), 120.0)
    told, line = swarm.advice, summary["cut_advice"]["line"]
    assert (told and told.partition(": ")[2]) == (line and line.partition(": ")[2])


def test_emulated_stages_whose_seconds_are_stated_have_no_costs(tiny: TinyConfig) -> None:
    for machine, known in (("tiny@2x1tflops", True), ("tiny@2x1ms+2ms", False), ("tiny@2of4x1tflops", False)):
        config = tiny({"pipeline.stages": 2, "compute.emulate": machine, "checkpoint.every": 0})
        assert (pipeline_costs(config, resolve_architecture(config)) is not None) == known
    assert pipeline_costs(tiny({"pipeline.stages": 1}), resolve_architecture(tiny())) is None
