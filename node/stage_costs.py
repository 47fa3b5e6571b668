"""What each stage computes for a token, in operations, and the cut of the model that follows from it.

A multiply-add is two operations. Forward, a weight matrix takes one multiply-add for each of its numbers and token;
attention takes 2 T H operations a token and layer more (its products with keys and values, half of them masked; H is
the width of all heads together), and has no weights; a codec takes what it says (`Codec.operations_per_token`) at
either end of its boundary. Backward is twice that: once for the input gradient and once for the weights' own. The
optimizer, norms and byte formats are left out, and an embedding costs nothing but memory.

From the same settings every node finds the same numbers, so that no two have to agree on a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..compress.registry import parse_codec
from ..sim.links import stage_work
from ..sim.links.stage_work import Operations, StageWorkError
from .config import RunConfig
from .model.architecture import ModelError, architecture_digest, with_layers
from .model.parts import in_layer
from .model.slices import skeleton
from .model.stage_cut import equal_cut, layer_ranges, stated_cut

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_numbers: dict[str, int] = {}  # of a layer's matrices, by the digest of the architecture


def model_operations(config: RunConfig, architecture: PretrainedConfig) -> Operations:
    """Without a codec. Raises ModelError for an architecture that cannot be built."""
    matrices = _layer_numbers(architecture)  # first: one that is not supported may have no heads to ask for
    width, heads = architecture.hidden_size, architecture.num_attention_heads
    heads_width = heads * (getattr(architecture, "head_dim", None) or width // heads)
    return Operations(
        layer_weights=2.0 * matrices,
        attention=2.0 * config.data.sequence_length * heads_width,
        head=2.0 * architecture.vocab_size * width,
        codec_end=0.0,
    )


def _layer_numbers(architecture: PretrainedConfig) -> int:
    """Of all matrices of one layer. Every stage asks, and several times."""
    digest = architecture_digest(architecture)
    if digest not in _numbers:
        one = skeleton(with_layers(architecture, range(1)), torch.float32)  # all layers, a hundred times as slow
        _numbers[digest] = sum(p.numel() for name, p in one.named_parameters() if p.ndim == 2 and in_layer(name))
    return _numbers[digest]


def operations(config: RunConfig, architecture: PretrainedConfig) -> Operations:
    """Raises ModelError for an architecture that cannot be built, and CodecError."""
    codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward).codec
    found = model_operations(config, architecture)
    return replace(found, codec_end=codec.operations_per_token(architecture.hidden_size))


def stage_layers(config: RunConfig, architecture: PretrainedConfig) -> list[range]:
    """The layers of each stage, as `pipeline.cut` and `pipeline.speeds` have it. Raises ModelError."""
    return layer_ranges(_counts(config, architecture))


def _counts(config: RunConfig, architecture: PretrainedConfig) -> list[int]:
    layers, stages, cut = architecture.num_hidden_layers, config.pipeline.stages, config.pipeline.cut
    if cut == "equal" or (cut == "auto" and stages == 1):
        return equal_cut(layers, stages)
    if cut == "auto":
        return best_cut(config, architecture, operations(config, architecture), speeds(config))
    return stated_cut([int(part) for part in cut.split(",")], layers, stages)


def best_cut(
    config: RunConfig, architecture: PretrainedConfig, costs: Operations, at_speeds: Sequence[float]
) -> list[int]:
    """Layers of each stage for machines of these speeds, whatever `pipeline.cut` says. Raises ModelError."""
    # More than there are: `Codec.check_layers` says so.
    last_layers = parse_codec(config.codec.codec).codec.last_layers(architecture.hidden_size)
    try:
        return stage_work.best_cut(architecture.num_hidden_layers, costs, at_speeds, last_layers=last_layers)
    except StageWorkError as error:
        raise ModelError(str(error)) from None


def best_order(config: RunConfig, architecture: PretrainedConfig) -> list[float]:
    """The speeds of the stages' machines, in the order in which the slowest stage is fastest; as they are, where no
    other order is better. Raises ModelError, and CodecError.

    Only the ends differ: the last stage has the head and, behind a narrow boundary, a layer in any case; both have one
    codec the less. So one machine is exchanged for the last one, and then one for the first.
    """
    costs, order = operations(config, architecture), speeds(config)

    def slowest_s(of: Sequence[float]) -> float:
        work = costs.of_stages(best_cut(config, architecture, costs, of))
        return max(done / speed for done, speed in zip(work, of, strict=True))

    last = len(order) - 1
    for end, others in ((last, range(last)), (0, range(1, last))):
        order = min((order, *(_exchanged(order, end, other) for other in others)), key=slowest_s)
    return order


def _exchanged(order: Sequence[float], one: int, other: int) -> list[float]:
    found = list(order)
    found[one], found[other] = found[other], found[one]
    return found


def speeds(config: RunConfig) -> list[float]:
    """Of each stage's machine, relative."""
    return list(config.pipeline.speeds) or [1.0] * config.pipeline.stages
