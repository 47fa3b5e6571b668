"""A comparison of recipes in a terminal: a bar over all its runs while they train, then a table, then what the table
assumes, in words. All figures come from `compare.json` as it is; nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

NOT_REACHED = "not reached"
_BESIDE = 55  # columns of a line that are not for the runs under way
_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


class CompareDisplay:
    """A context manager. steps: of all runs together. Where the output is no terminal, a line for each run that
    ends."""

    def __init__(self, console: Console, *, steps: int, runs: int) -> None:
        self._console, self._steps, self._runs = console, steps, runs
        self._done, self._ended = 0, 0
        self._progress: Progress | None = None

    def __enter__(self) -> CompareDisplay:
        if self._console.is_terminal:
            columns = (
                TextColumn("steps of all runs"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
            )
            # Drawn by who calls `update`, and by no thread: processes are started beside it.
            self._progress = Progress(*columns, console=self._console, auto_refresh=False)
            self._progress.start()
            self._task = self._progress.add_task("", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.refresh()
            self._progress.stop()

    def update(self, standings: Sequence[tuple[str, int, float | None]]) -> None:
        """Of the runs under way: title, steps done, loss of the last one."""
        if not self._progress:
            return
        told = [f"{title}: {'starting' if loss is None else f'loss {loss:.3f}'}" for title, _, loss in standings]
        shown = max(1, (self._console.width - _BESIDE) // max(map(len, told), default=1))
        if len(told) > shown:  # the rest of the line is the bar's
            told[shown:] = [f"and {len(told) - shown} more"]
        done = self._done + sum(completed for _, completed, _ in standings)
        self._progress.update(self._task, completed=done, description="; ".join(told))
        self._progress.refresh()

    def ended(self, title: str, steps: int, how: str) -> None:
        """how: in words."""
        self._done += steps
        self._ended += 1
        self._console.print(
            f"run {self._ended} of {self._runs}: {title}: {how}", highlight=False, markup=False, soft_wrap=True
        )


def duration(seconds: float | None) -> str:
    """`3.2 h`, with three digits; None: it is not reached."""
    if seconds is None:
        return NOT_REACHED
    name, unit = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    value = seconds / unit
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {name}"


def loss_text(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def bytes_text(recipe: dict[str, Any]) -> tuple[str, str]:
    """Bytes a token and ratio; of a recipe without a run that ended there are none."""
    size, ratio = recipe["bytes_per_token"], recipe["ratio"]
    return ("-", "-") if size is None else (f"{size:,.1f}", f"{ratio:,.1f}x")


def beside_columns(found: dict[str, Any]) -> dict[str, str]:
    """What crosses between lanes, which is beside bytes a token: a recipe's field by its title, where one has it."""
    titles = {"averaging": "averaging_bytes_per_token", "keys, values": "context_bytes_per_token"}
    has = {"averaging": "lanes", "keys, values": "chunks"}
    return {
        title: field for title, field in titles.items() if any(recipe[has[title]] > 1 for recipe in found["recipes"])
    }


def beside_text(recipe: dict[str, Any], field: str) -> str:
    """Bytes a token between lanes."""
    size = recipe[field]
    return "-" if size is None else f"{size:,.1f}"


def over_text(recipe: dict[str, Any]) -> str:
    """`-0.26 ± 1.94 %`; of one seed there is no interval."""
    over, half = recipe["over_first_percent"], recipe["over_first_interval"]
    if over is None:
        return "-"
    return f"{over:+.2f} %" if half is None else f"{over:+.2f} ± {half:.2f} %"


def time_text(recipe: dict[str, Any], link: str) -> str:
    """With a sign where the first evaluation was below the target already, so that it was reached before."""
    seconds = recipe["links"][link]["time_to_target_s"]
    sign = "≤ " if recipe["at_first_evaluation"] and seconds is not None else ""
    return f"{sign}{duration(seconds)}"


def fastest(found: dict[str, Any], link: str) -> set[str]:
    """The recipes that reach the target first over that link, to what is shown."""
    times = {each["name"]: each["links"][link]["time_to_target_s"] for each in found["recipes"]}
    least = min((seconds for seconds in times.values() if seconds is not None), default=math.inf)
    return {name for name, seconds in times.items() if seconds is not None and seconds <= least * 1.0005}


def compare_table(found: dict[str, Any]) -> Table:
    """A row a recipe; the least time over each link in bold."""
    target = found["target_loss"]
    table = Table(
        title=f"held-out loss, bytes, and time to a loss of {loss_text(target)} over each link"
        if target is not None
        else "held-out loss and bytes",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("recipe", overflow="fold")
    beside = beside_columns(found)
    lateral = [f"{title},\nb./token" for title in beside]
    for column in ("held-out\nloss", "over the\nfirst", "bytes/\ntoken", "ratio", *lateral):
        table.add_column(column, justify="right")
    for link in found["links"]:
        table.add_column(link.replace(",", ",\n"), justify="right")
    first_of = {link: fastest(found, link) for link in found["links"]}
    for recipe in found["recipes"]:
        table.add_row(
            recipe["name"],
            loss_text(recipe["loss"]),
            over_text(recipe),
            *bytes_text(recipe),
            *(beside_text(recipe, field) for field in beside.values()),
            *(
                f"[bold]{time_text(recipe, link)}[/bold]"
                if recipe["name"] in first_of[link]
                else time_text(recipe, link)
                for link in found["links"]
            ),
        )
    return table


def trained_text(found: dict[str, Any]) -> str:
    """What losses and bytes a token are of."""
    widths = ", ".join(str(width) for width in sorted({recipe["width"] for recipe in found["recipes"]}))
    tokens = sorted({recipe["steps"] * found["tokens_per_step"] for recipe in found["recipes"]})
    told = " to ".join(f"{count / 1e6:.3g}M" for count in dict.fromkeys((tokens[0], tokens[-1])))
    seeds = found["seeds"]
    return (
        f"width {widths}, {told} tokens, {found['tokens_per_step']:,} a step, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    )


def pace_text(found: dict[str, Any]) -> str:
    """What the seconds of a step are of."""
    pace = found["pace"]
    return (
        f"{pace['machine']}: width {pace['width']}, {pace['tokens_per_step']:,} tokens a step, "
        f"schedule {pace['schedule']}"
    )


def compare_lines(found: dict[str, Any]) -> Iterator[str]:
    """What the table assumes, a line each."""
    yield f"loss and bytes/token: trained here in one process; {trained_text(found)}"
    if found["target_loss"] is None:
        yield f"no time to a loss: {found['target_from']}; give --target"
    else:
        yield (
            f"time: steps to a held-out loss of {found['target_loss']:.4f} ({found['target_from']}) x seconds a step, "
            f"simulated at {pace_text(found)}"
        )
        yield from _widths_differ(found)
        yield from _lanes_compute_beside(found)
    for recipe in found["recipes"]:
        for run in recipe["runs"]:
            if run["failed"]:
                yield f"{recipe['name']}, seed {run['seed']}, failed, so the recipe has no loss: {run['failed']}"
    if any(recipe["at_first_evaluation"] for recipe in found["recipes"]):
        yield "≤: below that loss at the first evaluation already; evaluate more often with --eval-every"
    if len(found["seeds"]) == 1:
        yield "one seed has no interval: differences below 1 or 2 % may be chance; say --seeds 3"


def _lanes_compute_beside(found: dict[str, Any]) -> Iterator[str]:
    for recipe in found["recipes"]:
        if (count := recipe["lanes"]) > 1:
            has, beside = f"{count} lanes", "averaging is"
            if recipe["chunks"] > 1:
                has, beside = f"{count} chunks of each sequence", "averaging, keys and values are"
            yield (
                f"{recipe['name']} has {has}: {count} times the machines, each chain with its part of the tokens of a "
                f"step; its loss is the mean of its lanes, {beside} beside bytes/token"
            )


def _widths_differ(found: dict[str, Any]) -> Iterator[str]:
    """Where a step is timed at another width than was trained, an option such as r=32 means less or more there."""
    width = found["pace"]["width"]
    if {recipe["width"] for recipe in found["recipes"]} != {width}:
        ratios = ", ".join(
            f"{recipe['name']} {next(iter(recipe['links'].values()))['ratio']:,.1f}x" for recipe in found["recipes"]
        )
        yield (
            f"those seconds are for width {width}, and codec options are taken as they are; the ratios there: {ratios}"
        )
