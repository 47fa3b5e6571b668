"""Checks for numbers that come from records or over HTTP, perhaps from a stranger: each must be a plausible value."""

from __future__ import annotations

from typing import Any

from ...protocol.grid_place import LANES_MAX

STAGES_MAX = 1024  # of a run, as its configuration has it
TIME_MAX_S = 253_402_300_800.0  # the year 10000: further on, calendars end
QUANTITY_MAX = 2.0**63  # bytes, bits a second, seconds, counts


def any_number(value: Any) -> float:
    """NaN and infinity too: of losses, norms and staleness, which a run that diverges has. Raises TypeError for
    what is no number, ValueError for one that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length
        raise ValueError("a number of more than 300 digits") from None


def quantity(value: Any, most: float = QUANTITY_MAX) -> float:
    """A number that can be added up and drawn. Raises TypeError for what is none, ValueError for what cannot be."""
    if not -most <= any_number(value) <= most:  # NaN is not, either
        raise ValueError(f"{value!r} is larger than it can be")
    return float(value)


def moment(value: Any) -> float:
    """Seconds since 1970, which a calendar has. Raises as `quantity` does."""
    return quantity(value, TIME_MAX_S)


def whole(value: Any) -> int:
    """Raises as `quantity` does."""
    quantity(value)
    return int(value)


def stage_number(value: Any) -> int:
    """Of a stage, or of the boundary below it. Raises as `quantity` does."""
    if not 0 <= (number := whole(value)) < STAGES_MAX:
        raise ValueError(f"there is no stage {number}, of {STAGES_MAX} at most")
    return number


def stage_count(value: Any) -> int:
    """Of a run. Raises as `quantity` does."""
    return stage_number(whole(value) - 1) + 1


def lane_number(value: Any) -> int:
    """Of a lane. Raises as `quantity` does."""
    if not 0 <= (number := whole(value)) < LANES_MAX:
        raise ValueError(f"there is no lane {number}, of {LANES_MAX} at most")
    return number
