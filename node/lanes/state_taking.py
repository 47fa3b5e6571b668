"""Which state of another lane this one takes up, how far that is, and for how long it is waited for.

Stage 0 chooses, and all stages of the lane are told to *want* the same: a lane, and a number of steps. Each fetches its
own part (`node.lanes.state_copies`) and says when it is *here*. When all have it, stage 0 holds it as *taken*, on its
disk: from then on whatever the lane had itself is void, and it goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..checkpoints.manifest import CheckpointError
from .state_copies import ASK_AGAIN_S

WANTED_S = 3600.0  # after which a state that has not come is given up for another one

State = tuple[int, int]  # a lane, and after how many steps


class StateTaking:
    """Of one stage. taken: by an earlier process. deadline_s: without the source. fetch: brings this stage's part here;
    on_want: before that is asked for; on_here: it has come."""

    def __init__(
        self,
        taken: State | None,
        *,
        deadline_s: float,
        fetch: Callable[[int, int], Awaitable[None]],
        on_want: Callable[[int], None],
        on_here: Callable[[], None],
    ) -> None:
        self.wanted = self.here = self.taken = taken
        self._deadline_s = deadline_s
        self._fetch, self._on_want, self._on_here = fetch, on_want, on_here
        self._job: asyncio.Task[None] | None = None
        self._since_s = self._source_s = 0.0  # when it was wanted first, and when its source was there last

    def took(self, completed: int) -> bool:
        """Whether the state after so many steps is another lane's, which this one has taken up."""
        return self.taken is not None and self.taken[1] == completed

    @property
    def under_way(self) -> State | None:
        """What is wanted, and not taken yet."""
        return None if self.taken else self.wanted

    def want(self, state: State | None) -> None:
        """Take up this one, and no other that was wanted; None: none."""
        if state == self.wanted:
            return
        self.wanted, self.taken = state, None
        if self._job:
            self._job.cancel()
        self._since_s = self._source_s = asyncio.get_running_loop().time()
        if state:
            self._on_want(state[1])
            self._job = asyncio.create_task(self._bring(*state))

    def is_overdue(self, *, source_is_there: bool) -> bool:
        """Whether it has not come for too long, or its source has been away for long."""
        now_s = asyncio.get_running_loop().time()
        if source_is_there:
            self._source_s = now_s
        return now_s >= min(self._source_s + self._deadline_s, self._since_s + WANTED_S)

    def forget(self) -> None:
        """The lane is back with it, or goes on without it."""
        self.wanted = self.taken = None

    async def _bring(self, lane: int, completed: int) -> None:
        while True:
            try:
                await self._fetch(lane, completed)
                break
            except (CheckpointError, OSError) as error:
                print(f"the state of lane {lane} after {completed} steps: {error}; asks again", flush=True)
                await asyncio.sleep(ASK_AGAIN_S)
        self.here = lane, completed
        self._on_here()
