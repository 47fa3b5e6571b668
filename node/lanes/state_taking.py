"""Which state of another lane this one takes up, how far that is, and for how long it is waited for.

Stage 0 chooses, and all stages of the lane are told to *want* the same: a lane, and a number of steps. Each fetches its
own part (`node.lanes.state_copies`) and says when it is *here*. When all have it, stage 0 holds it as *taken*, on its
disk: from then on whatever the lane had itself is void, and it goes on from there.

One that does not come is given up, and another one chosen: its source has been away for long, says that it cannot give
it, or sends nothing; or this stage has it, and another stage does not get its part in ten times as long (a deadline
for each message is ten times the longest step, too).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection

from ..checkpoints.manifest import CheckpointError
from .state_copies import ASK_AGAIN_S

SILENCE_S = 60.0  # without a byte of it
DECLINED_MAX = 3  # times that its source says so
TRIES = 5  # of one state: its source may have been on its way back
OTHERS_TIMES = 10  # of what this stage took: how long the other stages may

State = tuple[int, int]  # a lane, and after how many steps


class StateTaking:
    """Of one stage. taken: by an earlier process. deadline_s: without the source. fetch: brings this stage's part here;
    on_want: before that is asked for; on_here: it has come; came_s: when bytes of it did last."""

    def __init__(
        self,
        taken: State | None,
        *,
        deadline_s: float,
        fetch: Callable[[int, int], Awaitable[None]],
        on_want: Callable[[int], None],
        on_here: Callable[[], None],
        came_s: Callable[[], float],
    ) -> None:
        self.wanted = self.here = self.taken = taken
        self._in_vain: Counter[State] = Counter()  # how often it did not come
        self._deadline_s = deadline_s
        self._fetch, self._on_want, self._on_here, self.came_s = fetch, on_want, on_here, came_s
        self._job: asyncio.Task[None] | None = None
        # When it was wanted first, when its source was there last, and when it had come.
        self._since_s = self._source_s = self._here_s = 0.0
        self._declined = 0

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
        if before := self._job:
            before.cancel()
        self._since_s = self._source_s = asyncio.get_running_loop().time()
        self._declined = 0
        if state:
            self.here = None
            self._on_want(state[1])
            self._job = asyncio.create_task(self._bring(*state, after=before))

    def give_up(self) -> None:
        """What is wanted does not come: another one is to be chosen."""
        if state := self.under_way:
            lane, completed = state
            print(f"the state of lane {lane} after {completed} steps does not come; another one is sought", flush=True)
            self._in_vain[state] += 1
            self.want(None)

    def choose(self, choice: Callable[[Collection[State]], State | None]) -> None:
        """Want what `choice` finds, which is told what not to: first of all whatever was tried before."""
        found = choice(self._in_vain) or choice([state for state, tries in self._in_vain.items() if tries >= TRIES])
        if found:
            self.want(found)

    def is_overdue(self, *, source_is_there: bool) -> bool:
        """Whether what is wanted is to be given up."""
        now_s = asyncio.get_running_loop().time()
        if source_is_there:
            self._source_s = now_s
        if self.here == self.wanted:
            due_s = self._here_s + self._deadline_s + OTHERS_TIMES * (self._here_s - self._since_s)
        else:
            due_s = max(self._since_s, self.came_s()) + max(self._deadline_s, SILENCE_S)
        return now_s >= min(self._source_s + self._deadline_s, due_s) or self._declined >= DECLINED_MAX

    def forget(self) -> None:
        """The lane is back with it, or goes on without it."""
        self.wanted = self.taken = None

    def close(self) -> None:
        """Nothing is fetched any more."""
        if self._job:
            self._job.cancel()

    async def _bring(self, lane: int, completed: int, *, after: asyncio.Task[None] | None) -> None:
        if after:
            await asyncio.wait([after])  # it has yet to let go of what it was fetching
        while True:
            try:
                await self._fetch(lane, completed)
                break
            except (CheckpointError, OSError) as error:
                self._declined += 1
                print(f"the state of lane {lane} after {completed} steps: {error}; asks again", flush=True)
                await asyncio.sleep(ASK_AGAIN_S)
        self.here, self._here_s = (lane, completed), asyncio.get_running_loop().time()
        self._on_here()
