"""`thinpipe chaos`: break a swarm at random, and compare its end with that of an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Link, Override, configuration, fail, is_own_process, one_arithmetic_thread, run_errors


def chaos(
    stages: Annotated[int, typer.Option(help="Pipeline stages, one process each.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    kills: Annotated[int, typer.Option(min=1, help="Faults, spread over the run.")] = 50,
    kinds: Annotated[
        str, typer.Option(help="Which, in turn: kill, twice, pause, sleeper, disk, cut, half (docs/failures.md).")
    ] = "kill,twice,pause,sleeper,disk,cut,half",
    every: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds between two faults, instead of --kills over the steps.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the training and of the faults.")] = 1,
    codec: Annotated[str, typer.Option(help="What crosses a boundary.")] = "mapl:r=16,anchors=full",
    forward: Annotated[str | None, typer.Option(help="Byte format of activations.")] = "int4",
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients.")] = "int4",
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 2,
    link: Link = None,
    out: Annotated[Path, typer.Option(help="Directory for the two runs and chaos.json.")] = Path("runs/chaos"),
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print chaos.json on stdout, and nothing else.")] = False,
) -> None:
    """Break a swarm on this machine at random, and see whether it ends in the bits of an undisturbed one.

    Exit code 0 if it does, 1 if not.
    """
    one_arithmetic_thread()
    from ..sim.launch.fault_injection import KINDS, Kind

    named = kinds.split(",")
    chosen: tuple[Kind, ...] = tuple(kind for kind in KINDS if named.count(kind))
    if unknown := [kind for kind in named if kind not in KINDS]:
        fail(f"--kinds: no fault is called '{unknown[0]}'; choose from {', '.join(KINDS)}", 2)
    # Small, because what is tested is the machinery: a step has to be short beside the start of a process.
    small = {"model.preset": "tiny", "pipeline.batch_size": 8, "pipeline.microbatches": 4, "data.sequence_length": 32}
    small |= {"optim.muon_lr": 0.02, "optim.adamw_lr": 0.005}  # stated: a codec's own would make it another run
    options = {
        "pipeline.stages": stages,
        "run.steps": steps,
        "run.seed": seed,
        "codec.codec": codec,
        "codec.forward": forward,
        "codec.backward": backward,
        "checkpoint.every": checkpoint_every,
        "link.link": link,
    }
    settings = configuration(None, {**small, **options}, overrides)
    from ..node.measuring.chaos_run import run_chaos

    with run_errors(out):
        found, survived = run_chaos(
            settings,
            out,
            count=kills,
            every_s=every,
            kinds=chosen,
            seed=seed,
            quiet=as_json,
            forks=is_own_process(),
        )
    if as_json:
        print(json.dumps(found, indent=2))
    if not survived:
        raise typer.Exit(1)
