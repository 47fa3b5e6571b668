"""The compute times of an emulated machine: what a given machine would need for a model, computed without it.

A laptop computes so slowly that a thin link is never the bottleneck. An emulated machine gives the time that its stages
take for one microbatch: from a rate that they achieve and the multiplications in the model's own shapes
(`150m@4x66tflops`), or in seconds (`150m@4x5ms+10ms`: forward, backward). `thinpipe plan` charges it to a virtual
clock; a run with `compute.emulate` lets it pass on a real one (emulated_stage.py).

What an operation is: node/stage_costs.py. A stage's own speed (`pipeline.speeds`) is a multiple of the rate that is
stated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...sim.links.pipeline import StageTimes
from ...sim.links.stage_work import Operations
from ..config import ConfigError, RunConfig
from ..model.stage_cut import partition
from ..stage_costs import operations, speeds, stage_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 32768  # of an emulated model, unless model.vocab_size says otherwise: no text is read for it
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TIME = r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)"
_MACHINE = re.compile(
    r"(?P<preset>[a-z0-9]+)@(?P<stages>[1-9][0-9]{0,3})(?:of(?P<whole>[1-9][0-9]{0,3}))?x"
    rf"(?:(?P<tflops>[0-9]+(?:\.[0-9]+)?)tflops|(?P<forward>{_TIME})\+(?P<backward>{_TIME}))"
)
_SPELLING = (
    "an emulated machine is PRESET@STAGESxRATEtflops such as 150m@4x66tflops, or PRESET@STAGESxFORWARD+BACKWARD such "
    "as 150m@4x5ms+10ms; 8b@8of32x66tflops takes 8 of 32 stages"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedMachine:
    """`stages` stages of a preset that is cut into `whole`, at `tflops` each, or at the same seconds for each.

    Of a part of a pipeline all stages are inner ones, alike: none has the head.
    """

    preset: str
    stages: int
    whole: int
    tflops: float | None = None
    seconds: tuple[float, float] | None = None  # forward, backward, of one microbatch

    @classmethod
    def parse(cls, text: str) -> EmulatedMachine:
        """Raises ConfigError."""
        match = _MACHINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{_SPELLING}; got '{text}'")
        tflops = float(match["tflops"]) if match["tflops"] else None
        seconds = None if tflops is not None else (_seconds(match["forward"]), _seconds(match["backward"]))
        if tflops == 0 or (seconds and min(seconds) <= 0):
            raise ConfigError(f"the emulated speed or times have to be above zero; got '{text}'")
        stages, whole = int(match["stages"]), int(match["whole"] or match["stages"])
        if whole < stages:
            raise ConfigError(f"an emulated machine cannot have {stages} of {whole} stages; got '{text}'")
        return cls(preset=match["preset"], stages=stages, whole=whole, tflops=tflops, seconds=seconds)

    @property
    def part(self) -> bool:
        """Whether its stages are those of a longer pipeline, so that no cut of theirs is the model's."""
        return self.whole > self.stages

    @property
    def knows_cuts(self) -> bool:
        """Whether another cut would take it other times. Stated seconds are each stage's, whatever layers it has."""
        return self.tflops is not None and not self.part

    def settings(self) -> dict[str, Any]:
        """Settings of a run on this machine: a step of 262,144 tokens, unless the user says otherwise."""
        return {
            "model.preset": self.preset,
            "pipeline.stages": self.stages,
            "pipeline.batch_size": 256,
            "pipeline.microbatches": 64,
            "data.sequence_length": 1024,
        }

    def layers(self, config: RunConfig, architecture: PretrainedConfig) -> list[range]:
        """Of each stage. Raises ModelError for a model that cannot be cut so, and ConfigError for settings that are of
        other stages."""
        if config.pipeline.stages != self.stages:
            raise ConfigError(
                f"pipeline.stages is {config.pipeline.stages}, but the emulated machine has {self.stages}; omit it"
            )
        if self.part:
            if config.pipeline.cut not in ("auto", "equal"):
                raise ConfigError(
                    f"pipeline.cut = {config.pipeline.cut}: {self.stages} of {self.whole} stages are emulated as equal "
                    "inner ones; omit it"
                )
            return partition(architecture.num_hidden_layers, self.whole)[1 : self.stages + 1]
        return stage_layers(config, architecture)

    def times(self, config: RunConfig, architecture: PretrainedConfig) -> list[StageTimes]:
        """Seconds of each stage for one microbatch. Raises what `layers` does."""
        inner = self.layers(config, architecture)
        if self.seconds:
            forward_s, backward_s = self.seconds
            return [StageTimes(forward_s=forward_s / speed, backward_s=backward_s / speed) for speed in speeds(config)]
        assert self.tflops is not None
        if self.part:
            costs = operations(config, architecture)
            return [
                _times(config, costs, self.tflops * speed, len(layers), of_ends=2 * costs.codec_end, head=False)
                for layers, speed in zip(inner, speeds(config), strict=True)
            ]
        return times_at(config, architecture, self.tflops)


def _seconds(text: str) -> float:
    number, unit = re.fullmatch(_TIME, text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * _SECONDS[unit]


def times_at(config: RunConfig, architecture: PretrainedConfig, tflops: float) -> list[StageTimes]:
    """Seconds of each stage of a whole pipeline, whose machines are `pipeline.speeds` times as fast as `tflops`."""
    costs, counts = operations(config, architecture), [len(layers) for layers in stage_layers(config, architecture)]
    last, ends, fast = len(counts) - 1, costs.of_ends(len(counts)), speeds(config)
    return [
        _times(config, costs, tflops * fast[stage], count, of_ends=ends[stage], head=stage == last)
        for stage, count in enumerate(counts)
    ]


def _times(
    config: RunConfig, costs: Operations, tflops: float, layers: int, *, of_ends: float, head: bool
) -> StageTimes:
    """Of a stage with so many layers, and `of_ends` operations besides."""
    weights = layers * costs.layer_weights + head * costs.head
    forward = layers * costs.layer + of_ends
    token_s = config.microbatch_size * config.lane_tokens / (tflops * 1e12)
    return StageTimes(forward_s=forward * token_s, backward_s=2 * forward * token_s, weight_s=weights * token_s)
