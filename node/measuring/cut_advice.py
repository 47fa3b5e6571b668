"""What another cut of the model would give, for the times that a run has just measured.

How fast each machine is follows from what its stage had to compute (`node.stage_costs`) and how long that took. With
these speeds the best cut is found as `pipeline.cut=auto` finds its own, and both cuts are simulated over the run's own
link and schedule. So an uneven swarm is told what to set, and in how far it is worth a restart. Why not move layers
while the run goes on: weights, optimizer states and codecs would have to cross the thin links, at a moment that all
agree on, and a new cut is another run for every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...sim.links.pipeline import StageTimes
from ..config import RunConfig
from ..stage_costs import best_cut, operations, stage_layers
from .plan import WORTH_SAYING, plan
from .stage_times import measured_speeds, times_recut

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def cut_advice(config: RunConfig, architecture: PretrainedConfig, times: Sequence[StageTimes]) -> dict[str, Any]:
    """`layers` of each stage now, `best_layers` for machines as fast as these, and the `gain`: tokens/s of the best
    over those of now, both simulated. Raises ModelError."""
    costs = operations(config, architecture)
    now = [len(layers) for layers in stage_layers(config, architecture)]
    speeds = measured_speeds(costs.of_stages(now), times)
    best = best_cut(config, architecture, costs, speeds)
    if best == now:
        return {"layers": now, "best_layers": now, "gain": 1.0}
    recut = _cut_so(config, best)
    moved = times_recut(config, recut, architecture, times)
    before, after = (
        plan(each, architecture, of_stages)[0]["tokens_per_s"] for each, of_stages in ((config, times), (recut, moved))
    )
    return {"layers": now, "best_layers": best, "gain": after / before}


def advice_line(advice: dict[str, Any], shares: Sequence[float]) -> str | None:
    """One line for people; None where another cut would not help. `shares`: of its time that each stage computes."""
    if advice["gain"] < WORTH_SAYING:
        return None
    busiest, idlest = (pick(range(len(shares)), key=shares.__getitem__) for pick in (max, min))
    cut = ",".join(map(str, advice["best_layers"]))
    return (
        f"stage {busiest} computes {shares[busiest]:.0%} of its time, stage {idlest} {shares[idlest]:.0%}: "
        f"--set pipeline.cut={cut} would give {advice['gain']:.2g}x (simulated)"
    )


def _cut_so(config: RunConfig, counts: Sequence[int]) -> RunConfig:
    cut = ",".join(map(str, counts))
    return config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"cut": cut})})
