"""What rounds between lanes add to a step, on the virtual clock of `sim.links.pipeline`.

All lanes run the same schedule on the same machines, so a round is made in all of them at one moment, and what one lane
waits for is what another one sends: one lane is simulated, and stands for all. Each of its stages has a wire to its own
stage in each other lane. A contribution takes that wire when the one before has left it, as boundaries' messages do,
and whoever is to use it before it has arrived stands still.

Hundreds of steps may lie between two rounds, and most are alike. They are left out, and the time that they take is
given to what is on the wires: `_kept_steps` are those around a round that is made or used. Why not a formula, such as
the wire's time less that of the steps in which it is hidden: stages have contributions of different sizes and end
a step at different times, and a stage that stands still empties the pipeline, or does not, as the schedule has it.

What is left out: packing and adding contributions, and the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.schedule import Action, Forward, ReduceNorm, Schedule, Step
from .pipeline import Boundary, Rule, StageTimes, step_begins

SETTLE = 4  # steps after which a pipeline that was held up has its pace again


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRounds:
    """Rounds in the middle of a run. Round n, from 0, is made once (n + 1) * stride steps are completed, and used
    `delay` steps later.

    wire_s: by stage, for how long a contribution takes the wire to one other lane. latency_s: of that wire.
    of_gradients: rounds are within a step, before the optimizer.
    """

    stride: int
    delay: int
    wire_s: tuple[float, ...]
    latency_s: float
    of_gradients: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPipeline:
    """From one round to the next, in the steady state. period_s: `stride` steps. waited_s: by stage, in rounds."""

    period_s: float
    waited_s: tuple[float, ...]


class RoundsOnWires:
    """The rounds of one lane's stages: the `Hold` of its pipeline.

    steps: the number of each simulated step, as if none were left out. step_s: of one that is left out. arrives_s: by
    stage and round, of those that are under way.
    """

    def __init__(self, rounds: LaneRounds, steps: Sequence[int], step_s: float) -> None:
        self._rounds, self.steps, self._step_s = rounds, steps, step_s
        stages = range(len(rounds.wire_s))
        self._free_s = [0.0 for _ in stages]  # when the wire is free again
        self.arrives_s: list[dict[int, float]] = [{} for _ in stages]
        self.waited_s: list[dict[int, float]] = [{} for _ in stages]  # by simulated step

    def before(self, action: Action) -> bool:
        if self._rounds.of_gradients:
            return isinstance(action, ReduceNorm | Step)
        return isinstance(action, Forward)  # with which every step begins

    def until_s(self, stage: int, step: int, now_s: float) -> float:
        rounds, arrives_s = self._rounds, self.arrives_s[stage]
        number = self.steps[step]
        left_out = number - self.steps[step - 1] - 1 if step else 0
        if left_out:
            self._free_s[stage] -= left_out * self._step_s
            for each in arrives_s:
                arrives_s[each] -= left_out * self._step_s
        completed = number + rounds.of_gradients
        until_s = now_s
        made, rest = divmod(completed, rounds.stride)
        used, rest_used = divmod(completed - rounds.delay, rounds.stride)
        if rounds.delay and used > 0 and not rest_used:  # what was made before is used before more is made
            until_s = max(until_s, arrives_s.pop(used - 1))
        if made > 0 and not rest:
            self._free_s[stage] = max(self._free_s[stage], until_s) + rounds.wire_s[stage]
            arrives_s[made - 1] = self._free_s[stage] + rounds.latency_s
            if not rounds.delay:
                until_s = max(until_s, arrives_s.pop(made - 1))
        self.waited_s[stage][step] = until_s - now_s
        return until_s


def simulate_rounds(
    schedule: Schedule,
    stages: Sequence[StageTimes],
    boundaries: Sequence[Boundary],
    rounds: LaneRounds,
    *,
    microbatches: int,
    step_s: float,
    rule: Rule = "duplex",
) -> HeldPipeline:
    """What `stride` steps take with their rounds. step_s: what a step takes without, as `simulate` says."""
    stride = rounds.stride
    last_round = rounds.delay // stride + 2  # by then as many are under way as ever are
    last = last_round * stride + stride + rounds.delay + SETTLE
    kept = _kept_steps(rounds, last)
    hold = RoundsOnWires(rounds, kept, step_s)
    begins = step_begins(schedule, stages, boundaries, microbatches=microbatches, steps=len(kept), rule=rule, hold=hold)
    end, begin = len(kept) - 1, kept.index(last - stride)
    simulated_s = max(begins[stage, end] - begins[stage, begin] for stage in range(len(stages)))
    left_out = stride - (end - begin)
    within = range(begin, end) if rounds.of_gradients else range(begin + 1, end + 1)  # behind its start, or before
    return HeldPipeline(
        period_s=simulated_s + left_out * step_s,
        waited_s=tuple(sum(of_stage[step] for step in within) for of_stage in hold.waited_s),
    )


def _kept_steps(rounds: LaneRounds, last: int) -> list[int]:
    """The steps to simulate, of those from 0 to `last`: around every round that is made or used."""
    kept = {0, *range(max(0, last - SETTLE), last + 1)}
    kept |= set(range(max(0, last - rounds.stride - SETTLE), last - rounds.stride + 1))
    for made in range(rounds.stride, last + 1, rounds.stride):
        for at in (made, made + rounds.delay):
            kept |= set(range(max(0, at - 1), min(last, at + SETTLE) + 1))
    return sorted(kept)
