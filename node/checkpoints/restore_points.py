"""What a stage can be set back to: its newest snapshots in memory, and its checkpoints on disk.

A process that survives the loss of another stage restores from memory; one that replaces a lost stage has only the
disk. Each snapshot goes to both, to disk in the background. Why memory at all: a step is done again in less time than a
checkpoint is read, and the newest one may not be written yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..stage_state import StageSnapshot
from .background_writer import CheckpointWriter
from .store import HELD_TIMES, KEEP_MIN, CheckpointStore

VOID_S = 60.0  # for a checkpoint that is being written, before it is discarded
IN_MEMORY = 2  # snapshots; neighbours are at most one step apart, so at most one checkpoint apart


class RestorePoints:
    """Of one stage, by completed steps. All that may take a while is done in a thread.

    on_written: (completed steps, bytes, seconds) of each checkpoint, and on_error: a line for each that could not be
    written, or is damaged; both are called in other threads.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        on_written: Callable[[int, int, float], None],
        on_error: Callable[[str], None],
    ) -> None:
        self.store = store
        self._on_error = on_error
        self._writer = CheckpointWriter(store, on_written=on_written, on_error=on_error)
        self._in_memory: dict[int, StageSnapshot] = {}
        self.common = 0  # steps after which all stages have one: they have agreed to go on from there
        self._void_from: int | None = None  # what is done from these steps on, before `gone_back`, does not count

    def __contains__(self, completed: int) -> bool:
        """Whether it is in memory."""
        return completed in self._in_memory

    @property
    def oldest(self) -> int:
        """No rollback leads further back than to after so many steps. The first checkpoints may be ones that another
        stage has not written yet; neighbours are at most one apart, and another one may be under way. A new disk has
        few as well, but one of them is known to be everywhere (`common`). Older ones do not count then: before its loss
        this stage may have said of them that it would not go back there."""
        steps = self.store.steps()
        own = [step for step in steps if step not in self.store.pinned]  # those are kept for another lane
        steps = own if len(own) >= KEEP_MIN else steps
        if len(steps) < KEEP_MIN:
            return self.common if self.common in steps else 0
        return min(steps)

    async def keep(self, snapshot: StageSnapshot, *, generation: int) -> None:
        """In memory now, on disk soon; not at all if it is void."""
        if self.is_void(snapshot.completed):
            return
        self._in_memory[snapshot.completed] = snapshot
        for old in sorted(self._in_memory)[:-IN_MEMORY]:
            del self._in_memory[old]
        await asyncio.to_thread(self._writer.submit, snapshot, generation=generation)

    async def find(self, completed: int) -> tuple[StageSnapshot | None, str]:
        """The state after so many steps, and where it was; after 0 steps none is needed. Raises CheckpointError."""
        if snapshot := self._in_memory.get(completed):
            return snapshot, "memory"
        return (await asyncio.to_thread(self.store.load, completed), "disk") if completed else (None, "settings")

    def forget_after(self, completed: int) -> None:
        """What is in memory of later steps, which are going to be done again."""
        self._in_memory = {step: kept for step, kept in self._in_memory.items() if step <= completed}

    async def discard_after(self, completed: int) -> None:
        """The same, and what is on the disk: nobody must go on from it. Raises CheckpointError."""
        self.forget_after(completed)
        await asyncio.to_thread(self.store.discard_after, completed)

    async def make_void(self, first: int) -> None:
        """What came of the step with which `first` are completed, and of all later ones, does not count: it is
        discarded, and so is what training, which is still to be broken off, makes until `gone_back`. Raises
        CheckpointError."""
        self._void_from = first if self._void_from is None else min(first, self._void_from)
        await self.flush(VOID_S)  # what is being written would come after that
        await self.discard_after(first - 1)

    def is_void(self, completed: int) -> bool:
        """Whether the state after so many steps, as it is or will be before `gone_back`, does not count."""
        return self._void_from is not None and completed >= self._void_from

    def gone_back(self, completed: int) -> None:
        """All stages go on from there."""
        self.common = completed
        if not self.is_void(completed):
            self._void_from = None

    async def on_disk(self) -> list[int]:
        """What can be restored from disk, newest first; what is damaged is reported and left out."""
        return await asyncio.to_thread(self.store.newest_intact, HELD_TIMES * self.store.keep, report=self._on_error)

    async def offered(self) -> set[int]:
        """All that this stage can be set back to."""
        return {*self._in_memory, *await self.on_disk()}

    async def flush(self, timeout_s: float) -> None:
        """What was kept is on disk, or so long has passed."""
        await asyncio.to_thread(self._writer.flush, timeout_s)

    async def close(self) -> None:
        """Of what was kept, all is written."""
        await asyncio.to_thread(self._writer.close)
