"""Sending a copy of this stage's checkpoint to a neighbour, part by part, for as long as both want it.

The parts that may leave together are read from the disk in one job on a thread, since passing a job there and back
costs more than reading; each then leaves when the link has nothing else to do. Sent parts are not kept: what is
lost with a connection is read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import IO

from ...protocol.control_messages import CopyDeclined, CopyFrame, CopyOffer, CopyPart
from ...protocol.copy_transfer import Sending
from ...protocol.header import printable
from ...protocol.rollback_actions import Side
from .copy_store import CopySession
from .manifest import CheckpointError
from .store import STATE, CheckpointStore

Say = Callable[[Side, CopyFrame], Awaitable[None]]


class CopySender:
    """What one node sends. part_bytes, parts_ahead: as the link wants them. say: have a frame sent to a side; for a
    part it waits until the link is idle."""

    def __init__(self, *, part_bytes: int, parts_ahead: int, say: Say) -> None:
        self._part_bytes, self._parts_ahead, self._say = part_bytes, parts_ahead, say

    async def send(
        self, side: Side, session: CopySession, store: CheckpointStore, completed: int, *, verify: bool = False
    ) -> None:
        """One checkpoint, until the other side has it or does not want it. verify: read it once before. Raises
        CheckpointError or OSError for one that cannot be read, and says so to the other side first."""
        stage = store.stage
        try:
            manifest = await asyncio.to_thread(store.verify if verify else store.manifest, completed)
            with (store.path(completed) / STATE).open("rb") as file:
                sending = Sending(size=manifest.file_bytes, part_bytes=self._part_bytes, parts_ahead=self._parts_ahead)
                session.outgoing[stage] = (completed, sending)
                await self._say(side, CopyOffer(stage=stage, completed_steps=completed, manifest=manifest.rendered()))
                while session.under_way(stage, completed):
                    if parts := sending.next():
                        await self._send_parts(side, session, stage, completed, file, parts)
                    else:
                        session.moved.clear()
                        await session.moved.wait()
        except (CheckpointError, OSError) as error:
            session.declined.add((stage, completed))
            reason = printable(f"it cannot be read: {error}")
            await self._say(side, CopyDeclined(stage=stage, completed_steps=completed, reason=reason))
            raise
        finally:
            session.outgoing.pop(stage, None)

    async def _send_parts(
        self,
        side: Side,
        session: CopySession,
        stage: int,
        completed: int,
        file: IO[bytes],
        parts: list[tuple[int, int]],
    ) -> None:
        datas = await asyncio.to_thread(_read, file, parts)
        for (offset, _), data in zip(parts, datas, strict=True):
            if not session.under_way(stage, completed):  # declined meanwhile, or not wanted any more
                return
            await self._say(side, CopyPart(stage=stage, completed_steps=completed, offset=offset, data=data))


def _read(file: IO[bytes], parts: list[tuple[int, int]]) -> list[bytes]:
    datas = []
    for offset, length in parts:
        file.seek(offset)
        datas.append(file.read(length))
        if len(datas[-1]) != length:
            raise OSError(f"{file.name} ends at byte {offset + len(datas[-1])}")
    return datas
