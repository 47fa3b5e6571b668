"""The quick tier's choice of cases: as many pairs as there is room for, always the same; all others run elsewhere."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .tiers import LONG_FILES, long_files_first, spread

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]
CUBE = [tuple(enumerate(row)) for row in itertools.product(range(3), range(3), range(3))]


CASE = re.compile(r"\[(\d)-(\d)-(\d)\]")


def pairs(rows: list[tuple[tuple[int, int], ...]]) -> set[object]:
    return {pair for row in rows for pair in itertools.combinations(row, 2)}


def test_nine_of_twenty_seven_hold_every_pair() -> None:
    chosen = spread(CUBE, 9)
    assert len(chosen) == 9
    assert pairs([CUBE[index] for index in chosen]) == pairs(CUBE)


@pytest.mark.parametrize(("count", "chosen"), [(1, {0}), (3, {0, 3, 6}), (10, set(range(10))), (99, set(range(10)))])
def test_one_parameter_is_spread_evenly(count: int, chosen: set[int]) -> None:
    assert spread([(("seed", seed),) for seed in range(10)], count) == chosen


def test_quick_and_slow_are_all(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(tiers=(ROOT / "tests/tiers.py").read_text(encoding="utf-8"), test_law=LAW)
    names = {}
    for tier in ("slow", "long", "not slow and not long"):
        lines = pytester.runpytest_inprocess("--collect-only", "-q", "-m", tier).outlines
        names[tier] = set(re.findall(r"test_law\.py::\S+", "\n".join(lines)))
    quick, slow, long = names["not slow and not long"], names["slow"], names["long"]
    cases = [tuple(enumerate(map(int, found.groups()))) for found in map(CASE.search, quick) if found]
    assert pairs(cases) == pairs(CUBE)  # of real parameters, as pytest numbers them
    assert (len(quick), len(slow), len(long)) == (9 + 9 + 1, 18 + 8 + 1, 10)
    assert len(quick | slow | long) == 2 * 27 + 2


def test_long_files_go_first_and_are_there() -> None:
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in LONG_FILES)
    names = ["test_a", f"test_{LONG_FILES[1]}", "test_b", f"test_{LONG_FILES[0]}", "test_a"]
    items: list[Any] = [SimpleNamespace(path=ROOT / f"tests/{name}.py") for name in names]
    a, second, b, first, again = items
    long_files_first(items)
    assert items == [first, second, a, b, again]


CONFTEST = """
import tiers

def pytest_configure(config):
    for name in ("slow", "long", "pairwise"):
        config.addinivalue_line("markers", name)

def pytest_collection_modifyitems(items):
    tiers.split_tiers(items)
"""
LAW = """
import pytest

@pytest.mark.pairwise(9)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_law(a, b, c):
    pass

@pytest.mark.pairwise(9, slow=8)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_law_of_many(a, b, c):
    pass

@pytest.mark.slow
def test_long():
    pass

def test_short():
    pass
"""
