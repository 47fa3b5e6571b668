"""What another cut of the model would give, for the times that a run has measured.

How fast each machine is follows from what its stage had to compute and how long that took. With these speeds the best
cut is found as `pipeline.cut=auto` finds its own, and both cuts are simulated over the run's own link and schedule. So
an uneven swarm is told what to set, in how far it is worth a restart, and which command takes what was trained along.
Why not move layers while the run goes on: weights, optimizer states and codecs would have to cross the thin links, at a
moment that all agree on, and a new cut is another run for every checkpoint.

What has to be known of the model and the messages is a handful of numbers, `PipelineCosts`. Stage 0 writes them into
its records when it starts (event `costs`), so whoever reads records gives the same advice: `thinpipe top` while the run
goes on, from the last steps, and the end of the run and `thinpipe summary` from all.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...protocol.global_norm import WithGlobalNorm
from ...protocol.schedule import Schedule, get_schedule
from ..links.pipeline import Boundary, StageTimes, simulate
from ..links.shaper import LinkProfile
from ..links.stage_work import Operations, StageWorkError, best_cut, measured_speeds, measured_times, with_other_work
from .quantities import QUANTITY_MAX, quantity, stage_count, whole
from .summary import read_records

WORTH_SAYING = 1.05  # times as fast; the simulation is within a few percent of what runs
MICROBATCHES_MAX = 1000  # of all stages in a step: more take longer to simulate than people should wait
LAYERS_MAX = 1024  # of a model, as its settings have it


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCosts:
    """What has to be known of a run to simulate it with another cut. layers: of each stage. last_layers: that the codec
    wants behind the last boundary in any case. boundary: all are alike; its bytes are those of a microbatch."""

    operations: Operations
    layers: tuple[int, ...]
    last_layers: int
    schedule: str
    microbatches: int
    boundary: Boundary
    delay: int = 0  # of gradients, in steps

    @property
    def training_schedule(self) -> Schedule:
        """With the gradient norm, where stages agree on one."""
        schedule = get_schedule(self.schedule)
        return WithGlobalNorm(schedule) if self.boundary.norm_bytes else schedule

    def record(self) -> dict[str, Any]:
        """As JSON holds it, for the records."""
        return {
            "operations": asdict(self.operations),
            "layers": list(self.layers),
            "last_layers": self.last_layers,
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "delay": self.delay,
            "forward_bytes": self.boundary.forward_bytes,
            "backward_bytes": self.boundary.backward_bytes,
            "norm_bytes": self.boundary.norm_bytes,
            "link": str(self.boundary.link),
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> PipelineCosts:
        """What `record` gave. Raises KeyError, TypeError or ValueError for what cannot be a run's."""
        told, layers = record["operations"], [_count(each, LAYERS_MAX) for each in record["layers"]]
        stage_count(len(layers))
        _count(sum(layers), LAYERS_MAX)
        schedule = str(record["schedule"])
        get_schedule(schedule)
        return cls(
            operations=Operations(**{name: _at_least_0(told[name]) for name in Operations.__slots__}),
            layers=tuple(layers),
            last_layers=_count(record["last_layers"], LAYERS_MAX),
            schedule=schedule,
            microbatches=max(1, whole(record["microbatches"])),
            delay=_count(record["delay"], 1),
            boundary=Boundary(
                forward_bytes=_count(record["forward_bytes"]),
                backward_bytes=_count(record["backward_bytes"]),
                norm_bytes=_count(record["norm_bytes"]),
                link=LinkProfile.parse(str(record["link"])),
            ),
        )


def _at_least_0(value: Any, most: float = QUANTITY_MAX) -> float:
    if (found := quantity(value, most)) < 0:
        raise ValueError(f"{value!r} is below 0")
    return found


def _count(value: Any, most: float = QUANTITY_MAX) -> int:
    return int(_at_least_0(value, most))


def cut_advice(costs: PipelineCosts, times: Sequence[StageTimes]) -> dict[str, Any]:
    """`layers` of each stage now, `best_layers` for machines as fast as these, and the `gain`: tokens/s of the best
    over those of now, both simulated. times: of each stage for a microbatch. Raises StageWorkError."""
    now = list(costs.layers)
    best, gain = _best(costs, tuple(times))
    return {"layers": now, "best_layers": list(best), "gain": gain}


@functools.lru_cache(maxsize=16)  # a screen asks twice a second, and steps may take minutes
def _best(costs: PipelineCosts, times: tuple[StageTimes, ...]) -> tuple[tuple[int, ...], float]:
    work = costs.operations.of_stages(costs.layers)
    speeds = measured_speeds(work, times)
    best = tuple(best_cut(sum(costs.layers), costs.operations, speeds, last_layers=costs.last_layers))
    if best == costs.layers:
        return best, 1.0
    moved = with_other_work(times, work, costs.operations.of_stages(best))
    before_s, after_s = (
        simulate(
            costs.training_schedule,
            of_stages,
            [costs.boundary] * (len(best) - 1),
            microbatches=costs.microbatches,
            delay=costs.delay,
        ).step_s
        for of_stages in (times, moved)
    )
    return best, before_s / after_s


def advice_line(advice: dict[str, Any], shares: Sequence[float], run: Path | None = None) -> str | None:
    """One line for people; None where another cut would not help. `shares`: of its time that each stage computes. run:
    the directory of one that can go on with another cut."""
    if advice["gain"] < WORTH_SAYING:
        return None
    busiest, idlest = (pick(range(len(shares)), key=shares.__getitem__) for pick in (max, min))
    cut = ",".join(map(str, advice["best_layers"]))
    line = (
        f"stage {busiest} computes {shares[busiest]:.0%} of its time, stage {idlest} {shares[idlest]:.0%}: "
        f"--set pipeline.cut={cut} would give {advice['gain']:.2g}x (simulated)"
    )
    if run is None:
        return line
    return f"{line}; go on so: thinpipe checkpoint convert {shlex.quote(str(run))} --cut {cut} --out DIR"


def advise(
    costs: PipelineCosts | None, step_s: Sequence[Sequence[float]], shares: Sequence[float], run: Path | None = None
) -> dict[str, Any] | None:
    """`cut_advice` with the `line` that says it to people, None where there is nothing to say; None where nothing is
    known: a run that wrote no costs, a stage that has computed nothing yet, or more than can be simulated in a moment.
    step_s: by stage, how long it computed in each of some steps. shares: of its time, by stage. run: as for
    `advice_line`."""
    if costs is None or len(costs.layers) != len(step_s) or len(step_s) < 2 or not all(step_s):
        return None
    if len(step_s) * costs.microbatches > MICROBATCHES_MAX:
        return None
    try:
        found = cut_advice(costs, [measured_times(of_stage, costs.microbatches) for of_stage in step_s])
    except (StageWorkError, ArithmeticError):  # ArithmeticError: of times that are next to nothing
        return None
    return {**found, "line": advice_line(found, shares, run)}


def advice_on_record(records: Path, shares: Sequence[float], run: Path | None = None) -> dict[str, Any] | None:
    """`advise` for the stages whose records are in the directory `records`, from all steps but each stage's first,
    which warms up. shares, run: as for `advise`, of all stages. None for records that cannot be read, too."""
    try:
        by_stage = [read_records(records / f"stage-{stage}.jsonl") for stage in range(len(shares))]
        costs = [record for record in by_stage[0] if record["event"] == "costs"]
        steps = [[record for record in of if record["event"] == "step"][1:] for of in by_stage]
        step_s = [[record["compute_s"] + record["codec_s"] for record in of_stage] for of_stage in steps]
        return advise(PipelineCosts.of(costs[-1]) if costs else None, step_s, shares, run)
    except (OSError, LookupError, TypeError, ValueError):
        return None
