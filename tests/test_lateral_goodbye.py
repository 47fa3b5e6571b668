"""How a lateral link ends: nobody leaves before the other lane knows that it may, whatever is lost with a connection.

Two lanes in one thread, with a virtual clock. The upper one dials for as long as its link is not over, as
`node.lanes.lateral_dialling` does; a lane that is through leaves, and is not there to be dialled.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from thinpipe.node.lanes.chain_statuses import ChainStatuses
from thinpipe.node.links.link import Read, Write
from thinpipe.protocol.lane_status import LaneStatus, StatusExchange
from thinpipe.protocol.membership_log import MembershipLog
from thinpipe.protocol.messages import Goodbye
from thinpipe.protocol.round_session import LIMITS, decode_frame

from .builders import identity
from .in_memory import Connection
from .test_lateral_links import DEADLINE_S, SILENCE_S, Lane, attached, content, joined, now, story

REDIAL_S = 0.5


class Losing(Connection):
    """Breaks right after an end has handed over its n-th goodbye, which is lost. lost: of the upper end, n; said counts
    all that were handed over, over all connections."""

    def __init__(self, lost: list[tuple[bool, int]], said: Counter[bool]) -> None:
        super().__init__(None)
        self._lost, self._said = lost, said

    def end(self, *, upper: bool) -> tuple[Read, Write]:
        read, hand_over = super().end(upper=upper)

        async def write(frame: bytes) -> None:
            await hand_over(frame)
            if isinstance(decode_frame(frame, LIMITS), Goodbye):
                self._said[upper] += 1
                if (upper, self._said[upper]) in self._lost:
                    self.break_off()

        return read, write


async def part(
    directory: Path, lost: list[tuple[bool, int]], later_s: tuple[float, float] = (0.0, 0.0)
) -> list[float | TimeoutError]:
    """By lane: seconds until it was through, or what it said when it gave up. later_s: by lane, when that begins."""
    lanes = [Lane(lane, directory, profile="300mbit,25ms") for lane in (0, 1)]
    lower, upper = lanes
    there = {0, 1}
    said: Counter[bool] = Counter()

    async def dial() -> None:
        while not upper[0].finished:
            if there == {0, 1}:
                await attached(upper, lower, Losing(lost, said))
            await asyncio.sleep(REDIAL_S)

    async def live(lane: Lane) -> float | TimeoutError:
        await asyncio.sleep(later_s[lane.lane])
        began_s = now()
        try:
            await lane.links.finish()
        except TimeoutError as error:
            return error
        finally:
            await lane[1 - lane.lane].until_over()
            there.discard(lane.lane)
        return now() - began_s

    for lane in lanes:
        lane.links.forget_before(0)
    dialling = asyncio.create_task(dial())
    await asyncio.sleep(1)
    ends = await asyncio.gather(*map(live, lanes))
    await dialling
    assert all((upper, number) not in lost or number <= said[upper] for upper, number in lost)
    return ends


WHOSE = pytest.mark.parametrize("upper", [False, True], ids=["of the lower lane", "of the upper lane"])


@WHOSE
@pytest.mark.parametrize(
    "later_s", [(0.0, 0.0), (0.0, 30.0), (30.0, 0.0)], ids=["at once", "lower first", "upper first"]
)
@pytest.mark.parametrize("losses", [1, 3])
def test_a_goodbye_that_is_lost_is_said_again(
    upper: bool, later_s: tuple[float, float], losses: int, tmp_path: Path
) -> None:
    async def job() -> None:
        ends = await part(tmp_path, [(upper, 1 + number) for number in range(losses)], later_s)
        for end, other_s in zip(ends, reversed(later_s), strict=True):
            assert isinstance(end, float)
            assert end < other_s + losses * (REDIAL_S + 1)

    story(job())


@WHOSE
def test_the_very_last_word_is_waited_for_shortly_and_by_name(upper: bool, tmp_path: Path) -> None:
    """Its sender was through first, has heard all that it wanted, and leaves."""

    async def job() -> None:
        later_s = (5.0, 0.0) if upper else (0.0, 5.0)
        ends = await part(tmp_path, [(upper, 2)], later_s)
        leaving, waiting = ends[upper], ends[not upper]
        assert isinstance(leaving, float)
        assert leaving < 6
        words = f"lateral 1: lane 0-1: both lanes are through; waited 18 s to hear that lane {int(upper)} knows that of"
        assert words in str(waiting)
        assert now() < SILENCE_S + 20 < DEADLINE_S

    story(job())


# -- who is waited for ------------------------------------------------------------------------------------------------


def test_a_lane_that_is_on_its_way_back_is_waited_for_by_all_stages_of_the_others(tmp_path: Path) -> None:
    """Its node of this stage is being started again, as is known from a stage where it is there. It needs what this
    node has, which nobody else can give."""

    async def job() -> None:
        leaving, back = Lane(0, tmp_path), Lane(1, tmp_path)
        for lane in (leaving, back):
            lane.links.forget_before(0)
        await leaving.give(0)
        through = asyncio.create_task(leaving.links.finish([0], [1], 3.0))
        await asyncio.sleep(10)
        assert not through.done()
        async with joined(back, leaving):
            assert await back.take(0) == {0: content(0, 0)}
            await asyncio.sleep(2 * DEADLINE_S)
            assert not through.done()
            await asyncio.gather(back.links.finish(), through)

    story(job())


@pytest.mark.parametrize("connected", [False, True])
def test_a_lane_that_does_not_come_back_is_not_waited_for_as_a_member_is(connected: bool, tmp_path: Path) -> None:
    async def job() -> None:
        leaving, gone = Lane(0, tmp_path), Lane(1, tmp_path)
        connection = Connection(None)
        ends = attached(gone, leaving, connection)
        await asyncio.sleep(1)
        if not connected:
            connection.break_off()
            await ends
        through = asyncio.create_task(leaving.links.finish([0], [] if connected else [1], 25.0))
        await asyncio.sleep(1)
        connection.break_off()
        await ends
        began_s = now()
        with pytest.raises(TimeoutError, match="for the end of lane 1, and nothing was heard of it for 25 s"):
            await through
        assert now() - began_s == pytest.approx(25, abs=2)

    story(job())


def test_a_lane_whose_connection_has_just_ended_is_waited_for_too(tmp_path: Path) -> None:
    """As all do when members change, which the last round may have done."""

    async def job() -> None:
        leaving, back = Lane(0, tmp_path), Lane(1, tmp_path)
        for lane in (leaving, back):
            lane.links.forget_before(0)
        await leaving.give(0)
        async with joined(back, leaving):
            await asyncio.sleep(2)
        through = asyncio.create_task(leaving.links.finish([0], [], 25.0))
        await asyncio.sleep(1)
        assert not through.done()
        async with joined(back, leaving):
            assert await back.take(0) == {0: content(0, 0)}
            await asyncio.gather(back.links.finish(), through)

    story(job())


def test_nobody_is_waited_for_who_is_no_member_and_not_there(tmp_path: Path) -> None:
    async def job() -> None:
        await Lane(0, tmp_path, lanes=3).links.finish([0], [], 25.0)
        assert now() == 0

    story(job())


def said_within_a_lane(stages: int, there: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """By stage: the lanes that are there, as it is told upwards. there: by stage, those that it is connected to."""
    log = MembershipLog.begin(3)
    chains = [ChainStatuses(identity(stage, stages, lanes=3), 9, tell=told, refuse=told) for stage in range(stages)]
    said: list[tuple[int, ...]] = []
    for stage in reversed(range(stages)):
        mine = LaneStatus(held=(0, 0, 0), log=log, there=there[stage])
        joined_up = chains[stage].joined(mine)
        said.insert(0, joined_up.there)
        if stage:
            chains[stage - 1].receive("below", StatusExchange(3, 9).say(joined_up))
    return said


def told(*_: object) -> None:
    raise AssertionError


def test_stage_0_learns_which_lanes_are_there_at_any_stage() -> None:
    assert said_within_a_lane(3, [(), (2,), (0, 2)]) == [(0, 2), (0, 2), (0, 2)]
    assert said_within_a_lane(2, [(1,), ()]) == [(1,), ()]
