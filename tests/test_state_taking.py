"""States of other lanes: asked for, given, given up for another one, on the jumping clock and real disks."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from thinpipe.node.checkpoints.copy_receiver import CopyReceiver
from thinpipe.node.checkpoints.manifest import CheckpointError, Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.lanes.chain_statuses import ChainStatuses
from thinpipe.node.lanes.standstill import THROUGH_S, Standstill
from thinpipe.node.lanes.state_copies import ASK_AGAIN_S, StateCopies
from thinpipe.node.lanes.state_taking import DECLINED_MAX, OTHERS_TIMES, SILENCE_S, TRIES, State, StateTaking
from thinpipe.node.stage_state import StageSnapshot
from thinpipe.protocol.control_messages import CopyFrame, CopyOffer, CopyProgress, Heartbeat
from thinpipe.protocol.copy_transfer import PARTS_AHEAD_LEAST
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.lane_status import LaneStatus, StatusExchange
from thinpipe.protocol.membership_log import MembershipLog

from .builders import identity
from .test_lateral_links import Lane, now, story

PART_BYTES = 512
DEADLINE_S = 100.0


class Copies:
    """A stage of each of two lanes, over a connection that takes a moment; what either complains about."""

    def __init__(self, directory: Path, latency_s: float = 0.1) -> None:
        self.latency_s, self._due_s = latency_s, 0.0
        self.faults: list[str] = []
        self.sent: list[tuple[int, CopyFrame]] = []  # to which lane
        self.stores, self.copies = [], []
        for lane in range(2):
            fingerprint = Fingerprint(run="r", configuration="c", stages=1)
            store = CheckpointStore(directory / f"lane-{lane}", stage=0, fingerprint=fingerprint)
            self.stores.append(store)
            self.copies.append(
                StateCopies(
                    store,
                    part_bytes=PART_BYTES,
                    parts_ahead=PARTS_AHEAD_LEAST,
                    say=lambda to, frame, lane=lane: self._say(lane, to, frame),
                    refuse=self._refuse,
                    on_fault=lambda code, line: self.faults.append(f"{code}: {line}"),
                )
            )

    async def _say(self, lane: int, to: int, frame: CopyFrame) -> None:
        self.sent.append((to, frame))
        self._due_s = max(now() + self.latency_s, self._due_s + 1e-6)  # in order
        asyncio.get_running_loop().call_at(self._due_s, self.copies[to].receive, lane, frame)

    def _refuse(self, lane: int, error: RemoteProtocolError) -> None:
        raise AssertionError(f"lane {lane}: {error}")

    def save(self, lane: int, completed: int) -> None:
        tensors = {"weight/a": torch.full((3000,), float(100 * lane + completed))}
        snapshot = StageSnapshot(completed=completed, tensors=tensors, dictionaries={})
        self.stores[lane].write(snapshot, generation=0, written_s=0.0)

    def meet(self) -> None:
        for lane in range(2):
            self.copies[lane].met(1 - lane)

    async def close(self) -> None:
        for each in self.copies:
            await each.close()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 0.25, 0.35, 0.45, 0.6])
def test_who_asks_for_another_state_on_the_same_connection_gets_that_one(tmp_path: Path, after_s: float) -> None:
    """Whatever is on its way of the first one: its offer, which is declined, or parts of it."""

    async def job() -> None:
        both = Copies(tmp_path)
        for completed in (2, 4):
            both.save(1, completed)
        both.meet()
        first = asyncio.create_task(both.copies[0].fetch(1, 2))
        await asyncio.sleep(after_s)
        first.cancel()
        await asyncio.wait([first])
        async with asyncio.timeout(60):
            await both.copies[0].fetch(1, 4)
        assert both.stores[0].steps() == [4]
        await both.close()

    story(job())


def test_what_is_whole_and_read_once_more_counts_as_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large state that takes longer than anybody waits for who sends nothing."""
    complete, read, go_on = CopyReceiver.complete, threading.Event(), threading.Event()

    def slow(self: CopyReceiver) -> tuple[int, int] | None:
        read.set()
        assert go_on.wait(10)
        return complete(self)

    async def job() -> None:
        monkeypatch.setattr(CopyReceiver, "complete", slow)
        both = Copies(tmp_path, latency_s=0.001)
        both.save(1, 2)
        both.meet()
        asked = asyncio.create_task(both.copies[0].fetch(1, 2))
        while not read.is_set():  # noqa: ASYNC110 (a thread's)
            await asyncio.sleep(0.01)
        for _ in range(3):
            await asyncio.sleep(0.1)
            assert now() - both.copies[0].came_s < 0.05
        go_on.set()
        async with asyncio.timeout(60):
            await asked
        came_s = both.copies[0].came_s
        await asyncio.sleep(0.1)
        assert both.copies[0].came_s == came_s
        await both.close()

    asyncio.run(job())


def test_what_another_lane_offers_is_not_taken_for_what_was_asked_for(tmp_path: Path) -> None:
    """It may be after as many steps."""

    async def job() -> None:
        both = Copies(tmp_path)
        both.save(1, 2)
        both.meet()
        asked = asyncio.create_task(both.copies[0].fetch(5, 2))  # who is not there
        await asyncio.sleep(1)
        manifest = both.stores[1].manifest(2).rendered()
        both.copies[0].receive(1, CopyOffer(stage=0, completed_steps=2, manifest=manifest))
        await asyncio.sleep(1)
        assert not any(isinstance(frame, CopyProgress) for _, frame in both.sent)
        assert not asked.done()
        asked.cancel()
        await asyncio.wait([asked])
        await both.close()

    story(job())


class Taking(StateTaking):
    """fetch: ends as it is told to."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.bytes_s = float("-inf")
        self.asked: list[State] = []
        super().__init__(
            None,
            deadline_s=DEADLINE_S,
            fetch=self._fetched,
            on_want=lambda _: None,
            on_here=lambda: None,
            came_s=lambda: self.bytes_s,
        )

    async def _fetched(self, lane: int, completed: int) -> None:
        self.asked.append((lane, completed))
        await asyncio.shield(self.answer)

    async def overdue_after_s(self, *, source_is_there: bool = True) -> float:
        began_s = now()
        while True:
            if self.is_overdue(source_is_there=source_is_there):
                return now() - began_s
            await asyncio.sleep(1)


def test_a_state_is_given_up_when_nothing_of_it_comes() -> None:
    async def job() -> None:
        taking = Taking()
        taking.want((1, 4))
        assert await taking.overdue_after_s() == pytest.approx(max(DEADLINE_S, SILENCE_S), abs=2)
        taking.bytes_s = now()
        assert await taking.overdue_after_s() == pytest.approx(max(DEADLINE_S, SILENCE_S), abs=2)
        taking.close()

    story(job())


def test_a_state_is_given_up_when_its_source_is_away_for_long() -> None:
    async def job() -> None:
        taking = Taking()
        taking.want((1, 4))
        for _ in range(10):
            taking.bytes_s = now()
            assert not taking.is_overdue(source_is_there=True)
            await asyncio.sleep(DEADLINE_S / 2)
        taking.bytes_s = now() + 1e6
        assert await taking.overdue_after_s(source_is_there=False) <= DEADLINE_S
        taking.close()

    story(job())


def test_a_state_that_is_declined_is_soon_given_up() -> None:
    async def job() -> None:
        taking = Taking()
        taking.answer.set_exception(CheckpointError("it cannot be read"))
        taking.want((1, 4))
        assert await taking.overdue_after_s() <= DECLINED_MAX * ASK_AGAIN_S
        taking.close()

    story(job())


def test_the_other_stages_have_ten_times_as_long_as_this_one() -> None:
    async def job() -> None:
        taking = Taking()
        taking.want((1, 4))
        await asyncio.sleep(30)
        taking.answer.set_result(None)
        await asyncio.sleep(1)
        assert taking.here == (1, 4)
        assert await taking.overdue_after_s() == pytest.approx(DEADLINE_S + OTHERS_TIMES * 30, abs=12)

    story(job())


def test_what_did_not_come_is_wanted_again_when_there_is_nothing_else_and_not_for_ever() -> None:
    async def job() -> None:
        taking, there = Taking(), [(2, 8), (1, 4)]

        def choose() -> State | None:
            taking.choose(lambda without: next((each for each in there if each not in without), None))
            wanted = taking.wanted
            taking.give_up()
            return wanted

        chosen = [choose() for _ in range(2 * TRIES + 1)]
        assert chosen[:2] == there
        assert chosen.count((2, 8)) == chosen.count((1, 4)) == TRIES
        assert chosen[-1] is None
        taking.close()

    story(job())


def test_what_all_stages_of_a_lane_have_holds_when_they_are_through() -> None:
    """Their control streams have ended by then; and it may be that the last checkpoint was written and not said yet."""
    log = MembershipLog.begin(2).then((0, 1))
    top = ChainStatuses(identity(0, 2, lanes=2), 9, tell=lambda *_: None, refuse=lambda *_: None)
    mine = LaneStatus(held=(1, 1), log=log, saved=60)
    below = StatusExchange(2, 9).say(LaneStatus(held=(1, 1), log=log, saved=58, kept=3))
    top.receive("below", below)
    assert top.joined(mine).saved == 58
    top.parted("below")  # as when the stage below is lost
    assert top.joined(mine).saved == 0
    top.through(60)
    assert (top.joined(mine).saved, top.joined(mine).kept, top.joined(mine).held) == (60, 3, (1, 1))
    top.parted("below")
    assert top.joined(mine).saved == 60


def test_who_follows_gives_up_when_nothing_happens_anywhere(tmp_path: Path) -> None:
    """Later, where lanes may yet come back, than where all others are through."""

    async def job() -> None:
        peers = [link.peer for link in Lane(1, tmp_path, lanes=3).links.links]
        still = Standstill(peers, deadline_s=3.0, lost_s=1800.0)

        def check(mine: object, after_s: float) -> None:
            still.check(24, mine, now() + after_s, paused_ago_s=float("inf"))

        check("this", 0.0)
        check("this", 1799.0)
        words = r"others, from 24 steps on; for 1800 s .* \(lane 0 is not connected \(it was not there yet\); lane 2 is"
        with pytest.raises(TimeoutError, match=words):
            check("this", 1800.0)
        for peer in peers:
            peer.done = True
        check("that", 1801.0)
        check("that", 1800.0 + THROUGH_S)
        with pytest.raises(TimeoutError, match="for 120 s"):
            check("that", 1801.0 + THROUGH_S)
        still.check(24, "that", now() + 9000, paused_ago_s=5.0)

    story(job())


@pytest.mark.parametrize("what", ["mine", "connected", "heartbeat"])
def test_any_change_is_a_reason_to_go_on_waiting(tmp_path: Path, what: str) -> None:
    async def job() -> None:
        peers = [link.peer for link in Lane(1, tmp_path).links.links]
        still = Standstill(peers, deadline_s=3.0, lost_s=100.0)
        for count in range(10):
            if what == "connected":
                peers[0].connected = bool(count % 2)
            if what == "heartbeat":
                peers[0].heartbeat = Heartbeat(generation=0, completed_steps=count)
            mine = count if what == "mine" else None
            still.check(24, mine, 60.0 * count, paused_ago_s=float("inf"))

    story(job())
