"""Chunks of a stage that computes nothing: what it sleeps is what it would compute, and what it sends is as large."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.context.exchange import ContextKey
from thinpipe.node.context.mailbox import Mailbox
from thinpipe.node.measuring.context_plan import context_coder
from thinpipe.node.measuring.emulated_chunk import EmulatedChunk
from thinpipe.node.measuring.emulated_machine import EmulatedMachine
from thinpipe.node.preparation import check_lanes, resolve_architecture
from thinpipe.sim.links.pipeline import StageTimes

MACHINE = "tiny@2x1tflops"
CHUNKS = 3


def emulated(order: str, method: str) -> tuple[list[EmulatedChunk], StageTimes, Any]:
    """The second stage of all lanes, and what one lane computes with the mean attention."""
    settings = {**EmulatedMachine.parse(MACHINE).settings(), "compute.emulate": MACHINE, "checkpoint.every": 0}
    settings |= {"lanes.count": CHUNKS, "context.method": method, "context.order": order, "run.steps": 2}
    settings |= {"data.sequence_length": 960, "pipeline.batch_size": 4, "pipeline.microbatches": 2}
    config = parse_config(merge({}, settings))
    check_lanes(config)
    architecture, machine = resolve_architecture(config), EmulatedMachine.parse(MACHINE)
    layers, times = machine.layers(config, architecture), machine.times(config, architecture)
    where = {"stage": 1, "first": layers[1][0], "inner": False}
    counts = [len(each) for each in layers]
    lanes = [EmulatedChunk(config, architecture, times, counts, lane=lane, **where) for lane in range(CHUNKS)]
    return lanes, times[1], context_coder(config, architecture)[0]


class Sizes:
    """A transport that notes how long bodies are."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.sent = inner, set[tuple[ContextKey, int]]()

    def send(self, lane: int, key: ContextKey, body: bytes) -> None:
        self.sent.add((key, len(body)))
        self._inner.send(lane, key, body)

    def receive(self, lane: int, key: ContextKey) -> bytes:
        return self._inner.receive(lane, key)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_what_lanes_sleep_is_what_they_would_compute(order: str, split: bool) -> None:
    lanes, times, coder = emulated(order, "mos:warm=300,format=int8")  # more steps than the run has: none is learned
    mailbox = Mailbox(deadline_s=20.0)
    ends = [Sizes(mailbox.of(1, lane)) for lane in range(CHUNKS)]

    def run(lane: int) -> tuple[float, float]:
        slept: list[float] = []
        lanes[lane].connect(ends[lane])
        lanes[lane].forward(0, 1, slept.append)
        forward_s, slept[:] = sum(slept), []
        lanes[lane].backward(0, 1, slept.append, split=split)
        return forward_s, sum(slept)

    with ThreadPoolExecutor(CHUNKS) as pool:
        found = list(pool.map(run, range(CHUNKS)))
    backward_s = times.backward_s - (times.weight_gradient_s if split else 0.0)
    mean = [sum(each) / CHUNKS for each in zip(*found, strict=True)]
    assert mean == pytest.approx([times.forward_s, backward_s])
    if order == "zigzag":
        assert found == [pytest.approx((times.forward_s, backward_s))] * CHUNKS
    else:
        assert found[0] < found[1] < found[2]
    for end in ends:
        for key, nbytes in end.sent:
            late = ContextKey(
                step=300, evaluation=False, microbatch=1, layer=key.layer, segment=0, gradient=key.gradient
            )
            assert nbytes == coder.body_bytes(late)
    assert mailbox._parts == {}  # all that was sent was wanted
