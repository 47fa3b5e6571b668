"""The loss as a picture of characters."""

import io

import pytest
from rich.console import Console
from thinpipe.sim.reports.loss_chart import POINTS_MIN, ROWS, WIDTH_MAX, LossChart, Points

FALLING = [(step, 8 - step / 10) for step in range(1, 41)]


def drawn(train: Points, heldout: Points = (), *, width: int = 80, encoding: str = "utf-8") -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width).print(LossChart(train, heldout))
    out.seek(0)
    return out.read().splitlines()


def inked(line: str) -> list[int]:
    """Columns of the picture that have a dot."""
    return [column for column, character in enumerate(line[9:]) if character not in (" ", "⠀")]


def test_a_loss_that_falls_goes_from_the_upper_left_to_the_lower_right() -> None:
    title, *picture, axis, steps = drawn(FALLING)
    assert title.startswith("loss by step")
    assert len(picture) == ROWS
    assert picture[0].startswith("  7.900 │")
    assert picture[-1].startswith("  4.000 │")
    columns = [inked(line) for line in picture]
    assert columns[0][0] == 0
    assert columns[-1][-1] == 80 - 10
    starts = [each[0] for each in columns]
    assert starts == sorted(starts)
    assert {column for each in columns for column in each} == set(range(80 - 9))  # a line without gaps
    assert axis == "        └" + "─" * 71
    assert steps.split() == ["1", "40"]


def test_a_cliff_is_a_stroke_from_top_to_bottom() -> None:
    flat = [(step, 9.0 if step < 20 else 2.0) for step in range(1, 41)]
    assert all(inked(line) for line in drawn(flat)[1 : ROWS + 1])


def test_held_out_losses_are_marks_at_their_step() -> None:
    lines = drawn(FALLING, [(20, 7.9), (40, 2.0)])
    assert lines[1].index("◆") == pytest.approx(9 + 71 * 19 / 39, abs=1)
    assert lines[ROWS].rstrip().endswith("◆")
    assert lines[ROWS].startswith("  2.000")  # the scale covers both


@pytest.mark.parametrize("width", [20, 60, 80, 120, 400])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, drawn(FALLING, [(40, 5.0)], width=width))) == min(width, WIDTH_MAX) or width == 20


def test_where_there_is_ascii_only_the_picture_is_too() -> None:
    lines = drawn(FALLING, [(40, 4.0)], encoding="ascii")
    assert all(line.isascii() for line in lines)
    assert "*" in lines[1]
    assert lines[ROWS].rstrip().endswith("o")


def test_what_is_not_finite_is_left_out_and_a_constant_is_a_line() -> None:
    assert drawn([*FALLING, (41, float("nan")), (42, float("inf"))]) == drawn(FALLING)
    assert sum(bool(inked(line)) for line in drawn([(1, 5.0), (2, 5.0), (3, 5.0)])[1 : ROWS + 1]) == 1
    with pytest.raises(ValueError, match=f"{POINTS_MIN} do"):
        LossChart([(1, 5.0), (2, float("nan"))], [])
