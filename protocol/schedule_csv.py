"""Written orders as a file: the compute-only CSV of torch.distributed.pipelining.

A row is a rank, a cell an action: stage, kind and microbatch, such as `1F0` or `0W3`; an empty cell is an idle tick. So
the file of two stages and two microbatches under 1F1B is

    0F0,0F1,,0B0,,0B1
    ,1F0,1B0,1F1,1B1

torch writes it with `schedule._dump_csv(path, format="compute_only")` and reads it with
`_PipelineScheduleRuntime._load_csv`. Why this format: a tool that searches for schedules writes it for torch anyway.
What is not taken from it: ticks (here a stage acts as soon as it can), transfers (they follow from the order), and
several stages of one rank, as interleaved and V-shaped schedules have them: a node has one stage.

Cells carry numbers that `protocol.stage_orders` does not, so here they are checked: rank N has stage N, and each kind
takes the microbatches in their order. Rows and columns are counted from 1, as editors and spreadsheets do.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from .actions import Schedule, ScheduleError
from .stage_orders import KINDS, OrderError, StageOrders

_CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
_TRANSFER = re.compile(r"[0-9]+(SEND_|RECV_|UNSHARD|RESHARD|REDUCE_GRAD)")


def read_csv(text: str) -> StageOrders:
    """The orders in a file's text. Raises ScheduleError with row, column, cell and remedy."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), strict=True)]
    except csv.Error as error:
        raise ScheduleError(f"not a CSV file: {error}; a row is a rank, a cell such as 0F0") from None
    while rows and not any(rows[-1]):
        rows.pop()
    if not rows:
        raise ScheduleError("there is no action in it; a row is a rank, a cell such as 0F0")
    words, columns = zip(*(_word(rank, row) for rank, row in enumerate(rows)), strict=True)
    try:
        return StageOrders(words)
    except OrderError as error:
        row = rows[error.stage]
        if error.place is None:
            raise ScheduleError(f"row {error.stage + 1}, at its end: {error.fault}") from None
        column = columns[error.stage][error.place]
        raise ScheduleError(f"{_at(error.stage, column, row)}: {error.fault}") from None


def write_csv(schedule: Schedule, stages: int, microbatches: int) -> str:
    """That schedule as text of such a file. Each cell is in the first column in which it could run if all actions took
    one tick and links none, for who looks at it; what runs is the order."""
    words = StageOrders.of(schedule, stages, microbatches).rows
    rows: list[list[str]] = [[] for _ in words]
    done = [dict.fromkeys(KINDS, 0) for _ in words]
    ends: dict[tuple[int, str, int], int] = {}  # stage, kind, microbatch: the column behind it
    at = [0] * stages
    while any(place < len(word) for place, word in zip(at, words, strict=True)):
        for stage, (word, row) in enumerate(zip(words, rows, strict=True)):
            while at[stage] < len(word):
                kind = word[at[stage]]
                microbatch = done[stage][kind]
                neighbour = {"F": stage - 1, "W": -1}.get(kind, stage + 1)
                before = (neighbour, kind, microbatch) if 0 <= neighbour < stages else None
                if before and before not in ends:
                    break
                row += [""] * ((ends[before] if before else 0) - len(row))
                row.append(f"{stage}{kind}{microbatch}")
                ends[stage, kind, microbatch] = len(row)
                done[stage][kind] += 1
                at[stage] += 1
    return "".join(",".join(row) + "\n" for row in rows)


def _word(rank: int, row: Sequence[str]) -> tuple[str, list[int]]:
    """A row's letters, and the column of each (0-based)."""
    cells = [(column, cell) for column, cell in enumerate(row) if cell]
    matches = [(column, _parsed(rank, column, row)) for column, _ in cells]
    if not matches:
        raise ScheduleError(f"row {rank + 1} is empty; rank {rank} has to do something: give a row for each stage")
    stages = sorted({int(match[1]) for _, match in matches})
    if len(stages) > 1:
        shown = ", ".join(map(str, stages[:4])) + (", ..." if len(stages) > 4 else "")
        raise ScheduleError(
            f"row {rank + 1} has stages {shown}, and a node has one; give each its own row, and as many --stages "
            "(interleaved and V-shaped schedules have no place here)"
        )
    if stages != [rank]:
        column = matches[0][0]
        raise ScheduleError(f"{_at(rank, column, row)}: this row is of stage {rank}; put the rows in order of stages")
    due = dict.fromkeys(KINDS, 0)
    word = ""
    for column, match in matches:
        kind, microbatch = match[2], int(match[3])
        expected = max(due["B"], due["I"]) if kind in "BI" else due[kind]
        if microbatch != expected:
            seen = "comes a second time" if microbatch < expected else f"comes before {rank}{kind}{expected}"
            raise ScheduleError(
                f"{_at(rank, column, row)} {seen}; each kind takes every microbatch once, in order, so that sums are "
                "the same under all schedules: renumber, or reorder"
            )
        due[kind] = expected + 1
        if kind == "B":  # it is both halves
            due["W"] += due["W"] == expected
        word += kind
    return word, [column for column, _ in matches]


def _parsed(rank: int, column: int, row: Sequence[str]) -> re.Match[str]:
    cell = row[column]
    if match := _CELL.fullmatch(cell):
        return match
    where = _at(rank, column, row)
    if _TRANSFER.match(cell):
        raise ScheduleError(
            f"{where} is no compute; write the file as compute_only, since transfers follow from the order"
        )
    if cell.startswith("("):
        raise ScheduleError(f"{where} is two actions at once, and a stage does one after the other; write two cells")
    raise ScheduleError(f"{where} is no action; write stage, F, B, I or W, and microbatch, as in {rank}F0")


def _at(rank: int, column: int, row: Sequence[str]) -> str:
    cell = row[column] if len(row[column]) <= 40 else row[column][:40] + "..."
    return f"row {rank + 1}, column {column + 1}: {cell!r}"
