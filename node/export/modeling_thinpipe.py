"""A decoder with the boundaries that it was trained with.

thinpipe trained this model on several machines. Between two of them a token's hidden state was narrowed to a few
numbers, and the layers behind have seen nothing else: these boundaries are a part of the model. Without the rounding
that the wire added, one computes

    h' = decode(encode(h - a)) + a'

`a` and `a'` are what the machine above and the one below know of a token by itself: a row for it, one for it after the
token before, and a small network that looks at the last few. The decoder is transformers' own class, unchanged; the
boundaries are put before its layers by hooks. Those that look at earlier tokens keep all ids beside the keys and values
of the cache, so that whatever reorders, repeats or crops a cache does the same to them.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

This file needs torch and transformers (version 5), and nothing of thinpipe. Shapes: B sequences, T tokens, D numbers in
a hidden state, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class ThinpipeConfig(PretrainedConfig):
    """text_config: the decoder's own. boundaries: in order, {"before": the layer that it lies before (the number of
    layers: behind the last), "encode" and "decode": {"shapes" of their matrices, "passes"}}. tokens: for each
    stage, the shapes of what it knows of tokens. token_table: whether all stages know one more, frozen row a token."""

    model_type = "thinpipe"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    def __init__(
        self,
        text_config: Any = None,
        boundaries: Sequence[dict[str, Any]] = (),
        tokens: Sequence[dict[str, list[int]]] = (),
        token_table: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.boundaries, self.tokens, self.token_table = list(boundaries), list(tokens), token_table
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


class TokenIds(DynamicLayer):
    """One more layer of a cache: ids (B, 1, T, 1) in the place of keys and values."""

    def append(self, ids_BT: Tensor) -> None:
        self.update(ids_BT[:, None, :, None], ids_BT[:, None, :, None])

    @property
    def ids_BT(self) -> Tensor:
        return self.keys[:, 0, :, 0]  # pyright: ignore[reportOptionalSubscript]


class Network(nn.Module):
    """Matrices with SiLU between them; with `passes`, the first channels are added as they came."""

    def __init__(self, shapes: Sequence[Sequence[int]], passes: bool) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.zeros(*shape)) for shape in shapes])
        self.passes = passes

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number, matrix in enumerate(self.matrices):
            y = F.linear(F.silu(y) if number else y, matrix)
        if not self.passes:
            return y
        kept = min(x.shape[-1], y.shape[-1])
        return y + F.pad(x[..., :kept], (0, y.shape[-1] - kept))


class Known(nn.Module):
    """What one stage knows of each token: (weight[t] + pairs[hash(t before, t)]) projection + table[t] + context. What
    `shapes` does not name is not there."""

    weight: nn.Parameter | None
    pairs: nn.Parameter | None
    embedding: nn.Parameter | None
    inner: nn.Parameter
    outer: nn.Parameter
    projection: Tensor | None

    def __init__(self, vocab_size: int, shapes: dict[str, list[int]]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        for name in ("weight", "pairs", "embedding", "inner", "outer"):
            self.register_parameter(name, nn.Parameter(torch.zeros(*shapes[name])) if name in shapes else None)
        self.register_buffer("projection", torch.zeros(*shapes["projection"]) if "projection" in shapes else None)

    def forward(self, marked_BS: Tensor, tokens: int, table: Tensor | None) -> Tensor | int:
        """Of the last `tokens` of ids (B, S) from the sequences' first token on, in which the vocabulary's size stands
        for no token: (B, tokens, D), or 0."""
        ids_BT = marked_BS[:, -tokens:]
        ids_BT = ids_BT.masked_fill(ids_BT == self.vocab_size, 0)  # of padding, which nobody reads
        known: Any = 0
        if self.weight is not None:
            known = F.embedding(ids_BT, self.weight)
            if self.pairs is not None:
                before_BT = F.pad(marked_BS, (1, 0), value=self.vocab_size)[:, -tokens - 1 : -1]
                known = known + F.embedding(pair_rows(before_BT, ids_BT, len(self.pairs)), self.pairs)
            if self.projection is not None:
                known = known @ self.projection
        if table is not None:
            known = known + F.embedding(ids_BT, table)
        if self.embedding is not None:
            looked_at = self.inner.shape[1] // self.embedding.shape[1]
            padded = F.pad(marked_BS, (looked_at - 1, 0), value=self.vocab_size)
            last_BTN = padded.unfold(1, looked_at, 1)[:, -tokens:]
            known = known + F.linear(
                F.silu(F.linear(F.embedding(last_BTN, self.embedding).flatten(2), self.inner)), self.outer
            )
        return known


def pair_rows(before_BT: Tensor, ids_BT: Tensor, rows: int) -> Tensor:
    """The row (B, T) in [0, rows) of each token after the one before it: a hash (lowbias32, by C. Wellons) of both."""
    hashed_BT = _mix(_mix(before_BT) ^ ids_BT)
    return hashed_BT * rows >> 32


def _mix(x: Tensor) -> Tensor:
    x = x ^ x >> 16
    x = x * 0x7FEB_352D & 0xFFFF_FFFF
    x = x ^ x >> 15
    x = x * (0x846C_A68B - 2**32) & 0xFFFF_FFFF  # the same modulo 2^32, and a product that stays within int64
    return x ^ x >> 16


class Boundary(nn.Module):
    """Between two stages: narrowed, and widened again."""

    def __init__(self, encode: dict[str, Any], decode: dict[str, Any]) -> None:
        super().__init__()
        self.encode, self.decode = Network(**encode), Network(**decode)

    def forward(self, hidden_BTD: Tensor, above: Tensor | int, below: Tensor | int) -> Tensor:
        return self.decode(self.encode(hidden_BTD - above)) + below


class ThinpipeForCausalLM(PreTrainedModel, GenerationMixin):
    """Call it, and its `generate`, as the decoder's own class. `without_boundaries` shows what they are worth."""

    config_class = ThinpipeConfig
    supports_gradient_checkpointing = False  # a layer that is computed again would do so with the last call's tokens
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as far as the decoder does

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.decoder = AutoModelForCausalLM.from_config(text)
        self.tokens = nn.ModuleList([Known(text.vocab_size, shapes) for shapes in config.tokens])
        self.boundaries = nn.ModuleList([Boundary(each["encode"], each["decode"]) for each in config.boundaries])
        table_VD = torch.zeros(text.vocab_size, text.hidden_size) if config.token_table else None
        self.register_buffer("token_table", table_VD)
        self.without_boundaries = False
        self._looks = config.token_table or any(config.tokens)
        self._marked_BS: Tensor | None = None  # ids of all tokens so far, of the call that is under way
        self._said: dict[int, Tensor | int] = {}  # by stage
        base = getattr(self.decoder, self.decoder.base_model_prefix)
        layers = base.layers if hasattr(base, "layers") else base.h  # as GPT-2 calls them
        for number, boundary in enumerate(config.boundaries):
            if boundary["before"] < len(layers):
                layers[boundary["before"]].register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            else:
                layers[-1].register_forward_hook(partial(self._leave, number))
        self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.decoder.register_forward_hook(self._end, with_kwargs=True)
        self.post_init()

    token_table: Tensor | None

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        """As the decoder's own."""
        return self.decoder(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own, whatever its architecture makes of it; with a cache that grows."""
        self.decoder.generation_config = self.generation_config
        return self.decoder.generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    # -- around a call of the decoder -------------------------------------------------------------------------------

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the ids that the boundaries will ask for. Raises ValueError where they cannot be known."""
        del decoder
        self._marked_BS, self._said = None, {}
        if not self._looks or self.without_boundaries:
            return
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if ids_BT is None:
            raise ValueError("the boundaries of this model look at token ids: give input_ids, not inputs_embeds")
        cache = _cache_in(kwargs)
        held = _ids_in(cache)
        if cache is not None and held is None and cache.is_compileable:
            raise ValueError(
                "this model keeps token ids in its cache, which a static one cannot grow by: use a dynamic one"
            )
        before = 0 if held is None else held.get_seq_length()
        if cache is not None and before != cache.get_seq_length():
            raise ValueError("the cache has tokens that this model has not seen; give one that it has filled itself")
        new_BT = self._marked(ids_BT, kwargs.get("attention_mask", args[1] if len(args) > 1 else None), before)
        self._marked_BS = torch.cat([held.ids_BT, new_BT], dim=1) if held is not None and before else new_BT
        self._new = ids_BT.shape[1]

    def _marked(self, ids_BT: Tensor, mask: Any, before: int) -> Tensor:
        """Ids in which the vocabulary's size marks padding: at a sequence's left, nothing comes before its first."""
        if mask is None:
            return ids_BT
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError("the boundaries of this model tell padding from tokens: give an attention mask (B, T)")
        mask_BT = mask[:, before : before + ids_BT.shape[1]]
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(
                f"an attention mask of {mask.shape[1]} tokens, but there are {before} in the cache and "
                f"{ids_BT.shape[1]} new ones"
            )
        return ids_BT.masked_fill(mask_BT == 0, self.config.text_config.vocab_size)

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keeps the new ids beside the new keys and values, if those were kept."""
        del decoder, args
        marked_BS, self._marked_BS, self._said = self._marked_BS, None, {}
        if marked_BS is None:
            return
        cache = _cache_in(kwargs)
        if cache is None:
            values = output if isinstance(output, tuple) else output.values()
            cache = next((each for each in values if isinstance(each, Cache)), None)
        if cache is None:
            return
        held = _ids_in(cache)
        if held is None:
            held = TokenIds()
            cache.layers.append(held)
        held.append(marked_BS[:, -self._new :])

    def _enter(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A boundary before a layer."""
        del layer
        if args:
            return (self._crossed(number, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._crossed(number, kwargs["hidden_states"])}

    def _leave(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A boundary behind the last layer."""
        del layer, args
        return (
            (self._crossed(number, output[0]), *output[1:])
            if isinstance(output, tuple)
            else self._crossed(number, output)
        )

    def _crossed(self, number: int, hidden_BTD: Tensor) -> Tensor:
        if self.without_boundaries:
            return hidden_BTD
        return self.boundaries[number](hidden_BTD, self._known(number), self._known(number + 1))

    def _known(self, stage: int) -> Tensor | int:
        """What that stage knows of the tokens of this call; both its boundaries ask."""
        if self._marked_BS is None:
            return 0
        if stage not in self._said:
            self._said[stage] = self.tokens[stage](self._marked_BS, self._new, self.token_table)
        return self._said[stage]


def _cache_in(kwargs: dict[str, Any]) -> Cache | None:
    """The cache of a call, which earlier versions of transformers call past_key_values."""
    return kwargs["cache"] if kwargs.get("cache") is not None else kwargs.get("past_key_values")


def _ids_in(cache: Cache | None) -> TokenIds | None:
    return next((each for each in cache.layers if isinstance(each, TokenIds)), None) if cache is not None else None
