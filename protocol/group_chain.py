"""All nodes of a run as one chain: a snake through the grid of stages and lanes.

Lanes that hold chunks of the same sequences cannot go on without one another: in every layer a node needs keys and
values of the others. So they are lost and go back together, and the conversation by which one chain agrees on that
(`protocol.rollback`) runs once for all of them, over control streams along this chain:

    stage 0    lane 0 ──> lane 1 ──> lane 2
                                       │
    stage 1    lane 0 <── lane 1 <── lane 2
                 │
    stage 2    lane 0 ──> ...

A node's place in it is its *position*: there it is what a stage is in a chain of one lane. Those next to each other in
the chain are next to each other in the grid too, so control streams take the ways that tensors and contributions take,
and nobody has to know another address. Of two neighbours the one dials that does so for those: of two stages the upper
one, of two lanes the higher one.

Why not a tree, or one chain a lane and a coordinator over them: the rules of the chain are there, and are tested for
any loss at any moment. What a snake costs is time, `stages x lanes` hops for a wave, once for each loss.
"""

from __future__ import annotations

from typing import NamedTuple

from .grid_place import GridPlace


class GroupChain(NamedTuple):
    """The chain of so many stages and lanes."""

    stages: int
    lanes: int

    @property
    def length(self) -> int:
        """How many nodes there are."""
        return self.stages * self.lanes

    def position(self, place: GridPlace) -> int:
        """From 0. Raises ValueError for a place that the grid does not have."""
        if not (0 <= place.stage < self.stages and 0 <= place.lane < self.lanes):
            raise ValueError(f"there is no {place} in {self.stages} stages of {self.lanes} lanes")
        return place.stage * self.lanes + self._mirrored(place.stage, place.lane)

    def place(self, position: int) -> GridPlace:
        """Of that position. Raises ValueError for one that the chain does not have."""
        if not 0 <= position < self.length:
            raise ValueError(f"there is no position {position} in a chain of {self.length}")
        stage, along = divmod(position, self.lanes)
        return GridPlace(stage, self._mirrored(stage, along))

    def _mirrored(self, stage: int, along: int) -> int:
        """In every second stage the chain runs back."""
        return self.lanes - 1 - along if stage % 2 else along

    def dials(self, position: int, neighbour: int) -> bool:
        """Whether the node at that position opens the control stream to this neighbour of it."""
        own, other = self.place(position), self.place(neighbour)
        return other.stage > own.stage or (other.stage == own.stage and other.lane < own.lane)

    def name_of(self, position: int) -> str:
        """For people; of what somebody else says, any number."""
        if not 0 <= position < self.length:
            return f"position {position}"
        stage, lane = self.place(position)
        return f"stage {stage} of lane {lane}"


def group_ends_after(under_way: int, steps: int) -> int:
    """After how many of so many steps all lanes of a group can end, where the head of the chain will have completed
    `under_way` once its present step is. Each lane has its own data and begins by itself: another one may have begun
    one step more, and not two: for that it needs what the head gives to the first, keys and values at least."""
    return min(under_way + 1, steps)
