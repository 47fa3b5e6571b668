"""What stage 0 writes down of a run's shapes, so that whoever reads its records can say which cut would be faster.

The advice itself is `sim.reports.cut_advice`, which knows neither a model nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...compress.registry import parse_codec
from ...sim.reports.cut_advice import PipelineCosts
from ..config import RunConfig
from ..stage_costs import operations, stage_layers
from .emulated_machine import EmulatedMachine
from .message_sizes import Sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def pipeline_costs(config: RunConfig, architecture: PretrainedConfig) -> PipelineCosts | None:
    """None for one stage, and for an emulated machine that no cut makes faster or slower. Raises ModelError for an
    architecture that cannot be built, and CodecError."""
    if config.pipeline.stages == 1:
        return None
    if config.compute.emulate and not EmulatedMachine.parse(config.compute.emulate).knows_cuts:
        return None
    return PipelineCosts(
        operations=operations(config, architecture),
        layers=tuple(len(layers) for layers in stage_layers(config, architecture)),
        last_layers=parse_codec(config.codec.codec).codec.last_layers(architecture.hidden_size),
        schedule=config.pipeline.schedule,
        microbatches=config.pipeline.microbatches,
        delay=config.pipeline.delay,
        boundary=Sizes(config, architecture).boundary(),
    )
