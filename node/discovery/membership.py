"""A node that serves its place as a member of the swarm: it keeps its record current, looks up whom it dials (the stage
below, and its own in lower lanes) before each connection, answers at the swarm's rendezvous, and checks that it can be
reached at its announced address.

None of it is needed while neighbours are connected. What fails here is reported, once each time that it changes, and
training goes on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...protocol.grid_place import GridPlace
from ...protocol.node_record import NodeRecord, NodeState, RunRecord, Seen, renew_every_s, stale_after_s
from ...protocol.rendezvous_messages import ADDRESSES_MAX, RendezvousRequest, RendezvousResponse
from ...protocol.rollback import RollbackPhase
from ...protocol.stage_choice import of_place, rival
from ...sim.reports.lanes import node_name
from ..links.transport import Report, StreamHandler
from ..security.policy import PLAIN, Security
from .claiming import ConnectProbe, connect_probe
from .client import Discovery, DiscoveryError
from .multiaddr import seen_from
from .rendezvous import RendezvousError, ask_rendezvous, rendezvous_handler

if TYPE_CHECKING:
    from ..links.dialling import Where
    from ..recovery_loop import RecoveryLoop

TICK_S = 1.0
RUN_LEASE_S = 3600.0
TELLERS = 3  # nodes, lane after lane, that publish the run's configuration: one would be its only source
FAILED_LATELY_S = 30.0
RETURN_EVERY_S = 30.0  # to the DHT, if its process here has ended


class Throughput:
    """Tokens/s over the last steps, from how many are completed when."""

    def __init__(self, tokens_per_step: int, window_s: float = 30.0) -> None:
        self._tokens, self._window_s = tokens_per_step, window_s
        self._seen: list[tuple[float, int]] = []  # (when, completed), at each change

    def note(self, now_s: float, completed: int) -> float:
        """0 until two changes have been seen, and after a rollback."""
        if self._seen and completed < self._seen[-1][1]:
            self._seen = []
        if not self._seen or completed > self._seen[-1][1]:
            self._seen.append((now_s, completed))
        while len(self._seen) > 2 and self._seen[0][0] < now_s - self._window_s:
            self._seen.pop(0)
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return self._tokens * (last - first) / (last_s - first_s) if last_s > first_s else 0.0


@dataclass(slots=True)
class Membership:
    """record: as it was published last. rendezvous addresses: host:port of those that let this node in."""

    discovery: Discovery
    record: NodeRecord
    run: RunRecord
    rendezvous: tuple[str, ...] = ()
    security: Security = PLAIN
    clock: Callable[[], float] = time.monotonic
    _complaint: str = ""
    _rival: str = ""
    _barred: dict[GridPlace, str] = field(default_factory=dict)  # the endpoint that was said to be so
    _seen: list[Seen] = field(default_factory=list)
    _seen_at_s: float = float("-inf")
    _recovery_loop: RecoveryLoop | None = None
    _returned_at_s: float = float("-inf")
    _last: dict[GridPlace, str] = field(default_factory=dict)  # the endpoint that was given last
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    # -- what others ask ---------------------------------------------------------------------------------------------

    def told(self) -> RendezvousResponse:
        return RendezvousResponse(
            addresses=self.discovery.addresses[:ADDRESSES_MAX],
            run=self.run.run,
            configuration=self.run.configuration,
            toml=self.run.toml,
            incarnation=self.record.incarnation,
        )

    def methods(self, report: Report) -> dict[str, StreamHandler]:
        """What a listener serves beside the run's own."""
        return {"Swarm": rendezvous_handler(self.told, report, self.security)}

    # -- who is where ------------------------------------------------------------------------------------------------

    async def seen(self) -> list[Seen]:
        """The records of the run, as of a second ago at most."""
        async with self._reading:
            if self.clock() > self._seen_at_s + TICK_S:
                run, grid = self.run, (self.record.stages, self.record.lanes)
                self._seen, _ = await asyncio.to_thread(self.discovery.read, run.run, run.configuration, *grid)
                self._seen_at_s = self.clock()
            return self._seen

    def where(self, place: GridPlace, report: Report) -> Where:
        """Asks at each call where the node of that place is now, for one dialler: None while nobody is known.

        It gives the best record's endpoint, if a connection to it is not refused; one that it gave lately, so that the
        dialler must have failed there, comes after the others. Where no record says, a neighbour that was there may
        live all the same, cut off from the DHT: then it gives the last endpoint again, unless its node said goodbye.
        What a record says is nobody's leave to send plain text out of this machine: such endpoints are not given.
        """
        given: dict[str, float] = {}

        def last() -> str | None:
            return max(given, key=lambda endpoint: given[endpoint], default=self._last.get(place))

        async def request() -> str | None:
            try:
                seen = await self.seen()
            except DiscoveryError as error:
                self._complain(report, str(error))
                return last()
            told = [each.record.endpoint for each in of_place(seen, place)]
            candidates = [endpoint for endpoint in told if self.security.may_dial(endpoint)]
            if not candidates:
                self._bar(report, place, told)
                left = {each.record.endpoint for each in seen if each.record.state is NodeState.LEFT}
                return None if last() in left else last()
            now = self.clock()
            order = sorted(
                dict.fromkeys(candidates), key=lambda e: given.get(e, -FAILED_LATELY_S) > now - FAILED_LATELY_S
            )
            found = order[0]
            if len(order) > 1:
                connect_probes = await asyncio.gather(
                    *(asyncio.to_thread(connect_probe, endpoint) for endpoint in order)
                )
                found = next(
                    (e for e, k in zip(order, connect_probes, strict=True) if k is ConnectProbe.ANSWERED), found
                )
            given[found], self._last[place] = now, found
            return found

        return request

    # -- what this node tells ----------------------------------------------------------------------------------------

    async def keep_current(self, recovery_loop: RecoveryLoop, tokens_per_step: int, report: Report) -> None:
        """Publish what the node does, at once when that changes and else as often as records are renewed; never
        returns."""
        self._recovery_loop, throughput = recovery_loop, Throughput(tokens_per_step)
        reached = asyncio.ensure_future(self.find_out_whether_reached(report))
        try:
            due_s = float("-inf")
            while True:
                now = self.clock()
                before, rate = self.record, throughput.note(now, recovery_loop.machine.completed)
                self.record = _current(before, recovery_loop, rate)
                if now >= due_s or (self.record.state, self.record.generation) != (before.state, before.generation):
                    due_s = now + renew_every_s(self.record.nodes)
                    await self._publish(report)
                    if not any(met.is_set() for met in recovery_loop.control.met.values()):
                        await self._look_for_rivals(report)
                await asyncio.sleep(TICK_S)
        finally:
            reached.cancel()

    async def _publish(self, report: Report) -> None:
        def tell() -> bool:
            if self.record.lane * self.record.stages + self.record.stage < TELLERS:
                self.discovery.publish_run(self.run, lease_s=RUN_LEASE_S)
            return self.discovery.publish(self.record, lease_s=stale_after_s(self.record.nodes))

        try:
            taken = await asyncio.to_thread(tell)
        except DiscoveryError as error:
            self._complain(report, str(error))
            await self._return(report)
        else:
            self._complain(report, "" if taken else "no member of the DHT took this node's record")

    async def _return(self, report: Report) -> None:
        """Enter the DHT again if its process here has ended, by whoever was there."""
        if self.discovery.alive or self.clock() < self._returned_at_s + RETURN_EVERY_S:
            return
        self._returned_at_s = self.clock()
        peers = list(self.discovery.peers)
        # What was read may be of hours ago, when the neighbours met; so the rendezvous addresses are asked too.
        known = {*self.rendezvous, *(each.record.endpoint for each in self._seen if each.living)}
        for endpoint in known - {self.record.endpoint}:
            with suppress(RendezvousError):
                answered = await ask_rendezvous(endpoint, self.security, deadline_s=5.0)
                peers += seen_from(answered.host, answered.response.addresses)
        try:
            self.discovery = await asyncio.to_thread(self.discovery.again, peers)
            print("this node is in the DHT again", file=sys.stderr, flush=True)
        except (DiscoveryError, OSError) as error:  # OSError: no process can be started
            self._complain(report, str(error))

    async def _look_for_rivals(self, report: Report) -> None:
        """Another node of this place, whose claim takes precedence, is reported. Which of the two is in the
        run, the neighbours decide. (A stranger's record looks the same.)"""
        try:
            other = rival(await self.seen(), self.record)
        except DiscoveryError as error:
            return self._complain(report, str(error))
        if (
            other
            and other.endpoint != self._rival
            and await asyncio.to_thread(connect_probe, other.endpoint) is ConnectProbe.ANSWERED
        ):
            self._rival = other.endpoint
            report(
                "stage-taken",
                f"{self._name(self.record.place)} is served by process {other.incarnation:x} at {other.endpoint} too, "
                "whose claim takes precedence; if neighbours connect there, stop this one, or start it again with "
                "--stage auto",
            )
        return None

    def _name(self, place: GridPlace) -> str:
        return node_name(place.stage, place.lane, self.record.lanes)

    def _bar(self, report: Report, place: GridPlace, endpoints: list[str]) -> None:
        if endpoints and self._barred.get(place) != endpoints[0]:
            self._barred[place] = endpoints[0]
            report(
                "discovery",
                f"{self._name(place)} is announced at {endpoints[0]}, on another machine; to connect there, start this "
                "node with --keys DIR (thinpipe keys issue makes one), or with --insecure, which lets anyone who can "
                "reach it read and change the run",
            )

    def _complain(self, report: Report, line: str) -> None:
        if line and line != self._complaint:
            report("discovery", f"{line}; training goes on, but new nodes may not find this one")
        self._complaint = line

    def leave(self) -> None:
        """The last words, as far as somebody hears them. Blocks for a moment."""
        now = self._recovery_loop
        try:
            last = _current(self.record, now, 0.0) if now else self.record
            last = replace(last, state=NodeState.LEFT, tokens_per_s=0.0)
            self.discovery.publish(last, lease_s=0.0)
        except DiscoveryError:
            pass  # they see it by its age
        finally:
            self.discovery.close()

    # -- can others reach it -----------------------------------------------------------------------------------------

    async def find_out_whether_reached(self, report: Report) -> None:
        """Have the announced endpoint dialled, by the rendezvous addresses that this node came in by and by itself, and
        say what comes
        of it."""
        tries = [self._dialled_back(rendezvous) for rendezvous in self.rendezvous]
        found = await asyncio.gather(self._dialled_here(), *tries)
        failed = [f"by {who} ({why})" for who, why in zip(("itself", *self.rendezvous), found, strict=True) if why]
        if failed:
            report(
                "unreachable",
                f"this node is announced at {self.record.endpoint} and cannot be reached there {', nor '.join(failed)}"
                "; open or map that port, or give the host:port at which the stage above reaches it with --announce",
            )

    async def _dialled_here(self) -> str:
        """Why it cannot be reached, or nothing."""
        if not self.security.may_dial(self.record.endpoint):
            return ""  # behind a port map: the rendezvous addresses tell
        try:
            answered = await ask_rendezvous(self.record.endpoint, self.security, deadline_s=5.0)
        except RendezvousError as error:
            return str(error)
        ours = answered.response.incarnation == self.record.incarnation
        return "" if ours else f"another node answers at {self.record.endpoint}"

    async def _dialled_back(self, rendezvous: str) -> str:
        request = RendezvousRequest(reach=self.record.endpoint, incarnation=self.record.incarnation)
        try:
            answer = (await ask_rendezvous(rendezvous, self.security, request)).response.dialled_back
        except RendezvousError:
            return ""  # it may have gone since
        return "" if answer == "yes" else answer


def _current(record: NodeRecord, recovery_loop: RecoveryLoop, tokens_per_s: float) -> NodeRecord:
    """What the node does now."""
    machine = recovery_loop.machine
    ends = {"above": machine.identity.first, "below": machine.identity.last}
    there = all(peer is not None for side, peer in machine.peers.items() if not ends[side])
    training = machine.phase is RollbackPhase.RUNNING and there
    return replace(
        record,
        state=NodeState.TRAINING if training else NodeState.WAITING,
        generation=machine.generation,
        completed_steps=machine.completed,
        committed_steps=recovery_loop.states.committed,
        tokens_per_s=tokens_per_s if training else 0.0,
    )
