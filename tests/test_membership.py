"""Which lanes are members of which rounds: the log against a plain list, and whole grids in virtual time.

What must hold whatever is cut, lost, late, dead or come back: lanes that hear each other agree, a round is decided only
by lanes that hold each other's contributions, all lanes compute the same of the same bytes, and nobody waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.node.averaging.modes import parse_averaging
from thinpipe.node.averaging.round_plan import RoundPlan
from thinpipe.node.lanes.own_part import OwnPart
from thinpipe.node.lanes.stays import Stays
from thinpipe.protocol.control_messages import STEP_MAX
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.lane_status import LaneStatus, StatusExchange
from thinpipe.protocol.membership_log import Entry, MembershipLog, Stretch
from thinpipe.protocol.messages import decode_frame, encode_frame
from thinpipe.protocol.round_membership import ENDED_S, RoundMembership
from thinpipe.protocol.round_messages import LANES_MAX, RoundStatus
from thinpipe.protocol.round_session import LIMITS

from .lane_grid import DEADLINE_S, Grid, Lane, begins, by_stay, entry_of, is_out

# -- grids ------------------------------------------------------------------------------------------------------------

WITHIN_S = 30 * DEADLINE_S


def replays(grid: Grid) -> None:
    """One process could do it again: each contribution that was used is what its lane makes of the log."""
    for each in grid.living:
        for round, (members, contents) in enumerate(each.rounds):
            weights = each.weights[max(0, round - grid.delay)]
            made = tuple(hash((lane, round, each.entry_of(lane, round), weights)) for lane in members)
            assert contents == made, f"lane {each.lane} used other bytes in round {round} than the log says"


def agreed(grid: Grid) -> bool:
    """All who live are members, by one log: all but those who lack contributions that went with a lane for good."""
    logs = [each.log for each in grid.living]
    lanes = {each.lane for each in grid.living if not lacks_for_good(each)}
    same = all(one.differs_from(logs[0]) is None for one in logs)
    return same and all(set(one.members) == lanes for one in logs)


def lacks_for_good(lane: Lane) -> bool:
    """Whether a lane that is gone has contributed to a round that this one has no other way to follow."""
    gone = [each for each in lane.grid.others(lane.lane) if not lane.grid.lane[each].alive]
    return any(
        other in lane.log.members_of(round) and lane.valid(other, round) is None
        for round in range(lane.log.decided)
        for other in gone
    )


def check_end(grid: Grid) -> None:
    """Nothing breaks any more: within bounded time all who live are members, rounds go on, and weights are the same."""
    grid.heal()
    end_s = grid.now_s + WITHIN_S
    while not agreed(grid):
        assert grid.now_s < end_s, [(each.lane, each.log, each.membership.admitted) for each in grid.living]
        grid.run(DEADLINE_S)
    before = [each.used for each in grid.living]
    grid.run(2 * DEADLINE_S)
    for each, used in zip(grid.living, before, strict=True):
        assert each.used > used or lacks_for_good(each)
    replays(grid)
    least = min(each.used for each in grid.living)
    assert len({each.weights[least] for each in grid.living}) == 1


@st.composite
def faults(draw: st.DrawFn, lanes: int) -> list[tuple[Any, ...]]:
    lane = st.integers(0, lanes - 1)
    pair = st.tuples(lane, lane).filter(lambda two: two[0] != two[1])
    what = st.sampled_from(["status", "body"])
    one = st.one_of(
        st.tuples(st.just("run"), st.sampled_from([0.5, 1.0, 3.0, DEADLINE_S, 3 * DEADLINE_S])),
        st.tuples(st.just("cut"), what, pair),
        st.tuples(st.just("part"), st.sets(lane, min_size=1, max_size=lanes - 1)),
        st.tuples(st.just("heal")),
        st.tuples(st.just("kill"), lane),
        st.tuples(st.just("revive"), lane, st.booleans()),
        st.tuples(st.just("slow"), lane, st.sampled_from([0.5, 2.0, 2 * DEADLINE_S])),
        st.tuples(st.just("latency"), pair, st.sampled_from([0.1, 0.7, 2.0])),
        st.tuples(st.just("loss"), st.sampled_from([0.0, 0.5, 0.9])),
    )
    return draw(st.lists(one, max_size=14))


def suffer(grid: Grid, fault: tuple[Any, ...]) -> None:
    match fault:
        case ("run", seconds):
            grid.run(seconds)
        case ("cut", what, (one, other)):
            grid.set_cut(what, one, other, True)
        case ("part", some):
            for one in some:
                for other in set(range(grid.lanes)) - some:
                    grid.set_cut("status", one, other, True)
                    grid.set_cut("body", one, other, True)
        case ("heal",):
            grid.heal()
        case ("kill", lane) if grid.lane[lane].alive and len(grid.living) > 1:
            grid.kill(lane)
        case ("revive", lane, disk) if not grid.lane[lane].alive:
            grid.revive(lane, disk=disk)
        case ("slow", lane, pace_s):
            grid.lane[lane].pace_s = pace_s
        case ("latency", (one, other), latency_s):
            grid.latency_s[one, other] = latency_s
        case ("loss", loss):
            grid.loss = loss
        case _:
            pass


@given(data=st.data(), lanes=st.integers(2, 5), delay=st.integers(0, 3), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_lanes_agree_whatever_breaks(data: st.DataObject, lanes: int, delay: int, seed: int) -> None:
    grid = Grid(lanes, delay=delay, seed=seed)
    for fault in data.draw(faults(lanes)):
        suffer(grid, fault)
        if fault[0] != "run":
            grid.run(1.0)
    some_member_lives(grid)
    check_end(grid)


def some_member_lives(grid: Grid) -> None:
    """Those who were left out go on by themselves only if one of them has got all that was used since; else whoever
    contributed to that has to come back."""
    for each in grid.lane:
        each.pace_s = 1.0
    grid.heal()
    grid.run(4 * DEADLINE_S)
    newest = grid.living[0].log
    for each in grid.living:
        newest = each.log if newest.yields_to(each.log) else newest
    if not any(grid.lane[lane].alive for lane in newest.members) and all(map(lacks_for_good, grid.living)):
        grid.revive(newest.members[0], disk=True)


def broken_off_between_decision_and_word_of_it(grid: Grid) -> None:
    """Lanes 0 and 2 of three lack each other's contribution to round 2. Lane 0 decides that it is lane 1's and its own,
    lane 1, which does not hear of that, that it is its own and lane 2's. Contributions still cross: lane 1's next one
    comes of what it decided, and lane 1 is a member all along by both."""
    for each in grid.lane:
        each.pace_s = 4.0
    while grid.lane[0].log.decided < 2:
        grid.run(0.25, tick_s=0.25)
    grid.set_cut("body", 0, 2, True)
    while grid.lane[0].log.decided < 3:
        grid.run(0.25, tick_s=0.25)
    assert grid.lane[1].log.decided == grid.lane[2].log.decided == 2
    grid.lane[0].pace_s = 18.0
    for other in (1, 2):
        grid.set_cut("status", 0, other, True)
    while 3 not in grid.lane[1].own:
        grid.run(0.25, tick_s=0.25)
    grid.run(1.0)
    assert [each.log.members for each in grid.lane] == [(0, 1), (1, 2), (1, 2)]
    grid.heal()
    grid.run(1.0)
    grid.lane[0].pace_s = 4.0
    grid.run(DEADLINE_S)
    assert all(each.log.at(2).members == (0, 1) for each in grid.lane)


def test_what_was_made_of_another_decision_is_not_taken_for_what_counts() -> None:
    grid = Grid(3)
    broken_off_between_decision_and_word_of_it(grid)
    check_end(grid)


def test_by_its_last_entry_alone_a_contribution_is_not_told_from_one_of_another_history() -> None:
    """Why `history_of` is what contributions are asked for by."""
    grid = Grid(3, name=by_stay)
    broken_off_between_decision_and_word_of_it(grid)
    with pytest.raises(AssertionError, match="lane 0 used other bytes in round 3 than the log says"):
        check_end(grid)


def test_who_follows_over_a_long_way_is_admitted() -> None:
    """Whatever it says of what was decided is seconds old, and rounds are made meanwhile."""
    grid = Grid(2)
    grid.latency_s = dict.fromkeys(grid.latency_s, 2.0)
    grid.kill(1)
    grid.run(5 * DEADLINE_S)
    grid.revive(1, disk=True)
    check_end(grid)


def test_who_can_never_follow_is_not_admitted_again_and_again() -> None:
    """Each time would cost the others a deadline. Lane 0 contributed to rounds that lane 2 has not got, and is gone."""
    grid = Grid(3)
    grid.run(5.0)
    grid.kill(2)
    grid.run(5 * DEADLINE_S)
    grid.kill(0)
    grid.run(3 * DEADLINE_S)
    grid.revive(2, disk=True)
    grid.run(DEADLINE_S)
    before = grid.lane[1].used
    grid.run(5 * DEADLINE_S)
    assert grid.lane[1].used - before > 2.5 * DEADLINE_S
    grid.revive(0, disk=True)  # with what lane 2 lacks
    check_end(grid)


@pytest.mark.parametrize("lane", range(3))
@pytest.mark.parametrize("delay", [0, 2])
def test_who_gives_nonsense_is_left_out_of_that_round_and_comes_back(lane: int, delay: int) -> None:
    """It is the others that refuse it; it has all of theirs, and may be the first to decide."""
    grid = Grid(3, delay=delay)
    grid.nonsense = {(lane, 5)}
    grid.run(6 * DEADLINE_S)
    for each in grid.lane:
        assert each.log.members_of(5) == tuple(grid.others(lane))
        assert each.log.members == (0, 1, 2)
        assert each.used > 12
    check_end(grid)


@given(lanes=st.integers(2, 5), delay=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_last_lane_goes_on_alone(lanes: int, delay: int, seed: int) -> None:
    grid = Grid(lanes, delay=delay, seed=seed)
    last = grid.random.randrange(lanes)
    for lane in grid.random.sample(grid.others(last), lanes - 1):
        grid.run(grid.random.uniform(1.0, 2 * DEADLINE_S))
        grid.kill(lane)
    grid.run(2 * (1 + lanes) * DEADLINE_S)
    before = grid.lane[last].used
    assert grid.lane[last].log.members == (last,)
    grid.run(DEADLINE_S)
    assert grid.lane[last].used > before
    replays(grid)


def test_who_was_left_out_goes_on_when_all_members_are_gone() -> None:
    """As a member that is left alone does: it had been left out, and had got all that was done since."""
    grid = Grid(3)
    grid.run(5.0)
    grid.kill(2)
    grid.run(4 * DEADLINE_S)
    grid.revive(2, disk=True)
    while entry_of(grid.lane[2].membership) is None or grid.lane[2].used < grid.lane[2].log.decided:
        grid.run(0.5)
    assert 2 not in grid.lane[2].log.members
    for lane in (0, 1):
        grid.kill(lane)
    grid.run(2.0)
    before = grid.lane[2].used
    grid.run(12 * DEADLINE_S)
    assert grid.lane[2].log.members == (2,)
    assert grid.lane[2].used > before
    for lane in (0, 1):
        grid.revive(lane, disk=True)
    check_end(grid)


@pytest.mark.parametrize("spec", ["gradients", "outer:every=5", "outer:every=6,delay=2", "outer:every=6,fragments=2"])
@pytest.mark.parametrize("decided", [3, 4, 7])
def test_who_goes_on_by_itself_has_followed_no_further_than_it_trains_from(spec: str, decided: int) -> None:
    """Steps that it passed over would be missing, and nobody who makes the run again would leave them out."""
    plan = RoundPlan(parse_averaging(spec), 60)

    def begins_at(round: int) -> int | None:
        made = plan.round(round).made
        return made if plan.round(round + 1).made > made else None

    log = MembershipLog.begin(2).then((0, 1)).then((0, 1))
    while log.decided < decided:
        log = log.then((1,))
    follower = RoundMembership(0, 2, deadline_s=DEADLINE_S, begins=begins_at, log=log)
    follower.returning = 1 + plan.round(1).made
    for now_s in (0.0, 20 * DEADLINE_S):
        follower.report((2, decided), now_s)
    (entry,) = follower.admitted
    assert OwnPart(0, log, (), plan).waits_after == entry.begins
    while log.decided < plan.count:
        log = log.then((1,))
    assert OwnPart(0, log, (), plan).waits_after == plan.steps


@pytest.mark.parametrize(("spec", "under_way"), [("outer:every=5", False), ("outer:every=5,delay=2", True)])
def test_nobody_follows_through_a_round_that_it_would_have_to_train_for(spec: str, under_way: bool) -> None:
    """Unless its own contribution was made before, and is a part of the state that it goes on from."""
    plan, log = RoundPlan(parse_averaging(spec), 60), MembershipLog.begin(2).then((0, 1)).then((0, 1)).then((1,))
    part = OwnPart(0, log, (), plan)

    def may(copied: int, round: int) -> bool:
        return part.may_follow(copied, plan.round(round).used, [round], admitted=True)

    assert may(10, 2)
    assert not may(9, 1)
    assert may(10, 1)
    assert not may(10, 3)  # it is not decided
    assert part.may_follow(10, 14, [], admitted=False)
    assert not part.may_follow(10, 16, [], admitted=False)
    assert (plan.round(1).used > 10) is under_way


def test_who_was_left_out_notices_what_nobody_can_give_any_more() -> None:
    """Lane 0 lacks round 2 of lane 1, which was left out later, and rounds 2 and 3 of lane 2, a member."""
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 1, 2)).then((1, 2)).then((2,))
    mine = RoundMembership(0, 3, deadline_s=DEADLINE_S, begins=begins, log=log)

    def lacks(now_s: float, kept: tuple[int | None, int | None], held: tuple[int, ...] = (2, 2, 2)) -> bool:
        for lane, each in enumerate(kept, start=1):
            if each is None:
                mine.part(lane)
            else:
                mine.hear(lane, LaneStatus(held=(2, 3, 4), log=log, kept=each), now_s)
        mine.report(held, now_s)
        return mine.lacks_what_is_gone(now_s)

    assert not lacks(0.0, (2, 2))
    assert lacks(0.0, (3, 2))
    assert lacks(0.0, (2, 3))
    assert not lacks(0.0, (3, 4), held=(2, 3, 4))  # it has got all
    assert lacks(0.0, (3, 2))
    assert lacks(0.0, (None, 2))  # a connection that breaks, as all do when members change, brings nothing back
    assert not lacks(0.0, (2, 2))
    assert not lacks(0.0, (None, 2))  # it may be there again soon
    assert not lacks(0.9 * DEADLINE_S, (None, 2))
    assert not lacks(DEADLINE_S, (None, 2), held=(2, 3, 2))
    assert lacks(DEADLINE_S, (None, 2))
    assert not lacks(9 * DEADLINE_S, (2, None))  # a member comes back, or is left out
    member = RoundMembership(0, 2, deadline_s=DEADLINE_S, begins=begins, log=MembershipLog.begin(2).then((0, 1)))
    member.hear(1, LaneStatus(held=(1, 3), log=member.log, kept=3), 0.0)
    assert not member.lacks_what_is_gone(0.0)  # a peer keeps what a member needs


def test_who_lacks_what_a_member_has_no_more_is_not_admitted() -> None:
    """Before it has heard so itself: it would be waited for in the round that it was to enter, and not come."""
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 1)).then((0, 1))
    for kept, peer_kept, admits in ((1, 1, True), (2, 1, False), (1, 2, False)):
        mine = RoundMembership(0, 3, deadline_s=DEADLINE_S, begins=begins, log=log)
        mine.kept = kept
        mine.hear(1, LaneStatus(held=(3, 3, 1), log=log, kept=peer_kept), 0.0)
        mine.hear(2, LaneStatus(held=(1, 1, 1), log=log, returning=11), 0.0)
        mine.report((3, 3, 1), 0.0)
        assert [each.lane for each in mine.admitted] == [2] * admits


def test_members_that_have_ended_and_are_gone_give_nothing_any_more() -> None:
    """Who has ended as a member stays a member."""
    log = MembershipLog.begin(2).then((0, 1)).then((1,))
    mine = RoundMembership(0, 2, deadline_s=DEADLINE_S, begins=begins, log=log)
    mine.hear(1, LaneStatus(held=(1, 2), log=log, kept=0), 0.0)
    mine.part(1, ended=True)
    mine.report((1, 1), 0.0)
    assert not mine.lacks_what_is_gone(0.0)
    mine.part(1)
    mine.report((1, 1), 1.0)
    assert [mine.lacks_what_is_gone(at) for at in (1.0, 1.0 + DEADLINE_S)] == [False, True]


def test_a_state_that_did_not_come_is_not_chosen_again_where_there_is_another() -> None:
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 1))
    mine = RoundMembership(2, 3, deadline_s=DEADLINE_S, begins=begins, log=log)
    for lane, saved in ((0, 30), (1, 40)):
        mine.hear(lane, LaneStatus(held=(2, 2, 1), log=log, saved=saved), 0.0)
    choose = partial(mine.state_to_take, lambda at: (at // 10, at // 10))
    assert [choose(), choose([(1, 40)]), choose([(1, 40), (0, 30)])] == [(1, 40), (0, 30), None]


@pytest.mark.parametrize("gone_s", [0.0, 8 * DEADLINE_S])
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("how", ["dies", "is cut off"])
def test_a_decision_that_nobody_has_heard_does_not_set_the_others_back(how: str, delay: int, gone_s: float) -> None:
    """The lowest lane goes with the word on its way that a round is decided, and comes back much later."""
    grid = Grid(3, delay=delay)
    while grid.lane[0].log.decided < 5 or grid.lane[1].log.decided == grid.lane[0].log.decided:
        grid.run(0.25, tick_s=0.25)
    before = grid.lane[0].log.decided
    if how == "dies":
        grid.kill(0)
    else:
        suffer(grid, ("part", {0}))
    grid.run((2 + delay) * 2 * DEADLINE_S + gone_s)
    used = grid.lane[1].used
    assert used > before
    assert grid.lane[1].log.members == (1, 2)
    grid.heal()
    if how == "dies":
        grid.revive(0, disk=True)
    for _ in range(20):
        grid.run(1.0)
        assert all(each.used >= used for each in grid.lane[1:])
    check_end(grid)


@given(data=st.data(), lanes=st.integers(3, 5), delay=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_who_is_not_late_is_not_left_out(data: st.DataObject, lanes: int, delay: int, seed: int) -> None:
    """Whatever becomes of lane 0: it dies, comes back, is cut from all, or is slow."""
    grid = Grid(lanes, delay=delay, seed=seed)
    for what in data.draw(
        st.lists(st.sampled_from(["kill", "revive", "lose", "cut", "heal", "slow", "quick"]), max_size=8)
    ):
        match what:
            case "kill" if grid.lane[0].alive:
                grid.kill(0)
            case "revive" | "lose" if not grid.lane[0].alive:
                grid.revive(0, disk=what == "revive")
            case "cut":
                suffer(grid, ("part", {0}))
                if data.draw(st.booleans()):  # a cut that ends as lane 0's deadline does lets one lane be in time, and
                    grid.run(1.0)  # another one, for lane 0, late
                    grid.heal()
                else:
                    grid.run(4 * DEADLINE_S)
            case "heal":
                grid.heal()
            case "slow" | "quick":
                grid.lane[0].pace_s = 2 * DEADLINE_S if what == "slow" else 1.0
            case _:
                pass
        grid.run(data.draw(st.sampled_from([1.0, DEADLINE_S, 4 * DEADLINE_S])))
        newest = grid.lane[1].log
        assert all(set(range(1, lanes)) <= set(each.members) for each in newest.stretches), newest


# -- the log ----------------------------------------------------------------------------------------------------------

LANES = 4


@dataclass
class Plain:
    """The same as a list: of each round that is decided, its members and who is new."""

    rounds: list[tuple[tuple[int, ...], tuple[Entry, ...]]]

    def stays(self, lane: int, newest: tuple[int, ...]) -> list[int | None]:
        """By round, one further than is decided: with which round the lane last entered; None: no member."""
        found: list[int | None] = []
        stay: int | None = None
        for round, (members, entered) in enumerate([*self.rounds, (newest, ())]):
            if lane not in members:
                stay = None
            elif stay is None or any(each.lane == lane for each in entered):
                stay = round
            found.append(stay)
        return found


@st.composite
def histories(draw: st.DrawFn, after: Plain | None = None) -> tuple[MembershipLog, Plain]:
    log, plain = MembershipLog.begin(LANES), Plain([])
    for members, entered in after.rounds if after else ():
        log, plain = log.then(members, entered), Plain([*plain.rounds, (members, entered)])
    for _ in range(draw(st.integers(0, 8))):
        members, entered = log.members, ()
        if draw(st.booleans()):
            members = tuple(sorted(draw(st.sets(st.integers(0, LANES - 1), min_size=1))))
            new = [lane for lane in members if lane not in log.members or draw(st.integers(0, 9)) == 0]
            known = {"first": log.decided, "begins": 10 * log.decided}
            entered = tuple(Entry(lane=lane, source=lane, copied=draw(st.integers(0, 1)), **known) for lane in new)
        log, plain = log.then(members, entered), Plain([*plain.rounds, (members, entered)])
    return log, plain


@given(histories())
@settings(deadline=None)
def test_a_log_is_a_list_of_members(both: tuple[MembershipLog, Plain]) -> None:
    log, plain = both
    assert log.decided == len(plain.rounds)
    assert [log.members_of(round) for round in range(log.decided)] == [members for members, _ in plain.rounds]
    for outside in (-1, log.decided):
        with pytest.raises(IndexError, match=f"round {outside} is not decided, {log.decided} are"):
            log.members_of(outside)
    for lane in range(LANES):
        stays = plain.stays(lane, log.members)
        assert [log.joined_at(lane, round) for round in range(log.decided + 1)] == stays
        entries = [each for _, entered in plain.rounds for each in entered if each.lane == lane]
        assert log.entries_of(lane) == entries
        for round in range(log.decided + 1):
            later = [at for at, stay in enumerate(stays) if at >= round and stay is not None]
            assert log.next_stay(lane, round) == (later[0] if later else None)
        left = None
        if lane not in log.members:
            left = max([round for round, stay in enumerate(stays) if stay is not None], default=-1) + 1
        assert log.left_at(lane) == left


@st.composite
def three(draw: st.DrawFn) -> list[tuple[MembershipLog, Plain]]:
    """Three that may share their beginnings."""
    first = draw(histories())
    some = [Plain(first[1].rounds[: draw(st.integers(0, 8))]) for _ in range(2)]
    return [first, *(draw(histories(after=each)) for each in some)]


@given(three())
@settings(deadline=None)
def test_one_of_two_logs_counts_and_the_same_for_all(some: list[tuple[MembershipLog, Plain]]) -> None:
    """A total order: by rounds, and where they differ more members, lower lanes."""

    def place(plain: Plain) -> list[Any]:
        ranks = [(-len(members), members, entered) for members, entered in plain.rounds]
        return [*ranks, (1,)]  # who says more is before

    for one, plain in some:
        for other, others in some:
            assert one.yields_to(other) == (place(others) < place(plain))
            assert not (one.yields_to(other) and other.yields_to(one))
            pairs = enumerate(zip(plain.rounds, others.rounds, strict=False))
            assert one.differs_from(other) == next((round for round, (a, b) in pairs if a != b), None)
            for lane in range(LANES):
                longest = max(len(plain.rounds), len(others.rounds))
                stays = [[log.joined_at(lane, round) for round in range(longest + 1)] for log in (one, other)]
                parts = [round for round, (a, b) in enumerate(zip(*stays, strict=True)) if a != b]
                assert one.parts_from(other, lane) == (parts[0] if parts else None)


@given(three(), st.integers(0, LANES - 1), st.integers(0, 2))
@settings(deadline=None)
def test_a_history_is_how_a_lane_came_and_what_it_used(
    some: list[tuple[MembershipLog, Plain]], lane: int, delay: int
) -> None:
    for one, plain in some:
        for other, others in some:
            for round in range(min(one.decided, other.decided)):
                used = max(0, round - delay)
                entries = [[each for each in log.entries_of(lane) if each.first <= round][-1:] for log in (one, other)]
                same = plain.rounds[:used] == others.rounds[:used] and entries[0] == entries[1]
                histories = [log.history_of(lane, round, used) for log in (one, other)]
                assert (histories[0] == histories[1]) == same


def test_who_is_to_enter_has_the_history_that_it_will_have() -> None:
    log = MembershipLog.begin(2).then((0,)).then((0,))
    entry = Entry(lane=1, first=3, begins=30, source=1, copied=10)
    later = log.then((0,)).then((0, 1), (entry,))
    assert log.history_of(1, 3, 2, (entry,)) == later.history_of(1, 3, 2) != log.history_of(1, 3, 2)
    assert log.history_of(0, 3, 2, (entry,)) == log.history_of(0, 3, 2)


def test_the_first_round_waits_for_who_prepares_and_not_for_who_waits_itself() -> None:
    """Lane 1 prepares its data for long, and is given its time once it has begun; lane 2 never comes. A lane that waits
    in a round shows as one that prepares."""
    log = MembershipLog.begin(3)
    machine = RoundMembership(0, 3, deadline_s=10.0, begins=lambda _: None, log=log)
    machine.prepares(1, True)
    machine.report((1, 0, 0), 0.0)
    machine.hear(1, LaneStatus(held=(0, 0, 0), log=log), 1.0)
    machine.tick(100.0)
    assert machine.log.decided == 0
    machine.prepares(1, False)
    machine.tick(109.0)
    assert machine.log.decided == 0
    machine.report((1, 1, 0), 109.0)
    machine.hear(1, LaneStatus(held=(1, 1, 0), log=log), 109.0)
    machine.prepares(1, True)  # it waits for lane 2
    machine.tick(111.0)
    assert machine.log.members_of(0) == (0, 1)


def test_no_history_changes_when_who_is_admitted_comes() -> None:
    """Or what was kept meanwhile would be thrown away later on."""
    log = MembershipLog.begin(2).then((0, 1)).then((0,)).then((0,))
    entry = Entry(lane=1, first=3, begins=30, source=1, copied=10)
    admitted = Stays(log, 2, (entry,), lambda round: round)
    come = Stays(log.then((0, 1), (entry,)).then((0, 1)), 2, (), lambda round: round)
    histories = [[[each.stay_of(lane, round) for round in range(9)] for lane in range(2)] for each in (admitted, come)]
    assert histories[0] == histories[1]
    assert len(set(histories[0][0])) == 3  # of lane 0: with both, alone, with both again


# -- what is said -----------------------------------------------------------------------------------------------------


def status(log: MembershipLog, **other: Any) -> LaneStatus:
    return LaneStatus(**{"held": (0,) * 3, "log": log, **other})


def test_a_log_is_said_when_it_changes_and_heard_as_it_was_meant() -> None:
    saying, hearing = StatusExchange(3), StatusExchange(3)
    log = MembershipLog.begin(3)
    said = [status(log), status(log.then((0, 1, 2))), status(log.then((0, 1, 2)).then((0, 2)), held=(2, 1, 2))]
    said.append(status(log.then((0, 2)), returning=31, there=(0, 2)))  # another one counts
    frames = [saying.say(each) for each in said]
    assert [bool(each.stretches) for each in frames] == [True, False, True, True]
    assert [hearing.hear(decode_frame(encode_frame(each), LIMITS)) for each in frames] == said


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"held": (0, 0)}, "a status of 2 lanes"),
        ({"held": (0,) * 4}, "a status of 4 lanes"),
        ({"stretches": (Stretch(first=0, members=(0, 3)),)}, r"members \[0, 3\], this run has 3"),
        ({"admitted": (Entry(lane=3, first=0, begins=0, source=0, copied=0),)}, "this run has 3"),
        ({"admitted": (Entry(lane=0, first=0, begins=0, source=3, copied=0),)}, "this run has 3"),
        ({"there": (1, 3)}, "this run has 3"),
        ({"decided": 10}, "a status of 10 rounds, this run has 9"),
        ({"held": (0, 10, 0)}, "a status of 10 rounds, this run has 9"),
        ({"stretches": ()}, "by a log that goes further, or is not known"),
    ],
    ids=str,
)
def test_a_status_of_another_run_is_refused(other: dict[str, Any], words: str) -> None:
    known: dict[str, Any] = {"held": (0, 0, 0), "decided": 1, "stretches": (Stretch(first=0, members=(0, 2)),)}
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        StatusExchange(3, 9).hear(RoundStatus(**{**known, **other}))
    assert caught.value.fault is Fault.MALFORMED


def test_fewer_rounds_than_the_log_said_before_has_are_refused() -> None:
    hearing = StatusExchange(3)
    log = MembershipLog.begin(3).then((0, 1, 2)).then((0, 1))
    hearing.hear(StatusExchange(3).say(status(log)))
    with pytest.raises(RemoteProtocolError, match="1 rounds are decided, by a log that goes further"):
        hearing.hear(RoundStatus(held=(0, 0, 0), decided=1))


@pytest.mark.parametrize("lanes", [2, 5, LANES_MAX])
def test_a_log_never_outgrows_its_frame(lanes: int) -> None:
    """When it is full nobody may enter any more, and all but one may still leave, one after the other."""
    log, everybody = MembershipLog((Stretch(first=0, members=tuple(range(lanes))),), STEP_MAX - 10**6), range(lanes)
    while not log.is_full:
        log = log.then((0,))
        first = log.decided
        entered = tuple(
            Entry(lane=lane, first=first, begins=first, source=lane, copied=first) for lane in everybody[1:]
        )
        log = log.then(tuple(everybody), entered)
    assert len(log.stretches) > 150
    for lane in reversed(everybody[1:]):
        log = log.then(tuple(range(lane)))
    frame = StatusExchange(lanes).say(LaneStatus(held=(STEP_MAX - 1,) * lanes, log=log))
    frame = replace(frame, admitted=log.stretches[2].entered)
    raw = encode_frame(frame)
    assert len(raw) <= LIMITS.frame_bytes
    assert decode_frame(raw, LIMITS) == frame


# -- one lane's view --------------------------------------------------------------------------------------------------


def machine(lane: int = 0, lanes: int = 3, log: MembershipLog | None = None) -> RoundMembership:
    known = {"deadline_s": DEADLINE_S, "begins": begins, "log": log or MembershipLog.begin(lanes)}
    return RoundMembership(lane, lanes, **known)


def test_what_a_lane_says_by_another_log_does_not_count() -> None:
    """It holds other contributions, and has made others, than those that are meant."""
    log = MembershipLog.begin(3).then((0, 1, 2))
    mine = machine(log=log.then((0, 1, 2)))
    for peer, theirs in ((1, log.then((0, 1, 2))), (2, log.then((2,)))):
        mine.hear(peer, LaneStatus(held=(3, 3, 3), log=theirs), 0.0)
    mine.report((3, 3, 3), 0.0)
    assert mine.log.decided == 2
    assert set(mine.lacking()) == {2}
    mine.tick(DEADLINE_S)
    assert mine.log.members_of(2) == (0, 1)


def test_who_has_ended_is_not_waited_for_though_it_still_passes_on_what_it_knows() -> None:
    mine = RoundMembership(0, 2, deadline_s=100.0, begins=begins, log=MembershipLog.begin(2).then((0, 1)))
    theirs = LaneStatus(held=(1, 1), log=mine.log)
    mine.hear(1, theirs, 0.0)
    mine.part(1, ended=True)
    mine.report((2, 1), 1.0)
    mine.hear(1, theirs, 2.0)
    mine.tick(1.0 + ENDED_S)
    assert mine.log.members_of(1) == (0,)


def test_who_has_ended_and_comes_back_is_waited_for() -> None:
    mine = RoundMembership(0, 2, deadline_s=100.0, begins=begins, log=MembershipLog.begin(2).then((0, 1)))
    theirs = LaneStatus(held=(1, 1), log=mine.log)
    mine.hear(1, theirs, 0.0)
    mine.part(1, ended=True)
    mine.part(1)
    mine.hear(1, theirs, 1.0)
    mine.report((2, 1), 1.0)
    mine.tick(99.0)
    assert mine.log.decided == 1
    mine.tick(101.0)
    assert mine.log.members_of(1) == (0,)


def test_who_is_to_end_leaves_nobody_out_and_admits_nobody() -> None:
    mine = machine(log=MembershipLog.begin(3).then((0, 1)))
    mine.frozen = True
    mine.hear(2, LaneStatus(held=(1, 1, 0), log=mine.log, returning=11), 0.0)
    mine.report((2, 1, 0), 0.0)
    mine.tick(100 * DEADLINE_S)
    assert (mine.log.decided, mine.admitted) == (1, ())
    mine.hear(1, LaneStatus(held=(2, 2, 0), log=mine.log), 0.0)
    mine.report((2, 2, 0), 0.0)  # but what is complete is decided
    assert mine.log.decided == 2


def test_a_lane_that_is_admitted_by_two_enters_as_it_says_itself() -> None:
    log = MembershipLog.begin(3).then((0, 1))
    by_0, by_1 = (Entry(lane=2, first=first, begins=10 * first, source=2, copied=10) for first in (4, 6))
    third = machine(2, log=log)
    third.hear(1, LaneStatus(held=(1, 1, 0), log=log, admitted=(by_1,)), 0.0)
    third.hear(0, LaneStatus(held=(1, 1, 0), log=log, admitted=(by_0,)), 0.0)
    assert entry_of(third) == by_1
    first = machine(log=log)
    first.hear(1, LaneStatus(held=(1, 1, 0), log=log, admitted=(by_0,)), 0.0)
    assert first.admitted == (by_0,)
    first.hear(2, LaneStatus(held=(1, 1, 0), log=log, admitted=third.admitted), 0.0)
    assert first.admitted == (by_1,)
    for _ in range(5):
        third.hear(0, LaneStatus(held=(7, 7, 0), log=(log := log.then((0, 1)))), 0.0)
    assert entry_of(third) == by_1
    third.hear(0, LaneStatus(held=(8, 8, 0), log=log.then((0, 1))), 0.0)  # its round has passed
    assert entry_of(third) is None
    assert is_out(third)


def test_what_was_held_by_another_log_is_not_held_by_the_one_that_counts() -> None:
    """Until the node has looked through it: nothing is decided by what it said before."""
    log = MembershipLog.begin(2).then((0, 1))
    mine = machine(0, 2, log.then((0,)))
    mine.report((3, 3), 0.0)
    theirs = LaneStatus(held=(3, 3), log=log.then((0, 1)))
    mine.hear(1, theirs, 1.0)
    assert mine.log == theirs.log
    mine.report((3, 3), 2.0)
    assert mine.log.members_of(2) == (0, 1)


def test_who_is_to_end_does_not_wait_for_who_has_ended() -> None:
    """Lanes that are told to end do so at steps of their own. Nobody is left out because of that."""
    log = MembershipLog.begin(2)
    mine = RoundMembership(0, 2, deadline_s=10.0, begins=lambda _: None, log=log)
    mine.hear(1, LaneStatus(held=(0, 0), log=log), 0.0)
    mine.report((1, 0), 0.0)
    mine.frozen = True
    mine.tick(50.0)
    assert not mine.is_in_vain(99.0)  # it is on its way to the same round
    mine.part(1, ended=True)
    mine.tick(100.0)
    assert [mine.is_in_vain(at) for at in (100.0, 109.0, 110.0)] == [False, False, True]
    mine.tick(200.0)
    assert mine.log.decided == 0
    mine.part(1)
    mine.hear(1, LaneStatus(held=(1, 1), log=log), 210.0)  # it was started again
    mine.report((1, 1), 210.0)
    assert mine.log.decided == 1
    assert not mine.is_in_vain(300.0)
