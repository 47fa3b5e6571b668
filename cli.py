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


@app.command()
def up(
    stages: Annotated[int | None, typer.Option(help="Pipeline stages, one process each. (4)")] = None,
    model: Annotated[str | None, typer.Option(help="Preset tiny, 150m, 500m, 1b, or a directory. (tiny)")] = None,
    data: Annotated[str | None, typer.Option(help="'stdlib', a file or directory, or hf:NAME. (stdlib)")] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="What crosses a boundary: fp32, bf16, int8, int4, or mapl:r=32,anchors=full,... (bf16)"),
    ] = None,
    forward: Annotated[str | None, typer.Option(help="Byte format of activations, if not the codec's.")] = None,
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients, if not the codec's.")] = None,
    link: Link = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. (200)")] = None,
    schedule: Annotated[str | None, typer.Option(help="gpipe or 1f1b. (1f1b)")] = None,
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
    }
    settings = _configuration(config, options, overrides)
    from .node.local import LocalRunError, run_local

    try:
        summary = run_local(settings, out, one_process=one_process, overwrite=overwrite, trace=trace, quiet=as_json)
    except LocalRunError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(f"interrupted; all stages are stopped, the records so far are in {out}", 130)
    if as_json:
        print(json.dumps(summary, indent=2))


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
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
) -> None:
    """Host one stage. Neighbours may start in any order and wait for each other."""
    _one_arithmetic_thread()
    settings = _configuration(config, {"link.link": link, "compute.device": device}, overrides)
    if stage >= settings.pipeline.stages:
        fail(
            f"--stage {stage}: the run has {settings.pipeline.stages} stages, so 0 to {settings.pipeline.stages - 1}", 2
        )
    from .node.host import Addresses, HostError, check_input, host
    from .node.local import LocalRunError, writable

    addresses = Addresses(listen=listen, next=next_)
    try:
        check_input(settings, stage, addresses)
        host(settings, stage, addresses, writable(out or config.parent), trace=trace, parent=parent)
    except (HostError, LocalRunError) as error:
        fail(str(error), error.exit_code)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
