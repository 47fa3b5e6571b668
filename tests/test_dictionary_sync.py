"""Encoder and decoder hold the same tables at every message, whatever happens to links and processes between them.

Two ends that learn (`dictionary_ends`) over two real link sessions, under any interleaving of messages, cuts, resumes,
duplicates, restarts from a checkpoint, and rollbacks. What is decoded is what was meant, bit for bit, and what has been
replayed in a later generation ends in the bits of a run on which nothing was lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thinpipe.protocol.dictionary_delta import (
    DIGEST_BYTES,
    DictionarySpec,
    decode_delta,
    encode_delta,
    join_deltas,
    split_deltas,
)
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.protocol.messages import Head, Kind, Limits, Message, split
from thinpipe.protocol.reassembly import message_cost
from thinpipe.protocol.session import LinkSession, Opened, Received, SessionState

from .dictionary_ends import ROWS, End, Plan, Run, Sent, content, nearest, undisturbed

ENCODINGS = ["fp32", "bf16", "int8", "int4"]
STEPS_KEPT = 3  # checkpoints on a disk


def run_of(
    seed: int = 0,
    microbatches: int = 2,
    encodings: tuple[str, str, str] = ("int8", "int4", "bf16"),
    dtype: str = "float32",
    every: int = 2,
    policies: tuple[str, str] = ("drift", "random"),
    divisor: int = 3,
) -> Run:
    def spec(name: str, entries: int, width: int, encoding: str) -> DictionarySpec:
        return DictionarySpec(name, entries, width, dtype, encoding)  # type: ignore[arg-type]

    of_projector, forward, backward = encodings
    learned = Plan(spec=spec("projector", 4, 3, of_projector), kind=Kind.ACTIVATION, every=every)
    forward_book, backward_book = (
        Plan(spec=spec(name, 7, 3, encoding), kind=kind, policy=policy, divisor=divisor)  # type: ignore[arg-type]
        for name, encoding, kind, policy in (
            ("codes forward", forward, Kind.ACTIVATION, policies[0]),
            ("codes backward", backward, Kind.GRADIENT, policies[1]),
        )
    )
    return Run(seed=seed, microbatches=microbatches, plans=(learned, forward_book, backward_book))


any_encoding = st.sampled_from(ENCODINGS)
any_policy = st.sampled_from(["full", "random", "robin", "drift"])
runs = st.builds(
    run_of,
    seed=st.integers(0, 99),
    microbatches=st.integers(1, 3),
    encodings=st.tuples(any_encoding, any_encoding, any_encoding),
    dtype=st.sampled_from(["float32", "float64"]),
    every=st.integers(1, 3),
    policies=st.tuples(any_policy, any_policy),
    divisor=st.integers(1, 4),
)


class Side:
    """One stage: its half of the codec, its session, what waits to be sent, the wire towards the other, its disk."""

    def __init__(self, run: Run, side: int) -> None:
        self.run, self.side = run, side
        self.incarnation = 100 + side
        self.disk: dict[int, dict[str, Any]] = {}  # completed -> state, of whatever generation it was
        self.began(End(run, side), 0)

    def began(self, end: End, generation: int) -> None:
        """Everything of a generation is made anew."""
        self.end = end
        self.limits = Limits(message_bytes=self.run.message_bytes_max, chunk_bytes=96)
        identity = NodeIdentity(
            run_id="run",
            configuration="c",
            stage=self.side,
            stages=2,
            incarnation=self.incarnation,
            generation=generation,
        )
        self.session = LinkSession(
            identity=identity,
            peer_stage=1 - self.side,
            limits=self.limits,
            receive_buffer_bytes=2 * message_cost(self.limits.message_bytes),
        )
        self.parts: deque[tuple[Head | None, bytes | memoryview]] = deque()
        self.wire: deque[bytes] = deque()
        self.stamped: list[bytes] = []  # each chunk of this generation, by sequence
        self.meant: deque[Sent] = deque()  # sent and not decoded there yet
        self.acknowledged = 0

    def queue(self, sent: Sent | None) -> None:
        if sent:
            self.meant.append(sent)
            self.parts.extend(split(sent.message, self.limits.chunk_bytes))

    def kept(self) -> list[bytes]:
        """What a new connection carries first: as it was sent, never encoded again."""
        frames = self.session.retransmissions()
        assert frames == self.stamped[len(self.stamped) - len(frames) :]
        return frames


class Boundary(RuleBasedStateMachine):
    """Two stages, the link between them, and all that can happen to it and to them."""

    sides = st.sampled_from([0, 1])

    @initialize(run=runs, periods=st.tuples(st.integers(1, 3), st.integers(1, 3)), overwrites=st.booleans())
    def start(self, run: Run, periods: tuple[int, int], overwrites: bool) -> None:
        self.run, self.generation, self.connected, self.evaluations = run, 0, False, 0
        self.overwrites = overwrites  # whether a step that is done again replaces the checkpoint of its first time
        self.periods = periods  # steps between checkpoints that are made as soon as a step is completed
        self.both = [Side(run, 0), Side(run, 1)]
        self.old_chunks: list[tuple[int, bytes]] = []  # (towards which side, frame) of earlier generations
        self.taken: list[tuple[int, Message]] = []  # (by which side, message), of all generations
        self.replayed: dict[Any, bytes] = {}  # what was decoded of each microbatch, in whatever generation
        self.reference = undisturbed(run)
        self.reference_states: list[tuple[Any, Any]] = []
        self.connect(2)

    # -- the link -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.connected)
    @rule(heard=st.sampled_from([2, 2, 1, 0]))
    def connect(self, heard: int) -> None:
        """The upper stage greets, the lower answers. heard: how many greetings have arrived at once."""
        self.connected = True
        for side in self.both:
            side.session.connect()
        self.both[0].wire.append(self.both[0].session.greeting())
        for towards in (1, 0)[:heard]:
            self.deliver(towards, 1)

    @precondition(lambda self: self.connected)
    @rule()
    def cut(self) -> None:
        """What is on its way is gone."""
        self.connected = False
        for side in self.both:
            side.wire.clear()
            side.session.disconnect()

    @rule(towards=sides, count=st.integers(1, 12))
    def send(self, towards: int, count: int) -> None:
        """Also while there is no connection: those chunks go out with what is sent again."""
        here = self.both[1 - towards]
        for _ in range(min(count, len(here.parts))):
            if not here.session.may_send(len(here.parts[0][1])):
                return
            frame = here.session.send(*here.parts.popleft())
            here.stamped.append(frame)
            if here.session.state is SessionState.OPEN:
                here.wire.append(frame)

    @rule(towards=sides, count=st.integers(1, 12))
    def deliver(self, towards: int, count: int) -> None:
        here, there = self.both[towards], self.both[1 - towards]
        for _ in range(min(count, len(there.wire))):
            for event in here.session.receive(there.wire.popleft()):
                if isinstance(event, Opened):
                    if towards == 1:
                        here.wire.append(here.session.greeting())
                    here.wire.extend(here.kept())
                elif isinstance(event, Received):
                    here.session.consume(event.cost_bytes)
                    self.decode(towards, event.message)
        if here.session.state is SessionState.OPEN and here.session.credit_due:
            here.wire.append(here.session.credit())

    def decode(self, side: int, message: Message) -> None:
        here, sent = self.both[side], self.both[1 - side].meant.popleft()
        decoded = here.end.take(message)
        assert (message.kind, message.step, message.microbatch) == (
            sent.message.kind,
            sent.message.step,
            sent.message.microbatch,
        )
        assert decoded == sent.meant, "what the encoder meant"
        for nth, (name, held) in enumerate(sent.tables.items()):
            replica = here.end.replicas[name]
            assert (replica.version, replica.digest, replica.table.tobytes()) == held
            assert message.body[2 * ROWS * nth :][: 2 * ROWS] == nearest(sent.tensor, replica.table).tobytes()
        if message.kind is not Kind.EVALUATION:
            key = message.kind, message.step, message.microbatch
            assert self.replayed.setdefault(key, decoded) == decoded, "a replay says what was said before"
        self.taken.append((side, message))

    @precondition(lambda self: self.connected)
    @rule(towards=sides, data=st.data())
    def duplicate(self, towards: int, data: st.DataObject) -> None:
        """A careless peer sends a chunk again that has arrived: dropped, whatever it said."""
        here, there = self.both[towards], self.both[1 - towards]
        old = there.stamped[: here.session._expected]
        if old and here.session.state is there.session.state is SessionState.OPEN:
            there.wire.append(data.draw(st.sampled_from(old[-2:]) | st.sampled_from(old)))
            self.deliver(towards, len(there.wire))

    # -- the stages ---------------------------------------------------------------------------------------------------

    @rule(side=sides, times=st.integers(1, 4))
    def work(self, side: int, times: int) -> None:
        for _ in range(times):
            here, before = self.both[side], self.both[side].end.completed
            here.queue(here.end.work())
            if here.end.completed > before and here.end.completed % self.periods[side] == 0:
                self.save(side)

    @rule()
    def evaluate(self) -> None:
        """At any moment, between two microbatches too; it must not show in anything."""
        self.evaluations += 1
        self.both[0].queue(self.both[0].end.evaluate(self.evaluations))

    @rule(rounds=st.integers(2, 7))
    def train(self, rounds: int) -> None:
        """A while in which nothing happens."""
        if not self.connected:
            self.connect(2)
        for _ in range(rounds):
            for side in (0, 1):
                self.work(side, 2)
                self.send(1 - side, 40)
                self.deliver(1 - side, 40)

    @rule(rounds=st.integers(1, 4), sent=st.integers(2, 12), arrived=st.tuples(st.integers(0, 12), st.integers(0, 12)))
    def break_in(self, rounds: int, sent: int, arrived: tuple[int, int]) -> None:
        """A connection that breaks with much on its way, both ways, and stages that work on meanwhile."""
        if not self.connected:
            self.connect(2)
        for _ in range(rounds):
            for side in (0, 1):
                self.work(side, 2)
                self.send(1 - side, sent)
                if arrived[side]:
                    self.deliver(1 - side, arrived[side])
        self.cut()
        for side in (0, 1):
            self.work(side, 1)
            self.send(1 - side, sent)

    @rule(side=sides)
    def save(self, side: int) -> None:
        """A checkpoint as of the last completed step, after whatever was decoded ahead since."""
        here = self.both[side]
        if self.overwrites or here.end.completed not in here.disk:
            here.disk[here.end.completed] = here.end.state()
        for completed in sorted(here.disk)[:-STEPS_KEPT]:
            del here.disk[completed]

    @precondition(lambda self: all(side.end.decoded for side in self.both))
    @rule(died=st.sampled_from([(), (0,), (1,), (0, 1)]), lost=st.integers(0, 2))
    def rollback(self, died: tuple[int, ...], lost: int) -> None:
        """All go back to the newest step that both can go back to, in a new generation. Who died has its disk only, and
        of
        that perhaps not all; the others have the present state in memory too."""
        offers: list[dict[int, dict[str, Any]]] = []
        for side, here in enumerate(self.both):
            if side in died:
                here.incarnation += 10
                for completed in sorted(here.disk)[len(here.disk) - lost :] if lost else []:
                    del here.disk[completed]
            memory = {} if side in died else {here.end.completed: here.end.state()}
            offers.append({**here.disk, **memory})
        goal = max({0} | set(offers[0]) & set(offers[1]))
        self.generation += 1
        self.connected = False
        for side, here in enumerate(self.both):
            self.old_chunks += [(1 - side, frame) for frame in here.stamped]
            here.began(End(self.run, side, self.generation, offers[side].get(goal)), self.generation)
            assert here.end.completed == goal

    # -- what must not be taken ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """A message that was decoded once, in this generation or an earlier one, is not decoded again, unless it brings
        nothing and was coded with what is here."""
        side, message = data.draw(st.sampled_from(self.taken[-20:]))
        end = self.both[side].end
        present = {name: [*(replica.version or ()), replica.digest] for name, replica in end.replicas.items()}
        if len(message.dictionary) or message.codec_header != present:
            self.refused(end, message)

    @precondition(lambda self: any(side.meant for side in self.both))
    @rule(data=st.data())
    def overtake(self, data: st.DataObject) -> None:
        """One that is on its way behind others cannot be decoded before them, if a change is among those."""
        side = data.draw(st.sampled_from([side for side in (0, 1) if self.both[side].meant]))
        coming = list(self.both[side].meant)
        nth = data.draw(st.integers(0, len(coming) - 1))
        if any(len(sent.message.dictionary) for sent in coming[:nth]):
            self.refused(self.both[1 - side].end, coming[nth].message)

    @precondition(lambda self: any(side.meant for side in self.both))
    @rule()
    def rob(self) -> None:
        """The next message without one of its changes, with one of them twice, or with one that leads elsewhere than it
        says."""
        for side, here in enumerate(self.both):
            if not here.meant or not len(here.meant[0].message.dictionary):
                continue
            message, end = here.meant[0].message, self.both[1 - side].end
            specs = {plan.spec.name: plan.spec for plan in self.run.of(message.kind)}
            raws = split_deltas(message.dictionary, specs)
            for wrong in ([*raws.values()][1:], [*raws.values(), next(iter(raws.values()))]):
                self.refused(end, replace(message, dictionary=join_deltas(wrong)))
            for name, raw in raws.items():
                delta = replace(decode_delta(raw, specs[name]), digest=bytes(DIGEST_BYTES))
                header = {**message.codec_header, name: [*delta.version, delta.digest]}
                wrong = join_deltas({**raws, name: encode_delta(delta)}.values())
                self.refused(end, replace(message, dictionary=wrong, codec_header=header))
                before = self.held(end)
                with pytest.raises(RemoteProtocolError):
                    end.replicas[name].apply(delta)
                assert self.held(end) == before

    def refused(self, end: End, message: Message) -> None:
        before = self.held(end)
        with pytest.raises(RemoteProtocolError):
            end.take(message)
        assert self.held(end) == before

    @staticmethod
    def held(end: End) -> Any:
        tables = {name: replica.state() for name, replica in end.replicas.items()}
        return {name: (each["version"], each["digest"], each["table"].tobytes()) for name, each in tables.items()}

    @precondition(lambda self: self.connected and self.old_chunks)
    @rule(data=st.data())
    def wake_up(self, data: st.DataObject) -> None:
        """A chunk of an earlier generation is refused by name; the connection goes, and nothing else."""
        towards, frame = data.draw(st.sampled_from(self.old_chunks[-20:]))
        here = self.both[towards]
        if here.session.state is not SessionState.OPEN:
            return
        before, expected = self.held(here.end), here.session._expected
        with pytest.raises(RemoteProtocolError) as caught:
            here.session.receive(frame)
        assert caught.value.fault is Fault.GENERATION
        assert (self.held(here.end), here.session._expected) == (before, expected)
        self.cut()

    # -- what must always hold ----------------------------------------------------------------------------------------

    @invariant()
    def states_are_those_of_an_undisturbed_run(self) -> None:
        """At every moment: of each stage, as of the step that it has completed."""
        if not hasattr(self, "both"):
            return
        for side, here in enumerate(self.both):
            while len(self.reference_states) <= here.end.completed:
                upper, lower = next(self.reference)
                self.reference_states.append((content(upper.state()), content(lower.state())))
                self.reference_decoded = {**lower.decoded, **upper.decoded}
            assert content(here.end.state()) == self.reference_states[here.end.completed][side]
            assert here.session.unacknowledged_bytes == sum(map(len, here.session.retransmissions()))

    def teardown(self) -> None:
        """From any point, a while in which nothing happens brings both to the end of a later step."""
        if not hasattr(self, "both"):
            return
        if self.connected:
            self.cut()
        goal = max(side.end.completed for side in self.both) + 2
        for _ in range(200):
            if min(side.end.completed for side in self.both) >= goal:
                break
            self.train(1)
        assert min(side.end.completed for side in self.both) >= goal
        self.states_are_those_of_an_undisturbed_run()
        assert self.replayed
        for key, decoded in self.replayed.items():
            assert self.reference_decoded.get(key, decoded) == decoded


def has_started(**other: Any) -> Boundary:
    boundary = Boundary()
    boundary.start(run_of(**other), periods=(100, 100), overwrites=False)
    return boundary


def test_ends_may_go_on_from_checkpoints_of_two_generations() -> None:
    """A step that was done twice; each end has the checkpoint of another time."""
    boundary = has_started()
    upper, lower = boundary.both
    while lower.end.completed < 3:
        boundary.train(1)
        if upper.end.completed == lower.end.completed == 2:
            boundary.save(0)
            boundary.save(1)
    assert upper.end.completed == 2
    boundary.save(1)  # after 3 steps, in generation 0
    boundary.rollback(died=(0,), lost=0)
    while upper.end.completed < 3:
        boundary.train(1)
    boundary.save(0)  # after 3 steps, in generation 1
    boundary.rollback(died=(0, 1), lost=0)
    assert upper.end.completed == lower.end.completed == 3
    boundary.teardown()


@pytest.mark.parametrize("arrived", [(0, 0), (1, 7), (7, 1), (4, 4)])
def test_much_is_on_its_way_when_the_connection_breaks(arrived: tuple[int, int]) -> None:
    boundary = has_started(microbatches=3)
    boundary.train(3)
    for rounds in (1, 2, 3):
        boundary.break_in(rounds=rounds, sent=8, arrived=arrived)
        boundary.states_are_those_of_an_undisturbed_run()
    boundary.teardown()


Boundary.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestBoundary = Boundary.TestCase
TestBoundary.pytestmark = [pytest.mark.slow]  # pyright: ignore[reportAttributeAccessIssue]
