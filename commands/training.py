"""`thinpipe up`: train on this machine, a new run or one that is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Config,
    DataChanged,
    Json,
    KeysDirectory,
    Override,
    TensorBoard,
    configuration,
    fail,
    is_own_process,
    may_outlast_its_output,
    one_arithmetic_thread,
    run_errors,
    run_of,
    run_toml,
    said,
)
from .options import settings_of, shared, without_auto

if TYPE_CHECKING:
    from ..node.config import RunConfig
    from ..node.origin import Origin


def up(
    stages: Annotated[int | None, shared("--stages", "4")] = None,
    model: Annotated[str | None, shared("--model", "tiny")] = None,
    data: Annotated[str | None, shared("--data", "stdlib")] = None,
    codec: Annotated[str | None, shared("--codec", "mapl")] = None,
    forward: Annotated[str | None, shared("--forward", "the codec's")] = None,
    backward: Annotated[str | None, shared("--backward", "the codec's")] = None,
    link: Annotated[str | None, shared("--link", "none")] = None,
    steps: Annotated[int | None, shared("--steps", "200")] = None,
    schedule: Annotated[str | None, shared("--schedule", "1f1b")] = None,
    cut: Annotated[str | None, shared("--cut", "auto")] = None,
    speeds: Annotated[str | None, shared("--speeds", "alike")] = None,
    lanes: Annotated[int | None, shared("--lanes", "1")] = None,
    average: Annotated[str | None, shared("--average", "outer")] = None,
    chunks: Annotated[int | None, shared("--chunks", "1")] = None,
    context: Annotated[str | None, shared("--context", "full, where there are chunks")] = None,
    microbatches: Annotated[int | None, shared("--microbatches", "8")] = None,
    batch_size: Annotated[int | None, shared("--batch-size", "16")] = None,
    sequence_length: Annotated[int | None, shared("--sequence-length", "128")] = None,
    eval_every: Annotated[int | None, shared("--eval-every", "0")] = None,
    seed: Annotated[int | None, shared("--seed", "1")] = None,
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
            help="Resume the run in this directory from the newest checkpoint that all its stages have. With --steps "
            "it gets another length; other settings that change what it computes are refused.",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN|MODEL",
            help="Begin a new run with the weights of this run, or of this directory of a Hugging Face decoder. What "
            "is not given is as in that run: its tokenizer, data, stages, codec, rates. (random weights)",
        ),
    ] = None,
    data_changed: DataChanged = False,
    restarts: Annotated[
        int, typer.Option(min=0, help="How many times a lost stage is started again. The others wait for it.")
    ] = 0,
    checkpoint_every: Annotated[int | None, shared("--checkpoint-every", "100")] = None,
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
    parent: Annotated[int | None, typer.Option(hidden=True, help="Be killed when this process is gone.")] = None,
    lock: Annotated[
        int | None, typer.Option(hidden=True, help="This descriptor, which was passed on, holds the lock of --out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on this machine: one process per stage (and lane), joined by rate-limited links and watched to the end."""
    if parent is not None:  # before the imports, which take seconds
        from ..sim.launch.parent_death import die_with_parent

        die_with_parent(parent)
    one_arithmetic_thread()
    may_outlast_its_output()
    if isolate not in (None, "netns"):
        fail(f"--isolate: there is no '{isolate}'; say netns, or omit it", 2)
    plain, auto = without_auto(schedule)
    options = settings_of(
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
    options |= {"watch.prometheus": prometheus, "watch.tensorboard": tensorboard}
    if data_changed and resume is None:
        fail("--data-changed goes with --resume: a new run takes whatever text there is; omit it", 2)
    origin = None
    if from_ is not None:
        if resume is not None:
            fail("--from begins a new run, --resume goes on with one; omit one of the two", 2)
        out = out or Path("runs/latest")
        if out.resolve() in (from_.resolve(), run_of(from_, None)[0].resolve()):
            fail(f"--from {from_}: the new run would replace it; choose another --out", 2)
        origin = _begun_from(from_, said(config, options, overrides))
        settings = origin.config
    elif resume is None:
        settings = configuration(config, options, overrides)
    elif overwrite:
        fail("--resume goes on with a run, --overwrite replaces one; omit one", 2)
    elif out is not None and out.resolve() != resume.resolve():
        fail(
            f"--resume {resume}: a resumed run stays in its directory, not {out}; omit --out, or begin a new run there",
            2,
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
            origin=origin,
            restarts=restarts,
            schedule=auto,
            isolate=isolate is not None,
            keys=keys,
            forks=is_own_process(),
            data_changed=data_changed,
            lock=lock,
        )
    if as_json:
        print(json.dumps(summary, indent=2))


def _begun_from(source: Path, given: dict[str, Any]) -> Origin:
    """What a new run begins from; ends with 2 where it cannot."""
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.origin import begin_from
    from ..node.preparation import BAD_INPUT

    try:
        return begin_from(source, given)
    except (*BAD_INPUT, CheckpointError) as error:
        fail(f"--from {source}: {error}", 2)


def _resumed(run: Path, given: dict[str, Any], auto: str | None) -> RunConfig:
    """The settings to go on with: the run's, and what is given now: the number of steps, and what may differ between
    nodes too. auto: a schedule that has to be found, if that was given: whatever was found for the run is meant."""
    from ..protocol.sought_schedule import may_stand_for

    path = run_toml(run, "--resume")
    own = configuration(path, {}, None)
    if auto and may_stand_for(auto, own.pipeline.schedule):
        del given["pipeline.schedule"]
    steps = given.pop("run.steps", None)
    settings = configuration(path, given, None)
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.discovery.shared_config import LOCAL, differences
    from ..node.preparation import BAD_INPUT
    from ..node.run_corpus import check_named_tokenizer, first_checkpoints
    from ..node.run_directory import with_start
    from ..node.run_length import steps_done, with_length

    if settings.digest() != own.digest():
        fail(
            f"--resume {run}: {differences(settings, own)}; a resumed run must compute the same: omit that, "
            f"or begin another run with --out (only {LOCAL} may change, and --steps)",
            2,
        )
    if steps is None:
        return settings
    wanted = configuration(path, {"run.steps": steps, "run.extended": []}, None).run.steps  # if it is a number of steps
    try:
        found = with_start(settings, run)
        check_named_tokenizer(found, first_checkpoints(found, run), run)
        return with_length(settings, steps_done(found, run), wanted)
    except BAD_INPUT as error:
        fail(f"--resume {run}: {error}", 2)
    except CheckpointError as error:
        fail(str(error), 2)
