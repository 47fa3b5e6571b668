"""`thinpipe chaos`: inject random faults into a run, and compare its result with that of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Link, Override, configuration, fail, is_own_process, one_arithmetic_thread, run_errors


def chaos(
    stages: Annotated[int, typer.Option(help="Number of pipeline stages, one process each.")] = 4,
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 200,
    kills: Annotated[int, typer.Option(min=1, help="Number of faults, spread over the run.")] = 50,
    kinds: Annotated[
        str, typer.Option(help="Kinds of fault, injected in turn, such as kill,cut. docs/failures.md explains each.")
    ] = "kill,twice,pause,sleeper,disk,cut,half",
    every: Annotated[
        float | None,
        typer.Option(min=0.1, help="Inject a fault every so many seconds, instead of --kills over the run. (off)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed, for the training and for the faults.")] = 1,
    codec: Annotated[
        str, typer.Option(help="Codec: how tensors are compressed between stages, as for up.")
    ] = "mapl:r=16,anchors=full",
    forward: Annotated[str | None, typer.Option(help="Byte format of activations, such as int8.")] = "int4",
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients, such as int8.")] = "int4",
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 writes none.")] = 2,
    link: Link = None,
    out: Annotated[Path, typer.Option(help="Directory for both runs and chaos.json.")] = Path("runs/chaos"),
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only chaos.json on stdout.")] = False,
) -> None:
    """Train on this machine while random faults are injected, and check that the result is unchanged.

    The same run is also made without faults. Losses and stage states must be equal bit for bit. Exit code 0 if they
    are, 1 if not.
    """
    one_arithmetic_thread()
    from ..sim.launch.fault_injection import KINDS, Kind

    named = kinds.split(",")
    chosen: tuple[Kind, ...] = tuple(kind for kind in KINDS if named.count(kind))
    if unknown := [kind for kind in named if kind not in KINDS]:
        fail(f"--kinds: no fault is called '{unknown[0]}'; choose from {', '.join(KINDS)}", 2)
    # A small model: recovery is what is tested, and a step has to be short compared with the start of a process.
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
