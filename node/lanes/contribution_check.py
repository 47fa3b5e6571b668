"""Whether bytes can be a lane's contribution to a round: those of the others as they come, and this node's own where
another lane refuses them.

What is checked is what would be done with them: they are unpacked, and every number has to be finite. That a number is
wrong, though finite, nobody but its sender can know.

A node whose own contribution does not pass has a memory or a disk that errs. It ends by itself, so that its lane is
lost as any lane is, and people learn where to look; the other lanes would only leave it out. It does not end because
another one says so, for that one may be wrong, or lie.
"""

from __future__ import annotations

import asyncio
import threading

from ...compress.byte_format import CodecError
from ...protocol.round_transfer import Contribution
from .contribution_store import ContributionError, ContributionStore
from .lateral_settings import Check


class ContributionCheck:
    """One for all links of a node, on whose threads it is called: one at a time, since what is unpacked is up to
    sixteen times as large as its bytes."""

    def __init__(self, check: Check) -> None:
        self._check, self._lock = check, threading.Lock()
        self._vouched: set[tuple[int, Contribution]] = set()  # own ones that were refused, and are right

    def __call__(self, round: int, lane: int, content: bytes) -> None:
        """Raises CodecError for what that lane cannot have contributed."""
        with self._lock:
            self._check(round, lane, content)

    async def own(self, store: ContributionStore, round: int, lane: int, *, refused_by: int) -> None:
        """Of this node, in that lane. Raises ContributionError if the other lane is right in refusing it."""
        if (made := store.kept.get(round)) is None or (round, made) in self._vouched:
            return
        try:
            content = await asyncio.to_thread(store.load, round)
            await asyncio.to_thread(self, round, lane, content)
        except KeyError:  # it went meanwhile
            return
        except CodecError as error:
            line = f"what this node wrote is refused by lane {refused_by}, and here: {error}"
            remedy = "look at its memory and its disk, and start it again with --resume"
            raise ContributionError(f"{line}; {remedy}") from None
        self._vouched.add((round, made))
