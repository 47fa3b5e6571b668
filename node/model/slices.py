"""One pipeline stage of a Hugging Face decoder, cut so that the chain of stages is the whole model, bit for bit.

A stage is the architecture's own causal language model, built on the meta device (no memory), with foreign layers, the
embedding (unless first), the final norm and the head (unless last) taken out *before* anything is allocated. It runs
the architecture's own forward, fed with `inputs_embeds` where it is not the first. So masks, rotary positions,
embedding scales and logit soft-capping stay the architecture's business. The known alternative, a loop of ours over the
layers, would have to repeat each architecture's preparations and would drift from them release by release.

What can go wrong without any error, and what is done about it:
- the base model walks its layers from 0 and looks up lists such as `layer_types` by that count (Gemma 3, Qwen3 with
  `max_window_layers`): the base gets a configuration with those lists cut to its own layers;
- a multiplier on the embeddings inside the base's forward (Granite) would scale hidden states again at every stage: it
  is set to one behind the first. Gemma scales inside its embedding module, which is not there behind the first;
- a table of positions (GPT-2) would be added at every stage: `parts.NoPositions` behind the first;
- a norm that the base applies to its embeddings, too (nanochat), would be applied at every stage: `parts.EndNorm`;
- constants that no checkpoint stores would be uninitialised memory: the architecture sets them anew (`initialise`), or
  its constructor has set them (`_Undrawn`), and what neither has set is refused;
- anything unknown: `exactness` compares a shrunken copy, whole and cut, and refuses what is not exact, by name.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architecture import REMEDY, ModelError, describe, first_line, quiet_transformers, untied, with_layers
from .deferred import Deferral
from .initialise import mark_unset
from .parts import NORM_AT_BOTH_ENDS, EndNorm, NoPositions, Parts, find_parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DRAWS = {Tensor.normal_, Tensor.uniform_}
DRAWS |= {getattr(nn.init, name) for name in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_")}
CONSTANTS = {torch.arange, torch.tensor}


class StageModel(nn.Module):
    """The layers `layers` of a decoder, with the embedding if `first` and the norm and head if `last`.

    `width` is d, `vocab_size` is V. Call it with token ids (B, T) int64 or hidden states (B, T, d).
    """

    def __init__(self, causal: Any, parts: Parts, *, layers: range, first: bool, last: bool) -> None:
        super().__init__()
        self.causal = causal
        self.parts = parts
        self.layers = layers
        self.first = first
        self.last = last
        self.width: int = causal.config.hidden_size
        self.vocab_size: int = causal.config.vocab_size
        self.token_table_VD: Tensor | None = None  # the frozen part of the embedding, if there is one; first only
        self.positions: Tensor | None = None  # of the tokens in their sequences, where they are not 0, 1, 2...: (1, T)
        self.deferral: Deferral | None = None  # where weight gradients wait, if they can

    @property
    def base(self) -> Any:
        """The decoder without its head: embedding (first only), layers, norm."""
        return getattr(self.causal, self.causal.base_model_prefix)

    def forward(self, x: Tensor) -> Tensor:
        """ids (B, T) or hidden (B, T, d) -> hidden (B, T, d), or logits (B, T, V) if last."""
        entry = {"input_ids": x} if self.first else {"inputs_embeds": x}
        if self.first and self.token_table_VD is not None:
            entry = {"inputs_embeds": self._embedding(x) + F.embedding(x, self.token_table_VD)}
        if self.positions is not None:
            entry["position_ids"] = self.positions
        if self.last:
            return self.causal(**entry, use_cache=False).logits
        return self.base(**entry, use_cache=False).last_hidden_state

    def _embedding(self, ids: Tensor) -> Tensor:
        return getattr(self.base, self.parts.embedding)(ids)

    @property
    def layer_modules(self) -> nn.ModuleList:
        """The stage's own."""
        return getattr(self.base, self.parts.layers)

    def full_names(self) -> list[tuple[str, nn.Parameter]]:
        """Each parameter with its name in the whole model, in the model's own order."""
        return [(self._full(name), parameter) for name, parameter in self.causal.named_parameters()]

    def full_state(self) -> dict[str, Tensor]:
        """All that a checkpoint of the whole model would store of this stage (parameters, persistent buffers)."""
        return {self._full(name): tensor for name, tensor in self.causal.state_dict(keep_vars=True).items()}

    def _full(self, name: str) -> str:
        prefix = f"{self.causal.base_model_prefix}.{self.parts.layers}."
        if not name.startswith(prefix):
            return name
        index, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + self.layers.start}{dot}{rest}"


class _Undrawn(TorchFunctionMode):
    """On `meta`: leaves out random first weights, and makes constants on the CPU. There, torch does both in Python,
    with its compiler and its symbolic shapes, whose imports cost a process more than all that it builds; and a constant
    that only the constructor knows (xIELU's in Apertus) would be lost."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        named = kwargs or {}
        if func in DRAWS:
            return args[0] if args else named["tensor"]
        # An empty one is how transformers asks whether this is `meta`, where it draws nothing.
        constant = func in CONSTANTS and not (args and args[0] == [])
        if constant and not named.get("device"):
            named = {**named, "device": "cpu"}
        return func(*args, **named)


def skeleton(config: PretrainedConfig, dtype: torch.dtype, device: str = "meta") -> Any:
    """The whole causal model; no memory on `meta`. Raises ModelError, by name, for parts that no stage would own."""
    config = untied(config)
    config.use_cache = False
    try:
        try:
            causal = _build(config, dtype, device, _Undrawn() if device == "meta" else nullcontext())
        except Exception:  # of a decoder that mixes what is counted here with what is on `meta`
            causal = _build(config, dtype, device, nullcontext())
    except Exception as error:
        raise _refusal(config, dtype, device, error) from error
    find_parts(causal)
    return causal


def _refusal(config: PretrainedConfig, dtype: torch.dtype, device: str, error: Exception) -> ModelError:
    """Of an architecture that cannot be built: what leads on, and not from one refusal to the next."""
    remedy = REMEDY
    if config._attn_implementation != "eager" and "eager" in str(error):  # as transformers advises for Gemma 2
        plain = copy.deepcopy(config)
        plain._attn_implementation = "eager"
        try:
            find_parts(_build(plain, dtype, device, nullcontext()))
        except ModelError as unsupported:
            return unsupported
        except Exception as other:
            error = other
        else:
            remedy = "set model.attention = 'eager'"
    fault = first_line(error).partition(". ")[0].rstrip(".")
    return ModelError(f"{describe(config)} cannot be built: {fault}; {remedy}")


def _build(config: PretrainedConfig, dtype: torch.dtype, device: str, mode: AbstractContextManager[object]) -> Any:
    with torch.device(device), torch.random.fork_rng(devices=[]), mode:
        return quiet_transformers().AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=config._attn_implementation, trust_remote_code=False
        )


def allocate(model: nn.Module) -> None:
    """Memory on the CPU, not yet filled, for what is on `meta`; constants that are not stay. `initialise.refuse_unset`
    can tell later what nobody has filled. Not `to_empty`, which asks a tensor on `meta` for its order in memory, and so
    imports what `_Undrawn` avoids."""
    model._apply(_allocated)


def _allocated(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return empty if isinstance(tensor, nn.Parameter) and empty.ndim > 1 else mark_unset(empty)  # matrices are drawn


def cut(causal: Any, layers: range, *, first: bool, last: bool) -> StageModel:
    """Take out what another stage holds."""
    parts = find_parts(causal)
    base = getattr(causal, parts.base)
    # A copy for the base alone: layers keep the whole configuration, which they index by their own number.
    base.config = with_layers(base.config, layers)
    setattr(base, parts.layers, getattr(base, parts.layers)[layers.start : layers.stop])
    if not first:
        setattr(base, parts.embedding, None)
        if parts.positions:
            setattr(base, parts.positions, NoPositions())
        if hasattr(base, "embedding_multiplier"):
            base.embedding_multiplier = 1.0
    if causal.config.model_type in NORM_AT_BOTH_ENDS:
        setattr(base, parts.norm, EndNorm(getattr(base, parts.norm), base, before=first, behind=last))
    elif not last:
        setattr(base, parts.norm, nn.Identity())
    if not last:
        setattr(causal, parts.head, None)
    return StageModel(causal, parts, layers=layers, first=first, last=last)
