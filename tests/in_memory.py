"""A swarm inside this process: real nodes, links and sessions; only the mover of bytes is a pair of queues, not gRPC.

A run costs tenths of a second instead of the ten that starting processes takes, so many combinations can be tried, and
a connection can be broken at exactly the n-th frame. `run_in_memory` is the swarm and `run_reference` the one process;
both return the same `Outcome`, read from the records that a user would read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from thinpipe.node.config import RunConfig
from thinpipe.node.link_settings import make_link
from thinpipe.node.links.link import Link, Read, Write
from thinpipe.node.one_process import OneProcess
from thinpipe.node.preparation import prepare, prepare_corpus
from thinpipe.node.run_records import MetricsWriter, Tracer
from thinpipe.node.stage import Stage
from thinpipe.node.training_loop import TrainingLoop
from thinpipe.protocol.session import NodeIdentity
from thinpipe.sim.reports.summary import read_records

RUN_TIMEOUT_S = 60.0  # a swarm that hangs must fail as a test, not as pytest's timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The connection breaks as its frame number `frame` (from 1, both directions together) is written or read.

    That frame and all that is still under way, in both directions, is lost.
    """

    frame: int
    at: Literal["write", "read"]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run came to, by stage: equal outcomes are equal bit for bit."""

    losses: list[list[float]]
    grad_norms: list[list[float]]
    val_losses: list[list[float]]
    state_sha256: list[str]
    weights: dict[str, torch.Tensor] = field(repr=False, compare=False)
    sent_bytes: Counter[str] = field(compare=False)
    connections: dict[int, int] = field(default_factory=dict, compare=False)  # boundary -> connections made
    faults: list[tuple[str, str]] = field(default_factory=list)


class Connection:
    """Frames both ways, until a cut: then every read and write raises ConnectionResetError."""

    def __init__(self, cut: Cut | None) -> None:
        self.cut = cut
        self.broken = False
        self._counts: Counter[str] = Counter()
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._up: asyncio.Queue[bytes | None] = asyncio.Queue()

    def end(self, *, upper: bool) -> tuple[Read, Write]:
        incoming, outgoing = (self._up, self._down) if upper else (self._down, self._up)

        async def read() -> bytes | None:
            frame = await incoming.get()
            if frame is not None:
                self._count("read")
            if self.broken:
                raise ConnectionResetError("cut")
            return frame

        async def write(frame: bytes) -> None:
            self._count("write")
            if self.broken:
                raise ConnectionResetError("cut")
            outgoing.put_nowait(frame)

        return read, write

    def hang_up(self) -> None:
        """An end is done: what it wrote still arrives, then the stream ends."""
        for queue in (self._down, self._up):
            queue.put_nowait(None)

    def break_off(self) -> None:
        """What is under way is lost, and both ends notice."""
        self.broken = True
        for queue in (self._down, self._up):
            while not queue.empty():
                queue.get_nowait()
        self.hang_up()  # wakes whoever waits

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        if self.cut == Cut(frame=self._counts[what], at=what):  # pyright: ignore[reportArgumentType]
            self.break_off()


async def join(upper: Link, lower: Link, cuts: Sequence[Cut] = ()) -> int:
    """Keep the two connected until both said goodbye, as `dial` and `listening` do; returns how many connections it
    took. The first ones are cut as `cuts` says, one after the other."""
    for number, cut in enumerate(itertools.chain(cuts, itertools.repeat(None)), start=1):
        connection = Connection(cut)

        async def attach(link: Link, speaks_first: bool, connection: Connection = connection) -> None:
            try:
                read, write = connection.end(upper=speaks_first)
                await link.attach(read, write, speaks_first=speaks_first, greeting_timeout_s=RUN_TIMEOUT_S)
            except ConnectionError:
                connection.break_off()
            else:
                connection.hang_up()

        upper.opened.clear()
        await asyncio.gather(attach(upper, True), attach(lower, False))
        if upper.finished and lower.finished:
            return number
    raise AssertionError("unreachable")


def run_in_memory(config: RunConfig, out: Path, *, cuts: Mapping[int, Sequence[Cut]] | None = None) -> Outcome:
    """Train `config` as a swarm of nodes in this process. `cuts` names, by boundary, where connections break."""
    out.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_swarm(config, out, cuts or {}))


async def _swarm(config: RunConfig, out: Path, cuts: Mapping[int, Sequence[Cut]]) -> Outcome:
    stages = config.pipeline.stages
    nodes: list[TrainingLoop] = []
    faults: list[tuple[str, str]] = []
    writers = [MetricsWriter(out / f"stage-{index}.jsonl") for index in range(stages)]
    for index in range(stages):
        stage, digest = prepare(config, index)
        identity = NodeIdentity(
            run_id=config.run.name, configuration=digest, stage=index, stages=stages, incarnation=1000 + index
        )
        above = (
            make_link(
                config, identity, index - 1, stage.upstream_endpoint.shape, Tracer(stage=identity.stage, enabled=False)
            )
            if stage.upstream_endpoint
            else None
        )
        below = (
            make_link(
                config,
                identity,
                index + 1,
                stage.downstream_endpoint.shape,
                Tracer(stage=identity.stage, enabled=False),
            )
            if stage.downstream_endpoint
            else None
        )
        nodes.append(
            TrainingLoop(
                config,
                stage,
                above=above,
                below=below,
                corpus=prepare_corpus(config) if index == 0 else None,
                metrics=writers[index],
                tracer=Tracer(stage=index, enabled=False),
                on_fault=lambda code, line: faults.append((code, line)),
            )
        )
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S), asyncio.TaskGroup() as group:
            for node in nodes:
                group.create_task(node.run())
            joins = {
                boundary: group.create_task(join(upper.below, lower.above, cuts.get(boundary, ())))
                for boundary, (upper, lower) in enumerate(itertools.pairwise(nodes))
                if upper.below and lower.above
            }
    finally:
        for node, writer in zip(nodes, writers, strict=True):
            node.close()
            writer.close()
    outcome = read_outcome(out, len(nodes) if config.compute.emulate else [node.stage for node in nodes])
    outcome.connections = {boundary: task.result() for boundary, task in joins.items()}
    outcome.faults = faults
    return outcome


def run_reference(config: RunConfig, out: Path) -> Outcome:
    """Train `config` in one process without links."""
    out.mkdir(parents=True, exist_ok=True)
    reference = OneProcess(config, out)
    losses, val_loss = reference.train()
    outcome = read_outcome(out, reference.stages)
    assert losses == outcome.losses[0]  # what it returns is what it wrote
    assert val_loss == outcome.val_losses[0][-1]
    return outcome


def read_outcome(out: Path, stages: Sequence[Stage] | int) -> Outcome:
    """From the records in `out`; weights only where the stages themselves are at hand."""
    count = stages if isinstance(stages, int) else len(stages)
    records = [read_records(out / f"stage-{index}.jsonl") for index in range(count)]

    def values(event: str, key: str) -> list[list[Any]]:
        return [[record[key] for record in of_stage if record["event"] == event] for of_stage in records]

    sent: Counter[str] = Counter()
    for links in itertools.chain.from_iterable(values("end", "links")):
        for link in links:
            sent.update(link["sent_bytes"])
    return Outcome(
        losses=values("step", "loss"),
        grad_norms=values("step", "grad_norm"),
        val_losses=values("evaluation", "val_loss"),
        state_sha256=[digest for (digest,) in values("end", "state_sha256")],
        weights={} if isinstance(stages, int) else union_of_weights(stages),
        sent_bytes=sent,
        faults=[(code, "") for code in itertools.chain.from_iterable(values("fault", "code"))],
    )


def union_of_weights(stages: Sequence[Stage]) -> dict[str, torch.Tensor]:
    """Name in the whole model -> a copy of the weight; raises if two stages hold the same one."""
    union: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.model.full_names():
            assert name not in union
            union[name] = parameter.detach().clone()
    return union
