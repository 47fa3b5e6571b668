"""One gradient norm over all stages: the sum of squares goes up the pipeline, the total comes down.

Gradients are clipped by their norm, so that one bad batch cannot move the weights far. The norm of one stage depends on
which layers it has: another number of stages would clip otherwise. The norm of the whole model ("global norm": Pascanu
et al., arXiv 1211.5063) does not, but no stage knows it alone. Two passes, once a step, tell all of them:

- *Reduce*: once all gradients of the step are there, the last stage sends the sum of their squares to the stage above;
  each stage adds its own to what came from below. The order of the additions is the order of the stages, so the sum
  does not depend on time. Stage 0 has the total.
- *Broadcast*: the total goes down, and each stage takes its optimizer step when it has passed it on.

Why not a collective operation (all-reduce): it would want links that this chain does not have. Up, the number rides
behind the last gradients, and down it travels ahead of the next step's first activation, so under schedules with whole
backwards nobody waits for it. Under zero bubble it costs what that schedule gains at a step's end: stage 0 may no more
begin the next step while others compute weight gradients that they have put off (`thinpipe plan` says how much; Qi et
al., arXiv 2401.10241, step at once and take back the steps that should have been clipped: docs/decisions.md).

Nobody waits for ever, however short the buffers are. When a stage waits for the sum from below, it has sent all that
the stage below needs to get there, and has taken all that it sent before. When it waits for the total from above, the
same holds, as its own sum was the last thing that it sent. So either message is alone on its way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import ClassVar

from .actions import Action, BroadcastNorm, ReduceNorm, Schedule, Step
from .errors import Fault, RemoteProtocolError
from .messages import Kind, Message

NORM = struct.Struct("<d")  # the body of a GRADIENT_NORM message


class WithGlobalNorm(Schedule):
    """A training schedule whose stages agree on the norm before they step. A lone stage has nobody to agree with."""

    name: ClassVar[str] = "with global norm"

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.splits, self.pairs = schedule.splits, schedule.pairs

    def check(self, stage: int, stages: int, microbatches: int) -> None:
        self._schedule.check(stage, stages, microbatches)

    def peak_in_flight(self, stage: int, stages: int, microbatches: int) -> int:
        return self._schedule.peak_in_flight(stage, stages, microbatches)

    def _order(self, stage: int, stages: int, microbatches: int) -> Iterator[Action]:
        for action in self._schedule.actions(stage=stage, stages=stages, microbatches=microbatches):
            if isinstance(action, Step) and stages > 1:
                yield ReduceNorm()
                yield BroadcastNorm()
            yield action


def norm_message(step: int, sum_of_squares: float) -> Message:
    """What a stage tells its neighbour: up, the sum over its own gradients and all below; down, over all stages."""
    return Message(kind=Kind.GRADIENT_NORM, step=step, microbatch=0, body=NORM.pack(sum_of_squares))


def sum_of_squares_in(message: Message) -> float:
    """The number that it brings. Raises RemoteProtocolError for anything else, or more."""
    where = f"gradient norm of step {message.step}"
    more = message.codec or message.codec_header or len(message.token_ids) or len(message.dictionary)
    if more or message.loss_sum:
        raise RemoteProtocolError(Fault.UNEXPECTED, f"{where}: it brings more than a number")
    if len(message.body) != NORM.size:
        raise RemoteProtocolError(Fault.PAYLOAD, f"{where}: {len(message.body)} bytes, {NORM.size} are due")
    (value,) = NORM.unpack(message.body)
    if not (math.isfinite(value) and value >= 0):
        raise RemoteProtocolError(Fault.PAYLOAD, f"{where}: {value} is no sum of squares")
    return value
