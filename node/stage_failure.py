"""A failure that ends the run: which line tells of it, in this node and in all others.

A stage that fails tells its neighbours why before it leaves (`protocol.rollback`: Failed), they pass it on, and all end
within seconds with that reason as their last line. Why the others do not wait for a replacement, as they do for a stage
that was killed: a value that is not finite, a disk that is broken or a bug would meet the next process too, and nobody
who looks at another machine would learn of it. Nothing is lost by it: all start again with --resume, from the newest
common checkpoint. Who starts them again (`thinpipe up --restarts`, `thinpipe supervise`) does so once for one failure
of the computation, which replays as exactly as all that it computes, and more often where what is around it failed.

The record `failed` is for them: which stage, after how many steps, why, whether the others were told, and whether it
replays.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict

import torch

from ..compress.byte_format import CodecError
from ..protocol.control_messages import Failed
from ..protocol.errors import ProtocolError
from ..protocol.header import printable
from ..protocol.rollback_actions import Side
from .checkpoints.manifest import CheckpointError
from .data import SourceLost
from .lanes.contribution_store import ContributionError
from .links.control_stream import Control
from .links.dialling import NeighbourMismatch
from .links.link import LinkLost, LinkOffCap
from .optim import OptimizerError
from .preparation import BAD_INPUT
from .run_records import MetricsWriter
from .stage_state import StateError

# A CodecError in training is a value that must not be sent, and an OptimizerError one that must not be applied.
FAILED = (TimeoutError, LinkLost, CheckpointError, StateError, CodecError, OptimizerError, ProtocolError, OSError)
FAILED += (SourceLost, ContributionError)
# Not the computation, which is the same each time, but what is around it: a neighbour (TimeoutError is an OSError), a
# disk, a source of data, memory that others use too.
AROUND = (OSError, MemoryError, torch.OutOfMemoryError, LinkOffCap, CheckpointError, ContributionError, SourceLost)
FAREWELL_S = 5.0  # for all neighbours to be told; one whose connection has just broken dials again within 2 s


class StageFailed(RuntimeError):
    """Another stage has failed; the message says which one, called `name`, and why."""

    def __init__(self, failure: Failed, name: str) -> None:
        super().__init__(f"{name} failed after {failure.completed_steps} steps: {failure.reason}")
        self.failure = failure


# Nobody else need end: another stage has said why already, or this process is not the one that the others want.
UNTOLD = (StageFailed, NeighbourMismatch)


def first_of(error: BaseException) -> BaseException:
    """What began it: tasks that were ended by it come later in its group, if at all."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def reason_of(error: BaseException) -> str:
    """One line of printable text, of bounded length, that may stand in a frame."""
    said, kind = " ".join(str(error).split()), type(error).__name__
    if not said:
        return kind
    return printable(said if isinstance(error, (*FAILED, *BAD_INPUT)) else f"{kind}: {said}")  # a bug needs its name


class Farewell:
    """The end of a node by an error: recorded, and told to the other stages, so that they end with it too."""

    def __init__(self, control: Control, metrics: MetricsWriter) -> None:
        self._control, self._metrics = control, metrics
        self._said = False

    async def say(self, error: BaseException, *, there: set[Side]) -> None:
        """there: neighbours that have been met, if perhaps not on the control stream. Waits for `FAREWELL_S` at most;
        does nothing the second time."""
        if self._said:
            return
        self._said = True
        cause, machine = first_of(error), self._control.machine
        reason, replays = reason_of(cause), not isinstance(cause, AROUND)
        if not isinstance(cause, UNTOLD):
            self._control.act(machine.fail(reason, replays=replays))
        stage, completed = machine.identity.stage, machine.completed
        own = Failed(stage=stage, completed_steps=completed, reason=reason, replays=replays)
        failed, place = machine.failure or own, machine.identity.place_of((machine.failure or own).stage)
        where = {"stage": place.stage} | ({"lane": place.lane} if machine.identity.chain else {})
        with suppress(OSError):  # a full disk may be why
            self._metrics.write("failed", **{**asdict(failed), **where}, told=machine.failure is not None)
        await self._control.tell_failure(there, FAREWELL_S)
