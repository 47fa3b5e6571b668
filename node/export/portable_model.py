"""The model that leaves: a configuration of transformers and named weights, plain or with its boundaries.

*Plain* is an ordinary checkpoint of the architecture. It is exact where nothing happens at the boundaries: `identity`,
and `ssn`, whose re-parameterised matrices are multiplied out (`Codec.unconstrained`). The frozen token table, which the
first stage adds to its embedding, becomes a part of the embedding. With other codecs the boundaries are a part of the
function that was trained, and `modeling_thinpipe.py` computes them.

Everything is taken from checkpoints as it is: of the weights nothing is rounded, and a projector is the one that both
ends of its boundary computed with, not what its owner had learned since.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...compress.boundary_function import BoundaryFunction, Half
from ...compress.byte_format import CodecError
from ...compress.codec_interface import Codec, StageContext
from ...compress.registry import parse_codec
from ...compress.token_table import token_table
from ..checkpoints.assemble import Assembled
from ..model.architecture import quiet_transformers, was_tied
from ..model.parts import find_parts
from ..model.pretrained import read_tensors
from ..model.slices import skeleton
from ..stage_costs import stage_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELING = Path(__file__).with_name("modeling_thinpipe.py")
# What a stage knows of tokens, by the names of `compress.anchors`, and what modeling_thinpipe.py calls it.
KNOWN = {
    "weight": "weight",
    "pairs": "pairs",
    "projection": "projection",
    "context.embedding": "embedding",
    "context.layers.0": "inner",
    "context.layers.1": "outer",
}


class ExportError(ValueError):
    """This run's model cannot be exported, or not so; one line says why."""


def modeling() -> Any:
    """`modeling_thinpipe`. It knows nothing of thinpipe, and so not how to import transformers without the parts that
    are not needed; that is done before it."""
    quiet_transformers()
    return import_module(f".{MODELING.stem}", __package__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PortableModel:
    """`config` and `weights`, each by its name in the class that the configuration is for. boundaries: how many are in
    it."""

    config: PretrainedConfig
    weights: dict[str, Tensor]
    boundaries: int

    @property
    def parameters(self) -> int:
        """Numbers in it, frozen ones too."""
        return sum(tensor.numel() for tensor in self.weights.values())


def plain_model(assembled: Assembled) -> PortableModel:
    """An ordinary checkpoint of the architecture, without boundaries. Raises ExportError."""
    codec = _codec(assembled)
    architecture, weights = _of_one_width(
        copy.deepcopy(assembled.architecture), codec.unconstrained(assembled.weights, _context(assembled))
    )
    causal, kind = skeleton(architecture, torch.float32), architecture.model_type
    if codec.table_scale:
        name = find_parts(causal).embedding_weight
        scale = _embedding_scale(causal.get_submodule(name.removesuffix(".weight")), kind)
        weights[name] = weights[name] + _token_table(assembled) / scale
    weights |= _constants(assembled, causal, weights)
    wanted = _shapes(causal)
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ExportError(f"{kind} keeps '{missing[0]}' outside of its parameters, and no stage saves that")
    for name, tensor in weights.items():
        if wanted.get(name) != tensor.shape:
            raise ExportError(f"'{name}' has shape {[*tensor.shape]}, {kind} wants {[*wanted.get(name, ())]}")
    architecture.use_cache = True
    architecture.architectures = [type(causal).__name__]
    architecture.dtype = _dtype(weights)
    vars(architecture).pop("_tied_in_source", None)
    return PortableModel(config=architecture, weights=weights, boundaries=0)


def with_boundaries(assembled: Assembled, plain: PortableModel) -> PortableModel:
    """The function that was trained: `plain` itself where nothing happens at the boundaries. Raises ExportError."""
    codec = _codec(assembled)
    functions = _functions(assembled, codec)
    if not functions:
        return plain
    layers = stage_layers(assembled.config, assembled.architecture)
    weights = {f"decoder.{name}": tensor for name, tensor in plain.weights.items()}
    tokens = [_known(codec, of_stage) for of_stage in assembled.tokens]
    for stage, known in enumerate(tokens):
        weights |= {f"tokens.{stage}.{name}": tensor for name, tensor in known.items()}
    for number, function in enumerate(functions):
        for end, half in (("encode", function.encode), ("decode", function.decode)):
            for place, matrix in enumerate(half.matrices):
                weights[f"boundaries.{number}.{end}.matrices.{place}"] = matrix
    if codec.table_scale:
        weights["token_table"] = _token_table(assembled)
    config = modeling().ThinpipeConfig(
        text_config=plain.config,
        boundaries=[
            {"before": layers[number].stop, "encode": _shown(function.encode), "decode": _shown(function.decode)}
            for number, function in enumerate(functions)
        ],
        tokens=[{name: list(tensor.shape) for name, tensor in known.items()} for known in tokens],
        token_table=bool(codec.table_scale),
        dtype=plain.config.dtype,
        architectures=["ThinpipeForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_thinpipe.ThinpipeConfig",
            "AutoModelForCausalLM": "modeling_thinpipe.ThinpipeForCausalLM",
        },
    )
    return PortableModel(config=config, weights=weights, boundaries=len(functions))


def _codec(assembled: Assembled) -> Codec:
    settings = assembled.config.codec
    return parse_codec(settings.codec, settings.forward, settings.backward).codec


def _context(assembled: Assembled) -> StageContext:
    """Of the whole model, as the codec sees it."""
    architecture = assembled.architecture
    return StageContext(
        seed=assembled.config.run.seed,
        stage=0,
        width=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        dtype=_dtype(assembled.weights),
    )


def _dtype(weights: dict[str, Tensor]) -> torch.dtype:
    return next(iter(weights.values())).dtype


def _functions(assembled: Assembled, codec: Codec) -> list[BoundaryFunction]:
    """Of all boundaries; none where nothing happens there."""
    try:
        found = [
            codec.boundary_function(table=each.table, sender=each.sender, receiver=each.receiver)
            for each in assembled.boundaries
        ]
    except CodecError as error:
        raise ExportError(str(error)) from None
    return [function for function in found if function is not None]


def _known(codec: Codec, of_stage: dict[str, Tensor]) -> dict[str, Tensor]:
    if strange := sorted(of_stage.keys() - KNOWN.keys()):
        raise ExportError(
            f"codec '{codec.name}' cannot be exported: what it knows of tokens has '{strange[0]}', which an exported "
            "model does not compute"
        )
    return {KNOWN[name]: tensor for name, tensor in of_stage.items()}


def _shown(half: Half) -> dict[str, Any]:
    return {"shapes": [list(matrix.shape) for matrix in half.matrices], "passes": half.passes}


def _token_table(assembled: Assembled) -> Tensor:
    context = _context(assembled)
    return token_table(
        context.seed, context.vocab_size, context.width, _codec(assembled).table_scale, dtype=context.dtype
    )


def _constants(assembled: Assembled, causal: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of this architecture holds beside parameters, and no training changes: as its constructor sets
    it, or as the weights have it that the run began with. Raises ModelError where those are gone."""
    settings, dtype = assembled.config.model, _dtype(weights)
    state = causal.state_dict()
    found = {name: each for name, each in state.items() if name not in weights and not each.is_meta}
    if found and settings.pretrained and settings.path:
        found = read_tensors(causal, settings.path, found, tied=was_tied(assembled.architecture))
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in found.items()}


def _embedding_scale(module: torch.nn.Module, kind: str) -> float:
    """What the architecture multiplies a row by when it looks it up."""
    if type(module) is torch.nn.Embedding:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", None)
    if not isinstance(scale, int | float):
        raise ExportError(
            f"the token table of this run cannot become a part of the embedding of {kind}, a "
            f"{type(module).__name__}, which does more than look up rows"
        )
    return float(scale)


def _shapes(causal: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in causal.state_dict().items()}


def _of_one_width(
    architecture: PretrainedConfig, weights: dict[str, Tensor]
) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """FFNs of all layers get the units of the widest. Those that are added have no weight in or out, so nothing changes
    in what a layer computes."""
    wanted = _shapes(skeleton(architecture, torch.float32))
    before = getattr(architecture, "intermediate_size", None)
    found = {
        (own, there)
        for name, tensor in weights.items()
        for own, there in zip(tensor.shape, wanted.get(name, tensor.shape), strict=False)
        if own != there
    }
    if not found:
        return architecture, weights
    if any(there != before or own < there for own, there in found):
        raise ExportError(
            f"{architecture.model_type} cannot be written with FFNs of the widths {sorted({own for own, _ in found})}: "
            f"its intermediate_size is {before} for all layers"
        )
    architecture.intermediate_size = max(own for own, _ in found)
    wider = _shapes(skeleton(architecture, torch.float32))
    return architecture, {name: _padded(tensor, wider.get(name, tensor.shape)) for name, tensor in weights.items()}


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded
