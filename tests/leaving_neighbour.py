"""The lower end of a link, as a program: listens, greets, says goodbye, and does it all again.

Prints each port it listens on. A process of its own, because ends that share a process share gRPC's threads too, and
then never overtake one another.
"""

from __future__ import annotations

import asyncio
import sys

from thinpipe.node.link import Link
from thinpipe.node.metrics import Tracer
from thinpipe.node.transport import listening
from thinpipe.protocol.messages import Limits
from thinpipe.protocol.session import Identity, LinkSession
from thinpipe.sim.shaper import LinkProfile

DEADLINE_S = 5.0


def make_link(stage: int) -> Link:
    """One end of the link between stages 0 and 1."""
    identity = Identity(run_id="r", configuration="c", stage=stage, stages=2, incarnation=100 + stage)
    limits = Limits(message_bytes=1024)
    return Link(
        session=LinkSession(identity=identity, peer_stage=1 - stage, limits=limits, receive_buffer_bytes=2**20),
        profile=LinkProfile.parse("none"),
        chunk_bytes=128 * 1024,
        send_buffer_bytes=2**20,
        uncapped_window_bytes=2**20,
        seed=1,
        tracer=Tracer(stage=stage, enabled=False),
    )


def fail(code: str, line: str) -> None:
    sys.exit(f"{code}: {line}")


async def leave(link: Link) -> None:
    await link.opened.wait()
    await link.drain(DEADLINE_S)


async def main(rounds: int) -> None:
    for _ in range(rounds):
        link = make_link(1)
        async with listening("127.0.0.1:0", link, greeting_timeout_s=DEADLINE_S, report=fail) as port:
            print(port, flush=True)
            await leave(link)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
