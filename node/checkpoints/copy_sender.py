"""Sending a copy of this stage's checkpoint to a neighbour, part by part, for as long as both want it.

The parts that may leave together are read from the disk in one job on a thread, since passing a job there and back
costs more than reading; each then leaves when the link has nothing else to do. Sent parts are not kept: what is
lost with a connection is read again. What goes with a copy (`Manifest.beside`) comes before the state, as if all were
one file, so that who has it from an earlier copy can begin behind it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ...protocol.control_messages import CopyDeclined, CopyFrame, CopyOffer, CopyPart
from ...protocol.copy_transfer import Sending
from ...protocol.header import printable
from .copy_store import CopySession
from .kept_tokenizer import TOKENIZER, beside
from .manifest import CheckpointError, Manifest
from .store import STATE, CheckpointStore

Say = Callable[[Any, CopyFrame], Awaitable[None]]  # to a side of the chain, or a lane


class CopySender:
    """What one node sends. part_bytes, parts_ahead: as the link wants them. say: have a frame sent to a side; for a
    part it waits until the link is idle."""

    def __init__(self, *, part_bytes: int, parts_ahead: int, say: Say) -> None:
        self._part_bytes, self._parts_ahead, self._say = part_bytes, parts_ahead, say

    async def send(
        self,
        side: Any,
        session: CopySession,
        store: CheckpointStore,
        completed: int,
        *,
        stage: int | None = None,
        verify: bool = False,
    ) -> None:
        """One checkpoint, until the other side has it or does not want it. stage: what frames call that of the store,
        if otherwise. verify: read it once before. Raises CheckpointError or OSError for one that cannot be read, and
        says so to the other side first."""
        stage = store.stage if stage is None else stage
        try:
            manifest = await asyncio.to_thread(store.verify if verify else store.manifest, completed)
            with ExitStack() as held:
                files = [held.enter_context(path.open("rb")) for path in _sources(store, manifest)]
                sending = Sending(size=manifest.copy_bytes, part_bytes=self._part_bytes, parts_ahead=self._parts_ahead)
                session.outgoing[stage] = (completed, sending)
                await self._say(side, CopyOffer(stage=stage, completed_steps=completed, manifest=manifest.rendered()))
                while session.under_way(stage, completed):
                    if parts := sending.next():
                        await self._send_parts(side, session, stage, completed, files, parts)
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
        side: Any,
        session: CopySession,
        stage: int,
        completed: int,
        files: Sequence[IO[bytes]],
        parts: list[tuple[int, int]],
    ) -> None:
        datas = await asyncio.to_thread(_read, files, parts)
        for (offset, _), data in zip(parts, datas, strict=True):
            if not session.under_way(stage, completed):  # declined meanwhile, or not wanted any more
                return
            await self._say(side, CopyPart(stage=stage, completed_steps=completed, offset=offset, data=data))


def _sources(store: CheckpointStore, manifest: Manifest) -> list[Path]:
    """The files of a copy, one behind the other. Raises CheckpointError where what goes with it is another one."""
    if beside(store.directory) != manifest.beside:
        raise CheckpointError(f"{store.directory / TOKENIZER} is not what it was when that was written")
    here = [store.directory / TOKENIZER / name for name in manifest.beside]
    return [*here, store.path(manifest.completed) / STATE]


def _read(files: Sequence[IO[bytes]], parts: list[tuple[int, int]]) -> list[bytes]:
    """Of the files as if they were one."""
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    datas = []
    for offset, length in parts:
        data, begin = b"", offset
        for file, size in zip(files, sizes, strict=True):
            if begin < size and len(data) < length:
                file.seek(begin)
                data += file.read(length - len(data))
            begin = max(0, begin - size)
        if len(data) != length:
            raise OSError(f"{files[-1].name} ends at byte {offset + len(data)} of the copy")
        datas.append(data)
    return datas
