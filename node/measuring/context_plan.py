"""What the exchange of keys and values costs a stage of a planned run: bytes, waits, and its times a microbatch.

All lanes of a stage are simulated together (`sim.links.context_exchange`), from the layout of the run, the operations
of blocks of attention, and messages of the method's size. A stage's time for a microbatch is then that of its slowest
lane when all begin at one moment, and a pipeline is simulated with these times as with any others. That is exact where
lanes compute alike (zigzag); in plain order lanes that are done early could begin the next microbatch, and do not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...compress.context_method import ContextShape
from ...compress.context_registry import parse_context
from ...sim.links.context_exchange import (
    ContextTimes,
    ContextWork,
    LaneLayer,
    TakenSegment,
)
from ...sim.links.pipeline import PairTimes, StageTimes
from ...sim.links.shaper import LinkProfile
from ...sim.links.stage_work import Operations
from ..config import RunConfig
from ..context.context_exchange import ContextCoder
from ..context.context_parts import message_of
from ..context.exchange import ContextKey
from ..links.outgoing import chunk_bytes_for
from ..stage import DTYPES
from .message_sizes import accounted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FRAMED_STEP = 1000  # a usual one: a frame is a little longer, the more digits its numbers have


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSizes:
    """Of one segment of a microbatch's sequences in one layer. forward_bytes, backward_bytes: framed; stored_bytes:
    what a lane keeps of it until its backward; tokens: of all its sequences."""

    forward_bytes: int
    backward_bytes: int
    stored_bytes: int
    tokens: int


def context_coder(config: RunConfig, architecture: PretrainedConfig) -> tuple[ContextCoder, ContextShape]:
    """Of any layer. Raises CodecError for a method or format that there is not, or that has a memory."""
    dtype, layout = DTYPES[config.compute.dtype], config.chunk_layout
    shape = ContextShape(
        seed=config.run.seed,
        layer=0,
        width=architecture.hidden_size,
        heads=getattr(architecture, "num_key_value_heads", None) or architecture.num_attention_heads,
        head_width=head_width(architecture),
        segments=layout.segments_per_lane,
        segment_length=layout.segment_length,
        dtype=dtype,
    )
    sizes = {"batch": config.microbatch_size, "dtype": dtype, "device": torch.device("cpu")}
    return ContextCoder(parse_context(config.context.method), shape, **sizes), shape


def context_sizes(config: RunConfig, architecture: PretrainedConfig, *, step: int) -> ContextSizes:
    """In step `step`: a method may begin wider than it goes on. Raises what `context_coder` does."""
    method, batch, dtype = parse_context(config.context.method), config.microbatch_size, DTYPES[config.compute.dtype]
    coder, shape = context_coder(config, architecture)
    chunk_bytes = config.link.chunk_bytes or chunk_bytes_for(LinkProfile.parse(config.link.link))

    def part(*, gradient: bool) -> int:
        key = ContextKey(step=step, evaluation=False, microbatch=1, layer=1, segment=1, gradient=gradient)
        return framed(replace(key, step=FRAMED_STEP), coder.body_bytes(key), chunk_bytes)

    tokens, exact_bytes = batch * shape.segment_length, 8 if dtype is torch.float64 else 4
    return ContextSizes(
        forward_bytes=part(gradient=False),
        backward_bytes=part(gradient=True),
        stored_bytes=tokens * method.width_at(step, shape) * dtype.itemsize
        + batch * method.scalars(shape) * exact_bytes,
        tokens=tokens,
    )


def framed(key: ContextKey, nbytes: int, chunk_bytes: int) -> int:
    """Of a part of so many bytes. Chunks are alike, so a few stand for hundreds of megabytes of them."""
    left_out = max(0, nbytes // chunk_bytes - 2)
    few, more = (
        sum(accounted(message_of(key, bytes(nbytes - (left_out - extra) * chunk_bytes)), chunk_bytes).values())
        for extra in (0, min(1, left_out))
    )
    return few + left_out * (more - few)


def context_work(
    config: RunConfig,
    architecture: PretrainedConfig,
    costs: Operations,
    sizes: ContextSizes,
    times: StageTimes,
    *,
    layers: int,
    other_operations: float = 0.0,
) -> ContextWork:
    """Of one stage with so many layers. times: of one microbatch on one lane with the mean attention, as they are
    without any exchange. other_operations: a token, of what it does besides its layers."""
    layout, batch = config.chunk_layout, config.microbatch_size
    heads_width, kv_width = widths(architecture)
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
        other_s=tokens * other_operations * operation_s,
    )


def with_exchange(times: StageTimes, one: ContextTimes, two: ContextTimes | None) -> StageTimes:
    """The stage's times with its waits. two: of a pair of microbatches, where they are computed in turns."""
    pair = None
    if two:
        ways = ((first_s, second_s - first_s) for first_s, second_s in (two.forward_s, two.backward_s))
        pair = PairTimes(forward_s=next(ways), backward_s=next(ways))
    return replace(
        times,
        forward_s=one.forward_s[0],
        backward_s=one.backward_s[0],
        weight_s=times.weight_gradient_s,
        pair=pair,
    )


def stored_bytes(config: RunConfig, sizes: ContextSizes, *, layers: int, in_flight: int) -> int:
    """What the lane that looks at the most segments keeps of them until its backwards."""
    layout = config.chunk_layout
    most = max(len(layout.needed_by(lane)) for lane in range(layout.chunks))
    return most * sizes.stored_bytes * layers * in_flight


def widths(architecture: PretrainedConfig) -> tuple[int, int]:
    """Of all heads of queries together, and of all those of keys."""
    heads, head = architecture.num_attention_heads, head_width(architecture)
    return heads * head, (getattr(architecture, "num_key_value_heads", None) or heads) * head


def head_width(architecture: PretrainedConfig) -> int:
    """Of one head."""
    return getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
