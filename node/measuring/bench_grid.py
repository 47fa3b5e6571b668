"""`thinpipe bench`: throughput of real swarms over links of several rates, a cell for each codec, schedule, number of
lanes or chunks, and link.

Two kinds of cells. *Emulated*: stages take the time of another machine (emulated_stage.py), so that a link binds as it
would there. *Free-running*: stages train as fast as this machine can. Each cell is simulated first (plan.py), which
says how many steps a window needs, whether the cell can be afforded at all, and stands beside what is measured. Cells
that are on disk already, made from the same settings, are not run again; one that fails is marked, and the rest goes
on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...protocol.schedule import ScheduleError
from ...protocol.sought_schedule import plain_schedule
from ...sim.launch.bench_cell import OVERLAP_STEPS, WARM_UP_STEPS, WINDOWS, Cell, measure, run_cell
from ...sim.launch.fork_server import ForkServer
from ...sim.launch.local_swarm import SwarmError
from ...sim.links.pipeline import StageTimes
from ...sim.reports.bench_report import bench_problems, bench_tables, draw_bench
from ...sim.reports.cut_advice import advice_line, cut_advice
from ..averaging.modes import parse_averaging
from ..config import ConfigError, RunConfig
from ..config_file import dump_config
from ..preload import fork_server
from ..preparation import check_codec, check_lanes, check_layers, prepare_corpus, resolve_architecture
from ..run_directory import clear, writable
from ..stage_costs import stage_layers
from .bench_cells import UNCAPPED, BenchGrid, PlannedCell
from .chunks_plan import StageExchange, exchange_of
from .contribution_sizes import check_contributions
from .emulated_machine import EmulatedMachine
from .lanes_plan import lanes_figures
from .pipeline_costs import pipeline_costs
from .plan import PLANNED, plan
from .schedule_search import checked, resolved_schedule
from .stage_times import times_measured

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Bench:
    """Runs the cells of a grid and keeps what they came to in `out`."""

    def __init__(self, grid: BenchGrid, out: Path, *, report: Callable[[str], None], forks: bool = False) -> None:
        """forks: nodes are copies of this process, which must not have begun anything."""
        self._grid, self._out, self._report, self._forks = grid, out, report, forks
        self._server: ForkServer | None = None  # while cells run
        # Of free-running stages, over instant links.
        self._times: dict[tuple[str, str, int, str], list[StageTimes]] = {}
        title = f"thinpipe bench: {', '.join((*grid.machines, *grid.free_running))}"
        self.found: dict[str, Any] = {"title": title, "cells": []}

    def run(self) -> dict[str, Any]:
        """All cells. Whatever ends it, `bench.json` and `bench.png` hold what was done. Raises LocalRunError, and
        ConfigError and what else PLANNED names before anything runs."""
        cells = list(self._grid.cells())
        for cell in cells:
            self._check(cell)
        writable(self._out)
        with ExitStack() as held:
            if self._forks:
                computed = next((cell for cell in cells if not cell.emulated), cells[0])
                found = fork_server(computed.config(plain_schedule(computed.schedule), 1))
                self._server = held.enter_context(closing(found)) if isinstance(found, ForkServer) else None
            return self._run(cells)

    def _run(self, cells: Sequence[PlannedCell]) -> dict[str, Any]:
        try:
            for number, cell in enumerate(cells, start=1):
                self._report(f"cell {number} of {len(cells)}: {cell.title}")
                self.found["cells"].append(self._cell(cell))
                self._save()
        finally:
            self._save()
        return self.found

    def _check(self, cell: PlannedCell) -> None:
        """What can be seen to be wrong before the first cell runs."""
        try:
            checked(cell.schedule)
            config = cell.config(plain_schedule(cell.schedule), 1)
            checked(cell.schedule, delay=config.pipeline.delay)
            architecture = resolve_architecture(config)
            check_codec(config, architecture)
            check_lanes(config)
            if cell.emulated:
                machine = EmulatedMachine.parse(cell.mode)
                layers, inner = machine.layers(config, architecture), machine.part
            else:
                check_layers(config, architecture)
                layers, inner = stage_layers(config, architecture), False
            check_contributions(config, architecture, layers, inner=inner)
        except ScheduleError as error:
            raise ConfigError(str(error)) from None

    def _save(self) -> None:
        self._compare()
        (self._out / "bench.json").write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
        if any(cell["rate_bits_per_s"] for cell in self.found["cells"]):
            draw_bench(self._out / "bench.png", self.found)

    def _cell(self, cell: PlannedCell) -> dict[str, Any]:
        config = cell.config(plain_schedule(cell.schedule), 1)
        lanes = config.lanes
        entry: dict[str, Any] = {
            "mode": "emulated" if cell.emulated else "free-running",
            "of": cell.mode,
            "codec": cell.codec,
            "asked": cell.schedule,
            "schedule": cell.schedule,
            "delay": config.pipeline.delay,
            "lanes": lanes.count,
            "average": lanes.average if lanes.count > 1 else None,
            "context": config.context.method or None,
            "link": str(cell.link),
            "rate_bits_per_s": cell.link.rate_bits_per_s,
            "state": "ok",
            "problems": [],
        }
        try:
            self._fill(cell, entry)
        except (SwarmError, ValueError, OSError, *PLANNED) as error:
            entry |= {"state": "failed", "problems": [" ".join(str(error).split())]}
        if entry["state"] != "ok":
            self._report(f"  {entry['state']}: {'; '.join(entry['problems'])}")
        else:
            self._report(f"  {entry['measured']['tokens_per_s']:,.0f} tokens/s")
            if line := entry.get("cut_advice", {}).get("line"):
                self._report(f"  {line}")
        return entry

    def _fill(self, cell: PlannedCell, entry: dict[str, Any]) -> None:
        plain = plain_schedule(cell.schedule)
        config = cell.config(plain, 1)
        architecture = resolve_architecture(config)
        inner = False
        if cell.emulated:
            machine = EmulatedMachine.parse(cell.mode)
            times, inner = machine.times(config, architecture), machine.part
            cut = machine.layers(config, architecture)
        else:
            times, cut = self._times_of(cell, config), stage_layers(config, architecture)
        layers = [len(of_stage) for of_stage in cut]
        schedule, exchange = plain, None
        if times:
            exchange = exchange_of(config, architecture, times, layers, inner=inner)
            held = exchange.held if exchange else times
            schedule = resolved_schedule(cell.schedule, config, architecture, held)
        entry["schedule"] = schedule
        count, mode = config.lanes.count, parse_averaging(config.lanes.average) if config.lanes.count > 1 else None
        delay, stride = (mode.delay, mode.every // mode.fragments) if mode else (0, 1)
        window_steps = stride * math.ceil(3 / stride)  # as many rounds in each window
        if times:
            asked = cell.config(schedule, 1)
            entry["planned"] = self._planned(asked, architecture, times, layers, inner=inner, exchange=exchange)
            step_s = entry["planned"]["step_s"]
            window_steps = stride * max(1, math.ceil(self._grid.window_s / step_s / stride))
            overlap = 2 * OVERLAP_STEPS * config.pipeline.delay
            expected_s = step_s * (WARM_UP_STEPS + delay + overlap + WINDOWS * window_steps + (count > 1))
            if expected_s > self._grid.limit_s:
                why = f"it would take {expected_s:,.0f} s; --limit is {self._grid.limit_s:,.0f}"
                entry |= {"state": "planned", "problems": [why]}
                return
        work = Cell(
            name=cell.name,
            stages=config.pipeline.stages,
            window_steps=window_steps,
            emulated=cell.emulated,
            lanes=count,
            delay=delay,
            overlaps=bool(config.pipeline.delay),
        )
        entry["measured"] = self._measured(work, cell.config(schedule, work.steps))
        if entry["measured"]["problems"]:
            entry |= {"state": "refused", "problems": entry["measured"]["problems"]}
        taken = times_measured(self._out / "cells" / cell.name, config)
        costs = pipeline_costs(cell.config(schedule, 1), architecture)
        if costs and not config.context.method:  # what layers cost there, another lane decides too
            entry["cut_advice"] = cut_advice(costs, taken)
            shares = [stage["compute_s"] for stage in entry["measured"]["stages"]]  # of the windows' time
            entry["cut_advice"]["line"] = advice_line(entry["cut_advice"], shares)
        if not cell.emulated and cell.link.rate_bits_per_s is None:
            self._times.setdefault((cell.mode, cell.codec, count, config.context.method), taken)

    def _planned(
        self,
        config: RunConfig,
        architecture: PretrainedConfig,
        times: Sequence[StageTimes],
        layers: Sequence[int],
        *,
        inner: bool,
        exchange: StageExchange | None,
    ) -> dict[str, Any]:
        """What `plan` says, of all lanes together."""
        planned, simulated = plan(config, architecture, times, layers=layers, exchange=exchange)
        step_s, held = planned["step_s"], exchange.held if exchange else times
        lanes = lanes_figures(config, architecture, held, layers, step_s=step_s, inner=inner)
        busiest = max(simulated.wire_share.values(), default=0.0)
        if lanes is None:
            return {**planned, "lanes": None, "wire_share": busiest}
        return {
            **planned,
            "lanes": lanes,
            "wire_share": busiest * lanes["share"],
            "step_s": lanes["step_s"],
            "tokens_per_s": lanes["tokens_per_s"],
            "uncapped_tokens_per_s": lanes["count"] * planned["uncapped_tokens_per_s"],
            "machines_used": planned["machines_used"] * lanes["share"],
        }

    def _times_of(self, cell: PlannedCell, config: RunConfig) -> list[StageTimes] | None:
        """Of a free-running cell; None before its uncapped one has run."""
        prepare_corpus(config)
        return self._times.get((cell.mode, cell.codec, config.lanes.count, config.context.method))

    def _measured(self, work: Cell, config: RunConfig) -> dict[str, Any]:
        """From the disk, if the same settings were measured before."""
        directory = self._out / "cells" / work.name
        directory.mkdir(parents=True, exist_ok=True)
        told, settings = dump_config(config), directory / "run.toml"
        if settings.exists() and settings.read_text(encoding="utf-8") == told:
            with suppress(ValueError):  # of a run that broke off
                figures = measure(directory, work)
                self._report("  (measured before)")
                return figures
        clear(directory)
        settings.write_text(told, encoding="utf-8")
        return run_cell(directory, work, self._server)

    def _compare(self) -> None:
        """Shares of the uncapped cell, of the plan, and of so many times one lane, for every cell that was measured."""
        uncapped: dict[tuple[Any, ...], tuple[float, str]] = {}
        alone: dict[tuple[Any, ...], float] = {}
        for entry in self.found["cells"]:
            if not entry.get("measured"):
                continue
            cell = (entry["of"], entry["codec"], entry["asked"])
            if entry["lanes"] == 1 and entry["state"] == "ok":
                alone[*cell, entry["link"]] = entry["measured"]["tokens_per_s"]
            elif not entry["context"] and (one := alone.get((*cell, entry["link"]))) is not None:
                entry["share_of_lanes"] = entry["measured"]["tokens_per_s"] / (entry["lanes"] * one)
            key = (*cell, entry["lanes"], entry["average"], entry["context"])
            if entry["link"] == UNCAPPED and entry["state"] == "ok":
                uncapped[key] = (entry["measured"]["tokens_per_s"], "measured")
            planned = entry.get("planned")
            base = uncapped.get(key) or (planned and (planned["uncapped_tokens_per_s"], "simulated"))
            if base:
                entry["share_of_uncapped"] = entry["measured"]["tokens_per_s"] / base[0]
                entry["uncapped_from"] = base[1]
            if planned:
                against = entry["measured"]["tokens_per_s"] / planned["tokens_per_s"]
                entry["against_plan"] = against - 1
                entry["machines_used"] = planned["machines_used"] * against
            used = entry["measured"]["utilisation"]
            known = used and planned and planned["wire_share"]  # one stage has no boundary
            entry["utilisation_of_schedule"] = used / known if known else None


def run_bench(grid: BenchGrid, out: Path, *, quiet: bool, forks: bool = False) -> dict[str, Any]:
    """The grid's cells, with a line for each and a table at the end, also of what was done before an interruption.
    forks: as `Bench`. Raises what PLANNED names, and LocalRunError."""
    console = Console(stderr=quiet, markup=False)
    bench = Bench(grid, out, report=lambda line: console.print(line, highlight=False), forks=forks)
    try:
        return bench.run()
    finally:
        if bench.found["cells"] and not quiet:
            console.print(*bench_tables(bench.found), sep="\n")
            for line in bench_problems(bench.found):
                console.print(line, highlight=False, soft_wrap=True)
            console.print(f"cells, bench.json and bench.png are in {out}")
