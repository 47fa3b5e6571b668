"""Which layers a stage has: stages of equal length, of stated lengths, or of lengths that make the slowest one fast.

A pipeline is as fast as its slowest stage. Stages with the same number of layers are not equally slow: the last one
computes the head and the loss besides, and machines differ. So `balanced_cut` hands out layers one at a time, each to
the stage that would be done soonest with it. For layers that cost the same this makes the slowest stage as fast as any
cut can, and needs no search. Why not the measured times of a first step, as some trainers do: every node has to find
the same cut from the same settings, before anything runs, on whatever machine it is.

The last stage may end up with the norm and the head alone, and the first with the embedding alone. A stage between two
others has a layer at least: without one it would only pass on what it gets.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from .architecture import ModelError


def equal_cut(layers: int, stages: int) -> list[int]:
    """Layers of each stage; they differ by one at most, the longer stages first.

    The last stage is never longer than another, because it computes the head and the loss as well.
    Raises ModelError when a stage would have no layer.
    """
    if stages < 1:
        raise ModelError(f"pipeline.stages = {stages}; a pipeline has at least one stage")
    if layers < stages:
        raise ModelError(
            f"{stages} stages, but the model has {layers} layers; set pipeline.stages = {max(layers, 1)} or fewer, "
            f"or model.layers = {stages} or more"
        )
    each, longer = divmod(layers, stages)
    return [each + (stage < longer) for stage in range(stages)]


def stated_cut(counts: Sequence[int], layers: int, stages: int) -> list[int]:
    """`counts`, if the model can be cut so. Raises ModelError, with a cut that can."""
    spelling = ",".join(map(str, counts))
    advice = "say pipeline.cut = 'auto'"
    if len(counts) != stages:
        raise ModelError(
            f"pipeline.cut = {spelling} is for {len(counts)} stages, but there are {stages}; "
            f"set pipeline.stages = {len(counts)}, or {advice}"
        )
    if sum(counts) != layers:
        raise ModelError(
            f"pipeline.cut = {spelling} has {sum(counts)} layers, but the model has {layers}; "
            f"set model.layers = {sum(counts)}, or {advice}"
        )
    for stage, count in enumerate(counts):
        if count == 0 and 0 < stage < stages - 1:
            raise ModelError(
                f"pipeline.cut = {spelling} leaves stage {stage} without a layer; only the first and the last stage "
                f"can do without; give it one, or {advice}"
            )
    return list(counts)


def balanced_cut(
    layers: int, *, of_layer: float, of_ends: Sequence[float], speeds: Sequence[float], least: Sequence[int]
) -> list[int]:
    """Layers of each stage, so that the slowest stage is as fast as it can be.

    of_layer: operations of a layer; of_ends: what a stage has to do besides its layers (head, codecs), in the same
    unit; speeds: operations a second, relative; least: layers that a stage has in any case. Of equal cuts the one with
    more layers in front. Raises ModelError when there are fewer layers than `least` asks for.
    """
    counts = list(least)
    if (spare := layers - sum(counts)) < 0:
        raise ModelError(
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


def layer_ranges(counts: Sequence[int]) -> list[range]:
    """The layers of each stage, by their numbers in the whole model."""
    ends = [0, *itertools.accumulate(counts)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def partition(layers: int, stages: int) -> list[range]:
    """The layers of stages of equal length. Raises ModelError as `equal_cut` does."""
    return layer_ranges(equal_cut(layers, stages))
