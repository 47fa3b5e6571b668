"""One lane of the reference: a chain of stages in this process, one thread, no links.

The same `Stage` objects, the same packed messages and the same order of everything that changes state as in the swarm.
Bytes are counted as the link would count them (tensor, ids, envelope, framing); acknowledgements need a link and are
not part of it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor

from ..protocol.global_norm import norm_message, sum_of_squares_in
from ..protocol.messages import Kind, Message
from ..protocol.paired import computed_now
from ..protocol.schedule import (
    Action,
    Backward,
    BroadcastNorm,
    Evaluate,
    Forward,
    InputGradient,
    ReduceNorm,
    Step,
    Upward,
    WeightGradient,
    get_schedule,
    interleave,
)
from ..sim.links.shaper import LinkProfile
from ..sim.reports.lanes import CONTEXT_LINK, context_link_name, is_context, is_lateral, other_lane
from ..sim.reports.metrics_address import MetricsAddress
from ..sim.reports.summary import dense_bytes_one_way
from .averaging.averager import RoundUsed
from .boundary.endpoints import Encoded, ReceivedTensor
from .config import RunConfig
from .data import Corpus
from .data.batches import draw
from .links.outgoing import chunk_bytes_for
from .measuring.message_sizes import accounted
from .run_records import MetricsWriter, Stopwatch, peak_rss_bytes, rss_bytes
from .stage import Stage
from .watching.views import Watching

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
Mail = dict[tuple[int, Kind], deque[Message]]  # (receiving stage, kind) -> messages in order


class LaneInProcess:
    """The stages of one lane. resume: records go behind those in `out`. Raises what `node.preparation.BAD_INPUT` names
    when the configuration cannot be served."""

    def __init__(
        self,
        config: RunConfig,
        architecture: PretrainedConfig,
        corpus: Corpus,
        lane: int,
        out: Path | None,
        *,
        resume: bool = False,
    ) -> None:
        self.config, self.corpus, self.lane = config, corpus, lane
        self.stages = [Stage(config, architecture, index, lane) for index in range(config.pipeline.stages)]
        self.watches = [Stopwatch() for _ in self.stages]
        self.sent: list[dict[str, Counter[str]]] = [{} for _ in self.stages]
        self.sent_to_lanes: list[dict[str, Counter[str]]] = [{} for _ in self.stages]
        self._mail: Mail = {}
        self._squares: dict[int, float] = {}  # by stage, in a step whose gradients are clipped by the global norm
        self._cpu_s = self._train_s = 0.0
        self._work_s = self._work_cpu_s = 0.0  # of the step under way, up to its gradients
        self._second_cpu_s = 0.0  # of that, on another thread than this lane's
        self._chunk_bytes = config.link.chunk_bytes or chunk_bytes_for(LinkProfile.parse(config.link.link))
        self._watching: list[Watching] = []
        self._metrics = [self._records(out, stage.index, resume=resume) for stage in self.stages] if out else []
        for metrics in self._metrics[:1]:
            metrics.write("data", **corpus.record())
        for index, metrics in enumerate(self._metrics if resume else ()):  # behind "data": a swarm's begin with it
            metrics.write("start", **self._start(index))

    def _start(self, index: int) -> dict[str, object]:
        """Of a process that takes the place of an earlier one: counts begin at zero again."""
        run, pipeline, lanes = self.config.run, self.config.pipeline, self.config.lanes
        places = {"stage": index, "stages": pipeline.stages, "lane": self.lane, "lanes": lanes.count}
        return {"run": run.name, **places, "steps": run.steps, "resume": True}

    def _records(self, out: Path, index: int, *, resume: bool) -> MetricsWriter:
        """Of one stage, with those who look at them."""
        settings = self.config.watch
        if settings.prometheus:
            first = MetricsAddress.parse(settings.prometheus)
            own = first.of_node(index, self.lane, self.config.pipeline.stages)
            settings = settings.model_copy(update={"prometheus": str(own)})
        lanes = self.config.lanes.count
        self._watching.append(Watching(settings, out, stage=index, lane=self.lane, lanes=lanes, replaces=resume))
        return MetricsWriter(out / f"stage-{index}.jsonl", append=resume, view=self._watching[-1].take)

    def work(self, step: int) -> list[tuple[int, Action]]:
        """All of a step up to its gradients; returns the rest, which may have to wait for other lanes."""
        began, cpu = time.perf_counter(), time.thread_time()
        self._second_cpu_s = 0.0
        rest: list[tuple[int, Action]] = []
        schedule = self.config.training_schedule
        for index, action in interleave(schedule, len(self.stages), self.config.pipeline.microbatches):
            if not self._computes(index, action, step):
                rest.append((index, action))
        for stage in self.stages:
            stage.gather(step, self._table_gradient(stage.index, step))
        self._work_s, self._work_cpu_s = time.perf_counter() - began, time.thread_time() - cpu + self._second_cpu_s
        return rest

    def make_room(self, step: int) -> list[tuple[int, Action]]:
        """As `work`, of a step of which this lane computes nothing, but takes the gradients of others."""
        for stage in self.stages:
            stage.make_room(step)
        actions = interleave(self.config.training_schedule, len(self.stages), self.config.pipeline.microbatches)
        return [(index, action) for index, action in actions if isinstance(action, (ReduceNorm, BroadcastNorm, Step))]

    def _computes(self, index: int, action: Action, step: int) -> bool:
        """Do it, if it is one of those that make the step's gradients; whether it was."""
        match action:
            case Forward() | Backward() | InputGradient():
                if together := computed_now(self.config.training_schedule, action, self.config.pipeline.microbatches):
                    self._together(index, step, action, together)
            case WeightGradient():
                self._weight_gradient(index, action.microbatch)
            case _:
                return False
        return True

    def finish(self, step: int, rest: list[tuple[int, Action]], *, computed: bool = True) -> float:
        """The rest of a step; returns its loss. computed: this lane has done it, so there is something to record."""
        began, cpu, loss = time.perf_counter(), time.thread_time(), float("nan")
        for index, action in rest:
            match action:
                case ReduceNorm():
                    self._reduce_norm(index, step)
                case BroadcastNorm():
                    self._broadcast_norm(index, step)
                case Step():
                    with self.watches[index].measure("compute"):
                        loss, stats = self.stages[index].finish(step, self._squares.pop(index, None))
                    seconds = self._work_s + time.perf_counter() - began
                    cpu_s = self._work_cpu_s + time.thread_time() - cpu
                    if computed:
                        self._record(index, step, loss, stats.grad_norm, seconds, cpu_s)
                case _:
                    raise AssertionError(action)
        self._train_s += self._work_s + time.perf_counter() - began
        self._cpu_s += self._work_cpu_s + time.thread_time() - cpu
        return loss

    def choose_subspaces(self, step: int) -> None:
        """Where behind that step all lanes of chunks do."""
        for stage in self.stages:
            if stage.chunk and step == stage.chunk.gathering_step:
                stage.chunk.choose_subspaces(step)

    def _together(self, index: int, step: int, action: Forward | Upward, microbatches: Sequence[int]) -> None:
        """One microbatch, or the two of a pair."""
        if isinstance(action, Forward):
            given = [self._input(index, step, microbatch, Kind.ACTIVATION) for microbatch in microbatches]
            forward = self.stages[index].forward
            numbered = zip(microbatches, given, strict=True)
            made = self._compute(index, [partial(forward, step, microbatch, *each) for microbatch, each in numbered])
            for microbatch, (ids_BS, _), out in zip(microbatches, given, made, strict=True):
                if out is not None:
                    self._pass_on(index, out, ids_BS, step, microbatch, Kind.ACTIVATION)
        else:
            self._backward(index, step, microbatches, split=isinstance(action, InputGradient))

    def _compute(self, index: int, works: Sequence[Callable[[], T]]) -> list[T]:
        stage, watch = self.stages[index], self.watches[index]
        with watch.measure("compute"):
            if len(works) == 1:
                return [works[0]()]
            found = stage.in_turns(works[0], works[1])
        watch.add_cpu("compute", stage.second_cpu_s)
        self._second_cpu_s += stage.second_cpu_s
        return list(found)

    def _input(self, index: int, step: int, microbatch: int, kind: Kind) -> tuple[np.ndarray, ReceivedTensor | None]:
        stage = self.stages[index]
        if not stage.upstream_endpoint:
            return draw(self.corpus, self.config, kind, step, microbatch, self.lane), None
        with self.watches[index].measure("codec"):
            return stage.upstream_endpoint.unpack_activation(self._take(index, kind))

    def _pass_on(self, index: int, out: Encoded, ids_BS: np.ndarray, step: int, microbatch: int, kind: Kind) -> None:
        port = self.stages[index].downstream_endpoint
        assert port
        with self.watches[index].measure("codec"):
            message = port.pack_activation(out, ids_BS, step, microbatch, kind)
        self._send(index, index + 1, message)

    def _backward(self, index: int, step: int, microbatches: Sequence[int], *, split: bool) -> None:
        """`split`: leave the weight gradients out."""
        stage, watch = self.stages[index], self.watches[index]
        works: list[Callable[[], Tensor | None]] = []
        for microbatch in microbatches:
            dz_out, loss_sum = None, None
            if stage.downstream_endpoint:
                message = self._take(index, Kind.GRADIENT)
                loss_sum = message.loss_sum
                with watch.measure("codec"):
                    dz_out = stage.downstream_endpoint.unpack_gradient(message)
            works.append(partial(stage.input_gradient if split else stage.backward, microbatch, dz_out, loss_sum))
        made = self._compute(index, works)
        if not stage.upstream_endpoint:
            return
        for microbatch, dz_in in zip(microbatches, made, strict=True):
            assert dz_in is not None
            with watch.measure("codec"):
                message = stage.upstream_endpoint.pack_gradient(dz_in, step, microbatch, stage.losses[microbatch])
            self._send(index, index - 1, message)
        if (half := stage.gradient_to_send(step)) is not None:
            assert stage.upstream_endpoint.table
            with watch.measure("codec"):
                message = stage.upstream_endpoint.table.pack_gradient(half, step)
            self._send(index, index - 1, message)

    def _weight_gradient(self, index: int, microbatch: int) -> None:
        with self.watches[index].measure("compute"):
            self.stages[index].weight_gradient(microbatch)

    def _reduce_norm(self, index: int, step: int) -> None:
        stage = self.stages[index]
        below = 0.0 if stage.last else sum_of_squares_in(self._take(index, Kind.GRADIENT_NORM))
        with self.watches[index].measure("compute"):
            self._squares[index] = stage.sum_of_squares(step, below)
        if not stage.first:
            self._send(index, index - 1, norm_message(step, self._squares[index]))

    def _broadcast_norm(self, index: int, step: int) -> None:
        stage = self.stages[index]
        if not stage.first:
            self._squares[index] = sum_of_squares_in(self._take(index, Kind.GRADIENT_NORM))
        if not stage.last:
            self._send(index, index + 1, norm_message(step, self._squares[index]))

    def _table_gradient(self, index: int, step: int) -> Tensor | None:
        stage = self.stages[index]
        if not stage.awaits_gradient(step):
            return None
        assert stage.downstream_endpoint
        assert stage.downstream_endpoint.table
        with self.watches[index].measure("codec"):
            return stage.downstream_endpoint.table.unpack_gradient(self._take(index, Kind.PROJECTOR_GRADIENT))

    def evaluate(self, step: int) -> float:
        """The mean loss of a held-out token, with the weights as they are."""
        count, loss_sum = self.config.evaluation_microbatches, 0.0
        for index, action in interleave(get_schedule("evaluation"), len(self.stages), count):
            assert isinstance(action, Evaluate)
            loss_sum += self._evaluate(index, step, action.microbatch)
        tokens = count * self.config.microbatch_size * self.config.lane_tokens
        for metrics in self._metrics:
            metrics.write("evaluation", step=step, val_loss=loss_sum / tokens, tokens=tokens)
        return loss_sum / tokens

    def _evaluate(self, index: int, step: int, microbatch: int) -> float:
        """One forward of one stage; returns the loss sum if it is the last stage's."""
        ids_BS, received = self._input(index, step, microbatch, Kind.EVALUATION)
        with self.watches[index].measure("compute"):
            out = self.stages[index].evaluate(step, microbatch, ids_BS, received)
        if not isinstance(out, Encoded):
            return out
        self._pass_on(index, out, ids_BS, step, microbatch, Kind.EVALUATION)
        return 0.0

    def _send(self, sender: int, receiver: int, message: Message) -> None:
        self._mail.setdefault((receiver, message.kind), deque()).append(message)
        name = f"boundary {min(sender, receiver)}-{max(sender, receiver)}"
        rows = self.sent[sender].setdefault(name, Counter())
        for key, value in accounted(message, self._chunk_bytes).items():
            rows[key] += value

    def _take(self, receiver: int, kind: Kind) -> Message:
        return self._mail[receiver, kind].popleft()

    def _record(self, index: int, step: int, loss: float, grad_norm: float, seconds: float, cpu_s: float) -> None:
        if not self._metrics:
            return
        tokens = self.config.tokens_per_step
        self._metrics[index].write(
            "step",
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            tokens=tokens,
            seconds=round(seconds, 6),
            cpu_s=round(cpu_s / len(self.stages), 6),  # an equal share each
            loop_cpu_s=0.0,  # there is no event loop
            tokens_per_s=round(tokens / seconds, 3),
            sent_bytes={name: dict(rows) for name, rows in (self.sent[index] | self.sent_to_lanes[index]).items()},
            dense_bytes=len(self.sent[index]) * dense_bytes_one_way(width=self.stages[index].width, tokens=tokens),
            rss_bytes=rss_bytes(),
            codec=self.stages[index].measures(),
            dictionaries=self.stages[index].dictionaries(),
            **self.watches[index].take(),
        )

    def give(self, index: int, contribution: bytes) -> None:
        """Stage `index` gives all other lanes what it contributes to a round; counted without what frames add."""
        for other in range(self.config.lanes.count):
            if other != self.lane:
                ends = sorted((self.lane, other))
                rows = self.sent_to_lanes[index].setdefault(f"lateral {index}: lane {ends[0]}-{ends[1]}", Counter())
                rows["averaging"] += len(contribution)

    def count_context(self, index: int, other: int, message: Message) -> None:
        """Stage `index` gives keys and values, or what comes back for them, to its own stage in another lane."""
        rows = self.sent_to_lanes[index].setdefault(context_link_name(index, self.lane, other), Counter())
        rows.update(accounted(message, self._chunk_bytes))

    def record_round(self, index: int, used: RoundUsed) -> None:
        """What stage `index` made of a round. Nobody had to be waited for."""
        if self._metrics:
            self._metrics[index].write("round", **used.record(), waited_s=0.0)

    def record_checkpoint(self, index: int, completed: int, size: int, seconds: float) -> None:
        """Stage `index` has written one, of so many bytes."""
        if self._metrics:
            self._metrics[index].write("checkpoint", completed=completed, bytes=size, seconds=round(seconds, 6))

    def record_fault(self, index: int, line: str) -> None:
        """A checkpoint of stage `index` that could not be written, and is told of."""
        print(f"stage {index}: {line}", file=sys.stderr, flush=True)
        if self._metrics:
            self._metrics[index].write("fault", code="checkpoint", reason=line)

    def close(self) -> None:
        """Close the records, also of a run that failed."""
        for each in (*self._metrics, *self._watching):
            each.close()

    def end(self) -> None:
        """Write the records' last lines."""
        all_sent = [down | across for down, across in zip(self.sent, self.sent_to_lanes, strict=True)]
        for stage, metrics, watch, sent in zip(
            self.stages, self._metrics, self.watches, all_sent, strict=bool(self._metrics)
        ):
            metrics.write(
                "end",
                stage=stage.index,
                layers=len(stage.layers),
                parameters=stage.parameters(),
                steps=self.config.run.steps,
                train_s=round(self._train_s, 6),
                cpu_s=round(self._cpu_s / len(self.stages), 6),  # one process: an equal share each
                **watch.total,
                peak_rss_bytes=peak_rss_bytes(),
                state_bytes=stage.state_bytes(),
                state_sha256=stage.state_sha256(),
                links=[_link_record(stage.index, self.lane, name, rows) for name, rows in sent.items()],
            )
            metrics.close()


def _link_record(stage: int, lane: int, name: str, rows: Counter[str]) -> dict[str, object]:
    if is_lateral(name):
        way: dict[str, object] = {"peer_lane": other_lane(name, lane)}
    elif is_context(name):
        way = {"peer_lane": other_lane(name, lane), "direction": CONTEXT_LINK}
    else:
        boundary = int(name.removeprefix("boundary ").partition("-")[0])
        way = {"boundary": boundary, "direction": "forward" if boundary == stage else "backward"}
    return {
        **way,
        "link": "none",
        "configured_bits_per_s": None,
        "measured_bits_per_s": None,
        "busy_s": 0.0,
        "utilisation": None,
        "sent_bytes": dict(rows),
        "received_bytes": 0,
    }
