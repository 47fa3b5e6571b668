"""All lateral links of a node: it gives its contributions to its own stage in the other lanes, and waits for theirs.

The node of the higher lane dials that of the lower one, so each pair has one stream, and a node one address for all
that dial it. What a training loop needs is `publish`, `contributions` and `forget_before`; that connections break, that
processes come back, and that a lane is set back to an earlier step and asks again, stays in here.

Who is a member of which rounds is decided elsewhere (node/lanes/lane_membership.py), and said here by `expect`. A lane
that was left out has contributions that count for nobody; they are dropped at both ends, and what it gives once it has
come back is asked for by the number of another history (stays.py).

What is on the disk below `directory`: `own`, this node's contributions until no peer will ask for them again, and
`lane-N`, those of lane N until this node will not ask for them again. A process that comes back finds both, and in
`forgot` what it has promised never to ask for: the peers have dropped it, whatever checkpoints lie here.

A full mesh, because there are few lanes: every contribution crosses each thin link once, and nobody has to be waited
for but who made it. A ring, or a tree, would send each byte over more links one after the other, and each node's adding
would hold up the next; adding in the order of lanes needs each contribution by itself anyway.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...protocol.control_messages import CopyFrame
from ...protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ..links.dialling import Where
from ..links.transport import Report
from ..security.policy import PLAIN, Security
from .contribution_check import ContributionCheck
from .contribution_store import ContributionError, ContributionStore
from .lateral_dialling import dial_lane
from .lateral_link import LateralLink, LateralLinkEnded
from .lateral_outgoing import Kind
from .lateral_server import LateralServer
from .lateral_settings import LateralSettings
from .promise_file import PROMISE
from .stays import Stays, all_stay, none_known


@dataclass(frozen=True, slots=True, kw_only=True)
class LateralFigures:
    """For the records. Framed bytes by kind, over all lateral links and since this process began; rate: while a
    contribution waited, in bits/s, None where too little was sent to tell."""

    sent_bytes: dict[Kind, int]
    received_bytes: dict[Kind, int]
    rate_bits_per_s: dict[int, float | None]  # by lane
    waited_s: float  # in `contributions`


class LateralLinks:
    """The lateral links of the node that `identity` describes.

    addresses: where the nodes of all lower lanes are, by lane. directory: of this node alone; what an earlier process
    left there is read and checked at once. Times are those of the event loop, on which all methods belong.
    """

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        addresses: Mapping[int, str | Where],
        directory: Path,
        settings: LateralSettings,
        report: Report,
        security: Security = PLAIN,
        on_held: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= identity.lane < identity.lanes or sorted(addresses) != list(range(identity.lane)):
            given = ", ".join(map(str, sorted(addresses))) or "none"
            raise ValueError(f"lane {identity.lane} of {identity.lanes} dials all lower ones, addresses are of {given}")
        self._identity, self._addresses, self._settings = identity, dict(addresses), settings
        self._report, self._security, self._on_held = report, security, on_held
        self._stays = all_stay(identity.lanes)
        self.directory = directory
        self._own = ContributionStore(directory / "own")
        check = ContributionCheck(settings.check)
        self._links: dict[int, LateralLink] = {}
        for lane in range(identity.lanes):
            if lane != identity.lane:
                self._links[lane] = LateralLink(
                    identity=identity,
                    peer_lane=lane,
                    own=self._own,
                    received=ContributionStore(directory / f"lane-{lane}"),
                    settings=settings,
                    on_peer_moved=self._drop_own,
                    on_held=on_held,
                    check=check,
                )
        for store in (self._own, *(link.received for link in self._links.values())):
            for line in store.restore():
                report("contribution", line)
        self._made = max(self._own.kept, default=-1) + 1  # rounds that this node has contributed to
        self._waited_s = 0.0
        self._needed_from: int | None = None  # None: this node has not said yet where it is
        self._promised, self._promising = PROMISE.read(directory), asyncio.Lock()
        self._writing = asyncio.Lock()
        self._may_write = asyncio.Event()  # it is known which log counts
        self._may_write.set()
        self._jobs: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # what ends this node
        self._broken.add_done_callback(lambda broken: broken.exception())  # seen, if `run` is over by then
        self.server = LateralServer(identity, self._links, settings, report, security, on_broken=self._break)

    @property
    def links(self) -> list[LateralLink]:
        """By lane, in order."""
        return list(self._links.values())

    def link_to(self, lane: int) -> LateralLink:
        """That one. Raises KeyError for this node's own lane."""
        return self._links[lane]

    # -- for the training loop ----------------------------------------------------------------------------------------

    def publish(self, round: int, contribution: bytes) -> asyncio.Task[None]:
        """Give this node's contribution to all peers. It may be given again if it is the same: after a step that was
        done again, and by a process that goes on from a checkpoint of which the round was under way (its disk may be
        new). It is sent at once; the task ends when the disk knows of it, for who wants to rely on that.

        Raises LocalProtocolError for another length than the configuration says. What goes wrong later ends `run`.
        """
        if len(contribution) != (due := self._settings.contribution_bytes(round)):
            raise LocalProtocolError(
                Fault.MALFORMED, f"a contribution of {len(contribution)} bytes to round {round}, which has {due}"
            )
        for link in self._links.values():
            link.need(round)
        return self._begin(self._write(round, contribution))

    async def contributions(self, round: int, members: Collection[int] | None = None) -> dict[int, bytes]:
        """Those of the other lanes among `members` (default: all), by lane, in order. They stay here until they are
        forgotten.

        Waits for each peer as long as it shows life. Raises TimeoutError, which says for which lane, stage and round
        and how long, when nothing was heard of it for the deadline; and whatever else ends `run`.
        """
        if self._needed_from is None or round < self._needed_from:
            known = "forget_before was not called" if self._needed_from is None else f"before {self._needed_from}"
            raise LocalProtocolError(Fault.UNEXPECTED, f"round {round} is not asked for: {known}")
        began_s = asyncio.get_running_loop().time()
        due = {lane: link for lane, link in self._links.items() if members is None or lane in members}
        for link in due.values():
            link.need(round)
        try:
            for link in due.values():
                await link.until_received(round)
        finally:
            self._waited_s += asyncio.get_running_loop().time() - began_s
        return {lane: await self._loaded(link, round) for lane, link in due.items()}

    @staticmethod
    async def _loaded(link: LateralLink, round: int) -> bytes:
        while True:
            await link.until_received(round)
            try:
                return await asyncio.to_thread(link.received.load, round)
            except (KeyError, ContributionError):
                if round in link.received.kept:
                    raise  # and did not go meanwhile, because another one counts

    def need(self, round: int) -> None:
        """This node has come to that round."""
        for link in self._links.values():
            link.need(round)

    def held(self) -> tuple[int, ...]:
        """By lane: all rounds before this one are held here, or needed by nobody; of the own one: are made."""
        counts = {lane: link.held_before(self.forgot) for lane, link in self._links.items()}
        return tuple(counts.get(lane, self._made) for lane in range(self._identity.lanes))

    async def expect(self, stays: Stays) -> None:
        """Which contributions count, from now on. What is here of others goes, and all connections begin anew."""
        identity = self._identity
        async with self._writing:
            self._stays = stays
            dropped = [(self._own, self._own.unkeep_others(partial(stays.stay_of, identity.lane)))]
            if (left := stays.expected.left_at(identity.lane)) is not None:
                self._made = min(self._made, left)
            for link in self._links.values():
                link.session.sender.patient = True  # who lacks what is gone is left out, and takes up a state
                link.expect(stays)  # all, before anything is waited for: what they were sending is gone
            for lane, link in self._links.items():
                await link.arrivals.settle()
                dropped.append((link.received, link.received.unkeep_others(partial(stays.stay_of, lane))))
            for store, void in dropped:
                await asyncio.to_thread(store.remove, void)
        self._may_write.set()
        self._on_held()

    async def begin_anew(self) -> None:
        """All lanes go on together from another step, and make again what they contribute from there on: whatever is
        here goes, all connections begin anew, and `forget_before` is due again."""
        await asyncio.gather(*self._jobs, return_exceptions=True)
        async with self._writing:
            self._made, self._needed_from, self._promised = 0, None, 0
            dropped = [(self._own, self._own.unkeep_others(lambda _: None))]
            for link in self._links.values():
                link.begin_anew()  # all, before anything is waited for
            for link in self._links.values():
                await link.arrivals.settle()
                dropped.append((link.received, link.received.unkeep_others(lambda _: None)))
            for store, void in dropped:
                await asyncio.to_thread(store.remove, void)

    @property
    def there(self) -> tuple[int, ...]:
        """The lanes whose node of this stage is connected, and may need something yet."""
        return tuple(lane for lane, link in self._links.items() if link.session.greeted and not link.finished)

    @property
    def forgot(self) -> int:
        """This node will never ask for a round before this one."""
        return max(self._promised, self._needed_from or 0)

    def kept(self) -> int:
        """Of this node's contributions, those before this round are gone."""
        return min(self._own.kept, default=self._made)

    async def say(self, lane: int, frame: CopyFrame) -> None:
        """To that lane, on a copy of a state."""
        await self._links[lane].say(frame)

    def refuse(self, lane: int, error: RemoteProtocolError) -> None:
        """What came from that lane breaks a rule, as was found later."""
        self._links[lane].end(error)

    def hold_back(self) -> None:
        """Nothing is kept of what is published, given or asked for before `expect` has said which contributions
        count."""
        self._may_write.clear()
        for link in self._links.values():
            link.stays = none_known(self._identity.lanes)

    def has_made(self, before: int) -> None:
        """This node has contributed to all earlier rounds that it is a member of, whatever is kept of that."""
        self._made = max(self._made, before)

    def tell_status(self) -> None:
        """What this node says of its lane has changed."""
        for link in self._links.values():
            link.tell_status()

    def forget_before(self, round: int, *, lasting: bool = True) -> None:
        """This node will never ask for an earlier round again: neither now nor after being set back to any checkpoint
        that it may be set back to. To be said once before anything is asked for (0 where a run begins), then whenever a
        checkpoint makes more of it true. Later processes are held to it, so it is on the disk before it is told; if not
        `lasting`, it holds until all begin anew."""
        self._needed_from = max(round, self.forgot)
        if lasting and self._needed_from > self._promised:
            self._begin(self._promise(self._needed_from))
        else:
            self._promised = self._needed_from
            self._forget()

    async def _promise(self, round: int) -> None:
        async with self._promising:
            if round > self._promised:
                await asyncio.to_thread(PROMISE.write, self.directory, round)
                self._promised = round
        self._forget()

    def _forget(self) -> None:
        for link in self._links.values():
            link.forget_before(self._promised)
            if dropped := link.received.unkeep(self._promised):
                self._begin(asyncio.to_thread(link.received.remove, dropped))
        self._on_held()

    async def finish(
        self,
        members: Collection[int] | None = None,
        returning: Collection[int] = (),
        returning_s: float | None = None,
    ) -> None:
        """This node needs nothing more: say so, and wait until no peer needs anything of it: of the `members` each
        (default: all), of the others who is there, or `returning`, for at most returning_s without a sign of life.
        Raises what `contributions` does."""
        await asyncio.gather(*self._jobs)
        for link in self._links.values():
            link.finish()
        # Or was there a moment ago: connections begin anew when members change, as the last round may have done.
        since_s = asyncio.get_running_loop().time() - self._settings.silence_s
        there = {lane for lane, link in self._links.items() if link.session.greeted or link.peer.heard_s > since_s}
        awaited = {
            lane: link.until_finished(None if members is None or lane in members else returning_s)
            for lane, link in self._links.items()
            if members is None or lane in members or lane in returning or lane in there
        }
        ended = await asyncio.gather(*awaited.values(), return_exceptions=True)  # not all are left if one is gone
        for lane in awaited:
            self._links[lane].leave()
        for each in ended:
            if isinstance(each, BaseException):
                raise each

    def waits_for(self) -> str:
        """For whom `contributions` or `finish` waits now, and how that lane is, for people; "" if for nobody."""
        return "; ".join(link.peer.state for link in self._links.values() if link.peer.waited_for)

    def figures(self) -> LateralFigures:
        sent: Counter[Kind] = Counter()
        received: Counter[Kind] = Counter()
        for link in self._links.values():
            sent.update(link.outgoing.sent)
            received.update(link.received_bytes)
        rates = {lane: link.outgoing.meter.rate_bits_per_s() for lane, link in self._links.items()}
        return LateralFigures(
            sent_bytes=dict(sent), received_bytes=dict(received), rate_bits_per_s=rates, waited_s=self._waited_s
        )

    # -- for the node -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the connections to the lower lanes, until `finish` is through or `close` is called. Raises
        NeighbourMismatch, RefusedError or ContributionError: what ends this node."""
        dialling = [
            asyncio.create_task(dial_lane(where, self._links[lane], self._report, self._security))
            for lane, where in self._addresses.items()
        ]
        serving = [asyncio.create_task(link.until_over()) for link in self._links.values()]
        waiting = {self._broken, *dialling, *serving}
        try:
            while waiting - {self._broken}:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    if self.server.closing:
                        return
                    each.result()
        finally:
            for task in (*dialling, *serving):
                task.cancel()
            await asyncio.gather(*dialling, *serving, return_exceptions=True)

    async def close(self) -> None:
        """End all connections, and wait for what is being written."""
        self.server.closing = True
        if not self._broken.done():
            self._broken.set_result(None)
        for link in self._links.values():
            link.end(LateralLinkEnded("this node leaves"))
        for link in self._links.values():
            await link.arrivals.settle()
        for job in () if self._may_write.is_set() else self._jobs:
            job.cancel()  # it waits for what will not come any more
        await asyncio.gather(*self._jobs, return_exceptions=True)

    # -- within -------------------------------------------------------------------------------------------------------

    async def _write(self, round: int, contribution: bytes) -> None:
        await self._may_write.wait()
        async with self._writing:  # in order
            stay = self._stays.stay_of(self._identity.lane, round)
            if stay is None:
                return  # of a lane that was left out, and has to go back
            self._made = max(self._made, round + 1)
            if not self._links or round < self._forgotten:  # made again by who was set back, and needed by nobody
                self._on_held()
                return
            made = await asyncio.to_thread(self._own.write, round, contribution, stay)
            self._own.keep(round, made, stay)
        self._on_held()
        for link in self._links.values():
            link.published()
        await asyncio.to_thread(self._own.flush, round, made, stay)

    def _drop_own(self) -> None:
        """A peer has moved: it may have been the last that could ask for something."""
        if dropped := self._own.unkeep(self._forgotten):
            self._begin(asyncio.to_thread(self._own.remove, dropped))

    @property
    def _forgotten(self) -> int:
        """No peer will ask for an earlier one of this node's; of those that were left out only who is here counts, or
        the disk would fill up for one that never comes back."""
        members = self._stays.expected.members
        asking = [link for lane, link in self._links.items() if lane in members or link.session.greeted]
        promised = [link.session.sender.forget_before for link in asking]
        if len(members) < self._identity.lanes:  # who comes back soon goes on from a checkpoint as old as this node's
            promised.append(self._needed_from or 0)
        return min(promised)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def job() -> None:
            try:
                await work
            except ContributionError as error:
                self._break(error)
                raise

        task = asyncio.create_task(job())
        self._jobs.add(task)
        task.add_done_callback(self._end_job)
        return task

    def _end_job(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        with suppress(asyncio.CancelledError):
            task.exception()  # seen: it ends `run`

    def _break(self, error: Exception) -> None:
        for link in self._links.values():
            link.peer.fail(error)
        if not self._broken.done():
            self._broken.set_exception(error)
