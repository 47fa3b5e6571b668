"""Keys and values of a stage that computes nothing: real messages of the method's size over the real links between
lanes, given and waited for in the order in which a node does it, and sleep in the place of what is computed between.

What lasts how long is what a plan simulates (chunks_plan.py), of this node's lane. So a benchmark shows what the
simulation leaves out: frames, threads, credit and the links' own pace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...sim.links.context_exchange import ContextWork, LaneLayer
from ...sim.links.pipeline import StageTimes
from ..config import RunConfig
from ..context.chunked_model import ChunkedModel
from ..context.exchange import ContextKey, ContextTransport
from ..context.turns import Turns
from .chunks_plan import SETTLED, StageExchange
from .context_plan import context_coder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Last = Callable[[float], None]  # so many seconds


class EmulatedChunk(ChunkedModel):
    """A `ChunkedModel`'s place in a node, without a model. times, layers: of all stages, of one lane that waits for
    nobody; first: this stage's first layer in the whole model. inner: as for `StageExchange`."""

    def __init__(  # not super's: no model
        self,
        config: RunConfig,
        architecture: PretrainedConfig,
        times: Sequence[StageTimes],
        layers: Sequence[int],
        *,
        stage: int,
        lane: int,
        first: int,
        inner: bool,
    ) -> None:
        found = StageExchange(config, architecture, times, layers, inner=inner).work(stage)
        assert found
        self._work: ContextWork = found
        self._own: LaneLayer = self._work.lanes[lane]
        self._other_s = found.other_s
        self._layout, self._numbers = config.chunk_layout, range(first, first + layers[stage])
        self._coder, _ = context_coder(config, architecture)
        of_weights = self._work.layers * (self._own.before_s + self._own.after_s) + self._other_s
        self._weights = times[stage].weight_gradient_s / (self._work.backward * of_weights)
        self.turns = Turns()
        self._transport: ContextTransport | None = None
        self._bodies: dict[int, bytes] = {}

    def connect(self, transport: ContextTransport) -> None:
        self._transport = transport

    def body_bytes(self, key: ContextKey) -> int:
        """As narrow as the method gets."""
        return self._coder.body_bytes(replace(key, step=SETTLED))

    @property
    def gathering_step(self) -> int | None:
        """Nothing is learned."""
        return None

    def break_off(self) -> None:
        """Nothing is added up."""

    def measures(self) -> dict[str, float]:
        return {}

    def forward(self, step: int, microbatch: int, last: Last) -> None:
        """Raises what the transport raises."""
        own = self._own
        for layer in self._numbers:
            last(own.before_s)
            for segment in own.gives:
                for lane in self._layout.users(segment):
                    self._send(lane, _key(step, microbatch, layer, segment))
            last(own.own_s)
            self.turns.hand_over()
            for taken in own.takes:
                self._receive(taken.owner, _key(step, microbatch, layer, taken.segment))
                last(taken.attend_s)
            last(own.after_s)
        last(self._other_s)

    def backward(self, step: int, microbatch: int, last: Last, *, split: bool) -> None:
        """split: weight gradients come later. Raises what the transport raises."""
        own, times = self._own, self._work.backward
        now = times * (1 - self._weights) if split else times  # of what has weights
        last(now * self._other_s)
        for layer in reversed(self._numbers):
            last(now * own.after_s)
            for taken in own.takes:
                last(times * taken.attend_s)
                self._send(taken.owner, _key(step, microbatch, layer, taken.segment, gradient=True))
            last(times * own.own_s)
            self.turns.hand_over()
            for segment in own.gives:
                for lane in self._layout.users(segment):
                    self._receive(lane, _key(step, microbatch, layer, segment, gradient=True))
            last(now * own.before_s)

    def _send(self, lane: int, key: ContextKey) -> None:
        assert self._transport, "not connected"
        nbytes = self.body_bytes(key)
        self._transport.send(lane, key, self._bodies.setdefault(nbytes, bytes(nbytes)))

    def _receive(self, lane: int, key: ContextKey) -> None:
        assert self._transport, "not connected"
        self._transport.receive(lane, key)


def _key(step: int, microbatch: int, layer: int, segment: int, *, gradient: bool = False) -> ContextKey:
    return ContextKey(
        step=step, evaluation=False, microbatch=microbatch, layer=layer, segment=segment, gradient=gradient
    )
