"""Models that a codec constrains, so that their hidden states fit a boundary: changed, then tried before they train.

A list of architectures that can be constrained would be wrong with the next release of transformers. So what a codec
promises is measured: a stage gets random input of the kind that it will get, gains and biases at random (at their first
values, a gain behind a branch changes nothing), and what its output would lose at the next boundary has to be rounding.
It is tried on a small copy before anything starts, and by each stage on itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.byte_format import CodecError
from ..compress.codec_interface import BoundaryContext, Codec, StageContext
from ..compress.stage_parts import StageParts
from .model import ModelError, StageModel, build_stage
from .model.exactness import CHECK_TOKENS, narrowed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ENDLESS = 2**31  # layers: none of the few that are tried is among the last
LARGEST_LOSS = 1e-5  # relative, root of energies: a hundred roundings of float32


def constrain(codec: Codec, model: StageModel, context: StageContext, all_layers: int) -> None:
    """Let the codec change the stage. Raises ModelError."""
    prefix = model.causal.base_model_prefix
    parts = StageParts(
        model=model.causal,
        embedding=f"{prefix}.{model.parts.embedding}" if model.first else None,
        layers={number: f"{prefix}.{model.parts.layers}.{own}" for own, number in enumerate(model.layers)},
        all_layers=all_layers,
    )
    try:
        codec.constrain(parts, context)
    except CodecError as error:
        raise ModelError(str(error)) from None


@torch.no_grad()
def check_constrained(codec: Codec, model: StageModel, context: StageContext, table_VD: Tensor | None) -> None:
    """Raises ModelError for a stage whose output would not cross its boundary whole."""
    if model.last:
        return
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(model.vocab_size, (1, CHECK_TOKENS), generator=generator).to(context.device)
    known_BTD = None if table_VD is None else F.embedding(ids_BT, table_VD)
    with _random_vectors(model, generator):
        entering = ids_BT if model.first else _fitting(codec, context, known_BTD, generator)
        lost = codec.lost(model(entering).to(context.dtype), known_BTD, context)
    if not lost <= LARGEST_LOSS:
        kind = getattr(model.causal.config, "model_type", "this architecture")
        raise ModelError(
            f"codec '{codec.name}': architecture '{kind}' leads out of the subspace, as a norm behind a branch does: "
            f"{lost:.1e} of what leaves stage {context.stage} (at most {LARGEST_LOSS:g}); choose a decoder such as "
            "llama or qwen3, or codec 'mapl'"
        )


def check_architecture(codec: Codec, architecture: PretrainedConfig, seed: int) -> None:
    """Try it on a small copy of the model, the stage above a boundary and one between two. Raises ModelError."""
    config = narrowed(architecture)
    small = codec.shrunk(config.hidden_size)
    stages = config.num_hidden_layers
    for stage in range(min(2, stages - 1)):
        context = StageContext(
            seed=seed, stage=stage, width=config.hidden_size, vocab_size=config.vocab_size, dtype=torch.float64
        )
        model = build_stage(
            config,
            stage=stage,
            stages=stages,
            seed=seed,
            dtype=torch.float64,
            device="cpu",
            constrain=lambda model, context=context: constrain(small, model, context, _ENDLESS),
        )
        check_constrained(small, model, context, None)


def _fitting(codec: Codec, context: StageContext, known_BTD: Tensor | None, generator: torch.Generator) -> Tensor:
    """Random hidden states as they come from a boundary (1, T, D)."""
    boundary = BoundaryContext(
        seed=context.seed,
        boundary=context.stage - 1,
        width=context.width,
        vocab_size=context.vocab_size,
        dtype=context.dtype,
        device=context.device,
    )
    z_BTW = torch.randn(1, CHECK_TOKENS, codec.wire_width(context.width), generator=generator)
    ids_BT = torch.zeros(1, CHECK_TOKENS, dtype=torch.int64)
    lifted_BTD = codec.decoder(boundary).decode(z_BTW.to(context.device, context.dtype), ids_BT)
    return lifted_BTD if known_BTD is None else lifted_BTD + known_BTD


@contextmanager
def _random_vectors(model: StageModel, generator: torch.Generator) -> Iterator[None]:
    vectors = {p: p.clone() for p in model.parameters() if p.ndim < 2}
    for vector in vectors:
        vector.add_(0.3 * torch.randn(vector.shape, generator=generator).to(vector))
    try:
        yield
    finally:
        for vector, before in vectors.items():
            vector.copy_(before)
