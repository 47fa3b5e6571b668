"""The reference: every stage of every lane in this process, one thread, no links.

The same `Stage` objects, the same packed messages and the same order of everything that changes state as in the swarm,
so the two must agree bit for bit. Lanes take turns, each a whole step; then they hold the rounds that are due.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .averaging.averager import Averager
from .averaging.round_plan import Round
from .config import RunConfig
from .lane_in_process import LaneInProcess
from .model import check_sliceable
from .preparation import check_codec, check_device, check_lanes, prepare_corpus, resolve_architecture
from .run_directory import lane_directory
from .stage import Stage
from .stage_costs import stage_layers


class OneProcess:
    """All lanes of a run. Raises what `node.preparation.BAD_INPUT` names when the configuration cannot be served."""

    def __init__(self, config: RunConfig, out: Path | None = None) -> None:
        torch.set_num_threads(1)
        check_device(config)
        check_lanes(config)
        self.config = config
        architecture = resolve_architecture(config)
        check_codec(config, architecture)
        check_sliceable(architecture, stage_layers(config, architecture))
        self.corpus = prepare_corpus(config)
        count = config.lanes.count
        self.lanes = [
            LaneInProcess(config, architecture, self.corpus, lane, out and lane_directory(out, lane, count))
            for lane in range(count)
        ]
        self._given: dict[tuple[int, int], dict[int, bytes]] = {}  # (stage, round) -> lane -> contribution

    @property
    def stages(self) -> list[Stage]:
        """Those of the first lane."""
        return self.lanes[0].stages

    def train(self, on_step: Callable[[int, float], None] | None = None) -> tuple[list[float], float]:
        """Run all steps; returns the training losses and the final held-out loss, both of the first lane."""
        run, losses, val_loss = self.config.run, [], float("nan")
        for step in range(run.steps):
            rest = [lane.work(step) for lane in self.lanes]
            self._hold_rounds(step + 1, of_gradients=True)
            ended = [lane.finish(step, actions) for lane, actions in zip(self.lanes, rest, strict=True)]
            self._hold_rounds(step + 1, of_gradients=False)
            losses.append(ended[0])
            if on_step:
                on_step(step, ended[0])
            due = run.eval_every and (step + 1) % run.eval_every == 0
            if due or step + 1 == run.steps:
                evaluated = [lane.evaluate(step) for lane in self.lanes]
                val_loss = evaluated[0]
        for lane in self.lanes:
            lane.end()
        return losses, val_loss

    def _hold_rounds(self, completed: int, *, of_gradients: bool) -> None:
        for index in range(self.config.pipeline.stages):
            averagers = [lane.stages[index].averager for lane in self.lanes]
            held = [each for each in averagers if each and each.mode.of_gradients == of_gradients]
            if not held:
                return
            used = held[0].plan.used_at(completed)
            for round_ in used:
                if round_.made < completed:
                    self._use(held, round_)
            for round_ in held[0].plan.made_at(completed):
                self._given[index, round_.number] = {each.place.lane: each.contribute(round_) for each in held}
            for round_ in used:
                if round_.made == completed:
                    self._use(held, round_)

    def _use(self, averagers: list[Averager], round_: Round) -> None:
        given = self._given.pop((averagers[0].place.stage, round_.number))
        for each in averagers:
            each.use(round_, {lane: body for lane, body in given.items() if lane != each.place.lane})

    def close(self) -> None:
        """Close the records, also of a run that failed."""
        for lane in self.lanes:
            lane.close()
