"""What a codec costs in loss: recipes trained alike in one process, held-out loss against bytes, seeds paired.

    .venv/bin/python benchmarks/quality.py --out runs/screen --steps 250 --seeds 1 \\
        --set compute.dtype=bfloat16 --recipe "dense=identity:table=1 bf16 bf16" \\
        --recipe "r32=mapl:r=32 int4 int4" --recipe "faster=mapl:r=32 int4 int4 optim.muon_lr=0.04"

With `--preset compute-optimal` (`make quality`) everybody measures the same: a model so small that 20 tokens a
parameter are an hour of one core, which is where what crosses a boundary begins to matter, and enough held-out text to
tell 0.2 % apart. `--sweep` finds each recipe's own learning rates first, on one grid for all, at a quarter of the
length.

A recipe is NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]. Settings of its own come after those of `--set`,
which are for all recipes, and win; learning rates that neither states are those of dense training. The first recipe is
what the others are compared with, seed by seed: the same data and the same first weights, unless a recipe's own
settings change them. One process computes bit for bit what the swarm does (tests/test_parity.py), and counts the same
bytes but acknowledgements. Runs that `--out` holds already, made by the same command, are not run again; `--jobs` run
side by side. With several seeds the table gives the mean and a 95 % interval (Student's t) of the paired differences,
and below it stands each seed's loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Of recipes that state no others: the same for every codec, whatever it recommends.
RATES = ("--set", "optim.muon_lr=0.02", "--set", "optim.adamw_lr=0.005")
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
            "mapl=mapl:r=16 int4 int3 optim.muon_lr=0.01 optim.adamw_lr=0.01",
            "context=mapl:r=16,context=4 int4 int3 optim.muon_lr=0.01 optim.adamw_lr=0.01",
            "rvq=mapl:r=16,context=4 rvq:groups=2 rvq:groups=2 optim.muon_lr=0.01 optim.adamw_lr=0.01",
        ),
    )
}
SWEPT = ("optim.muon_lr", "optim.adamw_lr")
GRID = [(muon, adamw) for muon in (0.01, 0.02, 0.04) for adamw in (0.005, 0.01, 0.02)]
METAVAR = "NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]"
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one row of the table trains with."""

    name: str
    codec: str
    formats: tuple[str, ...]  # FORWARD, then BACKWARD, as far as given
    settings: tuple[str, ...]  # SECTION.KEY=VALUE, for this recipe only

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Raises ArgumentTypeError for what is not NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...]."""
        name, equals, rest = text.partition("=")
        codec, *words = rest.split() or [""]
        # An option of a format has an equals sign too, but after the format's name and a colon.
        is_setting = ["=" in word and ":" not in word.partition("=")[0] for word in words]
        formats = words[: is_setting.index(True)] if True in is_setting else words
        if not (name and equals and codec) or len(formats) > 2 or not all(is_setting[len(formats) :]):
            raise argparse.ArgumentTypeError(f"a recipe is {METAVAR}, got '{text}'")
        return cls(name=name, codec=codec, formats=tuple(formats), settings=tuple(words[len(formats) :]))

    def arguments(self, directory: Path, seed: int, shared: list[str]) -> list[str]:
        """Of `thinpipe up`, and what `recipe.json` holds: the same list for settings shared by all and for a recipe's
        own, so that a run is found again however they were given."""
        arguments = ["--out", str(directory), "--seed", str(seed), "--codec", self.codec, *shared]
        arguments += [part for setting in self.settings for part in ("--set", setting)]
        directions = zip(("--forward", "--backward"), self.formats, strict=False)
        return arguments + [part for pair in directions for part in pair]


def train(out: Path, recipe: Recipe, seed: int, shared: list[str]) -> dict[str, Any]:
    """The summary of one run, from disk if it is there."""
    directory = out / f"{recipe.name}-seed{seed}"
    arguments = recipe.arguments(directory, seed, shared)
    told, record, summary = json.dumps(arguments), directory / "recipe.json", directory / "summary.json"
    if summary.exists() and record.exists() and record.read_text() == told:
        return json.loads(summary.read_text())
    started = time.monotonic()
    command = [sys.executable, "-m", "thinpipe.cli", "up", "--one-process", "--json", "--overwrite"]
    command += [*RATES, *arguments]  # the later one wins
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{recipe.name}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    record.write_text(told)
    print(f"{recipe.name}, seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def rates_of(out: Path, recipe: Recipe, seed: int, shared: list[str], steps: int, pool: ThreadPoolExecutor) -> Recipe:
    """The recipe with those rates of the grid that end best at a quarter of the length; prints all."""
    others = tuple(each for each in recipe.settings if each.partition("=")[0] not in SWEPT)
    tries = {
        rates: replace(
            recipe,
            name=f"{recipe.name}-" + "-".join(map(str, rates)),
            settings=(*others, *(f"{name}={rate}" for name, rate in zip(SWEPT, rates, strict=True))),
        )
        for rates in GRID
    }
    quarter = [*shared[2:], "--steps", str(steps // 4)]
    runs = {rates: pool.submit(train, out / "sweep", one, seed, quarter) for rates, one in tries.items()}
    losses = {rates: run.result()["val_loss"] for rates, run in runs.items()}
    best = min(losses, key=losses.__getitem__)
    told = "  ".join(f"{muon:g}/{adamw:g} {loss:.4f}" for (muon, adamw), loss in losses.items())
    print(f"{recipe.name}, Muon/AdamW after {steps // 4} steps: {told}", file=sys.stderr, flush=True)
    return replace(tries[best], name=recipe.name)


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.nan
    return STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def draw(path: Path, summaries: dict[Recipe, list[dict[str, Any]]], tokens: float) -> None:
    """Held-out loss against bytes a token, a point a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for recipe, of in summaries.items():
        losses = [summary["val_loss"] for summary in of]
        at = (of[0]["bytes_per_token"], statistics.mean(losses))
        axes.errorbar(*at, yerr=0 if len(of) == 1 else interval(losses), fmt="o", capsize=3)
        axes.annotate(recipe.name, at, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes a token, all boundaries, both ways, everything counted")
    axes.set_ylabel("held-out loss")
    axes.set_title(f"{tokens / 1e6:.2f}M tokens, {len(next(iter(summaries.values())))} seed(s)")
    axes.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def by_seed(summaries: dict[Recipe, list[dict[str, Any]]], seeds: range) -> tuple[str, str]:
    """The seeds, and each recipe's losses in their order."""
    lines: list[str] = []
    for recipe, of in summaries.items():
        losses = ", ".join(f"{summary['val_loss']:.4f}" for summary in of)
        lines.append(f"{recipe.name} {losses}")
    return ", ".join(map(str, seeds)), "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", default=[], type=Recipe.parse, metavar=METAVAR)
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
    given.steps, given.recipe = given.steps or steps, given.recipe or list(map(Recipe.parse, recipes))
    if not given.recipe:
        parser.error("name at least one --recipe, or a --preset")
    names = [recipe.name for recipe in given.recipe]
    if twice := [name for name in names if names.count(name) > 1]:
        parser.error(f"two recipes are called '{twice[0]}'; their runs would share a directory")
    shared = ["--steps", str(given.steps)] + [part for item in (*settings, *given.set) for part in ("--set", item)]
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with ThreadPoolExecutor(given.jobs) as pool:
        if given.sweep:
            given.recipe = [
                rates_of(given.out, recipe, given.first_seed, shared, given.steps, pool) for recipe in given.recipe
            ]
        runs = {
            recipe: [pool.submit(train, given.out, recipe, seed, shared) for seed in seeds] for recipe in given.recipe
        }
        summaries = {recipe: [run.result() for run in of] for recipe, of in runs.items()}
    first = [summary["val_loss"] for summary in summaries[given.recipe[0]]]
    one = summaries[given.recipe[0]][0]
    print(f"\n{one['tokens'] / 1e6:.2f}M tokens, {one['tokens_per_step']} a step, {given.seeds} seed(s)\n")
    print("| recipe | codec | own settings | held-out loss | over the first | bytes/token | ratio |")
    print("|---|---|---|---|---|---|---|")
    for recipe, of in summaries.items():
        spec, own = " ".join((recipe.codec, *recipe.formats)), " ".join(recipe.settings)
        own = f"`{own}`" if own else ""
        losses = [summary["val_loss"] for summary in of]
        over = [100 * (loss / base - 1) for loss, base in zip(losses, first, strict=True)]
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
