"""Getting copies back from the buddy: a process that takes a stage's place first fetches checkpoints that its disk
lacks.

This comes first, because the process says only once from which steps it could go on. It waits as long as data arrives.
It also waits for a buddy that is not there, because without it no stage could go on anyway, unless the run is over
meanwhile. It gives up on a buddy that is there but silent: the run can still go on from an older step, or from the
first. Where this process itself was paused (`node.process_pause`), it begins to wait again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ...protocol.control_messages import CopyWanted
from ...protocol.rollback_actions import Side
from ..worker_thread import Reporter
from .copy_receiver import CopyReceiver
from .copy_sender import Say
from .copy_store import CopySession
from .manifest import CheckpointError, Manifest
from .store import CheckpointStore

BROUGHT_BACK = 2  # of the newest copies: the others may not have completed the very newest yet


class CopyRestore:
    """What one node asks its buddy, on `side`, to give back into `store`.

    sessions: the connections there are. stage: what this node is in frames; peer: what its buddy is called.
    paused_ago_s: how long ago the last pause of this process ended. `heard` has to be set whenever the buddy has come,
    gone, or said something.
    """

    def __init__(
        self,
        store: CheckpointStore,
        side: Side,
        sessions: Mapping[Side, CopySession],
        *,
        stage: int,
        peer: str,
        say: Say,
        on_fault: Reporter,
        paused_ago_s: Callable[[], float],
    ) -> None:
        self.receiver = CopyReceiver(store, check=self._check, supersede=False, directory=store.directory.parent)
        self.wanted: set[int] = set()
        self.came: set[int] = set()  # of these
        self.completing = False  # one of these is being read once more, and may take its time
        self.heard = asyncio.Event()
        self._over = False
        self._stage, self._sessions = stage, sessions
        self._side: Side = side
        self._peer = peer
        self._say, self._on_fault, self._paused_ago_s = say, on_fault, paused_ago_s

    def _check(self, manifest: Manifest) -> None:
        if manifest.completed not in self.wanted:
            raise CheckpointError("it was not asked for")

    def give_up(self) -> None:
        """Nobody will need what is still to come."""
        self._over = True
        self.heard.set()

    async def fetch(self, have: list[int], *, deadline_s: float, replacement_s: float) -> bool:
        """As `CopyService.fetch`."""
        try:
            await self._fetch(have, deadline_s, replacement_s)
        finally:
            self.wanted.clear()
            await asyncio.to_thread(self.receiver.drop)
        return bool(self.came)

    async def _fetch(self, have: list[int], deadline_s: float, replacement_s: float) -> None:
        asked: tuple[CopySession, int] | None = None
        while not self._over:
            self.heard.clear()
            session = self._sessions.get(self._side)
            if session and session.held is not None:
                newest = sorted(session.held | set(have), reverse=True)[:BROUGHT_BACK]
                missing = [step for step in newest if step not in have and step not in self.came]
                left = [step for step in missing if (self._stage, step) not in session.declined]
                if not left:
                    return
                if asked != (session, left[0]):
                    asked = session, left[0]
                    self.wanted.add(left[0])
                    print(f"asks {self._peer} for its copy after {left[0]} steps", flush=True)
                    await self._say(self._side, CopyWanted(stage=self._stage, completed_steps=left[0]))
            timeout_s = deadline_s if session else replacement_s
            try:
                async with asyncio.timeout(timeout_s):
                    await self.heard.wait()
            except TimeoutError:
                if self.completing or self.heard.is_set() or self._paused_ago_s() < timeout_s:
                    continue
                line = f"waited {timeout_s:g} s in vain for copies of checkpoints at {self._peer}"
                self._on_fault("timeout", f"{line}; goes on with what is on this disk: steps {have or 'none'}")
                return
