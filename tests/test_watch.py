"""What a node says of itself while it runs: the figures behind every view, Prometheus over HTTP, TensorBoard events."""

from __future__ import annotations

import math
import queue
import socket
import struct
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from thinpipe.cli import app
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import dump_config, parse_config
from thinpipe.node.config_sections import WatchSection
from thinpipe.node.one_process import OneProcess
from thinpipe.node.watching import prometheus_server, tensorboard_events
from thinpipe.node.watching.prometheus_server import Exporter
from thinpipe.node.watching.tensorboard_events import Events
from thinpipe.node.watching.views import Watching
from thinpipe.sim.reports.figures import CODES_MAX, DictionaryFigures, LinkFigures, StageFigures
from thinpipe.sim.reports.metrics_address import MetricsAddress, MetricsAddressError
from thinpipe.sim.reports.prometheus_metrics import MetricsFormatError, families, read_figures
from thinpipe.sim.reports.run_display import describe
from thinpipe.sim.reports.summary import read_records, summarise
from typer.testing import CliRunner

from .conftest import TinyConfig

LEARNED = {
    "codec.codec": "mapl:r=16,anchors=full,every=1",
    "codec.forward": "rvq:groups=4,codes=16",
    "codec.backward": "int8",
}


def start(stage: int = 1, **more: Any) -> dict[str, Any]:
    known = {"run": "demo", "stages": 3, "steps": 9, "host": "here", "process": 7}
    return {"event": "start", "time_s": 100.0, "stage": stage, **known, **more}


def ready(*ways: tuple[int, str]) -> dict[str, Any]:
    checks = [
        {
            "boundary": boundary,
            "direction": direction,
            "configured_bits_per_s": 3e8,
            "measured_bits_per_s": 2.9e8,
            "round_trip_s": 0.05,
            "warning": None,
        }
        for boundary, direction in ways
    ]
    return {"event": "ready", "time_s": 101.0, "stage": 1, "state_bytes": 5, "link_check": checks}


def step(number: int, *, sent: int, generation: int = 0, seconds: float = 0.5, **more: Any) -> dict[str, Any]:
    """Of stage 1, which sends `sent` bytes each way since its process began, a tenth of it in no ratio."""
    tenth = sent // 10
    rows = {"activation": sent - tenth, "probe": tenth}
    links = [
        {
            "boundary": boundary,
            "direction": direction,
            "configured_bits_per_s": 3e8,
            "measured_bits_per_s": None,
            "used_bits_per_s": 1e8 + number,
            "received_bytes": 2 * sent,
        }
        for boundary, direction in ((0, "backward"), (1, "forward"))
    ]
    return {
        "event": "step",
        "time_s": 102.0 + number,
        "step": number,
        "generation": generation,
        "loss": 5.0 - number / 10,
        "grad_norm": 1.5,
        "tokens": 1000,
        "seconds": seconds,
        "compute_s": 0.2,
        "codec_s": 0.1,
        "wait_s": 0.15,
        "sent_bytes": {"boundary 0-1": rows, "boundary 1-2": rows},
        "dense_bytes": 4000,
        "links": links,
        "rss_bytes": 2**28,
        "codec": {"staleness": 0.01, "activation_staleness": 0.5, "gradient_staleness": 0.25},
        "dictionaries": [
            {"boundary": 1, "dictionary": "projector", "end": "owner", "version": [generation, number, 0, 0]},
            {"boundary": 1, "dictionary": "gradients", "end": "replica", "version": None},
            {"boundary": 0, "dictionary": "gradients", "end": "owner", "version": [generation, number, 3, 0]},
        ],
        **more,
    }


def folded(*records: dict[str, Any]) -> StageFigures:
    figures = StageFigures(1)
    for record in records:
        figures.take(record)
    return figures


# -- the figures ------------------------------------------------------------------------------------------------------


def test_records_become_what_is_now() -> None:
    of = folded(start(), ready((0, "backward"), (1, "forward")), step(0, sent=1000), step(1, sent=2000))
    assert (of.state, of.completed, of.steps, of.stages, of.run) == ("training", 2, 9, 3, "demo")
    assert (of.loss, of.tokens, of.tokens_per_s) == (4.9, 2000, 2000.0)
    assert (of.compute_s, of.encode_s, of.wait_s) == (0.4, 0.2, 0.3)
    assert (of.compute_share, of.encode_share, of.wait_share) == (0.4, 0.2, 0.3)
    link = of.links[1, "forward"]
    assert (link.configured_bits_per_s, link.at_start_bits_per_s, link.measured_bits_per_s) == (3e8, 2.9e8, None)
    assert link.used_bits_per_s == pytest.approx(1e8 + 0.5)
    assert (link.sent_bytes, link.received_bytes) == ({"activation": 1800, "probe": 200}, 4000)
    assert of.moved_bytes == 2 * 1800
    assert of.ratio == 8000 / 3600
    projector, replica, gradients = of.dictionaries
    assert (projector.version, projector.staleness) == ((0, 1, 0, 0), 0.01)
    assert (replica.version, replica.staleness) == (None, None)
    assert (gradients.version, gradients.staleness) == ((0, 1, 3, 0), 0.25)


def test_a_replaced_process_counts_from_zero_and_the_sum_goes_on() -> None:
    checkpoints = [{"event": "checkpoint", "time_s": 103.5, "completed": each, "bytes": 1} for each in (1, 2)]
    of = folded(start(), step(0, sent=1000), *checkpoints, step(1, sent=2000), step(2, sent=3000))
    assert (of.committed, of.dense_bytes) == (2, 3 * 4000)
    of.take(start(process=8))
    assert (of.state, of.process) == ("starting", 8)
    of.take({"event": "rollback", "time_s": 110.0, "generation": 1, "completed": 1, "source": "disk", "seconds": 0.1})
    assert (of.generation, of.completed, of.committed) == (1, 1, 1)
    replaced = folded(start(), {"event": "rollback", "time_s": 1.0, "generation": 2, "completed": 4, "source": "disk"})
    assert replaced.committed == 4  # another process wrote it, and it is there
    of.take(step(1, sent=1000, generation=1))
    assert of.links[1, "forward"].sent_bytes == {"activation": 2700 + 900, "probe": 300 + 100}
    assert of.links[1, "forward"].received_bytes == 6000 + 2000
    assert of.dense_bytes == 2 * 4000  # steps that count, while the bytes are all that were sent
    assert of.tokens == 4000  # work that was done


def test_the_live_line_counts_the_bytes_of_every_process_a_stage_has_had() -> None:
    one_life = [folded(start(), *(step(number, sent=1000 * (number + 1)) for number in range(4))) for _ in range(2)]
    assert describe(one_life) == "loss 4.700  2000 tokens/s  4 bytes/token  ratio 2.22x"
    rollback = {"event": "rollback", "time_s": 110.0, "generation": 1, "completed": 2, "source": "disk", "seconds": 0.1}
    again = [
        step(2, sent=0, generation=1),
        step(3, sent=0, generation=1),
    ]  # nothing more is sent, and nothing is forgotten
    for figures in one_life:
        for record in (start(process=8), rollback, *again):
            figures.take(record)
    assert describe(one_life) == "loss 4.700  2000 tokens/s  4 bytes/token  ratio 2.22x"
    taken_over = [folded(start(), rollback, step(2, sent=1000), step(3, sent=2000)) for _ in range(2)]
    assert describe(taken_over) == "loss 4.700  2000 tokens/s  4 bytes/token  ratio 2.22x"


def test_states_and_faults() -> None:
    of = folded(start(), step(0, sent=10), {"event": "view_change", "time_s": 1.0, "generation": 0, "seconds": 0.1})
    assert of.state == "halted"
    of.take({"event": "fault", "time_s": 2.0, "code": "timeout", "reason": "why"})
    of.take({"event": "end", "time_s": 3.0, "steps": 1})
    assert (of.state, of.completed) == ("ended", 1)
    for code, state in ((0, "ended"), (130, "stopped"), (1, "failed"), (2, "failed")):
        of.take({"event": "exit", "time_s": 4.0, "exit_code": code})
        assert of.state == state
    for number in range(2 * CODES_MAX):  # a peer has a say in what faults are called
        of.take({"event": "fault", "time_s": 5.0, "code": f"code-{number}", "reason": ""})
    assert len(of.faults_by_code) <= CODES_MAX + 1
    assert of.faults_by_code.total() == 1 + 2 * CODES_MAX


@pytest.mark.parametrize(
    "broken",
    [
        {"loss": "low"},
        {"step": None},
        {"seconds": True},
        {"sent_bytes": {"boundary x": {}}},
        {"links": [{"boundary": 1, "direction": "sideways"}]},
        {"dictionaries": [{"boundary": 1, "dictionary": "projector", "end": "owner", "version": [1, 2]}]},
        {"dense_bytes": math.inf},
        {"time_s": 1e300},
        {"seconds": math.nan},
        {"tokens": 10**400},
        {"sent_bytes": {"boundary 99999-100000": {}}},
    ],
    ids=str,
)
def test_a_record_that_is_none_changes_nothing(broken: dict[str, Any]) -> None:
    of, same = folded(start(), step(0, sent=10)), folded(start(), step(0, sent=10))
    with pytest.raises((TypeError, KeyError, ValueError)):
        of.take(step(1, sent=20) | broken)
    assert of == same


# -- Prometheus -------------------------------------------------------------------------------------------------------


class _Fixed:
    """A collector of fixed figures."""

    def __init__(self, figures: StageFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Any]:
        return families(self._figures)


def text_of(figures: StageFigures) -> str:
    registry = CollectorRegistry()
    registry.register(_Fixed(figures))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry).decode()


RATES = st.none() | st.integers(1, 2**40).map(float)
SHARES = st.none() | st.floats(0, 1)
COUNTS = st.integers(0, 2**53)
NAMES = st.text(max_size=12)
LINKS = st.builds(
    LinkFigures,
    configured_bits_per_s=RATES,
    at_start_bits_per_s=RATES,
    measured_bits_per_s=RATES,
    used_bits_per_s=RATES,
    round_trip_s=SHARES,
    sent_bytes=st.dictionaries(NAMES, COUNTS, max_size=4),
    received_bytes=COUNTS,
)
TABLES = st.builds(
    DictionaryFigures,
    boundary=st.integers(0, 2),
    dictionary=NAMES,
    end=st.sampled_from(["owner", "replica"]),
    version=st.tuples(COUNTS, COUNTS, COUNTS, COUNTS),
    staleness=SHARES,
)
FIGURES = st.builds(
    StageFigures,
    stage=st.integers(0, 1000),
    run=NAMES,
    stages=st.none() | st.integers(1, 1024),
    steps=st.none() | COUNTS,
    host=NAMES,
    process=st.none() | st.integers(1, 2**22),
    state=st.sampled_from(["starting", "training", "ended", "failed"]),
    completed=COUNTS,
    loss=st.none() | st.floats(allow_nan=False),
    val_loss=SHARES,
    grad_norm=SHARES,
    generation=COUNTS,
    committed=st.none() | COUNTS,
    tokens=COUNTS,
    tokens_per_s=SHARES,
    train_s=st.floats(0, 1e9),
    compute_s=st.floats(0, 1e9),
    encode_s=st.floats(0, 1e9),
    wait_s=st.floats(0, 1e9),
    compute_share=SHARES,
    encode_share=SHARES,
    wait_share=SHARES,
    rss_bytes=st.none() | COUNTS,
    dense_bytes=COUNTS,
    last_record_s=st.none() | st.floats(0, 1e10),
    links=st.dictionaries(st.tuples(st.integers(0, 3), st.sampled_from(["forward", "backward"])), LINKS, max_size=3),
    dictionaries=st.lists(TABLES, max_size=3, unique_by=lambda of: (of.boundary, of.dictionary, of.end)),
)


@given(FIGURES)
def test_what_is_served_is_read_as_it_was(figures: StageFigures) -> None:
    (again,) = read_figures(text_of(figures))
    assert again == replace(figures, dictionaries=sorted(figures.dictionaries, key=_key))


def _key(of: DictionaryFigures) -> tuple[int, str, str]:
    return of.boundary, of.dictionary, of.end


def test_faults_are_told_by_code_and_time() -> None:
    of = folded(start(), *({"event": "fault", "time_s": 5.0 + n, "code": "timeout", "reason": "x"} for n in range(3)))
    (again,) = read_figures(text_of(of))
    assert again.faults_by_code == {"timeout": 3}
    assert [(fault.code, fault.time_s) for fault in again.faults] == [("timeout", 7.0)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "process_cpu_seconds_total{} 1\n",
        'thinpipe_loss{stage="x"} 1\n',
        "thinpipe_loss 1\n",
        'thinpipe_tokens_total{stage="1"} +Inf\n',
        'thinpipe_sent_bytes_total{stage="1"} 1\n',
        'thinpipe_loss{stage="1" 1\n',
        'thinpipe_stages{stage="0"} 9e15\n',
        'thinpipe_stages{stage="0"} 0\n',
        'thinpipe_loss{stage="999999999"} 1\n',
        'thinpipe_loss{stage="-1"} 1\n',
        'thinpipe_fault_timestamp_seconds{stage="0",code="x"} 1e300\n',
        'thinpipe_fault_timestamp_seconds{stage="0",code="x"} NaN\n',
        'thinpipe_last_record_timestamp_seconds{stage="0"} 1e18\n',
        'thinpipe_tokens_per_second{stage="0"} NaN\n',
        'thinpipe_link_used_bytes_per_second{stage="0",boundary="0-1",direction="forward"} +Inf\n',
        'thinpipe_link_round_trip_seconds{stage="0",boundary="0-1",direction="forward"} NaN\n',
        'thinpipe_sent_bytes_total{stage="0",boundary="9999-10000",direction="forward",kind="x"} 1\n',
        "\x00" * 100,
    ],
)
def test_text_that_no_node_serves_is_refused(text: str) -> None:
    with pytest.raises(MetricsFormatError):
        read_figures(text)


def test_what_a_run_that_diverges_says_is_no_nonsense() -> None:
    of = folded(start(), step(0, sent=10) | {"loss": math.nan, "grad_norm": math.inf})
    (again,) = read_figures(text_of(of))
    assert math.isnan(again.loss or 0)
    assert again.grad_norm == math.inf


def scrape(endpoint: MetricsAddress) -> str:
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return answer.read().decode()


@pytest.fixture(scope="module")
def recorded(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process with learned tables, watched by TensorBoard."""
    out = tmp_path_factory.mktemp("run")
    config = tiny({"pipeline.stages": 3, "run.steps": 4, "watch.tensorboard": True, "run.eval_every": 2, **LEARNED})
    (out / "run.toml").write_text(dump_config(config))
    reference = OneProcess(config, out)
    reference.train()
    reference.close()
    return out


def test_what_is_served_over_http_is_what_the_records_say(recorded: Path) -> None:
    records = read_records(recorded / "stage-1.jsonl")
    exporter = Exporter(StageFigures(1), MetricsAddress.parse("0"))
    try:
        for record in records:
            exporter.take(record)
        text = scrape(exporter.endpoint)
    finally:
        exporter.close()
    found = {
        (sample.name, *sorted(value for label, value in sample.labels.items() if label != "stage")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("stage", "1") == "1"
    }
    last = [record for record in records if record["event"] == "step"][-1]
    assert found["thinpipe_loss",] == last["loss"]
    assert found["thinpipe_completed_steps",] == 4
    assert found["thinpipe_tokens_total",] == 4 * last["tokens"]
    for way, name in (("forward", "1-2"), ("backward", "0-1")):
        for kind, count in last["sent_bytes"][f"boundary {name}"].items():
            assert found[("thinpipe_sent_bytes_total", *sorted([name, way, kind]))] == count
    seconds = sum(record["compute_s"] for record in records if record["event"] == "step")
    assert found["thinpipe_compute_seconds_total",] == pytest.approx(seconds)
    assert found["thinpipe_dictionary_step", "1-2", "owner", "projector"] == 3
    assert found["thinpipe_dictionary_step", "0-1", "projector", "replica"] == 3
    assert found["thinpipe_dictionary_staleness_ratio", "1-2", "activations", "owner"] == pytest.approx(
        last["codec"]["activation_staleness"]
    )
    assert found["thinpipe_state", "ended"] == 1
    assert found["process_cpu_seconds_total",] > 0


def test_the_ratio_of_all_stages_is_the_summarys(recorded: Path) -> None:
    every = []
    for stage in range(3):
        figures = StageFigures(stage)
        for record in read_records(recorded / f"stage-{stage}.jsonl"):
            figures.take(record)
        every.append(figures)
    told = summarise(recorded, stages=3, width=64, mode="one-process")
    assert sum(of.dense_bytes for of in every) == told["dense_bf16_bytes"]
    assert sum(of.dense_bytes for of in every) / sum(of.moved_bytes for of in every) == pytest.approx(told["ratio"])


def test_strangers_cost_nothing_but_their_own_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_server, "CONNECTION_S", 2.0)
    monkeypatch.setattr(prometheus_server._Handler, "timeout", 1.5)
    exporter = Exporter(StageFigures(1), MetricsAddress.parse("127.0.0.1:0"))
    where = (exporter.endpoint.host, exporter.endpoint.port)
    with closing(exporter), ExitStack() as open_ends:
        exporter.take(step(0, sent=10))

        def come() -> socket.socket:
            return open_ends.enter_context(socket.create_connection(where, timeout=5))

        began = time.monotonic()  # before the server's clocks begin, however slow this machine is
        dripping, *silent = (come() for _ in range(prometheus_server.CONNECTIONS_MAX))
        dripping.sendall(b"GET /metrics HTTP/1.1\r\n")
        one_too_many = come()
        assert ended(one_too_many)
        dripping.settimeout(0.1)  # each byte is short of the server's timeout; the whole is not
        while time.monotonic() < began + 30:
            try:
                dripping.sendall(b"x")
                if not dripping.recv(1000):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert 1 < time.monotonic() - began < 20
        assert all(ended(each) for each in silent)
        for garbage in (b"\x00" * 2000, b"GET /" + b"a" * 70_000, b"POST / HTTP/1.1"):
            stranger = come()
            with suppress(ConnectionError):
                stranger.sendall(garbage + b"\r\n\r\n")
            ended(stranger)
        assert 'thinpipe_loss{stage="1"}' in scrape(exporter.endpoint)


def ended(connection: socket.socket) -> bool:
    """The other side has hung up, after it said what it liked."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_addresses() -> None:
    assert MetricsAddress.parse("9100") == MetricsAddress("127.0.0.1", 9100)
    assert str(MetricsAddress.parse("0.0.0.0:9100").of_stage(3)) == "0.0.0.0:9103"
    assert str(MetricsAddress.parse("[::1]:9100").of_stage(1)) == "[::1]:9101"
    assert MetricsAddress.parse("0").of_stage(2).port == 0
    for wrong in ("", "here", "here:", ":9100", "9100x", "1.2.3.4:70000", "-1"):
        with pytest.raises(MetricsAddressError, match="neither a port nor host:port"):
            MetricsAddress.parse(wrong)
    with pytest.raises(MetricsAddressError, match="past 65535"):
        MetricsAddress.parse("65535").of_stage(1)


def test_who_looks_is_no_part_of_what_neighbours_compare(tiny: TinyConfig) -> None:
    assert tiny({"watch.prometheus": "9100", "watch.tensorboard": True}).digest() == tiny().digest()
    assert tiny({"watch.prometheus": "none"}).watch == WatchSection()
    with pytest.raises(ConfigError, match=r"watch\.prometheus: 'here' is neither a port nor host:port"):
        parse_config({"watch": {"prometheus": "here"}})


@pytest.mark.parametrize("command", ["up", "up --one-process", "node"])
def test_a_port_that_is_taken_is_one_line_and_leaves_nothing(command: str, tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2})))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        out = tmp_path / "out"
        options = ["--config", str(tmp_path / "run.toml"), "--out", str(out)]
        if command == "node":
            options += ["--stage", "0", "--next", "127.0.0.1:1", "--prometheus", str(port)]
        else:
            options += ["--prometheus", str(port - 1)]  # that of stage 1 is taken
        result = CliRunner().invoke(app, [*command.split(), *options])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line == (
        f"thinpipe: error: cannot serve figures at 127.0.0.1:{port}: the port is in use; choose another --prometheus, "
        "or omit it"
    )
    assert not list(out.glob("*"))


def test_who_takes_a_lost_ones_place_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = WatchSection(prometheus=str(taken.getsockname()[1]))
        with pytest.raises(MetricsAddressError, match="in use"):
            Watching(settings, tmp_path, stage=0)
        Watching(settings, tmp_path, stage=0, replaces=True).take(start())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("stage 0: warning: cannot serve figures at 127.0.0.1:")
    assert line.endswith("; goes on without")


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def events(directory: Path) -> list[Any]:
    """All events of a directory's files, their checksums checked."""
    found = []
    for path in sorted(directory.glob("*.tfevents.*")):
        raw = path.read_bytes()
        while raw:
            (length,), (of_length,) = struct.unpack("<Q", raw[:8]), struct.unpack("<I", raw[8:12])
            data, (of_data,) = raw[12 : 12 + length], struct.unpack("<I", raw[12 + length : 16 + length])
            assert (of_length, of_data) == (masked_crc32c(raw[:8]), masked_crc32c(data))
            event = event_pb2.Event()  # pyright: ignore[reportAttributeAccessIssue]
            event.ParseFromString(data)
            found.append(event)
            raw = raw[16 + length :]
    return found


def test_events_are_the_records(recorded: Path) -> None:
    records = [record for record in read_records(recorded / "stage-1.jsonl") if record["event"] == "step"]
    first, *rest = events(recorded / "tensorboard" / "stage-1")
    assert first.file_version == "brain.Event:2"
    values = [(event.step, {each.tag: each.simple_value for each in event.summary.value}) for event in rest]
    steps = [(number, of) for number, of in values if "loss" in of]
    assert [number for number, _ in steps] == [1, 2, 3, 4]
    for record, (_, of) in zip(records, steps, strict=True):
        assert of["loss"] == pytest.approx(record["loss"])
        assert of["codec/staleness"] == pytest.approx(record["codec"]["staleness"])
        for kind, count in record["sent_bytes"]["boundary 1-2"].items():
            assert of[f"sent_bytes/1-2/forward/{kind}"] == pytest.approx(count)
        assert of["dictionary_step/1-2/projector/owner"] == record["step"]
        assert of["compression_ratio"] > 1
        assert not any("timestamp" in tag or tag.startswith("state") for tag in of)
    evaluations = [(number, of["heldout_loss"]) for number, of in values if "heldout_loss" in of]
    assert [number for number, _ in evaluations] == [2, 4]
    assert [event.wall_time for event in rest] == sorted(event.wall_time for event in rest)


def test_steps_that_are_done_again_replace_those_before(tmp_path: Path) -> None:
    again = Events(tmp_path, stage=1)
    rollback = {"event": "rollback", "time_s": 110.0, "generation": 1, "completed": 1, "source": "disk", "seconds": 0.1}
    for record in (start(), step(0, sent=1), step(1, sent=2), rollback, step(1, sent=3, generation=1)):
        again.take(record)
    again.close()
    told = [(event.step, event.session_log.status) for event in events(tmp_path)[1:]]
    assert told == [(1, 0), (2, 0), (2, 1), (2, 0)]  # from step 2 on, what came before the 1 (START) is void


def test_a_disk_that_is_slow_or_full_costs_the_events_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard_events, "EVENTS_AHEAD", 2)
    monkeypatch.setattr(tensorboard_events, "CLOSE_S", 0.1)
    gate: queue.Queue[None] = queue.Queue()
    watching = Watching(WatchSection(tensorboard=True), tmp_path, stage=1)
    (slow,) = watching._views
    assert isinstance(slow, Events)
    monkeypatch.setattr(slow._file, "write_event", lambda _: gate.get())
    for number in range(6):
        watching.take(step(number, sent=1))
    assert watching._views == []
    assert "Events is left out from now on: Full()" in capsys.readouterr().err

    watching = Watching(WatchSection(tensorboard=True), tmp_path, stage=1)
    (full,) = watching._views
    assert isinstance(full, Events)

    def refuse(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(full._file, "write_event", refuse)
    watching.take(step(0, sent=1))
    full._thread.join(5)
    watching.take(step(1, sent=1))
    assert watching._views == []
    assert "No space left on device" in capsys.readouterr().err
    (tmp_path / "file").touch()
    Watching(WatchSection(tensorboard=True), tmp_path / "file", stage=1).take(start())
    assert "no events for TensorBoard in" in capsys.readouterr().err
    for _ in range(6):
        gate.put(None)
    slow._queue.put(None)
    slow._thread.join(5)
