"""Contributions of one peer on their way onto the disk.

Parts are written a few at a time, since a job on a thread costs more than a write, and what is written is acknowledged:
so this node holds no more of a contribution than a few parts, whatever its size. A job runs on in its thread when its
connection ends; the next connection waits for it, and then asks the disk where it stopped.

What is whole is checked before it has its name and is reported as held: that it has its checksum, and that it can be
unpacked to finite numbers. One that fails is refused, with the fault, and asked for again, since memory and disks err.
After `REFUSED_MAX` times it is given up: this lane does not hold it, so the round is decided without the lane that
gives it, as if that were not there (`protocol.round_membership`). Why not only when it is used: then it is decided who
is a member, and every lane that holds it would have to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from ...compress.byte_format import CodecError
from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.round_messages import RoundPart
from ...protocol.round_transfer import Contribution, ContributionBytes, Position
from .contribution_store import ContributionStore

REFUSED_MAX = 3  # times that a contribution is refused before it is given up

T = TypeVar("T")


class LateralArrivals:
    """Writes what comes into `store`. check: of a round, raises CodecError for bytes that cannot be a contribution to
    it; on a thread. All methods belong on the event loop, one at a time; they raise ContributionError for a disk that
    takes nothing."""

    def __init__(self, store: ContributionStore, check: Callable[[int, bytes], None] = lambda *_: None) -> None:
        self.store, self._check = store, check
        self._parts: list[RoundPart] = []  # not written yet, all of one round
        self.void = False  # what has come of a contribution is of one that does not count
        self._refused: dict[tuple[int, int], list[str]] = {}  # by round and stay: why, each time
        self._incarnation: int | None = None  # of the process that gave those
        self._job: asyncio.Future[Any] | None = None

    async def begin_connection(self) -> None:
        """What came on the last one and was not written is lost with it; what is being written is waited for."""
        self._parts.clear()
        await self.settle()
        if self.void:
            self.void = False
            await self._on_disk(self.store.drop_partial)

    async def settle(self) -> None:
        """Wait for what is being written."""
        if self._job is not None and not self._job.done():
            await asyncio.wait([self._job])

    async def lacking(self, round: int, contribution_bytes: ContributionBytes) -> tuple[Position, int | None]:
        """As that of the store."""
        return await self._on_disk(self.store.lacking, round, contribution_bytes)

    def add(self, part: RoundPart) -> None:
        """One more, which goes on where the last one ended."""
        self._parts.append(part)

    async def write(self, stay: int = 0) -> None:
        """Write what was added, which is of that stay of the peer. Raises RemoteProtocolError if that made a
        contribution whole, and it is not what it was said to be, or none at all."""
        parts, self._parts = self._parts, []
        first = parts[0]
        round, made = first.round, Contribution(total_bytes=first.total_bytes, xxh3=first.contribution_xxh3)
        datas = [part.data for part in parts]

        def check(content: bytes) -> None:
            self._check(round, content)

        try:
            whole = await self._on_disk(self.store.append, round, made, first.offset, datas, stay, check)
        except CodecError as error:
            raise RemoteProtocolError(Fault.PAYLOAD, await self.refuse(round, stay, str(error))) from None
        if whole is None:
            why = f"the contribution to round {round} does not have its checksum"
            raise RemoteProtocolError(Fault.PAYLOAD, await self.refuse(round, stay, why))
        if whole:
            self.store.keep(round, made, stay)

    # -- what is refused ----------------------------------------------------------------------------------------------

    def begin_process(self, incarnation: int) -> bool:
        """That process of the peer is connected; whether it is a new one. That has another memory, so what was given up
        is asked of it."""
        is_new, self._incarnation = incarnation != self._incarnation, incarnation
        if is_new:
            self._refused.clear()
        return is_new

    async def refuse(self, round: int, stay: int, why: str) -> str:
        """This contribution is none, and what has come of it goes. Returns what to tell the peer."""
        await self._on_disk(self.store.drop_partial)
        reasons = self._refused.setdefault((round, stay), [])
        reasons.append(why)
        if len(reasons) < REFUSED_MAX:
            return f"{why}; it is asked for again"
        return f"{why}; this was refused {len(reasons)} times, and the round goes on without this lane"

    def given_up(self, round: int, stay: int | None) -> str | None:
        """Why this contribution was refused, if it is not asked for any more."""
        reasons = self._refused.get((round, stay)) if stay is not None else None
        return reasons[-1] if reasons and len(reasons) >= REFUSED_MAX else None

    async def _on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        job = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        job.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, if nobody waits any more
        self._job = job
        return await asyncio.shield(job)
