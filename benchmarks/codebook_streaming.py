"""How far shipped codebooks lag behind what was learned, from the records of runs: a table, and a plot over the steps.

    .venv/bin/python benchmarks/quality.py --out runs/streaming --recipe "all=mapl rvq:delta=full rvq:delta=full" ...
    .venv/bin/python benchmarks/codebook_streaming.py runs/streaming --plot docs/staleness.png

Each run directory NAME-seedN under the given one is a run of recipe NAME. Staleness is |master - shipped| / |master|,
error what coding lost of the tensors, relative to them; both are means over boundaries, the last 20 steps and seeds,
for activations and gradients. Bytes of dictionaries (snapshots and the projector's changes too) are set beside those
of the recipe with the most of them, which is the full synchronisation if there is one with each tensor.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from described import described

LAST = 20  # steps
LINES = ("-", "--", "-.", ":")
WAYS = ("activation", "gradient")


def records(run: Path) -> list[dict[str, float]]:
    """Per step, the mean over stages of every figure of a codebook."""
    steps: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(run.glob("stage-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["event"] == "step":
                for name, value in record["codec"].items():
                    steps[record["step"]][name].append(value)
    return [{name: statistics.mean(of) for name, of in figures.items()} for _, figures in sorted(steps.items())]


def figure_of(runs: list[list[dict[str, float]]], name: str) -> float | None:
    """Mean over the last steps of all runs."""
    values = [step[name] for steps in runs for step in steps[-LAST:] if name in step]
    return statistics.mean(values) if values else None


def family(name: str) -> tuple[str, int]:
    """drift16 is of the family drift, by its number: one colour for a family, one line style for a number."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)


def draw(path: Path, recipes: dict[str, list[list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(family(name)[0] for name in recipes))
    numbers = sorted({family(name)[1] for name in recipes})
    dashes = {number: LINES[at % len(LINES)] for at, number in enumerate(numbers)}
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axes, way in zip(panels, WAYS, strict=True):
        for name, runs in recipes.items():
            line = [step.get(f"{way}_staleness") for step in runs[0]]
            if any(value is not None for value in line):
                letters, number = family(name)
                axes.plot(
                    [value or float("nan") for value in line],
                    label=name,
                    linewidth=1,
                    color=f"C{families.index(letters)}",
                    linestyle=dashes[number],
                )
        axes.set_title(f"codebooks of {way}s")
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(True, alpha=0.3)
    panels[0].set_ylabel("|master - shipped| / |master|, mean over boundaries")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("runs", type=Path, help="what benchmarks/quality.py had as --out")
    parser.add_argument("--plot", type=Path, help="also draw staleness over the steps (first seeds), as PNG")
    given = parser.parse_args()
    recipes: dict[str, list[list[dict[str, float]]]] = {}
    summaries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for directory in sorted(given.runs.glob("*-seed*"), key=lambda path: path.stat().st_ctime):
        name = directory.name.rpartition("-seed")[0]
        if (directory / "summary.json").exists():
            recipes.setdefault(name, []).append(records(directory))
            summaries[name].append(json.loads((directory / "summary.json").read_text()))
    recipes = dict(sorted(recipes.items(), key=lambda each: family(each[0])))
    if not recipes:
        parser.error(f"{given.runs} holds no finished run; make some with benchmarks/quality.py --out {given.runs}")
    bytes_of = {
        name: statistics.mean(of["bytes"].get("dictionary", 0) for of in each) for name, each in summaries.items()
    }
    most = max(bytes_of.values())
    print(
        "| recipe | seeds | held-out loss | staleness, activations / gradients | error "
        "| dictionary bytes/token | of the most |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, runs in recipes.items():
        of = summaries[name]

        def pair(figure: str, runs: list[list[dict[str, float]]] = runs) -> str:
            values = [figure_of(runs, f"{way}_{figure}") for way in WAYS]
            return " / ".join("-" if value is None else f"{value:.3f}" for value in values)

        print(
            f"| {name} | {len(of)} | {statistics.mean(one['val_loss'] for one in of):.4f} | {pair('staleness')} "
            f"| {pair('reconstruction_error')} | {bytes_of[name] / of[0]['tokens']:.1f} | {bytes_of[name] / most:.1%} |"
        )
    if given.plot:
        draw(given.plot, recipes)


if __name__ == "__main__":
    main()
