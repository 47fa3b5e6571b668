"""`thinpipe compare`: train recipes alike, and say which codec is worth it over which link."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Override, fail, may_outlast_its_output, one_arithmetic_thread
from .options import settings_of, shared


def compare(
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="NAME=CODEC [FORWARD [BACKWARD]] [SECTION.KEY=VALUE ...], in quotes, such as 'r16=mapl:r=16 int4 int3 "
            "optim.muon_lr=0.02'. Repeat it for more; the others are compared with the first. "
            "(bf16=bf16, int8=int8, mapl=mapl)",
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Runs of each recipe, with a seed each. From 2 on differences have an interval."),
    ] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of these seeds; the others follow it.")] = 1,
    steps: Annotated[int | None, shared("--steps", "200")] = None,
    model: Annotated[str | None, shared("--model", "tiny")] = None,
    data: Annotated[str | None, shared("--data", "stdlib")] = None,
    eval_every: Annotated[int | None, shared("--eval-every", "an eighth of the run")] = None,
    link: Annotated[
        list[str] | None, shared("--link", "10, 80 and 300 Mb/s with 25 ms", more="Repeat it for more.")
    ] = None,
    pace: Annotated[
        str,
        typer.Option(
            help="The machine whose seconds a step are simulated: PRESET@STAGESxRATEtflops such as 150m@4x66tflops, or "
            "150m@4x5ms+10ms (forward+backward of a microbatch)."
        ),
    ] = "150m@4x66tflops",
    schedule: Annotated[str, shared("--schedule")] = "1f1b:rtt_ratio=auto",
    target: Annotated[
        float | None,
        typer.Option(help="Held-out loss to which time is taken. (the last one of the worst recipe: all reach it)"),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side, on a core each. (all cores)")] = None,
    out: Annotated[Path, typer.Option(help="Directory for all runs, compare.json and compare.html.")] = Path(
        "runs/compare"
    ),
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Compare codecs: train each alike, and say how long a loss takes over which link.

    Each recipe is trained in one process, as `up --one-process` does, with the
    same data and first weights. That gives its held-out loss and its exact bytes.
    The steps to one loss, times the seconds of a step over each link as `plan`
    simulates them, is the time to that loss. Learning rates are those that a
    codec recommends, unless you set them.

    For example, what a rank of 16 costs and saves beside dense training:

    thinpipe compare --recipe dense=bf16 --recipe 'r16=mapl:r=16' --seeds 3

    Runs that --out holds already, made with the same settings, are not run
    again: after Ctrl-C or SIGTERM, say the same again. The result is a page,
    compare.html, which needs no network. A run that fails, as one that diverges
    does, leaves its recipe without a loss, and the exit code is 1.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
    if target is not None and not (math.isfinite(target) and target > 0):
        fail(f"--target: a held-out loss is a number above 0, got {target:g}; omit it for the worst recipe's", 2)
    from ..node.comparing.compare import LINKS, RECIPES, Comparison
    from ..node.comparing.compare import compare as run
    from ..node.comparing.recipe import Recipe
    from ..node.config_file import parse_override
    from ..node.preparation import BAD_INPUT
    from ..node.run_directory import LocalRunError
    from ..sim.launch.end_signals import ending_as_ctrl_c

    settings = settings_of(steps=steps, model=model, data=data, eval_every=eval_every)
    try:
        settings |= dict(map(parse_override, overrides or []))
        asked = Comparison(
            recipes=tuple(map(Recipe.parse, recipe or RECIPES)),
            seeds=range(first_seed, first_seed + seeds),
            settings=settings,
            links=tuple(link or LINKS),
            pace=pace,
            schedule=schedule,
            target=target,
        )
        with ending_as_ctrl_c():
            found = run(asked, out, jobs=jobs or len(os.sched_getaffinity(0)), quiet=as_json)
    except BAD_INPUT as error:
        fail(str(error), 2)
    except LocalRunError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        told = str(error) or "interrupted"
        fail(f"{told}; no run goes on. Those that have ended are kept in {out}, the same command goes on", 130)
    if as_json:
        print(json.dumps(found, indent=2))
    if any(run["failed"] for recipe in found["recipes"] for run in recipe["runs"]):
        raise typer.Exit(1)
