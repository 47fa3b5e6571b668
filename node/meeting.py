"""Before the first step: wait until all neighbours are there, and measure the links to them.

What a link is said to be is tried before anything is trained over it. A link that is quicker than its cap spoils every
figure of the run, and one that is slower than it was said to be spoils the deadlines; either is a line, or the end with
`link.verify = "fail"`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from ..sim.links.link_check import LinkCheck
from .config_sections import LinkSection
from .links.link import Link
from .links.link_probe import probe_s
from .receive_deadline import ReceiveDeadline


async def all_opened(links: Sequence[Link], settings: LinkSection, deadline: ReceiveDeadline, *, again: bool) -> None:
    """Until each of `links` has a neighbour at its other end. again: in a later generation, in which others come back.
    Raises TimeoutError for one that does not come."""
    timeout_s = settings.connect_timeout_s
    for link in links:
        # Who dials has the same deadline, and knows better what to say when it passes.
        grace_s = settings.greeting_timeout_s if link.dials else 0.0
        while not link.opened.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s + grace_s):
                    await link.opened.wait()
            waits = deadline.excused(timeout_s) or (again and deadline.extend(timeout_s))
            if not (link.opened.is_set() or waits):
                raise TimeoutError(link.late(f"{link.session.peer_name} to connect", timeout_s))


async def probed(
    boundaries: Sequence[Link], others: Sequence[Link], *, last: bool, timeout_s: float
) -> list[LinkCheck]:
    """Of the links of the boundaries, then, one after the other, of those to other lanes. last: of the chain.

    Where the kernel caps an interface, its links share that cap, so one is measured after the other: all of the chain
    first what goes down, then what goes up. The last stage has nothing that goes down and waits for that long. (Stages
    that do not begin together may still meet; then they try again.)"""
    if not boundaries or not boundaries[0].profile.kernel:
        checks = await asyncio.gather(*(link.probe(timeout_s) for link in boundaries))
    else:
        if last:
            await asyncio.sleep(probe_s(boundaries[0].profile))
        checks = [await link.probe(timeout_s) for link in reversed(boundaries)][::-1]
    return checks + [await link.probe(timeout_s) for link in others]
