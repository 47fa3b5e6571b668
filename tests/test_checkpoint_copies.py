"""Copies of checkpoints on a neighbour: what arrives is what was sent, whatever breaks on the way, or nothing
is."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.node.checkpoints.copy_receiver import CopyReceiver
from thinpipe.node.checkpoints.copy_service import CopyService, buddy_side
from thinpipe.node.checkpoints.copy_store import QUEUED_MAX, CopyStore
from thinpipe.node.checkpoints.durable_files import sweep_incoming
from thinpipe.node.checkpoints.kept_tokenizer import keep_tokenizer, kept_tokenizer, take_beside
from thinpipe.node.checkpoints.manifest import Beside, CheckpointError, Fingerprint, Manifest
from thinpipe.node.checkpoints.store import STATE, CheckpointStore
from thinpipe.node.stage_state import StageSnapshot
from thinpipe.protocol.control_messages import (
    LISTED_MAX,
    CopiesHeld,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
)
from thinpipe.protocol.copy_transfer import PARTS_AHEAD_LEAST, Receiving, Sending
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.protocol.rollback_actions import Side

STAGES = 3
FINGERPRINT = Fingerprint(run="demo", configuration="c" * 64, stages=STAGES)
PART_BYTES = 1000
TOKENIZER = {"tokenizer.json": bytes(range(250)) * 9, "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}'}


# -- the rules alone --------------------------------------------------------------------------------------------------


@given(data=st.data(), content=st.binary(max_size=200), part_bytes=st.integers(1, 60))
@settings(max_examples=300)
def test_a_file_arrives_whole_over_any_number_of_connections(
    data: st.DataObject, content: bytes, part_bytes: int
) -> None:
    got, cuts = bytearray(), 0
    while True:
        receiving = Receiving(size=len(content), offset=len(got))  # what was not written is lost with its connection
        sending = Sending(size=len(content), part_bytes=part_bytes)
        under_way: list[tuple[int, int]] = []
        said = [receiving.offset]
        while not sending.done:
            if cuts < 5 and data.draw(st.booleans()) and data.draw(st.booleans()):
                cuts += 1
                break
            if said and (not under_way or data.draw(st.booleans())):
                sending.progress(said.pop(0))
            elif under_way:
                offset, length = under_way.pop(0)
                receiving.part(offset, length)
                if receiving.due:
                    got += content[len(got) : receiving.offset]
                    receiving.acknowledged()
                    said.append(receiving.offset)
            while parts := sending.next(data.draw(st.integers(1, 4))):
                under_way += parts
            assert sum(length for _, length in under_way) <= PARTS_AHEAD_LEAST * part_bytes
        if sending.done:
            break
    assert receiving.done
    assert got == content


def test_progress_that_cannot_be_is_refused() -> None:
    sending = Sending(size=100, part_bytes=10)
    assert sending.next() == []  # the receiver has not said anything yet
    with pytest.raises(RemoteProtocolError, match="at byte 101, not at 0 to 100"):
        sending.progress(101)
    sending.progress(50)
    assert sending.next(1) == [(50, 10)]
    for offset in (49, 61):
        with pytest.raises(RemoteProtocolError, match=f"at byte {offset}, not at 50 to 60"):
            sending.progress(offset)


def test_several_parts_are_acknowledged_at_once() -> None:
    receiving = Receiving(size=55, offset=10)
    for offset in (10, 20, 30):
        receiving.part(offset, 10)
        assert not receiving.due
    receiving.part(40, 10)
    assert receiving.due
    receiving.acknowledged()
    assert not receiving.due
    receiving.part(50, 5)
    assert receiving.due  # the last one


def test_nobody_waits_for_who_waits_for_him() -> None:
    """Whatever a sender may have ahead, at any moment, leads to an acknowledgement."""
    for size in range(1, 200):
        sending, receiving = Sending(size=size, part_bytes=7), Receiving(size=size)
        sending.progress(0)
        while not sending.done:
            parts = sending.next()
            assert parts
            for part in parts:
                receiving.part(*part)
            if receiving.due:
                receiving.acknowledged()
                sending.progress(receiving.offset)


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (20, 10), (10, 91), (10, 0), (10, -1)])
def test_a_part_out_of_its_turn_is_refused(offset: int, length: int) -> None:
    receiving = Receiving(size=100)
    receiving.part(0, 10)
    with pytest.raises(RemoteProtocolError) as caught:
        receiving.part(offset, length)
    assert caught.value.fault is Fault.UNEXPECTED
    assert receiving.offset == 10


# -- two nodes --------------------------------------------------------------------------------------------------------


def snapshot(completed: int, numbers: int = 5_000) -> StageSnapshot:
    tensors = {"weight/w": torch.arange(numbers, dtype=torch.float32) + completed}
    return StageSnapshot(completed=completed, tensors=tensors, dictionaries={})


class NodeUnderTest:
    """The copies of one stage on a machine of its own."""

    def __init__(self, stage: int, directory: Path, bytes_max: int = 2**30) -> None:
        self.stage, self.directory = stage, directory
        self.store = CheckpointStore(directory, stage=stage, fingerprint=FINGERPRINT)
        self.faults: list[str] = []
        self.copied: list[tuple[int, int]] = []
        self.fetched: list[tuple[int, int]] = []
        self.held: list[int] = []
        self.refused: list[RemoteProtocolError] = []
        self.peers: dict[Side, NodeUnderTest] = {}
        self.said: list[CopyFrame] = []
        self.let_through: Callable[[NodeUnderTest, CopyFrame], Awaitable[bool]] | None = None
        self.copies = CopyService(
            stage=stage,
            stages=STAGES,
            store=self.store,
            bytes_max=bytes_max,
            part_bytes=PART_BYTES,
            parts_ahead=PARTS_AHEAD_LEAST,
            say=self._say,
            refuse=lambda _, error: self.refused.append(error),
            on_fault=lambda code, line: self.faults.append(f"{code}: {line}"),
            on_copy=self._on_copy,
            on_held=self.held.append,
        )

    def _on_copy(self, completed: int, size: int, fetched: bool) -> None:
        if fetched:
            self.fetched.append((completed, size))
        else:
            self.copied.append((completed, size))

    async def fetch(self, have: list[int], deadline_s: float = 5.0, replacement_s: float = 10.0) -> bool:
        return await self.copies.fetch(have, deadline_s=deadline_s, replacement_s=replacement_s)

    async def _say(self, side: Side, frame: CopyFrame) -> None:
        await asyncio.sleep(0)
        self.said.append(frame)
        if self.let_through and not await self.let_through(self, frame):
            return
        if peer := self.peers.get(side):
            peer.copies.receive("above" if side == "below" else "below", frame)

    def write(self, completed: int) -> None:
        self.store.write(snapshot(completed), generation=0, written_s=0)
        self.copies.written(completed)

    async def write_copied(self, completed: int) -> None:
        self.write(completed)
        await until(lambda: self.copied and self.copied[-1][0] == completed)

    def kept(self, stage: int) -> CheckpointStore:
        return CheckpointStore(self.directory / "copies", stage=stage, fingerprint=FINGERPRINT)

    @property
    def parts(self) -> list[CopyPart]:
        return [frame for frame in self.said if isinstance(frame, CopyPart)]


def pair(directory: Path, bytes_max: int = 2**30) -> tuple[NodeUnderTest, NodeUnderTest]:
    """Stages 0 and 1."""
    return NodeUnderTest(0, directory / "0"), NodeUnderTest(1, directory / "1", bytes_max)


def connect(upper: NodeUnderTest, lower: NodeUnderTest) -> None:
    upper.peers["below"], lower.peers["above"] = lower, upper
    upper.copies.met("below")
    lower.copies.met("above")


def cut(upper: NodeUnderTest, lower: NodeUnderTest) -> None:
    upper.peers.pop("below", None), lower.peers.pop("above", None)
    upper.copies.parted("below")
    lower.copies.parted("above")


@asynccontextmanager
async def nodes(*made: NodeUnderTest) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        for node in made:
            await node.copies.close()


@asynccontextmanager
async def connected(upper: NodeUnderTest, lower: NodeUnderTest) -> AsyncIterator[tuple[NodeUnderTest, NodeUnderTest]]:
    async with nodes(upper, lower):
        connect(upper, lower)
        yield upper, lower


@asynccontextmanager
async def below_anybody(directory: Path) -> AsyncIterator[NodeUnderTest]:
    """Stage 1, connected upwards; what comes from there is the story's."""
    node = NodeUnderTest(1, directory)
    async with nodes(node):
        node.copies.met("above")
        yield node


def damage(path: Path) -> None:
    """One bit, at the end."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def until(what: Callable[[], object]) -> None:
    while not what():  # noqa: ASYNC110 (what it looks at has no event)
        await asyncio.sleep(0.001)


def test_everybody_has_a_buddy_but_a_lone_stage() -> None:
    assert [buddy_side(stage, 3) for stage in range(3)] == ["below", "below", "above"]
    assert [buddy_side(stage, 2) for stage in range(2)] == ["below", "above"]
    assert buddy_side(0, 1) is None


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_a_lost_disk_is_brought_back(owner: int, tmp_path: Path) -> None:
    async def story() -> None:
        upper, lower = (0, 1) if owner == 0 else (1, 2)
        first = [NodeUnderTest(stage, tmp_path / f"{stage}") for stage in (upper, lower)]
        own, buddy = first if owner == upper else reversed(first)
        if owner == 0:
            keep_tokenizer(own.directory, TOKENIZER)
        async with nodes(*first):
            connect(*first)
            for step in (5, 10, 15):
                own.write(step)
                await until(lambda step=step: step in buddy.kept(owner).steps())
                await until(lambda step=step: own.copied and own.copied[-1][0] == step)
            cut(*first)
        size, beside = own.store.manifest(15).file_bytes, own.store.manifest(15).beside_bytes
        assert beside == (sum(map(len, TOKENIZER.values())) if owner == 0 else 0)
        assert own.copied == [(5, size + beside), (10, size), (15, size)]  # what does not change crosses once
        assert sum(len(part.data) for part in own.parts) == 3 * size + beside
        shutil.rmtree(own.directory)

        anew = NodeUnderTest(owner, tmp_path / "another machine")
        buddy = NodeUnderTest(buddy.stage, buddy.directory)
        pair = [anew, buddy] if owner == upper else [buddy, anew]
        async with nodes(*pair):
            bringing = asyncio.create_task(anew.fetch([]))
            await asyncio.sleep(0.01)
            connect(*pair)
            assert await bringing
            assert anew.fetched == [(15, size + beside), (10, size)]
            assert torch.equal(anew.store.load(15).tensors["weight/w"], snapshot(15).tensors["weight/w"])
            assert anew.store.newest_intact(3, report=print) == [15, 10]
        assert not anew.faults
        assert not buddy.faults
        if owner == 0:
            there = kept_tokenizer(anew.directory, hashlib.sha256(TOKENIZER["tokenizer.json"]).hexdigest())
            assert there
            assert {path.name: path.read_bytes() for path in there.iterdir()} == TOKENIZER

    asyncio.run(story())
    assert not list(tmp_path.glob("*/.incoming*"))


def test_copies_of_the_own_stage_in_another_lane_are_no_checkpoints_of_the_own_lane(tmp_path: Path) -> None:
    """Lanes of one group have the same stages, whose states differ: each is where its lane would look for it. What both
    see is looked at where the other one writes it."""
    saved = {lane: tmp_path / f"lane-{lane}" / "checkpoints" for lane in (0, 1)}
    stores = {lane: CheckpointStore(each, stage=0, fingerprint=FINGERPRINT) for lane, each in saved.items()}
    stores[1].write(snapshot(4), generation=0, written_s=0)
    copies = CopyStore(0, stores[1], 2**30, place=GridPlace(0, 0), own_lane=1)
    assert copies.steps() == ()
    copies.store.write(snapshot(5), generation=0, written_s=0)
    stores[0].write(snapshot(6), generation=0, written_s=0)
    assert copies.steps() == (6, 5)
    assert copies.source(6).directory == stores[0].directory
    assert stores[1].steps() == [4]
    same_lane = CopyStore(1, stores[1], 2**30, place=GridPlace(1, 1), own_lane=1)
    assert same_lane.steps() == ()
    assert {same_lane.store.directory, copies.store.directory}.isdisjoint(each.directory for each in stores.values())
    for directory in (tmp_path / "own" / "checkpoints", tmp_path / "lane-1-saved"):  # a disk of its own for each lane
        own = CheckpointStore(directory, stage=0, fingerprint=FINGERPRINT)
        own.write(snapshot(7), generation=0, written_s=0)
        assert CopyStore(0, own, 2**30, place=GridPlace(0, 0), own_lane=1).steps() == ()


def test_a_copy_without_its_tokenizer_is_not_sent(tmp_path: Path) -> None:
    """It was there when the state was written, and is another one by now."""

    async def story() -> None:
        upper, lower = pair(tmp_path)
        keep_tokenizer(upper.directory, TOKENIZER)
        upper.store.write(snapshot(5), generation=0, written_s=0)
        keep_tokenizer(upper.directory, {**TOKENIZER, "tokenizer_config.json": b"{}"})
        async with connected(upper, lower):
            upper.copies.written(5)
            await until(lambda: upper.faults)
            assert "tokenizer is not what it was" in upper.faults[0]
            upper.store.write(snapshot(10), generation=0, written_s=0)
            upper.copies.written(10)
            await until(lambda: lower.kept(0).steps() == [10])
        assert not upper.refused
        assert not lower.refused

    asyncio.run(story())


def test_a_tokenizer_that_was_damaged_on_the_way_is_not_kept(tmp_path: Path) -> None:
    state, stage = tmp_path / "state", tmp_path / "stage-0"
    wanted = {"tokenizer.json": Beside(bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())}
    for came in (b"abd", b"ab", b""):
        state.write_bytes(came)
        with state.open("rb") as source, pytest.raises(CheckpointError, match=r"tokenizer\.json, which came with"):
            take_beside(source, wanted, stage)
        assert not list(stage.iterdir())


@pytest.mark.parametrize("part", [0, 1, 7, 19])
def test_a_cut_costs_no_part_twice(part: int, tmp_path: Path) -> None:
    async def story() -> None:
        upper, lower = pair(tmp_path)
        through = asyncio.Event()

        async def let_through(node: NodeUnderTest, frame: CopyFrame) -> bool:
            if isinstance(frame, CopyPart) and len(node.parts) == part + 1 and not through.is_set():
                through.set()
                asyncio.get_running_loop().call_soon(cut, upper, lower)
                await asyncio.Event().wait()  # never left this machine
            return True

        upper.let_through = let_through
        async with connected(upper, lower):
            upper.write(5)
            await through.wait()
            await until(lambda: not upper.peers)
            await until(lambda: (tmp_path / "1").exists())
            await asyncio.sleep(0.02)  # what had arrived is written
            before = len(upper.parts)
            connect(upper, lower)
            await until(lambda: lower.kept(0).steps() == [5])
            await until(lambda: upper.copied)
            assert upper.copied == [(5, upper.store.manifest(5).file_bytes)]  # over both connections
            total = -(-upper.store.manifest(5).file_bytes // PART_BYTES)
            lost = PARTS_AHEAD_LEAST  # may have been under way
            assert len(upper.parts) - before <= total - part + lost
            assert upper.parts[before].offset <= part * PART_BYTES
            assert part < PARTS_AHEAD_LEAST or upper.parts[before].offset > 0
        lower.kept(0).verify(5)
        assert not upper.faults

    asyncio.run(story())


def test_where_both_see_one_directory_nothing_is_sent(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(NodeUnderTest(0, tmp_path), NodeUnderTest(1, tmp_path)) as (upper, lower):
            await until(lambda: lower.said)
            await upper.write_copied(5)
        assert upper.copied == [(5, 0)]
        assert not upper.parts
        assert not (tmp_path / "copies").exists()

    asyncio.run(story())


def test_only_the_newest_is_copied(tmp_path: Path) -> None:
    async def story() -> None:
        upper, lower = pair(tmp_path)
        for step in (1, 2, 3):
            upper.write(step)
        async with connected(upper, lower):
            await until(lambda: upper.copied)
            assert lower.kept(0).steps() == [3]

    asyncio.run(story())


def test_an_intact_disk_fetches_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        upper, lower = pair(tmp_path)
        async with nodes(upper, lower):
            upper.write(5)
            connect(upper, lower)
            await until(lambda: upper.copied)
            upper.write(10)
            assert not await upper.fetch([10, 5])
        assert not any(isinstance(frame, CopyWanted) for frame in upper.said)

    asyncio.run(story())


def test_a_damaged_copy_is_declined_and_an_older_one_comes(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            for step in (5, 10):
                await upper.write_copied(step)
            cut(upper, lower)
        damage(lower.kept(0).path(10) / STATE)
        anew, lower = NodeUnderTest(0, tmp_path / "anew"), NodeUnderTest(1, lower.directory)
        async with connected(anew, lower):
            assert await anew.fetch([])
            assert [completed for completed, _ in anew.fetched] == [5]
        assert anew.store.steps() == [5]
        assert "is damaged: it has the digest" in anew.faults[0]  # seen before it was sent
        assert not lower.fetched

    asyncio.run(story())


def test_one_that_is_too_large_is_declined_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path, bytes_max=1000)) as (upper, _):
            upper.write(5)
            await until(lambda: upper.faults)
            upper.copies.written(5)
            await asyncio.sleep(0.02)
        assert len(upper.faults) == 1
        assert "checkpoint.copy_bytes_max there is 1000" in upper.faults[0]
        assert sum(isinstance(frame, CopyOffer) for frame in upper.said) == 1
        assert not upper.parts

    asyncio.run(story())


def test_a_full_disk_at_the_buddy_is_said_at_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    async def story() -> None:
        monkeypatch.setattr(CopyReceiver, "write", full)
        async with connected(*pair(tmp_path)) as (upper, lower):
            upper.write(5)
            await until(lambda: upper.faults and lower.faults)
        assert "No space left" in upper.faults[0]
        assert "No space left" in lower.faults[0]
        assert upper.store.steps() == [5]

    asyncio.run(story())


def test_a_buddy_that_is_gone_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    async def story() -> None:
        node = NodeUnderTest(1, tmp_path)
        async with nodes(node):
            assert not await node.fetch([7], replacement_s=0.05)
        assert node.faults == [
            "timeout: waited 0.05 s in vain for copies of checkpoints at stage 2; "
            "goes on with what is on this disk: steps [7]"
        ]

    asyncio.run(story())


HOSTILE: dict[str, tuple[CopyFrame, str]] = {
    "of a third stage": (CopyWanted(stage=2, completed_steps=5), "stage 2 is not for this stage"),
    "of no stage": (CopyOffer(stage=99, completed_steps=5, manifest=b""), "stage 99 is not for this stage"),
    "held by who is no buddy": (CopiesHeld(stage=0, steps=(5,)), "CopiesHeld from above"),
    "wanted from its owner": (CopyWanted(stage=1, completed_steps=5), "stage 1 is not for this stage"),
}


@pytest.mark.parametrize(("frame", "line"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_neighbour_may_not_say_ends_the_connection(frame: CopyFrame, line: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with below_anybody(tmp_path) as node:
            node.copies.receive("above", frame)
            await until(lambda: node.refused)
        assert line in str(node.refused[0])

    asyncio.run(story())


HARMLESS: dict[str, CopyFrame] = {
    "a manifest that is none": CopyOffer(stage=0, completed_steps=5, manifest=b"{}"),
    "a part that nobody offered": CopyPart(stage=0, completed_steps=5, offset=0, data=b"x"),
    "progress of nothing": CopyProgress(stage=0, completed_steps=5, offset=5),
    "declined what was not offered": CopyDeclined(stage=0, completed_steps=5, reason="so"),
    "wanted what there is not": CopyWanted(stage=0, completed_steps=5),
}


@pytest.mark.parametrize("frame", HARMLESS.values(), ids=HARMLESS)
def test_what_makes_no_sense_changes_nothing(frame: CopyFrame, tmp_path: Path) -> None:
    async def story() -> None:
        async with below_anybody(tmp_path) as node:
            node.copies.receive("above", frame)
            await asyncio.sleep(0.05)
        assert not node.refused

    asyncio.run(story())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_frames_that_come_faster_than_the_disk_are_bounded(tmp_path: Path) -> None:
    async def story() -> None:
        async with below_anybody(tmp_path) as node:
            part = CopyPart(stage=0, completed_steps=5, offset=0, data=b"x")
            for _ in range(QUEUED_MAX):
                node.copies.receive("above", part)
            with pytest.raises(RemoteProtocolError, match=f"more than {QUEUED_MAX} frames"):
                node.copies.receive("above", part)

    asyncio.run(story())


def test_another_runs_copy_is_declined(tmp_path: Path) -> None:
    async def story() -> None:
        foreign = CheckpointStore(
            tmp_path / "0",
            stage=0,
            fingerprint=Fingerprint(run="other", configuration="c" * 64, stages=STAGES),
        )
        foreign.write(snapshot(5), generation=0, written_s=0)
        async with below_anybody(tmp_path / "1") as node:
            manifest = foreign.manifest(5).rendered()
            node.copies.receive("above", CopyOffer(stage=0, completed_steps=5, manifest=manifest))
            await until(lambda: node.faults)
        assert "another run" in node.faults[0]

    asyncio.run(story())


# -- found by reading ----------------------------------------------------------------------------------------------


def test_a_checkpoint_that_rotted_here_is_brought_back(tmp_path: Path) -> None:
    """It has its size and its manifest, and yet it is not what is missing."""

    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, _):
            await upper.write_copied(5)
            damage(upper.store.path(5) / STATE)
            assert upper.store.newest_intact(3, report=upper.faults.append) == []
            assert await upper.fetch([])
            assert upper.store.newest_intact(3, report=print) == [5]

    asyncio.run(story())


def test_a_buddy_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            await upper.write_copied(5)
            cut(upper, lower)
        anew, lower = NodeUnderTest(0, tmp_path / "anew"), NodeUnderTest(1, lower.directory)
        async with nodes(anew, lower):
            bringing = asyncio.create_task(anew.fetch([], deadline_s=0.05))
            await asyncio.sleep(0.2)
            connect(anew, lower)
            assert await bringing
        assert [completed for completed, _ in anew.fetched] == [5]

    asyncio.run(story())


def test_a_run_that_is_over_waits_for_no_copies(tmp_path: Path) -> None:
    async def story() -> None:
        node = NodeUnderTest(1, tmp_path)
        async with nodes(node):
            assert node.copies._restore
            heard = node.copies._restore.heard
            heard.set()
            bringing = asyncio.create_task(node.fetch([], replacement_s=1e6))
            await until(lambda: not heard.is_set())  # it waits
            node.copies.give_up()
            assert not await bringing
            assert not node.faults

    asyncio.run(story())


def test_patience_is_for_the_buddy_and_not_for_anybody(tmp_path: Path) -> None:
    """What comes from the other side meanwhile does not lengthen it."""

    async def story() -> None:
        above, node, mute = (NodeUnderTest(stage, tmp_path / f"{stage}") for stage in range(3))

        async def nothing(*_: object) -> bool:
            return False

        mute.let_through = nothing
        async with nodes(above, node, mute):
            connect(above, node)
            connect(node, mute)
            above.write(1)
            bringing = asyncio.create_task(node.fetch([], deadline_s=0.3))
            for step in range(2, 200):
                if bringing.done():
                    break
                above.write(step)
                await asyncio.sleep(0.02)
            assert step < 60
            assert not await bringing
        assert "in vain" in node.faults[0]

    asyncio.run(story())


def test_a_copy_that_takes_long_to_read_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buddy reads all of it once before the first part goes, which of a large one takes longer than anybody waits
    for who says nothing."""
    verify = CheckpointStore.verify

    def slow(self: CheckpointStore, completed: int) -> Manifest:
        time.sleep(1.5)
        return verify(self, completed)

    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            await upper.write_copied(5)
            cut(upper, lower)
            shutil.rmtree(upper.directory)
            monkeypatch.setattr(CheckpointStore, "verify", slow)
            monkeypatch.setattr("thinpipe.node.checkpoints.copy_service.SAID_EVERY_S", 0.1)
            connect(upper, lower)
            assert await upper.fetch([], deadline_s=0.5)
            assert not upper.faults
            said = sum(isinstance(frame, CopiesHeld) for frame in lower.said)
            await asyncio.sleep(0.3)
            assert sum(isinstance(frame, CopiesHeld) for frame in lower.said) == said  # once it is under way, no more

    asyncio.run(story())


def test_a_late_thread_does_not_touch_what_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks while a whole copy is read once more; a newer one comes on the next connection."""
    adopt, began, go_on = CheckpointStore.adopt, threading.Event(), threading.Event()

    def slow(self: CheckpointStore, manifest: Manifest, *rest: object, **more: object) -> None:
        if manifest.completed == 5:
            began.set()
            assert go_on.wait(10)
        adopt(self, manifest, *rest, **more)  # pyright: ignore[reportArgumentType]

    async def story() -> None:
        monkeypatch.setattr(CheckpointStore, "adopt", slow)
        async with connected(*pair(tmp_path)) as (upper, lower):
            upper.write(5)
            await until(began.is_set)
            cut(upper, lower)
            upper.write(10)
            connect(upper, lower)
            await asyncio.sleep(0.1)
            go_on.set()
            await until(lambda: 10 in lower.kept(0).steps())
            await until(lambda: upper.copied)
        for step in lower.kept(0).steps():
            lower.kept(0).verify(step)
        assert not lower.faults

    asyncio.run(story())
    assert not list(tmp_path.glob("*/.incoming*"))


def test_who_was_cut_off_does_not_write_any_more(tmp_path: Path) -> None:
    """A job of the last connection may come to its turn after the offer of the next one."""
    store = CheckpointStore(tmp_path / "a", stage=0, fingerprint=FINGERPRINT)
    store.write(snapshot(5), generation=0, written_s=0)
    offer = CopyOffer(stage=0, completed_steps=5, manifest=store.manifest(5).rendered())
    content = (store.path(5) / STATE).read_bytes()
    there = CheckpointStore(tmp_path / "b", stage=0, fingerprint=FINGERPRINT)
    receiver = CopyReceiver(there, check=lambda _: None, supersede=True, directory=tmp_path / "b")
    earlier = receiver.offer(offer)
    assert receiver.write(earlier, [content[:100], content[100:150]]) == 150
    later = receiver.offer(offer)
    assert later.offset == 150
    assert receiver.write(earlier, [content[150:200]]) is None
    assert receiver.complete() is None
    assert receiver.write(later, [content[150:]]) == len(content)
    assert receiver.complete() == (5, len(content))
    there.verify(5)


def test_after_a_rollback_the_copy_is_of_the_new_training(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            for step in (90, 100):
                await upper.write_copied(step)
            assert upper.held[-1] == 100
            upper.copies.written(0)  # the run begins again
            assert upper.held[-1] == 0
            await upper.write_copied(5)
            assert lower.kept(0).steps() == [5]
            assert upper.held[-1] == 5

    asyncio.run(story())


def test_a_hostile_owner_cannot_fill_the_disk(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            for step in range(20, 0, -1):
                await upper.write_copied(step)
                assert len(lower.kept(0).steps()) <= 3

    asyncio.run(story())


def test_one_failure_does_not_end_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the owner's disk, and of the buddy's."""

    async def story() -> None:
        upper, lower = pair(tmp_path)

        def broken(*_: object) -> None:
            raise CheckpointError("the disk had a bad moment")

        async with connected(upper, lower):
            for step, what in ((5, "manifest"), (10, "steps")):
                with monkeypatch.context() as patch:
                    store = upper.store if what == "manifest" else lower.copies._stores["above"].store
                    patch.setattr(store, what, broken)
                    upper.copies.written(step)
                    CheckpointStore(upper.directory, stage=0, fingerprint=FINGERPRINT).write(
                        snapshot(step), generation=0, written_s=0
                    )
                    await until(lambda: upper.faults or lower.faults)
                upper.faults.clear()
                lower.faults.clear()
            await upper.write_copied(15)

    asyncio.run(story())


def test_more_checkpoints_than_a_frame_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        node = NodeUnderTest(1, tmp_path)
        monkeypatch.setattr(node.copies._stores["above"].store, "steps", lambda: list(range(1, 3000)))
        async with nodes(node):
            node.copies.met("above")
            await until(lambda: node.said)
        (held,) = node.said
        assert isinstance(held, CopiesHeld)
        assert held.steps[0] == 2999
        assert len(held.steps) <= LISTED_MAX

    asyncio.run(story())


def test_who_is_declined_again_and_again_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with below_anybody(tmp_path) as node:
            for step in range(1, 200):
                if node.refused:
                    break
                node.copies.receive("above", CopyOffer(stage=0, completed_steps=step, manifest=b"{}"))
                await until(lambda step=step: node.refused or len(node.faults) >= step)
        assert "copies that are declined" in str(node.refused[0])
        assert len(node.faults) < 100

    asyncio.run(story())


def test_reconnects_without_anything_new_send_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with connected(*pair(tmp_path)) as (upper, lower):
            await upper.write_copied(5)
            for _ in range(3):
                cut(upper, lower)
                connect(upper, lower)
                await asyncio.sleep(0.05)
        assert len(upper.copied) == 1
        assert sum(isinstance(frame, CopyOffer) for frame in upper.said) == 1

    asyncio.run(story())


def test_a_file_that_nobody_here_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".incoming-stage-1-x").touch()
    (tmp_path / ".incoming-stage-1-999999999").touch()
    sweep_incoming(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".incoming-stage-1-x"]


def test_a_copy_takes_the_place_of_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """What `adopt` refuses: the file stays where it was, and so does what is there."""
    store = CheckpointStore(tmp_path / "a", stage=0, fingerprint=FINGERPRINT)
    store.write(snapshot(5), generation=0, written_s=0)
    other = CheckpointStore(tmp_path / "b", stage=0, fingerprint=FINGERPRINT)
    other.write(snapshot(6), generation=0, written_s=0)
    file = tmp_path / "file"
    file.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="its digest differs"):
        store.adopt(other.manifest(6), file)
    assert file.exists()
    assert store.steps() == [5]
