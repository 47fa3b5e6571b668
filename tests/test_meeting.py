"""Before the first step: who is waited for, and which link is measured when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from thinpipe.node.config_sections import LinkSection
from thinpipe.node.links.link_probe import probe_s
from thinpipe.node.meeting import all_opened, probed
from thinpipe.node.receive_deadline import ReceiveDeadline
from thinpipe.sim.links.shaper import LinkProfile

from .virtual import JumpingClock

T = TypeVar("T")
PROBE_S = 2.0
SETTINGS = LinkSection(connect_timeout_s=120, greeting_timeout_s=10)


@dataclass
class Neighbour:
    """A link as `node.meeting` sees it: when its other end comes, and when its probes were."""

    name: str
    profile: LinkProfile = field(default_factory=lambda: LinkProfile.parse("8mbit,10ms,kernel=all"))
    dials: bool = False
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    measured: list[tuple[float, float]] = field(default_factory=list)
    session: Any = field(default_factory=lambda: SimpleNamespace(peer_name="the stage below"))

    def late(self, what: str, timeout_s: float) -> str:
        return f"{self.name}: waited {timeout_s:g} s for {what}"

    async def probe(self, timeout_s: float) -> Any:
        assert timeout_s == 60
        began_s = asyncio.get_running_loop().time()
        await asyncio.sleep(PROBE_S)
        self.measured.append((began_s, asyncio.get_running_loop().time()))
        return self.name


def in_virtual_time(job: Awaitable[T]) -> T:
    async def run() -> T:
        return await job

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        return runner.run(run())


@pytest.mark.parametrize(("again", "waits_s"), [(True, 150), (False, 120)])
def test_who_comes_back_is_waited_for_as_long_as_a_replacement_is(again: bool, waits_s: float) -> None:
    """A stage is missing for 150 s, longer than a connection may take. In the first generation nobody comes back."""

    async def story() -> None:
        clock = asyncio.get_running_loop()
        link: Any = Neighbour("boundary 0-1")
        clock.call_later(150, link.opened.set)
        deadline = ReceiveDeadline(missing_s=lambda: (clock.time(), 0.0))
        words = "boundary 0-1: waited 120 s for the stage below to connect"
        with nullcontext() if again else pytest.raises(TimeoutError, match=words):
            await all_opened([link], SETTINGS, deadline, again=again)
        assert clock.time() == pytest.approx(waits_s)

    in_virtual_time(story())


def test_who_dials_may_say_first_that_nobody_is_there() -> None:
    async def story() -> None:
        link: Any = Neighbour("boundary 0-1", dials=True)
        with pytest.raises(TimeoutError):
            await all_opened([link], SETTINGS, ReceiveDeadline(), again=False)
        assert asyncio.get_running_loop().time() == pytest.approx(130)

    in_virtual_time(story())


@pytest.mark.parametrize("last", [False, True])
def test_where_the_kernel_caps_an_interface_one_link_is_measured_at_a_time(last: bool) -> None:
    """What goes down first, for which the last stage, which has nothing below it, waits."""

    async def story() -> None:
        above: Any = Neighbour("boundary 0-1")
        below: Any = Neighbour("boundary 1-2")
        aside: Any = [Neighbour("lane 1"), Neighbour("lane 2")]
        chain = [above] if last else [above, below]
        assert await probed(chain, aside, last=last, timeout_s=60) == [each.name for each in [*chain, *aside]]
        begins_s = probe_s(above.profile) if last else 0.0
        assert begins_s > 0 or not last
        for each in [*reversed(chain), *aside]:
            assert each.measured == [(pytest.approx(begins_s), pytest.approx(begins_s + PROBE_S))]
            begins_s += PROBE_S

    in_virtual_time(story())


def test_where_each_link_has_a_cap_of_its_own_those_of_the_chain_are_measured_at_once() -> None:
    async def story() -> None:
        profile = LinkProfile.parse("8mbit,10ms")
        above, below, aside = (Neighbour(name, profile) for name in ("above", "below", "aside"))
        links: Any = [above, below], [aside]
        assert await probed(*links, last=False, timeout_s=60) == ["above", "below", "aside"]
        assert above.measured == below.measured == [(0, PROBE_S)]
        assert aside.measured == [(PROBE_S, 2 * PROBE_S)]

    in_virtual_time(story())
