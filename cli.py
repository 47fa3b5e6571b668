"""The command line: parse, build the configuration, call. Heavy imports happen inside the commands.

Exit codes: 0 done; 1 the run failed (a node died, a wait ran out); 2 the input cannot be used; 130 interrupted.
Every failure is one line on stderr that names the fault, the offender and the remedy.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from .node.config import RunConfig

# What typer raises for wrong usage; it does not export the name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _OneLine(TyperGroup):
    """Wrong usage is one line too, and not a box of five; so is Ctrl-C wherever it comes."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context else "thinpipe"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)  # pyright: ignore[reportAttributeAccessIssue]


app = typer.Typer(
    name="thinpipe",
    cls=_OneLine,
    help="Train one language model over machines that are joined by thin links.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="Start from this run.toml; options override it.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as section.key=value, such as optim.clip=0.5.")
]
Link = Annotated[
    str | None,
    typer.Option("--link", help="Cap and delay of every link, each way: rate,latency such as 300mbit,25ms; or none."),
]


def fail(line: str, exit_code: int) -> NoReturn:
    """One line on stderr, whatever line breaks the cause had."""
    print(f"thinpipe: error: {' '.join(line.split())}", file=sys.stderr)
    raise typer.Exit(exit_code)


def _one_arithmetic_thread() -> None:
    """Before torch is imported: stages share cores, and parity needs one fixed number of threads.

    gRPC's own log is silenced: what matters of it is said once, in our words.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _configuration(path: Path | None, options: dict[str, Any], overrides: list[str] | None) -> RunConfig:
    from .node.config import ConfigError, merge, parse_config, parse_override, read_toml

    try:
        tree = read_toml(path) if path else {}
        given = {key: value for key, value in options.items() if value is not None}
        return parse_config(merge(tree, {**given, **dict(map(parse_override, overrides or []))}))
    except ConfigError as error:
        fail(str(error), 2)


@contextmanager
def _run_errors(out: Path) -> Iterator[None]:
    """A local run that cannot start, fails or is interrupted ends with one line."""
    from .node.local import LocalRunError

    try:
        yield
    except LocalRunError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(f"interrupted; all stages are stopped, the records so far are in {out}", 130)


@app.command()
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
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, and nothing else.")] = False,
) -> None:
    """Train on this machine: a swarm of stage processes joined by capped links, watched until it ends."""
    _one_arithmetic_thread()
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
    auto = schedule if schedule and schedule.endswith(":hop=auto") else None
    if auto:
        options["pipeline.schedule"] = auto.removesuffix(":hop=auto")
    if resume is not None:
        auto = None  # the run's own
        config, out, options = _resumed(resume, one_process), resume, {"checkpoint.every": checkpoint_every}
    settings = _configuration(config, options, overrides)
    from .node.local import run_local

    with _run_errors(out):
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
        )
    if as_json:
        print(json.dumps(summary, indent=2))


def _resumed(run: Path, one_process: bool) -> Path:
    """The run.toml to go on with."""
    if one_process:
        fail("--resume: only a swarm writes checkpoints; leave --one-process away", 2)
    return _run_toml(run, "--resume")


def _run_toml(run: Path, option: str) -> Path:
    if not (run / "run.toml").is_file():
        fail(f"{option} {run}: there is no run.toml, so no run to go on with; give the --out of the run", 2)
    return run / "run.toml"


@app.command()
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
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
) -> None:
    """Host one stage. Neighbours may start in any order and wait for each other."""
    _one_arithmetic_thread()
    settings = _configuration(config, {"link.link": link, "compute.device": device}, overrides)
    if stage >= settings.pipeline.stages:
        fail(
            f"--stage {stage}: the run has {settings.pipeline.stages} stages, so 0 to {settings.pipeline.stages - 1}", 2
        )
    from .node.host import Addresses, HostError, HostOptions, check_input, host
    from .node.local import LocalRunError, writable

    addresses = Addresses(listen=listen, next=next_)
    try:
        check_input(settings, stage, addresses)
        directory = writable(out or config.parent)
        host(settings, stage, addresses, HostOptions(out=directory, trace=trace, parent=parent, resume=resume))
    except (HostError, LocalRunError) as error:
        fail(str(error), error.exit_code)


checkpoint = typer.Typer(
    help="Look at the checkpoints of a run, without changing anything.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(checkpoint, name="checkpoint")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory, which holds its run.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


@checkpoint.command("ls")
def checkpoint_ls(run: Run, as_json: Json = False) -> None:
    """List the checkpoints: by step, what each stage has of it, and whether the run can go on from there.

    Manifests and lengths are looked at; `verify` reads the tensors too.
    """
    _show_checkpoints(run, as_json, thorough=False)


@checkpoint.command("verify")
def checkpoint_verify(run: Run, as_json: Json = False) -> None:
    """Read every checkpoint and compare its digests.

    Exit code 1 if any is damaged, 2 if RUN is not a run's directory.
    """
    if _show_checkpoints(run, as_json, thorough=True):
        raise typer.Exit(1)


def _show_checkpoints(run: Path, as_json: bool, *, thorough: bool) -> int:
    """Print what is there; returns how many are damaged, each of which has its line on stderr."""
    if not (run / "run.toml").is_file():
        fail(f"{run} is not the directory of a run: it holds no run.toml; name the --out of a run", 2)
    settings = _configuration(run / "run.toml", {}, None)
    from .node.manifest import CheckpointError
    from .node.survey import survey, survey_table

    directory = settings.checkpoint.path(run)
    try:
        found = survey(directory, run=settings.run.name, stages=settings.pipeline.stages, thorough=thorough)
    except CheckpointError as error:
        fail(str(error), 1)
    if as_json:
        print(json.dumps({"directory": str(directory), "verified": thorough, "checkpoints": found}, indent=2))
    elif not found:
        print(f"no checkpoints in {directory}; set checkpoint.every to have some")
    else:
        from rich.console import Console

        Console().print(survey_table(found))
    damaged = [held["problem"] for row in found for held in row["stages"] if held["state"] == "damaged"]
    for line in damaged:
        print(f"thinpipe: {line}", file=sys.stderr)
    return len(damaged)


@app.command()
def plan(
    pace: Annotated[
        str | None,
        typer.Option(help="Model, stages and what each stage computes: PRESET@STAGESxRATEtflops, as 150m@4x66tflops."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="Instead, a run on record: its model, stages and times.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="What crosses a boundary, as for up. (bf16)")] = None,
    forward: Annotated[str | None, typer.Option(help="Byte format of activations. (the codec's)")] = None,
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients. (the codec's)")] = None,
    link: Link = None,
    schedule: Annotated[
        str | None, typer.Option(help="gpipe, 1f1b, zb; 1f1b:hop=1.8, zb:hop=1.8; hop=auto finds the depth. (1f1b)")
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (64; of the run)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (256; of the run)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (1024; of the run)")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw what runs when, as PNG.")] = None,
    rule: Annotated[
        str, typer.Option(help="duplex: each direction a wire. shared: all into a stage is one, latency occupies it.")
    ] = "duplex",
    config: Config = None,
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
) -> None:
    """Say what a run would do, without running it: tokens/s, bottleneck, what the links must carry.

    A simulation on a virtual clock, with the schedule that nodes execute and the bytes that they would send.
    """
    _one_arithmetic_thread()
    options = {
        "codec.codec": codec,
        "codec.forward": forward,
        "codec.backward": backward,
        "link.link": link,
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
    }
    from .node.config import ConfigError
    from .node.pace import Pace
    from .node.plan import PLANNED, planned

    try:
        paced = None if pace is None else Pace.parse(pace)
    except ConfigError as error:
        fail(str(error), 2)
    if (paced is None) == (measured is None):
        fail("say how fast stages compute: --pace 150m@4x66tflops, or --from a run that was measured", 2)
    if rule not in ("duplex", "shared"):
        fail(f"--rule: there is no '{rule}'; choose duplex or shared", 2)
    if measured is not None:
        config = _run_toml(measured, "--from")
    given = {key: value for key, value in options.items() if value is not None}
    if schedule and not schedule.endswith(":hop=auto"):
        given["pipeline.schedule"] = schedule
    settings = _configuration(config, {**(paced.settings() if paced else {}), **given}, overrides)
    try:
        spec = schedule or settings.pipeline.schedule
        figures, simulated = planned(settings, paced, measured, schedule=spec, rule=rule)
    except PLANNED as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        from rich.console import Console

        from .sim.console import plan_tables

        Console().print(*plan_tables(figures), sep="\n")
    if timeline:
        from .node.plan import events
        from .sim.trace import draw

        draw(events(simulated), settings.pipeline.stages, timeline, window_s=figures["step_s"])


@app.command()
def bench(
    pace: Annotated[
        list[str] | None,
        typer.Option(
            help="Stages that take the time of another machine: 150m@4x66tflops, 1b@4x66tflops, 150m@4x5ms+10ms."
        ),
    ] = None,
    free_running: Annotated[
        list[str] | None, typer.Option(help="Stages that really train, as fast as they can: PRESET@STAGES, as tiny@2.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Codecs, each CODEC [FORWARD [BACKWARD]], with commas between them.")
    ] = "bf16,int8,int4,mapl",
    link: Annotated[
        list[str] | None, typer.Option("--link", help="Rate and latency, as 300mbit,25ms. Give it once for each link.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Links of 10, 80, 300 and 1000 Mb/s, 25 ms each.")] = False,
    schedule: Annotated[
        str, typer.Option(help="Schedules, with commas between them; hop=auto finds the depth for each link.")
    ] = "1f1b:hop=auto",
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (64; free-running 8)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (256; free-running 16)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (1024; free-running 128)")] = None,
    window: Annotated[float, typer.Option(min=0.5, help="Seconds of each of a cell's three windows, at least.")] = 5.0,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds of a cell; one that needs more is only planned.")
    ] = 600.0,
    out: Annotated[Path, typer.Option(help="Directory for the cells, bench.json and bench.png.")] = Path("runs/bench"),
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json on stdout, and nothing else.")] = False,
) -> None:
    """Measure throughput over capped links: a swarm for each codec and link, beside the same without a cap.

    Cells that --out holds already are not run again. Exit code 1 if a cell failed or does not count.
    """
    _one_arithmetic_thread()
    from .node.bench import Grid, run_bench, split_codecs
    from .node.config import ConfigError, parse_override
    from .node.plan import PLANNED

    links = (*(link or ()), *(f"{rate}mbit,25ms" for rate in (10, 80, 300, 1000) if sweep))
    if not (pace or free_running):
        fail("say how stages compute: --pace 150m@4x66tflops or --free-running tiny@2", 2)
    if not links:
        fail("say over which links: --link 300mbit,25ms or --sweep", 2)
    options = {
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
    }
    try:
        settings = {key: value for key, value in options.items() if value is not None}
        settings |= dict(map(parse_override, overrides or []))
        grid = Grid(
            paces=tuple(pace or ()),
            free_running=tuple(free_running or ()),
            codecs=tuple(split_codecs(codec)),
            links=links,
            schedules=tuple(schedule.split(",")),
            settings=settings,
            window_s=window,
            limit_s=limit,
        )
        with _run_errors(out):
            found = run_bench(grid, out, quiet=as_json)
    except (ConfigError, *PLANNED) as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
    if any(cell["state"] in ("failed", "refused") for cell in found["cells"]):
        raise typer.Exit(1)


@app.command()
def probe(
    to: Annotated[
        str | None, typer.Option("--to", help="host:port of a node's listener, or of a probe --listen.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Answer probes at this host:port until Ctrl-C.")
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", help="Shape both ways: rate,latency such as 300mbit,25ms. (none)")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="For each direction, 0.2 to 10. (2)")] = None,
    once: Annotated[bool, typer.Option("--once", help="With --listen: end after one probe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
) -> None:
    """Measure rate and round trip between two machines, both ways, before a run.

    Start `thinpipe probe --listen 0.0.0.0:7001` on one machine and `thinpipe probe --to HOST:7001` on the other. A node
    that waits for its neighbours answers too; one in a run answers round trips only. With --link both sides shape what
    they send, and what is more than 10 % off is said. Exit code 1: no answer in time; 2: nobody to ask there.
    """
    _one_arithmetic_thread()
    if (to is None) == (listen is None):
        fail("say --to host:port, to measure, or --listen host:port, to be measured", 2)
    for option, given, other in (("--once", once, to), ("--link", link, listen), ("--seconds", seconds, listen)):
        if given and other:
            fail(f"{option} does not go with --{'to' if other is to else 'listen'}; leave it away", 2)
    from .node.probe import listen as answer
    from .node.probe import print_probe
    from .node.reach import ProbeError

    try:
        if listen is not None:
            answer(listen, once=once)
        elif to is not None:
            print_probe(to, link or "none", 2.0 if seconds is None else seconds, as_json=as_json)
    except ProbeError as error:
        fail(str(error), error.exit_code)


@app.command()
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
    _one_arithmetic_thread()
    from .sim.chaos import KINDS, Kind

    named = kinds.split(",")
    chosen: tuple[Kind, ...] = tuple(kind for kind in KINDS if named.count(kind))
    if unknown := [kind for kind in named if kind not in KINDS]:
        fail(f"--kinds: no fault is called '{unknown[0]}'; choose from {', '.join(KINDS)}", 2)
    # Small, because what is tested is the machinery: a step has to be short beside the start of a process.
    small = {"model.preset": "tiny", "pipeline.batch_size": 8, "pipeline.microbatches": 4, "data.sequence_length": 32}
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
    settings = _configuration(None, {**small, **options}, overrides)
    from .node.chaos import run_chaos

    with _run_errors(out):
        found, survived = run_chaos(settings, out, count=kills, every_s=every, kinds=chosen, seed=seed, quiet=as_json)
    if as_json:
        print(json.dumps(found, indent=2))
    if not survived:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
