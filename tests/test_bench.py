"""`thinpipe bench`: windows and verdicts from records, cells that fail, are too long or were measured before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.codec_words import split_codecs
from thinpipe.node.measuring import bench_grid
from thinpipe.node.measuring.bench_cells import BenchGrid
from thinpipe.sim.launch.bench_cell import WARM_UP_STEPS, WINDOWS, Cell, measure
from thinpipe.sim.reports.bench_report import bench_tables
from typer.testing import CliRunner

from .preloaded import start

pytestmark = pytest.mark.alone

TOKENS, STEP_S, RATE = 1000, 2.0, 8e6


def record(
    directory: Path,
    *,
    seconds: list[float],
    late_s: float = 0.0,
    cpu_s: float = 0.1,
    probed: float | None = RATE,
    busy: float = RATE,
) -> Cell:
    """Records of two stages whose steps took so long; each sends 1,000 bytes of tensors a step, and the probe."""
    directory.mkdir(exist_ok=True)
    for stage, direction in enumerate(("forward", "backward")):
        now = 100.0
        way = {"boundary": 0, "direction": direction}
        check = {**way, "measured_bits_per_s": probed if stage else RATE}
        lines: list[dict[str, Any]] = [{"event": "ready", "link_check": [check]}]
        for step, took in enumerate(seconds):
            now += took
            sent = {"boundary 0-1": {"activation": 1000 * (step + 1), "probe": 5000, "evaluation": 7 * step}}
            lines.append(
                {
                    "event": "step",
                    "step": step,
                    "time_s": now,
                    "tokens": TOKENS,
                    "compute_s": 1.0,
                    "codec_s": 0.1,
                    "wait_s": 0.5,
                    "cpu_s": cpu_s,
                    "sent_bytes": sent,
                    "codec": {"emulated_s": 1.0, "late_s": late_s if stage else 0.0},
                }
            )
        link = {
            **way,
            "configured_bits_per_s": RATE,
            "measured_bits_per_s": busy if stage else RATE,
        }
        lines.append({"event": "end", "links": [link], "peak_rss_bytes": 1})
        (directory / f"stage-{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Cell(name="cell", stages=2, window_steps=(len(seconds) - WARM_UP_STEPS) // WINDOWS, emulated=True)


def test_windows_leave_the_warm_up_out(tmp_path: Path) -> None:
    figures = measure(tmp_path, record(tmp_path, seconds=[60.0] + [STEP_S] * 6))
    assert figures["tokens_per_s"] == pytest.approx(TOKENS / STEP_S)
    assert figures["windows"] == pytest.approx([TOKENS / STEP_S] * 3)
    assert figures["spread"] == pytest.approx(0)
    assert figures["bytes_per_token"] == pytest.approx(2 * 1000 / TOKENS)  # both stages; no probe, no evaluation
    assert figures["utilisation"] == pytest.approx(1000 * 8 / STEP_S / RATE)
    assert figures["stages"][0]["wait_s"] == pytest.approx(0.5 / STEP_S)
    assert figures["cpu_s_per_gb"] == pytest.approx(2 * 0.1 / 2000e-9)  # both stages, 2,000 bytes a step
    assert figures["problems"] == []


def test_lanes_are_added_up_and_what_they_average_is_a_figure_of_its_own(tmp_path: Path) -> None:
    """Steps 0 to 2 warm up, since rounds are used two steps after they are made; the last one is no other's like."""
    lanes = [record(tmp_path / f"lane-{lane}", seconds=[60.0] * 3 + [STEP_S] * 6 + [50.0]) for lane in range(2)]
    for lane in range(2):
        for stage in range(2):
            path = tmp_path / f"lane-{lane}" / f"stage-{stage}.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                if line["event"] == "step":
                    line["sent_bytes"][f"lateral {stage}: lane 0-1"] = {"averaging": 600 * line["step"], "control": 9}
                if line["event"] == "end":
                    line["links"].append({"peer_lane": 1 - lane, "configured_bits_per_s": RATE})
                    line["links"][-1]["measured_bits_per_s"] = 1.2 * RATE if (lane, stage) == (1, 0) else RATE
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cell = Cell(name="cell", stages=2, window_steps=2, emulated=True, lanes=2, delay=2)
    assert cell.steps == lanes[0].steps == 10
    figures = measure(tmp_path, cell)
    assert figures["tokens_per_s"] == pytest.approx(2 * TOKENS / STEP_S)
    assert figures["windows"] == pytest.approx([2 * TOKENS / STEP_S] * 3)
    assert figures["bytes_per_token"] == pytest.approx(2 * 1000 / TOKENS)
    assert figures["averaging_bytes_per_token"] == pytest.approx(2 * 600 / TOKENS)
    assert figures["stages"][0]["wait_s"] == pytest.approx(0.5 / STEP_S)
    assert len(figures["links"]) == 8
    lateral = [link for link in figures["links"] if link["name"] == "lateral 1: lane 0-1"]
    assert [link["utilisation"] for link in lateral] == pytest.approx([600 * 8 / STEP_S / RATE] * 2)
    assert figures["problems"] == ["lateral 0: lane 0-1: 9.6 Mb/s passed, the link is set to 8.0 Mb/s"]


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "unsteady": ({"seconds": [1, 2, 2, 2, 2, 2.1, 2.1]}, "no steady state: windows differ by 4.8%"),
    "late": ({"late_s": 0.05 * STEP_S}, "did not keep the pace: compute was late for 5.0% of the time"),
    "busy": ({"cpu_s": 100.0}, "did not keep the pace: .* of its cores were busy"),
    "slow link": ({"probed": 0.85 * RATE}, "boundary 0-1 backward: the probe measured 6.8 Mb/s, .* set to 8.0"),
    "no probe": ({"probed": None}, "boundary 0-1 backward: the probe measured nothing"),
    "no cap": ({"busy": 1.2 * RATE}, "boundary 0-1 backward: 9.6 Mb/s passed, the link is set to 8.0"),
}


@pytest.mark.parametrize("fault", PROBLEMS)
def test_a_cell_that_does_not_count_says_why(fault: str, tmp_path: Path) -> None:
    made, expected = PROBLEMS[fault]
    cell = record(tmp_path, **{"seconds": [STEP_S] * 7, **made})
    (problem,) = measure(tmp_path, cell)["problems"]
    assert re.search(expected, problem), problem


def test_a_run_that_broke_off_is_not_measured(tmp_path: Path) -> None:
    cell = record(tmp_path, seconds=[STEP_S] * 7)
    file = tmp_path / "stage-1.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[2:]))
    with pytest.raises(ValueError, match="has not all of its 7 steps on record"):
        measure(tmp_path, cell)


def test_codecs_are_told_apart_at_commas() -> None:
    text = "bf16,mapl:r=32,anchors=full int4 int3,int8,mapl rvq:groups=4,delta=drift/16 rvq"
    assert split_codecs(text) == [
        "bf16",
        "mapl:r=32,anchors=full int4 int3",
        "int8",
        "mapl rvq:groups=4,delta=drift/16 rvq",
    ]


def test_every_codec_has_its_uncapped_cell_first() -> None:
    grid = BenchGrid(
        machines=("tiny@2x1ms+1ms",), codecs=("bf16", "int8"), links=("1mbit", "none"), schedules=("1f1b",), settings={}
    )
    assert [(cell.codec, str(cell.link)) for cell in grid.cells()] == [
        ("bf16", "none"),
        ("bf16", "1mbit"),
        ("int8", "none"),
        ("int8", "1mbit"),
    ]


def test_lanes_and_ways_to_average_are_cells_of_their_own() -> None:
    of = {"machines": ("tiny@2x1ms+1ms",), "codecs": ("bf16",), "links": ("1mbit",), "schedules": ("1f1b",)}
    grid = BenchGrid(**of, settings={}, lanes=(1, 2), averages=("outer:every=2", "gradients"))
    cells = list(grid.cells())
    lanes = [cell.config("1f1b", 1).lanes for cell in cells]
    assert [(each.count, each.average) for each in lanes if each.count > 1] == [
        *[(2, "outer:every=2")] * 2,
        *[(2, "gradients")] * 2,
    ]
    assert [str(cell.link) for cell in cells] == ["none", "1mbit"] * 3
    assert len({cell.name for cell in cells}) == 6
    by_settings = BenchGrid(**of, settings={"lanes.count": 3})
    assert [cell.config("1f1b", 1).lanes.count for cell in by_settings.cells()] == [3, 3]


def test_chunks_and_ways_to_share_keys_and_values_are_cells_of_their_own() -> None:
    of = {"machines": ("tiny@2x1ms+1ms",), "codecs": ("bf16",), "links": ("1mbit",), "schedules": ("1f1b",)}
    cells = list(BenchGrid(**of, settings={}, lanes=(1,), chunks=(2, 4), contexts=("full", "mos")).cells())
    configs = [cell.config("1f1b", 1) for cell in cells]
    assert [(each.lanes.count, each.context.method) for each in configs[::2]] == [
        (1, ""),
        *[(count, method) for count in (2, 4) for method in ("full", "mos")],
    ]
    assert {each.lanes.average for each in configs[2:]} == {"gradients"}
    assert len({cell.name for cell in cells}) == 10


BENCH_S = 250.0
SMALL = ("--microbatches", "4", "--batch-size", "8", "--sequence-length", "64", "--window", "0.5")


def bench(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, ["bench", "--json", "--out", str(out), *SMALL, *arguments])
    return result.exit_code, json.loads(result.stdout), result.stderr


def bench_process(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The same as a process, whose nodes are copies of it."""
    with (out / "told").open("w+") as told, (out / "words").open("w+") as words:
        process = start(["bench", "--json", "--out", str(out), *SMALL, *arguments], told, words)
        code = process.wait(BENCH_S)
        return code, json.loads((out / "told").read_text()), (out / "words").read_text()


@pytest.mark.slow
def test_cells_are_measured_marked_planned_and_not_measured_twice(tmp_path: Path) -> None:
    """A real swarm of two processes, at a pace that this machine surely keeps."""
    arguments = ("--emulate", "tiny@2x10ms+20ms", "--codec", "bf16", "--link", "20mbit,5ms", "--link", "1kbit")
    _, found, _ = bench_process(tmp_path, *arguments, "--limit", "60")
    uncapped, capped, long = found["cells"]
    assert uncapped["measured"]["tokens_per_s"] < 8 * 64 / (4 * 0.03)  # what compute allows
    assert capped["schedule"].startswith("1f1b")
    assert 0.3 < capped["share_of_uncapped"] < 1.2  # a busy machine may do anything to it, within reason
    assert capped["planned"]["tokens_per_s"] > 0
    assert capped["measured"]["utilisation"] > 0.2
    assert (long["state"], "measured" in long) == ("planned", False)
    assert "--limit is 60" in long["problems"][0]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    _, again, told = bench_process(tmp_path, *arguments, "--limit", "60")
    assert told.count("measured before") == 2
    assert again["cells"][0]["measured"] == uncapped["measured"]
    console = Console(width=80, record=True)
    console.print(*bench_tables(found), sep="\n")
    shown = console.export_text()
    assert re.search(r"1kbit +1f1b\S* +\([0-9.,]+\) +- +- +- +- +planned", shown), shown


@pytest.mark.slow
def test_cells_of_lanes_stand_beside_one_lane(tmp_path: Path) -> None:
    """Real swarms of two and of four processes."""
    arguments = ("--emulate", "tiny@2x20ms+40ms", "--codec", "mapl:r=8", "--link", "20mbit,5ms")
    averages = ("--average", "outer:every=2,delay=1", "--set", "model.vocab_size=512", "--set", "model.width=64")
    _, found, told = bench_process(tmp_path, *arguments, "--lanes", "1", "--lanes", "2", *averages)
    one, two = found["cells"][1], found["cells"][3]
    assert [(cell["lanes"], cell["average"]) for cell in (one, two)] == [(1, None), (2, "outer:every=2,delay=1")]
    assert "share_of_lanes" not in one
    alone = 2 * one["measured"]["tokens_per_s"]
    if one["state"] == "ok":  # a busy machine may do anything to it
        assert two["share_of_lanes"] == two["measured"]["tokens_per_s"] / alone
    planned, measured = two["planned"]["lanes"]["bytes_per_token"], two["measured"]["averaging_bytes_per_token"]
    assert measured == pytest.approx(planned, rel=0.2)  # heartbeats too, and what is under way when a window ends
    assert one["measured"]["averaging_bytes_per_token"] == 0
    title = "cell 4 of 4: mapl:r=8 over 20mbit,5ms, tiny@2x20ms+40ms, 2 lanes, outer:every=2,delay=1"
    assert title in " ".join(told.split())
    console = Console(width=100, record=True)
    console.print(*bench_tables(found), sep="\n")
    shown = console.export_text()
    assert "lanes: outer:every=2,delay=1" in " ".join(shown.split())
    assert re.search(r"20mbit,5ms +1f1b\S* +2 +[0-9,]+ +([0-9.]+|-) +[0-9.]+ ", shown), shown


@pytest.mark.slow
def test_cells_of_chunks_exchange_what_was_planned(tmp_path: Path) -> None:
    """A real swarm of two processes, whose keys and values take their time."""
    arguments = ("--emulate", "tiny@1x100ms+200ms", "--codec", "bf16", "--link", "8mbit,20ms")
    average = ("--average", "outer:every=2,delay=1", "--set", "model.vocab_size=512")
    longer = ("--microbatches", "1", "--batch-size", "2", "--sequence-length", "1024")
    _, found, _ = bench(tmp_path, *arguments, "--chunks", "2", "--context", "full:format=int8", *average, *longer)
    uncapped, capped = found["cells"]
    assert (capped["lanes"], capped["context"]) == (2, "full:format=int8")
    # A token is looked at by one other lane, or, of the last of four segments, by none; four layers.
    planned = 3 / 4 * 4 * 2 * 512 * (1 + 2 / 128)
    assert capped["measured"]["context_bytes_per_token"] == pytest.approx(planned, rel=0.03)
    assert capped["planned"]["tokens_per_s"] < 0.7 * capped["planned"]["uncapped_tokens_per_s"]
    assert capped["measured"]["tokens_per_s"] < 1.05 * capped["planned"]["tokens_per_s"]
    assert capped["measured"]["tokens_per_s"] < uncapped["measured"]["tokens_per_s"]
    assert any(link["name"] == "context 0: lane 0-1" for link in capped["measured"]["links"])
    console = Console(width=100, record=True)
    console.print(*bench_tables(found), sep="\n")
    assert "chunks: full:format=int8" in " ".join(console.export_text().split())


@pytest.mark.slow
def test_two_microbatches_in_flight_are_as_quick_as_planned(tmp_path: Path) -> None:
    """What is waited for hides behind the other microbatch. A busy machine is slower by some per cent."""
    arguments = ("--emulate", "tiny@1x100ms+200ms", "--codec", "bf16", "--link", "40mbit,20ms", "--chunks", "2")
    average = ("--average", "outer:every=2,delay=1", "--set", "model.vocab_size=512")
    longer = ("--microbatches", "2", "--batch-size", "2", "--sequence-length", "4096")
    _, found, _ = bench(tmp_path, *arguments, "--context", "mos:format=int8,backward=int8", *average, *longer)
    capped = found["cells"][1]
    planned, measured = capped["planned"], capped["measured"]["tokens_per_s"]
    assert planned["tokens_per_s"] > 0.95 * planned["uncapped_tokens_per_s"]
    # One after the other they would reach three quarters of it.
    assert 0.85 * planned["tokens_per_s"] < measured < 1.05 * planned["tokens_per_s"]


@pytest.mark.slow
def test_a_cell_that_fails_is_marked_and_the_rest_goes_on(tmp_path: Path) -> None:
    """One stage is told to keep less than a message in memory, which no node accepts."""
    arguments = ("--emulate", "tiny@2x1ms+1ms", "--codec", "bf16", "--link", "20mbit", "--set", "compute.device=cuda")
    code, found, _ = bench(tmp_path, *arguments)
    assert code == 1
    assert [cell["state"] for cell in found["cells"]] == ["failed", "failed"]
    assert "cuda" in found["cells"][0]["problems"][0]


REFUSED: list[tuple[list[str], str]] = [
    (["--link", "80mbit"], "say how stages compute"),
    (["--emulate", "tiny@2x1tflops"], "say over which links: --link 300mbit,25ms or --sweep"),
    (["--emulate", "tiny@2", "--link", "80mbit"], "an emulated machine is PRESET@STAGES"),
    (["--free-running", "tiny", "--link", "80mbit"], r"--free-running: 'tiny' is not PRESET@STAGES"),
    (["--emulate", "tiny@2x1tflops", "--link", "0mbit"], "link rate 0"),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbps"], "unknown unit 'mbps'"),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--codec", "int9"], "int9"),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--codec", "bf16 int8 int8 int8"],
        "has 4 parts; write CODEC",
    ),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--schedule", "2f2b"], "unknown schedule '2f2b'"),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--microbatches", "7"], "does not divide"),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--set", "optim.moun_lr=1"],
        "unknown setting 'optim.moun_lr'",
    ),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--lanes", "65"], r"lanes\.count"),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--lanes", "2", "--average", "gossip"],
        r"lanes\.average: unknown averaging 'gossip'",
    ),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--lanes", "2", "--set", "lanes.count=3"],
        r"--lanes beside --set lanes\.count: which of the two is meant\? Omit one",
    ),
    (
        [
            "--free-running",
            "tiny@2",
            "--link",
            "80mbit",
            "--lanes",
            "2",
            "--average",
            "outer:every=90000,fragments=90000",
        ],
        "fragments=90000 are more than the",
    ),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--chunks", "3"],
        r"1024 tokens is not 6 equal segments, which 3 chunks in zigzag order need; choose a length such as 1026",
    ),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--chunks", "2", "--context", "fool"],
        r"context\.method: unknown context method 'fool'",
    ),
    (["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--context", "full"], "--context is for chunks; say how many"),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--chunks", "2", "--set", "lanes.count=3"],
        r"--chunks beside --set lanes\.count: which of the two is meant\? Omit one",
    ),
    (["--emulate", "tiny@64x1tflops", "--link", "80mbit"], "64 stages, but the model has 4 layers"),
    (["--free-running", "tiny@64", "--link", "80mbit"], "64 stages, but the model has 4 layers"),
    (
        ["--emulate", "tiny@2of4x1tflops", "--link", "80mbit", "--set", "pipeline.cut=3,1"],
        "2 of 4 stages are emulated as equal inner ones; omit it",
    ),
    (
        ["--emulate", "tiny@2x1tflops", "--link", "80mbit", "--schedule", "1f1b,gpipe:rtt_ratio=auto"],
        "'gpipe:rtt_ratio=auto': there is no depth to choose for gpipe",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test that fails does not start 64 processes.
    monkeypatch.setattr(bench_grid, "run_cell", lambda *_: pytest.fail("a cell was run"))
    out = tmp_path / "bench"
    result = CliRunner().invoke(app, ["bench", "--out", str(out), *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert re.search(expected, line), line
    assert not out.exists()
