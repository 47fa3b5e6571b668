"""The nodes of one stage in two lanes that exchange keys and values, with nothing of a model: what each gives and takes
is what the layout says, and every byte of it is known. `python -m tests.context_ends` is one of them as a process.

Arguments: lane, port of lane 0, link.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

from thinpipe.node.config import RunConfig
from thinpipe.node.context.context_links import context_links, link_for, parts_of
from thinpipe.node.context.context_parts import ContextParts
from thinpipe.node.context.exchange import ContextKey
from thinpipe.node.context.link_transport import LinkTransport
from thinpipe.node.context.turns import Turns
from thinpipe.node.links.dialling import dial
from thinpipe.node.links.link import Link
from thinpipe.node.links.transport import LinkStreams, serving
from thinpipe.node.receive_deadline import ReceiveDeadline
from thinpipe.node.run_records import Stopwatch, Tracer
from thinpipe.node.worker_thread import Worker

from .builders import identity

STAGE, STAGES, LAYERS, MICROBATCHES = 1, 3, (2, 3), 2
BYTES = {False: 30_000, True: 20_000}
GATHERS = 1  # the step behind which lanes choose subspaces


def content(key: ContextKey, size: int | None = None) -> bytes:
    size = BYTES[key.gradient] if size is None else size
    return hashlib.sha256(str(key).encode()).digest() * (size // 32) + bytes(size % 32)


class End:
    """Of lane `lane`. Must be made in the event loop."""

    def __init__(
        self,
        lane: int,
        *,
        lanes: int = 2,
        link: str = "none",
        timeout_s: float = 20.0,
        order: str = "zigzag",
        in_flight: int = 1,
    ):
        tree = {
            "lanes": {"count": lanes, "average": "gradients"},
            "context": {"method": "full", "order": order, "in_flight": in_flight},
            "data": {"sequence_length": 24, "heldout_sequences": 8},
            "pipeline": {"stages": STAGES, "batch_size": 4, "microbatches": MICROBATCHES},
            "link": {"link": link},
        }
        self.config = RunConfig.model_validate(tree)
        self.identity = identity(STAGE, STAGES, lane=lane, lanes=lanes, incarnation=500 + lane)
        self.faults: list[str] = []
        self.refused = asyncio.Event()
        self.sent: defaultdict[int, Counter[str]] = defaultdict(Counter)
        found = parts_of(self.config, lane, LAYERS, lambda key: BYTES[key.gradient], gathering_step=GATHERS)
        assert found
        self.parts: ContextParts = found
        tracer = Tracer(stage=STAGE, enabled=False)
        self.watch = Stopwatch()
        self.transport = LinkTransport(
            context_links(self.config, self.identity, self.parts, {}, tracer=tracer, sent=self.sent),
            self.parts,
            completed=0,
            send_buffer_bytes=self.config.link.send_buffer_bytes,
            deadline=ReceiveDeadline(fixed_s=timeout_s),
            on_fault=self.report,
            watch=self.watch,
        )
        self.links = {link.session.place.lane: link for link in self.transport.links}
        self.compute = Worker("compute", self.watch, tracer)
        self.turns = Turns()
        self.before_taking: Callable[[], None] = lambda: None

    def report(self, code: str, line: str) -> None:
        self.faults.append(f"{code}: {line}")
        self.refused.set()

    def find(self, frame: bytes | None) -> Link | None:
        return link_for(frame, self.transport, self.identity)

    # -- what a stage does, on its thread ------------------------------------------------------------------------------

    def layer(
        self, step: int, microbatch: int, layer: int, *, gradient: bool = False, evaluation: bool = False
    ) -> None:
        """Give what others need of this layer, then take what this one needs, in the order in which it is looked at."""
        key = partial(
            ContextKey, step=step, evaluation=evaluation, microbatch=microbatch, layer=layer, gradient=gradient
        )
        gives, takes = (self.parts.taken, self.parts.given) if gradient else (self.parts.given, self.parts.taken)
        for lane in self.links:
            for segment in gives(lane):
                self.transport.send(lane, key(segment=segment), content(key(segment=segment)))
        self.turns.hand_over()
        self.before_taking()
        for lane in self.links:
            for segment in reversed(takes(lane)):
                assert self.transport.receive(lane, key(segment=segment)) == content(key(segment=segment))

    def step(self, step: int) -> None:
        def forward(microbatch: int) -> None:
            for layer in LAYERS:
                self.layer(step, microbatch, layer)

        def backward(microbatch: int) -> None:
            for layer in reversed(LAYERS):
                self.layer(step, microbatch, layer, gradient=True)

        if self.config.in_flight == 2:
            for way in (forward, backward):
                self.turns.both(partial(way, 0), partial(way, 1))
        else:
            for microbatch in range(MICROBATCHES):
                forward(microbatch)
                backward(microbatch)
        for layer in LAYERS:
            self.layer(step, 0, layer, evaluation=True)

    def close(self) -> None:
        self.transport.end()
        self.compute.close()

    async def end(self) -> None:
        for link in self.links.values():
            link.abandon()
        self.close()
        await asyncio.to_thread(self.compute.join, 10)


async def main(lane: int, port: int, link: str) -> None:
    end = End(lane, link=link)
    other, waits = end.links[1 - lane], {"greeting_timeout_s": 10.0, "report": end.report}
    handlers = {"Context": LinkStreams(end.find, **waits).serve}
    async with serving(f"127.0.0.1:{0 if lane else port}", handlers), asyncio.TaskGroup() as group:
        pump = group.create_task(end.transport.pump())
        calling = lane and group.create_task(dial(f"127.0.0.1:{port}", other, deadline_s=lambda: 60.0, **waits))
        await other.opened.wait()
        for step in range(3):
            await end.compute.run("step", end.step, step)
        await end.transport.flush()
        await other.drain(20)
        if calling:
            await calling
        pump.cancel()
    await end.end()
    rate = other.meter.rate_bits_per_s() or 0.0
    print(dict(end.sent[1 - lane]), other.received_bytes, round(rate), end.faults, sep="|", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
