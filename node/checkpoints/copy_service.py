"""Copies of checkpoints on a neighbour, so that a stage is not lost when a disk is lost with its machine.

Each stage has a *buddy*, the stage below it (the last one: the stage above), or where lanes are one group the next node
of its chain (`protocol.group_chain`), which may be the same stage of another lane. It sends its newest checkpoint there
while the link between them has nothing else to do: a part leaves only when no tensor waits, and takes its time from the
same token bucket. A process that takes a stage's place asks the buddy for what its own disk lacks, before it says from
which steps it could go on. If both machines see one directory, nothing is sent: the buddy looks there.

The frames travel on the control stream (`protocol.copy_transfer` says why, and who may send what), with a row of their
own in the account. Copies are in <checkpoint.directory>/copies/stage-<i>/, laid out as checkpoints are. This module
decides which side sends what when. copy_sender.py sends a copy, copy_receiver.py receives one, and copy_restore.py gets
them back.

Why not erasure codes over all stages, or a store that everybody writes to: with a chain of thin links a copy over one
hop is the least traffic that survives the loss of any one machine. The loss of two neighbours at once may lose a stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from ...protocol.control_messages import (
    PART_BYTES_MAX,
    CopiesHeld,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
)
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.group_chain import GroupChain
from ...protocol.header import printable
from ...protocol.rollback_actions import Side
from ..worker_thread import Reporter
from .copy_restore import CopyRestore
from .copy_sender import CopySender, Say
from .copy_store import QUEUED_MAX, CopySession, CopyStore
from .durable_files import sweep_incoming
from .manifest import CheckpointError
from .store import CheckpointStore

SAID_EVERY_S = 1.0  # that a copy which is asked for is still being read
SAID_FOR_S = 900.0  # at most: a disk that hangs is not worth a run that could go on from an older copy
DECLINED_MAX = 64  # on one connection; who is declined so often does not listen


def buddy_side(stage: int, stages: int) -> Side | None:
    """Where the copies of `stage` are kept; a lone stage has nobody."""
    if stages == 1:
        return None
    return "below" if stage < stages - 1 else "above"


class CopyService:
    """The copies that one node sends, keeps and asks for.

    store: the node's own. bytes_max: the largest state of a neighbour that is kept; 0: this node neither keeps nor
    sends copies. say: have a frame sent to a side; for a part it waits until the link is idle. refuse: end the
    connection to a side, which broke a rule. on_copy(completed, bytes, fetched): a copy of ours is whole, at the buddy
    or here, and so many bytes of it crossed; 0: nothing had to be sent. on_held(completed): the newest of our states
    that the buddy has a copy of; 0: none. chain: in which stages are positions. paused_ago_s: how long ago the last
    pause of this process ended. Frames come in through `receive`, and `met` and `parted` say whether anybody is there;
    all on the event loop.
    """

    def __init__(
        self,
        *,
        stage: int,
        stages: int,
        store: CheckpointStore,
        bytes_max: int,
        part_bytes: int,
        parts_ahead: int,
        say: Say,
        refuse: Callable[[Side, RemoteProtocolError], None],
        on_fault: Reporter,
        on_copy: Callable[[int, int, bool], None],
        on_held: Callable[[int], None],
        paused_ago_s: Callable[[], float] = lambda: float("inf"),
        chain: GroupChain | None = None,
    ) -> None:
        self.side: Side | None = buddy_side(stage, stages)
        self._stage, self._store, self._enabled = stage, store, bytes_max > 0
        self._sender = CopySender(part_bytes=min(part_bytes, PART_BYTES_MAX), parts_ahead=parts_ahead, say=say)
        self._say, self._refuse, self._on_fault = say, refuse, on_fault
        self._on_copy, self._on_held = on_copy, on_held
        self._name_of = chain.name_of if chain else "stage {}".format
        own_lane = chain.place(stage).lane if chain else 0
        self._stores: dict[Side, CopyStore] = {}
        others: dict[Side, tuple[int, Side]] = {"above": (stage - 1, "below"), "below": (stage + 1, "above")}
        for side, (other, towards_us) in others.items():
            if 0 <= other < stages and buddy_side(other, stages) == towards_us:
                place = chain.place(other) if chain else None
                self._stores[side] = CopyStore(other, store, bytes_max, place=place, own_lane=own_lane)
        self._sessions: dict[Side, CopySession] = {}
        self._restore: CopyRestore | None = None
        if self.side:
            peer = self._name_of(self._peer(self.side))
            given = {"say": say, "on_fault": on_fault, "paused_ago_s": paused_ago_s}
            self._restore = CopyRestore(store, self.side, self._sessions, stage=stage, peer=peer, **given)
        self._closed = False
        self._newest = 0  # of our checkpoints: the one that was written last
        self._begun: tuple[int, int] | None = None  # a copy of ours, and what the buddy had of it before we began

    # -- what the node does ---------------------------------------------------------------------------------------

    def written(self, completed: int) -> None:
        """This checkpoint is on the disk now, and the one to keep a copy of."""
        self._newest = completed
        if self.side in self._sessions:
            self._sessions[self.side].offers.set()
            self._tell_newest(self._sessions[self.side])

    def met(self, side: Side) -> None:
        """A neighbour is connected."""
        if self._closed:
            return
        session = self._sessions[side] = CopySession()
        session.begin(partial(self._hear, side, session), self._failed)
        if side in self._stores:
            session.begin(partial(self._tell_held, side), self._failed)
        if self._restore and side == self.side:
            self._restore.heard.set()
            if self._enabled:
                session.begin(partial(self._trickle, side, session), self._failed)

    def parted(self, side: Side) -> None:
        """Its connection is gone."""
        if session := self._sessions.pop(side, None):
            for job in session.jobs:
                job.cancel()
        if self._restore and side == self.side:
            self._restore.heard.set()

    async def close(self) -> None:
        """Nothing is sent or written any more."""
        self._closed = True
        jobs = [job for session in self._sessions.values() for job in session.jobs]
        for side in list(self._sessions):
            self.parted(side)
        await asyncio.gather(*jobs, return_exceptions=True)
        for room in (self._restore, *self._stores.values()):
            if room:
                await asyncio.to_thread(room.receiver.close)

    async def fetch(self, have: list[int], *, deadline_s: float, replacement_s: float) -> bool:
        """Bring back what the buddy has and this disk lacks of the newest checkpoints; whether anything came.

        `have`: completed steps of what is intact here. Waits `replacement_s` for a buddy that is not there, without
        whom nobody could go on anyway; gives up, loudly, when one that is there sends nothing for `deadline_s`.
        """
        if self._restore is None or not self._enabled:
            return False
        await asyncio.to_thread(sweep_incoming, self._store.directory.parent)
        return await self._restore.fetch(have, deadline_s=deadline_s, replacement_s=replacement_s)

    def give_up(self) -> None:
        """The run is over: what is fetched now is not waited for any more."""
        if self._restore:
            self._restore.give_up()

    def _peer(self, side: Side) -> int:
        return self._stage + (1 if side == "below" else -1)

    def _failed(self, error: Exception) -> None:
        self._on_fault("copy", f"copies of checkpoints: {error}")

    # -- sending --------------------------------------------------------------------------------------------------

    async def _trickle(self, side: Side, session: CopySession) -> None:
        """Keep the buddy's copy as new as the link allows."""
        while True:
            session.offers.clear()
            completed = self._newest
            lacks = session.held is not None and completed and completed not in session.held
            if lacks and (self._stage, completed) not in session.declined:
                session.outgoing[self._stage] = (completed, None)
                try:
                    await self._sender.send(side, session, self._store, completed, stage=self._stage)
                except (CheckpointError, OSError) as error:
                    self._on_fault("copy", f"the copy after {completed} steps: {error}")
            else:
                await session.offers.wait()

    async def _tell_held(self, side: Side) -> None:
        store_of_copies = self._stores[side]
        await self._say(
            side, CopiesHeld(stage=store_of_copies.stage, steps=await asyncio.to_thread(store_of_copies.steps))
        )

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, side: Side, frame: CopyFrame) -> None:
        """Take one frame from the neighbour on that side, which may have to wait for the disk. Raises
        RemoteProtocolError for one too many."""
        session = self._sessions.get(side)
        if session is None:  # closed
            return
        try:
            session.inbox.put_nowait(frame)
        except asyncio.QueueFull:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"more than {QUEUED_MAX} frames on copies unasked") from None

    async def _hear(self, side: Side, session: CopySession) -> None:
        while True:
            frame = await session.inbox.get()
            try:
                await self._take(side, session, frame)
                if len(session.declined) > DECLINED_MAX:
                    raise RemoteProtocolError(Fault.UNEXPECTED, f"more than {DECLINED_MAX} copies that are declined")
            except RemoteProtocolError as error:
                self._refuse(side, error)
                return
            except (CheckpointError, OSError) as error:
                self._on_fault("copy", f"copies of checkpoints: {error}")
            session.moved.set()

    async def _take(self, side: Side, session: CopySession, frame: CopyFrame) -> None:
        """Raises RemoteProtocolError for what that neighbour may not say."""
        mine, store_of_copies = side == self.side and frame.stage == self._stage, self._stores.get(side)
        if not mine and (store_of_copies is None or frame.stage != store_of_copies.stage):
            line = f"a copy of {self._name_of(frame.stage)} is not for this stage"
            raise RemoteProtocolError(Fault.UNEXPECTED, line)
        match frame:
            case CopiesHeld() if mine:
                self._take_held(session, set(frame.steps))
            case CopyWanted() if store_of_copies and not mine:
                if frame.stage not in session.outgoing:
                    session.outgoing[frame.stage] = (frame.completed_steps, None)
                    await self._give_back(side, session, store_of_copies, frame.completed_steps)
            case CopyOffer() | CopyPart():
                await self._arrive(side, session, frame, store_of_copies if not mine else None)
            case CopyProgress():
                if sending := session.under_way(frame.stage, frame.completed_steps):
                    sending.progress(frame.offset)
                    if mine and (self._begun is None or self._begun[0] != frame.completed_steps):
                        self._begun = frame.completed_steps, frame.offset
                    if sending.done and not mine:  # of a restored one nobody says that it is held
                        del session.outgoing[frame.stage]
            case CopyDeclined():
                if session.under_way(frame.stage, frame.completed_steps):
                    del session.outgoing[frame.stage]
                elif not (mine and self._restore and frame.completed_steps in self._restore.wanted):
                    return
                session.declined.add((frame.stage, frame.completed_steps))
                which = f"the copy of {self._name_of(frame.stage)} after {frame.completed_steps} steps"
                self._on_fault("copy", f"{self._name_of(self._peer(side))} and {which}: {frame.reason}")
            case _:
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__} from {side} on a copy")
        if mine and self._restore:
            self._restore.heard.set()

    def _take_held(self, session: CopySession, steps: set[int]) -> None:
        completed, sending = session.outgoing.get(self._stage, (None, None))
        if completed in steps and sending:
            del session.outgoing[self._stage]
            had = self._begun[1] if self._begun and self._begun[0] == completed else 0
            self._on_copy(completed, sending.size - had if sending.done else 0, False)
        session.held = steps
        self._tell_newest(session)
        session.offers.set()

    def _tell_newest(self, session: CopySession) -> None:
        """What lies after the newest checkpoint is of training that was undone."""
        self._on_held(max((step for step in session.held or () if step <= self._newest), default=0))

    async def _give_back(self, side: Side, session: CopySession, store_of_copies: CopyStore, completed: int) -> None:
        try:
            source = await asyncio.to_thread(store_of_copies.source, completed)
        except CheckpointError:
            del session.outgoing[store_of_copies.stage]
            raise

        stage = store_of_copies.stage
        send = partial(self._sender.send, side, session, source, completed, stage=stage, verify=True)
        sending = session.begin(send, self._failed)
        telling = session.begin(partial(self._say_while_read, side, session, store_of_copies, completed), self._failed)
        sending.add_done_callback(lambda _: telling.cancel())

    async def _say_while_read(
        self, side: Side, session: CopySession, store_of_copies: CopyStore, completed: int
    ) -> None:
        """What is held, again and again until the first part may go: before it does, all of the copy is read once, and
        whoever hears nothing for that long gives up."""
        until_s = asyncio.get_running_loop().time() + SAID_FOR_S
        while session.outgoing.get(store_of_copies.stage) == (completed, None):
            await self._tell_held(side)
            await asyncio.sleep(SAID_EVERY_S)
            if asyncio.get_running_loop().time() > until_s:
                return

    async def _arrive(
        self, side: Side, session: CopySession, frame: CopyOffer | CopyPart, store_of_copies: CopyStore | None
    ) -> None:
        """A copy of a ward's, or of our own (None), is coming."""
        room = store_of_copies or self._restore
        assert room
        stage, completed = frame.stage, frame.completed_steps
        try:
            if isinstance(frame, CopyPart):
                incoming = session.incoming.get(stage)
                if incoming is None or incoming.completed != completed:  # declined while it was under way
                    return
                offset = await incoming.part(frame)
            else:
                session.incoming.pop(stage, None)
                if store_of_copies and completed in await asyncio.to_thread(store_of_copies.steps):
                    await self._tell_held(side)
                    return
                incoming = session.incoming[stage] = await room.receiver.begin(frame)
                offset = incoming.state.offset
            if offset is None:
                return
            await self._say(side, CopyProgress(stage=stage, completed_steps=completed, offset=offset))
            if not incoming.state.done:
                return
            del session.incoming[stage]
            if store_of_copies is None:
                await self._complete_own()
            elif await asyncio.to_thread(store_of_copies.receiver.complete) is not None:
                await self._tell_held(side)
        except (CheckpointError, OSError) as error:
            session.incoming.pop(stage, None)
            session.declined.add((stage, completed))
            line = f"{self._name_of(self._stage)} does not take it: {error}"
            self._on_fault("copy", f"a copy of {self._name_of(stage)} after {completed} steps: {line}")
            await self._say(side, CopyDeclined(stage=stage, completed_steps=completed, reason=printable(line)))

    async def _complete_own(self) -> None:
        assert self._restore
        self._restore.completing = True
        try:
            came = await asyncio.to_thread(self._restore.receiver.complete)
        finally:
            self._restore.completing = False
        if came is not None:
            completed, size = came
            self._restore.came.add(completed)
            self._on_copy(completed, size, True)
