"""What a run prints on the console: a live progress bar while it trains, and a table at its end.

On a terminal the bar is redrawn in place; where the output is a file or a pipe, a plain line is written at each tenth
of the run, so that a log stays readable. Both show the same figures, from the same records that stay on disk.
"""

from __future__ import annotations

import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .figures import StageFigures
from .loss_chart import POINTS_MIN, LossChart
from .wording import counted, plain

FAULTS_SHOWN = 5


class RunDisplay:
    """Use as a context manager; call `update` with the figures of all stages. resumes: of a run that goes on, how many
    processes of stage 0 were there before; from which step it goes on is said when the next one knows."""

    def __init__(self, console: Console, *, steps: int, resumes: int | None = None) -> None:
        self._console, self._steps, self._resumes = console, steps, resumes
        self._progress: Progress | None = None
        self._shown = -1
        self._next_line = 0
        self._unsaved_said = False
        self.text = ""

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("starting the stages", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, stages: Sequence[StageFigures]) -> None:
        """As of one poll; stage 0 leads. Nothing is shown until all have finished a step, but for the first checkpoint
        that could not be written."""
        for stage in stages:
            if stage.unsaved and not self._unsaved_said:
                self._unsaved_said = True
                self.warn(f"stage {stage.stage}: {stage.unsaved}; training goes on")
        done = stages[0].completed
        if self._resumes is not None:
            restored = stages[0].restored
            if stages[0].lives <= self._resumes or restored is None:
                return  # what is known is of the processes before
            self._resumes, self._shown = None, restored
            self._console.print(_resumed(restored, self._steps), highlight=False, soft_wrap=True)
        if any(stage.loss is None for stage in stages) or done == self._shown:
            return
        self._shown = done
        self.text = describe(stages)
        if self._progress:
            self._progress.update(self._task, completed=done, description=self.text)
        elif done >= self._next_line or done == self._steps:
            self._console.print(f"step {done}/{self._steps}  {self.text}", highlight=False, soft_wrap=True)
            self._next_line = done + max(1, self._steps // 10)

    def warn(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(f"warning: {plain(line)}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _resumed(done: int, steps: int) -> str:
    if not done:
        return f"begins again with step 1 of {steps}: there is no checkpoint that all stages have"
    nothing = "" if done < steps else "; nothing is left to do: more --steps go on"
    return f"resumes after step {done} of {steps}{nothing}"


def describe(stages: Sequence[StageFigures]) -> str:
    """`loss 5.123  1520 tokens/s  1051 bytes/token  ratio 0.97x`, of all processes that a stage has had."""
    head = stages[0]
    text = f"loss {head.loss:.3f}  {head.tokens_per_s or 0:.0f} tokens/s"
    moved = sum(stage.moved_bytes for stage in stages)
    if moved and head.dense_tokens:
        ratio = sum(stage.dense_bytes for stage in stages) / moved
        text += f"  {moved / head.dense_tokens:.0f} bytes/token  ratio {ratio:.2f}x"
    return text


def throttled(show: Callable[[list[dict[str, Any]]], None], every_s: float = 0.1) -> Callable[..., None]:
    """For callers that report each step: at most one update in `every_s`, the first and every later due one."""
    last = 0.0

    def call(records: list[dict[str, Any]], *, final: bool = False) -> None:
        nonlocal last
        if final or time.monotonic() - last >= every_s:
            last = time.monotonic()
            show(records)

    return call


def _bits_per_s(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} Mb/s"


def summary_tables(summary: dict[str, Any]) -> list[RenderableType]:
    """Tables of the run, its stages, its links and what was learned there; the loss as a picture; beside dense bf16."""
    run = Table(
        title=f"{_steps(summary)} of {summary['tokens_per_step']} tokens ({summary['mode']})", caption=_in_vain(summary)
    )
    for column in ("train loss", "held-out loss", "tokens/s", "bytes/token", "ratio to dense bf16"):
        run.add_column(column, justify="right")
    ratio, val_loss, per_token = summary["ratio"], summary["val_loss"], summary["bytes_per_token"]
    run.add_row(
        f"{summary['first_loss']:.3f} -> {summary['train_loss']:.3f}",
        "-" if val_loss is None else f"{val_loss:.4f}",
        f"{summary['tokens_per_s']:.0f}",
        "unknown" if per_token is None else f"{per_token:.1f}",
        "unknown" if per_token is None else "-" if ratio is None else f"{ratio:.3f}x",
    )
    stages = Table(title="stages")
    for column in ("stage", "layers", "computes", "compute", "codec", "waiting", "peak memory", "state"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(summary["stages"]):
        seconds = [f"{stage[name]:.1f} s" for name in ("compute_s", "codec_s", "wait_s")]
        memory = f"{stage['peak_rss_bytes'] / 2**20:.0f} MiB"
        layers, share = str(stage["layers"]), f"{stage['compute_share']:.0%}"
        stages.add_row(str(index), layers, share, *seconds, memory, stage["state_sha256"][:12])
    tables: list[RenderableType] = [run, stages]
    if summary["boundaries"]:
        tables.append(_links_table(summary))
    if any("orthonormality_error_master" in entry["codec"] for entry in summary["boundaries"]):
        tables.append(_projectors_table(summary))
    if any(
        way in entry["codec"] for entry in summary["boundaries"] for way in ("activation_usage_1", "gradient_usage_1")
    ):
        tables.append(_codebooks_table(summary))
    if summary["faults"]:
        tables.append(_faults_table(summary["faults"]))
    if len(summary["loss_curve"]) >= POINTS_MIN:
        tables.append(LossChart(summary["loss_curve"], summary["evaluations"]))
    if summary["dense_simulation"]:
        tables.append(_comparison_table(summary))
    return tables


def _steps(summary: dict[str, Any]) -> str:
    done, of = summary["steps"], summary.get("of_steps") or summary["steps"]
    return counted(done, "step") if done >= of else f"{done} of {counted(of, 'step')}"


def _in_vain(summary: dict[str, Any]) -> str | None:
    """What the ratio counts besides the steps that are left."""
    rewinds, again = len(summary["rollbacks"]), summary.get("repeated_steps", 0)
    if not rewinds:
        return None
    told = f"bytes/token and ratio count what was sent in vain too: {counted(rewinds, 'rewind')} or resumes"
    return f"{told}, {counted(again, 'step')} done again"


def _faults_table(faults: list[dict[str, Any]]) -> Table:
    """The newest, and how many there were of which kind."""
    by_code = Counter(fault["code"] for fault in faults)
    every = ", ".join(f"{count} {plain(code)}" for code, count in by_code.most_common())
    table = Table(title=f"faults, newest last (of {every})")
    for column in ("stage", "code", "what"):
        table.add_column(column)
    for fault in faults[-FAULTS_SHOWN:]:
        table.add_row(str(fault["stage"]), Text(plain(fault["code"])), Text(plain(fault["reason"])))
    return table


def closing_lines(summary: dict[str, Any], run: Path) -> list[str]:
    """What comes after the tables: how a run that ended early goes on; dense training over the same link in a line; and
    what to try next."""
    lines, dense = [], summary["dense_simulation"]
    if (of := summary.get("of_steps")) and summary["steps"] < of:
        lines.append(f"this run ended after {_steps(summary)}; thinpipe up --resume {shlex.quote(str(run))} goes on")
    if dense:
        own = " (all stages in one process)" if summary["mode"] == "one-process" else ""
        lines.append(
            f"dense bf16 over {_link(dense['link'])}: {dense['tokens_per_s']:,.0f} tokens/s (simulated), "
            f"this run: {summary['tokens_per_s']:,.0f}{own}"
        )
    else:
        lines.append(f"not compared with dense bf16: {summary['simulation_left_out']}")
    if (summary["cut_advice"] or {}).get("line"):
        lines.append(summary["cut_advice"]["line"])
    return [*lines, f"try: {summary['try_next']['command']}  ({summary['try_next']['why']})"]


def _link(link: str) -> str:
    return "instant links" if link == "none" else link


def _comparison_table(summary: dict[str, Any]) -> Table:
    run, dense, learned = (summary[f"{whose}_simulation"] for whose in ("run", "dense", "learned"))
    rows = [(run, "this run"), *([(learned, "")] if learned else []), *([(dense, "")] if dense != run else [])]
    table = Table(
        title="tokens/s by codec and link (simulated, not measured)",
        caption="of stages that take this run's times; a link that is slower than the last rate is the bottleneck",
    )
    links = [_link(link) for link in (run["link"], run["thinner_link"]) if link]
    table.add_column("codec")
    for column in ("bytes/token", *links, "binds below"):
        table.add_column(column, justify="right")
    for found, note in rows:
        table.add_row(
            f"{found['codec']} ({note})" if note else found["codec"],
            f"{found['bytes_per_token']:,.1f}",
            *(f"{found[key]:,.0f}" for key in ("tokens_per_s", "thinner_tokens_per_s") if found[key] is not None),
            _bits_per_s(found["bound_below_bits_per_s"]),
        )
    return table


def _projectors_table(summary: dict[str, Any]) -> Table:
    projectors = Table(title="learned projections", caption="at the last step; distance from the manifold in ‖AᵀA - I‖")
    for column in ("boundary", "distance, as learned", "as shipped", "moved", "lost by projecting", "anchors"):
        projectors.add_column(column, justify="right")
    for entry in summary["boundaries"]:
        figures = entry["codec"]
        if "orthonormality_error_master" not in figures:  # no step of that stage is on record
            continue
        projectors.add_row(
            f"{entry['boundary']}-{entry['boundary'] + 1}",
            f"{figures['orthonormality_error_master']:.1e}",
            f"{figures['orthonormality_error_shipped']:.1e}",
            f"{math.degrees(figures['angle_moved_rad']):.3f}°",
            f"{figures['reconstruction_error']:.1%}",
            f"{figures['anchor_norm']:.3f}" if "anchor_norm" in figures else "-",
        )
    return projectors


def _codebooks_table(summary: dict[str, Any]) -> Table:
    codebooks = Table(
        title="codebooks",
        caption="in the last step, for each level; lost by coding; stale: learned but not yet sent, as a share",
    )
    for column in ("boundary", "of", "used", "perplexity", "revived", "lost", "stale"):
        codebooks.add_column(column, justify="right")
    for entry in summary["boundaries"]:
        for way in ("activation", "gradient"):
            prefix = f"{way}_"
            figures = {name.removeprefix(prefix): x for name, x in entry["codec"].items() if name.startswith(prefix)}
            levels = [name.removeprefix("usage_") for name in figures if name.startswith("usage_")]
            if levels:
                codebooks.add_row(
                    f"{entry['boundary']}-{entry['boundary'] + 1}",
                    f"{way}s",
                    ", ".join(f"{figures[f'usage_{level}']:.0%}" for level in levels),
                    ", ".join(f"{figures[f'perplexity_{level}']:.0f}" for level in levels),
                    f"{figures['revived']:.0f}",
                    f"{figures['reconstruction_error']:.1%}",
                    f"{figures['staleness']:.1%}",
                )
    return codebooks


def _links_table(summary: dict[str, Any]) -> Table:
    links = Table(
        title="links",
        caption="at start: filler messages only; measured: while the queue was not empty (50 ms of traffic and more)",
    )
    for column in ("boundary", "configured", "at start", "measured", "used", "bytes"):
        links.add_column(column, justify="right")
    at_start = {(check["boundary"], check["direction"]): check for check in summary["link_check"]}
    for entry in summary["boundaries"]:
        for direction in ("forward", "backward"):
            way, check = entry[direction], at_start.get((entry["boundary"], direction))
            used = way["utilisation"]
            links.add_row(
                f"{entry['boundary']}-{entry['boundary'] + 1} {direction}",
                _bits_per_s(way["configured_bits_per_s"]),
                _bits_per_s(check and check["measured_bits_per_s"]) + (" (!)" if check and check["warning"] else ""),
                _bits_per_s(way["measured_bits_per_s"]),
                "-" if used is None else f"{used:.1%}",
                f"{sum(way['sent_bytes'].values()) / 1e6:.2f} MB",
            )
    return links


def probe_table(figures: dict[str, Any]) -> Table:
    """What `thinpipe probe` found, for people."""
    trip = figures["round_trip"]
    table = Table(
        title=f"the path to {figures['address']}, link {figures['link']}",
        caption=f"rates of the steady part of {figures['seconds']:g} s; {trip['count']} round trips",
    )
    for column in ("", "configured", "measured", "off"):
        table.add_column(column, justify="right")

    def off(configured: float | None, measured: float | None) -> str:
        return f"{measured / configured - 1:+.1%}" if configured and measured is not None else "-"

    for name, said in (("up", "up, from here"), ("down", "down, to here")):
        rates = [figures[name][f"{which}_bits_per_s"] for which in ("configured", "measured")]
        table.add_row(said, *map(_bits_per_s, rates), off(*rates))
    for name, said in (("median_s", "round trip, median"), ("least_s", "least")):
        configured = trip["configured_s"]
        cells = ["-" if value is None else f"{value * 1000:.2f} ms" for value in (configured, trip[name])]
        table.add_row(said, *cells, off(configured, trip[name]))
    return table


def plan_tables(figures: dict[str, Any]) -> list[Table]:
    """What `thinpipe plan` found, for people."""
    whole = Table(title=f"{figures['schedule']} over {figures['link']} (simulated, not measured)")
    for column in ("seconds a step", "tokens/s", "of uncapped", "of the machines", "busiest", "ratio to dense bf16"):
        whole.add_column(column, justify="right")
    whole.add_row(
        f"{figures['step_s']:.3g}",
        f"{figures['tokens_per_s']:,.0f}",
        f"{figures['tokens_per_s'] / figures['uncapped_tokens_per_s']:.1%}",
        f"{figures['machines_used']:.1%}",
        figures["bottleneck"],
        f"{figures['ratio']:.1f}x",
    )
    stages = Table(title="stages, for one microbatch")
    for column in ("stage", "layers", "forward", "backward", "computes", "in flight at most"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(figures["stages"]):
        milliseconds = [f"{stage[way] * 1000:.3g} ms" for way in ("forward_s", "backward_s")]
        layers, in_flight = str(stage["layers"]), str(stage["microbatches_in_flight"])
        stages.add_row(str(index), layers, *milliseconds, f"{stage['compute_share']:.1%}", in_flight)
    if not figures["boundaries"]:
        return [whole, stages]
    sizes = figures["bytes_per_microbatch"]
    links = Table(
        title="boundaries",
        caption=f"a microbatch is {sizes['forward']:,} bytes down and {sizes['backward']:,} up, framed",
    )
    for column in ("boundary", "down, busy", "up, busy", "compute-bound from a ratio of"):
        links.add_column(column, justify="right")
    for index, boundary in enumerate(figures["boundaries"]):
        bound = boundary["compute_bound_at_ratio"]
        links.add_row(
            f"{index}-{index + 1}",
            f"{boundary['forward_share']:.1%}",
            f"{boundary['backward_share']:.1%}",
            "any" if bound is None or bound <= 1 else f"{bound:.1f}x",
        )
    return [whole, stages, links]


def cut_lines(figures: dict[str, Any]) -> list[str]:
    """Which layers the stages have, what that gains over stages of equal length, and an order of the machines that is
    faster."""
    cut, gain = ",".join(str(stage["layers"]) for stage in figures["stages"]), figures["gain_over_equal_cut"]
    lines = [f"layers of the stages: {cut}" + ("" if gain is None else f", {gain:.2f}x of stages of equal length")]
    if better := figures["better_order"]:
        order = ",".join(f"{speed:g}" for speed in better["speeds"])
        lines.append(f"the same machines in another order, --speeds {order}: {better['gain']:.2f}x")
    return lines
