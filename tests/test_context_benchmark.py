"""benchmarks/context.py: its recipes are settings that there are, and a small comparison ends in a table."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from thinpipe.compress.mixture_of_subspaces import MixtureOfSubspaces
from thinpipe.compress.spec_strings import built
from thinpipe.node.config import ConfigError
from thinpipe.sim.launch.node_launch import node_environment

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "context.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    return runpy.run_path(str(BENCHMARK), run_name="context")


def test_its_recipes_differ_in_the_method_alone(script: dict[str, Any]) -> None:
    recipes = [script["recipe_of"](text, 4) for text in script["published"](500)]
    shared = {**script["SETTINGS"], "run.steps": 500, "data.sequence_length": 512}
    configs = [recipe.config(shared, 1) for recipe in recipes]
    assert [config.lanes.count for config in configs] == [1, *[4] * (len(recipes) - 1)]
    assert len({config.context.method for config in configs}) == len(recipes)
    alike = [config.model_dump(exclude={"context": {"method"}, "lanes": {"count"}}) for config in configs]
    assert all(each == alike[0] for each in alike)
    for config in configs:
        if config.context.method.startswith("mos"):
            built(MixtureOfSubspaces, "context method", config.context.method).check_steps(500)


def test_a_recipe_may_have_settings_of_its_own(script: dict[str, Any]) -> None:
    recipe = script["recipe_of"]("fast=mos:k=0.1,v=0.2 optim.muon_lr=0.5", 3)
    assert recipe.settings == ("context.method=mos:k=0.1,v=0.2", "lanes.count=3", "optim.muon_lr=0.5")
    assert script["recipe_of"]("whole= optim.muon_lr=0.5", 3).settings == ("optim.muon_lr=0.5",)
    for bad in ("full", "full=full int4", "=full"):
        with pytest.raises(ConfigError, match="recipe"):
            script["recipe_of"](bad, 3)


@pytest.mark.slow
def test_a_small_comparison_and_what_is_on_disk_is_not_made_again(tmp_path: Path) -> None:
    settings = ("model.layers=2", "model.width=64", "data.heldout_sequences=8")
    command = [sys.executable, str(BENCHMARK), "--out", str(tmp_path), "--steps", "2", "--chunks", "2"]
    command += ["--sequence-length", "32", "--recipe", "whole=", "--recipe", "shared=full"]
    command += [word for each in settings for word in ("--set", each)]
    done, again = (
        subprocess.run(command, capture_output=True, text=True, timeout=120, env=node_environment(), check=False)
        for _ in range(2)
    )
    assert done.returncode == 0, done.stderr
    assert "| whole | one node |" in done.stdout
    assert "| shared | `full` |" in done.stdout
    assert done.stderr.count(", seed 1: ") == 2
    assert (again.stdout, again.stderr) == (done.stdout, "")
