"""`thinpipe compare`: which codec to take, from runs that are trained alike and links that are stated.

Two things decide about a codec, and no command knew both: what it costs in loss, which only training says, and what it
saves in time, which depends on a link. Here each recipe is trained with each seed (recipe_runs.py), its held-out loss
is followed over the run (loss_curve.py), and the steps that it takes to one loss, the same for all, are charged at the
seconds a step of a stated machine over each link (pace.py). The product is the **time to the target loss**. What it
assumes, and says, is that the larger model of that machine needs as many steps as the one that was trained.

Why not the loss after a fixed time: it needs runs of different lengths, with learning rates that fall at different
moments, for every link.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ... import __version__
from ...sim.links.shaper import LinkError, LinkProfile
from ...sim.reports.compare_console import CompareDisplay, compare_lines, compare_table, duration
from ...sim.reports.compare_page import compare_page
from ..config import ConfigError, RunConfig
from ..data import SourceLost
from ..measuring.contribution_sizes import check_contributions
from ..preparation import BAD_INPUT, check_settings, prepare_corpus, resolve_architecture
from ..run_directory import LocalRunError, writable
from ..stage_costs import stage_layers
from .loss_curve import Point, curve_of, interval, mean_curve, over_first, steps_to
from .pace import at_pace, seconds_a_step
from .recipe import Recipe, check_names
from .recipe_runs import RecipeRun, Standing, claimed, run_all

RECIPES = ("bf16=bf16", "int8=int8", "mapl=mapl")
LINKS = ("10mbit,25ms", "80mbit,25ms", "300mbit,25ms")
PACE = "150m@4x66tflops"
EVALUATIONS = 8  # of a run, unless something else is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is asked. settings: of all recipes, by `section.key`. target: a held-out loss; None: the worst recipe's."""

    recipes: tuple[Recipe, ...]
    seeds: range
    settings: dict[str, Any]
    links: tuple[str, ...]
    pace: str
    schedule: str
    target: float | None = None

    def runs(self, out: Path) -> dict[Recipe, list[RecipeRun]]:
        """Of each recipe, by seed. Raises ConfigError for what cannot be compared."""
        check_names(self.recipes)
        found: dict[Recipe, list[RecipeRun]] = {}
        for recipe in self.recipes:
            given = self._evaluated(recipe)
            found[recipe] = [RecipeRun.of(recipe, seed, given, out) for seed in self.seeds]
            self._check(recipe, found[recipe][0].config, found[self.recipes[0]][0].config)
        return found

    def _evaluated(self, recipe: Recipe) -> dict[str, Any]:
        """The settings of all, with evaluations at every eighth of this recipe's run if nothing else is said."""
        steps = recipe.config(self.settings, self.seeds[0]).run.steps
        return {"run.eval_every": -(-steps // EVALUATIONS), **self.settings}

    def _check(self, recipe: Recipe, config: RunConfig, first: RunConfig) -> None:
        """Whether the runs of a recipe can be held beside those of the first."""
        if "run.seed" in self.settings or "run.seed" in recipe.own():
            raise ConfigError("run.seed differs from run to run here; say --first-seed and --seeds")
        if config.pipeline.stages < 2:
            raise ConfigError("pipeline.stages = 1 has no boundary, so no codec to compare; set 2 or more")
        if config.compute.emulate:
            raise ConfigError("compute.emulate: who computes nothing has no loss; omit it, and say --pace")
        tokens, of_first = (each.lanes.count * each.tokens_per_step for each in (config, first))
        if tokens != of_first:
            many = "they are those of all lanes, so give each its part of pipeline.batch_size"
            remedy = many if config.lanes != first.lanes else "set it for all with --set"
            raise ConfigError(
                f"recipe '{recipe.name}' has {tokens} tokens a step, the first one {of_first}: their steps do not "
                f"compare; {remedy}"
            )
        if config.data != first.data:
            raise ConfigError(
                f"recipe '{recipe.name}' has data of its own, so its losses do not compare; set data.* for all with "
                "--set"
            )


def compare(asked: Comparison, out: Path, *, jobs: int, quiet: bool) -> dict[str, Any]:
    """Train what is missing, and write `compare.json` and `compare.html` into `out`. A run that fails, as one that
    diverges does, is an outcome of its recipe. Raises what BAD_INPUT names, and LocalRunError, also if another one is
    under way there, before anything starts."""
    console = Console(stderr=True) if quiet else Console()
    lock = out / "compare.lock"
    if os.path.exists(lock):
        with claimed(lock):
            pass  # or it is said now, and not after the simulation
    with console.status("checking the settings, simulating the links"):
        runs = asked.runs(out)
        pace, plans = _planned(asked, runs)
        for of in runs.values():
            try:
                prepare_corpus(of[0].config)  # the text is tokenised once, and not by all at the same time
            except SourceLost as error:
                raise LocalRunError(str(error), 1) from None
        writable(out)
    with claimed(lock):  # two results in one place would be neither's
        every = [run for of in runs.values() for run in of]
        steps = {run: run.config.run.steps for run in every}
        held = [run for run in every if run.summary() is not None]
        with CompareDisplay(console, steps=sum(steps.values()), runs=len(every)) as display:
            for run in held:
                display.ended(run.title, steps[run], "trained before")

            def look(standings: Sequence[Standing]) -> None:
                display.update([(each.run.title, each.completed, each.loss) for each in standings])

            def ended(run: RecipeRun, seconds: float, why: str | None) -> None:
                display.ended(run.title, steps[run], f"failed: {why}" if why else duration(seconds))

            failed = run_all(every, jobs, keep_going=True, on_look=look, on_end=ended)
        found = _joined(asked, runs, failed, pace, plans)
        _write(out / "compare.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
        _write(out / "compare.html", compare_page(found))
    if not quiet:
        console.print(compare_table(found))
    for line in compare_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"open {out / 'compare.html'}", highlight=False, markup=False, soft_wrap=True)
    return found


def _planned(
    asked: Comparison, runs: dict[Recipe, list[RecipeRun]]
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """The pace, and seconds a step by recipe and link. Raises ConfigError."""
    try:
        links = [str(LinkProfile.parse(link)) for link in asked.links]
    except LinkError as error:
        raise ConfigError(str(error)) from None
    pace = at_pace(asked.pace, asked.schedule)
    plans: dict[str, dict[str, dict[str, Any]]] = {}
    for recipe, of in runs.items():
        try:
            config = of[0].config
            check_settings(config)
            architecture = resolve_architecture(config)
            check_contributions(config, architecture, stage_layers(config, architecture))
            plans[recipe.name] = {
                link: seconds_a_step(config, link, asked.pace, asked.schedule) for link in dict.fromkeys(links)
            }
        except BAD_INPUT as error:
            raise ConfigError(f"recipe '{recipe.name}': {error}") from None
    return pace, plans


def _joined(
    asked: Comparison,
    runs: dict[Recipe, list[RecipeRun]],
    failed: dict[RecipeRun, str],
    pace: dict[str, Any],
    plans: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, Any]:
    """All that was measured and simulated, as JSON holds it: what is not finite is None."""
    curves = {recipe: [_curve(run) if run not in failed else [] for run in of] for recipe, of in runs.items()}
    means = {recipe: mean_curve(of) if all(of) else [] for recipe, of in curves.items()}
    target, said = asked.target, "--target"
    if target is None:
        target, said = worst(means)
    first = [_last(curve) for curve in curves[asked.recipes[0]]]
    config = runs[asked.recipes[0]][0].config
    return {
        "title": ", ".join(recipe.name for recipe in asked.recipes),
        "versions": {
            "thinpipe": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "target_loss": target,
        "target_from": said,
        "seeds": list(asked.seeds),
        "tokens_per_step": config.lanes.count * config.tokens_per_step,
        "pace": pace,
        "links": list(next(iter(plans.values()))),
        "recipes": [
            _row(recipe, of, failed, curves[recipe], means[recipe], first, target, plans[recipe.name])
            for recipe, of in runs.items()
        ],
    }


def worst(means: dict[Recipe, list[Point]]) -> tuple[float | None, str]:
    """The highest loss that a recipe ends with, and whose it is. One that failed, or diverged, ends with none."""
    ends = {recipe.name: _last(curve) for recipe, curve in means.items() if math.isfinite(_last(curve))}
    if not ends:
        return None, "no recipe ended with a finite loss"
    name = max(ends, key=ends.__getitem__)
    all_reach = "" if len(ends) < len(means) else ", so all reach it"
    return ends[name], f"the last one of {name}, the worst recipe{all_reach}"


def _curve(run: RecipeRun) -> list[Point]:
    return curve_of(run.directory, run.ended(), run.config.pipeline.stages, run.config.lanes.count)


def _last(curve: list[Point]) -> float:
    """The loss at the end; NaN of a run that failed."""
    return curve[-1].loss if curve else math.nan


def _row(
    recipe: Recipe,
    runs: list[RecipeRun],
    failed: dict[RecipeRun, str],
    curves: list[list[Point]],
    mean: list[Point],
    first: list[float],
    target: float | None,
    plans: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    losses = [_last(curve) for curve in curves]
    over = over_first(losses, first)
    steps = None if target is None else steps_to(mean, target)
    summaries = [run.ended() for run in runs if run not in failed]
    return {
        "name": recipe.name,
        "codec": recipe.spec,
        "own_settings": list(recipe.settings),
        "optim": {name: getattr(runs[0].config.optim, name) for name in ("muon_lr", "adamw_lr")},
        "steps": runs[0].config.run.steps,
        "width": resolve_architecture(runs[0].config).hidden_size,
        "losses": [_finite(loss) for loss in losses],
        "loss": _finite(statistics.fmean(losses)),
        "over_first_percent": _finite(statistics.fmean(over)),
        "over_first_interval": _finite(interval(over)),
        "bytes_per_token": statistics.fmean(each["bytes_per_token"] for each in summaries) if summaries else None,
        "ratio": statistics.fmean(each["ratio"] for each in summaries) if summaries else None,
        "lanes": runs[0].config.lanes.count,
        "averaging_bytes_per_token": _beside(summaries, "averaging"),
        "chunks": runs[0].config.lanes.count if runs[0].config.context.method else 1,
        "context_bytes_per_token": _beside(summaries, "context"),
        "steps_to_target": steps,
        "at_first_evaluation": steps is not None and steps == mean[0].step,
        "links": {
            link: {**plan, "time_to_target_s": None if steps is None else steps * plan["step_s"]}
            for link, plan in plans.items()
        },
        "curve": _points(mean),
        "runs": [
            {
                "seed": run.seed,
                "directory": run.directory.name,
                "failed": failed.get(run),
                "train_s": None if run in failed else run.ended()["train_s"],
                "curve": _points(curve),
                "settings": run.config.model_dump(mode="json", exclude_none=True),
            }
            for run, curve in zip(runs, curves, strict=True)
        ],
    }


def _beside(summaries: list[dict[str, Any]], what: str) -> float | None:
    """Bytes a token of what crosses between lanes; None where nothing of that kind does."""
    sizes = [each[what]["bytes_per_token"] for each in summaries if each.get(what)]
    return statistics.fmean(sizes) if sizes else None


def _points(curve: list[Point]) -> list[dict[str, Any]]:
    return [
        {"step": each.step, "tokens": each.tokens, "bytes": each.sent_bytes, "loss": _finite(each.loss)}
        for each in curve
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the one before stays until then."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
