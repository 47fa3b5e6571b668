"""The view change along the chain: agreement in every generation, and one more generation after any loss, at any
moment.

The world below is every stage's own machine, joined by ordered streams that can be cut at any frame, and processes that
can be lost at any moment with all but what they wrote to disk. Hypothesis chooses what happens next.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.protocol.control_messages import (
    AllFinished,
    DoViewChange,
    Finished,
    Heartbeat,
    StartView,
    StartViewChange,
)
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.protocol.group_chain import GroupChain
from thinpipe.protocol.messages import Greeting, Limits, decode_frame
from thinpipe.protocol.messages import encode_frame as encode
from thinpipe.protocol.rollback import GENERATIONS_AHEAD_MAX, Rollback, RollbackPhase
from thinpipe.protocol.rollback_actions import Leave, Send, Start, Stop

from .builders import identity

LIMITS = Limits(message_bytes=1)


class Process:
    def __init__(self, world, stage, *, joining, disk):
        world.born += 1
        self.machine = Rollback(world.identity(stage), joining=joining)
        self.disk = disk  # completed counts that survive this process
        self.completed = 0
        self.stopping = joining
        self.dismissed = False


class Connection:
    def __init__(self):
        self.down, self.up = deque(), deque()
        self.greeted = {"above": False, "below": False}  # which end has taken the other's greeting


class Environment:
    """lanes: of one group, whose nodes are one chain: what is a stage below is a position in it."""

    def __init__(self, stages, lanes=1):
        self.chain = GroupChain(stages, lanes)
        self.stages, self.born = self.chain.length, 0
        self.processes = [Process(self, stage, joining=False, disk=set()) for stage in range(self.stages)]
        self.connections = [None] * (self.stages - 1)
        self.generations = {0: (None, 0)}  # generation -> (members, completed), as whoever started it first said
        self.refusals = []

    def identity(self, stage):
        """Of the process that has just come there."""
        place, known = self.chain.place(stage), {"lanes": self.chain.lanes, "incarnation": self.born}
        mine = identity(place.stage, self.chain.stages, lane=place.lane, **known)
        return mine.in_group() if self.chain.lanes > 1 else mine

    def connect(self, boundary):
        if self.connections[boundary] is None:
            connection = self.connections[boundary] = Connection()
            connection.down.append(encode(self.processes[boundary].machine.greeting()))

    def cut(self, boundary):
        if self.connections[boundary] is not None:
            self.connections[boundary] = None
            self.processes[boundary].machine.part("below")
            self.processes[boundary + 1].machine.part("above")

    def kill(self, stage):
        for boundary in (stage - 1, stage):
            if 0 <= boundary < self.stages - 1:
                self.cut(boundary)
        self.processes[stage] = Process(self, stage, joining=True, disk=self.processes[stage].disk)

    def confirm_stop(self, stage):
        process = self.processes[stage]
        if process.stopping:
            process.stopping = False
            self.run(stage, process.machine.stopped(set(process.disk)))

    def complete(self, stage, *, writes=True):
        """A step needs every stage: who is one ahead waits for the others."""
        process = self.processes[stage]
        mine = (process.machine.generation, process.completed)
        if process.machine.phase is not RollbackPhase.RUNNING or process.dismissed:
            return
        for other in self.processes:
            running = other.machine.phase is RollbackPhase.RUNNING and other.machine.generation == mine[0]
            if not running or other.completed < mine[1]:
                return
        process.completed += 1
        if writes:
            process.disk.add(process.completed)

    def deliver(self, boundary, way):
        connection = self.connections[boundary]
        queue = connection and getattr(connection, way)
        if not queue:
            return
        stage, side = (boundary + 1, "above") if way == "down" else (boundary, "below")
        machine = self.processes[stage].machine
        frame = decode_frame(queue.popleft(), LIMITS)
        try:
            if isinstance(frame, Greeting):
                if way == "down":  # who listens answers, and then may say more
                    connection.up.append(encode(machine.greeting()))
                effects = machine.meet(side, frame)
                connection.greeted[side] = True
            else:
                effects = machine.receive(side, frame)
        except RemoteProtocolError as error:
            self.refusals.append(error.fault)
            self.cut(boundary)
            return
        self.run(stage, effects)

    def run(self, stage, effects):
        process = self.processes[stage]
        for effect in effects:
            match effect:
                case Send():
                    boundary = stage if effect.side == "below" else stage - 1
                    connection = self.connections[boundary]
                    assert connection is not None, "told somebody who is not there"
                    (connection.down if effect.side == "below" else connection.up).append(encode(effect.frame))
                case Stop():
                    process.stopping = True
                case Start():
                    assert not process.stopping
                    assert effect.completed in {0, *process.disk}
                    # A number may come again only when everybody is gone who knew what it stood for.
                    for other in self.processes:
                        if (
                            other.machine.generation == effect.generation
                            and other.machine.phase is RollbackPhase.RUNNING
                        ):
                            assert other.machine.members == effect.members, "two views of one generation"
                    self.generations[effect.generation] = (effect.members, effect.completed)
                    assert effect.members[stage] == process.machine.identity.incarnation
                    process.completed = effect.completed
                    process.disk = {step for step in process.disk if step <= effect.completed}
                case Leave():
                    process.dismissed = True

    def settle(self):
        """No more faults: everything is delivered and confirmed until nothing moves."""
        for _ in range(10_000):
            before = len(self.refusals)
            for boundary in range(self.stages - 1):
                self.connect(boundary)
                for way in ("down", "up"):
                    while self.connections[boundary] and getattr(self.connections[boundary], way):
                        self.deliver(boundary, way)
            for stage in range(self.stages):
                self.confirm_stop(stage)
            quiet = all(c and not c.down and not c.up for c in self.connections) and len(self.refusals) == before
            if quiet and not any(process.stopping for process in self.processes):
                return
        raise AssertionError("the chain never came to rest")

    def assert_one_generation(self):
        machines = [process.machine for process in self.processes]
        assert {machine.phase for machine in machines} == {RollbackPhase.RUNNING}, [m.phase for m in machines]
        assert len({machine.generation for machine in machines}) == 1
        members = tuple(machine.identity.incarnation for machine in machines)
        assert machines[0].members in (None, members)


ACTIONS = ("deliver", "deliver", "deliver", "deliver", "connect", "complete", "complete", "stop", "cut", "kill")


def act(world, draw, *, faults=True):
    action = draw(ACTIONS if faults else ACTIONS[:-2])
    where = draw(range(world.stages - 1))
    stage = draw(range(world.stages))
    match action:
        case "deliver":
            world.deliver(where, draw(("down", "up")))
        case "connect":
            world.connect(where)
        case "complete":
            world.complete(stage, writes=draw((True, True, False)))
        case "stop":
            world.confirm_stop(stage)
        case "cut":
            world.cut(where)
        case "kill":
            world.kill(stage)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32), st.integers(10, 400))
def test_any_losses_end_in_one_generation(stages, seed, length):
    chance = random.Random(seed)
    world = Environment(stages)
    for _ in range(length):
        act(world, lambda options: chance.choice(list(options)))
    world.settle()
    world.assert_one_generation()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([(1, 2), (2, 2), (3, 2), (2, 3)]), st.integers(0, 2**32), st.integers(10, 400))
def test_any_losses_in_a_group_of_lanes_end_in_one_generation_of_all(grid, seed, length):
    chance = random.Random(seed)
    world = Environment(*grid)
    for _ in range(length):
        act(world, lambda options: chance.choice(list(options)))
    world.settle()
    world.assert_one_generation()


@pytest.mark.parametrize("grid", [(2, 2), (3, 2)])
def test_a_loss_in_one_lane_of_a_group_takes_all_lanes_back_to_what_all_hold(grid):
    world = Environment(*grid)
    world.settle()
    lost = world.chain.position(GridPlace(0, 1))
    behind = world.chain.position(GridPlace(1, 0))
    for step in range(5):
        for position in range(world.stages):
            world.complete(position, writes=step < 3 or position != behind)
    world.kill(lost)
    world.settle()
    world.assert_one_generation()
    assert world.generations[1][1] == 3
    assert {process.completed for process in world.processes} == {3}
    assert {process.machine.generation for process in world.processes} == {1}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(2, 4))
def test_any_short_story_ends_in_one_generation(data, stages):
    """The same with hypothesis in charge of every choice, so that a failure shrinks to the fewest events."""
    world = Environment(stages)
    for _ in range(data.draw(st.integers(0, 40))):
        act(world, lambda options: data.draw(st.sampled_from(list(options))))
    world.settle()
    world.assert_one_generation()


def test_a_loss_goes_back_to_the_newest_step_that_all_hold():
    world = Environment(4)
    world.settle()
    for step in range(5):
        for stage in range(4):
            world.complete(stage, writes=step < 3 or stage != 2)  # stage 2 did not get to write steps 4 and 5
    world.kill(1)
    world.settle()
    world.assert_one_generation()
    assert world.generations[1][1] == 3
    assert [process.completed for process in world.processes] == [3] * 4
    assert world.generations[1][0] == tuple(process.machine.identity.incarnation for process in world.processes)


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_can_be_lost_before_anything_is_written(stage):
    world = Environment(4)
    world.settle()
    world.kill(stage)
    world.settle()
    world.assert_one_generation()
    assert world.generations[1][1] == 0


def test_all_at_once():
    world = Environment(4)
    world.settle()
    for stage in range(4):
        world.complete(stage)
    for stage in range(4):
        world.kill(stage)
    world.settle()
    world.assert_one_generation()
    assert world.generations[1][1] == 1


@pytest.mark.pairwise(40)
@pytest.mark.parametrize("deliveries", range(0, 40))
@pytest.mark.parametrize("second", [0, 1, 3])
def test_a_second_loss_at_any_point_of_the_rollback(deliveries, second):
    world = Environment(4)
    world.settle()
    world.kill(2)
    chance = random.Random(deliveries)
    for _ in range(deliveries):
        act(world, lambda options: chance.choice(list(options)), faults=False)
    world.kill(second)
    world.settle()
    world.assert_one_generation()


def test_a_stage_that_wakes_up_after_it_was_replaced_is_fenced_off():
    world = Environment(3)
    world.settle()
    sleeper = world.processes[1]
    world.kill(1)
    world.settle()
    for stage, side in ((0, "below"), (2, "above")):
        machine = world.processes[stage].machine
        machine.part(side)  # its place is empty for a moment; it must not be the sleeper's again
        with pytest.raises(RemoteProtocolError, match="since generation 1 process") as refused:
            machine.meet(side, sleeper.machine.greeting())
        assert refused.value.fault is Fault.FENCED
        assert machine.phase is RollbackPhase.RUNNING


def test_two_processes_that_claim_one_stage():
    world = Environment(3)
    world.settle()
    claimant = Rollback(identity(1, 3, incarnation=99), joining=True)
    with pytest.raises(RemoteProtocolError, match="is served by process 2, which answers"):
        world.processes[0].machine.meet("below", claimant.greeting())
    assert world.processes[0].machine.phase is RollbackPhase.RUNNING


@pytest.mark.parametrize("agreed", [False, True])
def test_a_member_takes_its_place_from_one_that_has_never_had_it(agreed):
    """Stage 1 was lost while two processes claimed stage 0: a member, and one that waits for the place and came first.
    Those two may even have agreed on a generation, with nothing to go on from."""
    waiting, new = (Rollback(identity(stage, 2, incarnation=90 + stage), joining=True) for stage in (0, 1))
    new.meet("above", waiting.greeting())
    if agreed:
        waiting.meet("below", new.greeting())
        waiting.stopped(set())
        (said,) = [each.frame for each in new.stopped(set()) if isinstance(each, Send)]
        started = [each.frame for each in waiting.receive("below", said) if isinstance(each, Send)]
        assert [type(each) for each in started] == [StartView]
        new.receive("above", started[0])
        assert new.members == (90, 91)
    claimant = identity(0, 2, incarnation=99)
    with pytest.raises(RemoteProtocolError, match="is served by process 5a, which answers"):
        new.check("above", claimant.greeting(joining=True))
    with pytest.raises(RemoteProtocolError, match="process"):
        new.check("above", replace(claimant, generation=1 if agreed else 0).greeting(joining=True))
    member = replace(claimant, generation=2).greeting(completed_steps=26)
    new.check("above", member)
    new.part("above")
    effects = new.meet("above", member)
    assert new.peers["above"] == 99
    assert any(isinstance(each, Stop) for each in effects) is agreed


def test_a_state_of_a_later_generation_counts_for_the_next_one_and_the_present_one_is_heard():
    """Another lane's, that this stage takes up: a stage beside it that has not got its part yet may be lost now."""
    last = Rollback(identity(2, 3), joining=False)
    last.meet("above", Rollback(identity(1, 3), joining=False).greeting())
    last.outlived = 7
    effects = last.receive("above", StartViewChange(generation=0))
    assert any(isinstance(each, Stop) for each in effects)
    (said,) = [each.frame for each in last.stopped({4}) if isinstance(each, Send)]
    assert said == DoViewChange(generation=7, incarnations=(last.identity.incarnation,), steps=(4, 0))
    middle = Rollback(identity(1, 3), joining=True)
    middle.outlived = 9
    middle.meet("above", Rollback(identity(0, 3), joining=False).greeting())
    middle.meet("below", replace(last.identity, generation=0).greeting())
    middle.receive("below", said)
    (said,) = [each.frame for each in middle.stopped({4}) if isinstance(each, Send)]
    assert (said.generation, said.steps) == (9, (4, 0))


def test_who_has_not_lost_its_generation_keeps_the_one_that_joins():
    """And not the one that was replaced, which wakes up."""
    world = Environment(2)
    world.settle()
    sleeper = world.processes[0].machine.greeting()
    world.kill(0)
    world.connect(0)
    world.deliver(0, "down")
    with pytest.raises(RemoteProtocolError):
        world.processes[1].machine.check("above", sleeper)


def test_a_commit_lost_on_the_way_begins_another_generation():
    world = Environment(3)
    world.settle()
    world.kill(0)
    for _ in range(100):  # until stage 1 has the StartView, and stage 2 has not
        world.connect(0)
        for way in ("down", "up"):
            world.deliver(0, way)
        for stage in range(3):
            world.confirm_stop(stage)
        if world.processes[1].machine.generation == 1:
            break
        for way in ("down", "up"):
            world.deliver(1, way)
    assert [process.machine.generation for process in world.processes] == [1, 1, 0]
    world.cut(1)
    world.settle()
    world.assert_one_generation()
    assert world.processes[0].machine.generation == 2


def test_nobody_leaves_before_all_are_through():
    world = Environment(3)
    world.settle()
    for stage in (2, 0):
        world.run(stage, world.processes[stage].machine.finished())
        world.settle()
        assert not any(process.dismissed for process in world.processes)
    world.kill(1)  # the others are needed again
    world.settle()
    world.assert_one_generation()
    for stage in range(3):
        world.run(stage, world.processes[stage].machine.finished())
    for _ in range(20):
        for boundary in range(2):
            for way in ("down", "up"):
                world.deliver(boundary, way)
    assert all(process.dismissed for process in world.processes)


def test_one_stage_alone_needs_nobody():
    machine = Rollback(identity(0, 1, incarnation=7), joining=True)
    (start,) = machine.stopped({4, 2})
    assert start == Start(generation=1, completed=4, members=(7,))
    assert machine.finished() == [Leave()]


@pytest.mark.parametrize(
    ("side", "frame", "reason"),
    [
        ("above", DoViewChange(generation=0, incarnations=(3,), steps=(0,)), "a DoViewChange frame from above"),
        (
            "below",
            DoViewChange(generation=0, incarnations=(3, 4), steps=(0,)),
            "a DoViewChange of 2 processes, where 1 are below",
        ),
        ("below", DoViewChange(generation=0, incarnations=(4,), steps=(0,)), "a DoViewChange of 1 processes"),
        ("below", StartView(generation=1, completed_steps=0, incarnations=(1, 2, 3)), "a StartView frame from below"),
        (
            "above",
            StartView(generation=1, completed_steps=0, incarnations=(1, 2)),
            "a generation of 2 stages, this run has 3",
        ),
        ("above", Finished(), "a Finished frame from above"),
        ("above", AllFinished(), "AllFinished before"),
    ],
)
def test_what_may_not_come_is_refused(side, frame, reason):
    world = Environment(3)
    world.settle()
    machine = world.processes[1].machine
    with pytest.raises(RemoteProtocolError, match=reason):
        machine.receive(side, frame)
    assert machine.phase is RollbackPhase.RUNNING


def test_a_start_that_was_never_offered_is_refused():
    machine = Rollback(identity(1, 2, incarnation=2), joining=True)
    machine.meet("above", Rollback(identity(0, 2, incarnation=1), joining=False).greeting())
    machine.stopped({5})
    with pytest.raises(RemoteProtocolError, match="a StartView after 4 steps, never offered by stage 1"):
        machine.receive("above", StartView(generation=1, completed_steps=4, incarnations=(1, 2)))


@pytest.mark.parametrize("generation", [GENERATIONS_AHEAD_MAX + 2, 2**48 - 1])
def test_a_start_of_a_generation_out_of_reach_is_refused(generation):
    """It would be accepted, but no DoViewChange that this stage sends afterwards."""
    machine = Rollback(identity(1, 2, incarnation=2), joining=True)
    machine.meet("above", Rollback(identity(0, 2, incarnation=1), joining=False).greeting())
    machine.stopped({5})
    with pytest.raises(RemoteProtocolError, match=f"a StartView of generation {generation}, this run is in 0"):
        machine.receive("above", StartView(generation=generation, completed_steps=5, incarnations=(1, 2)))
    assert machine.generation == 0
    machine.receive("above", StartView(generation=GENERATIONS_AHEAD_MAX + 1, completed_steps=5, incarnations=(1, 2)))
    assert machine.generation == GENERATIONS_AHEAD_MAX + 1


@given(st.sampled_from(["view_change", "alive"]), st.integers(0, 3))
def test_what_is_late_changes_nothing(what, generation):
    world = Environment(3)
    world.settle()
    for _ in range(4):
        world.kill(1)
        world.settle()
    machine = world.processes[1].machine
    assert machine.generation == 4
    frame = {
        "view_change": StartViewChange(generation=generation),
        "alive": Heartbeat(generation=generation, completed_steps=9),
    }[what]
    assert machine.receive("above", frame) == []
    assert machine.phase is RollbackPhase.RUNNING


def test_a_dismissal_that_a_halt_has_passed_still_counts():
    """The last stage is lost after it said that it was through: who hears of both ends well."""
    world = Environment(3)
    world.settle()
    for stage in (2, 1):
        world.run(stage, world.processes[stage].machine.finished())
        world.settle()
    machine = world.processes[1].machine
    machine.part("below")
    joiner = Rollback(identity(2, 3, incarnation=99), joining=True)
    assert Stop() in machine.meet("below", joiner.greeting())
    assert Leave() in machine.receive("above", AllFinished())


def test_a_wild_generation_is_refused():
    world = Environment(3)
    world.settle()
    with pytest.raises(RemoteProtocolError, match="a DoViewChange of generation"):
        world.processes[1].machine.receive("below", DoViewChange(generation=2**47, incarnations=(3,), steps=(0,)))


def test_who_finds_that_the_run_has_begun_ends_alone():
    """Started as for a new run, in the place of a stage that was lost in the first generation: the others train."""
    newcomer = Rollback(identity(0, 2, incarnation=1), joining=False)
    lower = Rollback(identity(1, 2, incarnation=2), joining=False)
    lower.completed = 2
    newcomer.meet("below", lower.greeting())
    assert newcomer.fail("other data", replays=True) == []


@pytest.mark.parametrize("completed", [0, 1])
def test_a_member_of_the_first_generation_says_why_it_fails(completed):
    """A neighbour may be a step ahead, and be met late."""
    machine = Rollback(identity(0, 2, incarnation=1), joining=False)
    lower = Rollback(identity(1, 2, incarnation=2), joining=False)
    lower.completed = completed
    machine.meet("below", lower.greeting())
    (told,) = machine.fail("not finite", replays=True)
    assert isinstance(told, Send)


def test_a_member_that_has_done_a_step_says_why_it_fails_in_a_view_change():
    machine = Rollback(identity(0, 2, incarnation=1), joining=False)
    machine.meet("below", Rollback(identity(1, 2, incarnation=2), joining=False).greeting())
    machine.completed = 1
    machine.part("below")
    machine.meet("below", Rollback(identity(1, 2, incarnation=3), joining=True).greeting())
    (told,) = machine.fail("a disk", replays=False)
    assert isinstance(told, Send)
