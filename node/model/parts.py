"""Which modules of an architecture are embedding, layers, last norm and head, whatever it calls them.

Most decoders of transformers say `embed_tokens`, `layers`, `norm` and `lm_head`; GPT-NeoX, GPT-2 and others use other
words for the same. A stage is cut from these four. A table of learned positions (GPT-2) is a part of the embedding, and
so of the first stage. Whatever else has weights would belong to no stage, such as embeddings for each layer (Gemma 4):
it is refused by name, as is what takes a loss over all stages, before anything else is asked of the architecture.

The optimizer knows a hidden matrix by the name of the layers that it is in (`in_layer`). Why not transformers' own plan
for pipelines (`base_model_pp_plan`): half of the decoders have none, and it knows nothing of the head.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import REMEDY, ModelError, describe, refuse_unsupported

EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
POSITIONS = ("wpe",)  # added to the embedding; may be absent
LAYERS = ("layers", "h")
NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
HEADS = ("lm_head", "embed_out")
# Their base applies its last norm before the first layer, too. That norm has no weights, so both ends can have it.
NORM_AT_BOTH_ENDS = ("nanochat",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Names of a decoder's parts: the head is the causal model's, the others are its base's. positions: of a table that
    is added to the embedding, if there is one."""

    base: str
    embedding: str
    positions: str | None
    layers: str
    norm: str
    head: str

    @property
    def embedding_weight(self) -> str:
        """By its name in a checkpoint of the whole model."""
        return f"{self.base}.{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"


def find_parts(causal: Any) -> Parts:
    """The parts of a whole causal model. Raises ModelError, by name, for an architecture that cannot be cut into
    stages, for dropout and for experts."""
    config = causal.config
    base = getattr(causal, causal.base_model_prefix, None)
    found = {
        "embedding": _present(base, EMBEDDINGS),
        "layers": _present(base, LAYERS),
        "norm": _present(base, NORMS),
        "head": _present(causal, HEADS),
    }
    lacking = next((what for what, name in found.items() if name is None), None)
    if lacking or base is None:
        words = {"embedding": EMBEDDINGS, "layers": LAYERS, "norm": NORMS, "head": HEADS}[lacking or "layers"]
        raise ModelError(f"{describe(config)} is not supported: it has no '{words[0]}' to cut a stage by; {REMEDY}")
    positions = _present(base, POSITIONS)
    parts = Parts(
        base=causal.base_model_prefix, positions=positions, **{what: str(name) for what, name in found.items()}
    )
    own = (parts.embedding, parts.positions, parts.layers, parts.norm)
    for owner, known in ((base, own), (causal, (parts.base, parts.head))):
        for name, module in owner.named_children():
            if name not in known and any(True for _ in module.parameters()):
                raise ModelError(
                    f"{describe(config)} is not supported: it has a part '{name}' that belongs to no stage; {REMEDY}"
                )
    refuse_unsupported(config)
    for path, module in causal.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ModelError(f"{describe(config)} has dropout {module.p} in {path}; set it to 0 in its config.json")
        if any(word in type(module).__name__ for word in ("Expert", "Router", "Moe", "MoE")):
            raise ModelError(
                f"{describe(config)} is a mixture of experts ({path}), whose routing loss sums over all stages; "
                "choose a dense decoder such as llama or qwen3"
            )
    return parts


def in_layer(name: str) -> bool:
    """Whether a tensor of this dotted name is one of a layer's, or of a codec's own network."""
    return not set(LAYERS).isdisjoint(name.split("."))


def _present(owner: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(owner, name, None), nn.Module)), None)


class NoPositions(nn.Module):
    """In the place of a table of positions behind the first stage, where hidden states have them already."""

    def forward(self, position_ids: Any) -> Tensor:
        del position_ids
        return torch.zeros(())  # adds nothing to any dtype, on any device


class EndNorm(nn.Module):
    """The last norm of a base that calls it before its layers, too: what of both is this stage's.

    Counts the calls of one forward, which is one thread's, since nothing else tells them apart on a stage without a
    layer.
    """

    def __init__(self, norm: nn.Module, base: nn.Module, *, before: bool, behind: bool) -> None:
        super().__init__()
        self.norm = norm
        self._wanted = (before, behind)
        self._calls: dict[int, int] = {}  # by thread
        base.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        self._calls[threading.get_ident()] = 0

    def forward(self, hidden: Any) -> Any:
        me = threading.get_ident()
        wanted = self._wanted[self._calls[me]]
        self._calls[me] += 1
        return self.norm(hidden) if wanted else hidden
