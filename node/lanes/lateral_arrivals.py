"""Contributions of one peer on their way onto the disk.

Parts are written a few at a time, since a job on a thread costs more than a write, and what is written is acknowledged:
so this node holds no more of a contribution than a few parts, whatever its size. A job runs on in its thread when its
connection ends; the next connection waits for it, and then asks the disk where it stopped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.round_messages import RoundPart
from ...protocol.round_transfer import Contribution, ContributionBytes, Position
from .contribution_store import ContributionError, ContributionStore

DAMAGED_MAX = 3  # of one round, before it is no accident any more

T = TypeVar("T")


class LateralArrivals:
    """Writes what comes into `store`. All methods belong on the event loop, one at a time; they raise ContributionError
    for a disk that takes nothing, and where the same contribution came damaged too often."""

    def __init__(self, store: ContributionStore) -> None:
        self.store = store
        self._parts: list[RoundPart] = []  # not written yet, all of one round
        self.void = False  # what has come of a contribution is of one that does not count
        self._damaged: Counter[int] = Counter()
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
        contribution whole, and it is not what it was said to be; then it is to be asked for from its beginning."""
        parts, self._parts = self._parts, []
        first = parts[0]
        made = Contribution(total_bytes=first.total_bytes, xxh3=first.contribution_xxh3)
        datas = [part.data for part in parts]
        whole = await self._on_disk(self.store.append, first.round, made, first.offset, datas, stay)
        if whole is None:
            await self.begin_again(first.round)
            line = f"the contribution to round {first.round} does not have its checksum; it is asked for again"
            raise RemoteProtocolError(Fault.PAYLOAD, line)
        if whole:
            self.store.keep(first.round, made, stay)

    async def begin_again(self, round: int) -> None:
        """What has come of this contribution is of no use. The same one several times is no accident."""
        await self._on_disk(self.store.drop_partial)
        self._damaged[round] += 1
        if self._damaged[round] >= DAMAGED_MAX:
            times = f"came damaged {DAMAGED_MAX} times; look at the disk and the memory of the node that sent it"
            raise ContributionError(f"the contribution to round {round} {times}")

    async def _on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        job = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        job.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, if nobody waits any more
        self._job = job
        return await asyncio.shield(job)
