"""`thinpipe chaos`: makes a run without faults and the same run with faults, and compares their results bit for bit."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...sim.launch.fault_injection import Kind, disturb, plan, plan_every, report, survived
from ...sim.launch.fork_server import ForkServer
from ...sim.launch.local_swarm import SwarmError
from ...sim.reports.summary import summarise, write_summary
from ..config import ConfigError, RunConfig, check_one_lane
from ..config_file import dump_config, load_config
from ..local import run_local
from ..preload import fork_server
from ..preparation import BAD_INPUT, check_settings
from ..run_directory import LocalRunError, clear, writable


def run_chaos(
    config: RunConfig,
    out: Path,
    *,
    count: int,
    every_s: float | None,
    kinds: tuple[Kind, ...],
    seed: int,
    quiet: bool,
    schedule: str | None = None,
    forks: bool = False,
) -> tuple[dict[str, Any], bool]:
    """The report, also in `out`/chaos.json, and whether nothing was lost. every_s: a fault every so many seconds, as
    many as it takes, instead of `count` spread over the steps. schedule: one with rtt_ratio=auto, whose depth is found
    once, for both runs. forks: nodes are copies of this process, which must not have begun anything. Raises
    LocalRunError."""
    try:
        check_one_lane(config, "chaos")
    except ConfigError as error:
        raise LocalRunError(str(error), 2) from None
    with ExitStack() as held:
        server = None
        if forks:
            try:
                check_settings(config)
            except BAD_INPUT as error:
                raise LocalRunError(str(error), 2) from None
            found = fork_server(config)
            server = held.enter_context(closing(found)) if isinstance(found, ForkServer) else None
        return _run_chaos(config, out, count, every_s, kinds, seed, quiet, schedule, server)


def _run_chaos(
    config: RunConfig,
    out: Path,
    count: int,
    every_s: float | None,
    kinds: tuple[Kind, ...],
    seed: int,
    quiet: bool,
    schedule: str | None,
    forks: ForkServer | None,
) -> tuple[dict[str, Any], bool]:
    console = Console(stderr=True) if quiet else Console()
    stages = config.pipeline.stages
    if stages < 2:
        raise LocalRunError("chaos needs at least 2 stages, because neighbours notice a fault", 2)
    undisturbed, disturbed = out / "undisturbed", out / "disturbed"
    console.print("first, the run without faults")
    told = run_local(config, undisturbed, overwrite=True, quiet=quiet, schedule=schedule, forks=forks or False)
    config = load_config(undisturbed / "run.toml")
    writable(disturbed)
    clear(disturbed)
    (disturbed / "run.toml").write_text(dump_config(config), encoding="utf-8")
    if every_s:
        faults = plan_every(every_s, seed, stages=stages, kinds=kinds)
        console.print(f"now the same with a fault every {every_s:g} s")
    else:
        faults = plan(seed, steps=config.run.steps, stages=stages, count=count, kinds=kinds)
        console.print(f"now the same with {count} faults")
    width = round(told["dense_bf16_bytes"] / (4 * told["tokens"] * (stages - 1)))
    try:
        story = disturb(
            disturbed,
            faults,
            stages=stages,
            apart="disk" in kinds,
            on_event=lambda line: console.print(f"  {line}", markup=False),
            forks=forks,
        )
        write_summary(
            disturbed, summarise(disturbed, stages=stages, width=width, mode="swarm", of_steps=config.run.steps)
        )
    except (SwarmError, ValueError) as error:
        raise LocalRunError(f"the run did not survive: {error}", 1) from None
    found = report(disturbed, undisturbed, story, stages=stages)
    (out / "chaos.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        console.print(_table(found))
        where = f"the two runs are in {undisturbed} and {disturbed}, the figures in {out / 'chaos.json'}"
        console.print(where, markup=False)
    return found, survived(found)


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="chaos", show_header=False)
    table.add_row("faults", ", ".join(f"{count} x {kind}" for kind, count in found["faults"].items()))
    table.add_row("generations", str(found["generations"]))
    table.add_row("processes that woke up replaced and were refused", str(found["fenced"]))
    table.add_row("steps done again", f"{found['steps_replayed']} of {found['steps']}")
    table.add_row("seconds", f"{found['seconds']:.1f}, undisturbed {found['seconds_undisturbed']:.1f}")
    if found["throughput_share"]:
        table.add_row("throughput, share of the undisturbed", f"{found['throughput_share']:.3f}")
    for key, name in (
        ("fault_to_progress_s", "from a loss to the next new step, s"),
        ("back_to_progress_s", "of that after the replacement is back, s"),
        ("back_to_progress_steps", "the same in steps"),
    ):
        if spread := found[key]:
            table.add_row(name, f"median {spread['median']:.2f}, worst {spread['worst']:.2f}")
    same = found["losses_equal"] and found["val_loss_equal"]
    table.add_row("losses", "equal, every step" if same else "[red]DIFFERENT")
    states = (
        "equal bit for bit, in every stage" if all(found["state_equal"]) else f"[red]DIFFERENT: {found['state_equal']}"
    )
    table.add_row("state", states)
    return table
