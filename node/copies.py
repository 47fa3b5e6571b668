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
from ..protocol.effects import Side
from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.header import printable
from .arrivals import Arrivals
from .checkpoint import STATE, CheckpointStore
from .durable import sweep_incoming
from .flow import Reporter
from .manifest import CheckpointError, Manifest
from .wards import QUEUED_MAX, Talk, Ward

DECLINED_MAX = 64  # on one connection; who is declined so often does not listen
BROUGHT_BACK = 2  # of the newest copies: the others may not have completed the very newest yet

Say = Callable[[Side, CopyFrame], Awaitable[None]]


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
        self._part_bytes, self._parts_ahead = min(part_bytes, PART_BYTES_MAX), parts_ahead
        self._say, self._refuse, self._on_fault = say, refuse, on_fault
        self._on_copy, self._on_held = on_copy, on_held
        self._wards: dict[Side, Ward] = {}
        others: dict[Side, tuple[int, Side]] = {"above": (stage - 1, "below"), "below": (stage + 1, "above")}
        for side, (other, towards_us) in others.items():
            if 0 <= other < stages and buddy_side(other, stages) == towards_us:
                self._wards[side] = Ward(other, store, bytes_max)
        self._own = Arrivals(store, check=self._check_wanted, supersede=False, directory=store.directory.parent)
        self._talks: dict[Side, Talk] = {}
        self._closed = False
        self._newest = 0  # of our checkpoints: the one that was written last
        self._wanted: set[int] = set()  # what we ask for
        self._came: set[int] = set()  # of these
        self._settling = False  # one of these is being read once more, and may take its time
        self._restored = asyncio.Event()  # the buddy has said something that `fetch` has to look at

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
        if side == self.side:
            self._restored.set()
            if self._enabled:
                self._begin(talk, self._trickle, side, talk)

    def parted(self, side: Side) -> None:
        """Its connection is gone."""
        if talk := self._talks.pop(side, None):
            for job in talk.jobs:
                job.cancel()
        if side == self.side:
            self._restored.set()

    async def close(self) -> None:
        """Nothing is sent or written any more."""
        self._closed = True
        jobs = [job for talk in self._talks.values() for job in talk.jobs]
        for side in list(self._talks):
            self.parted(side)
        await asyncio.gather(*jobs, return_exceptions=True)
        for arrivals in (self._own, *(ward.arrivals for ward in self._wards.values())):
            await asyncio.to_thread(arrivals.close)

    async def fetch(self, have: list[int], *, patience_s: float, replacement_s: float) -> bool:
        """Bring back what the buddy has and this disk lacks of the newest checkpoints; whether anything came.

        `have`: completed steps of what is intact here. Waits `replacement_s` for a buddy that is not there, without
        whom nobody could go on anyway; gives up, loudly, when one that is there sends nothing for `patience_s`.
        """
        if self.side is None or not self._enabled:
            return False
        await asyncio.to_thread(sweep_incoming, self._store.directory.parent)
        try:
            await self._fetch(self.side, have, patience_s, replacement_s)
        finally:
            self._wanted.clear()
            await asyncio.to_thread(self._own.drop)
        return bool(self._came)

    async def _fetch(self, side: Side, have: list[int], patience_s: float, replacement_s: float) -> None:
        asked: tuple[Talk, int] | None = None
        while True:
            self._restored.clear()
            talk = self._talks.get(side)
            if talk and talk.held is not None:
                newest = sorted(talk.held | set(have), reverse=True)[:BROUGHT_BACK]
                missing = [step for step in newest if step not in have and step not in self._came]
                left = [step for step in missing if (self._stage, step) not in talk.declined]
                if not left:
                    return
                if asked != (talk, left[0]):
                    asked = talk, left[0]
                    self._wanted.add(left[0])
                    print(f"asks stage {self._peer(side)} for its copy after {left[0]} steps", flush=True)
                    await self._say(side, CopyWanted(stage=self._stage, completed_steps=left[0]))
            timeout_s = patience_s if talk else replacement_s
            try:
                async with asyncio.timeout(timeout_s):
                    await self._restored.wait()
            except TimeoutError:
                if self._settling or self._restored.is_set():
                    continue
                line = f"waited {timeout_s:g} s in vain for copies of checkpoints at stage {self._peer(side)}"
                self._on_fault("timeout", f"{line}; goes on with what is on this disk: steps {have or 'none'}")
                return

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
                    await self._send(side, talk, self._store, completed)
                except (CheckpointError, OSError) as error:
                    self._on_fault("copy", f"the copy after {completed} steps: {error}")
            else:
                await talk.offers.wait()

    async def _send(
        self, side: Side, talk: Talk, store: CheckpointStore, completed: int, *, verify: bool = False
    ) -> None:
        """One checkpoint, until the other side has it or does not want it. verify: read it once before."""
        stage = store.stage
        try:
            manifest = await asyncio.to_thread(store.verify if verify else store.manifest, completed)
            with (store.path(completed) / STATE).open("rb") as file:
                sending = Sending(size=manifest.file_bytes, part_bytes=self._part_bytes, parts_ahead=self._parts_ahead)
                talk.outgoing[stage] = (completed, sending)
                offer = CopyOffer(stage=stage, completed_steps=completed, manifest=manifest.rendered())
                await self._say(side, offer)
                while talk.under_way(stage, completed):
                    if part := sending.next():
                        data = await asyncio.to_thread(_read_at, file, *part)
                        frame = CopyPart(stage=stage, completed_steps=completed, offset=part[0], data=data)
                        await self._say(side, frame)
                    else:
                        talk.moved.clear()
                        await talk.moved.wait()
        except (CheckpointError, OSError) as error:
            talk.declined.add((stage, completed))
            reason = printable(f"it cannot be read: {error}")
            await self._say(side, CopyDeclined(stage=stage, completed_steps=completed, reason=reason))
            raise
        finally:
            talk.outgoing.pop(stage, None)

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
                await self._arrive(side, talk, frame, None if mine else ward)
            case CopyProgress():
                if sending := talk.under_way(frame.stage, frame.completed_steps):
                    sending.progress(frame.offset)
                    if sending.done and not mine:  # of a restored one nobody says that it is held
                        del talk.outgoing[frame.stage]
            case CopyDeclined():
                if talk.under_way(frame.stage, frame.completed_steps):
                    del talk.outgoing[frame.stage]
                elif not (mine and frame.completed_steps in self._wanted):
                    return
                talk.declined.add((frame.stage, frame.completed_steps))
                which = f"the copy of stage {frame.stage} after {frame.completed_steps} steps"
                self._on_fault("copy", f"stage {self._peer(side)} and {which}: {frame.reason}")
            case _:
                raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__} from {side} on a copy")
        if mine:
            self._restored.set()

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
            await self._send(side, talk, source, completed, verify=True)

        self._begin(talk, send)

    def _check_wanted(self, manifest: Manifest) -> None:
        if manifest.completed not in self._wanted:
            raise CheckpointError("it was not asked for")

    async def _arrive(self, side: Side, talk: Talk, frame: CopyOffer | CopyPart, ward: Ward | None) -> None:
        """A copy of a ward's, or of our own (None), is coming."""
        arrivals, completed = ward.arrivals if ward else self._own, frame.completed_steps
        try:
            if isinstance(frame, CopyPart):
                offset = await asyncio.to_thread(arrivals.part, frame)
            elif ward and completed in await asyncio.to_thread(ward.steps):
                return await self._tell_held(side)
            else:
                offset = await asyncio.to_thread(arrivals.offer, frame)
            if offset is None:  # of one that was declined while it was under way
                return None
            await self._say(side, CopyProgress(stage=frame.stage, completed_steps=completed, offset=offset))
            self._settling = ward is None
            came = await asyncio.to_thread(arrivals.settle)
        except (CheckpointError, OSError) as error:
            talk.declined.add((frame.stage, completed))
            line = f"stage {self._stage} does not take it: {error}"
            self._on_fault("copy", f"a copy of stage {frame.stage} after {completed} steps: {line}")
            declined = CopyDeclined(stage=frame.stage, completed_steps=completed, reason=printable(line))
            return await self._say(side, declined)
        finally:
            self._settling = False
        if came is not None and ward:
            await self._tell_held(side)
        elif came is not None:
            self._came.add(came)
            self._on_copy(came, offset, True)
        return None


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise OSError(f"{file.name} ends at byte {offset + len(data)}")
    return data
