"""Which processes are in the run, and from which step all go on after a loss: a view change along the chain, sans-IO.

A run is a sequence of *generations*. In one generation the members are fixed: one process for each stage. Whatever
carries another generation's number is refused, so a stage that was stopped, replaced and wakes up can do no harm. A
generation ends when a process appears in the place of another one. The next one begins by three kinds of frame. No
coordinator is needed, only the order of stages:

    StartViewChange  from the stage that notices, to both neighbours and on: all break off the step under way
    DoViewChange     upwards: "these processes, from me down, have stopped and could go on after any of these steps"
    StartView        downwards, from stage 0: the new generation, its members, the newest step that all of them offered

A stage waits only for its neighbours, and every frame can be sent again. So a process that dies in the middle of a wave
only starts another wave. This is safe for three reasons. A stage applies a StartView only while the process below it is
the one that the StartView names. A DoViewChange that arrives during training counts as a StartViewChange. So does a
greeting with another generation. A stage that missed a StartView therefore brings the others into the next wave.

At the end there are two more waves: Finished upwards, AllFinished downwards. No stage leaves before them, because a
stage that has finished may be needed again by one that has not. A node that has to leave earlier asks upwards (Drain).
Stage 0 alone knows which step is under way; it answers downwards after which step all end (LastStep).

A stage that fails for a reason of its own says it both ways (Failed), and all end with that reason. It would be waited
for in vain otherwise, or fail in the same way again. Only a member of the generation can say so: a process that has yet
to take a place, with the wrong settings, other data or no disk, must not end a run that waits for a better one. Nor
must one that was started as for a new run and finds, before its first step, that the run has begun.

Lanes that hold chunks of the same sequences are one chain too (`protocol.group_chain`): a stage here is a position in
it then, with a name of its own for people.

Why not a coordinator or a consensus library (Raft, etcd): the members are a chain and cannot go on without any one of
them, so there is no majority to ask, and the loss of a coordinator would be one loss more. The shape is the view change
of Viewstamped Replication (Liskov & Cowling, MIT-CSAIL-TR-2012-021), with a chain for a quorum.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from .control_messages import (
    LISTED_MAX,
    AllFinished,
    ControlFrame,
    DoViewChange,
    Drain,
    Failed,
    Finished,
    Heartbeat,
    LastStep,
    StartView,
    StartViewChange,
)
from .errors import Fault, RemoteProtocolError
from .greeting import NodeIdentity, check_handshake
from .heartbeat_figures import HeartbeatAggregate
from .messages import Frame, Greeting
from .rollback_actions import SIDES, ChooseEnd, Effect, End, EndAfter, Leave, Send, Side, Start, Stop

GENERATIONS_AHEAD_MAX = 2**20  # a stage may have missed some; more is no run's number
STEPS_LISTED_MAX = LISTED_MAX  # steps that one stage offers; the newest, and 0


class RollbackPhase(Enum):
    """Where this node stands in the present generation."""

    RUNNING = "training"
    STOPPING = "breaking off"
    STOPPED = "waiting for the new generation"
    FINISHED = "finished"


class Rollback:
    """This node's part. Inputs are `meet`, `part`, `receive`, `stopped`, `finished`; each returns what is to be done.

    A node that takes a stage's place (`joining`) begins STOPPING, in no generation: say `stopped` at once. A fresh one
    begins RUNNING in generation 0, whose members are whoever comes first (`protocol.session`). `generation`: the
    highest that a joining one knows of, from its checkpoints.
    """

    def __init__(self, identity: NodeIdentity, *, joining: bool, generation: int = 0) -> None:
        self.identity = identity
        self.joining = joining
        self.generation = generation
        self.outlived = 0  # the next generation is later than this one too, whoever was in it
        self.completed = 0  # steps of this generation, for `heartbeat`
        self.members: tuple[int, ...] | None = None
        self.phase = RollbackPhase.STOPPING if joining else RollbackPhase.RUNNING
        self.peers: dict[Side, int | None] = dict.fromkeys(SIDES)  # incarnation of who is connected
        self._member_of: dict[Side, int | None] = dict.fromkeys(SIDES)  # its generation, unless it was to join one
        self.heartbeats = HeartbeatAggregate(identity)
        self._steps: tuple[int, ...] = ()
        self._do_view_change_below: DoViewChange | None = None
        self._do_view_change_sent: DoViewChange | None = None  # on the present connection upwards
        self._finished_here = self._finished_below = False
        # In this generation. Never taken back: a StartViewChange may pass an AllFinished that is on its way.
        self._said_finished = False
        self._draining = False
        self._began_before = False  # the run had, as neighbours show, and this node takes itself for one of a new run
        self.end: int | None = None  # all end when so many steps are completed
        self.failure: Failed | None = None  # why the run ends

    def greeting(self) -> Greeting:
        """The first frame on a connection."""
        now = replace(self.identity, generation=self.generation)
        return now.greeting(completed_steps=self.completed, joining=self.joining)

    def heartbeat(self, side: Side) -> Heartbeat:
        """What to say to that side now and then."""
        return self.heartbeats.tell(side, generation=self.generation, completed=self.completed)

    def meet(self, side: Side, peer: Greeting) -> list[Effect]:
        """A neighbour is connected. Raises RemoteProtocolError if it is not one, or not one any more."""
        self.check(side, peer)
        self._forget(side)
        self.peers[side] = peer.incarnation
        self._member_of[side] = None if peer.joining else peer.generation
        self.heartbeats.meet(side)
        # One more than this node is no sign: a neighbour may be that far ahead, and connected late on this stream.
        self._began_before |= not peer.joining and peer.completed_steps > self.completed + 1
        if self.failure:
            return [Send(side=side, frame=self.failure)]
        effects: list[Effect] = []
        if self.phase is RollbackPhase.RUNNING:
            if peer.joining or peer.generation != self.generation:
                effects += self._start_view_change()
        elif self.phase is not RollbackPhase.FINISHED:
            effects.append(Send(side=side, frame=StartViewChange(generation=self.generation)))
        else:
            effects += [Send(side=side, frame=AllFinished())] if side == "below" else []
        if side == "below" and self.end is not None:
            effects.append(Send(side=side, frame=LastStep(completed_steps=self.end)))
        if side == "above" and (self._draining or self.end is not None):  # who knew of it may have been lost
            effects.append(Send(side=side, frame=Drain()))
        return effects + self._advance()

    def check(self, side: Side, peer: Greeting) -> None:
        """Raises RemoteProtocolError if `peer` is not the neighbour on that side, or not the one any more."""
        stage = self.identity.beside(side)
        name = self.identity.name_of(stage)
        check_handshake(peer, self.identity, stage)
        if self.failure and peer.joining:  # it begins what comes after this
            raise RemoteProtocolError(
                Fault.STOPPED,
                f"{self.identity.name_of(self.failure.stage)} has failed, and this process ends with it; dial again",
            )
        if (
            not peer.joining
            and self.members
            and peer.incarnation != self.members[stage]
            and peer.generation <= self.generation
        ):
            raise RemoteProtocolError(
                Fault.FENCED,
                f"process {peer.incarnation:x} of {name} is of generation {peer.generation}; "
                f"since generation {self.generation} "
                f"process {self.members[stage]:x} has its place",
            )
        present, since = self.peers[side], self._member_of[side]
        # Two that this node, which joins, knows nothing of: who has no place gives way to who has one, and that of the
        # earlier generation, which was replaced, to the later one. The same where this node and the present one have
        # made a generation of their own, since both had lost all that they knew.
        if self.members:
            later = peer.generation > self.generation
        else:
            later = self.joining if since is None else peer.generation > since
        later = later and not peer.joining
        if present is not None and present != peer.incarnation and not later:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"{name} is served by process {present:x}, which answers, so there is no place for process "
                f"{peer.incarnation:x}; stop one of the two",
            )

    def part(self, side: Side) -> None:
        """The connection to that side is gone. By itself that changes nothing: it may come back."""
        self.peers[side] = self._member_of[side] = None
        self.heartbeats.part(side)
        self._forget(side)

    def _forget(self, side: Side) -> None:
        """What a connection to that side had established."""
        if side == "below":
            self._do_view_change_below, self._finished_below = None, False
        else:
            self._do_view_change_sent = None

    def receive(self, side: Side, frame: Frame) -> list[Effect]:
        """Take one frame. Raises RemoteProtocolError for what may not come from that side."""
        match frame, side:
            case Heartbeat(), _:
                self.heartbeats.hear(side, frame)
                return []
            case StartViewChange(), _:
                # One of an earlier generation was under way when that generation's StartView passed it.
                return (
                    self._start_view_change()
                    if self.phase is RollbackPhase.RUNNING and frame.generation >= self.generation
                    else []
                )
            case DoViewChange(), "below":
                return self._take_do_view_change(frame)
            case StartView(), "above":
                return self._take_start_view(frame)
            case Finished(), "below":
                self._finished_below = True
                return self._advance()
            case Drain(), "below":
                return self.drain()
            case LastStep(), "above":
                return self.end_after(frame.completed_steps)
            case Failed(), _:
                return self._take_failed(side, frame)
            case AllFinished(), "above":
                if not self._said_finished:
                    raise RemoteProtocolError(Fault.UNEXPECTED, "AllFinished before this stage has sent Finished")
                return self._leave()
            case _:
                name = type(frame).__name__
                raise RemoteProtocolError(
                    Fault.UNEXPECTED, f"a {name} frame from {side} is not allowed on the control stream"
                )

    def start_view_change(self) -> list[Effect]:
        """This node itself wants the generation to end. No effect unless it is training."""
        return self._start_view_change() if self.phase is RollbackPhase.RUNNING else []

    def stopped(self, steps: set[int]) -> list[Effect]:
        """Nothing of the old generation moves here any more; these are the steps (besides 0) after which this node
        could go
        on."""
        self._steps = (*sorted(steps - {0}, reverse=True)[: STEPS_LISTED_MAX - 1], 0)
        self.phase = RollbackPhase.STOPPED
        return self._advance()

    def finished(self) -> list[Effect]:
        """This stage has done all its steps."""
        self._finished_here = True
        return self._advance()

    def fail(self, reason: str, *, replays: bool) -> list[Effect]:
        """This stage itself has failed, for this reason (printable, of bounded length), and leaves. replays: whoever
        comes to this step again will fail so, too. No effect from a process that is no member, or came to a run that
        had begun and has done no step of it, after the end, or where another stage has failed already."""
        newcomer = self._began_before and self.members is None and self.completed == 0
        if self.failure or self.joining or newcomer or self.phase is RollbackPhase.FINISHED:
            return []
        stage, completed = self.identity.stage, self.completed
        self.failure = failure = Failed(stage=stage, completed_steps=completed, reason=reason, replays=replays)
        return [*self._tell("above", failure), *self._tell("below", failure)]

    def drain(self) -> list[Effect]:
        """This node, or one below it, has to leave."""
        if self._draining or self.end is not None:
            return []
        self._draining = True
        if self.identity.first:
            return [ChooseEnd()]
        return self._tell("above", Drain())

    def end_after(self, completed: int) -> list[Effect]:
        """Stage 0 says when all end."""
        end = completed if self.end is None else min(self.end, completed)
        if end == self.end:
            return []
        self.end = end
        return [*self._tell("below", LastStep(completed_steps=end)), EndAfter(completed=end)]

    # -- the waves ----------------------------------------------------------------------------------------------

    def _tell(self, side: Side, frame: ControlFrame) -> list[Effect]:
        """If anybody is there."""
        return [] if self.peers[side] is None else [Send(side=side, frame=frame)]

    def _start_view_change(self) -> list[Effect]:
        self._began_before = True  # nobody changes the view of a run that has yet to begin
        self.phase = RollbackPhase.STOPPING
        self._finished_here = self._finished_below = False
        self._do_view_change_sent = None
        start_view_change = StartViewChange(generation=self.generation)
        return [*self._tell("above", start_view_change), *self._tell("below", start_view_change), Stop()]

    def _take_do_view_change(self, do_view_change: DoViewChange) -> list[Effect]:
        due = self.identity.stages - 1 - self.identity.stage
        if len(do_view_change.incarnations) != due or do_view_change.incarnations[0] != self.peers["below"]:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"a DoViewChange of {len(do_view_change.incarnations)} processes, where {due} are below this stage",
            )
        if do_view_change.generation > self.generation + GENERATIONS_AHEAD_MAX:
            raise RemoteProtocolError(
                Fault.GENERATION,
                f"a DoViewChange of generation {do_view_change.generation}, this run is in {self.generation}",
            )
        self._do_view_change_below = do_view_change
        halted = self._start_view_change() if self.phase is RollbackPhase.RUNNING else []
        return halted + self._advance()

    def _take_start_view(self, start_view: StartView) -> list[Effect]:
        if len(start_view.incarnations) != self.identity.stages:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"a generation of {len(start_view.incarnations)} stages, this run has {self.identity.stages}",
            )
        # As for a DoViewChange: after it nobody would accept this node's next DoViewChange.
        if start_view.generation - 1 > self.generation + GENERATIONS_AHEAD_MAX:
            raise RemoteProtocolError(
                Fault.GENERATION, f"a StartView of generation {start_view.generation}, this run is in {self.generation}"
            )
        if self.phase is not RollbackPhase.STOPPED or start_view.generation <= self.generation:
            return []  # said again, or of a wave that another one has overtaken
        names_me = start_view.incarnations[self.identity.stage] == self.identity.incarnation
        below = self.peers["below"]
        if not names_me or (below is not None and below != start_view.incarnations[self.identity.stage + 1]):
            return []  # somebody has come since; the wave that this began is on its way
        if start_view.completed_steps not in self._steps:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"a StartView after {start_view.completed_steps} steps, never offered by "
                f"{self.identity.name_of(self.identity.stage)}",
            )
        return self._apply(start_view)

    def _take_failed(self, side: Side, failure: Failed) -> list[Effect]:
        mine, peer = self.identity.stage, self.peers[side]
        beyond = range(mine) if side == "above" else range(mine + 1, self.identity.stages)
        if failure.stage not in beyond:
            raise RemoteProtocolError(
                Fault.MALFORMED, f"from {side}, {self.identity.name_of(failure.stage)} cannot have failed"
            )
        member = self.members and peer == self.members[self.identity.beside(side)]
        if not member and self._member_of[side] is None:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a Failed frame from {side}, by a process in no generation")
        if self.failure or self.phase is RollbackPhase.FINISHED:
            return []
        self.failure = failure
        other: Side = "below" if side == "above" else "above"
        return [*self._tell(other, failure), End(failure=failure)]

    def _advance(self) -> list[Effect]:
        """Say upwards, or at stage 0 decide, what can be said or decided now."""
        if self.phase is RollbackPhase.STOPPED:
            do_view_change = self._whole_do_view_change()
            if do_view_change is None:
                return []
            if self.identity.first:
                start_view = StartView(
                    generation=do_view_change.generation + 1,
                    completed_steps=do_view_change.steps[0],
                    incarnations=do_view_change.incarnations,
                )
                return self._apply(start_view)
            if self.peers["above"] is not None and do_view_change != self._do_view_change_sent:
                self._do_view_change_sent = do_view_change
                return [Send(side="above", frame=do_view_change)]
            return []
        if self.phase is RollbackPhase.RUNNING and self._finished_here and (self.identity.last or self._finished_below):
            if self.identity.first:
                return self._leave()
            if self.peers["above"] is not None:
                self._said_finished = True
                return [Send(side="above", frame=Finished())]
        return []

    @property
    def _latest(self) -> int:
        """Generation that this node was in or has anything of. Not `generation`, by which frames of an earlier one are
        told: what a state brings along must not make this node deaf to the present one."""
        return max(self.generation, self.outlived)

    def _whole_do_view_change(self) -> DoViewChange | None:
        """What all from this stage down have in common; None while somebody has not said."""
        mine = self.identity.incarnation
        if self.identity.last:
            return DoViewChange(generation=self._latest, incarnations=(mine,), steps=self._steps)
        below = self._do_view_change_below
        if below is None:
            return None
        return DoViewChange(
            generation=max(self._latest, below.generation),
            incarnations=(mine, *below.incarnations),
            steps=tuple(step for step in self._steps if step in below.steps),
        )

    def _apply(self, start_view: StartView) -> list[Effect]:
        self.generation, self.completed = start_view.generation, start_view.completed_steps
        self.members, self.joining = start_view.incarnations, False
        self.phase = RollbackPhase.RUNNING
        self._said_finished = False
        self._do_view_change_below = self._do_view_change_sent = None
        start = Start(generation=self.generation, completed=self.completed, members=start_view.incarnations)
        return [*self._tell("below", start_view), start]

    def _leave(self) -> list[Effect]:
        if self.phase is RollbackPhase.FINISHED:
            return []
        self.phase = RollbackPhase.FINISHED
        return [*self._tell("below", AllFinished()), Leave()]
