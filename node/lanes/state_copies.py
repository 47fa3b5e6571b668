"""A lane's state from another lane, over lateral links: for one that lacks rounds which nobody can give any more.

A node that is told so asks its own stage in the other lane for the checkpoint after so many steps, and takes it among
its own, as it takes back a copy from its buddy (`node.checkpoints.copy_service`, whose frames, sender and receiver
these are). It asks again on each new connection, and goes on where the last one stopped. Who gives one keeps it until
the other lane has it, however many checkpoints are written meanwhile.

Why a whole checkpoint and not the weights alone: momenta, codebooks and what averaging carries from round to round are
as much a part of how a lane goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ...protocol.control_messages import (
    PART_BYTES_MAX,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
)
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.header import printable
from ..checkpoints.copy_receiver import CopyReceiver
from ..checkpoints.copy_sender import CopySender
from ..checkpoints.copy_store import QUEUED_MAX, CopySession
from ..checkpoints.manifest import CheckpointError, Manifest
from ..checkpoints.store import CheckpointStore
from ..worker_thread import Reporter

ASK_AGAIN_S = 5.0  # where nothing has come


class StateCopies:
    """Of one node. say: have a frame sent to a lane, when its link has room for it; refuse: end that connection, since
    a rule was broken. All on the event loop."""

    def __init__(
        self,
        store: CheckpointStore,
        *,
        part_bytes: int,
        parts_ahead: int,
        say: Callable[[int, CopyFrame], Awaitable[None]],
        refuse: Callable[[int, RemoteProtocolError], None],
        on_fault: Reporter,
    ) -> None:
        self._store, self._say, self._refuse, self._on_fault = store, say, refuse, on_fault
        parts: dict[str, Any] = {"part_bytes": min(part_bytes, PART_BYTES_MAX), "parts_ahead": parts_ahead}
        self._sender = CopySender(**parts, say=say)
        directory = store.directory.parent / "from-lanes"
        self._receiver = CopyReceiver(store, check=self._check, supersede=False, directory=directory)
        self._sessions: dict[int, CopySession] = {}  # by lane
        self._wanted: tuple[int, int] | None = None  # from which lane, after how many steps
        self._pinned: dict[int, int] = {}  # by lane: what it is given, or has asked for
        self._sending: dict[int, asyncio.Task[None]] = {}  # by lane
        self._heard = asyncio.Event()
        self._came = False
        self._came_s = float("-inf")  # when an offer or a part came last that was asked for
        self._completing = False  # all of it is here, and read once more

    # -- for who needs one --------------------------------------------------------------------------------------------

    async def fetch(self, lane: int, completed: int) -> None:
        """The state of this stage in that lane after so many steps, into the store. Waits for as long as it takes;
        raises CheckpointError where that lane cannot give it."""
        self._wanted, self._came = (lane, completed), False
        print(f"asks lane {lane} for its state after {completed} steps", flush=True)
        try:
            asked: CopySession | None = None
            while not self._came:
                self._heard.clear()
                session = self._sessions.get(lane)
                if session and session is asked and (self._store.stage, completed) in session.declined:
                    raise CheckpointError(f"lane {lane} cannot give its state after {completed} steps")
                if session and session is not asked:
                    asked = session
                    session.declined.discard((self._store.stage, completed))
                    await self._say(lane, CopyWanted(stage=self._store.stage, completed_steps=completed))
                await self._heard.wait()
        finally:
            self._wanted = None
            await asyncio.to_thread(self._receiver.drop)

    def _check(self, manifest: Manifest) -> None:
        if self._wanted is None or manifest.completed != self._wanted[1]:
            raise CheckpointError("it was not asked for")

    # -- connections --------------------------------------------------------------------------------------------------

    def met(self, lane: int) -> None:
        """That lane is connected."""
        self.parted(lane)
        session = self._sessions[lane] = CopySession()
        session.begin(partial(self._hear, lane, session), self._failed)
        self._heard.set()

    def parted(self, lane: int) -> None:
        """It is not any more."""
        if session := self._sessions.pop(lane, None):
            for job in session.jobs:
                job.cancel()
        self._heard.set()

    def let_go(self, lane: int) -> None:
        """That lane needs no state any more."""
        self._pinned.pop(lane, None)
        self._store.pinned = set(self._pinned.values())

    async def close(self) -> None:
        """Nothing is sent or written any more."""
        jobs = [job for session in self._sessions.values() for job in session.jobs]
        for lane in list(self._sessions):
            self.parted(lane)
        await asyncio.gather(*jobs, return_exceptions=True)
        await asyncio.to_thread(self._receiver.close)

    def receive(self, lane: int, frame: CopyFrame) -> None:
        """Take one frame of that lane, which may have to wait for the disk. Raises RemoteProtocolError for one too
        many."""
        if session := self._sessions.get(lane):
            try:
                session.inbox.put_nowait(frame)
            except asyncio.QueueFull:
                line = f"more than {QUEUED_MAX} frames on copies unasked"
                raise RemoteProtocolError(Fault.UNEXPECTED, line) from None

    @property
    def came_s(self) -> float:
        """When something came last that was asked for, or was found to be whole."""
        return asyncio.get_running_loop().time() if self._completing else self._came_s

    # -- within -------------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        self._on_fault("copy", f"a state for another lane: {error}")

    async def _hear(self, lane: int, session: CopySession) -> None:
        while True:
            frame = await session.inbox.get()
            try:
                await self._take(lane, session, frame)
            except RemoteProtocolError as error:
                self._refuse(lane, error)
                return
            session.moved.set()
            self._heard.set()

    async def _take(self, lane: int, session: CopySession, frame: CopyFrame) -> None:
        """Raises RemoteProtocolError for what that lane may not say."""
        stage, completed = frame.stage, getattr(frame, "completed_steps", 0)
        if stage != self._store.stage:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a copy of stage {stage} is not for stage {self._store.stage}")
        match frame:
            case CopyWanted():
                if before := self._sending.pop(lane, None):  # it was asked for otherwise, and that is void
                    before.cancel()
                    await asyncio.wait([before])
                self._pinned[lane] = completed
                self._store.pinned = set(self._pinned.values())
                session.outgoing[stage] = (completed, None)
                # Not read once before: who asked would wait for that, and reads all of it in the end.
                sending = partial(self._sender.send, lane, session, self._store, completed)
                self._sending[lane] = session.begin(sending, self._failed)
            case CopyProgress():
                if sending := session.under_way(stage, completed):
                    sending.progress(frame.offset)
                    if sending.done:
                        del session.outgoing[stage]
            case CopyDeclined():
                if session.outgoing.get(stage, (None,))[0] == completed:  # and not what was asked for since
                    del session.outgoing[stage]
                session.declined.add((stage, completed))
                self._on_fault("copy", f"lane {lane} and the state after {completed} steps: {frame.reason}")
            case CopyOffer() | CopyPart():
                await self._arrive(lane, session, frame)
            case _:
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__} of another lane on a copy")

    async def _arrive(self, lane: int, session: CopySession, frame: CopyOffer | CopyPart) -> None:
        """What was asked for is coming."""
        stage, completed = frame.stage, frame.completed_steps
        if (lane, completed) == self._wanted:
            self._came_s = asyncio.get_running_loop().time()
        try:
            if isinstance(frame, CopyPart):
                incoming = session.incoming.get(stage)
                if incoming is None or incoming.completed != completed:
                    return
                offset = await incoming.part(frame)
            else:
                if (lane, completed) != self._wanted:
                    raise CheckpointError("it was not asked for, or is not wanted any more")
                session.incoming.pop(stage, None)
                incoming = session.incoming[stage] = await self._receiver.begin(frame)
                offset = incoming.state.offset
            if offset is None:
                return
            await self._say(lane, CopyProgress(stage=stage, completed_steps=completed, offset=offset))
            if incoming.state.done:
                del session.incoming[stage]
                self._came = await self._complete()
        except (CheckpointError, OSError) as error:
            if (lane, completed) == self._wanted:
                session.incoming.pop(stage, None)
            session.declined.add((stage, completed))
            line = f"stage {stage} of another lane does not take it: {error}"
            self._on_fault("copy", f"the state of lane {lane} after {completed} steps: {error}")
            await self._say(lane, CopyDeclined(stage=stage, completed_steps=completed, reason=printable(line)))

    async def _complete(self) -> bool:
        self._completing = True
        try:
            return await asyncio.to_thread(self._receiver.complete) is not None
        finally:
            self._completing, self._came_s = False, asyncio.get_running_loop().time()
