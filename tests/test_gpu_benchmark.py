"""benchmarks/gpu.py on a machine without a GPU: one line and no more, or all of its parts with a tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .preloaded import start

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it is a script, with others beside it
    return importlib.import_module("gpu")


def test_without_a_gpu_it_ends_with_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path / "gpu")])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--device cpu --quick" in err
    assert not (tmp_path / "gpu").exists()


def test_the_target_is_the_worse_of_the_two_last_losses(gpu: ModuleType) -> None:
    found = gpu.compare({"bf16": [(4.0, 5.0), (8.0, 4.0), (12.0, 3.0)], "mapl": [(1.0, 5.0), (2.0, 3.0), (3.0, 2.0)]})
    assert found["target"] == 3.0
    assert found["seconds_to_target"] == {"bf16": 12.0, "mapl": 2.0}
    assert found["dense_over_mapl"] == 6.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_run_on_a_cpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs are forked from a process that has their imports; nothing in it holds time to a figure."""
    interpreter = gpu.Bench.start

    def forked(bench: Any, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        if list(command[:3]) != [sys.executable, "-m", "thinpipe.cli"]:
            return interpreter(bench, name, command, environment)
        parent = command.index("--parent")  # which a forked process has another one of; it dies with that one
        with (bench.out / f"{name}.log").open("w") as log:
            process = start([*command[3:parent], *command[parent + 2 :]], log)
        bench.processes.append(process)
        return process

    monkeypatch.setattr(gpu.Bench, "start", forked)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--quick", "--limit", "560", "--out", str(tmp_path)])
    logs = {path.name: path.read_text()[-1000:] for path in tmp_path.glob("*.log")} if ended.value.code else {}
    assert ended.value.code == 0, (*capsys.readouterr(), logs)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"command", "device", "gpu", "torch", "quick", "seconds", "parts"} == set(found)
    parts = found["parts"]
    assert [part["state"] for part in parts.values()] == ["skipped: no CUDA device", "done", "done", "done"]

    assert parts["parity"]["equal"] is True
    assert [(case["codec"], case["stages"]) for case in parts["parity"]["cases"]] == [("mapl", 2), ("bf16", 4)]
    for case in parts["parity"]["cases"]:
        assert case["equal"] is True
        assert len(set(case["state_sha256"])) == case["stages"]
    assert parts["parity"]["cases"][0]["reference_equals_itself"] is True

    mapl, dense = parts["throughput"]["runs"]
    assert (mapl["codec"], dense["codec"]) == ("mapl", "bf16")
    for run in (mapl, dense):
        assert run["tokens_per_s"] > 0
        assert all(0 < share < 1 for share in run["compute_shares"])
        assert len(run["codec_over_compute"]) == len(run["compute_shares"]) == 2
    assert mapl["bytes_per_token"] < dense["bytes_per_token"]
    assert parts["throughput"]["codec_cost"]["share"] > 0

    loss = parts["loss"]
    assert {codec: len(curve) for codec, curve in loss["curves"].items()} == {"mapl": 6, "bf16": 6}
    assert loss["compared_steps"] == 6
    assert loss["target"] == max(loss["last_losses"].values())
    assert loss["dense_over_mapl"] == loss["seconds_to_target"]["bf16"] / loss["seconds_to_target"]["mapl"]
    assert "| `mapl` | bfloat16 | sdpa | 2 | True | True |" in (tmp_path / "gpu.md").read_text()
