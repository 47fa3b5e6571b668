"""Lateral links when processes come and go: who is taken for a lane's node, and what its successor is held to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from thinpipe.node.lanes.contribution_store import ContributionError
from thinpipe.node.lanes.promise_file import PROMISE
from thinpipe.node.lanes.stays import all_stay

from .in_memory import Connection
from .test_lateral_links import Lane, attached, content, joined, story


@pytest.mark.parametrize(
    ("present", "comes", "gives_way"),
    [
        ((1, True), (1, True), False),  # two that wait for the place: the first one stays
        ((1, True), (2, False), True),
        ((1, False), (2, False), True),  # it slept while its lane went on without it
        ((2, False), (2, False), False),
        ((2, False), (1, False), False),
        ((1, False), (1, True), False),
    ],
)
def test_who_has_no_place_in_its_lane_gives_way_to_who_has(
    present: tuple[int, bool], comes: tuple[int, bool], gives_way: bool, tmp_path: Path
) -> None:
    async def job() -> None:
        lower = Lane(0, tmp_path)
        first, second = (
            Lane(1, tmp_path / str(number), generation=generation, joining=joining, incarnation=number)
            for number, (generation, joining) in enumerate((present, comes), start=7)
        )
        connection, other = Connection(None), Connection(None)
        there = attached(first, lower, connection)
        await asyncio.sleep(2)
        another = attached(second, lower, other)
        await asyncio.sleep(1)
        peer = lower[1].session.peer
        assert peer is not None
        assert peer.incarnation == (second if gives_way else first).links._identity.incarnation
        if gives_way:
            assert "its successor came" in str((await there)[1])
        else:
            assert "served by process 7, which answers" in str((await another)[1])
        for each in (connection, other):
            each.break_off()
        await asyncio.gather(there, another)

    story(job())


def test_who_has_taken_its_place_while_it_was_connected_keeps_it(tmp_path: Path) -> None:
    async def job() -> None:
        lower = Lane(0, tmp_path)
        first = Lane(1, tmp_path / "1", generation=1, joining=True, incarnation=7)
        second = Lane(1, tmp_path / "2", generation=2, joining=False, incarnation=8)
        async with joined(first, lower):
            await asyncio.sleep(1)
            first.generation, first.joining = 2, False
            await asyncio.sleep(2)  # it says so in its heartbeats
            _, refusal = await attached(second, lower, Connection(None))
            assert "served by process 7, which answers" in str(refusal)

    story(job())


# -- what an earlier process has promised -----------------------------------------------------------------------------


def test_a_later_process_asks_for_nothing_that_an_earlier_one_has_forgotten(tmp_path: Path) -> None:
    """It finds an old checkpoint, kept for another lane, and its peer has dropped what follows from there."""

    async def job() -> None:
        lanes = [Lane(lane, tmp_path) for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0)
        async with joined(lanes[1], lanes[0]):
            await asyncio.gather(*(lane.train(range(6), keep_from=4) for lane in lanes))
            await asyncio.sleep(1)
        assert min(lanes[0].links._own.kept) == 4
        await lanes[1].links.close()
        later = Lane(1, tmp_path, incarnation=900)
        assert later.links.forgot == 4
        later.links.forget_before(1)
        assert later.links.forgot == 4
        async with joined(later, lanes[0]):
            await lanes[0].give(6)
            assert await later.take(6) == {0: content(0, 6)}

    story(job())


def test_a_promise_is_on_the_disk_before_a_peer_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        taker.links.forget_before(0)
        async with joined(taker, giver):
            await giver.give(0)
            await giver.give(1)
            await taker.take(1)
            monkeypatch.setattr(Path, "replace", no_room)
            taker.links.forget_before(1)
            await asyncio.sleep(1)
            assert giver[1].session.sender.forget_before == 0
            assert sorted(giver.links._own.kept) == [0, 1]
        with pytest.raises(ContributionError, match=r"forgot cannot be written: No space left on device; make room"):
            await taker.links.run()

    story(job())


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("text", ["", "x", "-1", str(2**63)])
def test_a_promise_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    async def job() -> None:
        lane = Lane(0, tmp_path)
        lane.directory.mkdir(exist_ok=True)
        (lane.directory / PROMISE.name).write_text(text)
        with pytest.raises(ContributionError, match=r"forgot says no round from which on .*; delete it"):
            Lane(0, tmp_path)

    story(job())


# -- before it is known which log counts ------------------------------------------------------------------------------


def test_nothing_is_given_or_refused_before_it_is_known_what_counts(tmp_path: Path) -> None:
    """A stage that has just started holds rounds 5 and 6 of whatever history; its peer asks for round 3."""

    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        for round in (5, 6):
            await giver.give(round)
        giver.links.hold_back()
        taker.links.forget_before(3)
        async with joined(taker, giver):
            await asyncio.sleep(5)
            assert giver[1].session.greeted
            assert not taker[0].received.kept
        await giver.links.expect(all_stay(2))
        later = Lane(1, tmp_path / "later", incarnation=900)
        later.links.forget_before(5)
        async with joined(later, giver):
            assert await later.take(5) == {0: content(0, 5)}

    story(job())
