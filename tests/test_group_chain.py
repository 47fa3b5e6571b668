"""The chain through a grid of stages and lanes: every node once, neighbours next to each other, one of two dials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.greeting import NodeIdentity, check_handshake
from thinpipe.protocol.grid_place import GridPlace, grid
from thinpipe.protocol.group_chain import GroupChain, group_ends_after
from thinpipe.protocol.rollback_actions import SIDES, Side

from .builders import identity

CHAINS = st.builds(GroupChain, st.integers(1, 9), st.integers(1, 9))


def members(chain: GroupChain) -> list[NodeIdentity]:
    """In the chain's order."""
    places = map(chain.place, range(chain.length))
    return [identity(stage, chain.stages, lane=lane, lanes=chain.lanes).in_group() for stage, lane in places]


@given(CHAINS)
def test_every_place_has_one_position(chain: GroupChain) -> None:
    places = [chain.place(position) for position in range(chain.length)]
    assert sorted(places) == sorted(grid(chain.stages, chain.lanes))
    assert [chain.position(place) for place in places] == list(range(chain.length))
    assert places[0] == GridPlace(0, 0)


@given(CHAINS)
def test_neighbours_are_one_stage_or_one_lane_apart(chain: GroupChain) -> None:
    for position in range(chain.length - 1):
        here, there = chain.place(position), chain.place(position + 1)
        beside = here.stage == there.stage and abs(here.lane - there.lane) == 1
        below = here.lane == there.lane and here.stage + 1 == there.stage
        assert beside or below


@given(CHAINS)
def test_one_of_two_neighbours_dials_and_the_other_knows_from_which_side(chain: GroupChain) -> None:
    """Who dials is who dials for tensors, or for contributions: it has the other's address for that."""
    nodes = members(chain)
    sides: tuple[tuple[Side, int], ...] = (("above", -1), ("below", 1))
    dialled = 0
    for position, node in enumerate(nodes):
        for side, step in sides:
            if not node.dials(side):
                continue
            dialled += 1
            other, here, there = nodes[position + step], chain.place(position), chain.place(position + step)
            assert there.stage == here.stage + 1 or there.lane < here.lane
            assert other.side_of(node.stage) == sides[step < 0][0]
            assert not other.dials(other.side_of(node.stage))
    assert dialled == chain.length - 1


def test_one_lane_is_the_chain_of_its_stages() -> None:
    for mine, plain in zip(members(GroupChain(4, 1)), (identity(stage, 4) for stage in range(4)), strict=True):
        assert (mine.stage, mine.stages) == (plain.stage, plain.stages)
        assert [mine.dials(side) for side in SIDES] == [plain.dials(side) for side in SIDES]


def test_what_is_not_in_the_grid_has_no_position() -> None:
    chain = GroupChain(2, 3)
    for place in (GridPlace(2, 0), GridPlace(0, 3), GridPlace(-1, 0), GridPlace(0, -1)):
        with pytest.raises(ValueError, match="2 stages of 3 lanes"):
            chain.position(place)
    for position in (-1, 6):
        with pytest.raises(ValueError, match="no position"):
            chain.place(position)
        assert chain.name_of(position) == f"position {position}"
    assert [chain.name_of(position) for position in (2, 3)] == ["stage 0 of lane 2", "stage 1 of lane 2"]


def test_who_is_no_neighbour_is_told_by_stage_and_lane() -> None:
    nodes = members(GroupChain(2, 3))
    stranger = nodes[5].greeting(completed_steps=0)
    side = nodes[2].side_of(stranger.stage)
    with pytest.raises(RemoteProtocolError) as refused:
        check_handshake(stranger, nodes[2], nodes[2].beside(side))
    assert refused.value.fault is Fault.STAGE
    assert "stage 0 of lane 2 expects" in str(refused.value)
    assert "stage 1 of lane 0" in str(refused.value)


def test_a_node_that_does_not_know_of_the_group_is_refused() -> None:
    """Another version's chain of one lane, or the same node's other conversation."""
    member = members(GroupChain(2, 2))[1]
    alone = identity(0, 2, lane=0, lanes=2)
    with pytest.raises(RemoteProtocolError, match="number of nodes") as refused:
        check_handshake(alone.greeting(completed_steps=0), member, 0)
    assert refused.value.fault is Fault.STAGE


@given(lanes=st.integers(2, 5), moves=st.lists(st.integers(0, 4), max_size=60), steps=st.integers(8, 12))
def test_where_the_head_is_says_when_all_can_end(lanes: int, moves: list[int], steps: int) -> None:
    """Whoever is first at any moment: a lane ends its step once all have begun it, as each contributes to it."""
    under_way = [1] * lanes
    for lane in (move % lanes for move in moves):
        if min(under_way) >= under_way[lane] < steps:
            under_way[lane] += 1
        assert max(under_way) <= group_ends_after(under_way[0], steps) <= min(under_way[0] + 1, steps)
