"""What is printed of a run when it is over: tables of its summary, and lines on what to do next. What is printed while
it trains is in `sim.reports.run_display`."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .lanes_summary import wait_words
from .loss_chart import POINTS_MIN, LossChart
from .summary import CONTEXT
from .wording import counted, plain

FAULTS_SHOWN = 5
TIGHT = (0, 0, 0, 1)  # padding of tables of many columns, which so fit into a terminal of 80
FIGURES = ("train loss", "held-out loss", "tokens/s", "bytes/token", "ratio to dense bf16")


def _bits_per_s(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.1f} Mb/s" if value >= 1e5 or not value else f"{value / 1e3:.0f} kb/s"


def summary_tables(summary: dict[str, Any]) -> list[RenderableType]:
    """Tables of the run, its stages, its links and what was learned there; the loss as a picture; beside dense bf16."""
    lanes = len(summary.get("lanes", [None]))
    mode = summary["mode"] if lanes == 1 else f"{summary['mode']}, {lanes} lanes: means and sums"
    run = Table(title=f"{_steps(summary)} of {summary['tokens_per_step']} tokens ({mode})", caption=_in_vain(summary))
    for column in FIGURES:
        run.add_column(column, justify="right")
    run.add_row(*_figures(summary))
    stages = Table(title="stages", padding=TIGHT)
    of_lane = ["lane"] if lanes > 1 else []
    for column in (*of_lane, "stage", "layers", "computes", "compute", "codec", "waiting", "peak memory", "state"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(summary["stages"]):
        seconds = [f"{stage[name]:.1f} s" for name in ("compute_s", "codec_s", "wait_s")]
        memory = f"{stage['peak_rss_bytes'] / 2**20:.0f} MiB"
        layers, share = str(stage["layers"]), f"{stage['compute_share']:.0%}"
        name = [str(stage["lane"]), str(stage["stage"])] if lanes > 1 else [str(index)]
        stages.add_row(*name, layers, share, *seconds, memory, stage["state_sha256"][: 8 if lanes > 1 else 12])
    tables: list[RenderableType] = [run, *(_lanes_tables(summary) if lanes > 1 else []), stages]
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


def _figures(found: dict[str, Any]) -> list[str]:
    """The cells of FIGURES, of a run or of a lane."""
    ratio, val_loss, per_token = found["ratio"], found["val_loss"], found["bytes_per_token"]
    return [
        f"{found['first_loss']:.3f} -> {found['train_loss']:.3f}",
        "-" if val_loss is None else f"{val_loss:.4f}",
        f"{found['tokens_per_s']:.0f}",
        "unknown" if per_token is None else f"{per_token:.1f}",
        "unknown" if per_token is None else "-" if ratio is None else f"{ratio:.3f}x",
    ]


def _lanes_tables(summary: dict[str, Any]) -> list[RenderableType]:
    """Each lane's figures, and what the averaging between them took."""
    lanes = Table(title="lanes", padding=TIGHT)
    for column in ("lane", *FIGURES):
        lanes.add_column(column, justify="right")
    for found in summary["lanes"]:
        lanes.add_row(str(found["lane"]), *_figures(found))
    averaging = Table(title="averaging between lanes", caption="bytes of all lateral links, beside the ratio")
    for column in ("rounds", "bytes", "bytes/token", "longest wait"):
        averaging.add_column(column, justify="right")
    found = summary["averaging"]
    size = f"{found['bytes'] / 1e6:.2f} MB"
    averaging.add_row(str(found["rounds"]), size, f"{found['bytes_per_token']:.1f}", wait_words(summary))
    return [lanes, averaging, *_context_tables(summary)]


def _context_tables(summary: dict[str, Any]) -> list[RenderableType]:
    """Of lanes that hold chunks, what keys and values took."""
    found = summary.get("context")
    if not found:
        return []
    table = Table(title="keys and values between lanes", caption="bytes of all context links, beside the ratio")
    for column in ("keys and values", "their gradients", "bytes/token"):
        table.add_column(column, justify="right")
    sizes = (f"{found[kind] / 1e6:.2f} MB" for kind in CONTEXT)
    table.add_row(*sizes, f"{found['bytes_per_token']:,.1f}")
    return [table]


def _steps(summary: dict[str, Any]) -> str:
    done, of = summary["completed"], summary.get("of_steps") or summary["completed"]
    return counted(summary["steps"], "step") if done >= of else f"{done} of {counted(of, 'step')}"


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
        name = f"{fault['stage']} of lane {fault['lane']}" if "lane" in fault else str(fault["stage"])
        table.add_row(name, Text(plain(fault["code"])), Text(plain(fault["reason"])))
    return table


def closing_lines(summary: dict[str, Any], run: Path) -> list[str]:
    """What comes after the tables: how a run that ended early goes on; dense training over the same link in a line; and
    what to try next."""
    lines, dense = [], summary["dense_simulation"]
    if (of := summary.get("of_steps")) and summary["completed"] < of:
        lines.append(f"this run ended after {_steps(summary)}; thinpipe up --resume {shlex.quote(str(run))} goes on")
    if dense:
        own = " (all stages in one process)" if summary["mode"] == "one-process" else ""
        each, rate = "", summary["tokens_per_s"]
        if lanes := summary.get("lanes"):
            each, rate = " a lane", sum(lane["tokens_per_s"] for lane in lanes) / len(lanes)
        lines.append(
            f"dense bf16 over {_link(dense['link'])}: {dense['tokens_per_s']:,.0f} tokens/s{each} (simulated), "
            f"this run: {rate:,.0f}{each}{own}"
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
    each = ", of one lane" if "lanes" in summary else ""
    table = Table(
        title=f"tokens/s by codec and link{each} (simulated, not measured)",
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


def _boundary(entry: dict[str, Any]) -> str:
    """`0-1`, or where there are lanes `lane 1: 0-1`."""
    of_lane = f"lane {entry['lane']}: " if "lane" in entry else ""
    return f"{of_lane}{entry['boundary']}-{entry['boundary'] + 1}"


def _projectors_table(summary: dict[str, Any]) -> Table:
    projectors = Table(
        title="learned projections",
        caption="at the last step; distance from the manifold in ‖AᵀA - I‖",
        padding=TIGHT,
    )
    for column in ("boundary", "distance, as learned", "as shipped", "moved", "lost by projecting", "anchors"):
        projectors.add_column(column, justify="right")
    for entry in summary["boundaries"]:
        figures = entry["codec"]
        if "orthonormality_error_master" not in figures:  # no step of that stage is on record
            continue
        projectors.add_row(
            _boundary(entry),
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
        padding=TIGHT,
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
                    _boundary(entry),
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
    at_start = {
        (check.get("lane"), check["boundary"], check["direction"]): check
        for check in summary["link_check"]
        if "boundary" in check
    }
    for entry in summary["boundaries"]:
        for direction in ("forward", "backward"):
            way, check = entry[direction], at_start.get((entry.get("lane"), entry["boundary"], direction))
            used = way["utilisation"]
            links.add_row(
                f"{_boundary(entry)} {direction}",
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
