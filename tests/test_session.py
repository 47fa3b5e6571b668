"""The rules of one link: delivery over a network that loses connections, and refusal of everything else, by name."""

from __future__ import annotations

import tracemalloc
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thinpipe.protocol.errors import Fault, LocalProtocolError, RefusedError, RemoteProtocolError
from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.protocol.messages import (
    PROTOCOL_VERSION,
    TEXT_CHARACTERS_MAX,
    Chunk,
    Credit,
    Frame,
    Goodbye,
    Greeting,
    Head,
    Kind,
    Limits,
    Message,
    Refusal,
    decode_frame,
    encode_frame,
    split,
)
from thinpipe.protocol.reassembly import MESSAGE_COST_BYTES, message_cost
from thinpipe.protocol.session import TRANSITIONS, Acknowledged, LinkSession, Opened, PeerDone, Received, SessionState

from . import builders
from .session_state import transfer_state

LIMITS = Limits(message_bytes=300, chunk_bytes=64)
BUFFER_BYTES = 2 * message_cost(LIMITS.message_bytes)
FRAME_TYPES: list[type[Frame]] = [Greeting, Refusal, Chunk, Credit, Goodbye]


def identity(stage: int, **other: Any) -> NodeIdentity:
    known = {"run_id": "run", "stages": 4, "configuration": "c0ffee" * 10, "incarnation": 1000 + stage, "generation": 3}
    return builders.identity(stage, **{**known, **other})


def session(stage: int, peer_stage: int, buffer_bytes: int = BUFFER_BYTES, **other: Any) -> LinkSession:
    return LinkSession(
        identity=identity(stage, **other), peer_stage=peer_stage, limits=LIMITS, receive_buffer_bytes=buffer_bytes
    )


def greet(upper: LinkSession, lower: LinkSession) -> tuple[Opened, Opened]:
    """A new connection, opened by the upper stage; what it has to resend is returned by `retransmissions`."""
    upper.connect()
    lower.connect()
    [there] = lower.receive(upper.greeting())
    [here] = upper.receive(lower.greeting())
    assert isinstance(here, Opened)
    assert isinstance(there, Opened)
    return here, there


def pair() -> tuple[LinkSession, LinkSession]:
    upper, lower = session(1, 2), session(2, 1)
    greet(upper, lower)
    return upper, lower


def message(nth: int, size: int = 150) -> Message:
    data = bytes((nth + i) % 251 for i in range(size))
    return Message(kind=Kind.GRADIENT, step=nth, microbatch=1, codec="bf16", body=data, loss_sum=0.5 * nth)


def stamped(sender: LinkSession, what: Message, chunk_bytes: int = LIMITS.chunk_bytes) -> list[bytes]:
    return [sender.send(head, data) for head, data in split(what, chunk_bytes)]


def received(receiver: LinkSession, frames: list[bytes]) -> list[Message]:
    """Feeds the frames, consumes at once."""
    out = []
    for raw in frames:
        for event in receiver.receive(raw):
            assert isinstance(event, Received)
            receiver.consume(event.cost_bytes)
            out.append(event.message)
    return out


def content(what: Message) -> tuple[Any, ...]:
    return (what.head, bytes(what.token_ids), bytes(what.body))


def fault_of(receiver: LinkSession, raw: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        receiver.receive(raw)
    assert str(caught.value).isprintable()
    assert len(caught.value.reason) <= TEXT_CHARACTERS_MAX
    return caught.value


def refusal(error: RemoteProtocolError) -> bytes:
    """What a transport answers to `error`."""
    return encode_frame(Refusal(code=error.fault, reason=error.reason))


# -- any interleaving of delivery, loss, reconnect and refusal ---------------------------------------------------------


class Side:
    """One end: a session, what waits to be sent, and the wire towards the other end."""

    def __init__(self, stage: int, peer_stage: int) -> None:
        self.session = session(stage, peer_stage)
        self.parts: deque[tuple[Head | None, bytes | memoryview]] = deque()
        self.wire: deque[bytes] = deque()
        self.sent: list[tuple[Any, ...]] = []
        self.got: list[tuple[Any, ...]] = []
        self.unconsumed: deque[int] = deque()
        self.kept: dict[int, bytes] = {}  # every chunk ever stamped, by sequence
        self.acknowledged = 0

    @property
    def open(self) -> bool:
        return self.session.state is SessionState.OPEN


class LinkMachine(RuleBasedStateMachine):
    """Two sessions joined by a link that delivers in order, and that may vanish with what is on it, at any point."""

    sides = st.sampled_from([0, 1])

    @initialize()
    def start(self) -> None:
        self.ends = [Side(1, 2), Side(2, 1)]
        self.connected = False

    @precondition(lambda self: not self.connected)
    @rule(heard=st.sampled_from([2, 2, 2, 1, 0]))
    def reconnect(self, heard: int) -> None:
        """The upper stage speaks first; the lower answers once it has heard, as in the transport.

        heard: how many of the two greetings arrive at once; `deliver` brings the others, unless the link is gone first.
        """
        self.connected = True
        for end in self.ends:
            end.session.connect()
        self.ends[0].wire.append(self.ends[0].session.greeting())
        for side in (1, 0)[:heard]:
            self.deliver(side, 1)

    @precondition(lambda self: self.connected)
    @rule(unlucky=st.integers(0, 5))
    def drop(self, unlucky: int) -> None:
        """What is in flight is lost, both ways, greetings included. Seldom, so that something happens between."""
        if unlucky < 5:
            return
        self.connected = False
        for end in self.ends:
            end.wire.clear()
            end.session.disconnect()

    @rule(side=sides, ids=st.integers(0, 130), body=st.integers(0, 170), cut=st.sampled_from([64, 64, 20, 7]))
    def queue(self, side: int, ids: int, body: int, cut: int) -> None:
        end = self.ends[side]
        nth = len(end.sent)
        what = Message(
            kind=Kind.ACTIVATION,
            step=nth,
            microbatch=side,
            codec_header={"nth": nth},
            token_ids=bytes((nth + i) % 256 for i in range(ids)),
            body=bytes((nth * 3 + i) % 256 for i in range(body)),
            loss_sum=nth / 7,
        )
        end.sent.append(content(what))
        end.parts.extend(split(what, cut))

    @rule(side=sides, count=st.integers(1, 30))
    def send(self, side: int, count: int) -> None:
        """Also while there is no connection: what is stamped then goes out with what has to be sent again."""
        end = self.ends[side]
        for _ in range(count):
            if not end.parts or not end.session.may_send(len(end.parts[0][1])):
                return
            raw = end.session.send(*end.parts.popleft())
            end.kept[len(end.kept)] = raw
            if end.open:
                end.wire.append(raw)

    @rule(side=sides, count=st.integers(1, 30))
    def deliver(self, side: int, count: int) -> None:
        """Towards `side`."""
        here, there = self.ends[side], self.ends[1 - side]
        for _ in range(min(count, len(there.wire))):
            self.arrive(side, here, there.wire.popleft())

    def arrive(self, side: int, here: Side, raw: bytes) -> None:
        for event in here.session.receive(raw):
            match event:
                case Opened():
                    if side == 1:
                        here.wire.append(here.session.greeting())
                    here.wire.extend(here.session.retransmissions())
                    here.acknowledged = max(here.acknowledged, event.peer.next_sequence)
                case Received():
                    here.got.append(content(event.message))
                    here.unconsumed.append(event.cost_bytes)
                case Acknowledged():
                    here.acknowledged = max(here.acknowledged, event.next_sequence)
                case PeerDone():
                    raise AssertionError("nobody said goodbye")
        if isinstance(frame := decode_frame(raw, LIMITS), Chunk):  # it acknowledges as well
            here.acknowledged = max(here.acknowledged, frame.next_sequence)

    @precondition(lambda self: any(end.kept for end in self.ends))
    @rule(side=sides, data=st.data())
    def send_a_duplicate(self, side: int, data: st.DataObject) -> None:
        """An old chunk again, as a careless peer may after a reconnect: dropped, whenever it comes."""
        end, other = self.ends[side], self.ends[1 - side]
        old = [raw for sequence, raw in end.kept.items() if sequence < other.session._expected]
        if end.open and other.open and old:
            end.wire.append(data.draw(st.sampled_from(old)))

    @precondition(lambda self: self.connected)
    @rule(sent=st.integers(0, 20), arrived=st.integers(0, 25), consumed=st.integers(0, 2))
    def exchange(self, sent: int, arrived: int, consumed: int) -> None:
        """A while of ordinary traffic, both ways; what had not arrived by its end is still in flight."""
        for side in (0, 1):
            self.queue(side, 20 * sent % 130, 7 * arrived, 64)
            self.send(side, sent)
        for side in (0, 1):
            self.deliver(side, arrived)
            for _ in range(consumed):
                self.consume(side)
            self.grant(side)

    @rule(side=sides)
    def consume(self, side: int) -> None:
        if self.ends[side].unconsumed:
            self.ends[side].session.consume(self.ends[side].unconsumed.popleft())

    @rule(side=sides)
    def grant(self, side: int) -> None:
        end = self.ends[side]
        if end.open and end.session.credit_due:
            end.wire.append(end.session.credit())
            assert not end.session.credit_due

    @precondition(lambda self: any(end.wire for end in self.ends))
    @rule(side=sides, byte=st.integers(1, 60), bit=st.integers(0, 7), unlucky=st.integers(0, 2))
    def spoil(self, side: int, byte: int, bit: int, unlucky: int) -> None:
        """The network spoils a chunk: the receiver refuses it and the connection goes, but nothing else does."""
        here, there = self.ends[side], self.ends[1 - side]
        while there.wire and unlucky == 2:
            raw = there.wire.popleft()
            if not isinstance(decode_frame(raw, LIMITS), Chunk):
                self.arrive(side, here, raw)
                continue
            before = transfer_state(here.session)
            spoilt = bytearray(raw)
            spoilt[-min(byte, len(raw))] ^= 1 << bit
            error = fault_of(here.session, bytes(spoilt))
            with pytest.raises(RefusedError) as told:
                there.session.receive(refusal(error))
            assert told.value.fault is error.fault
            assert transfer_state(here.session) == before
            self.drop(5)

    @invariant()
    def counters_agree(self) -> None:
        if not hasattr(self, "ends"):
            return
        for here, there in zip(self.ends, reversed(self.ends), strict=True):
            kept = here.session.retransmissions()
            assert here.session.unacknowledged_bytes == sum(map(len, kept))
            assert kept == [here.kept[i] for i in range(here.acknowledged, len(here.kept))], "resent, never re-encoded"
            assert here.got == there.sent[: len(here.got)], "exactly once, in order, byte-identical"
            assert sum(here.unconsumed) <= BUFFER_BYTES
            assert here.session._received_cost - here.session._consumed_cost <= BUFFER_BYTES
            assert there.session._sent_cost <= here.session._granted, "credit overdrawn"

    def teardown(self) -> None:
        """From any point, a network that behaves for a while delivers everything."""
        if not hasattr(self, "ends"):
            return
        if self.connected:
            self.drop(5)
        self.reconnect(2)
        for _ in range(sum(len(end.parts) + len(end.kept) + len(end.sent) for end in self.ends) + 3):
            for side in (0, 1):
                self.send(side, 1000)
                self.deliver(side, 1000)
                while self.ends[side].unconsumed:
                    self.consume(side)
                self.grant(side)
        self.counters_agree()
        for here, there in zip(self.ends, reversed(self.ends), strict=True):
            assert here.got == there.sent
            assert not here.parts
            assert here.session.unacknowledged_bytes == 0
            assert here.session.retransmissions() == []


LinkMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=80, deadline=None)
TestLink = LinkMachine.TestCase


# -- the transition table ----------------------------------------------------------------------------------------------


def in_state(state: SessionState) -> tuple[LinkSession, LinkSession]:
    """(sender, receiver in that state). Unless the sender said goodbye, one part of its message 2 is through."""
    upper, lower = pair()
    received(lower, stamped(upper, message(0)))
    stamped(lower, message(1))
    if state is SessionState.PEER_DONE:
        lower.receive(upper.goodbye())
    else:
        under_way = stamped(upper, message(2))
        lower.receive(under_way[0])
    match state:
        case SessionState.CLOSED:
            lower.disconnect()
        case SessionState.AWAIT:
            lower.connect()
    assert lower.state is state
    return upper, lower


def honest(kind: type[Frame], sender: LinkSession) -> bytes:
    """A frame that would be right in its own place."""
    frames: dict[type[Frame], bytes] = {
        Greeting: sender.greeting(),
        Refusal: encode_frame(Refusal(code="timeout", reason="too slow")),
        Credit: sender.credit(),
        Goodbye: encode_frame(Goodbye()),
        Chunk: sender.retransmissions()[-1],
    }
    return frames[kind]


@pytest.mark.parametrize("kind", FRAME_TYPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("state", SessionState, ids=lambda state: state.name)
def test_every_pair_of_state_and_frame(state: SessionState, kind: type[Frame]) -> None:
    upper, lower = in_state(state)
    raw, before = honest(kind, upper), transfer_state(lower)
    if kind not in TRANSITIONS[state]:
        error = fault_of(lower, raw)
        assert error.fault is Fault.UNEXPECTED
        assert kind.__name__.lower() in str(error)
        assert state.value in str(error)
        assert transfer_state(lower) == before
        told = decode_frame(refusal(error), LIMITS)
        assert told == Refusal(code="unexpected-frame", reason=error.reason)
        assert lower.state is SessionState.CLOSED
    elif kind is Refusal:
        with pytest.raises(RefusedError, match="too slow"):
            lower.receive(raw)
        assert lower.state is SessionState.CLOSED
        assert transfer_state(lower) == before
    elif kind is Goodbye:
        assert fault_of(lower, raw).fault is Fault.UNEXPECTED  # in_state left a message half through
        assert transfer_state(lower) == before
    else:
        if kind is Chunk and state is SessionState.OPEN:
            raw = upper.retransmissions()[-2]
        lower.receive(raw)
        assert lower.state is TRANSITIONS[state][kind]
    # Whatever happened on that connection, the next one delivers everything, once.
    greet(upper, lower)
    arrived = received(lower, upper.retransmissions())
    assert [content(what) for what in arrived] == ([] if state is SessionState.PEER_DONE else [content(message(2))])
    assert [content(what) for what in received(upper, lower.retransmissions())] == [content(message(1))]


def test_the_table_says_what_the_docstring_says() -> None:
    assert {state: set(row) for state, row in TRANSITIONS.items()} == {
        SessionState.CLOSED: set(),
        SessionState.AWAIT: {Greeting, Refusal},
        SessionState.OPEN: {Chunk, Credit, Goodbye, Refusal},
        SessionState.PEER_DONE: {Credit, Refusal},
    }


def test_a_refused_frame_closes_the_connection_for_all_that_follow() -> None:
    """What was already queued behind a bad frame must not be taken as if nothing had been."""
    upper, lower = pair()
    frames = stamped(upper, message(0))
    assert fault_of(lower, b"garbage").fault is Fault.MALFORMED
    assert lower.state is SessionState.CLOSED
    for raw in frames:
        assert fault_of(lower, raw).fault is Fault.UNEXPECTED
    greet(upper, lower)
    assert [content(what) for what in received(lower, upper.retransmissions())] == [content(message(0))]


def test_goodbye() -> None:
    upper, lower = pair()
    received(lower, stamped(upper, message(0)))
    upper.receive(lower.credit())
    assert lower.receive(upper.goodbye()) == [PeerDone()]
    assert lower.state is SessionState.PEER_DONE
    # The one that said goodbye still listens, and the other may still send and be credited.
    assert received(upper, stamped(lower, message(1)))
    assert lower.receive(upper.credit()) == [Acknowledged(next_sequence=3)]
    assert lower.unacknowledged_bytes == 0
    assert upper.receive(lower.goodbye()) == [PeerDone()]


def test_no_goodbye_in_the_middle_of_a_message() -> None:
    upper, lower = pair()
    first, *rest = stamped(upper, message(0))
    lower.receive(first)
    assert fault_of(lower, encode_frame(Goodbye())).fault is Fault.UNEXPECTED
    greet(upper, lower)
    assert [content(what) for what in received(lower, rest)] == [content(message(0))]
    upper.send(*next(split(message(1), 64)))
    with pytest.raises(LocalProtocolError):
        upper.goodbye()


# -- greetings ---------------------------------------------------------------------------------------------------------

LONG = "experiment-with-a-very-long-name-that-somebody-chose-"


@pytest.mark.parametrize(
    ("there", "fault", "printed"),
    [
        ({"run_id": "other"}, Fault.RUN_ID, ["stage 2 expects run,", "says other"]),
        ({"run_id": ""}, Fault.RUN_ID, ["expects run,", "says nothing"]),
        ({"run_id": "x" * TEXT_CHARACTERS_MAX}, Fault.RUN_ID, ["expects run,", "says xxxxxxxxxxxx…"]),
        (
            {"configuration": "f00" * 20},
            Fault.CONFIGURATION,
            ["expects c0ffeec0ffee…", "says f00f00f00f00…", "run.toml"],
        ),
        ({"configuration": "c0ffee" * 9 + "d"}, Fault.CONFIGURATION, ["expects …ffeec0ffee,", "says …ffeed;"]),
        ({"stages": 5}, Fault.STAGE, ["number of stages", "expects 4", "says 5"]),
        ({"stage": 3}, Fault.STAGE, ["neighbour's stage index", "expects 1", "says 3", "--stage"]),
        ({"stage": 2}, Fault.STAGE, ["neighbour's stage index", "expects 1", "says 2"]),
        ({"generation": 2}, Fault.GENERATION, ["expects 3", "says 2"]),
        ({"generation": 4}, Fault.GENERATION, ["expects 3", "says 4"]),
        ({"protocol_version": 77}, Fault.PROTOCOL_VERSION, [f"expects {PROTOCOL_VERSION},", "says 77", "thinpipe"]),
        ({"protocol_version": 77, "run_id": "other", "stages": 9}, Fault.PROTOCOL_VERSION, ["says 77"]),
        ({"next_sequence": 1}, Fault.RESUME, ["chunk 1", "keeps 0 to 0"]),
        ({"next_sequence": 2**64 - 1}, Fault.RESUME, [f"chunk {2**64 - 1}", "keeps 0 to 0"]),
    ],
    ids=str,
)
def test_a_greeting_that_does_not_agree_is_refused_with_both_values(
    there: dict[str, Any], fault: Fault, printed: list[str]
) -> None:
    upper, lower = session(1, 2), session(2, 1)
    upper.connect()
    lower.connect()
    honest_greeting = decode_frame(upper.greeting(), LIMITS)
    assert isinstance(honest_greeting, Greeting)
    before = transfer_state(lower)
    error = fault_of(lower, encode_frame(replace(honest_greeting, **there)))
    assert error.fault is fault
    for text in printed:
        assert text in str(error)
    assert transfer_state(lower) == before
    with pytest.raises(RefusedError) as told:
        upper.receive(refusal(error))
    assert (told.value.fault, told.value.reason) == (fault, error.reason)
    greet(upper, lower)  # the right neighbour is still welcome
    assert received(lower, stamped(upper, message(0)))


def test_what_differs_is_printed_however_late_it_comes() -> None:
    upper, lower = session(1, 2, run_id=LONG + "A"), session(2, 1, run_id=LONG + "B")
    lower.connect()
    reason = str(fault_of(lower, upper.greeting()))
    assert "expects …ose-B" in reason
    assert "says …ose-A" in reason


def test_ones_own_greeting_sent_back_is_refused() -> None:
    lower = session(2, 1)
    lower.connect()
    assert fault_of(lower, lower.greeting()).fault is Fault.STAGE


@pytest.mark.parametrize("sent", ["here", "there"])
def test_a_peer_that_was_restarted_in_the_middle_is_refused(sent: str) -> None:
    upper, lower = pair()
    received(lower, stamped(upper, message(0))) if sent == "there" else stamped(lower, message(0))
    lower.used = True
    reborn = session(1, 2, incarnation=0xBEEF)
    lower.connect()
    before = transfer_state(lower)
    error = fault_of(lower, reborn.greeting())
    assert error.fault is Fault.INCARNATION
    assert "3e9" in str(error)  # 1001
    assert "beef" in str(error)
    assert transfer_state(lower) == before
    here, there = greet(upper, lower)
    assert here.resumed
    assert there.resumed


@pytest.mark.parametrize("sent", ["here", "there"])
def test_another_process_may_take_the_place_of_one_of_which_nothing_was_used(sent: str) -> None:
    stranger, lower = pair()
    received(lower, stamped(stranger, message(0))) if sent == "there" else stamped(lower, message(0))
    true_neighbour = session(1, 2, incarnation=0xBEEF)
    _, there = greet(true_neighbour, lower)
    assert there.started_over
    assert not there.resumed
    assert lower.unacknowledged_bytes == 0
    assert not lower.retransmissions()
    assert received(lower, stamped(true_neighbour, message(1))) == [message(1)]


@pytest.mark.parametrize("sent", ["here", "there"])
def test_another_process_that_is_refused_takes_nobodys_place(sent: str) -> None:
    """One that knows how to greet, but asks for chunks that it can never have got."""
    upper, lower = pair()
    frames = stamped(upper, message(0))
    received(lower, frames[:1]) if sent == "there" else stamped(lower, message(0))
    lower.disconnect()
    lower.connect()
    before = transfer_state(lower)
    stranger = replace(decode_frame(upper.greeting(), LIMITS), incarnation=0xBEEF, next_sequence=1)
    assert fault_of(lower, encode_frame(stranger)).fault is Fault.RESUME
    assert transfer_state(lower) == before
    _, there = greet(upper, lower)
    assert there.resumed
    assert received(lower, upper.retransmissions() if sent == "there" else frames) == [message(0)]


def test_a_restart_before_anything_moved_is_a_fresh_start() -> None:
    upper, lower = session(1, 2), session(2, 1, 3 * BUFFER_BYTES)
    here, there = greet(upper, lower)
    assert not here.resumed
    assert not there.resumed
    reborn = session(2, 1, BUFFER_BYTES, incarnation=5)
    here, _ = greet(upper, reborn)
    assert not here.resumed
    assert here.peer.incarnation == 5
    # What the dead process granted does not bind the living one: the honest sender stays within the smaller buffer.
    got = 0
    while upper.may_send(0):
        reborn.receive(upper.send(message(0, 0).head, b""))
        got += 1
    assert got == BUFFER_BYTES // MESSAGE_COST_BYTES


def test_a_peer_that_forgot_what_it_acknowledged_cannot_resume() -> None:
    upper, lower = pair()
    received(lower, stamped(upper, message(0)))
    upper.receive(lower.credit())
    assert upper.unacknowledged_bytes == 0
    forgetful = session(2, 1)  # the same incarnation, another memory
    upper.connect()
    error = fault_of(upper, forgetful.greeting())
    assert error.fault is Fault.RESUME
    assert "chunk 0" in str(error)
    assert "keeps 3 to 3" in str(error)


def test_a_resumed_link_resends_only_what_is_missing_as_it_was() -> None:
    upper, lower = pair()
    frames = stamped(upper, message(0)) + stamped(upper, message(1))
    received(lower, frames[:4])
    upper.disconnect()
    lower.disconnect()
    here, there = greet(upper, lower)
    assert here.resumed
    assert there.resumed
    assert upper.retransmissions() == frames[4:]
    assert [content(what) for what in received(lower, upper.retransmissions())] == [content(message(1))]


def test_duplicates_are_dropped_and_cost_nothing() -> None:
    upper, lower = pair()
    frames = stamped(upper, message(0))
    assert len(received(lower, frames)) == 1
    before = transfer_state(lower)
    for _ in range(1000):
        assert received(lower, frames) == []
    assert transfer_state(lower) == before


# -- chunks that break a rule ------------------------------------------------------------------------------------------


def forged(sequence: int, data: bytes = b"", head: Head | None = None, generation: int = 3) -> bytes:
    return encode_frame(Chunk(sequence=sequence, generation=generation, data=data, head=head))


def head_of(size: int, ids: int = 0) -> Head:
    return Head(kind=Kind.ACTIVATION, step=0, microbatch=0, token_ids_bytes=ids, body_bytes=size - ids)


CORRUPT = bytearray(forged(1, b"abcdefgh"))
CORRUPT[-1] ^= 1

# name -> (frames that pass, the one that does not, its fault, what the reason names)
BROKEN: dict[str, tuple[list[bytes], bytes, Fault, str]] = {
    "gap": ([], forged(1, b"x", head_of(1)), Fault.OUT_OF_ORDER, "chunk 1 came where 0"),
    "gap in a message": ([forged(0, b"x", head_of(9))], forged(2, b"x"), Fault.OUT_OF_ORDER, "chunk 2 came where 1"),
    "far future": ([], forged(2**64 - 1, b"x", head_of(1)), Fault.OUT_OF_ORDER, "came where 0"),
    "no head": ([], forged(0, b"x"), Fault.OUT_OF_ORDER, "belongs to no message"),
    "no head after a whole message": (
        [forged(0, b"x", head_of(1))],
        forged(1, b"x"),
        Fault.OUT_OF_ORDER,
        "belongs to no message",
    ),
    "head in the middle": (
        [forged(0, b"x", head_of(9))],
        forged(1, b"x", head_of(9)),
        Fault.OUT_OF_ORDER,
        "a message within a message",
    ),
    "over-long at once": ([], forged(0, b"xyz", head_of(2)), Fault.MALFORMED, "byte 3 of a message of 2"),
    "over-long in the end": (
        [forged(0, b"x" * 8, head_of(9))],
        forged(1, b"xy"),
        Fault.MALFORMED,
        "byte 10 of a message of 9",
    ),
    "data of an empty message": ([], forged(0, b"x", head_of(0)), Fault.MALFORMED, "byte 1 of a message of 0"),
    "empty head": ([], forged(0, b"", head_of(9)), Fault.MALFORMED, "chunk 0 is empty"),
    "empty part": ([forged(0, b"x", head_of(9))], forged(1, b""), Fault.MALFORMED, "chunk 1 is empty"),
    "crc": ([forged(0, b"x", head_of(9))], bytes(CORRUPT), Fault.CORRUPT, "chunk 1 does not match"),
    "earlier generation": (
        [],
        forged(0, b"x", head_of(1), generation=2),
        Fault.GENERATION,
        "of generation 2, this run is in 3",
    ),
    "duplicate of an earlier generation": (
        [forged(0, b"x", head_of(1))],
        forged(0, b"x", head_of(1), generation=2),
        Fault.GENERATION,
        "of generation 2",
    ),
    "message too long": ([], forged(0, b"x", head_of(LIMITS.message_bytes + 1)), Fault.OVERSIZED, "301 bytes"),
    "chunk too long": ([], forged(0, b"x" * 65, head_of(65)), Fault.OVERSIZED, "65 bytes"),
    "acknowledges the unsent": (
        [],
        encode_frame(Credit(next_sequence=1, granted_bytes=0)),
        Fault.OUT_OF_ORDER,
        "only 0 were sent",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_and_changes_nothing(name: str) -> None:
    fine, broken, fault, named = BROKEN[name]
    _, lower = pair()
    received(lower, fine)
    before = transfer_state(lower)
    error = fault_of(lower, broken)
    assert error.fault is fault
    assert named in str(error)
    assert transfer_state(lower) == before
    assert lower.state is SessionState.CLOSED


def test_a_message_comes_whole_whatever_its_parts() -> None:
    """Byte by byte, at once, empty, ids and body: the receiver does not care how the peer cuts."""
    for cut in (1, 7, 64):
        for ids, body in ((0, 0), (1, 0), (0, 1), (33, 31), (100, 200)):
            upper, lower = pair()
            what = replace(message(4, body), token_ids=bytes(range(ids)))
            [whole] = received(lower, stamped(upper, what, cut))
            assert content(whole) == content(what)


# -- credit ------------------------------------------------------------------------------------------------------------


def test_an_honest_sender_stops_at_the_credit_and_goes_on_when_it_is_granted() -> None:
    upper, lower = pair()
    parts = [part for nth in range(4) for part in split(message(nth, 300), 64)]
    events: list[Received] = []
    stopped = 0
    while parts:
        head, data = parts[0]
        if upper.may_send(len(data)):
            for event in lower.receive(upper.send(head, data)):
                assert isinstance(event, Received)
                events.append(event)
            parts.pop(0)
            continue
        stopped += 1
        with pytest.raises(LocalProtocolError) as caught:
            upper.send(head, data)
        assert caught.value.fault is Fault.OVERDRAWN
        assert not lower.credit_due or lower._expected
        lower.consume(events.pop(0).cost_bytes)
        upper.receive(lower.credit())
    assert stopped == 2
    assert len(events) == 2


def test_a_buffer_for_one_message_always_takes_one_however_it_is_cut() -> None:
    """The price must not depend on the sender's chunk size, or a full-size message would wait for credit for ever."""
    for cut in (1, 3, 64):
        upper, lower = session(1, 2), session(2, 1, message_cost(LIMITS.message_bytes))
        greet(upper, lower)
        for nth in range(3):
            what = message(nth, LIMITS.message_bytes)
            assert [content(m) for m in received(lower, stamped(upper, what, cut))] == [content(what)]
            upper.receive(lower.credit())


@pytest.mark.parametrize("size", [0, 1, 64])
def test_a_dishonest_sender_is_stopped_at_the_buffer(size: int) -> None:
    """Empty messages too: each is charged for its head."""
    _, lower = pair()
    held, sequence = 0, 0
    while held + message_cost(size) <= BUFFER_BYTES:
        [event] = lower.receive(forged(sequence, b"x" * size, head_of(size)))
        assert isinstance(event, Received)
        assert event.cost_bytes == message_cost(size)
        held += event.cost_bytes
        sequence += 1
    before = transfer_state(lower)
    error = fault_of(lower, forged(sequence, b"x" * size, head_of(size)))
    assert error.fault is Fault.OVERDRAWN
    assert str(BUFFER_BYTES) in str(error)
    assert transfer_state(lower) == before


def test_an_overdraft_within_a_message_is_stopped_too() -> None:
    lower = session(2, 1, message_cost(300) + 100)
    upper = session(1, 2)
    greet(upper, lower)
    whole = [forged(i, b"x" * 60, head_of(300) if i == 0 else None) for i in range(5)]
    assert len([event for raw in whole for event in lower.receive(raw)]) == 1
    assert fault_of(lower, forged(5, b"x", head_of(300))).fault is Fault.OVERDRAWN


@pytest.mark.alone  # other threads of a test worker allocate, too
def test_real_memory_stays_within_the_buffer_and_one_message() -> None:
    """The same bound in bytes that Python holds, with the heads that cost most."""
    limits = Limits(message_bytes=64 * 1024)
    buffer_bytes = 1 << 20
    lower = LinkSession(identity=identity(2), peer_stage=1, limits=limits, receive_buffer_bytes=buffer_bytes)
    greet(session(1, 2), lower)
    frames = [
        forged(i, b"", Head(kind=Kind.GRADIENT, step=0, microbatch=0, codec_header={"a": [{}] * 250}))
        for i in range(buffer_bytes // MESSAGE_COST_BYTES + 1)
    ]
    events = []
    tracemalloc.start()
    try:
        for raw in frames[:-1]:
            events += lower.receive(raw)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(events) == len(frames) - 1
    assert used <= buffer_bytes
    assert fault_of(lower, frames[-1]).fault is Fault.OVERDRAWN


@pytest.mark.alone  # other threads of a test worker allocate, too
def test_a_delivered_message_is_the_receivers_alone() -> None:
    """Once the stage lets go of it and `consume` grants its bytes again, they must really be free."""
    size = 512 * 1024
    lower = LinkSession(
        identity=identity(2), peer_stage=1, limits=Limits(message_bytes=size), receive_buffer_bytes=message_cost(size)
    )
    greet(session(1, 2), lower)
    half = bytes(size // 2)
    frames = [forged(0, half, head_of(size)), forged(1, half)]
    tracemalloc.start()
    try:
        events = [event for raw in frames for event in lower.receive(raw)]
        held, _ = tracemalloc.get_traced_memory()
        events.clear()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held >= size
    assert left < size // 8


def test_a_buffer_that_cannot_hold_one_message_is_refused_at_construction() -> None:
    enough = message_cost(LIMITS.message_bytes)
    assert session(2, 1, enough).state is SessionState.CLOSED
    with pytest.raises(LocalProtocolError, match=f"receive_buffer_bytes to at least {enough}") as caught:
        session(2, 1, enough - 1)
    assert caught.value.fault is Fault.OVERSIZED
    assert str(enough - 1) in str(caught.value)


def test_a_grant_is_never_taken_back() -> None:
    upper, lower = pair()
    generous = lower.credit()
    upper.receive(encode_frame(Credit(next_sequence=0, granted_bytes=0)))
    assert upper.may_send(64)
    upper.receive(generous)
    greeting = decode_frame(lower.greeting(), LIMITS)
    assert isinstance(greeting, Greeting)
    upper.connect()
    upper.receive(encode_frame(replace(greeting, granted_bytes=1)))
    assert upper.may_send(64)


def test_nothing_can_be_sent_before_the_peer_grants() -> None:
    fresh = session(1, 2)
    assert not fresh.may_send(0)
    with pytest.raises(LocalProtocolError):
        fresh.send(head_of(0), b"")
    assert fresh.retransmissions() == []


def test_credit_is_due_when_it_says_something_new() -> None:
    upper, lower = pair()
    assert not lower.credit_due, "the greeting said it all"
    first, *rest = stamped(upper, message(0))
    lower.receive(first)
    assert lower.credit_due
    upper.receive(lower.credit())
    assert not lower.credit_due
    assert not upper.credit_due, "credits must not answer credits"
    [event] = [event for raw in rest for event in lower.receive(raw)]
    assert isinstance(event, Received)
    lower.credit()
    assert not lower.credit_due
    lower.consume(event.cost_bytes)
    assert lower.credit_due


def test_a_chunk_tells_what_a_credit_would() -> None:
    upper, lower = pair()
    [first, *_] = stamped(upper, message(0))
    lower.receive(first)
    assert lower.credit_due
    [back, *_] = stamped(lower, message(1))
    assert not lower.credit_due, "the chunk has said it"
    assert len(upper.retransmissions()) == len(list(split(message(0), 64)))
    upper.receive(back)
    assert first not in upper.retransmissions()


@pytest.mark.parametrize("asked", [True, False])
def test_a_credit_is_urgent_only_where_the_peer_asked(asked: bool) -> None:
    upper, lower = pair()
    lower.receive(upper.send(head_of(0), b"", acknowledge=asked))
    assert lower.credit_due
    assert lower.credit_urgent is asked
    lower.credit()
    assert not lower.credit_due
    assert not lower.credit_urgent


def test_a_chunk_that_acknowledges_what_was_never_sent_is_refused_and_changes_nothing() -> None:
    _, lower = pair()
    chunk = Chunk(sequence=0, generation=lower.identity.generation, head=head_of(0), data=b"", next_sequence=1)
    before = transfer_state(lower)
    assert fault_of(lower, encode_frame(chunk)).fault is Fault.OUT_OF_ORDER
    assert transfer_state(lower) == before


def test_no_more_is_consumed_than_was_received() -> None:
    upper, lower = pair()
    [event] = [event for raw in stamped(upper, message(0)) for event in lower.receive(raw)]
    assert isinstance(event, Received)
    lower.consume(event.cost_bytes)
    for cost_bytes in (event.cost_bytes, 1, -1):
        with pytest.raises(LocalProtocolError) as caught:
            lower.consume(cost_bytes)
        assert caught.value.fault is Fault.OVERDRAWN


# -- this node's own mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_started", "head", "data", "fault"),
    [
        (False, None, b"x", Fault.OUT_OF_ORDER),
        (True, head_of(3), b"x", Fault.OUT_OF_ORDER),
        (True, None, b"xyz", Fault.MALFORMED),
        (True, None, b"", Fault.MALFORMED),
        (False, head_of(3), b"", Fault.MALFORMED),
        (False, head_of(3), b"wxyz", Fault.MALFORMED),
        (False, replace(head_of(1), loss_sum=float("nan")), b"x", Fault.PAYLOAD),
        (False, replace(head_of(1), codec_header={"scale": float("inf")}), b"x", Fault.PAYLOAD),
        (False, replace(head_of(1), step=-1), b"x", Fault.MALFORMED),
    ],
    ids=["no head", "head within", "too long", "empty", "empty head", "too long at once", "loss", "header", "step"],
)
def test_a_part_that_the_peer_would_refuse_is_never_kept(
    has_started: bool, head: Head | None, data: bytes, fault: Fault
) -> None:
    """A kept frame is sent again on every connection; one that the peer must refuse would end them all."""
    upper, lower = pair()
    if has_started:
        lower.receive(upper.send(head_of(3), b"x"))
    before = transfer_state(upper)
    with pytest.raises(LocalProtocolError) as caught:
        upper.send(head, data)
    assert caught.value.fault is fault
    assert transfer_state(upper) == before
    if has_started:
        assert received(lower, [upper.send(None, b"yz")])
