"""A process that gives and takes rounds as a training loop does: `python -m tests.lateral_process`, for
test_lateral_links.py, which kills it. It begins where its file `at-round` says, and ends with a line on what it took.

Arguments: lane, directory, port to listen on, port of lane 0, rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path

from thinpipe.node.lanes.lateral_links import LateralLinks
from thinpipe.node.lanes.lateral_settings import LateralSettings
from thinpipe.node.links.transport import serving
from thinpipe.protocol.control_messages import Heartbeat
from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.sim.links.shaper import LinkProfile

SIZE = 1_000_000


def content(lane: int, round: int) -> bytes:
    return hashlib.sha256(bytes([lane, round])).digest() * (SIZE // 32)


def received_by_all(links: LateralLinks, round: int) -> bool:
    """Whether all peers have this node's contributions to that round and all before it, so that it may forget how to
    make them."""
    return all(link.session.sender.acknowledged >= (round + 1, 0) for link in links.links)


async def train(lane: int, directory: Path, port: int, dial: int, rounds: int) -> None:
    at_round = directory / f"at-round-{lane}"
    settings = LateralSettings(
        contribution_bytes=lambda _: SIZE,
        profile=LinkProfile.parse("80mbit,5ms"),
        silence_s=8.0,
        greeting_timeout_s=5.0,
        deadline_s=30.0,
        heartbeat=lambda: Heartbeat(generation=0, completed_steps=0),
    )
    links = LateralLinks(
        identity=NodeIdentity(
            run_id="r", configuration="c", stage=0, stages=1, incarnation=os.getpid(), lane=lane, lanes=2
        ),
        addresses={0: f"127.0.0.1:{dial}"} if lane else {},
        directory=directory / f"lane-{lane}",
        settings=settings,
        report=lambda code, line: print(f"{code}: {line}", file=sys.stderr, flush=True),
    )
    async with serving(f"127.0.0.1:{port}", {"Rounds": links.server.handler}), asyncio.TaskGroup() as group:
        running = group.create_task(links.run())
        at = int(at_round.read_text()) if at_round.exists() else 0
        links.forget_before(at)
        for round in range(at, rounds):
            links.publish(round, content(lane, round))
            taken = await links.contributions(round)
            assert taken == {1 - lane: content(1 - lane, round)}
            if received_by_all(links, round):
                at_round.with_suffix(".tmp").write_text(str(round + 1))
                at_round.with_suffix(".tmp").rename(at_round)
                links.forget_before(round + 1)
            print(f"round {round}", flush=True)
        await links.finish()
        await asyncio.wait([running], timeout=settings.greeting_timeout_s)  # as a node does: the last word leaves
        await links.close()
        await running
    print("through", flush=True)


if __name__ == "__main__":
    lane, directory, port, dial, rounds = sys.argv[1:]
    asyncio.run(train(int(lane), Path(directory), int(port), int(dial), int(rounds)))
