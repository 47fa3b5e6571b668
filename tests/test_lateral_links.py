"""Lateral links: contributions cross between lanes whole, at the link's rate, whatever breaks; every wait ends.

Most stories have two lanes in one thread with a virtual clock (tests/virtual.py) and the real disk; the last ones are
over real gRPC.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from thinpipe.compress.byte_format import CodecError
from thinpipe.node.lanes.contribution_store import ContributionError
from thinpipe.node.lanes.lateral_link import LateralLink
from thinpipe.node.lanes.lateral_links import LateralLinks
from thinpipe.node.lanes.lateral_settings import Check, LateralSettings
from thinpipe.node.lanes.stays import Stays
from thinpipe.node.links.dialling import NeighbourMismatch
from thinpipe.node.links.outgoing import Write, part_bytes_for
from thinpipe.node.links.transport import listening, serving, tell
from thinpipe.node.security.key_directory import init, issue, load
from thinpipe.node.security.policy import PLAIN, Security
from thinpipe.protocol.control_messages import Heartbeat
from thinpipe.protocol.errors import Fault, LocalProtocolError, ProtocolError, RefusedError, RemoteProtocolError
from thinpipe.protocol.membership_log import MembershipLog
from thinpipe.protocol.messages import encode_frame
from thinpipe.protocol.round_messages import RoundPart
from thinpipe.protocol.round_session import LIMITS, decode_frame
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.links.proxy import Proxy
from thinpipe.sim.links.shaper import LinkProfile

from .builders import identity
from .in_memory import Connection
from .lateral_process import received_by_all
from .links import make_link
from .virtual import JumpingClock

ROOT = Path(__file__).resolve().parent.parent
STAGE, STAGES = 1, 3
ROUND_BYTES = 600_000
DEADLINE_S, SILENCE_S = 60.0, 8.0


def content(lane: int, round: int, size: int = ROUND_BYTES) -> bytes:
    return bytes([(31 * lane + round) % 251]) * (size - 1) + b"."


class Lane:
    """The node of the same stage in one lane, and what it complained about."""

    def __init__(
        self,
        lane: int,
        directory: Path,
        *,
        lanes: int = 2,
        profile: str = "none",
        addresses: dict[int, str] | None = None,
        incarnation: int | None = None,
        security: Security = PLAIN,
        size: int = ROUND_BYTES,
        check: Check = lambda *_: None,
        generation: int = 0,
        joining: bool = False,
        grouped: bool = False,
        **other: Any,
    ) -> None:
        self.lane, self.size = lane, size
        self.generation, self.joining = generation, joining  # of its lane; whether it has yet to take its place there
        self.directory = directory / f"node-{lane}"
        self.faults: list[str] = []
        self.completed = 0
        self.others: dict[str, int] = {}
        settings = LateralSettings(
            contribution_bytes=lambda _: size,
            check=check,
            profile=LinkProfile.parse(profile),
            silence_s=SILENCE_S,
            greeting_timeout_s=5.0,
            deadline_s=DEADLINE_S,
            heartbeat=lambda: Heartbeat(generation=self.generation, completed_steps=self.completed, **self.others),
            joining=lambda: self.joining,
            generation=lambda: self.generation if grouped else None,
        )
        self.links = LateralLinks(
            identity=identity(
                STAGE, STAGES, lane=lane, lanes=lanes, incarnation=incarnation or 500 + lane, **{"run_id": "r", **other}
            ),
            addresses=addresses if addresses is not None else dict.fromkeys(range(lane), "127.0.0.1:1"),
            directory=self.directory,
            settings=settings,
            report=lambda code, line: self.faults.append(f"{code}: {line}"),
            security=security,
        )

    def __getitem__(self, lane: int) -> LateralLink:
        """The link to that lane."""
        return self.links._links[lane]

    async def take(self, round: int) -> dict[int, bytes]:
        return await self.links.contributions(round)

    async def give(self, round: int) -> None:
        await self.links.publish(round, content(self.lane, round, self.size))

    async def train(self, rounds: range, *, keep_from: int | None = None) -> None:
        """Give and take, round by round; then a checkpoint, after which all but the last rounds is forgotten."""
        for round in rounds:
            await self.give(round)
            others = await self.take(round)
            assert others == {lane: content(lane, round, self.size) for lane in others}
            assert list(others) == sorted(others)
            self.completed = round + 1
        if keep_from is not None:
            self.links.forget_before(keep_from)


def attached(upper: Lane, lower: Lane, connection: Connection) -> asyncio.Future[list[Any]]:
    """One connection between two lanes, until it ends at both; what ended it, at the upper end and at the lower one."""

    async def end(job: Awaitable[None], write: Write) -> BaseException | None:
        try:
            await job
        except (ProtocolError, ConnectionError, ContributionError) as error:
            if isinstance(error, ConnectionError):
                connection.break_off()
            if isinstance(error, RemoteProtocolError):
                await tell(write, error)
            return error
        finally:
            connection.hang_up()
        return None

    (read, write), (hear, say) = (connection.end(upper=each) for each in (True, False))
    return asyncio.gather(
        end(upper[lower.lane].attach(read, write, speaks_first=True), write),
        end(lower.links.server.serve(hear, say), say),
    )


@asynccontextmanager
async def joined(upper: Lane, lower: Lane) -> AsyncIterator[Connection]:
    """The same while the body runs; then it is cut."""
    connection = Connection(None)
    ends = attached(upper, lower, connection)
    try:
        yield connection
    finally:
        connection.break_off()
        await ends


def story(job: Coroutine[Any, Any, None], *, hurry: bool = False) -> None:
    """In virtual time: within an hour of it."""

    async def bounded() -> None:
        async with asyncio.timeout(3600):
            await job

    with asyncio.Runner(loop_factory=lambda: JumpingClock(hurry=hurry)) as runner:
        runner.run(bounded())


def now() -> float:
    return asyncio.get_running_loop().time()


# -- what crosses, and how fast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["80mbit,50ms", "300mbit,25ms", "300mbit,100ms", "2mbit,5ms"])
def test_contributions_cross_both_ways_at_the_link_s_rate(profile: str, tmp_path: Path) -> None:
    link = LinkProfile.parse(profile)
    rate = link.rate_bits_per_s
    assert rate
    size = int(rate / 8 * 0.25)

    async def job() -> None:
        lanes = [Lane(lane, tmp_path, profile=profile, size=size) for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0)
        async with joined(lanes[1], lanes[0]):
            began_s = now()
            await asyncio.gather(*(lane.train(range(3)) for lane in lanes))
            waiting_s = 7 * link.latency_s + 4 * link.serialisation_s(part_bytes_for(link))
            burst_s = link.serialisation_s(link.burst_bytes)
            assert 0.75 - burst_s <= now() - began_s <= 0.75 * 1.02 + waiting_s
            for lane, other in (lanes, lanes[::-1]):
                await lane[other.lane].outgoing.until_sent()
            await asyncio.sleep(0.01)  # it is read
            assert all(lane[other.lane].outgoing.idle for lane, other in (lanes, lanes[::-1]))
            for lane, other in (lanes, lanes[::-1]):
                figures, theirs = lane.links.figures(), other.links.figures()
                assert sum(figures.sent_bytes.values()) == lane[other.lane].outgoing.shaper.passed_bytes
                assert figures.sent_bytes == theirs.received_bytes
                assert 3 * size <= figures.sent_bytes["averaging"] <= 3 * size * 1.01
                assert figures.sent_bytes["control"] < 0.01 * 3 * size
                assert figures.rate_bits_per_s[other.lane] == pytest.approx(rate, rel=0.02)
                assert 0.6 < figures.waited_s < 1.5
            await asyncio.gather(*(lane.links.finish() for lane in lanes))

    story(job(), hurry=True)


def test_where_the_kernel_caps_the_interface_nothing_is_shaped(tmp_path: Path) -> None:
    async def job() -> None:
        lanes = [Lane(lane, tmp_path, profile="2mbit,50ms,kernel=all") for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0)
        async with joined(lanes[1], lanes[0]):
            await asyncio.gather(*(lane.train(range(3)) for lane in lanes))
        assert now() == 0  # 7 s at the rate that the kernel would see to
        for lane in lanes:
            assert sum(lane.links.figures().sent_bytes.values()) > 3 * ROUND_BYTES

    story(job(), hurry=True)


def test_a_cut_costs_no_more_than_what_was_under_way(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path, profile="80mbit,25ms", size=8_000_000) for lane in (0, 1))
        taker.links.forget_before(0)
        await giver.give(0)
        for _ in range(4):
            async with joined(taker, giver):
                await asyncio.sleep(0.15)
        async with joined(taker, giver):
            assert (await taker.take(0))[0] == content(0, 0, 8_000_000)
        window = giver[1].session.sender._window_bytes
        sent = giver.links.figures().sent_bytes["averaging"]
        assert 8_000_000 < sent < 8_000_000 * 1.01 + 4 * window
        assert giver[1].outgoing.shaper.passed_bytes >= sum(giver.links.figures().sent_bytes.values())

    story(job())


@pytest.mark.parametrize("who", [0, 1], ids=["who sends", "who receives"])
def test_who_is_restarted_goes_on_where_its_disk_says(who: int, tmp_path: Path) -> None:
    async def job() -> None:
        lanes = [Lane(lane, tmp_path, profile="80mbit,25ms", size=3_000_000) for lane in (0, 1)]
        lanes[1].links.forget_before(0)
        await lanes[0].give(0)
        async with joined(lanes[1], lanes[0]):
            await asyncio.sleep(0.2)
        old = lanes[who]
        await old.links.close()
        lanes[who] = Lane(who, tmp_path, profile="80mbit,25ms", size=3_000_000, incarnation=900)
        lanes[1].links.forget_before(0)
        if who == 0:
            assert lanes[0].links._own.kept == old.links._own.kept
        before = lanes[0].links.figures().sent_bytes.get("averaging", 0)
        async with joined(lanes[1], lanes[0]):
            assert (await lanes[1].take(0))[0] == content(0, 0, 3_000_000)
        assert lanes[0].links.figures().sent_bytes["averaging"] - before < 0.75 * 3_000_000

    story(job(), hurry=True)


def test_a_lane_that_was_set_back_makes_and_takes_the_same_again(tmp_path: Path) -> None:
    """It has lost its disk, too; what it has is a checkpoint after round 1."""

    async def job() -> None:
        lanes = [Lane(lane, tmp_path) for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0)
        async with joined(lanes[1], lanes[0]):
            await asyncio.gather(*(lane.train(range(4)) for lane in lanes))
            assert all(received_by_all(lane.links, 3) for lane in lanes)
            assert not received_by_all(lanes[0].links, 4)
            for lane in lanes:
                lane.links.forget_before(2)
            await asyncio.sleep(1)
            assert sorted(lanes[0].links._own.kept) == sorted(lanes[0][1].received.kept) == [2, 3]
        await lanes[1].links.close()
        back = Lane(1, tmp_path / "another machine", incarnation=901)
        back.links.forget_before(2)
        async with joined(back, lanes[0]):
            await asyncio.gather(back.train(range(2, 6)), lanes[0].train(range(4, 6)))
            await asyncio.gather(back.links.finish(), lanes[0].links.finish())
        assert [*back.faults, *lanes[0].faults] == []

    story(job())


def test_own_contributions_stay_until_the_last_peer_has_forgotten_them(tmp_path: Path) -> None:
    async def job() -> None:
        zero, one, two = (Lane(lane, tmp_path, lanes=3) for lane in range(3))
        for lane in (zero, one, two):
            lane.links.forget_before(0)
        async with joined(one, zero), joined(two, zero), joined(two, one):
            await asyncio.gather(*(lane.train(range(3)) for lane in (zero, one, two)))
            one.links.forget_before(3)
            await asyncio.sleep(1)
            assert sorted(zero.links._own.kept) == [0, 1, 2]
            two.links.forget_before(2)
            await asyncio.sleep(1)
            assert sorted(zero.links._own.kept) == [2]
            assert [path.name.partition("-")[0] for path in (zero.directory / "own").iterdir()] == ["2"]
            assert sorted(path.name for path in (one.directory / "lane-0").iterdir()) == []

    story(job())


def test_a_peer_does_not_fill_the_disk_with_rounds_to_come(tmp_path: Path) -> None:
    async def job() -> None:
        fast, slow = (Lane(lane, tmp_path) for lane in (0, 1))
        slow.links.forget_before(0)
        for round in range(12):
            await fast.give(round)
        async with joined(slow, fast):
            await asyncio.sleep(30)
            assert sorted(slow[0].received.kept) == [0, 1, 2, 3]
            await slow.take(7)
            await asyncio.sleep(30)
            assert sorted(slow[0].received.kept) == [*range(12)]

    story(job())


def test_who_needs_nothing_more_waits_for_who_does(tmp_path: Path) -> None:
    async def job() -> None:
        lanes = [Lane(lane, tmp_path) for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0)
        async with joined(lanes[1], lanes[0]):
            await asyncio.gather(*(lane.train(range(2)) for lane in lanes))
            through = asyncio.create_task(lanes[0].links.finish())
            await asyncio.sleep(10 * DEADLINE_S)  # the other one lives, so there is no deadline
            assert not through.done()
        await lanes[1].links.close()
        late = Lane(1, tmp_path / "anew", incarnation=902)
        late.links.forget_before(0)
        connection = Connection(None)
        ends = attached(late, lanes[0], connection)
        await late.train(range(2))
        await asyncio.gather(late.links.finish(), through)
        assert await ends == [None, None]

    story(job())


# -- waits ------------------------------------------------------------------------------------------------------------


def test_who_waits_for_a_lane_that_is_not_there_says_so(tmp_path: Path) -> None:
    async def job() -> None:
        lane = Lane(0, tmp_path)
        lane.links.forget_before(0)
        words = (
            r"stage 1: waited 60 s for lane 1's contribution to round 7, and nothing was heard of it for 60 s "
            r"\(there was no connection\); is stage 1 of lane 1 running\?"
        )
        with pytest.raises(TimeoutError, match=words):
            await lane.take(7)
        assert lane.links.figures().waited_s == pytest.approx(60)

    story(job())


def test_a_lane_that_lives_is_waited_for_and_one_that_falls_silent_is_not(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        taker.links.forget_before(0)
        connection, muted = Connection(None), asyncio.Event()
        hear, end = connection._up.get, connection.end

        async def hear_or_not() -> bytes | None:
            frame = await hear()
            if muted.is_set():
                await asyncio.Event().wait()
            return frame

        connection.end = lambda upper: (hear_or_not, end(upper=True)[1]) if upper else end(upper=False)
        ends = attached(taker, giver, connection)
        waiting = asyncio.create_task(taker.take(0))
        await asyncio.sleep(20 * DEADLINE_S)
        giver.completed = 7
        await asyncio.sleep(2)
        assert taker[0].peer.heartbeat == Heartbeat(generation=0, completed_steps=7)
        await giver.give(0)
        await waiting
        waiting = asyncio.create_task(taker.take(1))
        muted.set()
        began_s = now()
        upper, _ = await ends
        assert str(upper) == "lateral 1: lane 0-1: nothing was heard for 8.0 s"
        assert now() - began_s == pytest.approx(SILENCE_S, abs=1.5)
        with pytest.raises(TimeoutError, match=r"heard of it for 60 s \(lateral 1: lane 0-1: nothing was heard for 8"):
            await waiting
        assert now() - began_s == pytest.approx(DEADLINE_S, abs=1.5)

    story(job())


def test_a_lane_that_has_ended_early_is_not_waited_for_however_long_it_lives(tmp_path: Path) -> None:
    async def job() -> None:
        early, late = (Lane(lane, tmp_path) for lane in (0, 1))
        for lane in (early, late):
            lane.links.forget_before(0)
        async with joined(late, early):
            await early.give(0)
            ending = asyncio.create_task(early.links.finish())
            await asyncio.sleep(2 * DEADLINE_S)
            assert (await late.take(0))[0] == content(0, 0)
            words = (
                r"lane 0's contribution to round 1, but that lane has ended after \d+ steps, and nothing came .* 8 s"
            )
            began_s = now()
            with pytest.raises(TimeoutError, match=words):
                await late.take(1)
            assert now() - began_s == pytest.approx(SILENCE_S, abs=1.5)
        with pytest.raises(TimeoutError, match="for the end of lane 1, and nothing was heard of it for 60 s"):
            await ending

    story(job())


def test_people_learn_who_is_waited_for(tmp_path: Path) -> None:
    async def job() -> None:
        lower, upper = (Lane(lane, tmp_path) for lane in (0, 1))
        upper.links.forget_before(0)
        assert upper.links.waits_for() == ""
        waiting = asyncio.create_task(upper.take(0))
        await asyncio.sleep(0)
        assert upper.links.waits_for() == "lane 0 is not connected (it was not there yet)"
        lower.others = {"preparing": 1}
        async with joined(upper, lower):
            await asyncio.sleep(0.5)
            assert upper.links.waits_for() == "lane 0: its stage 0 prepares its data"
            lower.others = {"missing": 3}
            await asyncio.sleep(1)
            assert upper.links.waits_for() == "lane 0: its stage 2 is missing"
            lower.others, lower.completed = {}, 9
            await asyncio.sleep(1)
            assert upper.links.waits_for() == "lane 0 has completed 9 steps"
            await lower.give(0)
            await waiting
            assert upper.links.waits_for() == ""

    story(job())


def test_a_peer_that_takes_nothing_is_given_up(tmp_path: Path) -> None:
    """It says that it lives, and reads nothing."""

    async def job() -> None:
        lower, upper = (Lane(lane, tmp_path) for lane in (0, 1))
        beats = [lower[1].session.greeting(Heartbeat(generation=0, completed_steps=0))]

        async def read() -> bytes:
            if not beats:
                await asyncio.sleep(1)
            return beats.pop() if beats else encode_frame(Heartbeat(generation=0, completed_steps=0))

        async def write(_: bytes) -> None:
            await asyncio.Event().wait()

        with pytest.raises(ConnectionError, match="64 frames wait for a peer that takes none"):
            await upper[0].attach(read, write, speaks_first=True)
        assert now() == pytest.approx(65, abs=3)

    story(job())


def test_a_node_that_leaves_serves_nobody_more(tmp_path: Path) -> None:
    async def job() -> None:
        lower, upper = (Lane(lane, tmp_path) for lane in (0, 1))
        connection = Connection(None)
        ends = attached(upper, lower, connection)
        await asyncio.sleep(1)
        await lower.links.close()
        assert [str(error) for error in await ends][1] == "this node leaves"
        assert "this node leaves" in str((await attached(upper, lower, Connection(None)))[1])

    story(job())


def test_a_peer_that_says_nothing_takes_nobody_s_place(tmp_path: Path) -> None:
    async def job() -> None:
        lane = Lane(0, tmp_path)
        with pytest.raises(RemoteProtocolError, match="no greeting within 5 s"):
            await lane.links.server.serve(*Connection(None).end(upper=False))

    story(job())


# -- what must not be -------------------------------------------------------------------------------------------------


def test_what_a_node_must_not_do_is_refused_at_once(tmp_path: Path) -> None:
    async def job() -> None:
        lane = Lane(0, tmp_path)
        with pytest.raises(LocalProtocolError, match="3 bytes to round 2, which has 600000"):
            lane.links.publish(2, b"abc")
        with pytest.raises(LocalProtocolError, match="round 0 is not asked for: forget_before was not called"):
            await lane.take(0)
        lane.links.forget_before(3)
        with pytest.raises(LocalProtocolError, match="round 2 is not asked for: before 3"):
            await lane.take(2)
        with pytest.raises(ValueError, match="lane 1 of 2 dials all lower ones, addresses are of none"):
            Lane(1, tmp_path, addresses={})

    story(job())


def test_a_contribution_that_is_made_again_is_the_same(tmp_path: Path) -> None:
    async def job() -> None:
        lane = Lane(0, tmp_path)
        running = asyncio.create_task(lane.links.run())
        await lane.give(0)
        await lane.give(0)
        with pytest.raises(ContributionError, match="round 0 was made again with other bytes"):
            await lane.links.publish(0, content(5, 5))
        with pytest.raises(ContributionError, match="start all lanes again from one checkpoint"):
            await running
        lane.links.forget_before(0)
        with pytest.raises(ContributionError):
            await lane.take(0)

    story(job())


def test_who_sends_what_its_disk_has_damaged_ends_by_name(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        taker.links.forget_before(0)
        await giver.give(0)
        (path,) = (giver.directory / "own").iterdir()
        right = path.read_bytes()
        path.write_bytes(bytes(ROUND_BYTES))
        waiting = asyncio.create_task(taker.take(0))
        upper, lower = await attached(taker, giver, Connection(None))
        assert isinstance(upper, RemoteProtocolError)
        assert upper.reason == "the contribution to round 0 does not have its checksum; it is asked for again"
        assert isinstance(lower, ContributionError)
        assert "is damaged; delete it and start this node again" in str(lower)
        path.write_bytes(right)
        async with joined(taker, Lane(0, tmp_path, incarnation=900)):
            assert (await waiting)[0] == content(0, 0)

    story(job())


def sound(round: int, lane: int, body: bytes) -> None:
    if body != content(lane, round, len(body)):
        raise CodecError(f"lane {lane}'s contribution to round {round} is nonsense")


def without_lane_0(from_round: int) -> Stays:
    log = MembershipLog.begin(2)
    for _ in range(from_round):
        log = log.then((0, 1))
    return Stays(log.then((1,)), 2, (), lambda round: round)


async def gives_nonsense(giver: Lane, taker: Lane, round: int) -> list[str]:
    """What the taker says of it, each time, until it asks no more."""
    giver.links.publish(round, content(9, 9))
    said = []
    for _ in range(3):
        upper, lower = await attached(taker, giver, Connection(None))
        assert isinstance(upper, RemoteProtocolError)
        assert isinstance(lower, RefusedError)
        assert upper.fault is lower.fault is Fault.PAYLOAD
        assert lower.reason == upper.reason
        said.append(upper.reason)
    sent = giver.links.figures().sent_bytes["averaging"]
    async with joined(taker, giver):
        await asyncio.sleep(2 * DEADLINE_S)
        assert giver.links.figures().sent_bytes["averaging"] == sent
        assert taker.links.held()[giver.lane] == round
    return said


def test_nonsense_is_never_held_and_its_lane_can_be_left_out(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = Lane(0, tmp_path), Lane(1, tmp_path, check=sound)
        for lane in (giver, taker):
            lane.links.forget_before(0)
        async with joined(taker, giver):
            await asyncio.gather(giver.train(range(2)), taker.train(range(2)))
        why = "lane 0's contribution to round 2 is nonsense"
        again = f"{why}; it is asked for again"
        last = f"{why}; this was refused 3 times, and the round goes on without this lane"
        assert await gives_nonsense(giver, taker, 2) == [again, again, last]
        assert taker[0].peer.state == why
        await taker.links.expect(without_lane_0(2))
        assert taker[0].peer.state.startswith("lane 0 is not connected")
        assert await taker.links.contributions(2, (1,)) == {}

    story(job())


def test_who_needs_a_contribution_that_it_has_given_up_ends_by_name(tmp_path: Path) -> None:
    """The other lanes hold it, by what they have decided: this one cannot go on with them."""

    async def job() -> None:
        giver, taker = Lane(0, tmp_path), Lane(1, tmp_path, check=sound)
        for lane in (giver, taker):
            lane.links.forget_before(0)
        waiting = asyncio.create_task(taker.take(0))
        await gives_nonsense(giver, taker, 0)
        with pytest.raises(ContributionError, match=r"lateral 1: .* is nonsense \(3 times\), and other lanes count it"):
            await waiting

    story(job())


def test_a_new_process_is_asked_for_what_was_given_up(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = Lane(0, tmp_path), Lane(1, tmp_path, check=sound)
        for lane in (giver, taker):
            lane.links.forget_before(0)
        await gives_nonsense(giver, taker, 0)
        await giver.links.close()
        back = Lane(0, tmp_path / "mended", incarnation=900)
        await back.give(0)
        async with joined(taker, back):
            await asyncio.sleep(1)
            assert taker.links.held()[0] == 1
            assert (await taker.take(0))[0] == content(0, 0)

    story(job())


@pytest.mark.parametrize("right", [False, True], ids=["and is wrong", "and is right"])
def test_who_is_refused_looks_at_its_own_contribution(right: bool, tmp_path: Path) -> None:
    looked: list[int] = []

    def check(round: int, lane: int, body: bytes) -> None:
        looked.append(lane)
        sound(round, lane, body)

    def refuse(*_: object) -> None:
        raise CodecError("not with me")

    async def job() -> None:
        giver, taker = Lane(0, tmp_path, check=check), Lane(1, tmp_path, check=refuse)
        taker.links.forget_before(0)
        await giver.links.publish(0, content(0, 0) if right else content(9, 9))
        _, lower = await attached(taker, giver, Connection(None))
        if right:
            assert isinstance(lower, RefusedError)
            await attached(taker, giver, Connection(None))
            await giver.give(1)  # it goes on, and has looked once
        else:
            assert isinstance(lower, ContributionError)
            assert str(lower).startswith(
                "lateral 1: lane 0-1: what this node wrote is refused by lane 1, and here: lane 0's contribution to "
                "round 0 is nonsense; look at its memory"
            )
        assert looked == [0]

    story(job())


def test_one_of_another_size_is_given_up_as_well(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = Lane(0, tmp_path, size=ROUND_BYTES + 1), Lane(1, tmp_path)
        taker.links.forget_before(0)
        await giver.give(0)
        for _ in range(3):
            upper, _ = await attached(taker, giver, Connection(None))
            assert isinstance(upper, RemoteProtocolError)
            assert upper.fault is Fault.OVERSIZED
        async with joined(taker, giver):
            with pytest.raises(ContributionError, match="a contribution of 600001 bytes to round 0, which has 600000"):
                await taker.take(0)

    story(job())


def test_one_that_changes_while_it_is_on_its_way_begins_again(tmp_path: Path) -> None:
    """Its sender lost its disk, and makes other bytes of it: a bug, and not one to hide in a mixture of both."""

    async def job() -> None:
        profile = {"profile": "80mbit,25ms", "size": 3_000_000}
        giver, taker = (Lane(lane, tmp_path, **profile) for lane in (0, 1))
        taker.links.forget_before(0)
        await giver.give(0)
        async with joined(taker, giver):
            await asyncio.sleep(0.2)
        other = Lane(0, tmp_path / "anew", **profile)
        await other.links.publish(0, content(7, 7, 3_000_000))
        upper, _ = await attached(taker, other, Connection(None))
        assert "has changed at byte" in str(upper)
        async with joined(taker, other):
            assert (await taker.take(0))[0] == content(7, 7, 3_000_000)

    story(job())


def test_a_round_that_nobody_can_make_again_ends_both_by_name(tmp_path: Path) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        await giver.give(5)
        taker.links.forget_before(3)
        upper, lower = await attached(taker, giver, Connection(None))
        assert isinstance(upper, RefusedError)
        assert upper.fault is lower.fault is Fault.RESUME
        assert "round 3 is asked for, of which nothing is kept any more; 5 is the newest" in str(lower)

    story(job())


def test_a_full_disk_ends_the_node_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        giver, taker = (Lane(lane, tmp_path) for lane in (0, 1))
        taker.links.forget_before(0)
        await giver.give(0)
        monkeypatch.setattr(Path, "rename", full)
        upper, _ = await attached(taker, giver, Connection(None))
        assert isinstance(upper, ContributionError)
        assert str(upper).startswith("lateral 1: lane 0-1: the contribution to round 0 cannot be written to ")
        assert str(upper).endswith("No space left on device; make room there")
        with pytest.raises(ContributionError, match="cannot be written"):
            await giver.give(1)

    story(job())


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_same_process_takes_its_own_place_and_another_one_does_not(tmp_path: Path) -> None:
    async def job() -> None:
        lower = Lane(0, tmp_path)
        upper, other = Lane(1, tmp_path), Lane(1, tmp_path / "other", incarnation=77)
        upper.links.forget_before(0)
        first = attached(upper, lower, Connection(None))
        await asyncio.sleep(1)
        stranger, refusal = await attached(other, lower, Connection(None))
        assert "served by process 1f5, which answers" in str(refusal)
        assert stranger is None or isinstance(stranger, ConnectionError | ProtocolError)
        again = Lane(1, tmp_path / "again")  # its first connection is half-dead, as it would be here
        connection = Connection(None)
        second = attached(again, lower, connection)
        assert "the same process opened another connection" in str((await first)[1])
        again.links.forget_before(0)
        await lower.give(0)
        await again.take(0)
        connection.break_off()
        await second

    story(job())


# -- at random --------------------------------------------------------------------------------------------------------


def test_lanes_of_a_group_begin_anew_together(tmp_path: Path) -> None:
    """What was given and promised in the last generation is void at both ends, and nobody gives anything to who is
    still in it."""

    async def job() -> None:
        lanes = [Lane(lane, tmp_path, size=1000, grouped=True) for lane in (0, 1)]
        for lane in lanes:
            lane.links.forget_before(0, lasting=False)
        async with joined(lanes[1], lanes[0]):
            await asyncio.gather(*(lane.train(range(3)) for lane in lanes))
            for lane in lanes:
                lane.links.forget_before(3, lasting=False)
            assert [lane.links.forgot for lane in lanes] == [3, 3]
            lanes[0].generation = 1
            await lanes[0].links.begin_anew()
        assert lanes[0].links.held() == (0, 0)
        ends = await attached(lanes[1], lanes[0], Connection(None))
        assert {end.fault for end in ends if isinstance(end, ProtocolError)} == {Fault.GENERATION}
        lanes[1].generation = 1
        await lanes[1].links.begin_anew()
        for lane in lanes:
            lane.links.has_made(1)
            lane.links.forget_before(1, lasting=False)
        async with joined(lanes[1], lanes[0]):
            for lane in lanes:  # as if it had come out in other bits
                await lane.links.publish(1, bytes([lane.lane]) * 1000)
            assert await lanes[0].take(1) == {1: bytes([1]) * 1000}
            assert await lanes[1].take(1) == {0: bytes([0]) * 1000}
            await asyncio.gather(*(lane.links.finish() for lane in lanes))

    story(job())
    assert not list(tmp_path.glob("**/forgot"))  # of what no later process is held to


async def _adversary(chance: random.Random, lives: list[Life], over: asyncio.Event) -> None:
    """Cuts connections, and kills processes, at any moment."""
    while not over.is_set():
        await asyncio.sleep(chance.expovariate(4))
        if chance.random() < 0.6:
            lives[0].cut()
        else:
            chance.choice(lives).kill()


class Life:
    """A lane through all of its processes: each trains from the last checkpoint on."""

    def __init__(self, number: int, directory: Path, chance: random.Random) -> None:
        self.number, self.directory, self.chance = number, directory, chance
        self.checkpoint, self.deaths = 0, 0
        self.taken: dict[int, dict[int, bytes]] = {}
        self.connection: Connection | None = None
        self.lane: Lane | None = None
        self.process: asyncio.Task[None] | None = None

    def cut(self) -> None:
        if self.connection:
            self.connection.break_off()

    def kill(self) -> None:
        self.deaths += 1
        if self.process:
            self.process.cancel()

    async def live(self, rounds: int) -> None:
        while True:
            number = 500 + self.number + 10 * self.deaths
            options = {"profile": "80mbit,25ms", "size": 900_000, "incarnation": number}
            self.lane = Lane(self.number, self.directory, **options)
            self.process = asyncio.create_task(self._train(self.lane, rounds))
            try:
                return await self.process
            except asyncio.CancelledError:
                self.cut()
                await self.lane.links.close()
                self.lane = None
                await asyncio.sleep(self.chance.random())

    async def _train(self, lane: Lane, rounds: int) -> None:
        lane.links.forget_before(self.checkpoint)
        for round in range(self.checkpoint, rounds):
            await asyncio.sleep(self.chance.random() / 5)
            await lane.give(round)
            others = await lane.take(round)
            assert self.taken.setdefault(round, others) == others
            if self.chance.random() < 0.5 and received_by_all(lane.links, round):
                self.checkpoint = round + 1
                lane.links.forget_before(self.checkpoint)
        await lane.links.finish()


@pytest.mark.parametrize("seed", range(8))
def test_lanes_that_are_cut_and_killed_at_random_get_all_the_same(seed: int, tmp_path: Path) -> None:
    async def job() -> None:
        chance, over, rounds = random.Random(seed), asyncio.Event(), 8
        lives = [Life(lane, tmp_path, chance) for lane in (0, 1)]
        lower, upper = lives

        async def keep_connected() -> None:
            while not over.is_set():
                if upper.lane and lower.lane:
                    lower.connection = upper.connection = Connection(None)
                    for error in await attached(upper.lane, lower.lane, lower.connection):
                        assert error is None or isinstance(error, ConnectionError), error
                await asyncio.sleep(0.1)

        connecting, breaking = (
            asyncio.create_task(keep_connected()),
            asyncio.create_task(_adversary(chance, lives, over)),
        )
        await asyncio.gather(*(life.live(rounds) for life in lives))
        over.set()
        lower.cut()
        await asyncio.gather(connecting, breaking)
        for life in lives:
            other = 1 - life.number
            assert life.taken == {round: {other: content(other, round, 900_000)} for round in range(rounds)}
        assert lower.deaths + upper.deaths > 0

    story(job())


# -- over gRPC --------------------------------------------------------------------------------------------------------


def run(job: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await job

    asyncio.run(bounded())


@asynccontextmanager
async def running(*lanes: Lane) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(lane.links.run()) for lane in lanes]
    try:
        yield tasks
    finally:
        for lane in lanes:
            await lane.links.close()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def listening_lane(lane: Lane, security: Security = PLAIN) -> AsyncIterator[str]:
    async with serving("127.0.0.1:0", {"Rounds": lane.links.server.handler}, security, more_streams=1) as port:
        yield f"127.0.0.1:{port}"


def test_three_lanes_over_grpc(tmp_path: Path) -> None:
    async def job() -> None:
        lanes: list[Lane] = []
        addresses: dict[int, str] = {}
        async with AsyncExitStack() as stack:
            for number in range(3):
                lane = Lane(number, tmp_path, lanes=3, profile="300mbit,5ms", addresses=dict(addresses))
                lane.links.forget_before(0)
                addresses[number] = await stack.enter_async_context(listening_lane(lane))
                lanes.append(lane)
            tasks = await stack.enter_async_context(running(*lanes))
            await asyncio.gather(*(lane.train(range(4), keep_from=3) for lane in lanes))
            await asyncio.gather(*(lane.links.finish() for lane in lanes))
            await asyncio.gather(*tasks)
        for lane in lanes:
            assert lane.faults == []
            for other in lanes:
                if other is not lane:
                    sent, got = lane[other.lane].outgoing, other[lane.lane].received_bytes
                    assert sum(sent.sent.values()) == sent.shaper.passed_bytes
                    assert sent.sent["averaging"] == got["averaging"] > 4 * ROUND_BYTES

    run(job())


def test_a_connection_that_is_cut_in_the_middle_of_a_contribution(tmp_path: Path) -> None:
    async def job() -> None:
        size, profile = 6_000_000, "300mbit,5ms"
        giver = Lane(0, tmp_path, profile=profile, size=size)
        async with listening_lane(giver) as address:
            with Proxy(address, port=free_ports(1)[0]) as proxy:
                taker = Lane(1, tmp_path, profile=profile, size=size, addresses={0: proxy.address})
                taker.links.forget_before(0)
                async with running(giver, taker):
                    await giver.give(0)
                    waiting = asyncio.create_task(taker.take(0))
                    for cut in range(1, 3):
                        while len(partial(taker)) < cut * size // 4:  # noqa: ASYNC110 (what it looks at is on the disk)
                            await asyncio.sleep(0.005)
                        await asyncio.to_thread(proxy.cut)
                    assert (await waiting)[0] == content(0, 0, size)
                    assert proxy.connections >= 3
        assert any("connection-lost" in fault for fault in taker.faults)
        assert giver.links.figures().sent_bytes["averaging"] < size + 2 * giver[1].session.sender._window_bytes

    run(job())


def partial(lane: Lane) -> bytes:
    paths = [*(lane.directory / "lane-0").glob(".partial-*"), *(lane.directory / "lane-0").glob("0-*")]
    return paths[0].read_bytes() if paths else b""


def test_a_node_without_lanes_refuses_by_name(tmp_path: Path) -> None:
    async def job() -> None:
        faults: list[str] = []
        at = listening("127.0.0.1:0", make_link(1), greeting_timeout_s=5, report=lambda *said: faults.append(said[1]))
        async with at as port:
            upper = Lane(1, tmp_path, addresses={0: f"127.0.0.1:{port}"})
            async with running(upper) as (task,):
                with pytest.raises(NeighbourMismatch, match=r"refused by .*: wrong-lane: this node has no lan"):
                    await task
        assert "refused the peer" in faults[0]

    run(job())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"run_id": "q"}, "run-id: run id: stage 1 expects r, the peer .stage 1. says q"),
        ({"configuration": "d"}, "configuration"),
        ({"lane": 2, "lanes": 3}, "wrong-lane: lane 0: the other's lane: stage 1 expects 1, the peer .stage 1. says 2"),
    ],
    ids=str,
)
def test_another_run_or_lane_is_refused_by_name(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    async def job() -> None:
        lower = Lane(0, tmp_path)
        async with listening_lane(lower) as address:
            lane = other.get("lane", 1)
            addresses = dict.fromkeys(range(lane), address)
            upper = Lane(lane, tmp_path, addresses=addresses, **{k: v for k, v in other.items() if k != "lane"})
            async with running(lower, upper) as (_, task):
                with pytest.raises(NeighbourMismatch, match=words):
                    await task
        assert words.partition(":")[0] in lower.faults[0]

    run(job())


def test_certificates_are_held_to_stage_and_lane(tmp_path: Path) -> None:
    today = datetime.now(UTC)
    init("r", tmp_path / "authority", days=30, now=today)
    keys: dict[str, Security] = {}
    for name, stage, lanes in (("right", STAGE, []), ("0", STAGE, [0]), ("1", STAGE, [1]), ("other stage", 0, [])):
        issue([stage], tmp_path / "authority", tmp_path / name, lanes=lanes, days=20, now=today)
        keys[name] = Security(load(tmp_path / name, now=today))

    async def job(below: str, above: str, words: str) -> None:
        lower = Lane(0, tmp_path / "lanes", security=keys[below])
        async with listening_lane(lower, keys[below]) as address:
            upper = Lane(1, tmp_path / "lanes", addresses={0: address}, security=keys[above])
            upper.links.forget_before(0)
            async with running(lower, upper) as (_, task):
                await lower.give(0)
                if not words:
                    await upper.take(0)
                else:
                    with pytest.raises(NeighbourMismatch, match=words):
                        await task

    for below, above, words in (
        ("right", "right", ""),
        ("0", "1", ""),
        ("right", "other stage", "wrong-certificate: the greeting says stage 1 of lane 1 of run 'r', the certificate"),
        (
            "right",
            "0",
            "wrong-certificate: the greeting says stage 1 of lane 1 of run 'r', the certificate is for stage",
        ),
        ("1", "right", "its certificate is for stage 1 of lane 1 of run 'r', not for stage 1 of lane 0; start it with"),
    ):
        run(job(below, above, words))


def test_who_goes_on_with_other_parts_is_refused_and_the_node_lives(tmp_path: Path) -> None:
    """A peer that knows how to greet and then sends what nobody asked for."""

    async def job() -> None:
        lower, upper = Lane(0, tmp_path), Lane(1, tmp_path)
        connection = Connection(None)
        read, write = connection.end(upper=True)
        upper[0].session.connect()
        await write(upper[0].session.greeting(Heartbeat(generation=0, completed_steps=0)))
        part = RoundPart(round=0, offset=0, total_bytes=ROUND_BYTES, contribution_xxh3=1, data=b"x")
        await write(encode_frame(part))
        with pytest.raises(RemoteProtocolError, match="of which nothing was asked for"):
            await lower.links.server.serve(*connection.end(upper=False))
        with suppress(ConnectionError):
            decode_frame(await read() or b"", LIMITS)
        lower.links.forget_before(0)
        upper.links.forget_before(0)
        async with joined(upper, lower):
            await asyncio.gather(lower.train(range(1)), upper.train(range(1)))

    story(job())


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_are_killed_at_any_moment_go_on(tmp_path: Path) -> None:
    """Five kills in 16 rounds, each in the middle of whatever the process did."""
    chance, rounds, ports = random.Random(3), 16, free_ports(2)
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(lane: int) -> None:
        log = (tmp_path / f"log-{lane}").open("ab")
        command = [sys.executable, "-m", "tests.lateral_process", str(lane), str(tmp_path)]
        command += [str(ports[lane]), str(ports[0]), str(rounds)]
        processes[lane] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        log.close()

    def said(lane: int) -> str:
        return (tmp_path / f"log-{lane}").read_text()

    try:
        for lane in (0, 1):
            start(lane)
        deadline = time.monotonic() + 120
        for kill in range(5):
            while said(0).count("round ") + said(1).count("round ") < 6 * (kill + 1) - 4:
                assert time.monotonic() < deadline, said(0) + said(1)
                time.sleep(0.01)
            time.sleep(chance.random() / 10)  # a round takes as long
            victim = chance.choice([0, 1])
            processes[victim].kill()
            processes[victim].wait()
            start(victim)
        for lane in (0, 1):
            assert processes[lane].wait(deadline - time.monotonic()) == 0, said(lane)
            assert said(lane).endswith("through\n")
            assert "Traceback" not in said(lane)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
