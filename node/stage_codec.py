"""What a stage has of the run's codec: what it knows of tokens, the boundaries that it is an end of, what is trained.

A codec is a description (`compress.codec_interface.Codec`). A stage makes its own copy of all that from the settings:
the two ends of a boundary are on different machines and share nothing but what they can compute alike, which is what
the digest of `known_tokens` is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..compress.codec_interface import BoundaryCodec, BoundaryContext, Codec, StageContext
from ..compress.registry import parse_codec
from ..compress.token_table import token_table
from .averaging.stage_averager import rounding_seed
from .boundary.endpoints import BoundaryShape
from .config import RunConfig
from .constrained_stage import check_constrained

if TYPE_CHECKING:
    from ..compress.codec_interface import Decoder, Encoder
    from .model import StageModel


def stage_context(config: RunConfig, index: int, model: StageModel, *, dtype: torch.dtype) -> StageContext:
    """Where the codec of stage `index` computes."""
    return StageContext(
        seed=config.run.seed,
        stage=index,
        width=model.width,
        vocab_size=model.vocab_size,
        dtype=dtype,
        device=torch.device(config.compute.device),
    )


def known_tokens(
    codec: Codec, context: StageContext, model: StageModel, *, also: Iterable[Tensor] = ()
) -> tuple[str, nn.Module | None]:
    """The digest of what is frozen and generated, which all stages must share ("" where there is nothing), and what the
    codec knows of tokens on this stage. A table of tokens becomes a part of the first stage's embedding. also: what is
    generated beside the codec's. Raises ModelError for a stage that the codec does not fit."""
    table_VD = None
    if codec.table_scale:
        table_VD = token_table(
            context.seed,
            context.vocab_size,
            context.width,
            codec.table_scale,
            dtype=context.dtype,
            device=context.device,
        )
        if model.first:
            model.token_table_VD = table_VD
    if codec.constrains:
        check_constrained(codec, model, context, table_VD)
    shared = [each for each in (table_VD, codec.frozen(context), *also) if each is not None]
    digest = hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in shared)).hexdigest() if shared else ""
    alone = model.first and model.last
    return digest, None if alone else codec.tokens(context, table_VD)


def boundary_of(
    config: RunConfig, context: StageContext, boundary: int, tokens: nn.Module | None, lane: int
) -> tuple[BoundaryCodec, BoundaryContext, BoundaryShape]:
    """A boundary as the configuration says it is; each end builds its own and uses one half of it. tokens: what the
    stage knows of them. lane: each rounds by numbers of its own."""
    codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward)
    of_boundary = BoundaryContext(
        seed=context.seed,
        boundary=boundary,
        width=context.width,
        vocab_size=context.vocab_size,
        dtype=context.dtype,
        device=context.device,
        tokens=tokens,
    )
    shape = BoundaryShape.of(
        codec,
        of_boundary,
        microbatch_size=config.microbatch_size,
        sequence_length=config.lane_tokens,
        microbatches=config.pipeline.microbatches,
        seed=rounding_seed(config.run.seed, lane),
        ids_length=config.chunk_layout.ids_length(lane, config.ids_before),
        delay=config.pipeline.delay,
    )
    return codec, of_boundary, shape


def trained_parameters(
    index: int, model: StageModel, *, tokens: nn.Module | None, receiver: Decoder | None, sender: Encoder | None
) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer of stage `index` moves, by its name in the whole run: the model, what the codec knows of
    tokens, and the halves' own networks."""
    named = model.full_names()
    if tokens is not None:
        named += tokens.named_parameters(prefix=f"codec.stage_{index}")
    if receiver is not None:
        named += receiver.named_parameters(prefix=f"codec.boundary_{index - 1}.receiver")
    if sender is not None:
        named += sender.named_parameters(prefix=f"codec.boundary_{index}.sender")
    first_names = {id(parameter): name for name, parameter in reversed(named)}
    return [each for each in named if first_names[id(each[1])] == each[0]]  # both halves hold the tokens' module
