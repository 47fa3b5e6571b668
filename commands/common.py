"""What all commands share: options, the configuration that they build, and how a command fails.

Every failure is one line on stderr that names the fault, the offender and the remedy; see cli.py for the exit codes.
Heavy imports happen inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from ..node.config import RunConfig

T = TypeVar("T")
# What typer raises for wrong usage; it does not export the name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def from_home(command: Callable[..., T]) -> Callable[..., T]:
    """The same command, whose paths may begin with ~ behind an equals sign too, where no shell replaces it."""

    @wraps(command)
    def with_paths(**given: Any) -> T:
        return command(**{name: _from_home(value) for name, value in given.items()})

    return with_paths


def _from_home(value: object) -> object:
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class OneLine(TyperGroup):
    """Wrong usage is one line too, and not a box of five; so is Ctrl-C wherever it comes."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with one_line():
            return super().invoke(ctx)


@contextmanager
def one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as told:
        fail(str(told) or "interrupted", 130)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context else "thinpipe"
        fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)  # pyright: ignore[reportAttributeAccessIssue]


Config = Annotated[
    Path | None, typer.Option("--config", help="Read settings from this run.toml. Options and --set override it.")
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Set any setting of run.toml: section.key=value, such as optim.clip=0.5. Repeat it for more."
    ),
]
KeysDirectory = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        help="This node's keys, a directory that `thinpipe keys issue` wrote. Connections then use mutual TLS.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Allow other machines without keys and encryption. Anyone who reaches this one can change the run.",
    ),
]
Prometheus = Annotated[
    str | None,
    typer.Option(
        "--prometheus",
        help="Serve metrics for Prometheus at this PORT of the loopback address, or at host:port. (none)",
    ),
]
TensorBoard = Annotated[
    bool | None, typer.Option("--tensorboard", help="Also write TensorBoard events, to tensorboard/ in --out. (off)")
]
DataChanged = Annotated[
    bool,
    typer.Option(
        "--data-changed",
        help="With --resume: go on though the text has changed. Its ids are those of the run's own tokenizer. (off)",
    ),
]
Lane = Annotated[
    int | None,
    typer.Option("--lane", min=0, help="Lane of a run that has several. (the one with the newest whole checkpoint)"),
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def fail(line: str, exit_code: int) -> NoReturn:
    """One line on stderr, whatever line breaks the cause had."""
    print(f"thinpipe: error: {' '.join(line.split())}", file=sys.stderr)
    raise typer.Exit(exit_code)


def one_arithmetic_thread() -> None:
    """Before torch is imported: stages share cores, and parity needs one fixed number of threads.

    gRPC's own log is silenced: what matters of it is said once, in our words.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


_own_process = False


def run_as_own_process(main: Callable[[], object]) -> NoReturn:
    """Called by the program itself: what `main` does may be done to the whole process, such as making copies of it, or
    leaving it without tidying up. It is not where a command is called by another program, which may have begun
    anything."""
    from ..sim.launch.end_signals import end_as_ctrl_c
    from ..sim.launch.process_exit import end_with

    global _own_process
    _own_process = True
    end_as_ctrl_c()  # from the first moment: a command that ends in order when it is told to has not begun yet
    end_with(main)


def is_own_process() -> bool:
    return _own_process


def may_outlast_its_output() -> None:
    """For commands that have more to do than to print: they go on where stdout or stderr is full, or not read."""
    if _own_process:
        from ..sim.launch.lasting_output import outlast_output

        outlast_output()


def configuration(path: Path | None, options: dict[str, Any], overrides: list[str] | None) -> RunConfig:
    from ..node.config import ConfigError
    from ..node.config_file import merge, parse_config, parse_override, read_toml

    try:
        tree = read_toml(path) if path else {}
        given = {key: value for key, value in options.items() if value is not None}
        return parse_config(merge(tree, {**given, **dict(map(parse_override, overrides or []))}))
    except ConfigError as error:
        fail(str(error), 2)


def said(path: Path | None, options: dict[str, Any], overrides: list[str] | None) -> dict[str, Any]:
    """The settings that were given, and no defaults: in a file, by options and by --set; the later one wins."""
    from ..node.config import ConfigError
    from ..node.config_file import parse_override, read_toml

    found: dict[str, Any] = {}
    try:
        for section, table in (read_toml(path) if path else {}).items():
            entries = table.items() if isinstance(table, dict) else [("", table)]
            found |= {f"{section}.{key}": value for key, value in entries}
        given = {key: value for key, value in options.items() if value is not None}
        return {**found, **given, **dict(map(parse_override, overrides or []))}
    except ConfigError as error:
        fail(str(error), 2)


@contextmanager
def run_errors(out: Path) -> Iterator[None]:
    """A local run that cannot start, fails or is interrupted ends with one line."""
    from ..node.run_directory import LocalRunError

    try:
        yield
    except LocalRunError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as told:
        fail(f"{str(told) or 'interrupted'}; all stages are stopped, the records so far are in {out}", 130)


def run_of(named: Path, lane: int | None) -> tuple[Path, int | None]:
    """The run that the user means, and which lane of it: `runs/demo/lane-1` is lane 1 of `runs/demo`. Ends with 2 where
    it cannot be both."""
    from ..node.config import ConfigError
    from ..node.run_lanes import found_run

    try:
        return found_run(named, lane)
    except ConfigError as error:
        fail(str(error), 2)


def run_toml(run: Path, option: str) -> Path:
    if not (run / "run.toml").is_file():
        if (run.parent / "run.toml").is_file() and run.name.startswith("lane-"):
            fail(f"{option} {run}: that is one lane of the run in {run.parent}; give that", 2)
        fail(f"{option} {run}: there is no run.toml, so no run to go on with; give the --out of the run", 2)
    return run / "run.toml"
