"""The state of copy_service.py: for a neighbour whose copies are kept here, and for one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...protocol.control_messages import CopyFrame
from ...protocol.copy_transfer import PARTS_AHEAD_MOST, Sending
from ...protocol.grid_place import GridPlace
from ...protocol.rollback import STEPS_LISTED_MAX
from ...sim.reports.lanes import lane_directory
from .copy_receiver import CopyReceiver, Incoming
from .manifest import COPIES, CheckpointError, Manifest
from .store import CheckpointStore

QUEUED_MAX = PARTS_AHEAD_MOST + 16  # frames from one neighbour that wait for the disk


def beside_lane(directory: Path, own_lane: int, lane: int) -> Path:
    """Where that lane keeps what this one keeps in `directory`, by how the directories of a run are called."""
    own = lane_directory(own_lane)
    parts = list(directory.parts)
    if own not in parts:
        return directory / COPIES / lane_directory(lane)  # each lane has a disk of its own: nothing is shared
    at = len(parts) - 1 - parts[::-1].index(own)
    return Path(*parts[:at], lane_directory(lane), *parts[at + 1 :])


class CopyStore:
    """A neighbour whose copies are kept here. stage: what it is in the chain, and so in frames; place: where in the
    grid that is, if it may be another lane than this node's (`own_lane`)."""

    def __init__(
        self,
        stage: int,
        own: CheckpointStore,
        bytes_max: int,
        *,
        place: GridPlace | None = None,
        own_lane: int = 0,
    ) -> None:
        directory = own.directory.parent
        copies, shared = directory / COPIES, directory
        number, lane = place or (stage, own_lane)
        if lane != own_lane:  # it has the same stages, whose states are not the same
            copies, shared = copies / lane_directory(lane), beside_lane(directory, own_lane, lane)
        self.stage = stage
        self.store = CheckpointStore(copies, stage=number, fingerprint=own.fingerprint)
        # Where it writes itself, if both see the same directory.
        self._shared = CheckpointStore(shared, stage=number, fingerprint=own.fingerprint)
        self._bytes_max = bytes_max
        aside = directory if lane == own_lane else copies
        self.receiver = CopyReceiver(self.store, check=self._check, supersede=True, directory=aside)

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
