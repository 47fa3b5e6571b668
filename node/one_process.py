"""The reference: every stage of every lane in this process, one thread, no links.

The same `Stage` objects, the same packed messages and the same order of everything that changes state as in the swarm,
so the two must agree bit for bit. Lanes take turns, each a whole step; then they hold the rounds that are due.

Lanes of a swarm may be left out of rounds and come back. What came of it is a function of the log of members, so with
that (`members`) this does the same run again: a lane that is out stands still, and follows the others' rounds from the
step that the log says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ..protocol.membership_log import MembershipLog
from .averaging.averager import Averager
from .averaging.round_plan import Round
from .checkpoints.chain_checkpoints import ChainCheckpoints
from .config import RunConfig
from .context.lane_threads import LaneThreads
from .context.mailbox import Mailbox
from .data import Corpus
from .lane_in_process import LaneInProcess
from .model import check_sliceable
from .preparation import check_codec, check_device, check_lanes, prepare_corpus, resolve_architecture
from .run_corpus import RunCorpus
from .run_directory import lane_directory
from .run_lanes import all_lanes
from .stage import Stage
from .stage_costs import stage_layers

T = TypeVar("T")


class OneProcess:
    """All lanes of a run. members: who took part in which rounds (default: all in all). corpus: its text, if that is
    open already. resume: records go behind those in `out`. Raises what `node.preparation.BAD_INPUT` names when the
    configuration cannot be served."""

    def __init__(
        self,
        config: RunConfig,
        out: Path | None = None,
        members: MembershipLog | None = None,
        corpus: Corpus | None = None,
        *,
        resume: bool = False,
    ) -> None:
        torch.set_num_threads(1)
        check_device(config)
        check_lanes(config)
        self.config = config
        architecture = resolve_architecture(config)
        check_codec(config, architecture)
        check_sliceable(architecture, stage_layers(config, architecture))
        self.corpus = corpus or prepare_corpus(config)
        count = config.lanes.count
        self.lanes = [
            LaneInProcess(
                config, architecture, self.corpus, lane, out and lane_directory(out, lane, count), resume=resume
            )
            for lane in range(count)
        ]
        self._threads: LaneThreads | None = None
        if config.context.method:
            mailbox = Mailbox()
            self._threads = LaneThreads(count, mailbox)
            for lane in self.lanes:
                for stage in lane.stages:
                    assert stage.chunk
                    on_sent, watch = partial(lane.count_context, stage.index), lane.watches[stage.index]
                    stage.chunk.connect(mailbox.of(stage.index, lane.lane, on_sent, watch))
        self._members = members or MembershipLog.begin(count)
        self._given: dict[tuple[int, int], dict[int, bytes]] = {}  # (stage, round) -> lane -> contribution
        self._architecture = architecture
        self._checkpoints: list[ChainCheckpoints] = []  # by lane

    @property
    def stages(self) -> list[Stage]:
        """Those of the first lane."""
        return self.lanes[0].stages

    def keep_checkpoints(self, out: Path, text: RunCorpus, *, resume: bool, report: Callable[[str], None]) -> RunCorpus:
        """Write checkpoints into the run's directory from now on, as a swarm would; returns `text` with what those that
        are there say of it. resume: go on from the newest that all stages of all lanes have intact; what is damaged is
        reported. Raises CheckpointError, StateError, and DataError for another text than theirs."""
        self._checkpoints = [
            ChainCheckpoints(own, self._architecture, lane.stages, place)
            for lane, (own, place) in zip(self.lanes, all_lanes(self.config, out), strict=True)
        ]
        intact = [each.intact(report) if resume else set[int]() for each in self._checkpoints]
        for of_lane, completed in zip(self._checkpoints, intact, strict=True):
            text = of_lane.of_text(text, completed)
        if completed := max(set.intersection(*intact), default=0):
            for each in self._checkpoints:
                each.restore(completed)
            self._take_up_rounds(completed)
        return text

    def _take_up_rounds(self, completed: int) -> None:
        """What all lanes have given to the rounds that are made and not used yet is a part of their state."""
        for lane in self.lanes:
            for stage in lane.stages:
                given = stage.averager.under_way(completed) if stage.averager else {}
                for round_, contribution in given.items():
                    self._given.setdefault((stage.index, round_.number), {})[lane.lane] = contribution

    def _keep(self, completed: int) -> None:
        every, last = self.config.checkpoint.every, completed == self.config.run.steps
        for lane, checkpoints in zip(self.lanes, self._checkpoints, strict=False):  # none: nobody wants any
            if every and (last or completed % every == 0):
                checkpoints.write(lane.record_checkpoint, lane.record_fault)

    def train(self, on_step: Callable[[int, float], None] | None = None) -> tuple[list[float], float]:
        """Run all steps that are left; returns their training losses and the final held-out loss, both of the first
        lane that was there."""
        run, losses, val_loss = self.config.run, [], float("nan")
        for step in range(self.stages[0].completed, run.steps):
            loss = self._step(step)
            losses.append(loss)
            if on_step:
                on_step(step, loss)
            due = run.eval_every and (step + 1) % run.eval_every == 0
            if due or step + 1 == run.steps:
                there = [lane for lane in self.lanes if self._trains(lane.lane, step)]
                evaluated = self._each(lambda lane, step=step: lane.evaluate(step), there)
                val_loss = evaluated[0]
            self._keep(step + 1)
        self._take_up_states(run.steps)
        for lane in self.lanes:
            lane.end()
        return losses, val_loss

    def _step(self, step: int) -> float:
        """One step of all lanes; returns the loss of the first that trains."""
        self._take_up_states(step)
        training = [lane for lane in self.lanes if self._trains(lane.lane, step)]
        following = [lane for lane in self.lanes if self._follows(lane.lane, step)]
        done = self._each(lambda lane: lane.work(step), training)
        rest = {lane.lane: ended for lane, ended in zip(training, done, strict=True)}
        of_gradients = self._of_gradients
        if of_gradients:
            rest |= {lane.lane: lane.make_room(step) for lane in following}
        self._hold_rounds(step + 1, training, following, of_gradients=True)
        ended = [lane.finish(step, rest[lane.lane]) for lane in training]
        for lane in following:
            if of_gradients:
                lane.finish(step, rest[lane.lane], computed=False)
            else:
                for stage in lane.stages:
                    stage.follow_to(step + 1)
        self._hold_rounds(step + 1, training, following, of_gradients=False)
        self._each(lambda lane: lane.choose_subspaces(step), training)
        for lane in following:
            if self._trains(lane.lane, step + 1) or step + 1 == self.config.run.steps:
                for stage in lane.stages:
                    stage.enter(step + 1)
        return ended[0]

    def _each(self, work: Callable[[LaneInProcess], T], lanes: list[LaneInProcess]) -> list[T]:
        """In turn, or at the same time where lanes wait for each other's keys and values."""
        return self._threads.each(work, lanes) if self._threads else [work(lane) for lane in lanes]

    def _take_up_states(self, completed: int) -> None:
        """Lanes that go on from there with the state of another one."""
        for lane in self.lanes:
            for entry in self._members.entries_of(lane.lane):
                if entry.copied == completed and entry.source != lane.lane:
                    for stage, source in zip(lane.stages, self.lanes[entry.source].stages, strict=True):
                        stage.restore(source.snapshot())

    @property
    def _of_gradients(self) -> bool:
        averager = self.stages[0].averager
        return averager is not None and averager.mode.of_gradients

    def _follows(self, lane: int, step: int) -> bool:
        """Whether that lane does the step by the rounds of others."""
        return any(each.copied <= step < each.begins for each in self._members.entries_of(lane))

    def _is_away(self, lane: int, step: int) -> bool:
        """Whether nothing counts of what it did then: it takes up the state of another lane later."""
        averager = self.stages[0].averager
        return averager is not None and any(
            averager.plan.round(self._members.left_before(each)).made <= step < each.copied
            for each in self._members.entries_of(lane)
            if each.source != lane
        )

    def _trains(self, lane: int, step: int) -> bool:
        """Whether it does it itself, for all that came of it."""
        if self._follows(lane, step) or self._is_away(lane, step):
            return False
        left, averager = self._members.left_at(lane), self.stages[0].averager
        return left is None or averager is None or step < averager.plan.round(left).made

    def _hold_rounds(
        self, completed: int, training: list[LaneInProcess], following: list[LaneInProcess], *, of_gradients: bool
    ) -> None:
        if not self.stages[0].averager or of_gradients != self._of_gradients:
            return
        for index in range(self.config.pipeline.stages):
            held = {lane.lane: _averager(lane, index) for lane in training}
            others = {lane.lane: _averager(lane, index) for lane in following}
            plan = next(iter(held.values())).plan
            used = plan.used_at(completed)
            for round_ in used:
                if round_.made < completed:
                    self._use(held | others, round_, index)
            for round_ in plan.made_at(completed):
                given = {lane: averager.contribute(round_) for lane, averager in held.items()}
                members = self._members.at(round_.number).members
                for lane in training:
                    lane.give(index, given[lane.lane])
                self._given[index, round_.number] = {lane: given[lane] for lane in members}
            for round_ in used:
                if round_.made == completed:
                    self._use(held | others, round_, index)

    def _use(self, averagers: Mapping[int, Averager], round_: Round, index: int) -> None:
        given = self._given.pop((index, round_.number))
        for lane, averager in sorted(averagers.items()):
            others = {other: body for other, body in given.items() if other != lane}
            used = averager.use(round_, others, member=lane in given)
            self.lanes[lane].record_round(index, used)

    def close(self) -> None:
        """Close the records, also of a run that failed."""
        if self._threads:
            self._threads.close()
        for lane in self.lanes:
            lane.close()


def _averager(lane: LaneInProcess, index: int) -> Averager:
    averager = lane.stages[index].averager
    assert averager
    return averager
