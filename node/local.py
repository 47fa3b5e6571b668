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

from ..protocol.grid_place import grid
from ..protocol.schedule import schedule_title
from ..sim.launch.fork_server import ForkServer
from ..sim.launch.isolation import isolated
from ..sim.launch.local_swarm import SwarmError, Watch, run_swarm
from ..sim.links.shaper import LinkProfile
from ..sim.links.tc import KernelLinkError
from ..sim.reports.lanes import lane_path
from ..sim.reports.lanes_summary import averaging_lines, summarise_run
from ..sim.reports.metrics_address import MetricsAddress, MetricsAddressError
from ..sim.reports.preparation_console import PreparationDisplay
from ..sim.reports.progress import Progress
from ..sim.reports.run_console import closing_lines, summary_tables
from ..sim.reports.run_display import RunDisplay
from ..sim.reports.summary import checkpoint_lines, lacking_lines, mode_of, write_summary
from ..sim.reports.trace import draw, merge
from .checkpoints.manifest import CheckpointError
from .config import ConfigError, RunConfig, recommended_line
from .config_file import load_config
from .long_preparation import SAY_AFTER_S
from .measuring.dense_comparison import add_comparison
from .measuring.schedule_search import with_schedule
from .one_process import OneProcess
from .origin import Origin
from .preload import fork_server
from .preparation import BAD_INPUT, check_settings, model_line
from .resuming import check_checkpoints, interrupted
from .run_corpus import RunCorpus, check_named_tokenizer, first_checkpoints, open_run_corpus
from .run_directory import (
    LOCK,
    START,
    LocalRunError,
    anchored,
    await_unserved,
    check_no_checkpoints,
    check_outlives,
    claimed,
    clear,
    hold_aside,
    sweep,
    with_start,
    writable,
    write_settings,
)
from .run_lanes import check_text_stays
from .run_length import length_line
from .security.key_directory import clock, load
from .stage_failure import FAILED
from .stage_state import StateError


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
    data_changed: bool = False,
    lock: int | None = None,
) -> dict[str, Any]:
    """Run `config` on this machine and return its summary, which is also in `out`. Raises LocalRunError.

    resume: go on with the run that is in `out`; its run.toml gets what `config` has changed. origin: what a new run
    begins from, with `config` its settings; what it needs of that is written into `out`. restarts: how many lost
    stages are replaced. schedule: one that is found by simulation before the first step (rtt_ratio=auto, best), for
    the whole run; run.toml has it. isolate: each node in a network namespace of its own, and its link capped by the
    kernel. keys: of all stages at once, for TLS between them. forks: what nodes are forked from; True: this
    process, which must not have begun anything, or interpreters where that cannot be; False: interpreters.
    data_changed: resume though the text is another one. lock: a descriptor that holds the directory's lock already.
    """
    console = Console(stderr=quiet, markup=False)  # what it says is the user's own words, brackets too
    missing = [directory for directory in (out, *out.parents) if not directory.exists()]
    started = False
    config = anchored(config)
    aside = out / f".{START}-{os.getpid()}"
    with ExitStack() as held:
        isolation, told = None, None
        try:
            sweep(out)
            if origin:
                _check_room(out, overwrite)
                if origin.found:
                    held.callback(os.close, hold_aside(aside))
                config = anchored(origin.place(aside))
            elif resume:
                _check_mode(config, out, one_process=one_process)
                config = with_start(config, out)
                check_named_tokenizer(config, first_checkpoints(config, out), out)
            check_text_stays(config, data_changed=data_changed)
            width = check_settings(config)
            watch = _watch(config, isolate=isolate)
            _check_one_process(config, isolate=isolate, one_process=one_process, keys=keys)
            if keys is not None:
                load(keys, now=clock(), run=config.run.name, places=grid(config.pipeline.stages, config.lanes.count))
            _check_room(out, overwrite or resume)
            if not resume:
                check_outlives(config, out)
            begun = (out / "run.toml").exists()
            if begun:  # who is refused is refused now, and not after the text was prepared
                _claim(held, out, lock)
            if resume:
                check_checkpoints(config, out)
            else:
                check_no_checkpoints(config, out)
            if forks is True and not (one_process or isolate):
                found = fork_server(config)
                if isinstance(found, ForkServer):
                    forks = found
                    held.callback(found.close)
                else:
                    print(f"thinpipe: nodes start as interpreters of their own: {found}", file=sys.stderr)
            with PreparationDisplay(console, config.data.source) as preparing:
                text = open_run_corpus(config, out, resume=resume, changed=data_changed, report=preparing.report)
            for line in filter(None, (text.corpus.line, model_line(config))):
                console.print(line, highlight=False, soft_wrap=True)
            for line in text.corpus.warnings:
                print(f"thinpipe: warning: {line}", file=sys.stderr)
            if schedule:
                with _doing(console, "timing a microbatch"):
                    config = with_schedule(config, schedule)
                console.print(
                    f"schedule from step 0: {schedule_title(config.pipeline.schedule)}", highlight=False, soft_wrap=True
                )
            if isolate:
                link = LinkProfile.parse(config.link.link)
                nodes = config.lanes.count * config.pipeline.stages
                isolation = held.enter_context(isolated(nodes, link))
                console.print(f"isolated: {isolation}", highlight=False, soft_wrap=True)
            if not begun:
                _claim(held, out, lock)
                _check_room(out, overwrite or resume)  # still: somebody else may have been quicker
            started = True
            if not resume:
                clear(out, keep=config.model.path)
                text.keep(out)
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
            write_settings(config, out / "run.toml")
            resumes = 0 if resume else None
            display = RunDisplay(console, steps=config.run.steps, resumes=resumes)
            with display:
                if one_process:
                    _run_one_process(config, out, display, text, resume=resume)
                else:
                    told = run_swarm(
                        out,
                        stages=config.pipeline.stages,
                        lanes=config.lanes.count,
                        grouped=bool(config.context.method),
                        trace=trace,
                        resume=resume,
                        restarts=restarts,
                        isolation=isolation,
                        keys=keys,
                        watch=watch,
                        forks=forks if isinstance(forks, ForkServer) else None,
                        node_options={0: ["--data-changed"]} if data_changed else None,
                        on_progress=display.update,
                        on_warning=display.warn,
                    )
            for lane in range(config.lanes.count) if trace and not one_process else ():
                _draw(lane_path(out, lane, config.lanes.count), config.pipeline.stages)
        except (*BAD_INPUT, KernelLinkError, MetricsAddressError) as error:
            raise LocalRunError(str(error), 2) from None
        except SwarmError as error:
            raise LocalRunError(str(error), error.exit_code) from None
        except KeyboardInterrupt as error:
            why = str(error) or "interrupted"
            raise LocalRunError(interrupted(why, config, out, begun=started, one_process=one_process), 130) from None
        except FAILED as error:  # of the one process; a node's are in SwarmError
            raise LocalRunError(str(error), 1) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if not started:  # refused input leaves nothing behind
                with suppress(OSError):
                    for directory in missing:
                        directory.rmdir()
        mode = "one-process" if one_process else "swarm"
        try:
            summary = summarise_run(
                out,
                lanes=config.lanes.count,
                stages=config.pipeline.stages,
                width=width,
                mode=mode,
                of_steps=config.run.steps,
            )
        except ValueError as error:
            if told:  # before the first step
                line = interrupted(f"stopped by {told}", config, out, begun=True)
                raise LocalRunError(line, 130) from None
            raise LocalRunError(str(error), 1) from None
        if isolation:
            summary["isolation"] = isolation.record()
        add_comparison(summary, out, config)
        _report(summary, out, console, told, quiet=quiet)
    return summary


def _report(summary: dict[str, Any], out: Path, console: Console, told: str | None, *, quiet: bool) -> None:
    """Write it down and say it. told: the signal that ended the run, if one did."""
    lines = [check["warning"] for check in summary["link_check"]]
    lines += [*lacking_lines(summary), *checkpoint_lines(summary), *averaging_lines(summary)]
    try:
        write_summary(out, summary)
    except OSError as error:
        lines.append(f"cannot write {out}/summary.json: {error.strerror}; thinpipe summary {out} --write does it later")
    for line in filter(None, lines):
        print(f"thinpipe: warning: {line}", file=sys.stderr)
    if not quiet:
        for table in summary_tables(summary):
            console.print(table)
        files = "run.toml, summary.json, one stage-N.jsonl per stage"
        if lanes := summary.get("lanes"):
            files = f"run.toml, summary.json, and in lane-0 to lane-{len(lanes) - 1} one stage-N.jsonl per stage"
        console.print(f"everything is in {out}: {files}", markup=False, soft_wrap=True)
    early = told and summary["completed"] < summary["of_steps"]
    if early:
        console.print(f"stopped by {told}", highlight=False)
    if early or not quiet:
        for line in closing_lines(summary, out)[: 1 if quiet else None]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _draw(out: Path, stages: int) -> None:
    try:
        draw(merge(out, stages), stages, out / "trace.png")
    except OSError as error:
        print(f"thinpipe: warning: no timeline in {out}: {error}", file=sys.stderr)


def _claim(held: ExitStack, out: Path, lock: int | None) -> None:
    """Nobody else trains this run from now on. lock: who started this process holds it."""
    if lock is None:
        held.enter_context(claimed(out / LOCK))
    await_unserved(out)


def _check_one_process(config: RunConfig, *, isolate: bool, one_process: bool, keys: Path | None) -> None:
    if not one_process:
        return
    if isolate:
        raise ConfigError("--isolate: one process has no links to cap; omit --one-process")
    if config.compute.emulate:
        raise ConfigError("compute.emulate: one process has no links to wait for; omit --one-process")
    if keys is not None:
        raise ConfigError("--keys: one process has no links to secure; omit one of the two")


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
        for node in range(config.lanes.count * config.pipeline.stages):
            first.of_stage(node).check_free()
    return Watch(prometheus=first, tensorboard=config.watch.tensorboard)


def _check_room(out: Path, overwrite: bool) -> None:
    writable(out)
    if (out / "run.toml").exists() and not overwrite:
        raise LocalRunError(f"{out} holds a run already; choose another --out, or say --overwrite to replace it", 2)


def _check_mode(config: RunConfig, out: Path, *, one_process: bool) -> None:
    """Raises LocalRunError for a run that was trained the other way: its records say what links did, or that there were
    none."""
    lane = lane_path(out, 0, config.lanes.count)
    was = mode_of(lane)
    if was and was != ("one-process" if one_process else "swarm"):
        told = {"swarm": "by a swarm; omit --one-process", "one-process": "in one process; say --one-process"}[was]
        raise LocalRunError(f"--resume {out}: the run was trained {told}", 2)


def _run_one_process(config: RunConfig, out: Path, display: RunDisplay, text: RunCorpus, *, resume: bool) -> None:
    reference = OneProcess(config, out, corpus=text.corpus, resume=resume)
    progress = Progress(out, stages=config.pipeline.stages, lanes=config.lanes.count)

    def show(step: int, loss: float) -> None:
        del step, loss
        display.update(progress.look())

    with closing(reference):
        try:
            reference.keep_checkpoints(out, text, resume=resume, report=display.warn).keep(out)
        except (CheckpointError, StateError) as error:
            raise LocalRunError(str(error), 2) from None
        reference.train(show)
