"""What of a link follows from the run's settings: how much a neighbour may send ahead, how long it may be silent."""

from __future__ import annotations

from typing import Any

import pytest
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.link_settings import heartbeat_timeout_s, make_link
from thinpipe.node.links.link import Link
from thinpipe.node.measuring.message_sizes import Sizes
from thinpipe.node.preparation import resolve_architecture
from thinpipe.node.run_records import Tracer
from thinpipe.protocol.messages import Greeting, Limits, decode_frame
from thinpipe.sim.links.shaper import LinkProfile

from .builders import identity

MIB = 2**20
DENSE: dict[str, Any] = {  # 8,192 tokens of 1,024 numbers in 16 bits: 16 MiB and the ids
    "codec.codec": "bf16",
    "model.preset": "150m",
    "model.vocab_size": 32768,
    "data.sequence_length": 1024,
    "pipeline.stages": 3,
    "pipeline.batch_size": 512,
    "pipeline.microbatches": 64,
}


def ends(settings: dict[str, Any]) -> tuple[list[Link], Limits]:
    """Both ends of the boundary between stages 1 and 2, and what comes there at most."""
    config = parse_config(merge({}, settings))
    shape = Sizes(config, resolve_architecture(config), boundary=1).shape
    links = [
        make_link(config, identity(stage, stages=3), 3 - stage, shape, Tracer(stage=stage, enabled=False))
        for stage in (1, 2)
    ]
    return links, shape.limits


def granted_bytes(link: Link) -> int:
    """What the peer may send before anything is consumed, as the greeting tells it."""
    greeting = decode_frame(link.session.greeting(), link.session.limits)
    assert isinstance(greeting, Greeting)
    return greeting.granted_bytes


@pytest.mark.parametrize(
    ("schedule", "ahead"),
    [("1f1b", 2), ("gpipe", 2), ("1f1b:rtt_ratio=6", 7), ("1f1b:rtt_ratio=24", 25), ("zb:rtt_ratio=24", 25)],
)
def test_large_messages_have_room_on_the_side_that_runs_ahead(schedule: str, ahead: int) -> None:
    """Activations as many as the schedule sends before it wants a gradient; gradients two."""
    (upper, lower), limits = ends({**DENSE, "pipeline.schedule": schedule})
    assert limits.message_bytes > 16 * MIB
    each = limits.message_bytes + limits.frame_bytes
    assert granted_bytes(lower) == ahead * each
    assert granted_bytes(upper) == 2 * each


def test_small_messages_have_the_room_that_is_set() -> None:
    settings = {**DENSE, "codec.codec": "mapl:r=8,context=0", "pipeline.schedule": "zb:rtt_ratio=6"}
    settings |= {"link.receive_buffer_bytes": 100 * MIB}
    links, _ = ends(settings)
    assert [granted_bytes(link) for link in links] == [100 * MIB] * 2


def test_silence_is_longer_where_a_frame_may_have_to_wait_for_more() -> None:
    """On the wire before a heartbeat there may be a window, each way: two chunks, and what fills the round trip."""
    link = LinkProfile.parse("10mbit,25ms")
    plain, coarse = heartbeat_timeout_s(link), heartbeat_timeout_s(link, 4 * MIB)
    assert coarse - plain == pytest.approx(2 * 2 * (4 * MIB - 64 * 1024) * 8 / 10e6)
    assert heartbeat_timeout_s(LinkProfile.parse("none"), 4 * MIB) == heartbeat_timeout_s(LinkProfile.parse("none"))
    assert heartbeat_timeout_s(LinkProfile.parse("10mbit,50ms")) > plain + 2 * 0.025
