"""`thinpipe up`: a swarm on this machine. `thinpipe node`: one stage of it, or of a swarm of many machines."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Config,
    Insecure,
    KeysDirectory,
    Link,
    Override,
    Prometheus,
    TensorBoard,
    configuration,
    fail,
    one_arithmetic_thread,
    run_errors,
    run_toml,
)


def up(
    stages: Annotated[int | None, typer.Option(help="Pipeline stages, one process each. (4)")] = None,
    model: Annotated[str | None, typer.Option(help="Preset tiny, 150m, 500m, 1b, or a directory. (tiny)")] = None,
    data: Annotated[str | None, typer.Option(help="'stdlib', a file or directory, or hf:NAME. (stdlib)")] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="What crosses a boundary: fp32, bf16, int8, int4, int3, or mapl, mapl:r=64,... (bf16)"),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(help="Byte format of activations: one of those, or rvq:groups=8,codes=256,... (the codec's)"),
    ] = None,
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients, the same. (the codec's)")] = None,
    link: Link = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. (200)")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="gpipe, 1f1b, zb; for slow links 1f1b:hop=1.8, zb:hop=1.8; hop=auto finds out. (1f1b)"),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (8)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (16)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (128)")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; 0: at the end. (0)")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, data order and rounding follow from it. (1)")] = None,
    out: Annotated[Path, typer.Option(help="Directory for run.toml, records and summary.json.")] = Path("runs/latest"),
    config: Config = None,
    overrides: Override = None,
    one_process: Annotated[
        bool, typer.Option("--one-process", help="The same modules in one process, without links.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out already.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also trace.json (see ui.perfetto.dev) and trace.png: what ran when.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Go on with the run in this directory, from its newest common checkpoint."),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often a stage that was lost is started again; the others wait for it.")
    ] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: none. (100)")] = None,
    isolate: Annotated[
        str | None,
        typer.Option(
            help="netns: each node in a network namespace, its one interface capped by the kernel (tbf); needs root."
        ),
    ] = None,
    keys: KeysDirectory = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Serve figures over HTTP: stage N at this port, or host:port, plus N (none: nowhere)."),
    ] = None,
    tensorboard: TensorBoard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, and nothing else.")] = False,
) -> None:
    """Train on this machine: a swarm of stage processes joined by capped links, watched until it ends."""
    one_arithmetic_thread()
    if isolate not in (None, "netns"):
        fail(f"--isolate: there is no '{isolate}'; it is netns, or left away", 2)
    is_directory = model is not None and (os.sep in model or Path(model).is_dir())
    options = {
        "pipeline.stages": stages,
        "model.path" if is_directory else "model.preset": model,
        "data.source": data,
        "codec.codec": codec,
        "codec.forward": forward,
        "codec.backward": backward,
        "link.link": link,
        "run.steps": steps,
        "pipeline.schedule": schedule,
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
        "run.eval_every": eval_every,
        "run.seed": seed,
        "checkpoint.every": checkpoint_every,
    }
    watch = {"watch.prometheus": prometheus, "watch.tensorboard": tensorboard}
    auto = schedule if schedule and schedule.endswith(":hop=auto") else None
    if auto:
        options["pipeline.schedule"] = auto.removesuffix(":hop=auto")
    if resume is not None:
        auto = None  # the run's own
        config, out, options = _resumed(resume, one_process), resume, {"checkpoint.every": checkpoint_every}
    settings = configuration(config, {**options, **watch}, overrides)
    from ..node.local import run_local

    with run_errors(out):
        summary = run_local(
            settings,
            out,
            one_process=one_process,
            overwrite=overwrite,
            trace=trace,
            quiet=as_json,
            resume=resume is not None,
            restarts=restarts,
            schedule=auto,
            isolate=isolate is not None,
            keys=keys,
        )
    if as_json:
        print(json.dumps(summary, indent=2))


def _resumed(run: Path, one_process: bool) -> Path:
    """The run.toml to go on with."""
    if one_process:
        fail("--resume: only a swarm writes checkpoints; leave --one-process away", 2)
    return run_toml(run, "--resume")


def node(
    config: Annotated[Path, typer.Option(help="The run.toml that all nodes of the run share.")],
    stage: Annotated[int, typer.Option(help="Which stage this node hosts, from 0.", min=0)],
    listen: Annotated[str | None, typer.Option(help="host:port where the stage above reaches this node.")] = None,
    next_: Annotated[str | None, typer.Option("--next", help="host:port of the stage below.")] = None,
    link: Link = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for this node's records. (beside run.toml)")] = None,
    overrides: Override = None,
    trace: Annotated[bool, typer.Option("--trace", help="Write what ran when, for ui.perfetto.dev.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Take the stage's place in a run that has begun, from its newest checkpoint."),
    ] = False,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    prometheus: Prometheus = None,
    tensorboard: TensorBoard = None,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
) -> None:
    """Host one stage. Neighbours may start in any order and wait for each other."""
    one_arithmetic_thread()
    options = {
        "link.link": link,
        "compute.device": device,
        "watch.prometheus": prometheus,
        "watch.tensorboard": tensorboard,
    }
    settings = configuration(config, options, overrides)
    if stage >= settings.pipeline.stages:
        fail(
            f"--stage {stage}: the run has {settings.pipeline.stages} stages, so 0 to {settings.pipeline.stages - 1}", 2
        )
    from ..node.host import Addresses, HostError, HostOptions, check_input, host
    from ..node.keys import KeysError
    from ..node.local import LocalRunError, writable
    from ..node.security import choose

    addresses = Addresses(listen=listen, next=next_)
    try:
        check_input(settings, stage, addresses)
        run, who = settings.run.name, [stage]
        security = choose(keys, insecure=insecure, listen=listen, dial=next_, run=run, stages=who)
        if security.warning:
            print(f"thinpipe: warning: {security.warning}", file=sys.stderr)
        directory = writable(out or config.parent)
        options = HostOptions(out=directory, trace=trace, parent=parent, resume=resume, security=security)
        host(settings, stage, addresses, options)
    except KeysError as error:
        fail(str(error), 2)
    except (HostError, LocalRunError) as error:
        fail(str(error), error.exit_code)
