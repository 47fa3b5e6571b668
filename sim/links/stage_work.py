"""What the stages of a pipeline compute, how fast their machines are, and the cut that makes the slowest one fast.

Numbers alone, without a model: whoever knows its shapes counts operations (`node.stage_costs`), and whoever has times
asks here what they say of the machines. So every node finds its cut here, and so does a viewer that reads records and
has no torch.

A pipeline is as fast as its slowest stage. `balanced_cut` hands out layers one at a time, each to the stage that would
be done soonest with it. For layers that cost the same this makes the slowest stage as fast as any cut can, and needs no
search.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .pipeline import StageTimes


class StageWorkError(ValueError):
    """Nothing can be said of such stages; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Of the forward pass, a token."""

    layer_weights: float  # of a layer's matrices
    attention: float  # of a layer's products without weights
    head: float
    codec_end: float  # of one end of a boundary

    @property
    def layer(self) -> float:
        return self.layer_weights + self.attention

    def of_ends(self, stages: int) -> list[float]:
        """What each stage does besides its layers."""
        last = stages - 1
        return [
            ((stage > 0) + (stage < last)) * self.codec_end + (stage == last) * self.head for stage in range(stages)
        ]

    def of_stages(self, counts: Sequence[int]) -> list[float]:
        """Of stages with so many layers."""
        return [count * self.layer + of_end for count, of_end in zip(counts, self.of_ends(len(counts)), strict=True)]


def best_cut(layers: int, costs: Operations, speeds: Sequence[float], *, last_layers: int) -> list[int]:
    """Layers of each stage, for machines of these speeds. last_layers: that the last stage keeps in any case, as far as
    there are as many. Raises StageWorkError for fewer layers than stages between the first and the last."""
    stages = len(speeds)
    last = min(last_layers, max(1, layers - (stages - 2)))
    return balanced_cut(
        layers,
        of_layer=costs.layer,
        of_ends=costs.of_ends(stages),
        speeds=speeds,
        least=least_layers(stages, last=last),
    )


def balanced_cut(
    layers: int, *, of_layer: float, of_ends: Sequence[float], speeds: Sequence[float], least: Sequence[int]
) -> list[int]:
    """Layers of each stage, so that the slowest stage is as fast as it can be.

    of_layer: operations of a layer; of_ends: what a stage has to do besides its layers (head, codecs), in the same
    unit; speeds: operations a second, relative; least: layers that a stage has in any case. Of equal cuts the one with
    more layers in front. Raises StageWorkError when there are fewer layers than `least` asks for.
    """
    counts = list(least)
    if (spare := layers - sum(counts)) < 0:
        raise StageWorkError(
            f"{len(counts)} stages, but the model has {layers} layers; set pipeline.stages = {len(counts) + spare} or "
            f"fewer, or model.layers = {sum(counts)} or more"
        )

    def done_s(stage: int) -> float:
        """Seconds of the stage with one layer more."""
        return ((counts[stage] + 1) * of_layer + of_ends[stage]) / speeds[stage]

    soonest = [(done_s(stage), stage) for stage in range(len(counts))]
    heapq.heapify(soonest)
    for _ in range(spare):
        _, stage = heapq.heappop(soonest)
        counts[stage] += 1
        heapq.heappush(soonest, (done_s(stage), stage))
    return counts


def least_layers(stages: int, *, last: int = 0) -> list[int]:
    """What `balanced_cut` has to leave to each stage: one layer between two others, `last` at the end."""
    return [1] if stages == 1 else [0, *[1] * (stages - 2), last]


def measured_times(step_s: Sequence[float], microbatches: int) -> StageTimes:
    """Of a stage that computed for `step_s` in each of some steps, codec work included: the median, by microbatch. A
    forward counts a third, weight gradients another."""
    each = statistics.median(step_s) / microbatches
    return StageTimes(forward_s=each / 3, backward_s=each * 2 / 3)


def measured_speeds(work: Sequence[float], times: Sequence[StageTimes]) -> list[float]:
    """Operations of a forward pass, in the unit of `work`, by second of a forward and backward pass. Of a stage with
    nothing to compute, which shows nothing, the middle of the others' is assumed. Raises StageWorkError where none took
    any time."""
    took_s = [each.forward_s + each.backward_s for each in times]
    found = [done / took if done > 0 and took > 0 else None for done, took in zip(work, took_s, strict=True)]
    known = [speed for speed in found if speed is not None]
    if not known:
        raise StageWorkError("no stage computed anything, so nothing is known of the machines; name another run")
    return [statistics.median(known) if speed is None else speed for speed in found]


def with_other_work(times: Sequence[StageTimes], before: Sequence[float], after: Sequence[float]) -> list[StageTimes]:
    """What stages that took `times` for the operations `before` would take for those `after`, each on its own machine.
    Raises StageWorkError as `measured_speeds` does."""
    due_s = [each / speed for each, speed in zip(after, measured_speeds(before, times), strict=True)]
    return [_lasting(each, seconds) for each, seconds in zip(times, due_s, strict=True)]


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
