"""Which tests are quick: `make test` runs those, `make test-slow` the rest, `make test-long` what only repeats them.

A test that takes seconds is marked `slow` by hand. A law that is tested for every combination is marked
`pairwise(n)`: its quick cases are n that hold as many pairs of values as n can (Kuhn et al., NIST SP 800-142: most
faults need no more than two), or, where it has one parameter, n that are spread evenly; all its other cases are slow.
Where a law has many cases that take seconds each, `pairwise(n, slow=m)` makes m of the others slow, chosen likewise, so
that three values and more meet too, and what is left *long*: every combination, for whoever changes what it is about.
The choice depends on the order of the cases alone, so every worker and every run makes the same one.

A file is one worker's (`--dist loadfile`). Files that take long go first; else the worker that began one of them at
last would be waited for by all others. pytest-xdist's own order is by the number of tests, but what takes long are few
tests of real processes: hence `--no-loadscope-reorder`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

# The longest first, in about this order: half a minute and more, of all tiers together.
LONG_FILES = (
    "lane_processes",
    "discovery",
    "recovery",
    "supervise",
    "lost_disk",
    "full_disk",
    "chaos_lanes",
    "gpu_benchmark",
    "lateral_links",
    "chunk_losses",
    "chunk_processes",
    "compare_processes",
    "averaging_benchmark",
    "hostile_run",
    "parity",
    "ssn",
    "export",
    "mapl",
)


def long_files_first(items: list[pytest.Item]) -> None:
    """Sort so; all else stays in its order."""
    place = {f"test_{name}.py": index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def split_tiers(items: Sequence[pytest.Item]) -> None:
    """Mark as slow, or long, what a `pairwise` test does not need in the quick tier."""
    laws: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise"):
            laws.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in laws.values():
        marker = cases[0].get_closest_marker("pairwise")
        assert marker
        (count,) = marker.args
        # One value for each decorator: `callspec.indices` has the number of the case, of every parameter.
        rows = [tuple(enumerate(case.callspec._idlist)) for case in cases]  # pyright: ignore[reportPrivateUsage]
        chosen = spread(rows, count)
        others = [index for index in range(len(rows)) if index not in chosen]
        slow = spread([rows[index] for index in others], marker.kwargs.get("slow", len(others)))
        for place, index in enumerate(others):
            cases[index].add_marker(pytest.mark.slow if place in slow else pytest.mark.long)


def check_alone(items: Sequence[pytest.Item]) -> None:
    """Whatever is marked `alone` is in a file that says so: the Makefile looks for these words."""
    for path in {item.path for item in items if item.get_closest_marker("alone")}:
        assert "mark.alone" in path.read_text(encoding="utf-8"), f"{path} has tests `alone`, and not `mark.alone`"


def spread(rows: Sequence[Sequence[Hashable]], count: int) -> set[int]:
    """Indices of `count` rows: each next one adds the most pairs of values that no earlier one has, of equals the one
    whose values were used least, and of those the first; where no pair is left, or rows have one value, they are spread
    evenly."""
    if count >= len(rows):
        return set(range(len(rows)))
    pairs = [set(itertools.combinations(row, 2)) for row in rows]
    chosen: list[int] = []
    seen: set[object] = set()
    used: Counter[Hashable] = Counter()

    def gain(index: int) -> tuple[int, int]:
        return len(pairs[index] - seen), -sum(used[value] for value in rows[index])

    while len(chosen) < count:
        best = max((index for index in range(len(rows)) if index not in chosen), key=gain)
        if not pairs[best] - seen:
            break
        chosen.append(best)
        seen |= pairs[best]
        used.update(rows[best])
    left = [index for index in range(len(rows)) if index not in chosen]
    more = count - len(chosen)
    return {*chosen, *(left[len(left) * place // more] for place in range(more))}
