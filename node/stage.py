"""The compute of one pipeline stage: its slice of the model, its halves of two codecs, its optimizer.

Everything here is synchronous, single-threaded (in `in_turns` two threads, of which one stands still) and knows nothing
of links: a method takes tensors and gives tensors. That is what makes the swarm and the one-process reference run
bit-identical: both call the same methods of the same objects in the same order, and only what lies between the calls
differs.

Losses are *sums* over tokens, and gradients therefore too; the optimizer divides once by the step's tokens. Means per
microbatch would make gradients so small that low-bit formats lose them, and would weigh microbatches unequally.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.anchors import Anchors
from ..compress.registry import parse_codec
from ..protocol.schedule import get_schedule, schedule_title
from .averaging.gradients import GradientAverager
from .averaging.stage_averager import averager_of
from .boundary.endpoints import DownstreamEndpoint, Encoded, ReceivedTensor, UpstreamEndpoint
from .boundary.learned_tables import gradient_due, moves_after
from .codec_start import begin_with
from .config import RunConfig
from .constrained_stage import constrain
from .context.chunked_model import ChunkedModel, with_chunks
from .context.stage_tokens import StageTokens
from .model import StageModel, WeightGradients, build_stage
from .model.pull import pull
from .optim import OptimStats, StageOptimizer
from .stage_codec import boundary_of, known_tokens, stage_context, trained_parameters
from .stage_costs import stage_layers
from .stage_state import StageSnapshot, StageState, StateError, sha256_of
from .weight_versions import WeightVersions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..compress.codec_interface import Decoder, Encoder

T = TypeVar("T")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class _Saved:
    """What backward needs of one microbatch: the received leaf and the end of this stage's graph."""

    z_in: Tensor | None
    out: Tensor
    loss_sum: float | None  # of the last stage


class Stage:
    """Stage `index` of `config.pipeline.stages`.

    `forward` must be called once per microbatch, then `backward` once, or under a schedule that splits it
    `input_gradient` and `weight_gradient` in its place; `finish` ends a step. Shapes: ids (B, T+1) int32, of which the
    last column is a target only; z (B, T, W).
    """

    def __init__(self, config: RunConfig, architecture: PretrainedConfig, index: int, lane: int = 0) -> None:
        self.config = config
        self.index, self.lane = index, lane
        self._layout, self._ids_before = config.chunk_layout, config.ids_before
        self.first, self.last = index == 0, index == config.pipeline.stages - 1
        self.device = torch.device(config.compute.device)
        compute_dtype = DTYPES[config.compute.dtype]
        self.dtype = torch.float64 if compute_dtype is torch.float64 else torch.float32
        self._autocast = compute_dtype is torch.bfloat16
        self._codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward).codec
        self._all_layers = architecture.num_hidden_layers
        self.layers = stage_layers(config, architecture)[index]
        self.chunk: ChunkedModel | None = None  # of sequences whose other parts are in other lanes
        self.model = build_stage(
            with_chunks(copy.deepcopy(architecture)) if config.context.method else architecture,
            stage=index,
            stages=config.pipeline.stages,
            seed=config.run.seed,
            dtype=self.dtype,
            device=self.device,
            checkpoint=config.model.path if config.model.pretrained else None,
            activation_checkpointing=config.compute.activation_checkpointing,
            compile=config.compute.compile,
            deferred=get_schedule(config.pipeline.schedule).splits,
            constrain=self._constrain if self._codec.constrains or config.context.method else None,
            layers=self.layers,
        )
        self.width = self.model.width
        self.upstream_endpoint: UpstreamEndpoint | None = None
        self.downstream_endpoint: DownstreamEndpoint | None = None
        context = stage_context(config, index, self.model, dtype=self.dtype)
        self.token_table_digest, self.tokens = known_tokens(
            self._codec, context, self.model, also=self.chunk.generated() if self.chunk else ()
        )
        if not self.first:
            codec, of_boundary, shape = boundary_of(config, context, index - 1, self.tokens, lane)
            self.receiver = codec.codec.decoder(of_boundary).to(self.device, self.dtype)
            self.upstream_endpoint = UpstreamEndpoint(shape, dtype=self.dtype, device=self.device)
        if not self.last:
            codec, of_boundary, shape = boundary_of(config, context, index, self.tokens, lane)
            self.sender = codec.codec.encoder(of_boundary).to(self.device, self.dtype)
            self.downstream_endpoint = DownstreamEndpoint(shape, dtype=self.dtype, device=self.device)
        receiver, sender = None if self.first else self.receiver, None if self.last else self.sender
        layers = stage_layers(config, architecture)
        ends = {"below": self.downstream_endpoint, "above": self.upstream_endpoint}
        begin_with(config, layers, index, tokens=self.tokens, sender=sender, receiver=receiver, **ends)
        self.trained = trained_parameters(index, self.model, tokens=self.tokens, receiver=receiver, sender=sender)
        moves = bool(self.downstream_endpoint and (table := self.downstream_endpoint.table) and table.table.every)
        self.versions: WeightVersions | None = None
        if config.pipeline.delay:
            owner = self.sender if moves else None
            self.versions = WeightVersions(self.trained, predict=config.pipeline.predict, sender=owner)
            self.trained = self.versions.masters
        self.optimizer = StageOptimizer(
            self.trained, config.optim, total_steps=config.run.steps, extended=config.run.extended
        )
        self._table_gradient: Tensor | None = None  # of the table below, whole, from `gather` to the step
        self.averager = averager_of(
            config,
            index,
            lane,
            parameters=self.trained,
            sender=None if self.last else self.sender,
            table=self.downstream_endpoint and self.downstream_endpoint.table,
            table_gradient=lambda: self._table_gradient,
        )
        self._state = StageState(
            stage=index,
            trained=self.trained,
            optimizer=self.optimizer,
            averager=self.averager,
            tokens=self.tokens,
            receiver=receiver,
            sender=sender,
            ends={name: end for port in self._ports for name, end in port.ends.items()},
            memories={name: memory for port in self._ports for name, memory in port.memories.items()},
            versions=self.versions,
        )
        self._backwards = 0
        self._saved: dict[tuple[int, int], _Saved] = {}  # by step and microbatch
        self._owed: dict[int, WeightGradients] = {}  # by microbatch, between its input gradient and its weight gradient
        self._begun = 0  # steps whose first forward is done: one more than are finished, or two where steps overlap
        self.completed = 0  # steps that are finished
        self.losses: dict[int, float] = {}  # microbatch -> sum of token losses, of the backwards since the last finish

    @property
    def _ports(self) -> list[UpstreamEndpoint | DownstreamEndpoint]:
        return [port for port in (self.upstream_endpoint, self.downstream_endpoint) if port]

    @property
    def _halves(self) -> list[Decoder | Encoder]:
        return ([] if self.first else [self.receiver]) + ([] if self.last else [self.sender])

    def _constrain(self, model: StageModel) -> None:
        if self._codec.constrains:
            context = stage_context(self.config, self.index, model, dtype=self.dtype)
            constrain(self._codec, model, replace(context, device="cpu"), self._all_layers)  # where weights are made
        if self.config.context.method:
            self.chunk = ChunkedModel(self.config, model, self.lane, DTYPES[self.config.compute.dtype])

    def _precision(self) -> AbstractContextManager[object]:
        if self._autocast:
            # Its cache of weights in bfloat16 is one for all threads, and would tie the graphs of two microbatches.
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=self.chunk is None)
        return nullcontext()

    def _run(self, ids_BS: np.ndarray, z_in: Tensor | None) -> Tensor:
        """This stage's part of the model: z for the next stage, or the loss sum (a scalar) of the last."""
        tokens = StageTokens.of(self._layout.apart(ids_BS, self.lane, self._ids_before), self.device)
        out = self._computed(tokens.inputs_BT, z_in, tokens.known if self.chunk else ())
        return F.cross_entropy(out.flatten(0, 1), tokens.targets_BT.flatten(), reduction="sum") if self.last else out

    def _computed(self, inputs_BT: Tensor, z_in: Tensor | None, known: Sequence[tuple[Tensor, int]] = ()) -> Tensor:
        """z for the next stage, or the last one's logits (B, T, V). known: the inputs with those before them, where
        they are parts of sequences, as `Anchors.once` takes them."""
        # The codec stays out of autocast: a projector rounded to bfloat16 is off the manifold.
        with self.tokens.once(inputs_BT, known) if isinstance(self.tokens, Anchors) else nullcontext():
            hidden = inputs_BT if z_in is None else self.receiver.decode(z_in, inputs_BT)
            with self._precision():
                out = self.model(hidden)
            return out.to(self.dtype) if self.last else self.sender.encode(out.to(self.dtype), inputs_BT)

    def _begin(self, step: int, microbatch: int, *, evaluation: bool = False) -> None:
        if self.chunk:
            self.chunk.begin(step, microbatch, evaluation=evaluation)

    def in_turns(
        self, first: Callable[[], T], second: Callable[[], T], on_first: Callable[[T], None] | None = None
    ) -> tuple[T, T]:
        """Two microbatches' `forward`, `backward` or `input_gradient`, the one where the other waits for other lanes;
        on_first: is told of the first one's result at once. The bits are those of one after the other."""
        if self.chunk:
            return self.chunk.turns.both(first, second, on_first)
        one = first()
        if on_first:
            on_first(one)
        return one, second()

    @property
    def second_cpu_s(self) -> float:
        """What the second microbatch of the last `in_turns` took of the CPU on a thread of its own."""
        return self.chunk.turns.second_cpu_s if self.chunk else 0.0

    def forward(
        self, step: int, microbatch: int, ids_BS: np.ndarray, received: ReceivedTensor | None
    ) -> Encoded | None:
        """What to send on, or None from the last stage, which knows the loss now."""
        if self.versions:
            self.versions.use(step)
        delta = self._publish(step) if step >= self._begun else b""
        self._begun = max(self._begun, step + 1)
        z_in = self._accept(received)
        if z_in is not None:
            z_in.requires_grad_(True)
        self._begin(step, microbatch)
        out = self._run(ids_BS, z_in)
        self._saved[step, microbatch] = _Saved(z_in, out, float(out.detach()) if self.last else None)
        if self.last:
            return None
        return self._encoded(out.detach(), delta)

    def _publish(self, step: int) -> bytes:
        """At a step's start, what the stage below has to know of this boundary's table before it can decode."""
        table = self.downstream_endpoint and self.downstream_endpoint.table
        if not table:
            return b""
        known = self.versions and self.versions.table(step)
        published = table.publish(self.sender.master if known is None else known, step)
        if published is None:
            return b""
        delta, shipped = published
        self.sender.use_table(shipped)
        return delta

    def _accept(self, received: ReceivedTensor | None) -> Tensor | None:
        if received is None:
            return None
        if received.table is not None:
            self.receiver.use_table(received.table)
        return received.z_BTW

    def _encoded(self, z_BTW: Tensor, delta: bytes = b"") -> Encoded:
        assert self.downstream_endpoint
        table = self.downstream_endpoint.table
        return Encoded(z_BTW=z_BTW, coded_with=table.coded_with if table else {}, delta=delta)

    def backward(self, microbatch: int, dz_out: Tensor | None, loss_sum: float | None) -> Tensor | None:
        """dL/dz (B, T, W) for the stage above, or None from the first stage.

        `dz_out` and `loss_sum` come from the stage below; the last stage has its own. Of the step under way: those of
        the next one come after its `finish`.
        """
        saved = self._saved.pop((self.completed, microbatch))
        known = saved.loss_sum if self.last else loss_sum
        assert known is not None
        self.losses[microbatch] = known
        if self.versions:
            self.versions.use(self.completed)
        pull(saved.out, dz_out)
        self._backwards += 1
        return None if saved.z_in is None else saved.z_in.grad

    def input_gradient(self, microbatch: int, dz_out: Tensor | None, loss_sum: float | None) -> Tensor | None:
        """As `backward`, but the weight gradients of matrices are left for `weight_gradient`: what it returns can leave
        before they are computed. Everything else that learns, the tables too, has its gradient after it."""
        assert self.model.deferral, f"schedule '{schedule_title(self.config.pipeline.schedule)}' splits no backward"
        with self.model.deferral.putting_aside() as owed:
            dz_in = self.backward(microbatch, dz_out, loss_sum)
        self._owed[microbatch] = owed
        return dz_in

    def weight_gradient(self, microbatch: int) -> None:
        """The rest of that microbatch's backward; frees what it still held."""
        self._owed.pop(microbatch).add_up()

    def gradient_to_send(self, step: int) -> Tensor | None:
        """This stage's half of the gradient of the table above, once the step's last backward, or the first half of it,
        is done, where due."""
        table = self.upstream_endpoint and self.upstream_endpoint.table
        if self._backwards < self.config.pipeline.microbatches or not table or not gradient_due(table.table, step):
            return None
        return self.receiver.take_gradient()

    def awaits_gradient(self, step: int) -> bool:
        """Whether `finish` needs the other half of the gradient of the table below."""
        table = self.downstream_endpoint and self.downstream_endpoint.table
        return bool(table) and gradient_due(table.table, step)

    def gathers(self, step: int) -> bool:
        """Whether `gather` has to come before `finish`: the table below moves."""
        table = self.downstream_endpoint and self.downstream_endpoint.table
        return bool(table) and moves_after(table.table, step)

    def gather(self, step: int, table_gradient: Tensor | None) -> None:
        """Before `finish`: the whole gradient of the table below, of which `table_gradient` is the receiver's half,
        where `awaits_gradient` says so."""
        if self.gathers(step):
            self._table_gradient = self.sender.take_gradient(table_gradient)

    def sum_of_squares(self, step: int, below: float = 0.0) -> float:
        """Of the step's gradients, once they are all there, added to the sum of all stages below."""
        self._check_paid(step)
        return self.optimizer.sum_of_squares(step, below)

    def _check_paid(self, step: int) -> None:
        assert not self._owed, f"stage {self.index} ends step {step} without the weight gradients of {list(self._owed)}"

    def finish(self, step: int, sum_of_squares: float | None = None) -> tuple[float, OptimStats]:
        """The optimizers' steps; returns the mean token loss of the step and what the stage's optimizer did.
        sum_of_squares: of all stages' gradients, where these are clipped by the global norm."""
        tokens = self.config.tokens_per_step
        self._check_paid(step)
        self._backwards = 0
        loss = sum(self.losses[microbatch] for microbatch in sorted(self.losses)) / tokens
        self.losses.clear()
        averages = self.averager is not None and self.averager.mode.of_gradients
        lanes = self.averager.contributed if self.averager and averages else 1  # whose tokens the gradients are sums of
        if self.versions:
            self.versions.begin_step(step)
        stats = self.optimizer.step(step, lanes * tokens, sum_of_squares)  # first: it refuses what is not finite
        if self.gathers(step):
            assert self._table_gradient is not None, f"stage {self.index} ends step {step} without `gather`"
            rate = self.config.optim.muon_lr * self.optimizer.learning_rate(step)
            self.sender.learn(self._table_gradient, rate=rate)
            self._table_gradient = None
        for half in self._halves:
            half.end_step()
        if self.versions:
            self.versions.end_step(step, self.optimizer.state_tensors())
        self.completed = step + 1
        return loss, stats

    def make_room(self, step: int) -> None:
        """Before a round of gradients is used in a step of which this lane has computed nothing."""
        assert isinstance(self.averager, GradientAverager)
        self.averager.make_room()
        if self.gathers(step):
            self._table_gradient = torch.zeros_like(self.sender.master)

    def follow_to(self, completed: int) -> None:
        """So many steps are completed, by the rounds of other lanes."""
        self.completed = completed

    def enter(self, completed: int) -> None:
        """Train on after `completed` steps, the last of which this lane has not done: what it learned alone before them
        is as it was, as far as it means anything now."""
        assert self.averager
        self.averager.enter(completed)
        self.restore(self._state.moved(self.completed, completed))

    @torch.no_grad()
    def evaluate(
        self, step: int, microbatch: int, ids_BS: np.ndarray, received: ReceivedTensor | None
    ) -> Encoded | float:
        """What to send on, or the last stage's loss sum. Nothing is saved, nothing learns."""
        if self.versions:
            self.versions.use_master()
        self._begin(step, microbatch, evaluation=True)
        out = self._run(ids_BS, self._accept(received))
        return float(out) if self.last else self._encoded(out)

    @torch.no_grad()
    def infer(self, inputs_BT: Tensor, received: ReceivedTensor | None) -> Encoded | Tensor:
        """As `evaluate`, of tokens without targets: what to send on, or the last stage's logits (B, T, V)."""
        if self.versions:
            self.versions.use_master()
        out = self._computed(inputs_BT, self._accept(received))
        return out if self.last else self._encoded(out)

    def measures(self) -> dict[str, float]:
        """Figures of what the codecs learned here since the last call: the projector and the codebook of activations
        below, and of gradients above."""
        figures = ({} if self.last else self.sender.measures()) | (self.chunk.measures() if self.chunk else {})
        for name, port in (("activation", self.downstream_endpoint), ("gradient", self.upstream_endpoint)):
            if port:
                figures |= {f"{name}_{figure}": value for figure, value in port.measures().items()}
        return figures

    def dictionaries(self) -> list[dict[str, Any]]:
        """The dictionaries of which an end is here, with their versions now, for the records."""
        return [said for port in self._ports for said in port.dictionaries()]

    # -- state ------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that training has changed here, by name; meaningful between steps."""
        self._settle()
        return self._state.tensors(self.completed)

    def _settle(self) -> None:
        """What packing changes is part of the state: nothing of the steps so far may still wait for it."""
        for port in self._ports:
            port.pack_queue.flush()

    def snapshot(self) -> StageSnapshot:
        """A copy of the state as it is between two steps, on the compute thread: other threads may unpack the next
        step's messages and pack this one's meanwhile. Raises StateError in the middle of a step."""
        if self._begun > self.completed or self._saved or self._owed or self._backwards or self.losses:
            raise StateError(
                f"stage {self.index}: a snapshot in the middle of step {self.completed}; take it after the step's "
                "finish and before the next one's first forward"
            )
        self._settle()
        return self._state.snapshot(self.completed)

    def untrained(self, completed: int) -> StageSnapshot:
        """The state after `completed` steps in which this stage, just built, had no part: to be filled with what others
        learned (`node.checkpoints.convert`)."""
        return self._state.untrained(completed)

    def restore(self, snapshot: StageSnapshot) -> None:
        """Go on from `snapshot`, bit for bit; a step that was broken off leaves nothing behind.

        No message of that step may still be unpacked or packed by another thread: empty the queues first. Tables keep
        the later of their own generation and the snapshot's. Raises StateError, before anything is changed, for a
        tensor that is missing, foreign, or of another shape or dtype, and for a table that is not what its version
        says.
        """
        self._state.restore(snapshot)
        for port in self._ports:
            port.pack_queue.discard()
        self._saved.clear()
        self._owed.clear()
        self.losses.clear()
        self._begun, self._backwards, self._table_gradient = snapshot.completed, 0, None
        if self.chunk:
            self.chunk.break_off()
        self.completed = snapshot.completed

    def set_generation(self, generation: int) -> None:
        """The run's new generation, after `restore`: both tables are named with it. Raises LocalProtocolError for an
        earlier
        one. Numbers, and so the state's digest, stay as they are."""
        for port in self._ports:
            for end in port.ends.values():
                end.set_generation(generation)

    def state_sha256(self) -> str:
        """Digest of names, types, shapes and bits; equal digests mean bit-identical state. A function of training
        alone: a run that was rolled back, in a later generation, has that of an undisturbed one."""
        return sha256_of(self.state_tensors())

    def parameters(self) -> int:
        """Numbers in this stage's part of the model, without the codec's."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def state_bytes(self) -> int:
        """Bytes of weights and optimizer state."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_tensors().values())
