"""A whole run on this machine, as `thinpipe up` does it: check, prepare, run, summarise.

Everything that can be wrong with the input is found here, before a process starts: settings, codec and link spelling,
the cut of the model, the data, the directory. Then the run is either a swarm of node processes
(`sim.launch.local_swarm`) or the one-process reference, and both end with the same summary from the same records.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from ..sim.launch.fork_server import ForkServer
from ..sim.launch.isolation import isolated
from ..sim.launch.local_swarm import Progress, SwarmError, Watch, run_swarm
from ..sim.links.shaper import LinkProfile
from ..sim.links.tc import KernelLinkError
from ..sim.reports.metrics_address import MetricsAddress, MetricsAddressError
from ..sim.reports.preparation_console import PreparationDisplay
from ..sim.reports.run_console import RunDisplay, closing_lines, summary_tables
from ..sim.reports.summary import lacking_lines, summarise, write_summary
from ..sim.reports.trace import draw, merge
from .config import ConfigError, RunConfig, recommended_line
from .config_file import dump_config, load_config
from .long_preparation import SAY_AFTER_S
from .measuring.dense_comparison import add_comparison
from .measuring.plan import with_depth
from .one_process import OneProcess
from .origin import START, Origin
from .preload import fork_server
from .preparation import BAD_INPUT, check_settings, model_line, prepare_corpus
from .run_length import length_line
from .security.key_directory import clock, load
from .stage_failure import FAILED

RECORDS = ("run.toml", "summary.json", "stage-*.jsonl", "stage-*.log", "checkpoints/stage-*", "checkpoints/copies")
RECORDS += ("disks/stage-*", "trace-stage-*.json", "trace.json", "trace.png", "tensorboard/stage-*", START)


class LocalRunError(RuntimeError):
    """The run cannot start or did not finish; one line says why."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def writable(directory: Path) -> Path:
    """Create `directory` and make sure that files can be written in it. Raises LocalRunError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LocalRunError(f"cannot write in {directory}: {error.strerror}; choose another --out", 2) from None
    return directory


def run_local(
    config: RunConfig,
    out: Path,
    *,
    one_process: bool = False,
    overwrite: bool = False,
    trace: bool = False,
    quiet: bool = False,
    resume: bool = False,
    origin: Origin | None = None,
    restarts: int = 0,
    schedule: str | None = None,
    isolate: bool = False,
    keys: Path | None = None,
    forks: ForkServer | bool = False,
) -> dict[str, Any]:
    """Run `config` on this machine and return its summary, which is also in `out`. Raises LocalRunError.

    resume: go on with the run that is in `out`; its run.toml gets what `config` has changed. origin: what a new run
    begins from, with `config` its settings; what it needs of that is written into `out`. restarts: how many lost
    stages are replaced. schedule: one with rtt_ratio=auto, whose depth is found before the first step, for the whole
    run; run.toml has it. isolate: each node in a network namespace of its own, and its link capped by the kernel. keys:
    of all stages at once, for TLS between them. forks: what nodes are forked from; True: this process, which must not
    have begun anything, or interpreters where that cannot be; False: interpreters.
    """
    console = Console(stderr=quiet, markup=False)  # what it says is the user's own words, brackets too
    missing = [directory for directory in (out, *out.parents) if not directory.exists()]
    started = False
    aside = out / f".{START}-{os.getpid()}"
    namespaces, isolation, isolated_by = ExitStack(), None, None
    try:
        if origin:
            _check_room(out, overwrite)
            config = origin.place(aside)
        width = check_settings(config)
        watch = _watch(config, isolate=isolate)
        if isolate and one_process:
            raise ConfigError("--isolate: one process has no links to cap; omit --one-process")
        if one_process and config.compute.emulate:
            raise ConfigError("compute.emulate: one process has no links to wait for; omit --one-process")
        if keys is not None:
            if one_process:
                raise ConfigError("--keys: one process has no links to secure; omit one of the two")
            load(keys, now=clock(), run=config.run.name, stages=list(range(config.pipeline.stages)))
        _check_room(out, overwrite or resume)
        if forks is True and not (one_process or isolate):
            found = fork_server(config)
            if isinstance(found, ForkServer):
                forks = found
                namespaces.callback(found.close)
            else:
                print(f"thinpipe: nodes start as interpreters of their own: {found}", file=sys.stderr)
        with PreparationDisplay(console, config.data.source) as preparing:
            corpus = prepare_corpus(config, preparing.report)
        for line in filter(None, (corpus.line, model_line(config))):
            console.print(line, highlight=False, soft_wrap=True)
        for line in corpus.warnings:
            print(f"thinpipe: warning: {line}", file=sys.stderr)
        if schedule:
            with _doing(console, "timing a microbatch"):
                config = with_depth(config, schedule)
            console.print(f"schedule from step 0: {config.pipeline.schedule}", highlight=False)
        if isolate:
            link = LinkProfile.parse(config.link.link)
            isolation = namespaces.enter_context(isolated(config.pipeline.stages, link))
            console.print(f"isolated: {isolation}", highlight=False)
        started = True
        if not resume:
            clear(out, keep=config.model.path)
        if origin:
            for line in (*origin.lines, *origin.boundary_lines()):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            if aside.exists():
                aside.rename(out / START)
            config = origin.placed(config, out / START)
        if line := recommended_line(config):
            console.print(line, highlight=False, soft_wrap=True)
        if resume and (line := length_line(load_config(out / "run.toml"), config)):
            console.print(line, highlight=False, soft_wrap=True)
        _write_settings(config, out / "run.toml")
        lives = Progress(out, stages=1).look()[0].lives if resume else None
        display = RunDisplay(console, steps=config.run.steps, resumes=lives)
        with display:
            if one_process:
                _run_one_process(config, out, display)
            else:
                run_swarm(
                    out,
                    stages=config.pipeline.stages,
                    trace=trace,
                    resume=resume,
                    restarts=restarts,
                    isolation=isolation,
                    keys=keys,
                    watch=watch,
                    forks=forks if isinstance(forks, ForkServer) else None,
                    on_progress=display.update,
                )
                isolated_by = isolation.record() if isolation else None
        if trace and not one_process:
            draw(merge(out, config.pipeline.stages), config.pipeline.stages, out / "trace.png")
    except (*BAD_INPUT, KernelLinkError, MetricsAddressError) as error:
        raise LocalRunError(str(error), 2) from None
    except SwarmError as error:
        raise LocalRunError(str(error), error.exit_code) from None
    except FAILED as error:  # of the one process; a node's are in SwarmError
        raise LocalRunError(str(error), 1) from None
    finally:
        namespaces.close()
        shutil.rmtree(aside, ignore_errors=True)
        if not started:  # refused input leaves nothing behind
            with suppress(OSError):
                for directory in missing:
                    directory.rmdir()
    mode = "one-process" if one_process else "swarm"
    try:
        summary = summarise(out, stages=config.pipeline.stages, width=width, mode=mode)
    except ValueError as error:
        raise LocalRunError(str(error), 1) from None
    if isolated_by:
        summary["isolation"] = isolated_by
    add_comparison(summary, out, config)
    write_summary(out, summary)
    for line in filter(None, (*(check["warning"] for check in summary["link_check"]), *lacking_lines(summary))):
        print(f"thinpipe: warning: {line}", file=sys.stderr)
    if not quiet:
        for table in summary_tables(summary):
            console.print(table)
        where = f"everything is in {out}: run.toml, summary.json, one stage-N.jsonl per stage"
        console.print(where, highlight=False)
        for line in closing_lines(summary):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return summary


@contextmanager
def _doing(console: Console, what: str) -> Iterator[None]:
    """Show what is being done; in a pipe or a file, where nothing can be shown for a while, as a line if it lasts."""
    if console.is_terminal:
        with console.status(what):
            yield
        return
    line = threading.Timer(SAY_AFTER_S, console.print, [f"{what}, which may take a while"], {"highlight": False})
    line.daemon = True
    line.start()
    try:
        yield
    finally:
        line.cancel()


def _watch(config: RunConfig, *, isolate: bool) -> Watch:
    """Who may look at the nodes. Raises ConfigError or MetricsAddressError where they could not."""
    first = MetricsAddress.parse(config.watch.prometheus) if config.watch.prometheus else None
    if first and isolate:
        raise ConfigError(
            "--prometheus: a node of --isolate cannot be reached from outside its namespace; omit one of the two, and "
            "watch the records with thinpipe top"
        )
    if first:
        for stage in range(config.pipeline.stages):
            first.of_stage(stage).check_free()
    return Watch(prometheus=first, tensorboard=config.watch.tensorboard)


def _check_room(out: Path, overwrite: bool) -> None:
    writable(out)
    if (out / "run.toml").exists() and not overwrite:
        raise LocalRunError(f"{out} holds a run already; choose another --out, or say --overwrite to replace it", 2)


def clear(out: Path, *, keep: Path | None = None) -> None:
    """Remove what a run leaves in its directory, and nothing else; nor `keep`, if that is in it."""
    for pattern in RECORDS:
        for path in out.glob(pattern):
            if keep and path.resolve() == keep.resolve():
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_settings(config: RunConfig, path: Path) -> None:
    """Whole or not at all: a run cannot be gone on with without them."""
    if path.exists() and load_config(path) == config:
        return
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.replace(path)


def _run_one_process(config: RunConfig, out: Path, display: RunDisplay) -> None:
    reference = OneProcess(config, out)
    progress = Progress(out, stages=config.pipeline.stages)

    def show(step: int, loss: float) -> None:
        del step, loss
        display.update(progress.look())

    with closing(reference):
        reference.train(show)
