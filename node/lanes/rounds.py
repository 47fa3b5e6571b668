"""The rounds of one stage while its lane trains: made, given to the other lanes, waited for, used, recorded.

The training loop calls `hold` at the two moments of a step at which a round may be due; everything else about other
lanes is here and in the links. A lane waits in a round for as long as the others show life: they may be recovering from
a loss of their own, which takes minutes. Meanwhile this stage's neighbours are told that it is held up, as they are
while stage 0 prepares its data, so that no deadline of theirs passes.

After a rollback the steps are done again, and with them the rounds: own contributions come out with the same bits, and
those of the others are here still, or are asked for again. So nothing that a checkpoint may go back to is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..averaging.averager import Averager
from ..averaging.round_plan import Round
from ..run_records import MetricsWriter, Stopwatch
from ..worker_thread import Reporter, Worker
from .lateral_link import LateralLink
from .lateral_links import LateralLinks

Holding = Callable[[Callable[[], str]], AbstractContextManager[object]]


class Rounds:
    """held_up: while it is entered, the stage's neighbours know that it waits for something outside of the lane; what
    that is, it may ask for."""

    def __init__(self, links: LateralLinks, metrics: MetricsWriter, *, held_up: Holding) -> None:
        self._links, self._metrics, self._held_up = links, metrics, held_up
        self._counted: dict[int, int] = {}  # by lane: bytes up to the last step

    def begin(self, averager: Averager, completed: int, oldest: int) -> None:
        """A generation begins after `completed` steps; a rollback may lead to `oldest`. What was contributed to rounds
        under way is given again: it may have been lost with a disk."""
        self.forget(averager, min(oldest, completed))
        for round_, contribution in averager.under_way(completed).items():
            self._links.publish(round_.number, contribution)

    def forget(self, averager: Averager, oldest: int) -> None:
        """No rollback will lead further back than to after `oldest` steps."""
        self._links.forget_before(averager.plan.first_after(oldest))

    async def hold(self, averager: Averager, completed: int, compute: Worker, watch: Stopwatch) -> None:
        """All that is due once `completed` steps are, or with gradients the step under way. Raises TimeoutError when a
        lane shows no life, RoundError for a contribution that is none."""
        used = averager.plan.used_at(completed)
        for round_ in used:
            if round_.made < completed:
                await self._use(averager, round_, compute, watch)
        for round_ in averager.plan.made_at(completed):
            contribution = await compute.run(f"contribute {round_.number}", averager.contribute, round_)
            self._links.publish(round_.number, contribution)
        for round_ in used:
            if round_.made == completed:
                await self._use(averager, round_, compute, watch)

    async def _use(self, averager: Averager, round_: Round, compute: Worker, watch: Stopwatch) -> None:
        before_s = self._links.figures().waited_s
        with watch.waiting(), self._held_up(self._links.waits_for):
            others = await self._links.contributions(round_.number)
        said = await compute.run(f"average {round_.number}", averager.use, round_, others)
        record: dict[str, Any] = {
            "number": round_.number,
            "fragment": round_.fragment,
            "made": round_.made,
            "used": round_.used,
            "members": said.members,
            "digest": said.digest,
            "norm": said.norm,
            "waited_s": round(self._links.figures().waited_s - before_s, 6),
        }
        self._metrics.write("round", stage=averager.place.stage, **record)

    async def finish(self, on_fault: Reporter) -> None:
        """This lane is through: wait until no other one needs anything of this stage. That one of them is gone is no
        fault here, and is only said."""
        try:
            await self._links.finish()
        except TimeoutError as error:
            on_fault("timeout", str(error))

    # -- records ------------------------------------------------------------------------------------------------

    def sent_bytes(self) -> dict[str, dict[str, int]]:
        """By lateral link and kind, since this process began."""
        return {link.name: {str(kind): count for kind, count in link.outgoing.sent.items()} for link in self._all}

    def step_records(self, seconds: float) -> list[dict[str, Any]]:
        """What each lateral link has done at the end of a step that took `seconds`."""
        records = []
        for link in self._all:
            now = sum(link.outgoing.sent.values())
            before, self._counted[link.lane] = self._counted.get(link.lane, 0), now
            record = self._record(link)
            records.append({**record, "used_bits_per_s": round((now - before) * 8 / seconds)})
        return records

    def records(self) -> list[dict[str, Any]]:
        """The same at the end of the run."""
        return [
            {
                **self._record(link),
                "link": str(link.profile),
                "busy_s": round(link.outgoing.meter.busy_s, 6),
                "utilisation": None,
                "sent_bytes": dict(link.outgoing.sent),
            }
            for link in self._all
        ]

    @property
    def _all(self) -> list[LateralLink]:
        return self._links.links

    def _record(self, link: LateralLink) -> dict[str, Any]:
        rate = link.outgoing.meter.rate_bits_per_s()
        return {
            "peer_lane": link.lane,
            "configured_bits_per_s": link.profile.rate_bits_per_s,
            "measured_bits_per_s": rate and round(rate),
            "received_bytes": sum(link.received_bytes.values()),
        }
