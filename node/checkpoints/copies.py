"""Copies of checkpoints on a neighbour, so that a disk that is lost with its machine is not the loss of the stage.

Each stage has a *buddy*, the stage below it (the last one: the stage above), and trickles its newest checkpoint there
while the link between them has nothing else to do: a part leaves only when no tensor waits, and takes its time from the
same token bucket. Who takes a stage's place on a machine that has less than the buddy asks for what it lacks, before it
says from which steps it could go on. Where both machines see one directory nothing is sent: the buddy looks there.

The frames travel on the control stream (`protocol.copies` says why, and who may send what), with a row of their own in
the account. Copies lie in <checkpoint.directory>/copies/stage-<i>/, as checkpoints do. Here is who says what when; how
one goes is in departures.py, how one comes in arrivals.py, and what is asked back in recall.py.

Why not erasure codes over all stages, or a store that everybody writes to: with a chain of thin links a copy over one
hop is the least traffic that survives the loss of any one machine. Two neighbours lost at once may be one too many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ...protocol.control import (
    PART_BYTES_MAX,
    CopiesHeld,
    CopyDeclined,
    CopyFrame,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
)
from ...protocol.effects import Side
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.header import printable
from ..flow import Reporter
from .departures import Departures, Say
from .durable import sweep_incoming
from .manifest import CheckpointError
from .recall import Recall
from .store import CheckpointStore
from .wards import QUEUED_MAX, Talk, Ward

DECLINED_MAX = 64  # on one connection; who is declined so often does not listen


def buddy_side(stage: int, stages: int) -> Side | None:
    """Where the copies of `stage` are kept; a lone stage has nobody."""
    if stages == 1:
        return None
    return "below" if stage < stages - 1 else "above"


class Copies:
    """The copies that one node sends, keeps and asks for.

    store: the node's own. bytes_max: the largest state of a neighbour that is kept; 0: this node neither keeps nor
    sends copies. say: have a frame sent to a side; for a part it waits until the link is idle. refuse: end the
    connection to a side, which broke a rule. on_copy(completed, bytes, fetched): a copy of ours is whole, at the buddy
    or here; 0 bytes: nothing had to be sent. on_held(completed): the newest of our states that the buddy has a copy
    of; 0: none. Frames come in through `receive`, and `met` and `parted` say whether
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
        parts_ahead: int,
        say: Say,
        refuse: Callable[[Side, RemoteProtocolError], None],
        on_fault: Reporter,
        on_copy: Callable[[int, int, bool], None],
        on_held: Callable[[int], None],
    ) -> None:
        self.side: Side | None = buddy_side(stage, stages)
        self._stage, self._store, self._enabled = stage, store, bytes_max > 0
        self._departures = Departures(part_bytes=min(part_bytes, PART_BYTES_MAX), parts_ahead=parts_ahead, say=say)
        self._say, self._refuse, self._on_fault = say, refuse, on_fault
        self._on_copy, self._on_held = on_copy, on_held
        self._wards: dict[Side, Ward] = {}
        others: dict[Side, tuple[int, Side]] = {"above": (stage - 1, "below"), "below": (stage + 1, "above")}
        for side, (other, towards_us) in others.items():
            if 0 <= other < stages and buddy_side(other, stages) == towards_us:
                self._wards[side] = Ward(other, store, bytes_max)
        self._talks: dict[Side, Talk] = {}
        self._recall = Recall(store, self.side, self._talks, say=say, on_fault=on_fault) if self.side else None
        self._closed = False
        self._newest = 0  # of our checkpoints: the one that was written last

    # -- what the node does ---------------------------------------------------------------------------------------

    def written(self, completed: int) -> None:
        """This checkpoint is on the disk now, and the one to keep a copy of."""
        self._newest = completed
        if self.side in self._talks:
            self._talks[self.side].offers.set()
            self._tell_newest(self._talks[self.side])

    def met(self, side: Side) -> None:
        """A neighbour is connected."""
        if self._closed:
            return
        talk = self._talks[side] = Talk()
        self._begin(talk, self._hear, side, talk)
        if side in self._wards:
            self._begin(talk, self._tell_held, side)
        if self._recall and side == self.side:
            self._recall.heard.set()
            if self._enabled:
                self._begin(talk, self._trickle, side, talk)

    def parted(self, side: Side) -> None:
        """Its connection is gone."""
        if talk := self._talks.pop(side, None):
            for job in talk.jobs:
                job.cancel()
        if self._recall and side == self.side:
            self._recall.heard.set()

    async def close(self) -> None:
        """Nothing is sent or written any more."""
        self._closed = True
        jobs = [job for talk in self._talks.values() for job in talk.jobs]
        for side in list(self._talks):
            self.parted(side)
        await asyncio.gather(*jobs, return_exceptions=True)
        for room in (self._recall, *self._wards.values()):
            if room:
                await asyncio.to_thread(room.arrivals.close)

    async def fetch(self, have: list[int], *, patience_s: float, replacement_s: float) -> bool:
        """Bring back what the buddy has and this disk lacks of the newest checkpoints; whether anything came.

        `have`: completed steps of what is intact here. Waits `replacement_s` for a buddy that is not there, without
        whom nobody could go on anyway; gives up, loudly, when one that is there sends nothing for `patience_s`.
        """
        if self._recall is None or not self._enabled:
            return False
        await asyncio.to_thread(sweep_incoming, self._store.directory.parent)
        return await self._recall.fetch(have, patience_s=patience_s, replacement_s=replacement_s)

    def _peer(self, side: Side) -> int:
        return self._stage + (1 if side == "below" else -1)

    def _begin(self, talk: Talk, job: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        async def told() -> None:
            try:
                await job(*arguments)
            except (CheckpointError, OSError) as error:
                self._on_fault("copy", f"copies of checkpoints: {error}")

        task = asyncio.create_task(told())
        talk.jobs.add(task)
        task.add_done_callback(talk.jobs.discard)

    # -- sending --------------------------------------------------------------------------------------------------

    async def _trickle(self, side: Side, talk: Talk) -> None:
        """Keep the buddy's copy as new as the link allows."""
        while True:
            talk.offers.clear()
            completed = self._newest
            lacks = talk.held is not None and completed and completed not in talk.held
            if lacks and (self._stage, completed) not in talk.declined:
                talk.outgoing[self._stage] = (completed, None)
                try:
                    await self._departures.send(side, talk, self._store, completed)
                except (CheckpointError, OSError) as error:
                    self._on_fault("copy", f"the copy after {completed} steps: {error}")
            else:
                await talk.offers.wait()

    async def _tell_held(self, side: Side) -> None:
        ward = self._wards[side]
        await self._say(side, CopiesHeld(stage=ward.stage, steps=await asyncio.to_thread(ward.steps)))

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

    async def _hear(self, side: Side, talk: Talk) -> None:
        while True:
            frame = await talk.inbox.get()
            try:
                await self._take(side, talk, frame)
                if len(talk.declined) > DECLINED_MAX:
                    raise RemoteProtocolError(Fault.UNEXPECTED, f"more than {DECLINED_MAX} copies that are declined")
            except RemoteProtocolError as error:
                self._refuse(side, error)
                return
            except (CheckpointError, OSError) as error:
                self._on_fault("copy", f"copies of checkpoints: {error}")
            talk.moved.set()

    async def _take(self, side: Side, talk: Talk, frame: CopyFrame) -> None:
        """Raises RemoteProtocolError for what that neighbour may not say."""
        mine, ward = side == self.side and frame.stage == self._stage, self._wards.get(side)
        if not mine and (ward is None or frame.stage != ward.stage):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a copy of stage {frame.stage} is not for this stage")
        match frame:
            case CopiesHeld() if mine:
                self._take_held(talk, set(frame.steps))
            case CopyWanted() if ward and not mine:
                if frame.stage not in talk.outgoing:
                    talk.outgoing[frame.stage] = (frame.completed_steps, None)
                    await self._give_back(side, talk, ward, frame.completed_steps)
            case CopyOffer() | CopyPart():
                await self._arrive(side, talk, frame, ward if not mine else None)
            case CopyProgress():
                if sending := talk.under_way(frame.stage, frame.completed_steps):
                    sending.progress(frame.offset)
                    if sending.done and not mine:  # of a restored one nobody says that it is held
                        del talk.outgoing[frame.stage]
            case CopyDeclined():
                if talk.under_way(frame.stage, frame.completed_steps):
                    del talk.outgoing[frame.stage]
                elif not (mine and self._recall and frame.completed_steps in self._recall.wanted):
                    return
                talk.declined.add((frame.stage, frame.completed_steps))
                which = f"the copy of stage {frame.stage} after {frame.completed_steps} steps"
                self._on_fault("copy", f"stage {self._peer(side)} and {which}: {frame.reason}")
            case _:
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__} from {side} on a copy")
        if mine and self._recall:
            self._recall.heard.set()

    def _take_held(self, talk: Talk, steps: set[int]) -> None:
        completed, sending = talk.outgoing.get(self._stage, (None, None))
        if completed in steps and sending:
            del talk.outgoing[self._stage]
            self._on_copy(completed, sending.size if sending.done else 0, False)
        talk.held = steps
        self._tell_newest(talk)
        talk.offers.set()

    def _tell_newest(self, talk: Talk) -> None:
        """What lies after the newest checkpoint is of training that was undone."""
        self._on_held(max((step for step in talk.held or () if step <= self._newest), default=0))

    async def _give_back(self, side: Side, talk: Talk, ward: Ward, completed: int) -> None:
        try:
            source = await asyncio.to_thread(ward.source, completed)
        except CheckpointError:
            del talk.outgoing[ward.stage]
            raise

        async def send() -> None:
            await self._departures.send(side, talk, source, completed, verify=True)

        self._begin(talk, send)

    async def _arrive(self, side: Side, talk: Talk, frame: CopyOffer | CopyPart, ward: Ward | None) -> None:
        """A copy of a ward's, or of our own (None), is coming."""
        room = ward or self._recall
        assert room
        stage, completed = frame.stage, frame.completed_steps
        try:
            if isinstance(frame, CopyPart):
                incoming = talk.incoming.get(stage)
                if incoming is None or incoming.completed != completed:  # declined while it was under way
                    return
                offset = await incoming.part(frame)
            else:
                talk.incoming.pop(stage, None)
                if ward and completed in await asyncio.to_thread(ward.steps):
                    await self._tell_held(side)
                    return
                incoming = talk.incoming[stage] = await room.arrivals.begin(frame)
                offset = incoming.state.offset
            if offset is None:
                return
            await self._say(side, CopyProgress(stage=stage, completed_steps=completed, offset=offset))
            if not incoming.state.done:
                return
            del talk.incoming[stage]
            if ward is None:
                await self._settle_own(offset)
            elif await asyncio.to_thread(ward.arrivals.settle) is not None:
                await self._tell_held(side)
        except (CheckpointError, OSError) as error:
            talk.incoming.pop(stage, None)
            talk.declined.add((stage, completed))
            line = f"stage {self._stage} does not take it: {error}"
            self._on_fault("copy", f"a copy of stage {stage} after {completed} steps: {line}")
            await self._say(side, CopyDeclined(stage=stage, completed_steps=completed, reason=printable(line)))

    async def _settle_own(self, size: int) -> None:
        assert self._recall
        self._recall.settling = True
        try:
            came = await asyncio.to_thread(self._recall.arrivals.settle)
        finally:
            self._recall.settling = False
        if came is not None:
            self._recall.came.add(came)
            self._on_copy(came, size, True)
