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
from pathlib import Path

from ..links.proxy import Proxy
from ..reports.lanes import lane_path
from .fork_server import ForkServer
from .local_swarm import Swarm
from .node_launch import free_ports
from .planned_faults import PlannedFault
from .swarm_keeper import POLL_S, Grid, Injected, Lasting, Sleeper, Story, SwarmKeeper

PAUSE_S = 2.0
LEFT_OUT_S = 20.0  # in which a lane that is away is left out, beside twice the time that a round waits


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


class _Chaos(SwarmKeeper):
    """Breaks what `SwarmKeeper` looks after."""

    def __init__(
        self,
        run: Path,
        grid: Grid,
        swarm: Swarm,
        boundaries: dict[int, Proxy],
        laterals: dict[tuple[int, int], Proxy],
        on_event: Callable[[str], None],
    ) -> None:
        super().__init__(run, grid, swarm)
        self._on_event, self._boundaries, self._laterals = on_event, boundaries, laterals

    def inject(self, fault: PlannedFault) -> None:
        """Wait for the fault's moment, and let it happen. Faults that come too late for the run are left out."""
        self.wait(lambda: self.ended() or self.due(fault))
        time.sleep(fault.part * self._step_s())
        lane = None
        while not self.over and (lane := self._lane_for(fault)) is None:
            self.look()
            time.sleep(POLL_S)
        if self.over or lane is None:
            return
        done = self.look()
        injected = Injected(fault=fault, at_s=time.time(), step=done, lane=lane)
        moved = "" if lane == fault.lane else f" (lane {fault.lane} is away)"
        self._on_event(f"{fault.kind} at {fault.where(self.grid.lanes, lane)}{moved} after step {done}")
        node = lane * self.grid.stages + fault.stage
        match fault.kind:
            case "kill":
                self._kill(node)
            case "twice":
                self._kill(node)
                self.swarm.start(node, resume=True)
                time.sleep(fault.part * 4.0)  # while the first one starts, greets or restores
                self._kill(self._second(fault.second, node))
            case "pause":
                self.swarm.process(node).send_signal(signal.SIGSTOP)
                time.sleep(PAUSE_S if self.grid.lanes == 1 else min(PAUSE_S, self.grid.round_timeout_s / 2))
                self.swarm.process(node).send_signal(signal.SIGCONT)
            case "sleeper":
                self.swarm.process(node).send_signal(signal.SIGSTOP)
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
                self._away(injected, lane, self.grid.nodes(lane))
            case "absent":
                self._away(injected, lane, [node])
            case "hang":
                self._hang(injected, lane, node)
            case "partition":
                self._partition(injected, lane)
            case "join":
                for each in self.grid.nodes(lane):
                    self.swarm.start(each, resume=False)
        self.story.injected.append(injected)
        self.mind_the_dead()

    def _lane_for(self, fault: PlannedFault) -> int | None:
        """That to which it happens: its own, or if something lasting is done to that already, the next one; None: to
        no lane yet."""
        busy = {each.lane for each in self.lasting}
        lanes = self.grid.lanes
        for lane in ((fault.lane + further) % lanes for further in range(lanes)):
            there = all(self.swarm.nodes[node] for node in self.grid.nodes(lane))
            if lane not in busy and (there or fault.kind == "join"):
                return lane
        return None

    def _second(self, node: int, first: int) -> int:
        """The planned one, or the next that runs and is not the first."""
        count = len(self.swarm.nodes)
        held = frozenset[int]().union(*(each.holds for each in self.lasting))
        for each in ((node + further) % count for further in range(count)):
            if each not in held and each != first and self.swarm.nodes[each]:
                return each
        return first

    def _lateral(self, fault: PlannedFault, lane: int) -> Proxy:
        low, high = fault.between(lane)
        return self._laterals[high * self.grid.stages + fault.stage, low * self.grid.stages + fault.stage]

    def _replace(self, node: int) -> None:
        """Start another process for it, at another address, because the one that sleeps holds its own."""
        self.sleepers.append(Sleeper(process=self.swarm.process(node), node=node, since_s=time.time()))
        (port,) = free_ports(1)
        self.swarm.ports[node] = port
        if above := self._boundaries.get(node - 1):
            above.redirect(f"127.0.0.1:{port}")
        for (_, there), proxy in self._laterals.items():
            if there == node:
                proxy.redirect(f"127.0.0.1:{port}")
        self.swarm.start(node, resume=True)

    def _lose_disk(self, node: int) -> None:
        lane, stage = divmod(node, self.grid.stages)
        if disk := self.swarm.disk(stage):
            shutil.rmtree(lane_path(disk, lane, self.grid.lanes), ignore_errors=True)
        rounds = lane_path(self.run, lane, self.grid.lanes) / "rounds" / f"stage-{stage}"
        shutil.rmtree(rounds, ignore_errors=True)

    def _kill(self, node: int) -> None:
        process = self.swarm.process(node)
        process.kill()
        process.wait()

    # -- faults that last -------------------------------------------------------------------------------------------

    def _away(self, injected: Injected, lane: int, nodes: Sequence[int]) -> None:
        """They are killed, and started again once the lane was left out."""
        for node in nodes:
            self.swarm.process(node).kill()
        for node in nodes:
            self.swarm.process(node).wait()

        def back() -> None:
            if self.over:
                for node in self.grid.nodes(lane):
                    self._kill(node)
                self.story.away.append(lane)
                self._on_event(f"lane {lane} stays away: the others are through")
                return
            for node in nodes:
                self.swarm.start(node, resume=True)
            self._on_event(f"lane {lane} is started again")

        self._until_left_out(injected, lane, back, frozenset(nodes))

    def _hang(self, injected: Injected, lane: int, node: int) -> None:
        process = self.swarm.process(node)
        process.send_signal(signal.SIGSTOP)
        self._until_left_out(injected, lane, lambda: process.send_signal(signal.SIGCONT))

    def _partition(self, injected: Injected, lane: int) -> None:
        ends = set(self.grid.nodes(lane))
        own = [proxy for pair, proxy in self._laterals.items() if ends & set(pair)]
        for proxy in own:
            proxy.down = True

        def heal() -> None:
            for proxy in own:
                proxy.down = False
            self._on_event(f"lane {lane} is connected again")

        self._until_left_out(injected, lane, heal)

    def _outage(self, injected: Injected, proxy: Proxy) -> None:
        ends_at = time.monotonic() + injected.fault.length * self.grid.round_timeout_s
        proxy.down = True

        def heal() -> None:
            proxy.down = False

        self.lasting.append(
            Lasting(
                lane=-1,  # neither of the two is away
                until=lambda: self.over or time.monotonic() >= ends_at,
                ends=heal,
                holds=frozenset(),
            )
        )

    def _until_left_out(
        self, injected: Injected, lane: int, ends: Callable[[], None], holds: frozenset[int] = frozenset()
    ) -> None:
        began, timeout_s = time.monotonic(), self.grid.round_timeout_s

        def due() -> bool:
            lasted_s = time.monotonic() - began
            if lasted_s > timeout_s and self.watch.is_left_out(lane):
                injected.left_out = True
                return True
            return self.over or lasted_s > 2 * timeout_s + LEFT_OUT_S

        self.lasting.append(Lasting(lane=lane, until=due, ends=ends, holds=holds))

    def _step_s(self) -> float:
        return statistics.median(self.watch.step_seconds) if self.watch.step_seconds else 1.0
