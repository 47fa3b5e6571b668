"""A stage that computes nothing and takes the time of one that does: real processes, schedules, links and bytes, at the
speed of a machine that is not here.

With `compute.emulate` each forward and backward lasts as long as on the emulated machine; the node's compute thread
sleeps meanwhile; messages have the exact size that the codec gives them (message_sizes.py) and zeros inside. All the
rest is as in training: threads, queues, sessions, chunks, acknowledgements, the link model, gRPC. So throughput over a
real 300 Mb/s can be measured on a laptop, for a model and a device that it does not have. Nothing is learned and no
loss means anything.

A thread that sleeps wakes up late, and the more so the busier the machine. How much later than asked for is in each
step's record (`late_s` beside `emulated_s`): a benchmark refuses a run in which it matters. Why not shorten the next
sleep by what the last one was late: then the time that a busy machine takes away from the other threads would be hidden
too.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.messages import Kind, Message
from ..boundary.endpoints import DownstreamEndpoint, Encoded, ReceivedTensor, UpstreamEndpoint
from ..config import RunConfig
from ..data import Corpus
from ..optim import OptimStats
from ..stage import Stage
from ..stage_state import StageSnapshot, StateError
from .contribution_sizes import sized_averager
from .emulated_chunk import EmulatedChunk
from .emulated_machine import EmulatedMachine
from .emulated_rounds import EmulatedAverager
from .message_sizes import Sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOTHING = torch.empty(0)


def _check_size(message: Message, wanted: Message) -> None:
    """Raises RemoteProtocolError for a message that has not the size of what was agreed."""
    got, due = message.head.data_bytes, wanted.head.data_bytes
    if got != due:
        kind = message.kind.name.lower()
        raise RemoteProtocolError(
            Fault.PAYLOAD, f"{kind} of step {message.step}, microbatch {message.microbatch}: {got} bytes, {due} are due"
        )


class _SizedTable:
    """In the place of a learned table's end: its gradient's message, of the right size."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def pack_gradient(self, gradient: Tensor, step: int) -> Message:
        del gradient
        return self._sizes.projector_gradient(step)

    def unpack_gradient(self, message: Message) -> Tensor:
        _check_size(message, self._sizes.projector_gradient(message.step))
        return _NOTHING


class SizedDownstreamEndpoint(DownstreamEndpoint):
    """The sender's half, of messages without content."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.shape, dtype=torch.float32, device=torch.device("cpu"))
        self.sizes = sizes
        if self.table:
            self.table = _SizedTable(sizes)  # pyright: ignore[reportAttributeAccessIssue] (what a node asks of it)

    def pack_activation(self, out: Encoded, ids_BS: np.ndarray, step: int, microbatch: int, kind: Kind) -> Message:
        del out, ids_BS
        return self.sizes.activation(step, microbatch, kind)

    def unpack_gradient(self, message: Message) -> Tensor:
        _check_size(message, self.sizes.gradient(message.step, message.microbatch))
        return _NOTHING

    def measures(self) -> dict[str, float]:
        return {}


class SizedUpstreamEndpoint(UpstreamEndpoint):
    """The receiver's half, of messages without content."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.shape, dtype=torch.float32, device=torch.device("cpu"))
        self.sizes = sizes
        if self.table:
            self.table = _SizedTable(sizes)  # pyright: ignore[reportAttributeAccessIssue] (what a node asks of it)

    def unpack_activation(self, message: Message) -> tuple[np.ndarray, ReceivedTensor]:
        _check_size(message, self.sizes.activation(message.step, message.microbatch, message.kind))
        shape = self.sizes.shape
        ids_BS = np.zeros((shape.microbatch_size, shape.sequence_length + 1), np.int32)
        return ids_BS, ReceivedTensor(z_BTW=_NOTHING)

    def pack_gradient(self, dz_BTW: Tensor, step: int, microbatch: int, loss_sum: float) -> Message:
        del dz_BTW
        return self.sizes.gradient(step, microbatch, loss_sum)

    def measures(self) -> dict[str, float]:
        return {}


class EmulatedStage(Stage):
    """Stage `index`, with a `Stage`'s methods and none of its tensors."""

    def __init__(  # not super's: no model
        self, config: RunConfig, architecture: PretrainedConfig, index: int, lane: int = 0
    ) -> None:
        assert config.compute.emulate is not None
        self.config, self.index = config, index
        self.first, self.last = index == 0, index == config.pipeline.stages - 1
        self.width = architecture.hidden_size
        self.token_table_digest = ""
        self.upstream_endpoint = None if self.first else SizedUpstreamEndpoint(Sizes(config, architecture, index - 1))
        self.downstream_endpoint = None if self.last else SizedDownstreamEndpoint(Sizes(config, architecture, index))
        machine = EmulatedMachine.parse(config.compute.emulate)
        layers, times = machine.layers(config, architecture), machine.times(config, architecture)
        self.layers, self.times = layers[index], times[index]
        self.averager, self.lane = None, lane
        if config.lanes.count > 1:
            sizes = sized_averager(config, architecture, index, self.layers, lane=lane, inner=machine.part)
            self.averager = EmulatedAverager(sizes, steps=config.run.steps)
        self._exchange: EmulatedChunk | None = None
        if config.context.method and self.layers:
            where = {"stage": index, "lane": lane, "first": self.layers[0], "inner": machine.part}
            self._exchange = EmulatedChunk(config, architecture, times, [len(each) for each in layers], **where)
        self.chunk = self._exchange
        self.completed = 0
        self.losses: dict[int, float] = {}
        self._gradients = 0  # microbatches of this step whose input gradient is there
        self._paced_s = self._late_s = 0.0

    def _last(self, seconds: float) -> None:
        """As long as the work would take."""
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            time.sleep(left)
        self._paced_s += seconds
        self._late_s += time.monotonic() - began - seconds

    def _sent(self) -> Encoded | None:
        return None if self.last else Encoded(z_BTW=_NOTHING)

    def forward(
        self, step: int, microbatch: int, ids_BS: np.ndarray, received: ReceivedTensor | None
    ) -> Encoded | None:
        del ids_BS, received
        if self._exchange:
            self._exchange.forward(step, microbatch, self._last)
        else:
            self._last(self.times.forward_s)
        return self._sent()

    def backward(self, microbatch: int, dz_out: Tensor | None, loss_sum: float | None) -> Tensor | None:
        del dz_out, loss_sum
        return self._backward(microbatch, split=False)

    def input_gradient(self, microbatch: int, dz_out: Tensor | None, loss_sum: float | None) -> Tensor | None:
        del dz_out, loss_sum
        return self._backward(microbatch, split=True)

    def weight_gradient(self, microbatch: int) -> None:
        del microbatch
        self._last(self.times.weight_gradient_s)

    def _backward(self, microbatch: int, *, split: bool) -> Tensor | None:
        if self._exchange:
            self._exchange.backward(self.completed, microbatch, self._last, split=split)
        else:
            self._last(self.times.backward_s - (self.times.weight_gradient_s if split else 0.0))
        self._gradients += 1
        self.losses[microbatch] = 0.0
        return None if self.first else _NOTHING

    def gradient_to_send(self, step: int) -> Tensor | None:
        due = (
            self.upstream_endpoint
            and self.upstream_endpoint.table
            and self._gradients == self.config.pipeline.microbatches
        )
        return _NOTHING if due and self._sizes_above.projector_gradient_due(step) else None

    def awaits_gradient(self, step: int) -> bool:
        port = self.downstream_endpoint
        return isinstance(port, SizedDownstreamEndpoint) and port.sizes.projector_gradient_due(step)

    @property
    def _sizes_above(self) -> Sizes:
        assert isinstance(self.upstream_endpoint, SizedUpstreamEndpoint)
        return self.upstream_endpoint.sizes

    def gathers(self, step: int) -> bool:
        del step
        return False

    def gather(self, step: int, table_gradient: Tensor | None) -> None:
        del step, table_gradient

    def sum_of_squares(self, step: int, below: float = 0.0) -> float:
        del step
        return below

    def finish(self, step: int, sum_of_squares: float | None = None) -> tuple[float, OptimStats]:
        del sum_of_squares
        self._last(self.times.step_s)
        self.losses.clear()
        self._gradients = 0
        self.completed = step + 1
        return 0.0, OptimStats(grad_norm=0.0, clip_coefficient=1.0, muon_lr=0.0, adamw_lr=0.0)

    def evaluate(
        self, step: int, microbatch: int, ids_BS: np.ndarray, received: ReceivedTensor | None
    ) -> Encoded | float:
        del step, microbatch, ids_BS, received
        return self._sent() or 0.0

    def measures(self) -> dict[str, float]:
        """Of the last step: seconds that compute was to take, and how much more it took."""
        figures = {"emulated_s": self._paced_s, "late_s": self._late_s}
        self._paced_s = self._late_s = 0.0
        return figures

    def dictionaries(self) -> list[dict[str, Any]]:
        return []

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def snapshot(self) -> StageSnapshot:
        raise StateError(f"stage {self.index} computes nothing (compute.emulate), so there is no state to keep")

    def restore(self, snapshot: StageSnapshot) -> None:
        del snapshot
        raise StateError(f"stage {self.index} computes nothing (compute.emulate), so there is no state to restore")

    def parameters(self) -> int:
        return 0

    def state_sha256(self) -> str:
        return hashlib.sha256(b"").hexdigest()


class EmptyCorpus(Corpus):
    """Token ids where nobody reads them."""

    def __init__(self, config: RunConfig) -> None:
        length, sequences = config.data.sequence_length, config.data.heldout_sequences
        heldout = np.zeros(length * sequences + 1, np.int32)
        super().__init__(
            heldout, name="an emulated run", digest="", sequence_length=length, heldout_sequences=sequences
        )

    def _sequences(self, first: int, count: int) -> np.ndarray:
        del first
        return np.zeros((count, self.sequence_length + 1), np.int32)
