"""A peer of benchmarks/averaging.py that averages as thinpipe's nodes do, in rounds between lanes.

The parts are those of `thinpipe node`: its averager, its lateral links over gRPC with contributions on the disk, and
`Rounds.hold` as its training loop calls it, between steps in which nothing is computed. What a lane gives is the
distance that its weights went (`outer`; the outer step is the plain mean), or its gradients.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, nullcontext
from typing import Any

import torch
from averaging_peer import Place, Tool, serve
from thinpipe.node.averaging import averager as averagers
from thinpipe.node.averaging.modes import parse_averaging
from thinpipe.node.averaging.stage_averager import stage_averager
from thinpipe.node.checkpoints.manifest import Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.lanes.lane_membership import LaneMembership
from thinpipe.node.lanes.rounds import Rounds
from thinpipe.node.lanes.state_copies import StateCopies
from thinpipe.node.link_settings import make_lateral_links
from thinpipe.node.links.transport import serving
from thinpipe.node.run_records import MetricsWriter, Stopwatch, Tracer
from thinpipe.node.security.policy import PLAIN
from thinpipe.node.worker_thread import Worker
from thinpipe.protocol.control_messages import Heartbeat
from thinpipe.protocol.greeting import NodeIdentity
from torch import Tensor, nn

PORT = 7100
CONNECTED_S = 60.0
STEPS = 1000  # more than are held: the last round of a run is like any other here
PLAIN_MEAN = "outer:every=1,lr=1,momentum=0"
SPECS = {f"outer-{fmt}": f"{PLAIN_MEAN},format={fmt}" for fmt in ("int4", "int8", "bf16", "fp32")}
SPECS |= {f"gradients-{fmt}": f"gradients:format={fmt}" for fmt in ("int4", "int8", "bf16", "fp32")}


def complain(code: str, line: str) -> None:
    print(f"{code}: {line}", file=sys.stderr, flush=True)


class Group:
    """The rounds of one stage, on the loop in which it is entered and left."""

    def __init__(self, place: Place, spec: str, shapes: list[tuple[int, ...]], group: int) -> None:
        self._place, self._port = place, PORT + group
        self._directory = place.scratch / f"group-{group}"
        settings = {"lanes.count": place.lanes, "lanes.average": spec, "lanes.round_timeout_s": place.patience_s}
        self._config = parse_config(merge({}, settings))
        draw = torch.Generator().manual_seed(0)  # all lanes begin with the same weights, of about a layer's size
        self.parameters = [
            (f"w{i}", nn.Parameter(torch.randn(shape, generator=draw).mul_(0.02))) for i, shape in enumerate(shapes)
        ]
        self.averager = stage_averager(
            parse_averaging(spec),
            averagers.Place(stage=0, lane=place.lane, lanes=place.lanes, seed=0),
            steps=STEPS,
            parameters=self.parameters,
            sender=None,
            table_moves=lambda _: False,
            table_gradient=lambda: None,
        )
        self.completed = 0
        self._agreed: list[Tensor] = []
        self._open = AsyncExitStack()

    @property
    def of_gradients(self) -> bool:
        return self.averager.mode.of_gradients

    @property
    def connected(self) -> bool:
        return all(link.session.greeted for link in self._links.links)

    @property
    def payload_bytes(self) -> int:
        return (self._place.lanes - 1) * self.averager.bytes_of(self.completed)

    async def begin(self) -> None:
        place = self._place
        lower = {lane: f"{place.addresses[lane]}:{self._port}" for lane in range(place.lane)}
        self._directory.mkdir(parents=True)
        identity = NodeIdentity(
            run_id="averaging",
            configuration="averaging",
            stage=0,
            stages=1,
            incarnation=os.getpid(),
            lane=place.lane,
            lanes=place.lanes,
        )
        self._links = make_lateral_links(
            self._config,
            identity,
            addresses=lower,
            directory=self._directory / "rounds",
            contribution_bytes=self.averager.bytes_of,
            heartbeat=lambda: Heartbeat(generation=0, completed_steps=self.completed),
            report=complain,
            security=PLAIN,
            on_held=lambda: self._membership.held(),
            rounds=lambda: self.averager.plan.count,
            status=lambda: self._membership.status(),
            on_status=lambda lane, status: self._membership.hear(lane, status),
            on_ended=lambda lane: self._membership.ended(lane),
        )
        metrics = MetricsWriter(self._directory / "stage-0.jsonl")
        self._open.callback(metrics.close)
        self._watch = Stopwatch()
        self._compute = Worker("compute", self._watch, Tracer(stage=0, enabled=False))
        self._open.callback(self._compute.close)
        where = f"{place.addresses[place.lane]}:{self._port}"
        await self._open.enter_async_context(serving(where, {"Rounds": self._links.server.handler}))
        self._open.push_async_callback(self._links.close)
        self._membership = LaneMembership(
            identity,
            self.averager.plan,
            self._links,
            metrics,
            deadline_s=place.patience_s,
            tell=lambda *_: None,
            refuse=lambda *_: None,
            on_left_out=lambda: complain("left-out", f"lane {place.lane} was left out"),
            on_in_vain=lambda: complain("in-vain", f"lane {place.lane} waits for lanes that have ended"),
            on_void=_nothing,
            on_changed=lambda: None,
            under_way=lambda: self.completed,
            saved=lambda: 0,
            take_up=_nothing,
            let_go=lambda _: None,
            came_s=lambda: float("-inf"),
            lost_s=place.patience_s,
            paused_ago_s=lambda: float("inf"),
        )
        self._running = asyncio.gather(self._links.run(), self._membership.run())
        fingerprint = Fingerprint(run="averaging", configuration="averaging", stages=1)
        store = CheckpointStore(self._directory / "checkpoints", stage=0, fingerprint=fingerprint)
        words = {"say": self._links.say, "refuse": self._links.refuse, "on_fault": complain}
        states = StateCopies(store, part_bytes=2**16, parts_ahead=8, **words)  # of which there are none here
        self._rounds = Rounds(self._links, self._membership, states, metrics, held_up=lambda _: nullcontext())
        self._rounds.begin(self.averager, 0, 0)

    @torch.no_grad()
    def learn(self, given: list[Tensor]) -> None:
        """A step that leads to this contribution."""
        self._agreed = [weight.detach().clone() for _, weight in self.parameters]
        for (_, weight), tensor in zip(self.parameters, given, strict=True):
            if self.of_gradients:
                weight.grad = tensor
            else:
                weight.sub_(tensor)

    async def hold(self) -> int:
        await self._rounds.hold(self.averager, self.completed + 1, self._compute, self._watch)
        self.completed += 1
        self._rounds.forget(self.averager, self.completed)  # as after a checkpoint
        return self.averager.contributed

    def mean(self) -> list[Tensor]:
        if self.of_gradients:
            return [weight.grad / self.averager.contributed for _, weight in self.parameters if weight.grad is not None]
        return [before - weight.detach() for before, (_, weight) in zip(self._agreed, self.parameters, strict=True)]

    async def end(self) -> None:
        await self._open.aclose()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


async def _nothing(*_: object) -> None:
    """Of a lane that goes back, or takes up a state, which none does here."""


class NodeEnded(RuntimeError):
    """What ends a round ends a node, which says it in one line."""


class Thinpipe(Tool):
    """Its event loop has a thread of its own, as commands are read on the main one."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._group: Group | None = None
        self._ended = False

    def _run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    @property
    def group(self) -> Group:
        assert self._group, "open comes first"
        return self._group

    def open(self, spec: str, shapes: list[tuple[int, ...]], group: int) -> float:
        self.close()
        self._group = Group(self.place, SPECS[spec], shapes, group)
        self._run(self._group.begin)
        due_s = time.monotonic() + CONNECTED_S
        while not self._group.connected:  # patience is for peers that were there
            if time.monotonic() > due_s:
                raise TimeoutError(f"not connected to all {self.place.lanes - 1} lanes within {CONNECTED_S:g} s")
            time.sleep(0.01)
        return self._group.payload_bytes

    def give(self, tensors: list[Tensor]) -> None:
        if self._ended:
            raise NodeEnded("this node has ended")
        self.group.learn(tensors)

    def hold(self) -> int:
        if self._ended:
            raise NodeEnded("this node has ended")
        try:
            return self._run(self.group.hold)
        except BaseException:
            self._ended = True
            self._run(self.group.end)  # nobody hears of it any more
            raise

    def taken(self) -> list[Tensor]:
        return self.group.mean()

    def close(self) -> None:
        if self._group and not self._ended:
            self._run(self._group.end)


def make(place: Place) -> Tool:
    return Thinpipe(place)


if __name__ == "__main__":
    serve(make)
