"""How long stages compute: measured in a run, tried on this machine, or carried over to another cut, batch or model.

`emulated_machine` has the times of machines that are not here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...sim.links.pipeline import StageTimes
from ...sim.reports.summary import read_records
from ..config import ConfigError, RunConfig
from ..config_sections import CodecSection
from ..stage_costs import operations, stage_layers
from .emulated_machine import EmulatedMachine
from .machine_speed import machine_speed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CALIBRATION_S = 0.3


def times_measured(run: Path, config: RunConfig) -> list[StageTimes]:
    """Seconds of each stage for a microbatch in a run on record, which had the settings `config`: medians of its steps,
    codec work included; a forward counts a third, weight gradients another. Raises ConfigError for a run that has no
    steps."""
    times = []
    for stage in range(config.pipeline.stages):
        path = run / f"stage-{stage}.jsonl"
        records = read_records(path) if path.exists() else []
        steps = [record for record in records if record["event"] == "step"][1:]  # the first one warms up
        if not steps:
            raise ConfigError(
                f"{run} has no record of a second step of stage {stage}; name the --out of a finished run"
            )
        compute_s = float(np.median([step["compute_s"] + step["codec_s"] for step in steps]))
        each = compute_s / config.pipeline.microbatches
        times.append(StageTimes(forward_s=each / 3, backward_s=each * 2 / 3))
    return times


def times_calibrated(config: RunConfig, architecture: PretrainedConfig) -> list[StageTimes]:
    """Seconds of each stage on a machine like this one while it is otherwise idle, by its speed and the stages'
    operations. With more stages than cores a run is slower, and then a depth for these times is more than it needs."""
    if config.compute.emulate:
        return EmulatedMachine.parse(config.compute.emulate).times(config, architecture)
    speed = machine_speed(config, architecture, seconds=CALIBRATION_S)
    forward_s = [work / speed for work in _microbatch_operations(config, architecture, config.codec)]
    return [StageTimes(forward_s=each, backward_s=2 * each) for each in forward_s]


def times_recut(
    before: RunConfig,
    after: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    *,
    ran: PretrainedConfig | None = None,
) -> list[StageTimes]:
    """What the stages of `after` would take on the machines that took `times` for those of `before`, each as many times
    longer as it has more to compute for a microbatch: layers, tokens, or a larger model. ran: the model of `before`, if
    that is not `architecture`. The codec's own work is left as it was, since most of it is no multiplication. Raises
    ModelError, and ConfigError for another number of stages."""
    if before.pipeline.stages != after.pipeline.stages:
        told, asked = before.pipeline.stages, after.pipeline.stages
        raise ConfigError(f"times of {told} stages say nothing of {asked}; keep pipeline.stages")
    work = (
        _microbatch_operations(before, ran or architecture, before.codec),
        _microbatch_operations(after, architecture, before.codec),
    )
    if work[0] == work[1]:
        return list(times)
    due_s = [each / speed for each, speed in zip(work[1], measured_speeds(work[0], times), strict=True)]
    return [_lasting(each, seconds) for each, seconds in zip(times, due_s, strict=True)]


def _microbatch_operations(config: RunConfig, architecture: PretrainedConfig, codec: CodecSection) -> list[float]:
    """Of each stage in a forward pass, with the work of that codec at its boundaries."""
    counts = [len(layers) for layers in stage_layers(config, architecture)]
    costs = operations(config.model_copy(update={"codec": codec}), architecture)
    tokens = config.microbatch_size * config.data.sequence_length
    return [tokens * each for each in costs.of_stages(counts)]


def measured_speeds(work: Sequence[float], times: Sequence[StageTimes]) -> list[float]:
    """Operations of a forward pass, in the unit of `work`, by second of a forward and backward pass. Of a stage with
    nothing to compute, which shows nothing, the middle of the others' is assumed. Raises ConfigError where none took
    any time."""
    took_s = [each.forward_s + each.backward_s for each in times]
    found = [done / took if done > 0 and took > 0 else None for done, took in zip(work, took_s, strict=True)]
    known = [speed for speed in found if speed is not None]
    if not known:
        raise ConfigError("no stage computed anything, so nothing is known of the machines; name another run")
    return [statistics.median(known) if speed is None else speed for speed in found]


def _lasting(times: StageTimes, seconds: float) -> StageTimes:
    """The same stage with work for so many seconds a microbatch, in the same parts forward and backward."""
    before_s = times.forward_s + times.backward_s
    if before_s <= 0:
        return StageTimes(forward_s=seconds / 3, backward_s=seconds * 2 / 3, step_s=times.step_s)
    scale, weight_s = seconds / before_s, times.weight_s
    return replace(
        times,
        forward_s=times.forward_s * scale,
        backward_s=times.backward_s * scale,
        weight_s=None if weight_s is None else weight_s * scale,
    )
