"""docs/getting-started.md is carried out as it is written, with fewer steps: trained, killed, gone on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.sim.launch.node_launch import node_environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "getting-started.md"
STEPS = 12  # instead of the document's
DEADLINE_S = 300.0  # of one block


def blocks() -> list[tuple[str, str]]:
    """(`sh`, or `toml NAME`; text) in the order of the document."""
    return re.findall(r"^```(sh|toml \S+)\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shorter(text: str) -> str:
    return re.sub(r"(--steps |steps = )\d+", rf"\g<1>{STEPS}", text)


def carry_out(script: str, home: Path) -> str:
    """What the block printed. It runs in a session of its own, of which nothing is left."""
    found = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=home,
        env={**node_environment(), "PATH": found, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # nodes end by themselves once their launcher is gone
        printed, _ = process.communicate()
        pytest.fail(f"{script}\nhad not ended after {DEADLINE_S:g} s:\n{printed}")
    assert process.returncode == 0, f"{script}\n{printed}"
    return printed


def digests(run: Path) -> list[str]:
    return [stage["state_sha256"] for stage in json.loads((run / "summary.json").read_text())["stages"]]


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    printed = ""
    for kind, text in blocks():
        if kind == "sh":
            printed += carry_out(shorter(text), tmp_path)
        else:
            (tmp_path / kind.removeprefix("toml ")).write_text(shorter(text))
    assert "thinpipe 0." in printed
    runs = tmp_path / "runs"
    first = digests(runs / "first")
    assert len(set(first)) == len(first) == 4
    for name in ("reference", "killed", "interrupted"):
        assert digests(runs / name) == first, f"{name} does not end in the bits of the first run"
    killed = (runs / "killed" / "stage-0.jsonl").read_text().splitlines()
    assert any(json.loads(line)["event"] == "rollback" for line in killed), "no stage was lost"
    assert len(digests(runs / "small")) == 2
    small, dense = (json.loads((runs / name / "summary.json").read_text()) for name in ("small", "small-dense"))
    assert small["bytes_per_token"] < dense["bytes_per_token"] / 10


def test_the_page_has_its_parts() -> None:
    kinds = [kind for kind, _ in blocks()]
    assert kinds.count("sh") >= 7
    assert kinds.count("toml run.toml") == 1
    assert all("--steps" not in line or f"--steps {STEPS}" in line for _, text in blocks() for line in [shorter(text)])
