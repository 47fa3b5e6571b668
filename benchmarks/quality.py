"""What a codec costs in loss: recipes trained alike in one process, held-out loss against bytes, seeds paired.

    .venv/bin/python benchmarks/quality.py --out runs/screen --steps 250 --seeds 1 \\
        --set compute.dtype=bfloat16 --recipe "dense=identity:table=1 bf16 bf16" \\
        --recipe "r32=mapl:r=32 int4 int4" --recipe "faster=mapl:r=32 int4 int4 optim.muon_lr=0.04"

With `--preset compute-optimal` (`make quality`) everybody measures the same: a model so small that 20 tokens a
parameter are an hour of one core, which is where what crosses a boundary begins to matter, enough held-out text to tell
0.2 % apart, and text of which nothing is read twice (`installed_text`). `--sweep` finds each recipe's own learning
rates first, on one grid for all, at a quarter of the length.

A recipe is NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]. Settings of its own come after those of `--set`,
which are for all recipes, and win; learning rates that neither states are those of dense training. The first recipe is
what the others are compared with, seed by seed: the same data and the same first weights, unless a recipe's own
settings change them. One process computes bit for bit what the swarm does (tests/test_parity.py), and counts the same
bytes but acknowledgements. Runs that `--out` holds already, made with the same settings, are not run again; `--jobs`
run side by side. Another program that trains other recipes may have the same `--out`. With several seeds the table
gives the mean and a 95 % interval (Student's t) of the paired differences, and below it stands each seed's loss. What
that means in time over a link: `thinpipe compare`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed_text
from described import described
from one_line_errors import one_line_errors
from thinpipe.node.comparing.loss_curve import interval, over_first
from thinpipe.node.comparing.recipe import METAVAR, Recipe, check_names
from thinpipe.node.comparing.recipe_runs import RecipeRun, run_all
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import parse_override
from thinpipe.node.config_sections import DataSection
from thinpipe.node.data.cache import cache_directory

# Of recipes that state no others: the same for every codec, whatever it recommends.
RATES = {"optim.muon_lr": 0.02, "optim.adamw_lr": 0.005}
# `--preset`: settings for all, steps, recipes where none is given. 1.1M parameters, 2,000 steps of 4,096 tokens.
PRESETS = {
    "compute-optimal": (
        (
            *("model.width=128", "model.vocab_size=1024", "pipeline.batch_size=32", "pipeline.microbatches=4"),
            *("data.heldout_sequences=1024", "run.eval_every=500"),
        ),
        2000,
        (
            "dense=identity:table=1 bf16 bf16 optim.muon_lr=0.02 optim.adamw_lr=0.02",
            "anchors=mapl:context=0,r=16,every=16 int4 int3 optim.muon_lr=0.01 optim.adamw_lr=0.01",
            "context=mapl:r=16 int4 int3 optim.muon_lr=0.01 optim.adamw_lr=0.02",
            "codebooks=mapl:r=16 optim.muon_lr=0.01 optim.adamw_lr=0.02",
            "narrow=mapl:r=8 rvq:levels=2,scale=log4,delta=drift/64 "
            "rvq:levels=2,scale=log4,hadamard=true,delta=drift/64 optim.muon_lr=0.01 optim.adamw_lr=0.02",
        ),
    )
}
SWEPT = ("optim.muon_lr", "optim.adamw_lr")
GRID = [(muon, adamw) for muon in (0.01, 0.02, 0.04) for adamw in (0.005, 0.01, 0.02)]
Summaries = dict[Recipe, list[dict[str, Any]]]


def trained(recipes: Sequence[Recipe], seeds: Sequence[int], shared: dict[str, Any], out: Path, jobs: int) -> Summaries:
    """The summaries of each recipe, by seed; from disk if they are there."""

    def ended(run: RecipeRun, seconds: float, why: str | None) -> None:
        del why  # the first that fails ends all
        print(f"{run.title}: {seconds:.0f} s", file=sys.stderr, flush=True)

    runs = {recipe: [RecipeRun.of(recipe, seed, shared, out) for seed in seeds] for recipe in recipes}
    run_all([run for of in runs.values() for run in of], jobs, on_end=ended)
    return {recipe: [run.ended() for run in of] for recipe, of in runs.items()}


def swept(recipes: Sequence[Recipe], seed: int, shared: dict[str, Any], out: Path, jobs: int) -> list[Recipe]:
    """The recipes, each with those rates of the grid that end best at a quarter of the length; prints all."""
    tries: dict[Recipe, Recipe] = {}
    for recipe in recipes:
        others = tuple(each for each in recipe.settings if each.partition("=")[0] not in SWEPT)
        for rates in GRID:
            own = tuple(f"{name}={rate}" for name, rate in zip(SWEPT, rates, strict=True))
            tried = replace(recipe, name=f"{recipe.name}-" + "-".join(map(str, rates)), settings=(*others, *own))
            tries[tried] = recipe
    quarter = {**shared, "run.steps": shared["run.steps"] // 4}
    summaries = trained(list(tries), [seed], quarter, out / "sweep", jobs)
    best: list[Recipe] = []
    for recipe in recipes:
        losses = {tried: of[0]["val_loss"] for tried, of in summaries.items() if tries[tried] is recipe}
        told = "  ".join(f"{m:g}/{a:g} {loss:.4f}" for (m, a), loss in zip(GRID, losses.values(), strict=True))
        print(f"{recipe.name}, Muon/AdamW after {quarter['run.steps']} steps: {told}", file=sys.stderr, flush=True)
        best.append(replace(min(losses, key=losses.__getitem__), name=recipe.name))
    return best


def draw(path: Path, summaries: Summaries, tokens: float) -> None:
    """Held-out loss against bytes a token, a point a recipe, with its interval."""
    from matplotlib.figure import Figure
    from thinpipe.sim.reports.compare_figures import pareto

    figure = Figure(figsize=(9, 5.5))
    axes = figure.subplots()
    points: list[tuple[str, float, float, tuple[float, float]]] = []
    for recipe, of in summaries.items():
        losses = [summary["val_loss"] for summary in of]
        mean, half = statistics.mean(losses), 0 if len(of) == 1 else interval(losses)
        points.append((recipe.name, of[0]["bytes_per_token"], mean, (mean - half, mean + half)))
    pareto(axes, points)
    axes.set_title(f"{tokens / 1e6:.2f}M tokens, {len(next(iter(summaries.values())))} seed(s)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def by_seed(summaries: Summaries, seeds: range) -> tuple[str, str]:
    """The seeds, and each recipe's losses in their order."""
    lines: list[str] = []
    for recipe, of in summaries.items():
        losses = ", ".join(f"{summary['val_loss']:.4f}" for summary in of)
        lines.append(f"{recipe.name} {losses}")
    return ", ".join(map(str, seeds)), "; ".join(lines)


def recipe_of(text: str) -> Recipe:
    try:
        return Recipe.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", default=[], type=recipe_of, metavar=METAVAR)
    parser.add_argument("--preset", choices=PRESETS, help="settings, steps and, where none is given, recipes")
    parser.add_argument("--sweep", action="store_true", help="find each recipe's learning rates first")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--steps", type=int, help="250, or the preset's")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plot", type=Path, help="also draw loss against bytes, as PNG")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all recipes alike")
    given = parser.parse_args()
    settings, steps, recipes = PRESETS[given.preset] if given.preset else ((), 250, ())
    given.steps = steps if given.steps is None else given.steps
    given.recipe = given.recipe or list(map(Recipe.parse, recipes))
    if not given.recipe:
        parser.error("name at least one --recipe, or a --preset")
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with one_line_errors(parser):
        check_names(given.recipe)
        shared = {**RATES, "run.steps": given.steps, **dict(map(parse_override, settings))}
        if given.preset:
            shared["data.source"] = str(installed_text.written(cache_directory(DataSection())))
        shared |= dict(map(parse_override, given.set))
        if given.sweep:
            given.recipe = swept(given.recipe, given.first_seed, shared, given.out, given.jobs)
        summaries = trained(given.recipe, seeds, shared, given.out, given.jobs)
    first = [summary["val_loss"] for summary in summaries[given.recipe[0]]]
    one = summaries[given.recipe[0]][0]
    print(f"\n{one['tokens'] / 1e6:.2f}M tokens, {one['tokens_per_step']} a step, {given.seeds} seed(s)\n")
    print("| recipe | codec | own settings | held-out loss | over the first | bytes/token | ratio |")
    print("|---|---|---|---|---|---|---|")
    for recipe, of in summaries.items():
        spec, own = " ".join((recipe.codec, *recipe.formats)), " ".join(recipe.settings)
        own = f"`{own}`" if own else ""
        losses = [summary["val_loss"] for summary in of]
        over = over_first(losses, first)
        spread = f" ± {interval(over):.2f}" if given.seeds > 1 else ""
        print(
            f"| {recipe.name} | `{spec}` | {own} "
            f"| {statistics.mean(losses):.4f} | {statistics.mean(over):+.2f}{spread} % "
            f"| {of[0]['bytes_per_token']:.1f} | {of[0]['ratio']:.1f} |"
        )
    print("\nBy seed ({}): {}.".format(*by_seed(summaries, seeds)))
    if given.plot:
        draw(given.plot, summaries, one["tokens"])


if __name__ == "__main__":
    main()
