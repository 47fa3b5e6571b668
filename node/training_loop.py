"""The training loop of one stage: its links, its threads, and the loop over the schedule's actions.

A stage encodes, sends, receives and decodes while it computes (`node.queues`), but the order of everything that changes
state is the schedule's, so timing never reaches the arithmetic. Each stage runs the loop on its own: there is no
coordinator and no barrier, and a stage starts its next step as soon as its last backward is done, or where gradients
are clipped by the norm of all stages, as soon as it knows that. Where they are applied one step late, steps overlap
(`protocol.step_orders`). A schedule that splits the backward sends the input gradient off before the weight gradient is
computed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..protocol.global_norm import norm_message
from ..protocol.messages import Kind, Message
from ..protocol.paired import computed_now
from ..protocol.schedule import (
    Action,
    Backward,
    BroadcastNorm,
    Evaluate,
    Evaluation,
    Forward,
    InputGradient,
    ReduceNorm,
    Step,
    Upward,
    WeightGradient,
)
from ..protocol.step_orders import DelayedOrder, OneStep, StepOrder
from .boundary.endpoints import Encoded, ReceivedTensor
from .config import RunConfig
from .context.link_transport import LinkTransport
from .data import Corpus
from .data.batches import draw
from .lanes.held_rounds import HeldRounds
from .links.link import Link, LinkOffCap
from .long_preparation import in_daemon
from .meeting import all_opened, probed
from .paired_work import computed
from .queues import Arrival, ReceiveQueue, SendQueue
from .receive_deadline import ReceiveDeadline
from .run_records import Lap, MetricsWriter, Tracer
from .run_totals import RunTotals
from .stage import Stage
from .step_records import StepRecords
from .unpacking import Unpacking
from .worker_thread import Reporter, Worker


class TrainingLoop:
    """Stage `stage.index`, its links to the stages `above` and `below`, and its part of the schedule, in one
    generation.

    `run` goes on after the steps that the stage has completed, and returns when the configured ones are done and both
    neighbours said goodbye. `on_completed` is awaited after each step, with the thread that may look at the stage and
    how many are completed; `on_met` is called when the neighbours are there, in this generation. Raises TimeoutError (a
    wait ran out, and for what), LinkLost, CodecError and optimizer errors by name.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        *,
        above: Link | None,
        below: Link | None,
        corpus: Corpus | None,
        metrics: MetricsWriter,
        tracer: Tracer,
        on_fault: Reporter,
        generation: int = 0,
        on_completed: Callable[[Worker, int], Awaitable[None]] | None = None,
        totals: RunTotals | None = None,
        deadline: ReceiveDeadline | None = None,
        last: int | None = None,
        rounds: HeldRounds | None = None,
        on_met: Callable[[], None] | None = None,
        context: LinkTransport | None = None,
    ) -> None:
        self.config, self.stage, self.corpus = config, stage, corpus
        self.context = context
        if context and stage.chunk:
            stage.chunk.connect(context)
        self._generation, self._on_completed, self._on_met = generation, on_completed, on_met
        self._schedule = config.training_schedule
        self._last = config.run.steps if last is None else min(last, config.run.steps)
        self.under_way = stage.completed  # steps that are completed once the present one is
        self.above, self.below, self._rounds = above, below, rounds
        self._metrics = metrics
        self.totals = totals or RunTotals()
        self._deadline = deadline or ReceiveDeadline(fixed_s=config.link.progress_timeout_s)
        self._watch = self.totals.watch
        self._compute = Worker("compute", self._watch, tracer)
        self._codec = Worker("codec", self._watch, tracer)
        unpacking = Unpacking(stage)
        self._from_above = above and ReceiveQueue(above, unpacking.from_above, self._codec, on_fault)
        self._from_below = below and ReceiveQueue(below, unpacking.from_below, self._codec, on_fault)
        self._to_above = above and SendQueue(above, self._codec, self._deadline)
        self._to_below = below and SendQueue(below, self._codec, self._deadline)
        self._records = StepRecords(
            metrics,
            stage,
            self.totals,
            self.links,
            rounds,
            generation=generation,
            tokens=config.tokens_per_step,
            boundaries=len(self._boundaries),
        )
        self._evaluation_sum = 0.0
        self._measures: dict[str, float] = {}

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        ends = [end for end in (self._from_above, self._from_below, self._to_above, self._to_below) if end]
        async with asyncio.TaskGroup() as group:
            pumps = [group.create_task(end.pump()) for end in ends]
            pumps += [group.create_task(link.until_lost()) for link in self.links]
            pumps += [group.create_task(self.context.pump())] if self.context else []
            await self._meet_neighbours()
            if self._on_met:
                self._on_met()
            await self._train()
            for outbox in (self._to_above, self._to_below):
                if outbox:
                    await outbox.flush()
            timeout_s = self.config.link.replacement_timeout_s
            if self.context:  # a lane that nothing comes back to for its last parts is through before they have left
                await self.context.flush()
                await asyncio.gather(*(self._patiently(link.settle, timeout_s) for link in self.context.links))
            # Seconds for a large stage, in which the loop goes on: neighbours hear heartbeats.
            self._records.end(await self._compute.run("digest of the state", self.stage.state_sha256))
            await asyncio.gather(*(self._patiently(link.drain, timeout_s) for link in self.links))
            for pump in pumps:
                pump.cancel()

    def close(self) -> None:
        if self.context:  # the compute thread may wait for it
            self.context.end()
        self._compute.close()
        self._codec.close()

    def join(self, timeout_s: float) -> None:
        """Wait, after `close`, until nothing looks at the stage any more. Raises TimeoutError for a job that hangs, in
        a device or a disk say."""
        for worker in (self._compute, self._codec):
            worker.join(timeout_s)

    async def _patiently(self, wait: Callable[[float], Awaitable[None]], timeout_s: float) -> None:
        """For so long, and again where a stage is or was missing, or prepares, or this process was paused."""
        while True:
            try:
                return await wait(timeout_s)
            except TimeoutError:
                if not self._deadline.extend(timeout_s):
                    raise

    @property
    def _boundaries(self) -> list[Link]:
        return [link for link in (self.above, self.below) if link]

    @property
    def links(self) -> list[Link]:
        """All, those of the boundaries first."""
        return self._boundaries + (self.context.links if self.context else [])

    async def _meet_neighbours(self) -> None:
        settings, again = self.config.link, bool(self._generation)
        await all_opened(self.links, settings, self._deadline, again=again)
        most_s = settings.replacement_timeout_s if again else settings.connect_timeout_s  # who is lost now comes back
        others = self.context.links if self.context else []
        checks = await probed(self._boundaries, others, last=self.below is None, timeout_s=most_s)
        records = [{**link.way, **check.record()} for link, check in zip(self.links, checks, strict=True)]
        self._metrics.write("ready", stage=self.stage.index, state_bytes=self.stage.state_bytes(), link_check=records)
        for link, check in zip(self.links, checks, strict=True):
            print(f"{link.name}: sends at {link.profile}, {check}", flush=True)
        for line in filter(None, (check.warning for check in checks)):
            if self.config.link.verify == "fail":
                raise LinkOffCap(f'{line}; link.verify = "fail" ends the node here')
            print(f"stage {self.stage.index}: warning: {line}", file=sys.stderr, flush=True)

    async def _train(self) -> None:
        lap = Lap()
        while await self._may_begin(self.stage.completed):
            order, squares = self._next_steps(), None
            for step, action in order:
                begins = action == Forward(microbatch=0)
                if begins and step != order.first and not await self._may_begin(step):
                    order.end = step
                    continue
                if begins:
                    self.under_way = step + 1
                if isinstance(action, Step):
                    lap, squares = await self._end_step(step, squares, lap), None
                else:
                    squares = await self._act(step, action, squares)

    def _next_steps(self) -> StepOrder:
        """One step, or as many as overlap until something wants the pipeline empty."""
        config, pipeline, first = self.config, self.config.pipeline, self.stage.completed
        shape = {"stage": self.stage.index, "stages": pipeline.stages, "microbatches": pipeline.microbatches}
        if not pipeline.delay:
            return OneStep(self._schedule, **shape, first=first)
        return DelayedOrder(self._schedule, **shape, first=first, end=min(config.next_drain(first), self._last))

    async def _act(self, step: int, action: Action, squares: float | None) -> float | None:
        """Do it; returns by whose sum of squares the step's gradients are clipped, as far as that is known. None: by
        the stage's own."""
        match action:
            case Forward() | Backward() | InputGradient():
                if together := computed_now(self._schedule, action, self.config.pipeline.microbatches):
                    await self._compute_and_send(step, action, together)
            case WeightGradient(microbatch=microbatch):
                await self._compute.run(f"weight gradient {microbatch}", self.stage.weight_gradient, microbatch)
            case ReduceNorm():
                await self._gather(step)  # what comes first
                return await self._reduce_norm(step)
            case BroadcastNorm():
                assert squares is not None
                return await self._broadcast_norm(step, squares)
            case _:
                raise AssertionError(action)
        return squares

    async def _end_step(self, step: int, squares: float | None, lap: Lap) -> Lap:
        """The optimizer step, and what is done between two steps; returns the next one's lap."""
        run = self.config.run
        if squares is None:
            await self._gather(step)
        loss, grad_norm = await self._finish(step, squares)
        await self._hold_rounds(step + 1, of_gradients=False)
        if self.stage.chunk and step == self.stage.chunk.gathering_step:
            await self._compute.run("choice of subspaces", self.stage.chunk.choose_subspaces, step)
        self._deadline.observe(lap.seconds)
        self._records.step(step, loss, grad_norm, lap, self._measures)
        lap = Lap()
        due = run.eval_every and (step + 1) % run.eval_every == 0
        if due or step + 1 == run.steps:
            await self._evaluate(step)
            self._deadline.observe_evaluation(lap.seconds)
            lap = Lap()
        if self._on_completed:
            await self._on_completed(self._compute, step + 1)  # what that takes counts as the next step's
        return lap

    def end_after(self, completed: int) -> None:
        """Begin no step after so many are completed."""
        self._last = min(self._last, completed)
        self.look_again()

    async def _may_begin(self, step: int) -> bool:
        """Whether there is such a step to do; below the first stage, once there is something to do it with. A lane that
        was left out follows the others first."""
        while True:
            if self._rounds and step < self._last and self._rounds.follows(step):
                await self._rounds.catch_up(self.stage, self._compute, self._watch, self._norm)
                step = self.stage.completed
                continue
            if not self._from_above:
                return step < self._last
            with self._watch.waiting():
                await self._from_above.begins(step, partial(self._goes_on, step), self._deadline)
            if not (self._rounds and self._rounds.follows(step)):
                return step < self._last

    def _goes_on(self, step: int) -> bool:
        return step < self._last and not (self._rounds and self._rounds.follows(step))

    def look_again(self) -> None:
        """What this stage waits for before its next step may be another thing now."""
        if self._from_above:
            self._from_above.changed.set()

    # -- actions ------------------------------------------------------------------------------------------------

    async def _compute_and_send(self, step: int, action: Forward | Upward, microbatches: Sequence[int]) -> None:
        """Of one microbatch, or of the two of a pair in turns."""
        numbers = ", ".join(map(str, microbatches))
        match action:
            case Forward():
                await self._forward(f"forward {numbers}", step, microbatches)
            case Backward():
                await self._backward(f"backward {numbers}", self.stage.backward, step, microbatches)
            case InputGradient():
                await self._backward(f"input gradient {numbers}", self.stage.input_gradient, step, microbatches)

    async def _forward(self, name: str, step: int, microbatches: Sequence[int]) -> None:
        given = [await self._input(Kind.ACTIVATION, step, microbatch) for microbatch in microbatches]
        works = [
            partial(self.stage.forward, step, microbatch, *each)
            for microbatch, each in zip(microbatches, given, strict=True)
        ]

        async def send(place: int, out: Encoded | None) -> None:
            if out is not None:
                await self._send_below(out, given[place][0], step, microbatches[place], Kind.ACTIVATION)

        await computed(name, works, send, stage=self.stage, compute=self._compute, watch=self._watch)

    async def _backward(
        self, name: str, work: Callable[..., Tensor | None], step: int, microbatches: Sequence[int]
    ) -> None:
        works: list[Callable[[], Tensor | None]] = []
        for microbatch in microbatches:
            dz_out, loss_sum = None, None
            if self._from_below:
                arrival = await self._wait(self._from_below, Kind.GRADIENT, step, microbatch)
                dz_out, loss_sum = arrival.tensor, arrival.message.loss_sum
            works.append(partial(work, microbatch, dz_out, loss_sum))

        async def send(place: int, dz_in: Tensor | None) -> None:
            if self._to_above:
                await self._send_gradient(dz_in, step, microbatches[place])

        await computed(name, works, send, stage=self.stage, compute=self._compute, watch=self._watch)
        if self._to_above and (half := self.stage.gradient_to_send(step)) is not None:
            port = self.stage.upstream_endpoint
            assert port is not None
            table = port.table
            assert table is not None
            later = port.pack_queue.submit(lambda: table.pack_gradient(half, step))
            await self._to_above.put("pack projector gradient", later)

    async def _send_gradient(self, dz_in: Tensor | None, step: int, microbatch: int) -> None:
        port, loss_sum = self.stage.upstream_endpoint, self.stage.losses[microbatch]
        assert port is not None
        assert dz_in is not None
        assert self._to_above
        later = port.pack_queue.submit(lambda: port.pack_gradient(dz_in, step, microbatch, loss_sum))
        await self._to_above.put(f"pack gradient {microbatch}", later)

    async def _gather(self, step: int) -> None:
        """The last of the step's gradients: the receiver's half of the table's below, where it is due."""
        table_gradient = None
        if self._from_below and self.stage.awaits_gradient(step):
            table_gradient = (await self._wait(self._from_below, Kind.PROJECTOR_GRADIENT, step, 0)).tensor
        if self.stage.gathers(step):
            await self._compute.run("gather", self.stage.gather, step, table_gradient)
        await self._hold_rounds(step + 1, of_gradients=True)

    async def _hold_rounds(self, completed: int, *, of_gradients: bool) -> None:
        """Those that are due with other lanes, if there are any."""
        averager = self.stage.averager
        if self._rounds and averager and averager.mode.of_gradients == of_gradients:
            await self._rounds.hold(averager, completed, self._compute, self._watch)

    async def _reduce_norm(self, step: int) -> float:
        """The sum of squares of this stage's gradients and of all below, which the stage above is told."""
        below = 0.0
        if self._from_below:
            below = (await self._wait(self._from_below, Kind.GRADIENT_NORM, step, 0)).sum_of_squares
        squares = await self._compute.run("gradient norm", self.stage.sum_of_squares, step, below)
        if self._to_above:
            await self._to_above.put("gradient norm", partial(norm_message, step, squares))
        return squares

    async def _norm(self, step: int) -> float | None:
        """By whose sum of squares the gradients of that step are clipped; None: by the stage's own."""
        if not self.config.clips_by_global_norm:
            return None
        return await self._broadcast_norm(step, await self._reduce_norm(step))

    async def _broadcast_norm(self, step: int, squares: float) -> float:
        """The sum of squares of all stages' gradients, which the stage below is told; `squares`: what was sent up."""
        if self._from_above:
            squares = (await self._wait(self._from_above, Kind.GRADIENT_NORM, step, 0)).sum_of_squares
        if self._to_below:
            await self._to_below.put("gradient norm", partial(norm_message, step, squares))
        return squares

    async def _finish(self, step: int, squares: float | None) -> tuple[float, float]:
        """(mean loss, gradient norm) of the step that ends here."""
        loss, stats = await self._compute.run("optimizer step", self.stage.finish, step, squares)
        self._measures = await self._compute.run("measures", self.stage.measures)
        return loss, stats.grad_norm

    async def _evaluate(self, step: int) -> None:
        count, loss_sum = self.config.evaluation_microbatches, 0.0
        for action in Evaluation().actions(
            stage=self.stage.index, stages=self.config.pipeline.stages, microbatches=count
        ):
            assert isinstance(action, Evaluate)
            ids_BS, received = await self._input(Kind.EVALUATION, step, action.microbatch)
            name = f"evaluate {action.microbatch}"
            out = await self._compute.run(name, self.stage.evaluate, step, action.microbatch, ids_BS, received)
            if isinstance(out, Encoded):
                await self._send_below(out, ids_BS, step, action.microbatch, Kind.EVALUATION)
            else:
                loss_sum += out
        if self._from_below:
            rounds = -(-count // self.config.pipeline.microbatches)  # all stages below have to be through first
            arrival = await self._wait(self._from_below, Kind.EVALUATION_LOSS, step, 0, evaluation_rounds=rounds)
            loss_sum = arrival.message.loss_sum
        if self._to_above:
            message = Message(kind=Kind.EVALUATION_LOSS, step=step, microbatch=0, loss_sum=loss_sum)
            await self._to_above.put("evaluation loss", lambda: message)
        tokens = count * self.config.microbatch_size * self.config.lane_tokens
        self._metrics.write("evaluation", step=step, val_loss=loss_sum / tokens, tokens=tokens)

    async def _input(self, kind: Kind, step: int, microbatch: int) -> tuple[np.ndarray, ReceivedTensor | None]:
        if self._from_above:
            arrival = await self._wait(self._from_above, kind, step, microbatch)
            assert arrival.ids_BS is not None
            return arrival.ids_BS, arrival.received
        assert self.corpus is not None
        drawn = partial(draw, self.corpus, self.config, kind, step, microbatch, self.stage.lane)
        if not self.corpus.draws_slowly or kind is Kind.EVALUATION:
            return drawn(), None
        with self._watch.waiting():  # the loop goes on: a neighbour hears heartbeats while a dataset is waited for
            return await in_daemon(drawn), None

    async def _wait(
        self, queue: ReceiveQueue, kind: Kind, step: int, microbatch: int, *, evaluation_rounds: int = 0
    ) -> Arrival:
        with self._watch.waiting():
            return await queue.get(kind, step, microbatch, self._deadline, evaluation_rounds=evaluation_rounds)

    async def _send_below(self, out: Encoded, ids_BS: np.ndarray, step: int, microbatch: int, kind: Kind) -> None:
        port = self.stage.downstream_endpoint
        assert port is not None
        assert self._to_below
        later = port.pack_queue.submit(lambda: port.pack_activation(out, ids_BS, step, microbatch, kind))
        await self._to_below.put(f"pack activation {microbatch}", later)
