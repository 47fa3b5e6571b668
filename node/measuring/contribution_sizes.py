"""What a stage contributes to the rounds of its lanes, to the byte, without the stage.

The averager that says so is the run's own (`node.averaging`). It gets the tensors that the stage would train, and here
they have shapes and no memory (torch's meta device): the slice of the model, what the codec knows of tokens, the
trained halves of both boundaries, the projector. Why not a formula of widths and layers: what is cut into fragments,
filled up to whole rows or sent whole would be decided in two places.

A contribution crosses a lateral link in parts, each a frame of its own; `framed_contribution` adds what that takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...compress.byte_format import CodecError
from ...compress.codec_interface import BoundaryContext, StageContext
from ...compress.registry import parse_codec
from ...protocol.messages import encode_frame
from ...protocol.round_messages import RoundPart
from ...protocol.wire_size import framed_bytes
from ..averaging.averager import Averager, Place
from ..averaging.modes import parse_averaging
from ..averaging.stage_averager import stage_averager
from ..boundary.learned_tables import moves_after
from ..config import ConfigError, RunConfig
from ..constrained_stage import constrain
from ..model.slices import cut, skeleton
from ..stage_codec import trained_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def sized_averager(
    config: RunConfig, architecture: PretrainedConfig, index: int, layers: range, *, lane: int = 0, inner: bool = False
) -> Averager:
    """The averager of stage `index`, which has these `layers`: it knows the rounds and the size of each contribution,
    and has nothing to contribute. inner: neither embedding nor head, whatever `index` is. Raises ConfigError for a mode
    that does not fit the stage, ModelError for a model that cannot be built, and CodecError."""
    last_index = config.pipeline.stages - 1
    first, last = index == 0 and not inner, index == last_index and not inner
    dtype = torch.float64 if config.compute.dtype == "float64" else torch.float32
    codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward).codec
    model = cut(skeleton(architecture, dtype), layers, first=first, last=last)
    model.to("meta")  # constants of some architectures are on the CPU, and may be trained
    sizes = {"width": model.width, "vocab_size": model.vocab_size}
    context = StageContext(seed=config.run.seed, stage=index, **sizes, dtype=dtype, device="meta")
    if codec.constrains:
        constrain(codec, model, context, architecture.num_hidden_layers)
    tokens = receiver = sender = None
    if last_index:
        with torch.device("meta"):
            table_VD = torch.empty(model.vocab_size, model.width, dtype=dtype) if codec.table_scale else None
            tokens = codec.tokens(context, table_VD)

        def boundary(number: int) -> BoundaryContext:
            return BoundaryContext(
                seed=config.run.seed, boundary=number, **sizes, dtype=dtype, device="meta", tokens=tokens
            )

        receiver = codec.decoder(boundary(index - 1)) if index else None
        sender = codec.encoder(boundary(index)) if index < last_index else None
    table = codec.table(model.width)
    learned = table if sender is not None and table is not None and table.every else None
    try:
        return stage_averager(
            parse_averaging(config.lanes.average),
            Place(stage=index, lane=lane, lanes=config.lanes.count, seed=config.run.seed),
            steps=config.run.steps,
            parameters=trained_parameters(index, model, tokens=tokens, receiver=receiver, sender=sender),
            sender=sender if learned else None,
            table_moves=lambda step: learned is not None and moves_after(learned, step),
            table_gradient=lambda: None,
        )
    except CodecError as error:
        raise ConfigError(f"lanes.average: {error}") from None


def check_contributions(
    config: RunConfig, architecture: PretrainedConfig, layers: Sequence[range], *, inner: bool = False
) -> None:
    """layers: of each stage. Raises what `sized_averager` does, where there are lanes."""
    if config.lanes.count > 1:
        for index, of_stage in enumerate(layers):
            sized_averager(config, architecture, index, of_stage, inner=inner)


def framed_contribution(total_bytes: int, *, round: int, part_bytes: int) -> int:
    """Bytes on the wire of a contribution to that round, in parts of `part_bytes`, as lateral links count them."""
    # Parts differ in length, and in how long their offset is as a varint: one frame of each kind stands for all.
    kinds: Counter[tuple[int, int]] = Counter()
    of_kind: dict[tuple[int, int], int] = {}
    for offset in range(0, total_bytes, part_bytes):
        kind = (-(-offset.bit_length() // 7), min(part_bytes, total_bytes - offset))
        kinds[kind] += 1
        of_kind.setdefault(kind, offset)
    framed = 0
    for kind, count in kinds.items():
        data = bytes(kind[1])
        part = RoundPart(
            round=round, offset=of_kind[kind], total_bytes=total_bytes, contribution_xxh3=2**64 - 1, data=data
        )
        framed += count * framed_bytes(len(encode_frame(part)))
    return framed
