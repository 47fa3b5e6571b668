"""`thinpipe up --isolate netns`: the kernel's cap holds, the bits stay, and no namespace does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config
from thinpipe.sim.links import netns
from thinpipe.sim.links.netns import existing
from thinpipe.sim.reports.summary import read_records
from typer.testing import CliRunner

from .conftest import TinyConfig
from .real_faults import records

pytestmark = pytest.mark.alone

HEADER_BYTES_PER_PACKET = 66  # Ethernet 14, IPv4 20, TCP 20 with 12 of its timestamp


on_kernel_links = pytest.mark.usefixtures("kernel_links")


def command(settings: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "thinpipe.cli", "up", "--config", str(settings), "--out", str(out), *options]


@pytest.fixture
def settings(tiny: TinyConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(dump_config(tiny({"model.width": 128, "pipeline.stages": 3})))
    return path


def up(settings: Path, out: Path, *options: str) -> dict[str, Any]:
    """The summary. Nothing may be left of it."""
    with subprocess.Popen(
        command(settings, out, "--json", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            told, words = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, words
    if "--isolate" in options:
        assert not of(process.pid)
    return json.loads(told)


def of(pid: int) -> set[str]:
    """The namespaces of that process."""
    return {name for name in existing() if name.startswith(f"thinpipe-{pid}-")}


def digests(summary: dict[str, Any]) -> list[str]:
    return [stage["state_sha256"] for stage in summary["stages"]]


@pytest.mark.slow
@on_kernel_links
def test_the_kernel_caps_what_trains_the_same_bits(settings: Path, tmp_path: Path) -> None:
    summary = up(settings, tmp_path / "run", "--steps", "6", "--link", "80mbit,5ms", "--isolate", "netns")
    reference = up(settings, tmp_path / "plain", "--steps", "6", "--one-process", "--link", "80mbit,5ms")
    assert digests(summary) == digests(reference)
    by = summary["isolation"]
    assert (by["by"], by["rate"]) == ("netns", "tbf")
    assert by["delay"] in ("netem", "transport")
    # The middle node's two links share an interface: each is measured by itself.
    assert len(summary["link_check"]) == 4
    assert all(check["configured_bits_per_s"] == 80e6 for check in summary["link_check"])
    assert all(check["warning"] is None for check in summary["link_check"]), summary["link_check"]
    reported = sum(count for kind, count in summary["bytes"].items() if kind != "total")
    carried = by["sent_bytes"] - HEADER_BYTES_PER_PACKET * by["sent_packets"]
    assert reported == pytest.approx(carried, rel=0.02)


def sent(namespace: str) -> int:
    """What that node's interface has sent, as its kernel counts; 0 once it is gone."""
    command = ["ip", "netns", "exec", namespace, "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout or 0)


def of_node(run: Path, lane: int, stage: int) -> tuple[int, int]:
    """What that node sent on its boundary and on its lateral link, by its last record."""
    boundary, lateral = records(run / f"lane-{lane}", stage, "end")[-1]["links"]
    assert "peer_lane" in lateral
    return sum(boundary["sent_bytes"].values()), sum(lateral["sent_bytes"].values())


@pytest.mark.slow
@on_kernel_links
def test_boundaries_and_lateral_links_share_the_cap(tiny: TinyConfig, tmp_path: Path) -> None:
    """Two lanes of two stages: each node has one link of either kind, and one interface. Contributions of 4 bytes a
    weight keep all interfaces busy, so that the cap shows."""
    settings, rate = tmp_path / "run.toml", 8e6
    averaging = {"lanes.count": 2, "lanes.average": "gradients:format=fp32"}
    settings.write_text(dump_config(tiny({"model.width": 128, "pipeline.stages": 2, **averaging})))
    run, busiest = tmp_path / "run", dict[str, float]()
    with subprocess.Popen(
        command(settings, run, "--json", "--steps", "4", "--link", "8mbit", "--isolate", "netns"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            before = dict[str, tuple[float, int]]()
            while process.poll() is None:
                trains = bool(records(run / "lane-1", 0, "step"))  # and no link is measured any more
                for name in (each for each in of(process.pid) if trains and "-node" in each):
                    now = (time.monotonic(), sent(name))
                    first = before.setdefault(name, now)
                    if now[0] - first[0] >= 1.0:
                        busiest[name] = max(busiest.get(name, 0.0), 8 * (now[1] - first[1]) / (now[0] - first[0]))
                        before[name] = now
                time.sleep(0.1)
            told, words = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 0, words
    summary = json.loads(told)
    reference = up(settings, tmp_path / "plain", "--steps", "4", "--one-process", "--link", "8mbit")
    assert digests(summary) == digests(reference)
    assert len(busiest) == 4
    assert all(0.9 * rate < found < 1.05 * rate for found in busiest.values()), busiest
    for lane, stage in ((0, 0), (0, 1), (1, 0), (1, 1)):
        boundary, lateral = of_node(run, lane, stage)
        assert min(boundary, lateral) > 100_000
    by = summary["isolation"]
    reported = sum(count for kind, count in summary["bytes"].items() if kind != "total")
    assert reported == pytest.approx(by["sent_bytes"] - HEADER_BYTES_PER_PACKET * by["sent_packets"], rel=0.02)


@pytest.mark.slow
@on_kernel_links
def test_a_cap_that_is_not_there_is_seen(settings: Path, tmp_path: Path) -> None:
    """Nodes that are told that the kernel caps them, where it does not."""
    link = ("--link", "20mbit,kernel=rate", "--set", "link.verify=fail")
    done = subprocess.run(
        command(settings, tmp_path / "run", "--json", "--steps", "2", *link),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "the cap does not hold" in done.stderr


@pytest.mark.slow
@on_kernel_links
@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_no_namespace_stays(settings: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        command(settings, out, "--steps", "100000", "--link", "50mbit", "--isolate", "netns"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(record["event"] == "step" for record in read_records(out / "stage-0.jsonl")):
                assert process.poll() is None
                assert time.monotonic() < deadline, "no step in 60 s"
                time.sleep(0.05)
            assert len(of(process.pid)) == 4  # three nodes and the switch
            process.send_signal(how)
            process.wait(30)
        finally:
            process.kill()  # or leaving the block would wait for all those steps
    if how is signal.SIGKILL:
        netns._sweep()  # as the next start does
    assert not of(process.pid)


def test_without_root_it_says_what_is_missing(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/sbin/{program}")
    done = CliRunner().invoke(app, command(settings, tmp_path / "run", "--isolate", "netns")[3:])
    assert done.exit_code == 2
    assert "may not change the kernel's network" in done.stderr
    assert "--link 300mbit,25ms" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_tc_nothing_is_touched(settings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text("# of an earlier run\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = {**os.environ, "PATH": str(programs)}
    assert shutil.which("tc", path=str(programs)) is None
    done = subprocess.run(
        command(settings, run, "--isolate", "netns", "--overwrite"), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "not installed" in done.stderr
    assert (run / "run.toml").read_text() == "# of an earlier run\n"


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--isolate", "docker"), "--isolate: there is no 'docker'; say netns, or omit it"),
        (("--isolate", "netns", "--one-process"), "one process has no links to cap"),
    ],
)
def test_bad_input(settings: Path, tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    done = subprocess.run(command(settings, tmp_path / "run", *options), capture_output=True, text=True)
    assert done.returncode == 2
    assert line in done.stderr
