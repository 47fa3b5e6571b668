"""What a plan says of chunks: sizes and operations against arithmetic, and times against the rest of the plan."""

from __future__ import annotations

from typing import Any

import pytest
from thinpipe.compress.context_method import ContextLayer, ContextMethod, ContextShape
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.measuring.context_plan import context_sizes, context_work, stored_bytes, with_exchange
from thinpipe.node.measuring.emulated_machine import VOCABULARY, times_at
from thinpipe.node.model import resolve_model
from thinpipe.sim.links.shaper import LinkProfile
from torch import nn

FREE = LinkProfile(rate_bits_per_s=None)


class Narrow(ContextMethod):
    """So many numbers a token and two angles a segment."""

    name = "narrow"

    def __init__(self, numbers: int, format: str = "") -> None:
        self.numbers, self.format, self.backward = numbers, format, format

    def wire_width(self, shape: ContextShape) -> int:
        del shape
        return self.numbers

    def scalars(self, shape: ContextShape) -> int:
        del shape
        return 2

    def attach(self, attention: nn.Module, shape: ContextShape) -> ContextLayer:
        raise NotImplementedError


def config_of(**changed: Any) -> RunConfig:
    settings = {
        "model.preset": "800m",
        "pipeline.stages": 1,
        "pipeline.batch_size": 1,
        "pipeline.microbatches": 1,
        "data.sequence_length": 131072,
        "lanes.count": 8,
        "context.method": "narrow",
        "link.link": "300mbit,25ms",
        "compute.dtype": "bfloat16",
    }
    return parse_config(merge({}, {**settings, **{key.replace("__", "."): value for key, value in changed.items()}}))


def architecture_of(config: RunConfig) -> Any:
    return resolve_model(config.model, vocab_size=VOCABULARY, sequence_length=config.data.sequence_length)


def test_sizes_are_those_of_the_numbers_and_a_little_framing() -> None:
    config = config_of()
    sizes = context_sizes(config, architecture_of(config), Narrow(143))
    assert sizes.tokens == 131072 // 16
    exact = sizes.tokens * 143 * 2 + 2 * 4
    assert exact < sizes.forward_bytes == sizes.backward_bytes < 1.003 * exact
    assert sizes.stored_bytes == exact
    assert stored_bytes(config, sizes, layers=8, in_flight=3) == 14 * exact * 24
    packed = context_sizes(config, architecture_of(config), Narrow(256, "int4"))
    assert packed.forward_bytes < 0.6 * sizes.tokens * 256
    assert context_sizes(config_of(compute__dtype="float32"), architecture_of(config), Narrow(143)).forward_bytes > (
        1.99 * exact
    )


@pytest.mark.parametrize("order", ["zigzag", "plain"])
def test_lanes_do_together_what_one_machine_would(order: str) -> None:
    """The operations of all lanes are those that the emulated machine counts."""
    config = config_of(context__order=order)
    architecture = architecture_of(config)
    (one,) = times_at(config, architecture, 100.0)
    sizes = context_sizes(config, architecture, Narrow(143))
    head = 2.0 * VOCABULARY * architecture.hidden_size
    work = context_work(config, architecture, sizes, one, layers=8, other_operations=head)
    other_s = head * 16384 / 1e14
    done = sum(8 * lane.forward_s for lane in work.lanes) / 8 + other_s
    assert done == pytest.approx(one.forward_s)
    times, found = with_exchange(work, one, FREE, other_s=other_s)
    if order == "zigzag":
        assert (times.forward_s, times.backward_s) == pytest.approx((one.forward_s, one.backward_s))
        assert max(found.forward_wait_s) < 1e-9
    else:
        assert times.forward_s > 1.5 * one.forward_s  # its last lane has nearly twice the attention


def test_narrow_keys_and_values_are_less_waited_for() -> None:
    """The published case: 800M parameters, 131,072 tokens over 8 chunks, 300 Mb/s and 25 ms. At 121 TFLOP/s each, eight
    machines do 56,000 tokens/s where links are instant; keys and values in bf16 leave them 2,200."""
    config = config_of()
    architecture = architecture_of(config)
    head = 2.0 * VOCABULARY * architecture.hidden_size
    (one,) = times_at(config, architecture, 121.11)
    rates = {}
    for name, numbers, link in (("free", 4096, FREE), ("full", 4096, None), ("mos", 143, None)):
        sizes = context_sizes(config, architecture, Narrow(numbers))
        work = context_work(config, architecture, sizes, one, layers=8, other_operations=head)
        link = link or LinkProfile.parse(config.link.link)
        times, _ = with_exchange(work, one, link, other_s=head * 16384 / 121.11e12)
        rates[name] = 131072 / (times.forward_s + times.backward_s)
    assert rates["free"] == pytest.approx(56_000, rel=0.001)
    assert rates["full"] == pytest.approx(2_235, rel=0.01)
    assert rates["mos"] == pytest.approx(33_100, rel=0.01)  # of 55,000 published
