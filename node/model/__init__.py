"""The model of a node: its stage of a Hugging Face decoder, built, filled with weights and ready to compute.

It has eight parts: `architecture` (settings to configuration, presets, refusals), `parts` (what an architecture calls
embedding, layers, norm and head), `slices` (what a stage is), `stage_cut` (which layers it has), `exactness` (the
start-up proof that the cut is exact), `initialise` (first weights), `pretrained` (weights of a checkpoint) and
`deferred` (weight gradients that wait).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint as recompute

from .architecture import PRESETS, ModelError, architecture_digest, resolve_model, was_tied
from .deferred import Deferral, WeightGradients, defer_linears
from .exactness import check_sliceable
from .initialise import initialise_random, refuse_unset, set_constants
from .pretrained import check_checkpoint, load_checkpoint
from .slices import StageModel, allocate, cut, skeleton
from .stage_cut import partition
from .transposed import mark_transposed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "PRESETS",
    "Deferral",
    "ModelError",
    "StageModel",
    "WeightGradients",
    "architecture_digest",
    "build_stage",
    "check_checkpoint",
    "check_sliceable",
    "partition",
    "resolve_model",
    "was_tied",
]


def build_stage(
    config: PretrainedConfig,
    *,
    stage: int,
    stages: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    checkpoint: Path | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    deferred: bool = False,
    constrain: Callable[[StageModel], None] | None = None,
    layers: range | None = None,
) -> StageModel:
    """Stage `stage` (from 0) of `stages`, with its weights, on `device`; no other stage's tensor is ever allocated.

    Parameters are float64 when `dtype` is, otherwise float32: a lower compute dtype is the caller's autocast. Weights
    are drawn from (seed, name), or read from `checkpoint`, a directory with safetensors. `activation_checkpointing`
    recomputes each layer in the backward pass, to the same bits; `compile` compiles each layer; `deferred` lets the
    weight gradients of matrices wait where `StageModel.deferral` says so; `constrain` may replace modules of the model,
    weights and all, before any of that. `layers`: the stage's own (None: those of stages of equal length). Raises
    ModelError.
    """
    if not 0 <= stage < stages:
        raise ModelError(f"stage {stage} of {stages}: stages count from 0 to {stages - 1}")
    if layers is None:
        layers = partition(config.num_hidden_layers, stages)[stage]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = cut(skeleton(config, wide), layers, first=stage == 0, last=stage == stages - 1)
    allocate(model)
    if checkpoint is None:
        initialise_random(model.causal, model.full_names(), seed=seed, layers=config.num_hidden_layers)
    else:
        set_constants(model.causal, keep=list(model.parameters()))
        load_checkpoint(model, checkpoint, tied=was_tied(config))
        refuse_unset(model.causal)
    if constrain is not None:
        constrain(model)
    model.to(device)
    mark_transposed(model.causal)
    if deferred:
        model.deferral = defer_linears(model.causal, compiled=compile)
    if compile:  # before the checkpoint: around one, the compiler gives up without a word and runs eagerly
        for layer in model.layer_modules:
            layer.forward = torch.compile(layer.forward)
    if activation_checkpointing:
        _checkpoint_layers(model)
    return model


def _checkpoint_layers(model: StageModel) -> None:
    """Keep a layer's input only and run it again in the backward pass.

    Not through transformers' own switch, which was renamed within version 5. There is no dropout, so no generator
    state to keep; only the non-reentrant form takes keyword arguments and a first layer whose input needs no gradient.
    """
    for layer in model.layer_modules:
        layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False, preserve_rng_state=False)
