"""A search for an order of work: list scheduling on a virtual clock, under a bound of microbatches in flight.

What a microbatch keeps between its forward and its weight gradient is most of a stage's memory, and a formula spends it
without looking at times: zero bubble reserves as many microbatches at every stage as stage 0 needs. Here each stage
acts by a simple rule whenever it is free (list scheduling, Graham 1969), with the real times and links, and what it did
is written down as its order. A few rules are tried, each at several depths; the orders that they lead to are simulated
as nodes would run them (`sim.links.pipeline`), and the quickest is taken.

A stage that is free computes, of what is there: an input gradient, which the stages above wait for, or a forward (which
of the two first is the rule's); else a weight gradient, for which nobody waits; some rules wait a moment for what is on
its way already. No forward begins that would exceed the bound.

Why no exact search (integer programming, as in Qi et al., arXiv 2401.10241, section 4): it takes minutes to hours and a
solver, and two nodes with different solvers would not agree. This is the same for the same figures, everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...protocol.actions import Forward, InputGradient
from ...protocol.global_norm import WithGlobalNorm
from ...protocol.stage_orders import StageOrders
from .pipeline import Boundary, Rule, StageTimes, Wires, simulate

RATIOS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # depths, as rtt_ratio of 1F1B has them
PATIENCE = (0.0, 1.0)
STEPS = 2  # of a rule's run: in the second one stages begin at different times, as they do from then on
ACTIONS_MAX = 500_000  # that a search simulates, in a few seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """depths: forwards that each stage may do ahead of its input gradients. in_flight: forwards ahead of weight
    gradients, everywhere. patience: how long a stage that could begin a weight gradient waits for what is on its way,
    in units of that weight gradient."""

    depths: tuple[int, ...]
    in_flight: int
    forward_first: bool
    patience: float


def best_orders(
    stages: Sequence[StageTimes],
    boundaries: Sequence[Boundary],
    *,
    microbatches: int,
    in_flight: int,
    rule: Rule = "duplex",
) -> tuple[StageOrders, float]:
    """The quickest orders found that hold at most `in_flight` microbatches, and their seconds a step. The same for the
    same arguments. Raises ValueError for a bound below 1."""
    if in_flight < 1:
        raise ValueError(f"in_flight={in_flight} leaves nothing to compute; say 1 or more")
    best: tuple[StageOrders, float] | None = None
    seen: set[tuple[str, ...]] = set()
    cost = 3 * 3 * len(stages) * microbatches  # of a simulation: three actions a microbatch, three steps
    spent = 0
    for rules in _tried(len(stages), min(in_flight, microbatches)):
        if best and spent > ACTIONS_MAX:
            break
        spent += cost
        for rows in _Listing(rules, stages, boundaries, microbatches, rule).run():
            if rows in seen:
                continue
            seen.add(rows)
            spent += cost
            orders = StageOrders(rows)
            norm = bool(boundaries) and boundaries[0].norm_bytes
            schedule = WithGlobalNorm(orders) if norm else orders
            step_s = simulate(schedule, stages, boundaries, microbatches=microbatches, rule=rule).step_s
            if best is None or step_s < best[1]:
                best = orders, step_s
    assert best
    return best


def _tried(stages: int, in_flight: int) -> Iterator[Rules]:
    """Each once, although a bound makes many depths alike."""
    depths = dict.fromkeys(
        tuple(min(in_flight, 1 + math.ceil((stages - 1 - stage) * (1 + ratio))) for stage in range(stages))
        for ratio in RATIOS
    )
    for each, forward_first, patience in itertools.product(depths, (False, True), PATIENCE):
        yield Rules(depths=each, in_flight=in_flight, forward_first=forward_first, patience=patience)


@dataclass(slots=True)
class _Stage:
    """How far one stage is in its present step, and what has been sent to it: (kind, step, microbatch) -> when it is
    there."""

    step: int = 0
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys("FIW", 0))
    arrives_s: dict[tuple[str, int, int], float] = field(default_factory=dict)
    idle: bool = True
    words: list[str] = field(default_factory=lambda: [""] * STEPS)


class _Listing:
    """One rule's run over some steps, without a barrier between them."""

    def __init__(
        self,
        rules: Rules,
        stages: Sequence[StageTimes],
        boundaries: Sequence[Boundary],
        microbatches: int,
        rule: Rule,
    ) -> None:
        self._rules, self._times, self._microbatches = rules, stages, microbatches
        self._wires = Wires(boundaries, rule)
        self._stages = [_Stage() for _ in stages]
        self._events: list[tuple[float, int, int, str]] = []  # when, order, stage, what it has done; "" looks again
        self._order = itertools.count()

    def run(self) -> list[tuple[str, ...]]:
        """The orders of each step."""
        for stage in range(len(self._stages)):
            self._push(0.0, stage, "")
        while self._events:
            now_s, _, stage, kind = heapq.heappop(self._events)
            if kind:
                self._finish(stage, kind, now_s)
            self._begin(stage, now_s)
        return [tuple(of.words[step] for of in self._stages) for step in range(STEPS)]

    def _push(self, when_s: float, stage: int, kind: str) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), stage, kind))

    def _finish(self, stage: int, kind: str, now_s: float) -> None:
        of = self._stages[stage]
        of.idle = True
        if kind == "step":
            of.step, of.done = of.step + 1, dict.fromkeys("FIW", 0)
            return
        microbatch = of.done[kind]
        of.done[kind] += 1
        to = {"F": stage + 1, "I": stage - 1, "W": -1}[kind]
        if 0 <= to < len(self._stages):
            action = Forward(microbatch=microbatch) if kind == "F" else InputGradient(microbatch=microbatch)
            _, _, arrive_s = self._wires.send(stage, to, action, now_s)
            self._stages[to].arrives_s[kind, of.step, microbatch] = arrive_s
            self._push(arrive_s, to, "")

    def _begin(self, stage: int, now_s: float) -> None:
        of, times = self._stages[stage], self._times[stage]
        if not of.idle or of.step == STEPS:
            return
        if of.done["W"] == self._microbatches:
            of.idle = False
            self._push(now_s + times.step_s, stage, "step")
            return
        kind = self._chosen(stage, now_s)
        if kind:
            of.idle = False
            of.words[of.step] += kind
            weight_s = times.weight_gradient_s
            seconds = {"F": times.forward_s, "I": times.backward_s - weight_s, "W": weight_s}[kind]
            self._push(now_s + seconds, stage, kind)

    def _chosen(self, stage: int, now_s: float) -> str:
        """What the stage begins now; nothing: it looks again when something arrives."""
        done, patience_s = self._stages[stage].done, self._rules.patience * self._times[stage].weight_gradient_s
        possible_s = {"F": self._forward_s(stage), "I": self._input_gradient_s(stage)}
        for kind in "FI" if self._rules.forward_first else "IF":
            if possible_s[kind] <= now_s:
                return kind
        if done["W"] < done["I"] and min(possible_s.values()) >= now_s + patience_s:
            return "W"
        return ""

    def _forward_s(self, stage: int) -> float:
        """From when on the next forward is possible, as far as is known."""
        of, rules = self._stages[stage], self._rules
        forwards = of.done["F"]
        ahead = forwards - of.done["I"] >= rules.depths[stage] or forwards - of.done["W"] >= rules.in_flight
        if forwards == self._microbatches or ahead:
            return math.inf
        return of.arrives_s.get(("F", of.step, forwards), math.inf) if stage else 0.0

    def _input_gradient_s(self, stage: int) -> float:
        of = self._stages[stage]
        backwards = of.done["I"]
        if backwards == of.done["F"]:
            return math.inf
        last = stage == len(self._stages) - 1
        return 0.0 if last else of.arrives_s.get(("I", of.step, backwards), math.inf)
