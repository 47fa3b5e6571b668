"""The control stream to each neighbour: which neighbours are alive, and the frames by which a new generation is agreed.

One conversation for each side runs while there is a connection; the rules are `protocol.rollback`'s. Where the lanes of
a run are one group, a neighbour is the next one of the chain through all of them (`protocol.group_chain`), which may be
this node's own stage in another lane. A control stream outlives
generations, so it is apart from the tensors' stream, and it is never shaped: a frame of it is some sixty bytes, once a
second and at a loss.

Silence means something here, because each side sends `Heartbeat` every second. A peer that sends nothing for
`silence_s` (computed from the link, `node.link_settings.heartbeat_timeout_s`) counts as gone: its process is stopped,
its machine is off, or the path is broken. That alone changes nothing, and it may come back. But from then on another
process may take its place. Why not gRPC's keep-alive: it is answered by the library's own threads while the node itself
may hang, and its intervals are seconds at the least.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from ...protocol.control_messages import LAST_WORDS, PART_BYTES_MAX, ControlFrame, CopyFrame, Failed
from ...protocol.errors import Fault, RefusedError, RemoteProtocolError
from ...protocol.messages import Frame, Greeting, Limits, Refusal, decode_frame, encode_frame
from ...protocol.rollback import Rollback, RollbackPhase
from ...protocol.rollback_actions import ChooseEnd, Effect, End, EndAfter, Leave, Send, Side, Start, Stop
from ...protocol.round_messages import RoundStatus
from ...protocol.wire_size import framed_bytes
from ..checkpoints.copy_service import CopyService
from .link import Read
from .outgoing import Write

HEARTBEAT_EVERY_S = 1.0
Wanted = Stop | Start | Leave | ChooseEnd | EndAfter | End  # effects that are not this module's
QUEUED_MAX = 64  # frames for one neighbour
LIMITS = Limits(message_bytes=1, chunk_bytes=PART_BYTES_MAX)  # no tensor comes this way


class Rounds(Protocol):
    """What takes part of the conversation about rounds with other lanes (`node.lanes.lane_membership`)."""

    def met(self, side: Side) -> None: ...
    def parted(self, side: Side) -> None: ...
    def receive(self, side: Side, frame: RoundStatus) -> None: ...


class Control:
    """Runs `machine` over whatever connections there are. What it wants done goes to `on_effect`, in order."""

    def __init__(
        self,
        machine: Rollback,
        *,
        heartbeat_timeout_s: float,
        on_effect: Callable[[Wanted], None],
        sent: Mapping[Side, Counter[str]],
    ) -> None:
        self.machine = machine
        self.copies: CopyService | None = None
        self.rounds: Rounds | None = None
        self._missing_since: float | None = None
        self._missing_last = float("-inf")
        self.meetings: Counter[Side] = Counter()  # how often each was met
        self._sent = sent  # the accounts of the ways to the two neighbours, framed bytes by kind
        self.met: dict[Side, asyncio.Event] = {"above": asyncio.Event(), "below": asyncio.Event()}
        self._told: set[Side] = set()  # that this stage, or one beyond, has failed
        self._moved = asyncio.Event()  # one more was told
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_effect = on_effect
        self._queues: dict[Side, asyncio.Queue[ControlFrame | RoundStatus]] = {}
        self._present: dict[Side, asyncio.Future[None]] = {}  # ends the conversation of that side

    def act(self, effects: list[Effect]) -> None:
        """Carry out what an input of the machine asked for."""
        for effect in effects:
            if not isinstance(effect, Send):
                self._on_effect(effect)
            else:
                self.tell(effect.side, effect.frame)

    def missing_s(self) -> tuple[float, float]:
        """For how long some stage has been missing (0: none is), and how long ago the last such time ended."""
        now = asyncio.get_running_loop().time()
        if not self.machine.heartbeats.missing:
            self._missing_since = None
        else:
            self._missing_since = self._missing_since or now
            self._missing_last = now
        return now - (self._missing_since or now), now - self._missing_last

    def tell(self, side: Side, frame: ControlFrame | RoundStatus) -> None:
        """Say it to who is connected on that side, if anybody is."""
        if side not in self._queues:
            return
        try:
            self._queues[side].put_nowait(frame)
        except asyncio.QueueFull:  # it takes nothing: the next connection begins with what matters
            self._end(side, ConnectionError(f"{QUEUED_MAX} frames wait for the neighbour {side}"))

    def refuse(self, side: Side, error: RemoteProtocolError) -> None:
        """What came from that side breaks a rule, as was found only after it had been taken: end the connection."""
        if side in self._present:
            self._end(side, error)

    @property
    def finished(self) -> bool:
        """Nobody will need this node again."""
        return self.machine.phase is RollbackPhase.FINISHED

    @property
    def over(self) -> bool:
        """Nobody will need this node again, be it because the run has failed."""
        return self.finished or self.machine.failure is not None

    def said_last_word(self, side: Side) -> bool:
        """Whether that side is to know of the end, or has been told, so that it is worth waiting for it to have read
        that. Of the end of all it is the side above that tells this node."""
        return (self.finished and side == "below") or side in self._told

    async def tell_failure(self, there: set[Side], timeout_s: float) -> None:
        """Wait until each neighbour that was ever met, or is known to be `there`, has been told why the run ends, or so
        long. One whose connection has just broken, or is not made yet, is told when it comes. Who told this node
        knows."""
        failure, mine = self.machine.failure, self.machine.identity.stage
        if failure is None:
            return
        due = there | {side for side, met in self.met.items() if met.is_set()}
        if failure.stage != mine:
            due.discard("above" if failure.stage < mine else "below")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not due <= self._told:
                    self._moved.clear()
                    await self._moved.wait()

    async def converse(
        self, side: Side | None, read: Read, write: Write, *, speaks_first: bool, greeting_timeout_s: float
    ) -> bool:
        """Run one connection until it ends: True after the last word, AllFinished or Failed, was written.

        side: None where the peer has opened it and its greeting tells. Raises RemoteProtocolError (the peer is still to
        be told), RefusedError (it told us), ConnectionError (it says nothing), or what `read` and `write` raise.
        """
        if speaks_first:
            assert side
            try:
                async with asyncio.timeout(greeting_timeout_s):  # a peer may never let a stream begin
                    await self._write(side, write, self.machine.greeting())
            except TimeoutError:
                raise ConnectionError(
                    f"the neighbour did not accept the greeting within {greeting_timeout_s:.1f} s"
                ) from None
        frame = await self._read(read, greeting_timeout_s, "no greeting")
        if frame is None:
            raise ConnectionError(f"the control stream {side or 'of a neighbour'} ended before the greeting")
        if not isinstance(frame, Greeting):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(frame).__name__.lower()} frame before the greeting")
        side = side or self.machine.identity.side_of(frame.stage)
        mine = self.machine.greeting()  # as it was when the peer came, whatever the peer changes
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._take_place(side, frame)
        self.missing_s()  # up to now
        effects = self.machine.meet(side, frame)
        self._present[side] = ended
        self._queues[side] = asyncio.Queue(QUEUED_MAX)
        self.met[side].set()
        self.meetings[side] += 1
        self.act(effects)
        if self.copies:
            self.copies.met(side)
        if self.rounds:
            self.rounds.met(side)
        try:
            if not speaks_first:
                await self._write(side, write, mine)
            return await self._talk(side, read, write, ended)
        finally:
            ended.cancel()
            if self._present.get(side) is ended:
                self._part(side)

    def _take_place(self, side: Side, peer: Greeting) -> None:
        """The process that is connected already dials again: its first connection must be half-dead. Or the one that is
        connected was replaced in a later generation, and it is its successor that comes."""
        self.machine.check(side, peer)
        if side in self._present:
            same = self.machine.peers[side] == peer.incarnation
            why = "the same process opened another connection" if same else "its successor came"
            self._end(side, ConnectionError(why))

    def _end(self, side: Side, why: Exception) -> None:
        present = self._present[side]
        self._part(side)
        if not present.done():
            present.set_exception(why)

    def _part(self, side: Side) -> None:
        del self._present[side], self._queues[side]
        self.machine.part(side)
        self.missing_s()
        if self.copies:
            self.copies.parted(side)
        if self.rounds:
            self.rounds.parted(side)

    async def _talk(self, side: Side, read: Read, write: Write, ended: asyncio.Future[None]) -> bool:
        tasks = [asyncio.ensure_future(part) for part in (self._hear(side, read, ended), self._say(side, write))]
        try:
            done, _ = await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for each in (ended, *tasks):
                if each in done:
                    each.result()
            return tasks[1] in done
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hear(self, side: Side, read: Read, ended: asyncio.Future[None]) -> None:
        while (frame := await self._read(read, self._heartbeat_timeout_s, f"stage {side} was silent")) is not None:
            if self._present.get(side) is not ended:  # another connection has taken the place of this one
                return
            self.missing_s()
            if isinstance(frame, RoundStatus) and self.rounds:
                self.rounds.receive(side, frame)
            elif not isinstance(frame, CopyFrame):
                self.act(self.machine.receive(side, frame))
            elif self.copies:
                self.copies.receive(side, frame)

    async def _say(self, side: Side, write: Write) -> None:
        queue, clock = self._queues[side], asyncio.get_running_loop().time
        due_s = clock() + HEARTBEAT_EVERY_S
        while True:
            frame: ControlFrame | RoundStatus | None = None
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due_s):
                    frame = await queue.get()
            if frame is None or clock() >= due_s:  # it tells more than that we live, so it comes between others too
                due_s = clock() + HEARTBEAT_EVERY_S
                await self._write(side, write, self.machine.heartbeat(side))
            if frame is None:
                continue
            await self._write(side, write, frame)
            if isinstance(frame, Failed):
                self._told.add(side)
                self._moved.set()
            if isinstance(frame, LAST_WORDS):
                return  # who listens ends when the stream does

    async def _write(self, side: Side, write: Write, frame: Frame) -> None:
        raw = encode_frame(frame)
        await write(raw)
        kind = "checkpoint_copy" if isinstance(frame, CopyFrame) else "control"
        self._sent[side][kind] += framed_bytes(len(raw))

    @staticmethod
    async def _read(read: Read, timeout_s: float, otherwise: str) -> Frame | None:
        try:
            async with asyncio.timeout(timeout_s):
                raw = await read()
        except TimeoutError:
            raise ConnectionError(f"{otherwise} for {timeout_s:.1f} s") from None
        if raw is None:
            return None
        frame = decode_frame(raw, LIMITS)
        if isinstance(frame, Refusal):
            raise RefusedError(frame.code, frame.reason)
        return frame
