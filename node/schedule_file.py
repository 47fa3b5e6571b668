"""`pipeline.schedule = orders.csv`: the file's content takes the place of its name as soon as settings are read.

So the run has the orders themselves (`protocol.stage_orders`) in its run.toml, in the digest that nodes compare and in
what they tell one another, and moving or changing the file changes nothing in a run that has begun. Why not the path
with a digest beside it: every machine, and every command that looks at the run later, would need the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..protocol.actions import ScheduleError
from ..protocol.schedule import get_schedule
from ..protocol.schedule_csv import read_csv, write_csv

ENDING = ".csv"
BYTES_MAX = 2**24  # a thousand stages with a thousand microbatches


def names_a_file(spec: str) -> bool:
    """Whether it is the name of a file and not a schedule's."""
    return spec.lower().endswith(ENDING)


def schedule_setting(spec: str) -> str:
    """`spec`; of a file, the orders that are in it, as the setting holds them. Raises ScheduleError."""
    if not names_a_file(spec):
        return spec
    path = Path(os.path.expanduser(spec))
    try:
        if path.exists() and not path.is_file():  # nobody may ever write into a pipe
            raise ScheduleError(f"the schedule file {spec} is no file; name a CSV file with a row a stage")
        if path.exists() and path.stat().st_size > BYTES_MAX:
            raise ScheduleError(
                f"{spec} has {path.stat().st_size:,} bytes, and {BYTES_MAX:,} are read; it is no schedule"
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ScheduleError(
            f"cannot read the schedule file {spec}: {why}; name a CSV file with a row a stage"
        ) from None
    try:
        return read_csv(text).spec
    except ScheduleError as error:
        raise ScheduleError(f"{spec}, {error}") from None


def csv_text(spec: str, *, stages: int, microbatches: int) -> str:
    """The text of a file with that schedule in a pipeline of that shape. Raises ScheduleError."""
    return write_csv(get_schedule(spec), stages, microbatches)
