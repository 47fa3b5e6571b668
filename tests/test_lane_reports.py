"""Lanes in reports, from records as nodes of several lanes write them: figures, the live line, summary, `thinpipe top`,
Prometheus, and whether the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from rich.console import Console
from thinpipe.sim.reports.figures import LATERAL, StageFigures
from thinpipe.sim.reports.lanes_summary import averaging_lines, summarise_run
from thinpipe.sim.reports.liveness import liveness
from thinpipe.sim.reports.progress import Progress
from thinpipe.sim.reports.prometheus_metrics import families, read_figures
from thinpipe.sim.reports.run_console import summary_tables
from thinpipe.sim.reports.run_display import RunDisplay, describe
from thinpipe.sim.reports.top_data import look, sources
from thinpipe.sim.reports.top_view import frame

LANES, STAGES, STEPS, WIDTH = 2, 2, 4, 16
TOKENS = 100  # a step of a lane
SENT = {"activation": 300, "control": 20}  # over the boundary, a step
ACROSS = {"averaging": 500, "control": 7}  # over a lateral link, a step: both kinds are what the averaging costs


def start(lane: int, stage: int, **more: Any) -> dict[str, Any]:
    where = {"stage": stage, "stages": STAGES, "lane": lane, "lanes": LANES, "run": "demo", "steps": STEPS}
    return {"event": "start", "time_s": 100.0, **where, "host": "elsewhere", "process": 7, "resume": False, **more}


def step(lane: int, stage: int, number: int) -> dict[str, Any]:
    lateral = {
        "peer_lane": 1 - lane,
        "configured_bits_per_s": 8e7,
        "measured_bits_per_s": 7e7,
        "used_bits_per_s": 4e7,
        "received_bytes": 507 * (number + 1),
    }
    sent = {"boundary 0-1": SENT, f"lateral {stage}: lane 0-1": ACROSS}
    return {
        "event": "step",
        "time_s": 101.0 + number + lane / 2,
        "step": number,
        "loss": 5.0 + lane - number / 10,
        "tokens": TOKENS,
        "seconds": 0.5,
        "compute_s": 0.2,
        "codec_s": 0.1,
        "wait_s": 0.1,
        "sent_bytes": {
            name: {kind: count * (number + 1) for kind, count in rows.items()} for name, rows in sent.items()
        },
        "dense_bytes": 2 * WIDTH * TOKENS,
        "links": [lateral],
    }


def used(number: int, *, members: Sequence[int] = (0, 1), digest: str = "d") -> dict[str, Any]:
    own = {"number": number, "fragment": 0, "members": list(members), "digest": f"{digest}{number}", "norm": 0.5}
    return {"event": "round", "time_s": 102.0, **own, "waited_s": 0.25}


def ended(lane: int, stage: int) -> dict[str, Any]:
    spent = dict.fromkeys(("train_s", "cpu_s", "compute_s", "codec_s", "wait_s"), 2.0)
    way = {"boundary": 0, "direction": "backward" if stage else "forward"}
    rates = {"configured_bits_per_s": None, "measured_bits_per_s": None, "utilisation": None, "received_bytes": 0}
    links = [
        {**way, **rates, "sent_bytes": {kind: STEPS * count for kind, count in SENT.items()}},
        {"peer_lane": 1 - lane, **rates, "sent_bytes": {kind: STEPS * count for kind, count in ACROSS.items()}},
    ]
    state = {"peak_rss_bytes": 1, "state_bytes": 1, "state_sha256": f"{lane}{stage}" * 32, "layers": 1, "parameters": 9}
    return {"event": "end", "time_s": 110.0, "stage": stage, "steps": STEPS, **spent, **state, "links": links}


def write(run: Path, lane: int, stage: int, *records: dict[str, Any]) -> None:
    directory = run / f"lane-{lane}"
    directory.mkdir(exist_ok=True)
    with (directory / f"stage-{stage}.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def settings(run: Path) -> Path:
    (run / "run.toml").write_text(f"[run]\nsteps = {STEPS}\n[pipeline]\nstages = {STAGES}\n[lanes]\ncount = {LANES}\n")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run, of two rounds."""
    for lane in range(LANES):
        for stage in range(STAGES):
            steps = [step(lane, stage, number) for number in range(STEPS)]
            held_out = {"event": "evaluation", "time_s": 109.0, "step": STEPS - 1, "val_loss": 4.0 + lane, "tokens": 9}
            records = [start(lane, stage), *steps[:2], used(0), *steps[2:], used(1), held_out, ended(lane, stage)]
            write(tmp_path, lane, stage, *records)
    return settings(tmp_path)


def summary_of(run: Path) -> dict[str, Any]:
    return summarise_run(run, lanes=LANES, stages=STAGES, width=WIDTH, mode="swarm", of_steps=STEPS)


def drawn(*parts: Any, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as said:
        console.print(*parts, sep="\n")
    return said.get()


# -- the summary ------------------------------------------------------------------------------------------------------


def test_losses_are_means_of_lanes_and_the_averaging_is_beside_the_ratio(run: Path) -> None:
    found = summary_of(run)
    assert (found["first_loss"], found["train_loss"], found["val_loss"]) == pytest.approx((5.5, 5.2, 4.5))
    assert found["tokens"] == LANES * STEPS * TOKENS
    assert found["tokens_per_step"] == LANES * TOKENS
    assert found["tokens_per_s"] == LANES * TOKENS / 0.5  # beside each other
    sent = LANES * STAGES * STEPS * 320
    assert found["bytes"]["total"] == sent
    assert found["ratio"] == LANES * STEPS * 2 * 2 * WIDTH * TOKENS / sent
    assert found["bytes"]["averaging"] == found["averaging"]["bytes"] == LANES * STAGES * STEPS * 507
    assert found["bytes"]["control"] == LANES * STAGES * STEPS * 20  # of the boundary alone
    assert found["averaging"]["bytes_per_token"] == STAGES * 507 / TOKENS
    assert found["averaging"]["rounds"] == 2
    assert {each["wait_s"] for each in found["averaging"]["waited"]} == {0.5}
    assert [lane["val_loss"] for lane in found["lanes"]] == [4.0, 5.0]
    assert [lane["ratio"] for lane in found["lanes"]] == [found["ratio"]] * 2
    assert [(each["lane"], each["boundary"]) for each in found["boundaries"]] == [(0, 0), (1, 0)]
    assert [(each["lane"], each["stage"]) for each in found["stages"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found["loss_curve"][0] == [1, 5.5]
    assert averaging_lines(found) == []


def test_lanes_of_one_process_take_turns(run: Path) -> None:
    found = summarise_run(run, lanes=LANES, stages=STAGES, width=WIDTH, mode="one-process", of_steps=STEPS)
    assert found["tokens_per_s"] == TOKENS / 0.5


def test_the_tables_tell_lanes_apart(run: Path) -> None:
    text = drawn(*summary_tables({**summary_of(run), "dense_simulation": None}))
    assert "4 steps of 200 tokens (swarm, 2 lanes: means and sums)" in text
    assert "5.500 -> 5.200" in text
    for lane, loss in ((0, "4.0000"), (1, "5.0000")):
        assert any(
            line.split("│")[1].strip() == f"{lane}" and loss in line for line in text.splitlines() if "│" in line
        )
        assert f"lane {lane}: 0-1 forward" in text
    assert "averaging between lanes" in text
    assert "0.5 s (stage 0 of lane 0)" in text
    narrow = drawn(*summary_tables({**summary_of(run), "dense_simulation": None}), width=80)
    assert "…" not in narrow
    assert "5.500 -> 5.200" in narrow


def test_lanes_that_used_other_contributions_are_named(run: Path) -> None:
    write(run, 1, 1, used(1, digest="other"))  # as if lane 1 had been set back, and took something else
    assert averaging_lines(summary_of(run)) == [
        "stage 1: lanes 0, 1 used different contributions in round 1, so they are not one model from then on; begin "
        "again from a checkpoint before it"
    ]


def test_a_round_without_a_lane_is_counted(run: Path) -> None:
    for lane in range(LANES):
        for stage in range(STAGES):
            write(run, lane, stage, used(1, members=[0]))
    assert averaging_lines(summary_of(run)) == ["1 round of 2 without all lanes"]


def test_lanes_that_never_averaged_are_said(run: Path) -> None:
    for path in run.glob("lane-*/*.jsonl"):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"round"' not in line))
    (line,) = averaging_lines(summary_of(run))
    assert line.startswith("no round is on record")


def test_faults_are_of_all_lanes_in_the_order_of_time(run: Path) -> None:
    for lane, at_s in ((0, 108.0), (1, 107.0)):
        write(run, lane, 1, {"event": "fault", "time_s": at_s, "code": "checkpoint", "reason": f"disk {lane}"})
    faults = summary_of(run)["faults"]
    assert [(each["lane"], each["stage"], each["reason"]) for each in faults] == [(1, 1, "disk 1"), (0, 1, "disk 0")]


# -- while it trains --------------------------------------------------------------------------------------------------


def test_the_live_line_is_of_all_lanes(run: Path) -> None:
    figures = Progress(run, stages=STAGES, lanes=LANES).look()
    assert [(of.lane, of.stage) for of in figures] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert describe(figures) == (
        "2 lanes: loss 5.200  400 tokens/s  6 bytes/token  ratio 10.00x  averaging 10 bytes/token"
    )


def test_the_lane_that_is_behind_leads(tmp_path: Path) -> None:
    for lane in range(LANES):
        for stage in range(STAGES):
            write(tmp_path, lane, stage, start(lane, stage), *(step(lane, stage, n) for n in range(1 + 2 * lane)))
    console = Console(width=200, force_terminal=False)
    with console.capture() as said, RunDisplay(console, steps=STEPS) as display:
        display.update(Progress(tmp_path, stages=STAGES, lanes=LANES).look())
    assert said.get().startswith("step 1/4  2 lanes: ")


def test_lanes_may_go_on_from_different_steps() -> None:
    figures = [StageFigures(stage, lane=lane, lanes=LANES) for lane in range(LANES) for stage in range(STAGES)]
    console = Console(width=200, force_terminal=False)
    back = {"event": "rollback", "time_s": 100.0, "generation": 1, "source": "disk"}
    with console.capture() as said, RunDisplay(console, steps=STEPS, resumes=0) as display:
        for of in figures:
            of.take(start(of.lane, of.stage))
            display.update(figures)
            of.take({**back, "completed": 2 + of.lane})
        display.update(figures)
    assert said.get().splitlines() == ["lane 0 resumes after step 2 of 4", "lane 1 resumes after step 3 of 4"]


def test_a_lateral_link_is_no_boundary(run: Path) -> None:
    of = Progress(run, stages=STAGES, lanes=LANES).look()[3]
    link = of.links[0, LATERAL]
    assert (link.sent_bytes, link.received_bytes) == ({"averaging": 2000, "control": 28}, 507 * STEPS)
    assert (link.configured_bits_per_s, link.measured_bits_per_s) == (8e7, 7e7)
    assert (of.moved_bytes, of.averaging_bytes) == (STEPS * 320, STEPS * 507)
    assert of.ratio == 2 * WIDTH * TOKENS / 320
    assert (of.rounds, of.round_wait_s) == (2, 0.5)
    assert of.round
    assert (of.round.number, of.round.members) == (1, 2)


@pytest.mark.parametrize("name", ["lateral 0: lane 0-7", "lateral 0: lane 1-1", "lateral 0: lane 0-99", "lateral "])
def test_a_lateral_link_of_others_is_refused(name: str) -> None:
    of = StageFigures(0, lane=1, lanes=2)
    with pytest.raises(ValueError, match=r"lateral link of lane 1|no lane 99"):
        of.take({**step(1, 0, 0), "sent_bytes": {name: {"averaging": 1}}})
    assert of.completed == 0


@pytest.mark.parametrize("width", [80, 200])
def test_top_shows_each_lane_and_all_together(run: Path, width: int) -> None:
    swarms = look(sources([run], []), 120.0)
    assert [(swarm.lane, swarm.lanes, swarm.size) for swarm in swarms] == [(0, 2, 2), (1, 2, 2)]
    text = drawn(frame(swarms, width=width, now_s=120.0), width=width)
    assert "2 lanes  loss 5.2000  400 tokens/s  averaging 10.1 bytes/token  round 1" in text
    assert "1 → lane 0" in text
    assert "0 → lane 1" in text
    assert str(run / "lane-1")[-20:] in text or "lane-1" in text


def test_a_lane_s_directory_is_shown_by_itself(run: Path) -> None:
    (swarm,) = look(sources([run / "lane-1"], []), 120.0)
    assert (swarm.lane, swarm.lanes) == (1, 2)
    assert "1 of them seen" in drawn(frame([swarm], width=120, now_s=120.0))


def test_stages_of_two_lanes_are_not_one_swarm(run: Path) -> None:
    (run / "lane-0" / "stage-1.jsonl").unlink()
    (run / "lane-1" / "stage-0.jsonl").unlink()
    assert [sorted(swarm.stages) for swarm in look(sources([run], []), 120.0)] == [[0], [1]]


class _Figures(Collector):
    def __init__(self, figures: Sequence[StageFigures]) -> None:
        self.figures = figures

    def collect(self) -> Any:
        return [family for of in self.figures for family in families(of)]


def test_prometheus_has_the_lane_in_every_label(run: Path) -> None:
    own = Progress(run, stages=STAGES, lanes=LANES).look()[3]
    registry = CollectorRegistry()
    registry.register(_Figures([own]))
    text = generate_latest(registry).decode()
    assert all('lane="1"' in line for line in text.splitlines() if line and not line.startswith("#"))
    assert 'thinpipe_lateral_sent_bytes_total{kind="averaging",lane="1",peer_lane="0",stage="1"} 2000.0' in text
    (read,) = read_figures(text)
    assert (read.lane, read.lanes, read.stage) == (1, 2, 1)
    assert (read.rounds, read.round_wait_s) == (2, 0.5)
    assert read.round
    assert (read.round.number, read.round.members) == (1, 2)
    assert read.averaging_bytes == own.averaging_bytes
    assert (read.moved_bytes, read.ratio) == (own.moved_bytes, own.ratio)
    assert read.links[0, LATERAL].received_bytes == own.links[0, LATERAL].received_bytes


def test_a_run_of_one_lane_has_no_lane_in_its_labels() -> None:
    registry = CollectorRegistry()
    of = StageFigures(0)
    of.take({**start(0, 0), "lanes": 1})
    registry.register(_Figures([of]))
    assert "lane" not in generate_latest(registry).decode()


# -- whether it goes on -----------------------------------------------------------------------------------------------


def test_a_run_has_ended_when_all_lanes_have(run: Path) -> None:
    assert liveness(run, 120.0).state == "ended"
    path = run / "lane-1" / "stage-1.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"end"' not in line))
    found = liveness(run, 1000.0)
    assert (found.state, found.completed) == ("not ended", STEPS)
    assert [(row["lane"], row["stage"]) for row in found.stages] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "(lane 0 ended; lane 1: stage 0 ended, stage 1 training" in found.line()


def test_a_lane_without_records_is_said(run: Path) -> None:
    for path in (run / "lane-1").iterdir():
        path.unlink()
    found = liveness(run, 120.0)
    assert (found.state, found.completed) == ("not ended", 0)
    assert found.line().endswith("(lane 0 ended; lane 1 no records)")
