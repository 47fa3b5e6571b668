"""Copies of checkpoints on a neighbour, so that a disk that is lost with its machine is not the loss of the stage.

Each stage has a *buddy*, the stage below it (the last one: the stage above), and trickles its newest checkpoint there
while the link between them has nothing else to do: a part leaves only when no tensor waits, and takes its time from the
same token bucket. Who takes a stage's place on a machine that has less than the buddy asks for what it lacks, before it
says from which steps it could go on. Where both machines see one directory nothing is sent: the buddy looks there.

The frames travel on the control stream (`protocol.copies` says why, and who may send what), with a row of their own in
the account. Copies lie in <checkpoint.directory>/copies/stage-<i>/, as checkpoints do.

Why not erasure codes over all stages, or a store that everybody writes to: with a chain of thin links a copy over one
hop is the least traffic that survives the loss of any one machine. Two neighbours lost at once may be one too many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import IO, Any

from ..protocol.control import (
    PART_BYTES_MAX,
    CopiesHeld,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
)
from ..protocol.copies import Sending
from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.header import printable
from ..protocol.rewind import Side
from .arrivals import Arrivals
from .checkpoint import STATE, CheckpointStore
from .flow import Reporter
from .manifest import CheckpointError, Manifest, parse_manifest

QUEUED_MAX = 16  # frames from one neighbour that wait for the disk; it may send `PARTS_AHEAD` unasked
BROUGHT_BACK = 2  # of the newest copies: the others may not have completed the very newest yet

Say = Callable[[Side, CopyFrame], Awaitable[None]]


def buddy_side(stage: int, stages: int) -> Side | None:
    """Where the copies of `stage` are kept; a lone stage has nobody."""
    if stages == 1:
        return None
    return "below" if stage < stages - 1 else "above"


@dataclass(slots=True)
class _Talk:
    """What belongs to one connection."""

    inbox: asyncio.Queue[CopyFrame] = field(default_factory=lambda: asyncio.Queue(QUEUED_MAX))
    outgoing: dict[int, tuple[int, Sending]] = field(default_factory=dict)  # stage -> (completed, how far)
    declined: set[tuple[int, int]] = field(default_factory=set)  # (stage, completed)
    jobs: set[asyncio.Task[None]] = field(default_factory=set)


class Copies:
    """The copies that one node sends, keeps and asks for.

    store: the node's own. say: have a frame sent to a side; for a part it waits until the link is idle. refuse: end the
    connection to a side, which broke a rule. Frames come in through `receive`, and `met` and `parted` say whether
    anybody is there; all on the event loop.
    """

    def __init__(
        self,
        *,
        stage: int,
        stages: int,
        store: CheckpointStore,
        bytes_max: int,
        part_bytes: int,
        say: Say,
        refuse: Callable[[Side, RemoteProtocolError], None],
        on_fault: Reporter,
        on_copied: Callable[[int, int], None],
    ) -> None:
        self.side: Side | None = buddy_side(stage, stages)
        self._stage = stage
        self._store, self._directory = store, store.directory.parent
        self._bytes_max, self._part_bytes = bytes_max, min(part_bytes, PART_BYTES_MAX)
        self._say, self._refuse_peer, self._on_fault, self._on_copied = say, refuse, on_fault, on_copied
        self._kept: dict[Side, CheckpointStore] = {}  # of whom this node is the buddy
        others: dict[Side, tuple[int, Side]] = {"above": (stage - 1, "below"), "below": (stage + 1, "above")}
        for side, (other, towards_us) in others.items():
            if 0 <= other < stages and buddy_side(other, stages) == towards_us:
                self._kept[side] = CheckpointStore(
                    self._directory / "copies", stage=other, fingerprint=store.fingerprint
                )
        self._talks: dict[Side, _Talk] = {}
        self._closed = False
        self._arrivals = Arrivals(self._directory)
        self._held: set[int] | None = None  # what the buddy has of ours; None: it has not said yet
        self._wanted: set[int] = set()  # what we asked for
        self._offers = asyncio.Event()  # there may be something to send to the buddy
        self._moved = asyncio.Event()  # something came

    # -- what the node does ---------------------------------------------------------------------------------------

    def written(self) -> None:
        """There is a new checkpoint on the disk."""
        self._offers.set()

    def met(self, side: Side) -> None:
        """A neighbour is connected."""
        if self._closed:
            return
        talk = self._talks[side] = _Talk()
        self._begin(talk, self._hear, side, talk)
        if side in self._kept:
            self._begin(talk, self._tell_held, side)
        if side == self.side:
            self._held = None
            self._begin(talk, self._trickle, side, talk)

    def parted(self, side: Side) -> None:
        """Its connection is gone."""
        talk = self._talks.pop(side, None)
        if talk:
            for job in talk.jobs:
                job.cancel()
        self._moved.set()

    async def close(self) -> None:
        """Nothing is sent or written any more."""
        self._closed = True
        jobs = [job for talk in self._talks.values() for job in talk.jobs]
        for side in list(self._talks):
            self.parted(side)
        await asyncio.gather(*jobs, return_exceptions=True)
        self._arrivals.clear()

    async def fetch(self, have: list[int], *, patience_s: float) -> list[int]:
        """Bring back what the buddy has and this disk lacks of the newest checkpoints; returns the steps that came.

        `have`: completed steps, newest first, of what is intact here. Waits for the buddy to be there, and gives up,
        loudly, when nothing has come for `patience_s`.
        """
        if self.side is None:
            return []
        await asyncio.to_thread(self._arrivals.sweep)
        came: list[int] = []
        asked: _Talk | None = None
        while True:
            talk = self._talks.get(self.side)
            if talk and self._held is not None:
                newest = sorted(self._held | set(have), reverse=True)[:BROUGHT_BACK]
                missing = [step for step in newest if step not in have]
                came = sorted(set(came) | (set(missing) & set(self._store.steps())), reverse=True)
                left = [step for step in missing if step not in came and (self._stage, step) not in talk.declined]
                if not left:
                    return came
                if asked is not talk or left[0] not in self._wanted:
                    asked = talk
                    self._wanted.add(left[0])
                    print(f"asks stage {self._peer(self.side)} for its copy after {left[0]} steps", flush=True)
                    await self._say(self.side, CopyWanted(stage=self._stage, completed_steps=left[0]))
            self._moved.clear()
            try:
                async with asyncio.timeout(patience_s):
                    await self._moved.wait()
            except TimeoutError:
                line = f"waited {patience_s:g} s in vain for copies of checkpoints at stage {self._peer(self.side)}"
                self._on_fault("timeout", f"{line}; goes on with what is on this disk: steps {have or 'none'}")
                return came

    def _peer(self, side: Side) -> int:
        return self._stage + (1 if side == "below" else -1)

    def _begin(self, talk: _Talk, job: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        async def told() -> None:
            try:
                await job(*arguments)
            except (CheckpointError, OSError) as error:
                self._on_fault("checkpoint", f"copies of checkpoints: {error}")

        task = asyncio.create_task(told())
        talk.jobs.add(task)
        task.add_done_callback(talk.jobs.discard)

    # -- sending --------------------------------------------------------------------------------------------------

    async def _trickle(self, side: Side, talk: _Talk) -> None:
        """Keep the buddy's copy as new as the link allows."""
        while True:
            self._offers.clear()
            completed = max(await asyncio.to_thread(self._store.steps), default=0)
            known = self._held or set()
            if completed > max(known, default=0) and (self._stage, completed) not in talk.declined:
                await self._send(side, talk, self._store, completed)
            else:
                await self._offers.wait()

    async def _send(self, side: Side, talk: _Talk, store: CheckpointStore, completed: int) -> None:
        """One checkpoint, until the other side has it or does not want it."""
        stage, path = store.stage, store.path(completed)
        try:
            manifest = await asyncio.to_thread(store.manifest, completed)
            with (path / STATE).open("rb") as file:
                sending = Sending(size=manifest.file_bytes, part_bytes=self._part_bytes)
                talk.outgoing[stage] = (completed, sending)
                offer = CopyOffer(stage=stage, completed_steps=completed, manifest=manifest.rendered())
                await self._say(side, offer)
                while stage in talk.outgoing:
                    if part := sending.next():
                        data = await asyncio.to_thread(_read_at, file, *part)
                        frame = CopyPart(stage=stage, completed_steps=completed, offset=part[0], data=data)
                        await self._say(side, frame)
                    else:
                        self._moved.clear()
                        await self._moved.wait()
        except (CheckpointError, OSError) as error:
            talk.declined.add((stage, completed))
            reason = printable(f"it cannot be read: {error}")
            await self._say(side, CopyDeclined(stage=stage, completed_steps=completed, reason=reason))
            raise
        finally:
            talk.outgoing.pop(stage, None)

    async def _tell_held(self, side: Side) -> None:
        steps = await asyncio.to_thread(self._steps_of, self._kept[side])
        await self._say(side, CopiesHeld(stage=self._kept[side].stage, steps=steps))

    def _shared(self, kept: CheckpointStore) -> CheckpointStore:
        """Where that stage writes itself, if it sees the same directory."""
        return CheckpointStore(self._directory, stage=kept.stage, fingerprint=kept.fingerprint)

    def _steps_of(self, kept: CheckpointStore) -> tuple[int, ...]:
        return tuple(sorted({*kept.steps(), *self._shared(kept).steps()}, reverse=True))

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, side: Side, frame: CopyFrame) -> None:
        """Take one frame from the neighbour on that side, which may have to wait for the disk. Raises
        RemoteProtocolError for one too many."""
        talk = self._talks.get(side)
        if talk is None:  # closed
            return
        try:
            talk.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"more than {QUEUED_MAX} frames on copies unasked") from None

    async def _hear(self, side: Side, talk: _Talk) -> None:
        while True:
            frame = await talk.inbox.get()
            try:
                await self._take(side, talk, frame)
            except RemoteProtocolError as error:
                self._refuse_peer(side, error)
                return
            self._moved.set()

    async def _take(self, side: Side, talk: _Talk, frame: CopyFrame) -> None:
        """Raises RemoteProtocolError for what that neighbour may not say."""
        mine, kept = side == self.side and frame.stage == self._stage, self._kept.get(side)
        store = self._store if mine else kept
        if store is None or frame.stage != store.stage:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a copy of stage {frame.stage} is not for this stage")
        match frame:
            case CopiesHeld() if mine:
                self._take_held(talk, set(frame.steps))
            case CopyWanted() if not mine:
                here = await asyncio.to_thread(store.steps)
                source = store if frame.completed_steps in here else self._shared(store)
                if frame.stage not in talk.outgoing:
                    self._begin(talk, self._send, side, talk, source, frame.completed_steps)
            case CopyOffer():
                await self._take_offer(side, frame, store)
            case CopyPart():
                await self._take_part(side, frame, store)
            case CopyProgress():
                completed, sending = talk.outgoing.get(frame.stage, (None, None))
                if sending and completed == frame.completed_steps:
                    sending.progress(frame.offset)
                    if sending.done and not mine:  # of a restored one nobody says that it is held
                        del talk.outgoing[frame.stage]
            case CopyDeclined():
                talk.declined.add((frame.stage, frame.completed_steps))
                talk.outgoing.pop(frame.stage, None)
                which = f"the copy of stage {frame.stage} after {frame.completed_steps} steps"
                self._on_fault("copy", f"stage {self._peer(side)} and {which}: {frame.reason}")
            case _:
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__} from {side} on a copy")

    def _take_held(self, talk: _Talk, steps: set[int]) -> None:
        completed, sending = talk.outgoing.get(self._stage, (None, None))
        if sending and completed in steps:
            del talk.outgoing[self._stage]
            self._on_copied(completed or 0, sending.size if sending.done else 0)
        self._held = steps
        self._offers.set()

    async def _take_offer(self, side: Side, frame: CopyOffer, store: CheckpointStore) -> None:
        restoring, completed = store is self._store, frame.completed_steps
        try:
            manifest = parse_manifest(frame.manifest, where="the manifest of a copy", remedy="it is not taken")
            store.check_kinship(manifest, "a copy that was offered")
            self._refuse(manifest, frame, restoring=restoring)
            if not restoring and completed in await asyncio.to_thread(self._steps_of, store):
                return await self._tell_held(side)
            offset = await asyncio.to_thread(self._arrivals.expect, manifest)
        except (CheckpointError, OSError) as error:
            return await self._decline(side, frame, error)
        await self._say(side, CopyProgress(stage=frame.stage, completed_steps=completed, offset=offset))
        return await self._complete(side, frame, store)

    def _refuse(self, manifest: Manifest, frame: CopyOffer, *, restoring: bool) -> None:
        if manifest.completed != frame.completed_steps:
            raise CheckpointError(f"its manifest is after {manifest.completed} steps")
        if restoring and manifest.completed not in self._wanted:
            raise CheckpointError("it was not asked for")
        if not restoring and manifest.file_bytes > self._bytes_max:
            raise CheckpointError(
                f"it has {manifest.file_bytes} bytes, checkpoint.copy_bytes_max there is {self._bytes_max}"
            )

    async def _take_part(self, side: Side, frame: CopyPart, store: CheckpointStore) -> None:
        try:
            offset = await asyncio.to_thread(self._arrivals.part, frame)
        except OSError as error:
            return await self._decline(side, frame, error)
        if offset is None:  # of one that was declined while it was under way
            return None
        await self._say(side, CopyProgress(stage=frame.stage, completed_steps=frame.completed_steps, offset=offset))
        return await self._complete(side, frame, store)

    async def _complete(self, side: Side, frame: CopyOffer | CopyPart, store: CheckpointStore) -> None:
        """If all bytes are here: are they the right ones?"""
        try:
            whole = await asyncio.to_thread(self._arrivals.settle, frame.stage, store)
        except (CheckpointError, OSError) as error:
            return await self._decline(side, frame, error)
        if whole and store is not self._store:
            await self._tell_held(side)
        return None

    async def _decline(self, side: Side, frame: CopyOffer | CopyPart, error: Exception) -> None:
        line = f"stage {self._stage} does not take it: {error}"
        self._on_fault("copy", f"a copy of stage {frame.stage} after {frame.completed_steps} steps: {line}")
        if talk := self._talks.get(side):
            talk.declined.add((frame.stage, frame.completed_steps))
        reason = printable(line)
        await self._say(side, CopyDeclined(stage=frame.stage, completed_steps=frame.completed_steps, reason=reason))


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise OSError(f"{file.name} ends at byte {offset + len(data)}")
    return data
