"""What the float64 comparisons share: a run's batches and rules, handed to the textbook loop.

`tests/textbook.py` itself knows nothing of the package, so that its arithmetic stands by itself; this is the hand-over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from thinpipe.node.config import RunConfig
from thinpipe.node.preparation import prepare_corpus
from torch import Tensor

from . import textbook


def settings(model: Path, steps: int) -> dict[str, Any]:
    """Of a run that can be held against the textbook: the model's config.json in `model`, nothing rounded, and clipping
    that is felt now and then. The rate is one at which training carries 1e-16 on to less than 1e-8."""
    return {
        "run.steps": steps,
        "model.path": str(model),
        "model.width": None,
        "model.layers": None,
        "data.sequence_length": 16,
        "optim.msign_dtype": "float64",
        "optim.muon_lr": 0.005,
        "optim.weight_decay": 0.01,
        "optim.clip": 1.0,
        "codec.forward": "fp64",
        "codec.backward": "fp64",
        "pipeline.stages": 4,
        "pipeline.cut": "equal",  # the textbook clips with the same groups
        "compute.dtype": "float64",
    }


def batches_of(config: RunConfig) -> list[Tensor]:
    """The token ids of each step (batch, T + 1), in the order in which the microbatches take them."""
    corpus, parts = prepare_corpus(config), config.pipeline.microbatches

    def ids(step: int, part: int) -> Tensor:
        drawn = corpus.batch(step, part, microbatches=parts, batch_size=config.microbatch_size)
        return torch.from_numpy(drawn).long()

    return [torch.cat([ids(step, part) for part in range(parts)]) for step in range(config.run.steps)]


def recipe_of(config: RunConfig) -> textbook.Recipe:
    """The optimizer's settings as the textbook loop wants them."""
    settings = config.optim
    return textbook.Recipe(
        steps=config.run.steps,
        muon_rate=settings.muon_lr,
        adam_rate=settings.adamw_lr,
        momentum=settings.momentum,
        beta1=settings.adamw_beta1,
        beta2=settings.adamw_beta2,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup_steps,
        decay=round(settings.decay_fraction * config.run.steps),
        clip=settings.clip,
        polynomials=settings.msign_coefficients,
        delay=config.pipeline.delay,
        predict=config.pipeline.predict,
    )


def assert_clipped_now_and_then(norms: list[dict[int, float]], clip: float) -> None:
    """A run in which every step or none is clipped would not show whether clipping is right."""
    clipped = [norm > clip for of_step in norms for norm in of_step.values()]
    assert any(clipped)
    assert not all(clipped)
