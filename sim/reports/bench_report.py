"""How a benchmark's cells are shown: a table for a terminal, a picture of throughput against the links' rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...protocol.stage_orders import PREFIX

COLUMNS = ("link", "schedule", "tokens/s", "share", "plan", "used", "busy", "state")
LANE_COLUMNS = (*COLUMNS[:2], "lanes", "tokens/s", "of one", "averaging", *COLUMNS[3:])
CHUNK_COLUMNS = (*LANE_COLUMNS[:6], "K, V", *LANE_COLUMNS[6:])
LEFT = ("link", "schedule", "lanes", "state")
CAPTION = (
    "share: of the same codec and schedule over instant links (* simulated); plan: against the simulation; used: of "
    "what the machines can compute; busy: the busiest wire, and what the schedule makes of it"
)
LANE_CAPTION = "; of one: of so many times one lane; averaging: bytes/token between lanes"
CHUNK_CAPTION = "; K, V: bytes/token of keys and values of all layers between chunks"


def bench_tables(found: dict[str, Any]) -> list[Table]:
    """A table for each codec, that fits 80 columns; `bench_problems` says why some cells do not count."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in found["cells"]:
        groups.setdefault((cell["of"], cell["codec"]), []).append(cell)
    tables = []
    for (of, codec), cells in groups.items():
        lanes, chunks = any(map(_of_lanes, cells)), any(map(_of_chunks, cells))
        sizes = [cell["measured"]["bytes_per_token"] for cell in cells if cell.get("measured")]
        told = f", {sizes[-1]:,.1f} bytes/token" if sizes else ""
        ways = {cell["average"] for cell in cells if cell["average"]}
        told += f", lanes: {next(iter(ways))}" if len(ways) == 1 else ""
        contexts = {cell["context"] for cell in cells if _of_chunks(cell)}
        told += f", chunks: {next(iter(contexts))}" if len(contexts) == 1 else ""
        told += ", steps overlap" if cells[0].get("delay") else ""
        table = Table(
            title=f"{codec}, {of} ({cells[0]['mode']}){told}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        for column in CHUNK_COLUMNS if chunks else LANE_COLUMNS if lanes else COLUMNS:
            table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
        for cell in cells:
            named = [name for name, found in (("context", contexts), ("average", ways)) if len(found) > 1]
            table.add_row(*_row(cell, lanes=lanes, chunks=chunks, named=named))
        tables.append(table)
    if tables:
        lanes, chunks = (any(kind(cell) for cell in found["cells"]) for kind in (_of_lanes, _of_chunks))
        tables[-1].caption = CAPTION + (LANE_CAPTION if lanes else "") + (CHUNK_CAPTION if chunks else "")
    return tables


def bench_problems(found: dict[str, Any]) -> list[str]:
    """A line for each cell that does not count."""
    return [
        f"{cell['codec']} over {cell['link']}, {cell['of']}{_lanes_words(cell)}: {cell['state']}: "
        f"{'; '.join(cell['problems'])}"
        for cell in found["cells"]
        if cell["problems"]
    ]


def _of_lanes(cell: dict[str, Any]) -> bool:
    return cell["lanes"] > 1


def _of_chunks(cell: dict[str, Any]) -> bool:
    return bool(cell.get("context"))


def _lanes_words(cell: dict[str, Any]) -> str:
    kind = f"chunks, {cell['context']}" if cell.get("context") else "lanes"
    return f", {cell['lanes']} {kind}, {cell['average']}" if cell["lanes"] > 1 else ""


def _row(cell: dict[str, Any], *, lanes: bool, chunks: bool, named: list[str]) -> list[str]:
    """lanes, chunks: whether the table has columns for them. named: in which ways its lanes differ."""
    written = cell["schedule"].startswith(PREFIX)  # which would be many lines
    name = [cell["link"], cell["asked"] if written else cell["schedule"]]
    if lanes:
        name.append(" ".join(filter(None, (str(cell["lanes"]), *(cell.get(way) for way in named)))))
    figures, planned = cell.get("measured"), cell.get("planned")
    if not figures:
        nothing = "-" * (4 + 2 * lanes + chunks)
        return [*name, f"({planned['tokens_per_s']:,.0f})" if planned else "-", *nothing, cell["state"]]
    of_lanes: list[str] = []
    if lanes:
        of_one, size = cell.get("share_of_lanes"), figures["averaging_bytes_per_token"]
        context = figures.get("context_bytes_per_token")
        of_lanes = ["-" if of_one is None else f"{of_one:.3f}", f"{size:,.1f}" if size else "-"]
        of_lanes += [f"{context:,.1f}" if context else "-"] if chunks else []
    share, mark = cell.get("share_of_uncapped"), "" if cell.get("uncapped_from") == "measured" else "*"
    used = figures["utilisation"]
    return [
        *name,
        f"{figures['tokens_per_s']:,.0f}",
        *of_lanes,
        "-" if share is None else f"{share:.3f}{mark}",
        "-" if cell.get("against_plan") is None else f"{cell['against_plan']:+.1%}",
        "-" if cell.get("machines_used") is None else f"{cell['machines_used']:.1%}",
        "-" if used is None else _busy(cell, used),
        cell["state"],
    ]


def _busy(cell: dict[str, Any], used: float) -> str:
    planned = cell.get("planned")
    of_schedule = planned and not cell.get("context") and planned["wire_share"]  # of boundaries
    return f"{100 * used:.0f}/{of_schedule:.0%}" if of_schedule else f"{used:.0%}"


def draw_bench(path: Path, found: dict[str, Any]) -> None:
    """Throughput against rate, a line a codec, with the limit that compute sets. Cells that do not count are hollow,
    and those that were only planned are crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 5.2))
    cells = [cell for cell in found["cells"] if cell["rate_bits_per_s"]]
    names = list(dict.fromkeys(map(_name, cells)))
    for index, name in enumerate(names):
        color = f"C{index % 10}"
        own = sorted(
            (cell for cell in cells if _name(cell) == name),
            key=lambda cell: cell["rate_bits_per_s"],
        )
        shown = [
            (cell["rate_bits_per_s"] / 1e6, height, cell["state"])
            for cell in own
            if (height := _height(cell)) is not None
        ]
        label = f"{name[1]}, {name[2]}, {name[0]}{name[3]}"
        axes.plot([x for x, _, _ in shown], [y for _, y, _ in shown], color=color, linewidth=1, label=label)
        for x, y, state in shown:
            marker = {"ok": "o", "planned": "x"}.get(state, "o")
            face = color if state == "ok" else "white"
            axes.plot([x], [y], marker, color=color, markerfacecolor=face, markersize=6)
    limit = max((cell["planned"]["uncapped_tokens_per_s"] for cell in found["cells"] if cell.get("planned")), default=0)
    if limit:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="compute limit")
    axes.set_xscale("log")
    axes.set_yscale("log")
    rates = sorted({cell["rate_bits_per_s"] / 1e6 for cell in cells})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [each * 10.0**power for power in range(1, 9) for each in (1, 2, 5)]
    axes.set_yticks(
        [tick for tick in ticks if low / 2 <= tick <= 2 * high],
        [f"{tick:,.0f}" for tick in ticks if low / 2 <= tick <= 2 * high],
    )
    axes.set_xlabel("rate of each link, each way, Mb/s")
    axes.set_ylabel("tokens/s")
    axes.set_title(found["title"], fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.text(0.01, 0.01, "o measured   hollow: does not count (see the table)   x planned, not run", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _name(cell: dict[str, Any]) -> tuple[str, str, str, str]:
    return cell["of"], cell["codec"], cell["asked"], _lanes_words(cell)


def _height(cell: dict[str, Any]) -> float | None:
    if figures := cell.get("measured"):
        return figures["tokens_per_s"]
    return cell["planned"]["tokens_per_s"] if cell.get("planned") else None
