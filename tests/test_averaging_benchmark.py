"""benchmarks/averaging.py, its quick form: bytes are what has to cross, and a lost peer is missed by the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from thinpipe.sim.launch.node_launch import node_environment

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "averaging.py"
HEADER_BYTES_PER_PACKET = 66  # Ethernet, IPv4, TCP with its timestamp

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernel_links")]


def measured(tmp_path: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the benchmark found, and what it printed."""
    path = tmp_path / "averaging.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(path), "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=node_environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text()), done.stdout


def test_bytes_of_a_round_are_those_that_its_algorithm_has_to_send(tmp_path: Path) -> None:
    programs = ("thinpipe outer-int4", "hivemind uniform8", "gloo bf16")
    found, printed = measured(tmp_path, "--rounds", "1", "--programs", ",".join(programs))
    assert [row["program"] for row in found["rounds"]] == list(programs)
    for row in found["rounds"]:
        assert row["members"] == [2, 2]
        assert f"| {row['program']} |" in printed
        bare = [
            sent - HEADER_BYTES_PER_PACKET * packets
            for sent, packets in zip(row["sent_bytes"], row["sent_packets"], strict=True)
        ]
        if row["program"].startswith("hivemind"):  # its parts are whole tensors, which two peers cannot share evenly
            assert sum(bare) == pytest.approx(2 * row["payload_bytes"], rel=0.05)
        else:
            assert bare == pytest.approx([row["payload_bytes"]] * 2, rel=0.02)
            assert len(set(row["digests"])) == 1
        assert 0 < row["off"] < 0.2


def test_who_is_lost_in_a_round_is_missed_by_the_others(tmp_path: Path) -> None:
    """Over a link so thin that the round lasts for seconds; the loss is in the middle of it."""
    options = ("--rounds", "0", "--lost", "kill", "--caps", "3mbit", "--patience", "4")
    found, printed = measured(tmp_path, *options, "--programs", "thinpipe outer-int4")
    (row,) = found["lost"]
    (said,), (after_s,) = row["said"], row["after_s"]
    assert said == "a round of 1"  # the one that is left goes on, with its own contribution
    assert 2 < after_s < 20  # from when its own contribution was made
    assert row["unchanged"][0] < 1
    assert row["next_said"] == ["a round of 1"]
    assert row["program"] in printed
