"""Schedules that are not known before times and links are: `zb:rtt_ratio=auto`, `best`, `best:in_flight=8`.

Who starts a run finds them by simulation before the first step (`node.measuring.schedule_search`), and the run has what
was found, by name or as written orders: all nodes have the same, and nobody searches twice. This is their spelling.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .actions import ScheduleError
from .schedule import OneFOneB, get_schedule

AUTO = ":rtt_ratio=auto"
BEST = "best"
_BEST = re.compile(r"best(?::in_flight=([1-9][0-9]{0,5}))?")


class Sought(NamedTuple):
    """plain: the schedule to begin with until another is found. best: whether any order will do, and not only another
    depth of `plain`. in_flight: the most microbatches at once on any stage; None: as many as that depth takes."""

    plain: str
    best: bool
    in_flight: int | None


def sought(spec: str | None) -> Sought | None:
    """None for a schedule that is known. Raises ScheduleError for one that cannot be found."""
    if spec is None or not is_sought(spec):
        return None
    if spec.partition(":")[0] == BEST:
        if not (match := _BEST.fullmatch(spec)):
            raise ScheduleError(f"schedule '{spec}': {BEST} has one option, as in {BEST}:in_flight=8")
        return Sought("zb", best=True, in_flight=int(match[1]) if match[1] else None)
    plain = spec.removesuffix(AUTO)
    if ":" in plain or not isinstance(get_schedule(plain), OneFOneB):
        raise ScheduleError(
            f"schedule '{spec}': there is no depth to choose for {plain}; say 1f1b{AUTO} or zb{AUTO}, or {plain}"
        )
    return Sought(plain, best=False, in_flight=None)


def is_sought(spec: str) -> bool:
    """Whether it has to be found; the rest of it may be nonsense."""
    return spec.endswith(AUTO) or spec.partition(":")[0] == BEST


def plain_schedule(spec: str) -> str:
    """What a run begins with, or is checked with, until that is found; any other schedule is itself."""
    return "zb" if spec.partition(":")[0] == BEST else spec.removesuffix(AUTO)


def may_stand_for(spec: str, found: str) -> bool:
    """Whether `found` is what may have been found for `spec`."""
    kind = found.partition(":")[0]
    return kind in ("1f1b", "zb", "order") if spec.partition(":")[0] == BEST else kind == plain_schedule(spec)
