"""`thinpipe chaos`: makes a run with faults, and checks that its result is what it has to be, bit for bit.

Of one lane that is the result of the same run without faults, which is made first. Of several lanes, of which some may
have been left out of rounds, it is what one process computes from the log of members (`node.recomputed_run`), which is
done afterwards; where nobody was left out, that is the run without faults.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...sim.launch.chaos_report import report, report_lanes, survived
from ...sim.launch.fault_injection import disturb
from ...sim.launch.fork_server import ForkServer
from ...sim.launch.local_swarm import SwarmError
from ...sim.launch.planned_faults import Kind, PlannedFault, joining_lane, kinds_for, plan, plan_every
from ...sim.launch.swarm_keeper import Grid, Story
from ...sim.reports.chaos_console import chaos_tables
from ...sim.reports.summary import summarise, write_summary
from ..config import RunConfig
from ..config_file import dump_config, load_config
from ..local import run_local
from ..preload import fork_server
from ..preparation import BAD_INPUT, check_settings, prepare_corpus
from ..recomputed_run import recompute
from ..run_directory import LocalRunError, anchored, clear, writable
from ..stage_failure import FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Which: `count`, spread over the steps, or one every `every_s` seconds, as many as it takes. kinds: None: all that
    can happen to such a grid."""

    count: int
    every_s: float | None
    kinds: tuple[Kind, ...] | None
    seed: int


def run_chaos(
    config: RunConfig,
    out: Path,
    faults: Faults,
    *,
    quiet: bool,
    schedule: str | None = None,
    forks: bool = False,
) -> tuple[dict[str, Any], bool]:
    """The report, also in `out`/chaos.json, and whether nothing was lost. schedule: one with rtt_ratio=auto, whose
    depth is found once, for both runs. forks: nodes are copies of this process, which must not have begun anything.
    Raises LocalRunError."""
    _check(config, faults, schedule)
    console = Console(stderr=True) if quiet else Console()
    with ExitStack() as held:
        server = None
        if forks:
            try:
                check_settings(config)
            except BAD_INPUT as error:
                raise LocalRunError(str(error), 2) from None
            found = fork_server(config)
            server = held.enter_context(closing(found)) if isinstance(found, ForkServer) else None
        if config.lanes.count == 1:
            found = _of_a_chain(config, out, faults, console, quiet=quiet, schedule=schedule, forks=server)
        else:
            found = _of_lanes(config, out, faults, console, forks=server)
    (out / "chaos.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        for table in chaos_tables(found):
            console.print(table)
        other = out / ("undisturbed" if config.lanes.count == 1 else "recomputed")
        where = f"the two runs are in {other} and {out / 'disturbed'}, the figures in {out / 'chaos.json'}"
        console.print(where, markup=False)
    return found, survived(found)


def _check(config: RunConfig, faults: Faults, schedule: str | None) -> None:
    stages, lanes = config.pipeline.stages, config.lanes.count
    if stages < 2 and lanes == 1:
        raise LocalRunError("chaos needs at least 2 stages, because neighbours notice a fault; or 2 lanes", 2)
    for kind in faults.kinds or ():
        if kind not in kinds_for(stages=stages, lanes=lanes, grouped=bool(config.context.method)):
            if kind in kinds_for(stages=stages, lanes=lanes):
                line = f"--kinds: {kind} is for lanes that go on without one another, and chunks do not; omit it"
                raise LocalRunError(line, 2)
            needs = "2 lanes; say --lanes 2" if lanes == 1 else "2 stages; say --stages 2"
            raise LocalRunError(f"--kinds: {kind} needs at least {needs}, or omit it", 2)
    if schedule and lanes > 1:
        raise LocalRunError(
            "--schedule with rtt_ratio=auto finds its depth in a first run, and chaos with several lanes makes none; "
            "state rtt_ratio",
            2,
        )
    if lanes > 1 and config.compute.emulate:
        raise LocalRunError("compute.emulate: nothing is computed, so nothing can be computed again; omit it", 2)


def _of_a_chain(
    config: RunConfig,
    out: Path,
    faults: Faults,
    console: Console,
    *,
    quiet: bool,
    schedule: str | None,
    forks: ForkServer | None,
) -> dict[str, Any]:
    stages = config.pipeline.stages
    undisturbed, disturbed = out / "undisturbed", out / "disturbed"
    console.print("first, the run without faults")
    told = run_local(config, undisturbed, overwrite=True, quiet=quiet, schedule=schedule, forks=forks or False)
    config = load_config(undisturbed / "run.toml")
    width = round(told["dense_bf16_bytes"] / (4 * told["tokens"] * (stages - 1)))
    story = _disturbed(config, disturbed, faults, console, forks)
    try:
        write_summary(
            disturbed, summarise(disturbed, stages=stages, width=width, mode="swarm", of_steps=config.run.steps)
        )
    except ValueError as error:
        raise LocalRunError(f"the run did not survive: {error}", 1) from None
    return report(disturbed, undisturbed, story, stages=stages)


def _of_lanes(
    config: RunConfig, out: Path, faults: Faults, console: Console, *, forks: ForkServer | None
) -> dict[str, Any]:
    disturbed, again = out / "disturbed", out / "recomputed"
    config = anchored(config)
    try:
        check_settings(config)
        corpus = prepare_corpus(config)
    except BAD_INPUT as error:
        raise LocalRunError(str(error), 2) from None
    story = _disturbed(config, disturbed, faults, console, forks)
    console.print("now the same in one process, from the log of members")
    shutil.rmtree(again, ignore_errors=True)
    try:
        found = recompute(disturbed, again, config, corpus)
    except (*BAD_INPUT, *FAILED) as error:
        raise LocalRunError(f"the run cannot be done again: {error}", 1) from None
    for line in found.members():
        console.print(f"  {line}", markup=False, highlight=False)
    return report_lanes(disturbed, found.record(), story, _grid(config, faults))


def _grid(config: RunConfig, faults: Faults) -> Grid:
    stages, lanes = config.pipeline.stages, config.lanes.count
    kinds = _kinds(config, faults)
    return Grid(
        stages=stages,
        lanes=lanes,
        joining=joining_lane(lanes, kinds),
        round_timeout_s=config.lanes.round_timeout_s,
        apart="disk" in kinds,
    )


def _kinds(config: RunConfig, faults: Faults) -> tuple[Kind, ...]:
    grouped = bool(config.context.method)
    return faults.kinds or kinds_for(stages=config.pipeline.stages, lanes=config.lanes.count, grouped=grouped)


def _disturbed(config: RunConfig, run: Path, faults: Faults, console: Console, forks: ForkServer | None) -> Story:
    """Make the run in `run`, with faults."""
    writable(run)
    clear(run)
    (run / "run.toml").write_text(dump_config(config), encoding="utf-8")
    grid = {"stages": config.pipeline.stages, "lanes": config.lanes.count, "kinds": _kinds(config, faults)}
    planned: Iterable[PlannedFault]
    the_run = "now the same" if config.lanes.count == 1 else "the run"
    if faults.every_s:
        planned = plan_every(faults.every_s, faults.seed, **grid)
        console.print(f"{the_run} with a fault every {faults.every_s:g} s")
    else:
        planned = plan(faults.seed, steps=config.run.steps, count=faults.count, **grid)
        console.print(f"{the_run} with {faults.count} faults")
    try:
        return disturb(
            run,
            planned,
            grid=_grid(config, faults),
            on_event=lambda line: console.print(f"  {line}", markup=False),
            forks=forks,
        )
    except SwarmError as error:
        raise LocalRunError(f"the run did not survive: {error}", 1) from None
