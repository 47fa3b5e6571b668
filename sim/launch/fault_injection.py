"""Inject faults into a swarm, one lane or a grid of several, at the moments that were planned (`planned_faults`).

Links that faults are to break pass through a relay on this machine (`links.proxy`). Everything that is known of the
run, such as how far it is and which lanes go on without which, is read from its records, as any watcher could.

A fault that has a lane left out lasts as long as that takes: until the others say so in their records, or the run ends.
Meanwhile other faults go on in other lanes. A lane that is away when the others are through stays away: there is nobody
left to come back to.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..links.proxy import Proxy
from ..reports.lanes import lane_path
from ..reports.run_watch import RunWatch
from .fork_server import ForkServer, Process
from .local_swarm import Swarm, SwarmError
from .node_launch import free_ports
from .planned_faults import PlannedFault

PAUSE_S = 2.0
POLL_S = 0.02
STEP_TIMEOUT_S = 300.0  # without a step from anybody
LEFT_OUT_S = 20.0  # in which a lane that is away is left out, beside twice the time that a round waits


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


def disturb(
    run: Path,
    faults: Iterable[PlannedFault],
    *,
    grid: Grid,
    on_event: Callable[[str], None],
    forks: ForkServer | None = None,
) -> Story:
    """Run the swarm of `run`/run.toml while `faults` happen to it, until it ends; forks: see `Swarm`. Raises SwarmError
    when it does not come through."""
    count = grid.lanes * grid.stages
    upper = [node for node in range(count) if (node + 1) % grid.stages]
    across = [
        (higher * grid.stages + stage, lower * grid.stages + stage)
        for higher in range(grid.lanes)
        for lower in range(higher)
        for stage in range(grid.stages)
    ]
    with ExitStack() as held:
        ports, relays, lateral = free_ports(count), free_ports(count), free_ports(len(across))
        boundaries = {
            node: held.enter_context(Proxy(f"127.0.0.1:{ports[node + 1]}", port=relays[node + 1])) for node in upper
        }
        laterals = {
            pair: held.enter_context(Proxy(f"127.0.0.1:{ports[pair[1]]}", port=port))
            for pair, port in zip(across, lateral, strict=True)
        }
        swarm = Swarm(
            run,
            stages=grid.stages,
            lanes=grid.lanes,
            ports=ports,
            next_ports=relays,
            lateral_ports=dict(zip(across, lateral, strict=True)),
            disks=run / "disks" if grid.apart else None,
            forks=forks,
        )
        held.callback(swarm.stop)
        chaos = _Chaos(run, grid, swarm, boundaries, laterals, on_event)
        chaos.begin()
        for fault in faults:
            chaos.inject(fault)
            if chaos.over:
                break
        chaos.until_ended()
        return chaos.story


@dataclass(slots=True, kw_only=True)
class _Sleeper:
    """A process that was stopped and replaced."""

    process: Process
    node: int
    since_s: float
    awake: bool = False


@dataclass(slots=True, kw_only=True)
class _Lasting:
    """A fault that is not over. ends: what ends it. until: whether that is due."""

    lane: int
    until: Callable[[], bool]
    ends: Callable[[], None]
    holds: frozenset[int]  # nodes that are not to be started meanwhile


class _Chaos:
    def __init__(
        self,
        run: Path,
        grid: Grid,
        swarm: Swarm,
        boundaries: dict[int, Proxy],
        laterals: dict[tuple[int, int], Proxy],
        on_event: Callable[[str], None],
    ) -> None:
        self.story = Story()
        self._run, self._grid, self._swarm, self._on_event = run, grid, swarm, on_event
        self._boundaries, self._laterals = boundaries, laterals
        self._watch = RunWatch(run, lanes=grid.lanes, stages=grid.stages)
        self._sleepers: list[_Sleeper] = []
        self._lasting: list[_Lasting] = []
        self._seen_at = time.monotonic()
        self._seen: object = None
        self._began: float | None = None  # when the first step was done

    # -- looking after the run --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start all who are there from the start."""
        for lane in range(self._grid.lanes):
            for node in self._grid.nodes(lane) if lane != self._grid.joining else ():
                self._swarm.start(node, resume=False)

    def _look(self) -> int:
        """Steps that the first of the lanes has done; also keeps watch."""
        self._watch.look()
        done, now = self._watch.steps_done, time.monotonic()
        if self._watch.progress != self._seen:
            self._seen, self._seen_at = self._watch.progress, now
            self._began = self._began or (now if done else None)
        elif now - self._seen_at > STEP_TIMEOUT_S:
            where = [f"lane {lane}: {steps}" for lane, steps in enumerate(self._watch.lane_steps)]
            so_far = ", ".join(where) if len(where) > 1 else f"after step {done}"
            raise SwarmError(f"no step for {STEP_TIMEOUT_S:g} s ({so_far}); see the logs in {self._run}", 1)
        self._mind_the_dead()
        for lasting in [each for each in self._lasting if each.until()]:
            self._lasting.remove(lasting)
            lasting.ends()
        return done

    def _mind_the_dead(self) -> None:
        """Nobody but us may have killed anybody."""
        held = frozenset[int]().union(*(each.holds for each in self._lasting))
        for number, node in enumerate(self._swarm.nodes):
            lane = number // self._grid.stages
            if node is None or number in held or lane in self.story.away:
                continue
            code = node.process.poll()
            if code == -signal.SIGKILL and not self._lane_over(lane):
                self._swarm.start(number, resume=True)
            elif code and not self._lane_over(lane):
                raise SwarmError(str(node.in_lane(str(node.failure)) if node.failure else node.why), 1)
        for sleeper in list(self._sleepers):
            back = self._watch.rolled_back_s[sleeper.node] > sleeper.since_s
            if not sleeper.awake and (back or self._lane_over(sleeper.node // self._grid.stages)):
                sleeper.awake = True
                sleeper.process.send_signal(signal.SIGCONT)
            if sleeper.process.poll() is not None:
                self._sleepers.remove(sleeper)
                self.story.fenced += sleeper.process.returncode == 2

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        """The condition looks after the run, and raises SwarmError when there is no step for too long."""
        while not condition():
            time.sleep(POLL_S)

    def _lane_over(self, lane: int) -> bool:
        """Whether anybody of it has left, which nobody does before all of it are through."""
        return any((node := self._swarm.nodes[each]) and node.process.poll() == 0 for each in self._grid.nodes(lane))

    @property
    def over(self) -> bool:
        """Whether a lane has left, which none does before it has all from the others that it averages with."""
        return any(self._lane_over(lane) for lane in range(self._grid.lanes))

    def _due(self, fault: PlannedFault) -> bool:
        done = self._look()
        if fault.after_s is None:
            return done >= fault.step
        return self._began is not None and time.monotonic() >= self._began + fault.after_s

    def _ended(self) -> bool:
        alive = any(node and node.process.poll() is None for node in self._swarm.nodes)
        return self.over and not alive and not self._lasting

    def until_ended(self) -> None:
        def ended() -> bool:
            self._look()
            return self._ended()

        self._wait(ended)

    # -- faults -----------------------------------------------------------------------------------------------------

    def inject(self, fault: PlannedFault) -> None:
        """Wait for the fault's moment, and let it happen. Faults that come too late for the run are left out."""
        self._wait(lambda: self._ended() or self._due(fault))
        time.sleep(fault.part * self._step_s())
        lane = None
        while not self.over and (lane := self._lane_for(fault)) is None:
            self._look()
            time.sleep(POLL_S)
        if self.over or lane is None:
            return
        done = self._look()
        injected = Injected(fault=fault, at_s=time.time(), step=done, lane=lane)
        moved = "" if lane == fault.lane else f" (lane {fault.lane} is away)"
        self._on_event(f"{fault.kind} at {fault.where(self._grid.lanes, lane)}{moved} after step {done}")
        node = lane * self._grid.stages + fault.stage
        match fault.kind:
            case "kill":
                self._kill(node)
            case "twice":
                self._kill(node)
                self._swarm.start(node, resume=True)
                time.sleep(fault.part * 4.0)  # while the first one starts, greets or restores
                self._kill(self._second(fault.second, node))
            case "pause":
                self._swarm.process(node).send_signal(signal.SIGSTOP)
                time.sleep(PAUSE_S if self._grid.lanes == 1 else min(PAUSE_S, self._grid.round_timeout_s / 2))
                self._swarm.process(node).send_signal(signal.SIGCONT)
            case "sleeper":
                self._swarm.process(node).send_signal(signal.SIGSTOP)
                self._replace(node)
            case "disk":
                self._kill(node)
                self._lose_disk(node)
            case "cut" | "half":
                self._boundaries[node].cut(half=fault.kind == "half")
            case "lateral":
                self._lateral(fault, lane).cut()
            case "outage":
                self._outage(injected, self._lateral(fault, lane))
            case "lane":
                self._away(injected, lane, self._grid.nodes(lane))
            case "absent":
                self._away(injected, lane, [node])
            case "hang":
                self._hang(injected, lane, node)
            case "partition":
                self._partition(injected, lane)
            case "join":
                for each in self._grid.nodes(lane):
                    self._swarm.start(each, resume=False)
        self.story.injected.append(injected)
        self._mind_the_dead()

    def _lane_for(self, fault: PlannedFault) -> int | None:
        """That to which it happens: its own, or if something lasting is done to that already, the next one; None: to
        no lane yet."""
        busy = {each.lane for each in self._lasting}
        lanes = self._grid.lanes
        for lane in ((fault.lane + further) % lanes for further in range(lanes)):
            there = all(self._swarm.nodes[node] for node in self._grid.nodes(lane))
            if lane not in busy and (there or fault.kind == "join"):
                return lane
        return None

    def _second(self, node: int, first: int) -> int:
        """The planned one, or the next that runs and is not the first."""
        count = len(self._swarm.nodes)
        held = frozenset[int]().union(*(each.holds for each in self._lasting))
        for each in ((node + further) % count for further in range(count)):
            if each not in held and each != first and self._swarm.nodes[each]:
                return each
        return first

    def _lateral(self, fault: PlannedFault, lane: int) -> Proxy:
        low, high = fault.between(lane)
        return self._laterals[high * self._grid.stages + fault.stage, low * self._grid.stages + fault.stage]

    def _replace(self, node: int) -> None:
        """Start another process for it, at another address, because the one that sleeps holds its own."""
        self._sleepers.append(_Sleeper(process=self._swarm.process(node), node=node, since_s=time.time()))
        (port,) = free_ports(1)
        self._swarm.ports[node] = port
        if above := self._boundaries.get(node - 1):
            above.redirect(f"127.0.0.1:{port}")
        for (_, there), proxy in self._laterals.items():
            if there == node:
                proxy.redirect(f"127.0.0.1:{port}")
        self._swarm.start(node, resume=True)

    def _lose_disk(self, node: int) -> None:
        lane, stage = divmod(node, self._grid.stages)
        if disk := self._swarm.disk(stage):
            shutil.rmtree(lane_path(disk, lane, self._grid.lanes), ignore_errors=True)
        rounds = lane_path(self._run, lane, self._grid.lanes) / "rounds" / f"stage-{stage}"
        shutil.rmtree(rounds, ignore_errors=True)

    def _kill(self, node: int) -> None:
        process = self._swarm.process(node)
        process.kill()
        process.wait()

    # -- faults that last -------------------------------------------------------------------------------------------

    def _away(self, injected: Injected, lane: int, nodes: Sequence[int]) -> None:
        """They are killed, and started again once the lane was left out."""
        for node in nodes:
            self._swarm.process(node).kill()
        for node in nodes:
            self._swarm.process(node).wait()

        def back() -> None:
            if self.over:
                for node in self._grid.nodes(lane):
                    self._kill(node)
                self.story.away.append(lane)
                self._on_event(f"lane {lane} stays away: the others are through")
                return
            for node in nodes:
                self._swarm.start(node, resume=True)
            self._on_event(f"lane {lane} is started again")

        self._until_left_out(injected, lane, back, frozenset(nodes))

    def _hang(self, injected: Injected, lane: int, node: int) -> None:
        process = self._swarm.process(node)
        process.send_signal(signal.SIGSTOP)
        self._until_left_out(injected, lane, lambda: process.send_signal(signal.SIGCONT))

    def _partition(self, injected: Injected, lane: int) -> None:
        ends = set(self._grid.nodes(lane))
        own = [proxy for pair, proxy in self._laterals.items() if ends & set(pair)]
        for proxy in own:
            proxy.down = True

        def heal() -> None:
            for proxy in own:
                proxy.down = False
            self._on_event(f"lane {lane} is connected again")

        self._until_left_out(injected, lane, heal)

    def _outage(self, injected: Injected, proxy: Proxy) -> None:
        ends_at = time.monotonic() + injected.fault.length * self._grid.round_timeout_s
        proxy.down = True

        def heal() -> None:
            proxy.down = False

        self._lasting.append(
            _Lasting(
                lane=-1,  # neither of the two is away
                until=lambda: self.over or time.monotonic() >= ends_at,
                ends=heal,
                holds=frozenset(),
            )
        )

    def _until_left_out(
        self, injected: Injected, lane: int, ends: Callable[[], None], holds: frozenset[int] = frozenset()
    ) -> None:
        began, timeout_s = time.monotonic(), self._grid.round_timeout_s

        def due() -> bool:
            lasted_s = time.monotonic() - began
            if lasted_s > timeout_s and self._watch.is_left_out(lane):
                injected.left_out = True
                return True
            return self.over or lasted_s > 2 * timeout_s + LEFT_OUT_S

        self._lasting.append(_Lasting(lane=lane, until=due, ends=ends, holds=holds))

    def _step_s(self) -> float:
        return statistics.median(self._watch.step_seconds) if self._watch.step_seconds else 1.0
