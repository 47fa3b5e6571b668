"""`thinpipe top`: a live swarm and an ended one, over the disk and over HTTP, and all that may be wrong there."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.reports import top_data
from thinpipe.sim.reports.figures import StageFigures
from thinpipe.sim.reports.metrics_address import MetricsAddress
from thinpipe.sim.reports.prometheus_metrics import MetricsFormatError
from thinpipe.sim.reports.quantities import TIME_MAX_S
from thinpipe.sim.reports.record_tail import RecordTail
from thinpipe.sim.reports.summary import read_records
from thinpipe.sim.reports.top_console import show
from thinpipe.sim.reports.top_data import MetricsSource, StageView, SwarmView, TopError, look, sources
from thinpipe.sim.reports.top_view import Bar, frame
from typer.testing import CliRunner

from .conftest import TinyConfig
from .real_node import until
from .test_watch import LEARNED, ready, start, step


def drawn(swarms: list[SwarmView], width: int, now_s: float = 120.0) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(frame(swarms, width=width, now_s=now_s))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(len(line) <= width for line in text.splitlines())
    return text


def write(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three stages; stage 1 has written, stage 2 has broken off in a line, stage 0 nothing."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.toml").write_text("[run]\nsteps = 9\n[pipeline]\nstages = 3\n")
    faults = [
        {"event": "fault", "time_s": 100.0 + n, "code": f"code-{n}", "reason": f"why {n} [bold]\x1b[2J\n!"}
        for n in range(7)
    ]
    monkeypatch.setattr(
        "thinpipe.sim.reports.top_data.CLOCKS_S", math.inf
    )  # this process is younger than the records' times
    here = start(host=socket.gethostname(), process=os.getpid())
    write(out / "stage-1.jsonl", here, ready((0, "backward"), (1, "forward")), step(0, sent=1000), *faults)
    write(out / "stage-1.jsonl", step(1, sent=2000))
    write(out / "stage-2.jsonl", start(2), ready((1, "backward")))
    with (out / "stage-2.jsonl").open("a") as file:
        file.write('not a record\n[1]\n{"event": "step", "time_s": 5}\n{"event": "st')
    return out


# -- by eye, once and for all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_has_it_all_and_fits(run: Path, width: int) -> None:
    text = drawn(look(sources([run], []), 120.0), width)
    lines = text.splitlines()
    assert re.search(r"loss 4\.9000 +2,000 tokens/s +ratio 2\.22x +generation 0", text)
    assert "step 2/9" in text
    assert re.search(r"^0 +not seen", text, re.MULTILINE)
    assert re.search(r"1 +training +2/9 +4\.9000 +2,000 +40% +20% +30% +-", text)
    assert re.search(r"1 → 2 +█+[█─]*┃.* 33\.3% +300\.0 +290\.0 +100\.0", text)
    assert re.search(r"1 → 0 +█", text)
    assert re.search(r"1-2 +projector +1\.0, 0 +- +1\.00%", text)
    assert re.search(r"0-1 +gradients +1\.3, 0 +- +25\.00%", text)
    shown = [line for line in lines if "code-" in line]
    assert [re.search(r"code-\d", line).group() for line in shown] == [f"code-{n}" for n in range(2, 7)]  # pyright: ignore
    assert "why 6 [bold]?[2J !" in text
    assert "newest last (5 of 7)" in text
    assert "\x1b" not in text
    assert "stage-2.jsonl: 3 lines are no records" in text
    beside = any("stages" in line and "links, Mb/s" in line for line in lines)
    assert beside == (width == 200)


@pytest.mark.parametrize("width", [80, 200])
def test_a_fault_whose_reason_is_long_keeps_its_time_stage_and_code(width: int) -> None:
    of = StageFigures(1)
    of.take(start())
    of.take({"event": "fault", "time_s": 100.0, "code": "connection-lost", "reason": "boundary 0-1: " + "why " * 99})
    when = time.strftime("%H:%M:%S", time.localtime(100.0))
    text = drawn([SwarmView("it", {1: StageView(figures=of, state="training")})], width)
    assert re.search(rf"{when} +1 +connection-lost +boundary 0-1: why .*…", text)


def test_nodes_that_say_nothing_are_said(run: Path) -> None:
    write(run / "stage-0.jsonl", start(0, host=socket.gethostname(), process=2**22 + 1), step(0, sent=1))
    (swarm,) = look(sources([run], []), 1000.0)
    assert swarm.stages[0].state == "gone"
    assert swarm.stages[1].note == "silent for 897 s"
    text = drawn([swarm], 80)
    assert "stage 0: its process is gone, without a word" in text
    assert "stage 1: silent for 897 s" in text
    assert not swarm.over
    for stage in (1, 2):
        write(run / f"stage-{stage}.jsonl", {"event": "exit", "time_s": 1.0, "exit_code": stage - 1})
    tail = (run / "stage-2.jsonl").read_text().replace('{"event": "st', "")
    (run / "stage-2.jsonl").write_text(tail)
    (swarm,) = look(sources([run], []), 1000.0)
    assert [swarm.stages[stage].state for stage in range(3)] == ["gone", "ended", "failed"]
    assert [seen.note for seen in swarm.stages.values()][1:] == ["", ""]
    assert swarm.over


def test_a_run_before_its_first_record(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nsteps = 9\n[pipeline]\nstages = 3\n")
    assert "nothing is on record yet" in drawn(look(sources([tmp_path], []), 1.0), 80)


def test_one_without_boundaries_and_links_without_a_cap() -> None:
    alone = StageFigures(0)
    for record in (start(0, stages=1), step(0, sent=0) | {"sent_bytes": {}, "links": [], "dictionaries": []}):
        alone.take(record)
    text = drawn([SwarmView("one", {0: StageView(figures=alone, state="training")})], 80)
    assert "links" not in text
    free = StageFigures(1)
    link = {"boundary": 1, "direction": "forward", "configured_bits_per_s": None, "measured_bits_per_s": 2e8}
    free.take(step(0, sent=100) | {"links": [link | {"used_bits_per_s": 1e8, "received_bytes": 0}]})
    text = drawn([SwarmView("two", {1: StageView(figures=free, state="training")})], 80)
    assert re.search(r"1 → 2 +█+─+┃ +50\.0% +- +200\.0 +100\.0", text)


def test_what_nobody_can_mean_is_drawn_or_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nsteps = 9\n[pipeline]\nstages = inf\n")
    ends = [{"event": "fault", "time_s": sign * TIME_MAX_S, "code": "x", "reason": ""} for sign in (-1, 1)]
    link = {"boundary": 1, "direction": "forward", "configured_bits_per_s": 5e-324, "measured_bits_per_s": None}
    least = step(0, sent=1, seconds=5e-324)
    least["links"] = [link | {"used_bits_per_s": 1e18, "received_bytes": 0}]
    write(tmp_path / "stage-1.jsonl", start(stages=2, host=socket.gethostname(), process=2**40), least, *ends)
    write(tmp_path / "stage-1.jsonl", start(stages=9e15), {"event": "fault", "time_s": 1e300, "code": "", "reason": ""})
    write(tmp_path / "stage-999999999.jsonl", start(0))
    (swarm,) = look(sources([tmp_path], []), 120.0)
    assert (swarm.size, swarm.stages[1].state) == (2, "gone")
    assert swarm.notes == ["stage-1.jsonl: 2 lines are no records and are passed over"]
    assert re.search(r"1 → 2 +█+┃? ", drawn([swarm], 80))


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf, 1e300])
def test_a_bar_of_any_share_fits(share: float) -> None:
    console = Console(file=io.StringIO(), width=20, color_system=None)
    console.print(Bar([(0.1, "green"), (share, "red")], mark=share))
    assert len(console.file.getvalue().rstrip("\n")) == 20  # pyright: ignore[reportAttributeAccessIssue]


# -- what is looked at ------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_grows_and_anew_when_it_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "stage-0.jsonl"
    tail = RecordTail(path)
    assert list(tail.read()) == []
    write(path, start(0))
    with path.open("a") as file:
        file.write('{"event": "step", ')
    assert [record["event"] for record in tail.read()] == ["start"]
    with path.open("a") as file:
        file.write('"x": 1}\n')
    assert [record["event"] for record in tail.read()] == ["step"]
    assert list(tail.read()) == []
    assert tail.replacements == 0
    path.unlink()
    write(path, *(start(0) for _ in range(9)))
    assert len(list(tail.read())) == 9
    assert tail.replacements == 1
    path.write_text("")
    assert list(tail.read()) == []
    assert tail.replacements == 2


def test_another_run_in_the_same_place_starts_over(run: Path) -> None:
    watched = sources([run], [])
    assert look(watched, 120.0)[0].stages[1].figures.completed == 2
    (run / "stage-1.jsonl").unlink()
    write(run / "stage-1.jsonl", start(), step(0, sent=10))
    again = look(watched, 120.0)[0].stages[1].figures
    assert (again.completed, again.faults_by_code.total()) == (1, 0)


def test_stages_of_one_swarm_are_put_together(run: Path, tmp_path: Path) -> None:
    other, strange = tmp_path / "other", tmp_path / "strange"
    for directory, name in ((other, "demo"), (strange, "another")):
        directory.mkdir()
        write(directory / "stage-0.jsonl", start(0, run=name), step(0, sent=10))
    together, apart = look(sources([run, other, strange], []), 120.0)
    assert sorted(together.stages) == [0, 1, 2]
    assert together.name == f"{run}, {other}"
    assert sorted(apart.stages) == [0]
    assert len(look(sources([run, run], []), 120.0)) == 2  # no stage twice in one


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "say what to watch: the directory of a run"),
        (["{dir}/none"], r"none: there is no such directory; name the --out of a run"),
        (["{dir}/empty"], r"empty holds neither run\.toml nor stage-N\.jsonl, so no run; name the --out of one"),
        (["{dir}/file"], "file: there is no such directory"),
        (["--prometheus", "here"], r"--prometheus: 'here' is neither a port nor host:port"),
        (["--prometheus", "a..b:1"], r"--prometheus: 'a\.\.b:1': no machine can be known as 'a\.\.b'; check the name"),
        (["--prometheus", ","], "say what to watch"),
        (["{dir}/empty", "--every", "0"], "--every"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["top", *(each.format(dir=tmp_path) for each in arguments)])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert re.search(expected, line)


def test_nobody_who_answers_is_exit_code_1() -> None:
    (port,) = free_ports(1)
    result = CliRunner().invoke(app, ["top", "--once", "--prometheus", str(port)])
    assert result.exit_code == 1
    assert f"none of {port} answers" in result.stderr
    assert "Connection refused" in result.stdout


@contextmanager
def answering(answer: bytes, drip_s: float = 0.0) -> Iterator[MetricsAddress]:
    """A server that says that to each that comes, all at once or byte by byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        for byte in range(len(answer)) if drip_s else ():
                            connection.sendall(answer[byte : byte + 1])
                            time.sleep(drip_s)
                        connection.sendall(b"" if drip_s else answer)
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield MetricsAddress("127.0.0.1", server.getsockname()[1])
        server.close()


OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "drip_s", "expected"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n", 0, "HTTP status 404"),
        (OK + b"x" * 3000, 0, "more than 2000 bytes"),
        (OK + b"x" * 1000, 0.02, "no whole answer within 0.4 s"),
        (OK[:-2] + b"X: " + b"y" * 1000, 0.02, "no whole answer within 0.4 s"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 0, "SSH-2.0"),
        (b"", 0, None),  # an end or a reset
    ],
    ids=["not found", "huge", "dripping", "dripping headers", "another protocol", "nothing"],
)
def test_what_answers_is_held_to_a_limit_and_a_deadline(
    answer: bytes, drip_s: float, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_data, "ANSWER_BYTES_MAX", 2000)
    monkeypatch.setattr(top_data, "ANSWER_S", 0.4)
    began = time.monotonic()
    with answering(answer, drip_s) as endpoint:
        with pytest.raises(
            (MetricsFormatError, OSError, top_data.http.client.HTTPException), match=expected and re.escape(expected)
        ):
            top_data.fetch(endpoint)
        assert time.monotonic() - began < 3
        (swarm,) = look(sources([], [str(endpoint)]), 1.0)
    assert not swarm.stages
    assert swarm.notes


# -- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, Any]]:
    """A swarm of two that would train for days, with figures over HTTP and learned tables: directory, port, process."""
    out = tmp_path_factory.mktemp("live")
    config = tiny({"pipeline.stages": 2, "run.steps": 10**6, "link.link": "100mbit,1ms", **LEARNED})
    (out / "given.toml").write_text(dump_config(config))
    (first,) = free_ports(1)  # and the next one, which is free as a rule
    command = [
        sys.executable,
        "-m",
        "thinpipe.cli",
        "up",
        "--config",
        str(out / "given.toml"),
        "--out",
        str(out / "run"),
    ]
    process = subprocess.Popen(
        [*command, "--prometheus", str(first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        until(
            lambda: (
                process.poll() is not None
                or all(
                    sum(record["event"] == "step" for record in read_records(out / "run" / f"stage-{stage}.jsonl")) > 2
                    for stage in range(2)
                )
            ),
            "the first steps",
        )
        assert process.poll() is None, process.communicate()[0]
        yield out / "run", first, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_live_swarm_by_its_directory_and_over_http(live: tuple[Path, int, Any]) -> None:
    run, port, process = live
    for arguments in ([str(run)], ["--prometheus", f"{port},127.0.0.1:{port + 1}"]):
        result = CliRunner().invoke(app, ["top", "--once", *arguments], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        assert len(re.findall(r"training +\d+/1000000 +\d\.\d{4}", result.stdout)) == 2, result.stdout
        assert re.search(r"0 → 1 .* 100\.0 +\d+\.\d +\d+\.\d", result.stdout)
        assert re.search(r"1 → 0 .* 100\.0 +\d+\.\d +\d+\.\d", result.stdout)
        assert re.search(r"0-1 +projector +\d+\.0, 0 +\d+\.0, 0 +\d+\.\d\d%", result.stdout)
        assert re.search(r"0-1 +activations +\d+\.\d, 0 +\d+\.\d, 0 +\d+\.\d\d%", result.stdout)
        assert re.search(r"ratio \d+\.\d\dx", result.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0
    result = CliRunner().invoke(app, ["top", str(run)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert len(re.findall(r"\b[01] +ended +\d+/1000000", result.stdout)) == 2, result.stdout
    last = read_records(run / "stage-0.jsonl")[-1]
    assert (last["event"], last["exit_code"]) == ("exit", 0)


class _Story:
    """A source that tells one swarm after the other."""

    def __init__(self, *swarms: SwarmView) -> None:
        self._swarms = list(swarms)
        self.looks = 0

    def look(self, now_s: float) -> SwarmView:
        del now_s
        self.looks += 1
        return self._swarms.pop(0) if len(self._swarms) > 1 else self._swarms[0]


def test_the_screen_is_redrawn_until_the_run_is_over() -> None:
    def at(state: str) -> SwarmView:
        figures = StageFigures(0)
        figures.take(start(0, stages=1))
        return SwarmView("tale", {0: StageView(figures=figures, state=state)})

    story = _Story(at("starting"), at("training"), at("training"), at("ended"))
    told: list[MetricsSource] = [story]
    console = Console(file=io.StringIO(), width=80, height=40, force_terminal=True, color_system=None)
    assert show(told, once=False, every_s=0.0, console=console)
    assert story.looks == 4
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    before, after = text.split("\x1b[?1049l")  # the other screen is left
    assert "training" in before
    assert "ended" in after
    story = _Story(at("training"))
    assert show([story], once=True, every_s=0.0, console=console)
    assert story.looks == 1


def test_no_such_run_is_an_error_of_its_own() -> None:
    with pytest.raises(TopError):
        sources([Path("/nowhere")], [])
