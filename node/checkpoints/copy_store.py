"""The state of copy_service.py: for a neighbour whose copies are kept here, and for one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ...protocol.control_messages import CopyFrame
from ...protocol.copy_transfer import PARTS_AHEAD_MOST, Sending
from ...protocol.rollback import STEPS_LISTED_MAX
from .copy_receiver import CopyReceiver, Incoming
from .manifest import COPIES, CheckpointError, Manifest
from .store import CheckpointStore

QUEUED_MAX = PARTS_AHEAD_MOST + 16  # frames from one neighbour that wait for the disk


class CopyStore:
    """A neighbour whose copies are kept here."""

    def __init__(self, stage: int, own: CheckpointStore, bytes_max: int) -> None:
        directory = own.directory.parent
        self.stage = stage
        self.store = CheckpointStore(directory / COPIES, stage=stage, fingerprint=own.fingerprint)
        # Where it writes itself, if both see the same directory.
        self._shared = CheckpointStore(directory, stage=stage, fingerprint=own.fingerprint)
        self._bytes_max = bytes_max
        self.receiver = CopyReceiver(self.store, check=self._check, supersede=True, directory=directory)

    def _check(self, manifest: Manifest) -> None:
        if manifest.copy_bytes > self._bytes_max:
            raise CheckpointError(
                f"it has {manifest.copy_bytes} bytes, checkpoint.copy_bytes_max there is {self._bytes_max}"
            )

    def steps(self) -> tuple[int, ...]:
        """The newest that are here, falling. Raises CheckpointError."""
        return tuple(sorted({*self.store.steps(), *self._shared.steps()}, reverse=True)[:STEPS_LISTED_MAX])

    def source(self, completed: int) -> CheckpointStore:
        return self.store if completed in self.store.steps() else self._shared


@dataclass(slots=True, eq=False)
class CopySession:
    """What belongs to one connection."""

    inbox: asyncio.Queue[CopyFrame] = field(default_factory=lambda: asyncio.Queue(QUEUED_MAX))
    held: set[int] | None = None  # what the buddy has of ours; None: it has not said yet
    outgoing: dict[int, tuple[int, Sending | None]] = field(default_factory=dict)  # stage -> (completed, how far)
    incoming: dict[int, Incoming] = field(default_factory=dict)  # by stage
    declined: set[tuple[int, int]] = field(default_factory=set)  # (stage, completed), by either side
    offers: asyncio.Event = field(default_factory=asyncio.Event)  # there may be something to send to the buddy
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # what is outgoing got further, or is settled
    jobs: set[asyncio.Task[None]] = field(default_factory=set)

    def begin(self, job: Callable[[], Awaitable[None]], on_error: Callable[[Exception], None]) -> asyncio.Task[None]:
        """Have it run for as long as the connection stands. on_error: of a disk, which ends no connection."""

        async def told() -> None:
            try:
                await job()
            except (CheckpointError, OSError) as error:
                on_error(error)

        task = asyncio.create_task(told())
        self.jobs.add(task)
        task.add_done_callback(self.jobs.discard)
        return task

    def under_way(self, stage: int, completed: int) -> Sending | None:
        found, sending = self.outgoing.get(stage, (None, None))
        return sending if found == completed else None
