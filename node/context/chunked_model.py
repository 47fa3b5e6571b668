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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compress.context_method import ContextLayer, ContextShape, Rotate
from ...compress.context_registry import parse_context
from ..averaging.stage_averager import rounding_seed
from ..config import RunConfig
from ..model.architecture import ModelError, describe, quiet_transformers
from .context_exchange import ContextCoder, ContextExchange
from .exchange import ContextKey, ContextTransport
from .layer_attention import LayerAttention, Moment
from .subspace_choice import SubspaceChoice, bytes_of
from .turns import Turns

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


class ChunkedModel:
    """What the model of a stage in lane `lane` has of its chunk. Changes modules of `model` as the method wants, so
    before an optimizer is made; `connect` before anything is computed. dtype: in which the stage computes. Raises
    ModelError or CodecError for a model that does not fit."""

    def __init__(self, config: RunConfig, model: StageModel, lane: int, dtype: torch.dtype) -> None:
        self._config, self._model, self._lane = config, model, lane
        self._layout = config.chunk_layout
        self._method = parse_context(config.context.method)
        self._moment, self._begun = Moment(), -1  # the step under way
        self.turns = Turns()
        self._layers: dict[int, tuple[nn.Module, ContextLayer]] = {}
        self._coders: dict[int, ContextCoder] = {}  # by layer of the whole model
        self._choice: SubspaceChoice | None = None
        device = torch.device(config.compute.device)
        sizes = {"batch": config.microbatch_size, "dtype": dtype, "device": device}
        for layer, module in zip(model.layers, model.layer_modules, strict=True):
            attention = attention_of(module, model)
            shape = context_shape(config, model, attention, layer, dtype, segments=self._layout.segments_per_lane)
            self._layers[layer] = (attention, self._method.attach(attention, shape))
            self._coders[layer] = ContextCoder(self._method, shape, **sizes)
        model.positions = torch.tensor(self._layout.lane_positions(lane), device=device).unsqueeze(0)

    def connect(self, transport: ContextTransport) -> None:
        """Parts go by `transport` from now on."""
        seeds = [rounding_seed(self._config.run.seed, lane) for lane in range(self._layout.chunks)]
        exchange = ContextExchange(self._layout, self._lane, transport, self._coders, seeds)
        rotations = [self._rotation(segment) for segment in range(self._layout.segments)]
        hand_over = self.turns.hand_over
        for layer, (attention, method) in self._layers.items():
            setattr(attention, _PLACE, LayerAttention(layer, method, exchange, self._moment, rotations, hand_over))
        self._choice = SubspaceChoice(transport, self._lane, self._layout.chunks)

    def generated(self) -> list[Tensor]:
        """What the method generates for the first layer, which is the same for nodes that have others: a sample, by
        which a node whose generator gives other numbers is found."""
        segments = self._layout.segments_per_lane
        shape = context_shape(self._config, self._model, None, 0, torch.float32, segments=segments)
        return list(self._method.frozen(shape))

    def body_bytes(self, key: ContextKey) -> int:
        """Exact length of that part."""
        if key.what == "segment":
            return self._coders[key.layer].body_bytes(key)
        _, layer = self._layers[key.layer]
        return bytes_of(layer.grams() if key.what == "gram" else layer.subspaces())

    def begin(self, step: int, microbatch: int, *, evaluation: bool) -> None:
        """What the calling thread computes next."""
        moment = self._moment
        if step != self._begun:
            for _, layer in self._layers.values():
                self._method.begin(layer, step, self._config.run.steps)
        self._begun = moment.step = step
        moment.microbatch, moment.evaluation = microbatch, evaluation

    def break_off(self) -> None:
        """The step under way, if there is one, will be begun again: what was added up in it does not count."""
        self._begun = -1

    @property
    def gathering_step(self) -> int | None:
        """Behind which `choose_subspaces` is due."""
        return self._method.gathering_step if self._layers else None  # a stage may have none

    def choose_subspaces(self, step: int) -> None:
        """With all other lanes. Raises what the transport raises, and CodecError for what is not finite."""
        assert self._choice, "not connected"
        self._choice.hold(step, {layer: method for layer, (_, method) in self._layers.items()})

    def measures(self) -> dict[str, float]:
        """Figures of the last forward in training, each the mean over layers."""
        found = [layer.measures() for _, layer in self._layers.values()]
        return {f"context_{name}": sum(each[name] for each in found) / len(found) for name in (found or [{}])[0]}

    def _rotation(self, segment: int) -> Rotate:
        """The architecture's own rotary embedding, of a segment's positions."""
        positions = torch.tensor(self._layout.positions(segment)).unsqueeze(0)
        like = torch.empty(0, dtype=next(self._model.parameters()).dtype)  # as hidden states, for the angles' own dtype

        def rotate(k_BHTD: Tensor) -> Tensor:
            cos, sin = self._model.base.rotary_emb(like.to(k_BHTD.device), positions.to(k_BHTD.device))
            attention, _ = next(iter(self._layers.values()))
            own = sys.modules[type(attention).__module__]
            return own.apply_rotary_pos_emb(k_BHTD, k_BHTD, cos, sin)[1]

        return rotate


def context_shape(
    config: RunConfig, model: StageModel, attention: nn.Module | None, layer: int, dtype: torch.dtype, *, segments: int
) -> ContextShape:
    """Of a layer's keys and values on a node that holds so many segments of each sequence. attention: None for a layer
    that is on another node."""
    architecture = model.causal.config
    heads = architecture.num_attention_heads
    head_width = (
        getattr(architecture if attention is None else attention, "head_dim", None) or architecture.hidden_size // heads
    )
    return ContextShape(
        seed=config.run.seed,
        layer=layer,
        width=model.width,
        heads=getattr(architecture, "num_key_value_heads", None) or heads,
        head_width=head_width,
        segments=segments,
        segment_length=config.chunk_layout.segment_length,
        dtype=dtype,
    )


def attention_of(layer: nn.Module, model: StageModel) -> nn.Module:
    """Where a layer makes queries, keys and values. Raises ModelError for an architecture that calls it otherwise."""
    found = getattr(layer, "self_attn", None)
    if isinstance(found, nn.Module):
        return found
    raise ModelError(
        f"{describe(model.causal.config)} cannot be cut into chunks: its layers have no 'self_attn'; {WITHOUT_THAT}"
    )
