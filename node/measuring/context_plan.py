"""What the exchange of keys and values costs a stage of a planned run: bytes, waits, and its times a microbatch.

All lanes of a stage are simulated together (`sim.links.context_exchange`), from the layout of the run, the operations
of blocks of attention, and messages of the method's size. A stage's time for a microbatch is then that of its slowest
lane when all begin at one moment, and a pipeline is simulated with these times as with any others. That is exact where
lanes compute alike (zigzag); in plain order lanes that are done early could begin the next microbatch, and do not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...compress.context_method import ContextMethod, ContextShape
from ...compress.registry import parse_format
from ...protocol.messages import Kind, Message
from ...sim.links.context_exchange import (
    ContextTimes,
    ContextWork,
    LaneLayer,
    Route,
    TakenSegment,
    simulate_context,
)
from ...sim.links.pipeline import StageTimes
from ...sim.links.shaper import LinkProfile
from ..config import RunConfig
from ..links.outgoing import chunk_bytes_for
from ..stage import DTYPES
from ..stage_costs import operations
from .message_sizes import accounted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAIN_FORMATS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}  # of what a method leaves as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSizes:
    """Of one segment of a microbatch's sequences in one layer. forward_bytes, backward_bytes: framed; stored_bytes:
    what a lane keeps of it until its backward; tokens: of all its sequences."""

    forward_bytes: int
    backward_bytes: int
    stored_bytes: int
    tokens: int


def context_sizes(config: RunConfig, architecture: PretrainedConfig, method: ContextMethod) -> ContextSizes:
    """Raises CodecError for a format that there is not."""
    layout, batch, dtype = config.chunk_layout, config.microbatch_size, DTYPES[config.compute.dtype]
    heads_width, _ = _widths(architecture)
    shape = ContextShape(
        seed=config.run.seed,
        layer=0,
        width=architecture.hidden_size,
        heads=architecture.num_key_value_heads,
        head_width=heads_width // architecture.num_attention_heads,
        segments=layout.segments_per_lane,
        segment_length=layout.segment_length,
        dtype=dtype,
    )
    z_BTW = (batch, layout.segment_length, method.wire_width(shape))
    scalars = batch * method.scalars(shape)
    exact_bytes = 8 if config.compute.dtype == "float64" else 4
    link = LinkProfile.parse(config.link.link)
    chunk_bytes = config.link.chunk_bytes or chunk_bytes_for(link)

    def framed(spec: str) -> int:
        form = parse_format(spec or PLAIN_FORMATS[config.compute.dtype])
        body = bytes(form.body_bytes(z_BTW) + scalars * exact_bytes)
        header = {"shape": list(z_BTW)}
        # As a message of a boundary, whose head lacks but two small numbers.
        message = Message(kind=Kind.GRADIENT, step=1000, microbatch=1, codec=form.id, codec_header=header, body=body)
        return sum(accounted(message, chunk_bytes).values())

    return ContextSizes(
        forward_bytes=framed(method.format),
        backward_bytes=framed(method.backward),
        stored_bytes=z_BTW[0] * z_BTW[1] * z_BTW[2] * dtype.itemsize + scalars * exact_bytes,
        tokens=batch * layout.segment_length,
    )


def context_work(
    config: RunConfig,
    architecture: PretrainedConfig,
    sizes: ContextSizes,
    times: StageTimes,
    *,
    layers: int,
    other_operations: float = 0.0,
) -> ContextWork:
    """Of one stage with so many layers. times: of one microbatch on one lane with the mean attention, as they are
    without any exchange. other_operations: a token, of what it does besides its layers."""
    layout, costs, batch = config.chunk_layout, operations(config, architecture), config.microbatch_size
    heads_width, kv_width = _widths(architecture)
    tokens = batch * layout.lane_length
    operation_s = times.forward_s / (tokens * (layers * costs.layer + other_operations))
    projections = 2.0 * architecture.hidden_size * (heads_width + 2 * kv_width)
    pair_s = 4.0 * heads_width * batch * layout.segment_length**2 * operation_s  # of two segments

    def lane_layer(lane: int) -> LaneLayer:
        own = layout.of_lane(lane)
        return LaneLayer(
            before_s=projections * tokens * operation_s,
            own_s=pair_s * (len(own) / 2 + len(own) * (len(own) - 1) / 2),  # a triangle each, and squares
            after_s=(costs.layer_weights - projections) * tokens * operation_s,
            gives=own,
            takes=tuple(
                TakenSegment(
                    segment=segment,
                    owner=layout.owner(segment),
                    attend_s=pair_s * sum(each > segment for each in own),
                )
                for segment in layout.needed_by(lane)
            ),
        )

    return ContextWork(
        lanes=tuple(lane_layer(lane) for lane in range(layout.chunks)),
        layers=layers,
        forward_bytes=sizes.forward_bytes,
        backward_bytes=sizes.backward_bytes,
        backward=times.backward_s / times.forward_s,
    )


def with_exchange(
    work: ContextWork,
    times: StageTimes,
    link: LinkProfile,
    *,
    other_s: float = 0.0,
    route: Route = "direct",
    interface: bool = False,
) -> tuple[StageTimes, ContextTimes]:
    """The stage's times with its waits, and what they are made of. other_s: of `times` forward, outside of layers."""
    found = simulate_context(work, link, route=route, interface=interface)
    forward_s = found.forward_s + other_s
    backward_s = found.backward_s + work.backward * other_s
    return replace(times, forward_s=forward_s, backward_s=backward_s, weight_s=times.weight_gradient_s), found


def stored_bytes(config: RunConfig, sizes: ContextSizes, *, layers: int, in_flight: int) -> int:
    """What the lane that looks at the most segments keeps of them until its backwards."""
    layout = config.chunk_layout
    most = max(len(layout.needed_by(lane)) for lane in range(layout.chunks))
    return most * sizes.stored_bytes * layers * in_flight


def _widths(architecture: PretrainedConfig) -> Sequence[int]:
    """Of all heads of queries together, and of all those of keys."""
    head = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    return architecture.num_attention_heads * head, architecture.num_key_value_heads * head
