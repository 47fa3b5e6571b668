"""What a run's end says of dense training, of thinner links, and of what to try next."""

import io
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.measuring import dense_comparison
from thinpipe.node.measuring.dense_comparison import add_comparison
from thinpipe.node.measuring.pipeline_costs import pipeline_costs
from thinpipe.node.measuring.plan import plan
from thinpipe.node.measuring.stage_times import times_measured, times_recut
from thinpipe.node.preparation import prepare_corpus, resolve_architecture
from thinpipe.node.stage_costs import operations
from thinpipe.sim.links.pipeline import StageTimes
from thinpipe.sim.links.stage_work import StageWorkError, measured_speeds
from thinpipe.sim.reports import cut_advice as cut_advice_module
from thinpipe.sim.reports.cut_advice import PipelineCosts, advice_line, cut_advice
from thinpipe.sim.reports.run_console import closing_lines, summary_tables
from typer.testing import CliRunner

from .conftest import TinyConfig

MICROBATCH_S = 0.02
MAPL = {"codec.codec": "mapl:r=8", "optim.muon_lr": 0.01, "optim.adamw_lr": 0.02}


def costs_of(config: RunConfig) -> PipelineCosts:
    found = pipeline_costs(config, resolve_architecture(config))
    assert found
    return found


def recorded(run: Path, config: RunConfig, *, steps: int = 3, microbatch_s: float = MICROBATCH_S) -> Path:
    """Records of stages that take so long for each microbatch."""
    run.mkdir(parents=True)
    costs = pipeline_costs(config, resolve_architecture(config))
    head = [json.dumps({"event": "costs", **costs.record()})] if costs else []
    step = {"event": "step", "compute_s": microbatch_s * config.pipeline.microbatches, "codec_s": 0.0}
    for stage in range(config.pipeline.stages):
        lines = [*(head if stage == 0 else []), *[json.dumps(step)] * steps]
        (run / f"stage-{stage}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return run


def compared(run: Path, config: RunConfig, *, mode: str = "swarm") -> dict[str, Any]:
    stages = [{"compute_share": 0.5}] * config.pipeline.stages
    summary: dict[str, Any] = {"mode": mode, "tokens_per_s": 1000.0, "stages": stages}
    add_comparison(summary, run, config)
    return summary


def test_the_figures_are_those_of_plan(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "link.link": "2mbit,5ms", **MAPL})
    run = recorded(tmp_path / "run", config)
    found = compared(run, config)
    architecture = resolve_architecture(config)
    times = times_measured(run, config)
    own, _ = plan(config, architecture, times)
    dense, _ = plan(tiny({"pipeline.stages": 2, "link.link": "2mbit,5ms"}), architecture, times)
    for told, expected in ((found["run_simulation"], own), (found["dense_simulation"], dense)):
        assert told["tokens_per_s"] == expected["tokens_per_s"]
        assert told["link"] == "2mbit,5ms"
    assert found["dense_simulation"]["codec"] == "bf16"
    assert found["dense_simulation"]["tokens_per_s"] < 0.8 * found["run_simulation"]["tokens_per_s"]
    assert found["learned_simulation"] is None
    assert found["simulation_left_out"] is None


@pytest.mark.parametrize("codec", [{}, MAPL])
def test_below_the_rate_that_binds_the_link_is_the_bottleneck(
    codec: dict[str, Any], tiny: TinyConfig, tmp_path: Path
) -> None:
    config = tiny({"pipeline.stages": 2, **codec})
    run = recorded(tmp_path / "run", config)
    rate = compared(run, config)["run_simulation"]["bound_below_bits_per_s"]
    busiest = []
    for factor in (0.9, 1.1):
        link = config.link.model_copy(update={"link": f"{factor * rate / 1000:.3f}kbit"})
        capped = config.model_copy(update={"link": link})
        busiest.append(plan(capped, resolve_architecture(config), times_measured(run, config))[0]["bottleneck"])
    assert "link" in busiest[0]
    assert "compute" in busiest[1]


def test_the_thinner_link_holds_dense_training_up_by_half(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "link.link": "300mbit,3ms", **MAPL})
    found = compared(recorded(tmp_path / "run", config), config)
    dense, own = found["dense_simulation"], found["run_simulation"]
    assert dense["thinner_link"] == own["thinner_link"]
    assert dense["thinner_link"].endswith("mbit,3ms")
    assert dense["thinner_tokens_per_s"] < 0.6 * dense["tokens_per_s"]
    assert own["thinner_tokens_per_s"] > dense["thinner_tokens_per_s"]


def test_what_to_try_next_depends_on_what_was_run(tiny: TinyConfig, tmp_path: Path) -> None:
    def words(codec: dict[str, Any], link: str, mode: str = "swarm", steps: int = 3) -> list[str]:
        config = tiny({"pipeline.stages": 2, "link.link": link, **codec})
        run = recorded(tmp_path / f"{len(list(tmp_path.iterdir()))}" / "run", config, steps=steps)
        return shlex.split(compared(run, config, mode=mode)["try_next"]["command"])

    def follows(option: str, found: list[str]) -> str:
        return found[found.index(option) + 1]

    thinner = words(MAPL, "300mbit,3ms")
    assert follows("--link", thinner) not in ("300mbit,3ms", "none")
    assert follows("--codec", thinner) == "mapl:r=8"
    assert not [word for word in thinner if "_lr" in word]  # the codec brings them
    assert follows("--codec", words(MAPL, "10kbit")) == "bf16"
    assert follows("--codec", words(MAPL, "300mbit", steps=1)) == "bf16"  # not simulated
    learned = words({}, "300mbit,3ms")
    assert "--codec" not in learned  # the default is
    assert follows("--link", learned) == "300mbit,3ms"
    assert follows("--out", learned).endswith("/mapl")
    assert follows("--link", words(MAPL, "none", "one-process")) == "300mbit,25ms"
    assert follows("--stages", learned) == "2"
    here = compared(Path("."), tiny(), mode="one-process")  # as `thinpipe summary .`
    assert follows("--out", shlex.split(here["try_next"]["command"])) == "swarm"
    assert "data.heldout_sequences=8" in learned  # nothing of the run is lost


def test_the_command_is_one_that_up_takes(tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it means the same run, another link aside."""
    settings = {"pipeline.stages": 2, "pipeline.cut": "1,3", "pipeline.speeds": "0.5,1", "compute.compile": True}
    config = tiny({**settings, "optim.clip": 0.5, **MAPL})
    found = compared(recorded(tmp_path / "run", config), config)
    started: list[RunConfig] = []

    def run_local(settings: RunConfig, *_: Any, **__: Any) -> dict[str, Any]:
        started.append(settings)
        return {}

    monkeypatch.setattr("thinpipe.node.local.run_local", run_local)
    result = CliRunner().invoke(app, shlex.split(found["try_next"]["command"])[1:])
    assert result.exit_code == 0, result.output
    assert started[0].digest() == config.digest()


@pytest.mark.parametrize("fault", ["too few steps", "no record", "broken", "one stage", "large"])
def test_a_run_that_cannot_be_simulated_ends_well_and_says_why(
    fault: str, tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({"pipeline.stages": 1 if fault == "one stage" else 2})
    run = recorded(tmp_path / "run", config, steps=1 if fault == "too few steps" else 3)
    if fault == "no record":
        (run / "stage-1.jsonl").unlink()
    if fault == "broken":
        (run / "stage-1.jsonl").write_text('{"event": "step"}\n' * 3)
    if fault == "large":
        for module in (dense_comparison, cut_advice_module):
            monkeypatch.setattr(module, "MICROBATCHES_MAX", 7)
    found = compared(run, config)
    assert found["dense_simulation"] is found["run_simulation"] is None
    assert found["simulation_left_out"]
    assert fault == "one stage" or found["cut_advice"] is None
    assert closing_lines(found, Path())[0] == f"not compared with dense bf16: {found['simulation_left_out']}"


@pytest.fixture(scope="module")
def finished(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, from the command line."""
    from thinpipe.node.local import run_local

    out = tmp_path_factory.mktemp("finished") / "run"
    config = tiny({"pipeline.stages": 2, "pipeline.cut": "3,1", "run.steps": 6, "run.eval_every": 2, **MAPL})
    prepare_corpus(config)
    run_local(config, out, one_process=True, quiet=True)
    return out


def test_the_summary_on_disk_has_the_curve_and_the_comparison(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [step for step, _ in summary["loss_curve"]] == [1, 2, 3, 4, 5, 6]
    assert summary["loss_curve"][0][1] == summary["first_loss"]
    assert [step for step, _ in summary["evaluations"]] == [2, 4, 6]
    assert summary["evaluations"][-1][1] == summary["val_loss"]
    assert [stage["layers"] for stage in summary["stages"]] == [3, 1]
    assert summary["dense_simulation"]["tokens_per_s"] > 0
    assert summary["try_next"]["command"].startswith("thinpipe up ")
    again = CliRunner().invoke(app, ["summary", str(finished), "--json"])
    assert json.loads(again.stdout) == summary


@pytest.mark.parametrize("width", [80, 120])
def test_people_see_it_in_a_pipe_too(width: int, finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    out = io.StringIO()
    Console(file=out, width=width).print(*summary_tables(summary), sep="\n")
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "loss by step" in text
    assert "mapl:r=8" in text
    assert width == 80 or "mapl:r=8 (this run)" in text  # which a narrow terminal may break
    first, last = closing_lines(summary, Path())
    assert first.startswith("dense bf16 over instant links: ")
    assert first.endswith("(all stages in one process)")
    assert last.startswith("try: thinpipe up ")


def test_a_slow_stage_is_told_which_cut_would_help(tiny: TinyConfig) -> None:
    """Stage 1 takes four times as long for its half of the layers; all of them take stage 0 half as long."""
    config = tiny({"pipeline.stages": 2, "pipeline.cut": "equal"})
    architecture = resolve_architecture(config)
    work = operations(config, architecture).of_stages([2, 2])
    slow = (1, 4)
    times = [StageTimes(forward_s=each * by, backward_s=2 * each * by) for each, by in zip(work, slow, strict=True)]
    advice = cut_advice(costs_of(config), times)
    assert advice["layers"] == [2, 2]
    assert advice["best_layers"] == [4, 0]
    assert advice["gain"] > 1.5
    line = advice_line(advice, [0.25, 0.96])
    assert line == (
        f"stage 1 computes 96% of its time, stage 0 25%: --set pipeline.cut=4,0 would give {advice['gain']:.2g}x "
        "(simulated)"
    )
    alike = [StageTimes(forward_s=each, backward_s=2 * each) for each in work]
    assert advice_line(cut_advice(costs_of(config), alike), [0.9, 0.9]) is None


@pytest.mark.parametrize(
    ("machine", "told"),
    [("tiny@2x1tflops", True), ("tiny@2x1ms+2ms", False), ("tiny@2of4x1tflops", False)],
)
def test_no_cut_is_advised_where_it_would_change_nothing(
    machine: str, told: bool, tiny: TinyConfig, tmp_path: Path
) -> None:
    """Stages whose seconds are stated take them with any number of layers, and inner ones alone are no whole model."""
    config = tiny({"pipeline.stages": 2, "compute.emulate": machine, "checkpoint.every": 0})
    found = compared(recorded(tmp_path / "run", config), config)
    assert found["simulation_left_out"] is None
    assert (found["cut_advice"] is not None) == told


def test_a_codec_that_would_want_another_cut_is_compared_too(tiny: TinyConfig, tmp_path: Path) -> None:
    """Six stages of four layers end in a head alone, which no narrow boundary has before it."""
    config = tiny({"pipeline.stages": 6})
    found = compared(recorded(tmp_path / "run", config), config)
    assert found["simulation_left_out"] is None
    assert found["learned_simulation"]["tokens_per_s"] > 0


def test_a_stage_without_work_or_time_says_nothing_of_its_machine() -> None:
    def times(*seconds: float) -> list[StageTimes]:
        return [StageTimes(forward_s=each, backward_s=2 * each) for each in seconds]

    assert measured_speeds([0.0, 3.0, 3.0], times(0.0, 1.0, 2.0)) == [0.75, 1.0, 0.5]
    assert measured_speeds([0.0, 3.0, 3.0], times(9.0, 1.0, 2.0)) == [0.75, 1.0, 0.5]
    assert measured_speeds([3.0, 3.0, 3.0], times(0.0, 1.0, 2.0)) == [0.75, 1.0, 0.5]
    for work in ([0.0, 0.0], [3.0, 3.0]):
        with pytest.raises(StageWorkError, match="no stage computed anything, so nothing is known of the machines"):
            measured_speeds(work, times(0.0, 0.0))


def test_times_of_one_cut_say_what_another_would_take(tiny: TinyConfig) -> None:
    before, after = (tiny({"pipeline.stages": 3, "pipeline.cut": cut}) for cut in ("2,1,1", "0,3,1"))
    architecture = resolve_architecture(before)
    costs = operations(before, architecture)
    times = [StageTimes(forward_s=1.0, backward_s=2.0, weight_s=0.8, step_s=0.1)] * 3
    moved = times_recut(before, after, architecture, times)
    assert moved[0].forward_s == 0.0
    assert moved[1].backward_s == pytest.approx(6.0)
    assert moved[1].weight_s == pytest.approx(2.4)
    assert moved[2] == times[2]
    back = times_recut(after, before, architecture, moved)
    assert back[1].forward_s == pytest.approx(1.0)
    assert back[0].forward_s + back[0].backward_s == pytest.approx(
        2 * costs.layer / statistics.median([costs.layer / 3.0, (costs.layer + costs.head) / 3.0])
    )
    with pytest.raises(ConfigError, match=r"times of 3 stages say nothing of 2; keep pipeline\.stages"):
        times_recut(before, tiny({"pipeline.stages": 2}), architecture, times)
