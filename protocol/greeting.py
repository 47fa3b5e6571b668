"""Which peer may talk on a link: what a node says of itself in its greeting, and what it checks in its neighbour's, or
in that of its own stage in another lane.

Two nodes that would compute different things must find out before a tensor moves, and whoever reads the log of either
must see both values and what to do. So every rule is one row (fault, name, their value, ours), checked in order from
"do we speak the same protocol" to "are we in the same generation of the same run".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import Fault, RemoteProtocolError
from .grid_place import GridPlace
from .group_chain import GroupChain
from .messages import PROTOCOL_VERSION, Greeting
from .rollback_actions import SIDES, Side

PRINTED_CHARACTERS_MAX = 40  # of each value: a configuration hash need not be spelled out


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeIdentity:
    """What a node says of itself and holds its neighbour to.

    chain: of control streams in a run whose lanes are one group: `stage` is a position in it then (`in_group`).
    """

    run_id: str
    configuration: str
    stage: int
    stages: int
    incarnation: int
    generation: int = 0
    lane: int = 0
    lanes: int = 1
    chain: GroupChain | None = None

    def in_group(self) -> NodeIdentity:
        """The same node as a member of the chain of all stages and lanes."""
        chain = GroupChain(self.stages, self.lanes)
        position = chain.position(GridPlace(self.stage, self.lane))
        return replace(self, stage=position, stages=chain.length, lane=0, lanes=1, chain=chain)

    def place_of(self, stage: int) -> GridPlace:
        """Where in the grid a stage of this chain is; of what somebody else says, any number."""
        if self.chain and 0 <= stage < self.stages:
            return self.chain.place(stage)
        return GridPlace(stage, self.lane)

    def name_of(self, stage: int) -> str:
        """A stage of this chain, for people."""
        return self.chain.name_of(stage) if self.chain else f"stage {stage}"

    def dials(self, side: Side) -> bool:
        """Whether this node opens the control stream to its neighbour on that side, if it has one there."""
        if self.ends(side):
            return False
        return self.chain.dials(self.stage, self.beside(side)) if self.chain else side == "below"

    def side_of(self, stage: int) -> Side:
        """On which side of this node somebody is who dials it and says to be that stage; who is on neither is taken for
        the one that dials it, and refused for what it says."""
        dialled: list[Side] = [side for side in SIDES if not self.dials(side)]
        for side in dialled:
            if self.beside(side) == stage:
                return side
        return dialled[0] if dialled else "above"

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def ends(self, side: Side) -> bool:
        """Whether nobody is on that side."""
        return self.first if side == "above" else self.last

    def beside(self, side: Side) -> int:
        """The stage on that side, if the chain goes on there."""
        return self.stage + (1 if side == "below" else -1)

    def greeting(
        self,
        *,
        next_sequence: int = 0,
        granted_bytes: int = 0,
        completed_steps: int = 0,
        joining: bool = False,
    ) -> Greeting:
        """The first frame on a connection: who this is, and where it stands there."""
        return Greeting(
            run_id=self.run_id,
            configuration=self.configuration,
            stage=self.stage,
            stages=self.stages,
            incarnation=self.incarnation,
            generation=self.generation,
            next_sequence=next_sequence,
            granted_bytes=granted_bytes,
            completed_steps=completed_steps,
            joining=joining,
            lane=self.lane,
        )


# In a configuration: what follows is the digest of a table that each node generates for itself.
TABLE_DIGEST = " table "


def check_greeting(peer: Greeting, mine: NodeIdentity, place: GridPlace) -> None:
    """Raises RemoteProtocolError, with both values, if the peer does not serve that place, a neighbour's or that of the
    own stage in another lane, in the same generation."""
    if place.lane == mine.lane:
        check_handshake(peer, mine, place.stage)
    else:
        check_lateral(peer, mine, place.lane)
    _hold_to([(Fault.GENERATION, "generation", peer.generation, mine.generation)], peer, mine)


def check_handshake(peer: Greeting, mine: NodeIdentity, peer_stage: int) -> None:
    """The same, in whatever generation the two are."""
    rules = _same_run(peer, mine)
    if mine.chain:
        rules += [(Fault.STAGE, "neighbour", mine.name_of(peer.stage), mine.name_of(peer_stage))]
    else:
        rules += [(Fault.STAGE, "neighbour's stage index", peer.stage, peer_stage)]
    rules += [(Fault.LANE, "neighbour's lane", peer.lane, mine.lane)]
    _hold_to(rules, peer, mine)


def check_lateral(
    peer: Greeting, mine: NodeIdentity, peer_lane: int | None = None, *, generation: int | None = None
) -> None:
    """Raises RemoteProtocolError, with both values, unless the peer serves this node's stage in lane `peer_lane`; None:
    in a higher lane, since it is that one which opens the stream. generation: in which both have to be; None: each lane
    has its own."""
    _hold_to([*_same_run(peer, mine), (Fault.STAGE, "stage index", peer.stage, mine.stage)], peer, mine)
    wanted = range(mine.lane + 1, mine.lanes) if peer_lane is None else range(peer_lane, peer_lane + 1)
    if peer.lane not in wanted:
        ours = f"{wanted[0]} to {wanted[-1]}" if len(wanted) > 1 else str(*wanted) or "none"
        _hold_to([(Fault.LANE, f"lane {mine.lane}: the other's lane", peer.lane, ours)], peer, mine)
    if generation is not None:
        _hold_to([(Fault.GENERATION, "generation", peer.generation, generation)], peer, mine)


Rules = list[tuple[Fault, str, object, object]]


def _same_run(peer: Greeting, mine: NodeIdentity) -> Rules:
    their_settings, _, their_table = peer.configuration.partition(TABLE_DIGEST)
    our_settings, _, our_table = mine.configuration.partition(TABLE_DIGEST)
    return [
        (Fault.PROTOCOL_VERSION, "protocol version", peer.protocol_version, PROTOCOL_VERSION),
        (Fault.RUN_ID, "run id", peer.run_id, mine.run_id),
        (Fault.CONFIGURATION, "configuration hash", their_settings, our_settings),
        (Fault.CONFIGURATION, "digest of what every node generates", their_table, our_table),
        (Fault.STAGE, "number of nodes" if mine.chain else "number of stages", peer.stages, mine.stages),
    ]


def _hold_to(rules: Rules, peer: Greeting, mine: NodeIdentity) -> None:
    for fault, what, theirs, ours in rules:
        if theirs != ours:
            theirs, ours = _print_apart(str(theirs), str(ours))
            here, there = mine.name_of(mine.stage), mine.name_of(peer.stage)
            line = f"{what}: {here} expects {ours}, the peer ({there}) says {theirs}; {_REMEDIES[fault]}"
            raise RemoteProtocolError(fault, line)


def check_resume(
    peer: Greeting, mine: NodeIdentity, *, before: Greeting | None, began: bool, first_kept: int, next_sequence: int
) -> bool:
    """Whether this is the process that greeted `before`, so that the link goes on where it was; False: a fresh start.

    began: chunks have been sent or received. first_kept, next_sequence: of the chunks sent, what can be sent again.
    Raises RemoteProtocolError if neither is possible.
    """
    resumed = before is not None and before.incarnation == peer.incarnation
    if began and not resumed:
        raise RemoteProtocolError(
            Fault.INCARNATION,
            f"stage {peer.stage} was restarted (process {before.incarnation if before else 0:x}, now "
            f"{peer.incarnation:x}) in the middle of the run; start it with --resume",
        )
    if not first_kept <= peer.next_sequence <= next_sequence:
        raise RemoteProtocolError(
            Fault.RESUME,
            f"stage {peer.stage} asks for chunk {peer.next_sequence}, stage {mine.stage} keeps {first_kept} to "
            f"{next_sequence}; start the whole swarm again",
        )
    return resumed


_REMEDIES = {
    Fault.PROTOCOL_VERSION: "install the same version of thinpipe on both",
    Fault.RUN_ID: "one of the two dials the wrong run; check --next",
    Fault.CONFIGURATION: "start both from the same run.toml and the same version",
    Fault.STAGE: "check --stage here and --next upstream",
    Fault.LANE: "one of the two dials an address of the wrong lane",
    Fault.GENERATION: "the peer belongs to an earlier attempt of this run; stop it",
}


def _print_apart(a: str, b: str) -> tuple[str, str]:
    """Both values, shortened so that what differs between them is still to be seen."""
    if max(len(a), len(b)) > PRINTED_CHARACTERS_MAX:
        differ_at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = 0 if differ_at < 12 else differ_at - 4
        a, b = (f"{'…' * (start > 0)}{text[start : start + 12]}{'…' * (len(text) > start + 12)}" for text in (a, b))
    return a or "nothing", b or "nothing"
