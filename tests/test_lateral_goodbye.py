"""How a lateral link ends: nobody leaves before the other lane knows that it may, whatever is lost with a connection.

Two lanes in one thread, with a virtual clock. The upper one dials for as long as its link is not over, as
`node.lanes.lateral_dialling` does; a lane that is through leaves, and is not there to be dialled.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from thinpipe.node.links.link import Read, Write
from thinpipe.protocol.messages import Goodbye
from thinpipe.protocol.round_session import LIMITS, decode_frame

from .in_memory import Connection
from .test_lateral_links import DEADLINE_S, SILENCE_S, Lane, attached, now, story

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
