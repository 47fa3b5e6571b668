"""Contributions on a disk: what is whole is right, what is not goes on or goes, whatever a crash left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash
from thinpipe.node.lanes.contribution_store import ContributionError, ContributionStore
from thinpipe.protocol.round_transfer import Contribution

CONTENT = bytes(range(250)) * 4
MADE = Contribution(total_bytes=len(CONTENT), xxh3=xxhash.xxh3_64_intdigest(CONTENT))


def size_of(_: int) -> int:
    return len(CONTENT)


def names(store: ContributionStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> ContributionStore:
    return ContributionStore(tmp_path / "not there yet" / "lane-1")


def again(store: ContributionStore) -> tuple[ContributionStore, list[str]]:
    """As the next process finds it."""
    found = ContributionStore(store.directory)
    return found, found.restore()


def test_what_was_written_is_there_after_a_restart(store: ContributionStore) -> None:
    assert store.restore() == []
    for round in (3, 12):
        store.keep(round, store.write(round, CONTENT))
    found, lines = again(store)
    assert found.kept == {3: MADE, 12: MADE}
    assert lines == []
    assert found.load(12) == CONTENT
    assert found.read(3, 10, 5) == CONTENT[10:15]


def test_what_is_needed_by_nobody_goes(store: ContributionStore) -> None:
    for round in range(4):
        store.keep(round, store.write(round, CONTENT))
    dropped = store.unkeep(3)
    store.remove(dropped)
    assert [*store.kept] == [3]
    assert len(names(store)) == 1
    store.remove(dropped)  # twice is no harm


def test_what_follows_from_another_history_goes_and_makes_room(store: ContributionStore) -> None:
    """A lane that had gone by what does not count makes another contribution to the same round."""
    for round, stay in ((0, 0), (1, 0), (2, 7)):
        store.keep(round, store.write(round, CONTENT, stay), stay)
    found = again(store)[0]
    assert found.kept == store.kept
    for each in (store, found):
        assert sorted(each.unkeep_others({0: 0, 1: 5, 2: 7}.get)) == [each.directory / f"1-{MADE.xxh3:016x}"]
        assert [*each.kept] == [0, 2]
        assert each.load(2) == CONTENT
    other = store.write(1, CONTENT[::-1], 5)
    store.keep(1, other, 5)
    assert again(store)[0].kept[1] == other  # the newer one, though the first is still on the disk
    assert len(names(store)) == 3


def test_the_same_again_is_fine_and_another_one_is_not(store: ContributionStore) -> None:
    store.keep(0, store.write(0, CONTENT))
    assert store.write(0, CONTENT) == MADE
    with pytest.raises(ContributionError, match=r"round 0 was made again with other bytes \(checksum [0-9a-f]{16}"):
        store.write(0, CONTENT[:-1] + b"x")
    assert store.load(0) == CONTENT


def test_what_comes_in_parts_is_whole_when_all_bytes_are_right(store: ContributionStore) -> None:
    assert store.lacking(4, size_of) == ((4, 0), None)
    assert store.append(4, MADE, 0, [CONTENT[:100], CONTENT[100:300]]) is False
    assert store.kept == {}
    assert again(store)[0].lacking(4, size_of) == ((4, 300), MADE.xxh3)
    assert store.append(4, MADE, 300, [CONTENT[300:]]) is True
    assert names(store) == [f"4-{MADE.xxh3:016x}"]
    found, _ = again(store)
    assert found.load(4) == CONTENT
    assert found.lacking(4, size_of) == ((5, 0), None)


def test_wrong_bytes_are_dropped(store: ContributionStore) -> None:
    store.append(4, MADE, 0, [CONTENT[:300]])
    assert store.append(4, MADE, 300, [bytes(700)]) is None
    assert names(store) == []


def test_what_a_crash_left_behind_its_acknowledgement_is_written_over(store: ContributionStore) -> None:
    """Bytes after a hole, or longer than what was said to be there: the other side goes on from what it was told."""
    store.append(4, MADE, 0, [CONTENT[:300], b"garbage"])
    assert store.append(4, MADE, 300, [CONTENT[300:]]) is True
    assert store.directory.joinpath(f"4-{MADE.xxh3:016x}").read_bytes() == CONTENT


def test_of_another_round_or_of_too_many_bytes_nothing_goes_on(store: ContributionStore) -> None:
    store.append(3, MADE, 0, [CONTENT[:300]])
    assert store.lacking(4, size_of) == ((4, 0), None)
    assert names(store) == []
    store.append(4, Contribution(total_bytes=2000, xxh3=9), 0, [CONTENT])  # all of them, and never named
    assert store.lacking(4, size_of) == ((4, 0), None)
    assert names(store) == []
    store.append(4, MADE, 0, [CONTENT[:300]])
    store.append(4, Contribution(total_bytes=2000, xxh3=9), 0, [CONTENT[:10]])
    assert store.lacking(4, size_of)[0][0] == 4
    assert len(names(store)) == 1
    store.drop_partial()
    assert names(store) == []


def test_a_hole_is_asked_for_before_what_follows_it(store: ContributionStore) -> None:
    for round in (4, 6):
        store.keep(round, store.write(round, CONTENT))
    assert store.lacking(4, size_of) == ((5, 0), None)
    assert store.append(5, MADE, 0, [CONTENT]) is True
    assert store.append(6, MADE, 0, [CONTENT]) is True  # it comes again, since what follows a round is sent with it
    assert again(store)[0].load(6) == CONTENT


def test_a_damaged_one_is_removed_at_the_start_and_never_used(store: ContributionStore) -> None:
    store.keep(4, store.write(4, CONTENT))
    (path,) = store.directory.iterdir()
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ContributionError, match=r"is damaged; delete it and start this node again with --resume"):
        store.load(4)
    found, lines = again(store)
    assert lines == [f"{path} is damaged and was removed"]
    assert found.kept == {}
    path.write_bytes(CONTENT[:30])
    with pytest.raises(ContributionError, match=r"ends at byte 30, 50 were written"):
        store.read(4, 20, 30)


def test_files_that_are_none_of_its_own_stay(store: ContributionStore) -> None:
    store.write(4, CONTENT)
    for name in ("notes.txt", "4-xyz", ".tmp-9", ".partial-2-00000000000000ff"):
        (store.directory / name).write_text("x")
    found, _ = again(store)
    assert [*found.kept] == [4]
    assert names(found) == [".partial-2-00000000000000ff", f"4-{MADE.xxh3:016x}", "4-xyz", "notes.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    store: ContributionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)  # as any of the calls before it may
        for attempt in (lambda: store.write(4, CONTENT), lambda: store.append(5, MADE, 0, [CONTENT])):
            with pytest.raises(ContributionError) as caught:
                attempt()
            assert str(caught.value).endswith(f"to {store.directory}: No space left on device; make room there")
    found, _ = again(store)
    assert found.kept == {}
    assert found.write(4, CONTENT) == MADE
    found.directory.joinpath(f"4-{MADE.xxh3:016x}").unlink()
    found.keep(4, MADE)
    with pytest.raises(ContributionError, match="cannot be read: No such file"):
        found.load(4)
