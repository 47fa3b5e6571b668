"""How `thinpipe top` draws a swarm: stages, links, learned tables, faults.

Two shapes: up to 139 columns one table below the other, from 140 on two beside two, so that a swarm of four fits a wide
terminal's height. Whatever nodes and their peers have said is drawn as plain text, without control characters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .figures import DictionaryFigures, FaultFigures, LinkFigures, StageFigures, together
from .lanes import CONTEXT_LINK, LATERAL
from .top_data import StageView, SwarmView
from .wording import plain

WIDE_COLUMNS = 140
FAULTS_SHOWN = 5
BETWEEN = {LATERAL: "", CONTEXT_LINK: ", keys and values"}  # links between lanes
COLOURS = {
    "starting": "cyan",
    "training": "green",
    "halted": "yellow",
    "ended": "bold green",
    "stopped": "yellow",
    "failed": "bold red",
    "gone": "bold red",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar as wide as its column: parts, each a share of the whole and a colour; perhaps a mark at a share."""

    parts: Sequence[tuple[float, str]]
    mark: float | None = None

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        del console
        return Measurement(8, min(60, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        width = max(1, min(60, options.max_width))
        cells: list[tuple[str, str]] = []
        until = 0.0
        for share, colour in self.parts:
            until = min(1.0, until + max(0.0, share))  # the least rates there are make shares beyond all bounds
            cells += [("█", colour)] * (round(until * width) - len(cells))
        cells += [("─", "bright_black")] * (width - len(cells))
        if self.mark is not None:
            place = max(0, round(min(1.0, max(0.0, self.mark)) * width) - 1)
            cells[place] = ("┃", "yellow")
        for character, colour in cells:
            yield Segment(character, Style.parse(colour))


def frame(swarms: Sequence[SwarmView], *, width: int, now_s: float) -> RenderableType:
    """All of it, for so many columns; now_s: seconds since 1970. Above the lanes of one run a line on all of them."""
    parts: list[RenderableType] = []
    for _, of_one in itertools.groupby(swarms, key=_run_of_lanes):
        lanes = list(of_one)
        if lanes[0].lanes > 1:
            parts += [_of_all(lanes), Text()]
        for swarm in lanes:
            parts += [_swarm(swarm, width=width, now_s=now_s), Text()]
    return Group(*parts[:-1])


def _run_of_lanes(swarm: SwarmView) -> tuple[str, int]:
    """What lanes of one run have in common; a run of one lane has it with no other."""
    head = _head(swarm)
    return (head.run, swarm.lanes) if head and swarm.lanes > 1 else (swarm.name, id(swarm))


def _of_all(lanes: Sequence[SwarmView]) -> Text:
    """Mean loss, tokens/s of all together, and what the averaging took."""
    heads = [head for lane in lanes if (head := _head(lane))]
    figures = [seen.figures for lane in lanes for seen in lane.stages.values()]
    losses = [head.loss for head in heads if head.loss is not None]
    rate = together(heads)
    rounds = [of.round.number for of in figures if of.round]
    sent, tokens = sum(of.averaging_bytes for of in figures), sum(head.dense_tokens for head in heads)
    said = [
        f"{lanes[0].lanes} lanes" + (f", {len(lanes)} of them seen" if len(lanes) < lanes[0].lanes else ""),
        f"loss {sum(losses) / len(losses):.4f}" if losses else None,
        f"{rate:,.0f} tokens/s" if rate else None,
        f"averaging {sent / tokens:,.1f} bytes/token" if sent and tokens else None,
        f"round {min(rounds)}" if rounds else None,
    ]
    return Text("  ".join(each for each in said if each), "bold", no_wrap=True, overflow="ellipsis")


def _swarm(swarm: SwarmView, *, width: int, now_s: float) -> RenderableType:
    wide = width >= WIDE_COLUMNS
    figures = [seen.figures for _, seen in sorted(swarm.stages.items())]
    stages = _stages(swarm, wide=wide)
    links = _links(figures)
    tables = _dictionaries(figures)
    faults = _faults(figures)
    notes = [Text(f"stage {stage}: {plain(seen.note)}", "red") for stage, seen in _noted(swarm)]
    notes += [Text(f"stage {of.stage}: {plain(of.unsaved)}", "red") for of in figures if of.unsaved]
    notes += [Text(plain(note), "red") for note in swarm.notes]
    name = Text(plain(swarm.name), "bold", no_wrap=True, overflow="ellipsis")
    advice = [Text(swarm.advice, "yellow")] if swarm.advice else []
    head = [name, _headline(swarm, now_s), _progress(swarm), *notes, *advice, Text()]
    blocks: list[RenderableType]
    if wide:
        blocks = [_beside(stages, links), _beside(tables, faults)]
    else:  # what is cut off at the foot of a low terminal matters least
        blocks = [block for block in (stages, links, faults, tables) if block is not None]
    return Group(*head, *(part for block in blocks for part in (block, Text())))


def _noted(swarm: SwarmView) -> Iterable[tuple[int, StageView]]:
    return [(stage, seen) for stage, seen in sorted(swarm.stages.items()) if seen.note]


def _beside(left: RenderableType | None, right: RenderableType | None) -> RenderableType:
    if left is None or right is None:
        return left or right or Text()
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _headline(swarm: SwarmView, now_s: float) -> Text:
    figures = [seen.figures for seen in swarm.stages.values()]
    head = _head(swarm)
    if head is None:
        return Text("nothing is on record yet")
    text = Text(time.strftime("%H:%M:%S", time.localtime(now_s)), no_wrap=True, overflow="ellipsis")
    moved, dense = sum(each.moved_bytes for each in figures), sum(each.dense_bytes for each in figures)
    said = [
        None if head.loss is None else f"loss {head.loss:.4f}",
        None if head.val_loss is None else f"held-out {head.val_loss:.4f}",
        None if head.tokens_per_s is None else f"{head.tokens_per_s:,.0f} tokens/s",
        f"ratio {dense / moved:.2f}x" if dense and moved else None,
        f"generation {max(each.generation for each in figures)}",
    ]
    return text.append("".join(f"  {each}" for each in said if each))


def _head(swarm: SwarmView) -> StageFigures | None:
    """Of the first stage that is seen: all know the loss, stage 0 begins each step."""
    return swarm.stages[min(swarm.stages)].figures if swarm.stages else None


def _progress(swarm: SwarmView) -> RenderableType:
    head = _head(swarm)
    if head is None or not head.steps:
        return Text()
    grid = Table.grid(padding=(0, 1))
    grid.add_row(f"step {head.completed}/{head.steps}", Bar([(head.completed / head.steps, "green")]))
    return grid


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """Words to the left, figures to the right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.show_edge = (0, 1, 0, 0), False
    for index, column in enumerate(columns):
        words = index == 0 or column in ("state", "of")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def _stages(swarm: SwarmView, *, wide: bool) -> Table:
    columns = ["stage", "state", "step", "loss", "tokens/s", "computes", "codec", "waits", "saved"]
    if wide:
        columns += ["memory", "faults"]
    table = _table("stages", *columns)
    for stage in range(swarm.size):
        seen = swarm.stages.get(stage)
        if seen is None:
            table.add_row(str(stage), Text("not seen", "red"))
            continue
        of = seen.figures
        row: list[RenderableType] = [
            str(stage),
            Text(seen.state, COLOURS.get(seen.state, "default")),
            f"{of.completed}/{of.steps}" if of.steps else str(of.completed),
            "-" if of.loss is None else f"{of.loss:.4f}",
            "-" if of.tokens_per_s is None else f"{of.tokens_per_s:,.0f}",
            *(_share(share) for share in (of.compute_share, of.encode_share, of.wait_share)),
            "-" if of.committed is None else str(of.committed),
        ]
        if wide:
            memory = "-" if of.rss_bytes is None else f"{of.rss_bytes / 2**20:,.0f} MiB"
            row += [memory, str(of.faults_by_code.total())]
        table.add_row(*row)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _links(figures: Sequence[StageFigures]) -> Table | None:
    found = [(way, link, of) for of in figures for way, link in of.links.items()]
    found.sort(key=lambda each: (each[0][1] in BETWEEN, each[0][0], each[0][1] != "forward"))
    if not found:
        return None
    table = _table(
        "links, Mb/s",
        "from-to",
        "used of the cap",
        "",
        "cap",
        "measured",
        "used",
        caption="┃ measured: while the queue was not empty, else at the start",
    )
    table.expand = True
    table.columns[1].ratio, table.columns[1].justify = 1, "left"
    for (boundary, direction), link, of in found:
        ends = (boundary, boundary + 1) if direction == "forward" else (boundary + 1, boundary)
        name = f"{of.stage} → lane {boundary}{BETWEEN[direction]}" if direction in BETWEEN else f"{ends[0]} → {ends[1]}"
        measured = link.measured_bits_per_s or link.at_start_bits_per_s
        table.add_row(
            name,
            _link_bar(link, measured),
            "-" if link.share is None else f"{link.share:.1%}",
            *map(_megabits, (link.configured_bits_per_s, measured, link.used_bits_per_s)),
        )
    return table


def _link_bar(link: LinkFigures, measured: float | None) -> Bar:
    """The whole is the cap, or what was measured if that is more, or all that there is to compare with."""
    whole = max(link.configured_bits_per_s or 0.0, measured or 0.0)
    if not whole:
        return Bar([])
    used = (link.used_bits_per_s or 0.0) / whole
    colour = "green" if used < 0.7 else "yellow" if used < 0.9 else "red"
    return Bar([(used, colour)], mark=measured / whole if measured else None)


def _megabits(bits_per_s: float | None) -> str:
    return "-" if bits_per_s is None else f"{bits_per_s / 1e6:,.1f}"


def _dictionaries(figures: Sequence[StageFigures]) -> Table | None:
    ends: dict[tuple[int, str], dict[str, DictionaryFigures]] = {}
    for of in figures:
        for each in of.dictionaries:
            ends.setdefault((each.boundary, each.dictionary), {})[each.end] = each
    if not ends:
        return None
    table = _table(
        "learned tables",
        "boundary",
        "of",
        "owner's version",
        "other end's",
        "stale",
        caption="version: step.microbatch, generation",
    )
    for (boundary, dictionary), pair in sorted(ends.items()):
        owner, replica = pair.get("owner"), pair.get("replica")
        table.add_row(
            f"{boundary}-{boundary + 1}",
            plain(dictionary),
            _version(owner),
            _version(replica),
            "-" if owner is None or owner.staleness is None else f"{owner.staleness:.2%}",
        )
    return table


def _version(end: DictionaryFigures | None) -> str:
    if end is None or end.version is None:
        return "-"
    generation, step, microbatch, number = end.version
    return f"{step}.{microbatch}{f'.{number}' if number else ''}, {generation}"


def _faults(figures: Sequence[StageFigures]) -> Table | None:
    every: list[tuple[FaultFigures, int]] = [(fault, of.stage) for of in figures for fault in of.faults]
    if not every:
        return None
    newest = sorted(every, key=lambda each: each[0].time_s)[-FAULTS_SHOWN:]
    total = sum(of.faults_by_code.total() for of in figures)
    table = _table(f"faults, newest last ({len(newest)} of {total})", "time", "stage", "code", "what")
    for column in table.columns:
        column.justify = "left"
    table.columns[3].no_wrap = False  # so it is the one that gives way
    for fault, stage in newest:
        when = time.strftime("%H:%M:%S", time.localtime(fault.time_s))
        table.add_row(
            when,
            str(stage),
            Text(plain(fault.code), "red"),
            Text(plain(fault.reason), no_wrap=True, overflow="ellipsis"),
        )
    return table
