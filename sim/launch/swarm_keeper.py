"""Look after a swarm that is disturbed on purpose: who was killed is started again, who was stopped is let go on, and
faults that last are ended when that is due.

All of it happens in `look`, which whoever waits for anything calls; nothing runs beside it. A node that ends otherwise
than by the faults ends the run, since that is what the faults are to find.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..reports.run_watch import RunWatch
from .fork_server import Process
from .local_swarm import Swarm, SwarmError
from .planned_faults import PlannedFault

POLL_S = 0.02
STEP_TIMEOUT_S = 300.0  # without a step from anybody


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is disturbed. joining: the lane that is not there from the start. round_timeout_s: how long a round waits
    for a lane. apart: each stage has a disk of its own."""

    stages: int
    lanes: int = 1
    joining: int | None = None
    round_timeout_s: float = 0.0
    apart: bool = False

    def nodes(self, lane: int) -> range:
        """The numbers of a lane's nodes."""
        return range(lane * self.stages, (lane + 1) * self.stages)


@dataclass(slots=True, kw_only=True)
class Injected:
    """A fault that was injected, and its effect. lane: to which it happened. left_out: whether that was left out while
    it lasted."""

    fault: PlannedFault
    at_s: float
    step: int  # the newest that the run had done
    lane: int
    left_out: bool = False
    back_s: float | None = None  # when the last of those who were lost had found its place again
    progress_s: float | None = None  # when the run had done a step that it had not done before


@dataclass(slots=True, kw_only=True)
class Story:
    """All of a disturbed run. away: lanes that were when it ended, and were not started again."""

    injected: list[Injected] = field(default_factory=list)
    fenced: int = 0  # sleepers that woke up and were refused
    away: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Sleeper:
    """A process that was stopped and replaced."""

    process: Process
    node: int
    since_s: float
    awake: bool = False


@dataclass(slots=True, kw_only=True)
class Lasting:
    """A fault that is not over. ends: what ends it. until: whether that is due."""

    lane: int
    until: Callable[[], bool]
    ends: Callable[[], None]
    holds: frozenset[int]  # nodes that are not to be started meanwhile


class SwarmKeeper:
    """Of the swarm of `run`, which is such a grid."""

    def __init__(self, run: Path, grid: Grid, swarm: Swarm) -> None:
        self.story = Story()
        self.run, self.grid, self.swarm = run, grid, swarm
        self.watch = RunWatch(run, lanes=grid.lanes, stages=grid.stages)
        self.sleepers: list[Sleeper] = []
        self.lasting: list[Lasting] = []
        self._seen_at = time.monotonic()
        self._seen: object = None
        self._began: float | None = None  # when the first step was done

    def begin(self) -> None:
        """Start all who are there from the start."""
        for lane in range(self.grid.lanes):
            for node in self.grid.nodes(lane) if lane != self.grid.joining else ():
                self.swarm.start(node, resume=False)

    def look(self) -> int:
        """Steps that the first of the lanes has done; also keeps watch."""
        self.watch.look()
        done, now = self.watch.steps_done, time.monotonic()
        if self.watch.progress != self._seen:
            self._seen, self._seen_at = self.watch.progress, now
            self._began = self._began or (now if done else None)
        elif now - self._seen_at > STEP_TIMEOUT_S:
            where = [f"lane {lane}: {steps}" for lane, steps in enumerate(self.watch.lane_steps)]
            so_far = ", ".join(where) if len(where) > 1 else f"after step {done}"
            raise SwarmError(f"no step for {STEP_TIMEOUT_S:g} s ({so_far}); see the logs in {self.run}", 1)
        self.mind_the_dead()
        for lasting in [each for each in self.lasting if each.until()]:
            self.lasting.remove(lasting)
            lasting.ends()
        return done

    def mind_the_dead(self) -> None:
        """Nobody but us may have killed anybody."""
        held = frozenset[int]().union(*(each.holds for each in self.lasting))
        for number, node in enumerate(self.swarm.nodes):
            lane = number // self.grid.stages
            if node is None or number in held or lane in self.story.away:
                continue
            code = node.process.poll()
            if code == -signal.SIGKILL and not self.lane_over(lane):
                self.swarm.start(number, resume=True)
            elif code and not self.lane_over(lane):
                raise SwarmError(node.told(node.failure) if node.failure else node.why, 1)
        for sleeper in list(self.sleepers):
            back = self.watch.rolled_back_s[sleeper.node] > sleeper.since_s
            if not sleeper.awake and (back or self.lane_over(sleeper.node // self.grid.stages)):
                sleeper.awake = True
                sleeper.process.send_signal(signal.SIGCONT)
            if sleeper.process.poll() is not None:
                self.sleepers.remove(sleeper)
                self.story.fenced += sleeper.process.returncode == 2
                replacement = self.swarm.nodes[sleeper.node]
                if sleeper.process.returncode == 0 and replacement and replacement.process.poll() is None:
                    # Neither had a place when both were lost from sight. This one came first, and went to the end.
                    replacement.process.kill()
                    replacement.process.wait()

    @staticmethod
    def wait(condition: Callable[[], bool]) -> None:
        """The condition looks after the run, and raises SwarmError when there is no step for too long."""
        while not condition():
            time.sleep(POLL_S)

    def lane_over(self, lane: int) -> bool:
        """Whether anybody of it has left, which nobody does before all of it are through."""
        return any((node := self.swarm.nodes[each]) and node.process.poll() == 0 for each in self.grid.nodes(lane))

    @property
    def over(self) -> bool:
        """Whether a lane has left, which none does before it has all from the others that it averages with."""
        return any(self.lane_over(lane) for lane in range(self.grid.lanes))

    def due(self, fault: PlannedFault) -> bool:
        done = self.look()
        if fault.after_s is None:
            return done >= fault.step
        return self._began is not None and time.monotonic() >= self._began + fault.after_s

    def ended(self) -> bool:
        alive = any(node and node.process.poll() is None for node in self.swarm.nodes)
        return self.over and not alive and not self.lasting

    def until_ended(self) -> None:
        """Look after it until all have left."""

        def through() -> bool:
            self.look()
            return self.ended()

        self.wait(through)
