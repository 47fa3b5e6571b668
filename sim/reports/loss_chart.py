"""The loss as a picture in the terminal: training as a line of braille dots, held-out losses as marks on it.

A braille character is a raster of 2 x 4 dots, so 60 columns and 10 rows are 120 x 40 points: enough to see a run settle
or blow up. Each column of dots is the mean of the steps that fall on it, joined to its neighbours so that a steep fall
stays a line. Where the output has ASCII only, each character that has dots is an asterisk.

Why not a library: plotext brings its own screen, colours and canvas, and prints them beside rich instead of through it
(widths, pipes, ASCII); what is needed is this page. Why not a PNG: matplotlib takes longer to import than the end of a
run may take, and a terminal on another machine shows none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

ROWS = 10
WIDTH_MAX = 100
POINTS_MIN = 3
_BLANK = 0x2800
_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's numbering of dots: [row][column]
_LABEL = 7

Points = Sequence[tuple[float, float]]  # steps done, loss


class LossChart:
    """A rich renderable as wide as the console, up to WIDTH_MAX columns. What is not finite is left out. Raises
    ValueError for fewer than POINTS_MIN training losses."""

    def __init__(self, train: Points, heldout: Points) -> None:
        train, heldout = ([point for point in each if math.isfinite(point[1])] for each in (train, heldout))
        if len(train) < POINTS_MIN:
            raise ValueError(f"{len(train)} losses make no picture; {POINTS_MIN} do")
        self._train, self._heldout = train, heldout
        losses = [loss for _, loss in (*train, *heldout)]
        self._low, self._high = min(losses), max(losses)
        self._first, self._last = train[0][0], max(step for step, _ in (*train, *heldout))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        plain = options.ascii_only
        columns = max(8, min(options.max_width, WIDTH_MAX) - _LABEL - 2)
        rows = self._raster(columns)
        mark = "o" if plain else "◆"
        marks = {self._cell(point, columns) for point in self._heldout}
        yield Text(f"loss by step: training as a line, held-out {mark}", style="italic")
        for row, dots in enumerate(rows):
            label = {0: f"{self._high:.3f}", ROWS - 1: f"{self._low:.3f}"}.get(row, "")
            line = Text(f"{label:>{_LABEL}} {'|' if plain else '│'}")
            for column, pattern in enumerate(dots):
                if (row, column) in marks:
                    line.append(mark, style="yellow")
                elif plain:
                    line.append("*" if pattern else " ")
                else:
                    line.append(chr(_BLANK | pattern) if pattern else " ", style="cyan")
            line.rstrip()
            yield line
        first, last = f"{self._first:g}", f"{self._last:g}"
        corner, dash = ("+", "-") if plain else ("└", "─")
        yield Text(f"{'':>{_LABEL}} {corner}{dash * columns}")
        yield Text(f"{'':>{_LABEL}}  {first}{last:>{columns - len(first)}}")

    def _raster(self, columns: int) -> list[list[int]]:
        """Dot patterns by row and column of characters."""
        rows = [[0] * columns for _ in range(ROWS)]
        before: int | None = None
        for x, y in self._dots(2 * columns):
            start = y if before is None else before
            for dot in range(min(y, start), max(y, start) + 1):  # joined with the column before
                rows[dot // 4][x // 2] |= _DOT[dot % 4][x % 2]
            before = y
        return rows

    def _dots(self, width: int) -> Iterator[tuple[int, int]]:
        """For each column of dots the row of its mean; between steps that are wider apart, on a straight line."""
        sums: dict[int, list[float]] = {}
        for step, loss in self._train:
            sums.setdefault(self._across(step, width), []).append(loss)
        known = [(x, sum(losses) / len(losses)) for x, losses in sorted(sums.items())]
        for (x, loss), (next_x, next_loss) in zip(known, [*known[1:], known[-1]], strict=True):
            for between in range(x, max(next_x, x + 1)):
                share = (between - x) / (next_x - x) if next_x > x else 0.0
                yield between, self._down(loss + share * (next_loss - loss), 4 * ROWS)

    def _cell(self, point: tuple[float, float], columns: int) -> tuple[int, int]:
        step, loss = point
        return self._down(loss, 4 * ROWS) // 4, self._across(step, columns)

    def _across(self, step: float, width: int) -> int:
        span = self._last - self._first or 1.0
        return round((step - self._first) / span * (width - 1))

    def _down(self, loss: float, height: int) -> int:
        span = self._high - self._low or 1.0
        return round((self._high - loss) / span * (height - 1))
