"""`thinpipe chaos`: inject random faults into a run, and check that its result is what it has to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Config,
    Json,
    Override,
    configuration,
    fail,
    is_own_process,
    may_outlast_its_output,
    one_arithmetic_thread,
    run_errors,
)
from .options import settings_of, shared, without_auto

# Small, because what is tested is the machinery: a step has to be short beside the start of a process.
SMALL = {
    "pipeline.batch_size": 8,
    "pipeline.microbatches": 4,
    "data.sequence_length": 32,
    "codec.codec": "mapl:r=16,anchors=full",
    "codec.forward": "int4",
    "codec.backward": "int4",
    "checkpoint.every": 2,
    "optim.muon_lr": 0.02,  # stated: what a codec recommends would make it another run
    "optim.adamw_lr": 0.005,
    # With several lanes: a round often, and a short wait in it, so that a lane that is away is left out within seconds.
    "lanes.average": "outer:every=5",
    "lanes.round_timeout_s": 3.0,
}


def chaos(
    stages: Annotated[int | None, shared("--stages", "4")] = None,
    model: Annotated[str | None, shared("--model", "tiny")] = None,
    data: Annotated[str | None, shared("--data", "stdlib")] = None,
    codec: Annotated[str | None, shared("--codec", "mapl:r=16,anchors=full int4 int4")] = None,
    forward: Annotated[str | None, shared("--forward", "int4; the codec's, if one is given")] = None,
    backward: Annotated[str | None, shared("--backward", "int4; the codec's, if one is given")] = None,
    link: Annotated[str | None, shared("--link", "none")] = None,
    steps: Annotated[int | None, shared("--steps", "200")] = None,
    schedule: Annotated[str | None, shared("--schedule", "1f1b")] = None,
    cut: Annotated[str | None, shared("--cut", "auto")] = None,
    speeds: Annotated[str | None, shared("--speeds", "alike")] = None,
    lanes: Annotated[int | None, shared("--lanes", "1")] = None,
    average: Annotated[str | None, shared("--average", "outer:every=5; gradients with --chunks")] = None,
    chunks: Annotated[int | None, shared("--chunks", "none")] = None,
    context: Annotated[str | None, shared("--context", "full, where there are chunks")] = None,
    microbatches: Annotated[int | None, shared("--microbatches", "4")] = None,
    batch_size: Annotated[int | None, shared("--batch-size", "8")] = None,
    sequence_length: Annotated[int | None, shared("--sequence-length", "32")] = None,
    eval_every: Annotated[int | None, shared("--eval-every", "0")] = None,
    seed: Annotated[int | None, shared("--seed", "1", more="So do the faults.")] = None,
    checkpoint_every: Annotated[int | None, shared("--checkpoint-every", "2")] = None,
    config: Config = None,
    overrides: Override = None,
    kills: Annotated[int, typer.Option(min=1, help="Faults, spread over the run.")] = 50,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of fault, injected in turn, such as kill,cut. docs/failures.md explains each. (all)"),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(min=0.1, help="Inject a fault every so many seconds, instead of --kills over the run. (off)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the two runs and chaos.json.")] = Path("runs/chaos"),
    as_json: Json = False,
) -> None:
    """Train on this machine while random faults are injected, and check that the result is unchanged.

    The same run is also made without faults; with several lanes, of which some may be left out for a while, it is
    computed again in one process from the log of who took part. Losses and stage states must be equal bit for bit. The
    options are those of up; the defaults make a small run, whose steps are short beside the start of a process. Exit
    code 0 if all is equal, 1 if not.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
    from ..sim.launch.planned_faults import KINDS, Kind

    named = kinds.split(",") if kinds is not None else []
    chosen: tuple[Kind, ...] = tuple(kind for kind in KINDS if named.count(kind))
    if unknown := [kind for kind in named if kind not in KINDS]:
        fail(f"--kinds: no fault is called '{unknown[0]}'; choose from {', '.join(KINDS)}", 2)
    plain, auto = without_auto(schedule)
    given = settings_of(
        stages=stages,
        model=model,
        data=data,
        codec=codec,
        forward=forward,
        backward=backward,
        link=link,
        steps=steps,
        schedule=plain,
        cut=cut,
        speeds=speeds,
        lanes=lanes,
        average=average,
        chunks=chunks,
        context=context,
        microbatches=microbatches,
        batch_size=batch_size,
        sequence_length=sequence_length,
        eval_every=eval_every,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    settings = configuration(config, {**_defaults(config, given), **given}, overrides)
    from ..node.measuring.chaos_run import Faults, run_chaos

    faults = Faults(count=kills, every_s=every, kinds=chosen or None, seed=settings.run.seed)
    with run_errors(out):
        found, survived = run_chaos(settings, out, faults, quiet=as_json, schedule=auto, forks=is_own_process())
    if as_json:
        print(json.dumps(found, indent=2))
    if not survived:
        raise typer.Exit(1)


def _defaults(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """What holds where nothing is said. A codec that is given brings its own byte formats."""
    if config is not None:
        return {}
    formats = ("codec.forward", "codec.backward") if "codec.codec" in given else ()
    return {name: value for name, value in SMALL.items() if name not in formats}
