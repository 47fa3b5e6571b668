"""What sharing keys and values costs in loss: the same sequences, whole on one node or in chunks over several.

    .venv/bin/python benchmarks/context.py --out runs/context
    .venv/bin/python benchmarks/context.py --out runs/context --chunks 8 --sequence-length 1024 --seeds 3 \\
        --recipe "whole=" --recipe "full=full" --recipe "mine=mos:k=0.02,v=0.05,warm=200 optim.muon_lr=0.03"

A recipe is NAME=METHOD [SECTION.KEY=VALUE ...], with a METHOD as after `--context`; with none the sequence stays whole,
and one node computes what the chunks would. Without `--recipe` those of the paper are trained (arXiv 2606.16384):
everything exact, in four bits, its largest numbers; Mixtures of Subspaces that leave out 90, 95 and 97 % of the
numbers; the last with one subspace for all, with random angles, and without a warm start, which is a tenth of the steps
otherwise. `first97` is ours: angles that know nothing of tokens to come.

All have one stage, the same data and the same first weights, so the first recipe's losses are what the others are
compared with, seed by seed. Runs that `--out` holds already, made with the same settings, are not made again; they go
one after the other unless `--jobs` says more.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from described import described
from one_line_errors import one_line_errors
from thinpipe.node.comparing.loss_curve import interval, over_first
from thinpipe.node.comparing.recipe import Recipe, check_names
from thinpipe.node.comparing.recipe_runs import RecipeRun, run_all
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import parse_override

METAVAR = "NAME=METHOD [SECTION.KEY=VALUE ...]"
# 1.1M parameters, as in `benchmarks/quality.py --preset compute-optimal`
SETTINGS = {
    "model.width": 128,
    "model.vocab_size": 1024,
    "pipeline.stages": 1,
    "pipeline.batch_size": 8,
    "pipeline.microbatches": 1,
    "data.heldout_sequences": 256,
    "optim.muon_lr": 0.02,
    "optim.adamw_lr": 0.01,
    "lanes.average": "gradients",
    "run.eval_every": 0,
}


def recipe_of(text: str, chunks: int) -> Recipe:
    """As METAVAR says. Raises ConfigError."""
    name, equals, rest = text.partition("=")
    words = rest.split()
    method = words.pop(0) if words and not _is_setting(words[0]) else ""
    if not equals or not all(map(_is_setting, words)):
        raise ConfigError(f"a recipe is {METAVAR}, got '{text}'")
    shared = (f"context.method={method}", f"lanes.count={chunks}") if method else ()
    return Recipe.parse(f"{name}=fp32 {' '.join((*shared, *words))}")  # one stage: nothing crosses in fp32


def _is_setting(word: str) -> bool:
    """`optim.clip=1`, and not `mos:k=0.1`."""
    return "=" in word and ":" not in word.partition("=")[0]


def published(steps: int) -> list[str]:
    """Recipes of the paper's tables, for a run of so many steps."""
    warm = f"warm={max(1, steps // 10)}"
    least = "mos:k=0.03,v=0.03"
    return [
        "whole=",
        "full=full",
        "int4=full:format=int4,backward=int4",
        "largest=full:format=topk:k=8,backward=int4",
        f"mos90=mos:k=0.1,v=0.1,{warm}",
        f"mos95=mos:k=0.05,v=0.05,{warm}",
        f"mos97={least},{warm}",
        f"fixed97={least},{warm},mixture=none",
        f"random97={least},{warm},mixture=random",
        f"cold97={least}",
        f"first97={least},{warm},head=first",
    ]


def trained(
    recipes: Sequence[Recipe], seeds: Sequence[int], shared: dict[str, Any], out: Path, jobs: int
) -> dict[Recipe, list[dict[str, Any]]]:
    """The summaries of each recipe, by seed; from disk if they are there."""

    def ended(run: RecipeRun, seconds: float, why: str | None) -> None:
        del why  # the first that fails ends all
        print(f"{run.title}: {seconds:.0f} s", file=sys.stderr, flush=True)

    runs = {recipe: [RecipeRun.of(recipe, seed, shared, out) for seed in seeds] for recipe in recipes}
    run_all([run for of in runs.values() for run in of], jobs, on_end=ended)
    return {recipe: [run.ended() for run in of] for recipe, of in runs.items()}


def table(summaries: dict[Recipe, list[dict[str, Any]]]) -> list[str]:
    """In Markdown: each recipe's held-out loss and how much it is over the first's."""
    lines = ["| recipe | method | own settings | held-out loss | over the first |", "|---|---|---|---|---|"]
    first = [summary["val_loss"] for summary in next(iter(summaries.values()))]
    for recipe, of in summaries.items():
        own = dict(setting.split("=", 1) for setting in recipe.settings)
        method = own.pop("context.method", "")
        own.pop("lanes.count", None)
        losses = [summary["val_loss"] for summary in of]
        over = over_first(losses, first)
        spread = f" ± {interval(over):.2f}" if len(of) > 1 else ""
        spec = f"`{method}`" if method else "one node"
        settings = " ".join(f"`{name}={value}`" for name, value in own.items())
        cells = (f"{statistics.mean(losses):.4f}", f"{statistics.mean(over):+.2f}{spread} %")
        lines.append("| " + " | ".join((recipe.name, spec, settings, *cells)) + " |")
    return lines


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", default=[], metavar=METAVAR)
    parser.add_argument("--chunks", type=int, default=4, help="nodes that share a sequence")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens, in all chunks together")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for all recipes alike")
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with one_line_errors(parser):
        recipes = [recipe_of(text, given.chunks) for text in given.recipe or published(given.steps)]
        check_names(recipes)
        shared = {**SETTINGS, "run.steps": given.steps, "data.sequence_length": given.sequence_length}
        summaries = trained(recipes, seeds, shared | dict(map(parse_override, given.set)), given.out, given.jobs)
    tokens = next(iter(summaries.values()))[0]["tokens"]
    print(f"\n{tokens / 1e6:.2f}M tokens, {given.sequence_length} in a sequence, {given.chunks} chunks\n")
    print("\n".join(table(summaries)))


if __name__ == "__main__":
    main()
