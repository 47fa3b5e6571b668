"""The hook into an architecture: its own forward, with attention over chunks in the place of its attention.

transformers lets a model's attention be a function of a registered name. Ours gets queries, keys and values as the
architecture has made them, rotary embedding included, and gives them to the layer's `LayerAttention`. Masks are not
made, since the layout of segments says what is seen; positions are given to the model as a list. So projections, norms,
head counts and rotary embeddings stay the architecture's business.

What cannot be right is refused by name: attention that looks at a window or at sinks, or bends its scores, asks for
arguments that this function does not have. The unknown is refused by `chunk_exactness`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compress.context_method import ContextMethod, ContextShape, Rotate
from ..model.architecture import ModelError, describe, quiet_transformers
from .chunk_layout import ChunkLayout
from .context_exchange import ContextCoder, ContextExchange
from .exchange import ContextTransport
from .layer_attention import LayerAttention, Moment

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..model import StageModel

WITHOUT_THAT = "choose a decoder that looks at all earlier tokens, such as llama or qwen3"
ATTENTION = "thinpipe_chunks"  # as transformers knows it
_PLACE = "chunk_attention"  # of the LayerAttention, in an attention module
# Of an attention function's arguments: those that change nothing of what is computed here.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "cu_seq_lens_q"}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Raises ModelError for options that attention over chunks does not have."""
    del attention_mask, dropout  # none is made; dropout is refused with the architecture
    odd = sorted(name for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT)
    if odd:
        raise ModelError(
            f"{describe(module.config)} cannot be cut into chunks: its attention takes {', '.join(odd)}, which "
            f"attention over chunks of a sequence does not have; {WITHOUT_THAT}"
        )
    if torch.is_autocast_enabled(query.device.type):  # which casts what torch's own attention is given
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention: LayerAttention = getattr(module, _PLACE)
    return attention(query, key, value, scale).transpose(1, 2), None


def with_chunks(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture, with attention over chunks. `config` is changed."""
    interface = quiet_transformers().AttentionInterface
    if ATTENTION not in interface._global_mapping:
        interface.register(ATTENTION, attend)
    config._attn_implementation = ATTENTION
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneContext:
    """Which chunk a model computes, and how. batch: sequences of a microbatch; seeds: by lane; dtype: of computing."""

    method: ContextMethod
    layout: ChunkLayout
    lane: int
    seed: int
    batch: int
    seeds: list[int]
    dtype: torch.dtype


class ChunkedModel:
    """What a stage's model has of its chunk. Changes modules of `model` as the method wants, so before an optimizer is
    made; `connect` before anything is computed. Raises ModelError or CodecError for a model that does not fit."""

    def __init__(self, model: StageModel, context: LaneContext) -> None:
        self.moment = Moment()
        self._model, self._context = model, context
        self._layers = {}
        self.coders: dict[int, ContextCoder] = {}  # by layer of the whole model
        device = next(model.parameters()).device
        for layer, module in zip(model.layers, model.layer_modules, strict=True):
            attention = _attention_of(module, model)
            shape = _shape(attention, layer, model, context)
            self._layers[layer] = (attention, context.method.attach(attention, shape))
            self.coders[layer] = ContextCoder(
                context.method, shape, batch=context.batch, dtype=context.dtype, device=device
            )
        positions = torch.tensor(context.layout.lane_positions(context.lane), device=device)
        model.positions = positions.unsqueeze(0)

    def connect(self, transport: ContextTransport) -> None:
        """Parts go by `transport` from now on."""
        context = self._context
        exchange = ContextExchange(context.layout, context.lane, transport, self.coders, context.seeds)
        rotations = [self._rotation(segment) for segment in range(context.layout.segments)]
        for layer, (attention, method) in self._layers.items():
            setattr(attention, _PLACE, LayerAttention(layer, method, exchange, self.moment, rotations))

    def _rotation(self, segment: int) -> Rotate:
        """The architecture's own rotary embedding, of a segment's positions."""
        positions = torch.tensor(self._context.layout.positions(segment)).unsqueeze(0)

        def rotate(k_BHTD: Tensor) -> Tensor:
            cos, sin = self._model.base.rotary_emb(k_BHTD, positions.to(k_BHTD.device))
            attention, _ = next(iter(self._layers.values()))
            own = sys.modules[type(attention).__module__]
            return own.apply_rotary_pos_emb(k_BHTD, k_BHTD, cos, sin)[1]

        return rotate


def _attention_of(layer: nn.Module, model: StageModel) -> nn.Module:
    found = getattr(layer, "self_attn", None)
    if isinstance(found, nn.Module):
        return found
    raise ModelError(
        f"{describe(model.causal.config)} cannot be cut into chunks: its layers have no 'self_attn'; {WITHOUT_THAT}"
    )


def _shape(attention: nn.Module, layer: int, model: StageModel, context: LaneContext) -> ContextShape:
    config = model.causal.config
    head_width = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ContextShape(
        seed=context.seed,
        layer=layer,
        width=model.width,
        heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width=head_width,
        segments=context.layout.segments_per_lane,
        segment_length=context.layout.segment_length,
        dtype=context.dtype,
    )
