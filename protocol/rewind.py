"""Who is in the run, and from where all go on after a loss: a view change along the chain, sans-IO.

A run is a sequence of *epochs*. In one epoch the members are fixed, one process a stage, and whatever carries another
epoch's number is refused: a stage that was stopped, replaced and wakes up is fenced off. An epoch ends when a process
appears in the place of another one, and the next begins in two waves, with nobody in charge but the order of stages:

    Halt     from whoever notices, to both neighbours: everybody breaks off the step under way
    Offer    upwards: "these processes, from me down, have stopped and could all go on after any of these steps"
    Commit   downwards, from stage 0: the new epoch, its members, the newest step that all of them offered

Every wait is on the neighbour alone and every frame can be said again: a process that dies in the middle of a wave only
starts another one. What makes that safe: a Commit is applied by a stage only while the process below it is the one that
the Commit names, an Offer that comes while training goes on is taken for a Halt, and a neighbour that greets with
another epoch is one too. So whoever was left behind by a lost Commit drags the others into the next wave.

At the end two more waves: Finished upwards, Dismissed downwards; until then nobody leaves, because whoever is through
may be needed again by one who is not. A node that has to leave earlier asks upwards (Drain), and stage 0, which alone
knows what is under way, says downwards after which step all end (LastStep): the end is then like any other.

Why not a coordinator or a consensus library (Raft, etcd): the members are a chain and cannot go on without any one of
them, so there is no majority to ask, and the loss of a coordinator would be one loss more. The shape is the view change
of Viewstamped Replication (Liskov & Cowling, MIT-CSAIL-TR-2012-021), with a chain for a quorum.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from .control import LISTED_MAX, Alive, Commit, ControlFrame, Dismissed, Drain, Finished, Halt, LastStep, Offer
from .effects import SIDES, ChooseEnd, Dismiss, Effect, EndAfter, Send, Side, Start, Stop
from .errors import Fault, RemoteProtocolError
from .gossip import Gossip
from .greeting import Identity, check_kinship
from .messages import Frame, Greeting

EPOCHS_AHEAD_MAX = 2**20  # a stage may have missed some; more is no run's number
OFFERED_MAX = 32  # steps that one stage offers; the newest, and 0


class Phase(Enum):
    """Where this node stands in the present epoch."""

    RUNNING = "training"
    HALTING = "breaking off"
    HALTED = "waiting for the new epoch"
    DISMISSED = "through"


class Rewind:
    """This node's part. Inputs are `meet`, `part`, `receive`, `stopped`, `finished`; each returns what is to be done.

    A node that takes a stage's place (`joining`) begins HALTING, in no epoch: say `stopped` at once. A fresh one begins
    RUNNING in epoch 0, whose members are whoever comes first (`protocol.session`). `epoch`: the highest that a joining
    one knows of, from its checkpoints.
    """

    def __init__(self, identity: Identity, *, joining: bool, epoch: int = 0) -> None:
        self.identity = identity
        self.joining = joining
        self.epoch = epoch
        self.completed = 0  # steps of this epoch, for `alive`
        self.members: tuple[int, ...] | None = None
        self.phase = Phase.HALTING if joining else Phase.RUNNING
        self.peers: dict[Side, int | None] = dict.fromkeys(SIDES)  # incarnation of who is connected
        self._member_of: dict[Side, int | None] = dict.fromkeys(SIDES)  # its epoch, unless it was to join one
        self.gossip = Gossip(identity)
        self._steps: tuple[int, ...] = ()
        self._offer_below: Offer | None = None
        self._offered: Offer | None = None  # on the present connection upwards
        self._finished_here = self._finished_below = False
        # In this epoch. Never taken back: a Halt may pass a Dismissed that is on its way.
        self._said_finished = False
        self._draining = False
        self.end: int | None = None  # all end when so many steps are completed

    def greeting(self) -> Greeting:
        """The first frame on a connection."""
        now = replace(self.identity, epoch=self.epoch)
        return now.greeting(completed_steps=self.completed, joining=self.joining)

    def alive(self, side: Side) -> Alive:
        """What to say to that side now and then."""
        return self.gossip.tell(side, epoch=self.epoch, completed=self.completed)

    def meet(self, side: Side, peer: Greeting) -> list[Effect]:
        """A neighbour is connected. Raises RemoteProtocolError if it is not one, or not one any more."""
        self.check(side, peer)
        self._forget(side)
        self.peers[side] = peer.incarnation
        self._member_of[side] = None if peer.joining else peer.epoch
        self.gossip.meet(side)
        effects: list[Effect] = []
        if self.phase is Phase.RUNNING:
            if peer.joining or peer.epoch != self.epoch:
                effects += self._halt()
        elif self.phase is not Phase.DISMISSED:
            effects.append(Send(side=side, frame=Halt(epoch=self.epoch)))
        else:
            effects += [Send(side=side, frame=Dismissed())] if side == "below" else []
        if side == "below" and self.end is not None:
            effects.append(Send(side=side, frame=LastStep(completed_steps=self.end)))
        if side == "above" and (self._draining or self.end is not None):  # who knew of it may have been lost
            effects.append(Send(side=side, frame=Drain()))
        return effects + self._advance()

    def check(self, side: Side, peer: Greeting) -> None:
        """Raises RemoteProtocolError if `peer` is not the neighbour on that side, or not the one any more."""
        stage = self.identity.beside(side)
        check_kinship(peer, self.identity, stage)
        if not peer.joining and self.members and peer.incarnation != self.members[stage] and peer.epoch <= self.epoch:
            raise RemoteProtocolError(
                Fault.FENCED,
                f"process {peer.incarnation:x} of stage {stage} is of epoch {peer.epoch}; since epoch {self.epoch} "
                f"process {self.members[stage]:x} has its place",
            )
        present, since = self.peers[side], self._member_of[side]
        # Two that were members, and this node, which joins, knows of neither: that of the earlier epoch was replaced.
        later = since is not None and not peer.joining and not self.members and peer.epoch > since
        if present is not None and present != peer.incarnation and not later:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"stage {stage} is served by process {present:x}, which answers, so there is no place for process "
                f"{peer.incarnation:x}; stop one of the two",
            )

    def part(self, side: Side) -> None:
        """The connection to that side is gone. By itself that changes nothing: it may come back."""
        self.peers[side] = self._member_of[side] = None
        self.gossip.part(side)
        self._forget(side)

    def _forget(self, side: Side) -> None:
        """What a connection to that side had established."""
        if side == "below":
            self._offer_below, self._finished_below = None, False
        else:
            self._offered = None

    def receive(self, side: Side, frame: Frame) -> list[Effect]:
        """Take one frame. Raises RemoteProtocolError for what may not come from that side."""
        match frame, side:
            case Alive(), _:
                self.gossip.hear(side, frame)
                return []
            case Halt(), _:
                # One of an earlier epoch was under way when that epoch's Commit passed it.
                return self._halt() if self.phase is Phase.RUNNING and frame.epoch >= self.epoch else []
            case Offer(), "below":
                return self._take_offer(frame)
            case Commit(), "above":
                return self._take_commit(frame)
            case Finished(), "below":
                self._finished_below = True
                return self._advance()
            case Drain(), "below":
                return self.drain()
            case LastStep(), "above":
                return self.end_after(frame.completed_steps)
            case Dismissed(), "above":
                if not self._said_finished:
                    raise RemoteProtocolError(Fault.UNEXPECTED, "a dismissal before this stage was through")
                return self._dismiss()
            case _:
                name = type(frame).__name__.lower()
                raise RemoteProtocolError(
                    Fault.UNEXPECTED, f"the {name} frame from {side} may not come on the control stream"
                )

    def halt(self) -> list[Effect]:
        """This node itself wants the epoch to end. No effect unless it is training."""
        return self._halt() if self.phase is Phase.RUNNING else []

    def stopped(self, steps: set[int]) -> list[Effect]:
        """Nothing of the old epoch moves here any more; these are the steps (besides 0) after which this node could go
        on."""
        self._steps = (*sorted(steps - {0}, reverse=True)[: OFFERED_MAX - 1], 0)
        self.phase = Phase.HALTED
        return self._advance()

    def finished(self) -> list[Effect]:
        """This stage has done all its steps."""
        self._finished_here = True
        return self._advance()

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

    def _halt(self) -> list[Effect]:
        self.phase = Phase.HALTING
        self._finished_here = self._finished_below = False
        self._offered = None
        halt = Halt(epoch=self.epoch)
        return [*self._tell("above", halt), *self._tell("below", halt), Stop()]

    def _take_offer(self, offer: Offer) -> list[Effect]:
        due = self.identity.stages - 1 - self.identity.stage
        if len(offer.incarnations) != due or offer.incarnations[0] != self.peers["below"]:
            raise RemoteProtocolError(
                Fault.UNEXPECTED, f"an offer of {len(offer.incarnations)} processes, where {due} are below this stage"
            )
        if offer.epoch > self.epoch + EPOCHS_AHEAD_MAX:
            raise RemoteProtocolError(Fault.EPOCH, f"an offer of epoch {offer.epoch}, this run is in {self.epoch}")
        self._offer_below = offer
        halted = self._halt() if self.phase is Phase.RUNNING else []
        return halted + self._advance()

    def _take_commit(self, commit: Commit) -> list[Effect]:
        if len(commit.incarnations) != self.identity.stages:
            raise RemoteProtocolError(
                Fault.UNEXPECTED, f"an epoch of {len(commit.incarnations)} stages, this run has {self.identity.stages}"
            )
        if commit.epoch - 1 > self.epoch + EPOCHS_AHEAD_MAX:  # as in an offer: nobody would take this node's next one
            raise RemoteProtocolError(Fault.EPOCH, f"a start of epoch {commit.epoch}, this run is in {self.epoch}")
        if self.phase is not Phase.HALTED or commit.epoch <= self.epoch:
            return []  # said again, or of a wave that another one has overtaken
        names_me = commit.incarnations[self.identity.stage] == self.identity.incarnation
        below = self.peers["below"]
        if not names_me or (below is not None and below != commit.incarnations[self.identity.stage + 1]):
            return []  # somebody has come since; the wave that this began is on its way
        if commit.completed_steps not in self._steps:
            raise RemoteProtocolError(
                Fault.UNEXPECTED,
                f"a start after {commit.completed_steps} steps, which stage {self.identity.stage} never offered",
            )
        return self._apply(commit)

    def _advance(self) -> list[Effect]:
        """Say upwards, or at stage 0 decide, what can be said or decided now."""
        if self.phase is Phase.HALTED:
            offer = self._whole_offer()
            if offer is None:
                return []
            if self.identity.first:
                commit = Commit(epoch=offer.epoch + 1, completed_steps=offer.steps[0], incarnations=offer.incarnations)
                return self._apply(commit)
            if self.peers["above"] is not None and offer != self._offered:
                self._offered = offer
                return [Send(side="above", frame=offer)]
            return []
        if self.phase is Phase.RUNNING and self._finished_here and (self.identity.last or self._finished_below):
            if self.identity.first:
                return self._dismiss()
            if self.peers["above"] is not None:
                self._said_finished = True
                return [Send(side="above", frame=Finished())]
        return []

    def _whole_offer(self) -> Offer | None:
        """What all from this stage down have in common; None while somebody has not said."""
        mine = self.identity.incarnation
        if self.identity.last:
            return Offer(epoch=self.epoch, incarnations=(mine,), steps=self._steps)
        below = self._offer_below
        if below is None:
            return None
        return Offer(
            epoch=max(self.epoch, below.epoch),
            incarnations=(mine, *below.incarnations),
            steps=tuple(step for step in self._steps if step in below.steps),
        )

    def _apply(self, commit: Commit) -> list[Effect]:
        self.epoch, self.completed = commit.epoch, commit.completed_steps
        self.members, self.joining = commit.incarnations, False
        self.phase = Phase.RUNNING
        self._said_finished = False
        self._offer_below = self._offered = None
        start = Start(epoch=self.epoch, completed=self.completed, members=commit.incarnations)
        return [*self._tell("below", commit), start]

    def _dismiss(self) -> list[Effect]:
        if self.phase is Phase.DISMISSED:
            return []
        self.phase = Phase.DISMISSED
        return [*self._tell("below", Dismissed()), Dismiss()]


assert OFFERED_MAX <= LISTED_MAX
