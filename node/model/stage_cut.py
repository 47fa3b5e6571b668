"""Which layers a stage has: stages of equal length, or of stated lengths.

Stages with the same number of layers are not equally slow: the last one computes the head and the loss besides, and
machines differ. The lengths that make the slowest one fast are `sim.links.stage_work.best_cut`. Why not by the measured
times of a first step, as some trainers do: every node has to find the same cut from the same settings, before anything
runs, on whatever machine it is.

The last stage may end up with the norm and the head alone, and the first with the embedding alone. A stage between two
others has a layer at least: without one it would only pass on what it gets.
"""

from __future__ import annotations

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


def layer_ranges(counts: Sequence[int]) -> list[range]:
    """The layers of each stage, by their numbers in the whole model."""
    ends = [0, *itertools.accumulate(counts)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def partition(layers: int, stages: int) -> list[range]:
    """The layers of stages of equal length. Raises ModelError as `equal_cut` does."""
    return layer_ranges(equal_cut(layers, stages))
