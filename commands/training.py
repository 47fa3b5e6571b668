"""`thinpipe up`: train on this machine, a new run or one that is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Config,
    KeysDirectory,
    Link,
    Override,
    TensorBoard,
    configuration,
    fail,
    is_own_process,
    model_setting,
    one_arithmetic_thread,
    run_errors,
    run_toml,
    said,
)

if TYPE_CHECKING:
    from ..node.config import RunConfig


def up(
    stages: Annotated[int | None, typer.Option(help="Number of pipeline stages, one process each. (4)")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model: preset tiny, 150m, 500m or 1b, or the directory of a Hugging Face decoder. (tiny)"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to train on: stdlib, a file or directory, or hf:NAME. (stdlib)")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Codec, which compresses tensors between stages: mapl, mapl:r=64,... or dense bf16, int8. (mapl)"
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(help="Byte format of activations: fp32 to int3, or rvq:groups=8,codes=256,... (the codec's)"),
    ] = None,
    backward: Annotated[
        str | None, typer.Option(help="Byte format of gradients: the same choices. (the codec's)")
    ] = None,
    link: Link = None,
    steps: Annotated[int | None, typer.Option(help="Number of training steps. (200)")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Schedule: gpipe, 1f1b or zb; for slow links such as 1f1b:rtt_ratio=1.8. "
            "rtt_ratio=auto chooses the depth by simulation. (1f1b)"
        ),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches per step: parts of its batch. (8)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step. (16)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence. (128)")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; 0: only at the end. (0)")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed, for weights, data order and rounding. (1)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for run.toml, records and summary.json. (runs/latest)")
    ] = None,
    config: Config = None,
    overrides: Override = None,
    one_process: Annotated[
        bool,
        typer.Option(
            "--one-process",
            help="Run the same modules in one process, without links. The result has the same bits. (off)",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already in --out. (off)")
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also write a timeline: trace.json (for ui.perfetto.dev) and trace.png. (off)"),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="Resume the run in this directory from the newest checkpoint that all its stages have. "
            "Settings that change what it computes are refused.",
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How many times a lost stage is started again. The others wait for it.")
    ] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0 writes none. (100)")
    ] = None,
    isolate: Annotated[
        str | None,
        typer.Option(
            help="netns: each node in a network namespace whose interface the kernel caps (tbf). Needs root. (off)"
        ),
    ] = None,
    keys: KeysDirectory = None,
    prometheus: Annotated[
        str | None,
        typer.Option(
            help="Serve metrics for Prometheus at this PORT or host:port; stage N uses the port plus N. (none)"
        ),
    ] = None,
    tensorboard: TensorBoard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only summary.json on stdout.")] = False,
) -> None:
    """Train on this machine: one process per stage, joined by rate-limited links and watched to the end."""
    one_arithmetic_thread()
    if isolate not in (None, "netns"):
        fail(f"--isolate: there is no '{isolate}'; it is netns, or left away", 2)
    options = {
        "pipeline.stages": stages,
        model_setting(model): model,
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
    options |= {"watch.prometheus": prometheus, "watch.tensorboard": tensorboard}
    auto = schedule if schedule and schedule.endswith(":rtt_ratio=auto") else None
    if auto:
        options["pipeline.schedule"] = auto.removesuffix(":rtt_ratio=auto")
    if resume is None:
        settings = configuration(config, options, overrides)
    elif one_process:
        fail("--resume: only a swarm writes checkpoints; leave --one-process away", 2)
    elif overwrite:
        fail("--resume goes on with a run, --overwrite replaces one; leave one away", 2)
    elif out is not None and out.resolve() != resume.resolve():
        fail(
            f"--resume {resume}: goes on where it is and not in {out}; leave --out away, or begin another run there", 2
        )
    else:
        settings, out = _resumed(resume, said(config, options, overrides), auto), resume
        auto = None  # the depth is the run's own
    from ..node.local import run_local

    out = out or Path("runs/latest")
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
            forks=is_own_process(),
        )
    if as_json:
        print(json.dumps(summary, indent=2))


def _resumed(run: Path, given: dict[str, Any], auto: str | None) -> RunConfig:
    """The settings to go on with: the run's, and what is given now, where that may differ between nodes too. auto: the
    schedule with rtt_ratio=auto, if that was given: whatever depth was found for the run is meant."""
    path = run_toml(run, "--resume")
    own = configuration(path, {}, None)
    if auto and auto.partition(":")[0] == own.pipeline.schedule.partition(":")[0]:
        del given["pipeline.schedule"]
    settings = configuration(path, given, None)
    from ..node.discovery.shared_config import LOCAL, differences

    if settings.digest() != own.digest():
        fail(
            f"--resume {run}: {differences(settings, own)}; a run that goes on keeps what it computes: leave that "
            f"away, or begin another run with --out (only {LOCAL} may change)",
            2,
        )
    return settings
