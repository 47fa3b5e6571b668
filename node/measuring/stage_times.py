"""How long stages compute: measured in a run, tried on this machine, or carried over to another cut, batch or model.

`emulated_machine` has the times of machines that are not here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...sim.links.pipeline import StageTimes
from ...sim.links.stage_work import StageWorkError, measured_times, with_other_work
from ...sim.reports.lanes import lane_path, node_name
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
    """Seconds of each stage for a microbatch in a run on record, which had the settings `config`: of each lane the
    median of its steps, and of lanes the mean, since chunks may have unlike attention. What a lane waited for others'
    keys and values is not among them. Raises ConfigError for a run that has no steps."""
    times, lanes = [], config.lanes.count
    for stage in range(config.pipeline.stages):
        typical_s: list[float] = []
        for lane in range(lanes):
            path = lane_path(run, lane, lanes) / f"stage-{stage}.jsonl"
            records = read_records(path) if path.exists() else []
            steps = [record for record in records if record["event"] == "step"][1:]  # the first one warms up
            if not steps:
                name = node_name(stage, lane, lanes)
                raise ConfigError(f"{run} has no record of a second step of {name}; name the --out of a finished run")
            typical_s.append(statistics.median(step["compute_s"] + step["codec_s"] for step in steps))
        times.append(measured_times([statistics.fmean(typical_s)], config.pipeline.microbatches))
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
    ModelError, and ConfigError for another number of stages, or where none took any time."""
    if before.pipeline.stages != after.pipeline.stages:
        told, asked = before.pipeline.stages, after.pipeline.stages
        raise ConfigError(f"times of {told} stages say nothing of {asked}; keep pipeline.stages")
    work = (
        _microbatch_operations(before, ran or architecture, before.codec),
        _microbatch_operations(after, architecture, before.codec),
    )
    if work[0] == work[1]:
        return list(times)
    try:
        return with_other_work(times, *work)
    except StageWorkError as error:
        raise ConfigError(str(error)) from None


def _microbatch_operations(config: RunConfig, architecture: PretrainedConfig, codec: CodecSection) -> list[float]:
    """Of each stage in a forward pass, with the work of that codec at its boundaries."""
    counts = [len(layers) for layers in stage_layers(config, architecture)]
    costs = operations(config.model_copy(update={"codec": codec}), architecture)
    tokens = config.microbatch_size * config.lane_tokens
    return [tokens * each for each in costs.of_stages(counts)]
