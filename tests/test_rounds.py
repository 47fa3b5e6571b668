"""Contributions to rounds, sans-IO: all arrive, once, whole and in order, whatever breaks; what may not come is refused
by name."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.protocol.control_messages import (
    CopyDeclined,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
    Drain,
    Heartbeat,
)
from thinpipe.protocol.errors import Fault, LocalProtocolError, RefusedError, RemoteProtocolError
from thinpipe.protocol.greeting import check_greeting
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.protocol.membership_log import Stretch
from thinpipe.protocol.messages import Chunk, Credit, Frame, Goodbye, Refusal, decode_frame, encode_frame
from thinpipe.protocol.round_messages import RoundPart, RoundsReceived, RoundStatus, RoundsWanted
from thinpipe.protocol.round_session import (
    LIMITS,
    TRANSITIONS,
    PartCame,
    PeerDone,
    PeerGreeted,
    PeerParted,
    PeerTold,
    RoundEvent,
    RoundSession,
    RoundState,
)
from thinpipe.protocol.round_transfer import ROUNDS_AHEAD, WINDOW_PARTS_LEAST, Contribution, RoundSender

from .builders import identity

PART_BYTES = 8
WINDOW_BYTES = WINDOW_PARTS_LEAST * PART_BYTES
SIZES = (5, 130, 1, 64)
BEAT = Heartbeat(generation=0, completed_steps=0)
STATUS = RoundStatus(held=(3, 2), decided=2, stretches=(Stretch(first=0, members=(0, 1)),))


def size_of(round: int) -> int:
    return SIZES[round % len(SIZES)]


def content(lane: int, round: int) -> bytes:
    return bytes((17 * lane + 5 * round + at) % 251 for at in range(size_of(round)))


def described(data: bytes) -> Contribution:
    return Contribution(total_bytes=len(data), xxh3=xxhash.xxh3_64_intdigest(data))


@dataclass
class End:
    """The node of one lane, with a disk, and a training that gives and takes a round a step."""

    lane: int
    own: dict[int, bytes] = field(default_factory=dict)  # on the disk
    kept: dict[int, Contribution] = field(default_factory=dict)
    received: dict[int, bytes] = field(default_factory=dict)
    partial: bytes = b""  # of the first round that is not there
    at: int = 0  # the round that comes next
    checkpoint: int = 0
    taken: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coming: list[bytes] = []  # not written yet
        self.session = RoundSession(
            identity=identity(2, 4, lane=self.lane, lanes=2, incarnation=200 + self.lane),
            peer_lane=1 - self.lane,
            kept=self.kept,
            contribution_bytes=size_of,
            part_bytes=PART_BYTES,
            window_bytes=WINDOW_BYTES,
        )
        self.session.receiver.forget(self.checkpoint)

    def restarted(self, *, disk: bool) -> End:
        """Another process in its place, set back to its checkpoint."""
        known = {"lane": self.lane, "at": self.checkpoint, "checkpoint": self.checkpoint, "taken": self.taken}
        if not disk:
            return End(**known)
        return End(**known, own=self.own, kept=self.kept, received=self.received, partial=self.partial)

    # -- the node's part ----------------------------------------------------------------------------------------------

    def first_lacking(self) -> int:
        round = self.checkpoint
        while round in self.received:
            round += 1
        return round

    def greet(self) -> list[bytes]:
        self.session.connect()
        self.coming.clear()
        return [self.session.greeting(BEAT)]

    def take(self, raw: bytes) -> list[bytes]:
        """What it answers to one frame."""
        event = self.session.receive(raw)
        if isinstance(event, PeerGreeted):
            position = (self.first_lacking(), len(self.partial))
            return [self.session.wanted(position, described(content(1 - self.lane, position[0])).xxh3)]
        if isinstance(event, PartCame):
            self.coming.append(bytes(event.part.data))
            if self.session.receiver.write_due:
                return [self.write()]
        return self.ranges()

    def write(self) -> bytes:
        self.partial += b"".join(self.coming)
        self.coming.clear()
        round = self.first_lacking()
        if len(self.partial) == size_of(round):
            self.received[round], self.partial = self.partial, b""
        self.session.receiver.written()
        return self.session.received()

    def ranges(self) -> list[bytes]:
        frames = []
        while ranges := self.session.parts(1):
            for each in ranges:
                data = self.own[each.round][each.offset : each.offset + each.length]
                frames.append(self.session.part(each, data))
            sender = self.session.sender
            assert sender.unacknowledged_bytes <= WINDOW_BYTES
        return frames

    def step(self) -> list[bytes]:
        """What training does next, if it can: give, or take and go on."""
        round = self.at
        self.session.receiver.need(round)
        if round not in self.own:
            self.own[round] = content(self.lane, round)
            self.kept[round] = described(self.own[round])
        elif round in self.received:
            assert self.taken.setdefault(round, self.received[round]) == content(1 - self.lane, round)
            self.at += 1
        told = [self.session.received()] if self.session.receiver.tell_due else []
        return told + self.ranges()

    def save(self) -> None:
        """A checkpoint, once the peer has all that this node will not make again."""
        if self.session.sender.acknowledged >= (self.at, 0):
            self.checkpoint = self.at
            self.session.receiver.forget(self.at)
            for round in [each for each in self.received if each < self.at]:
                del self.received[round]
        for round in [each for each in self.own if each < self.session.sender.forget_before]:
            del self.own[round], self.kept[round]


class Pair:
    """Two ends, and what is on its way between them."""

    def __init__(self) -> None:
        self.ends = [End(0), End(1)]
        self.way: list[deque[bytes]] = [deque(), deque()]  # to that lane
        self.connected = False
        self.sent_parts = 0

    def send(self, lane: int, frames: list[bytes]) -> None:
        if self.connected:
            self.way[1 - lane] += frames

    def connect(self) -> None:
        if not self.connected:
            self.connected = True
            for lane in (1, 0):
                self.send(lane, self.ends[lane].greet())

    def cut(self) -> None:
        self.connected = False
        for lane in (0, 1):
            self.way[lane].clear()
            self.ends[lane].session.disconnect()
            self.ends[lane].coming.clear()

    def deliver(self, lane: int) -> bool:
        if not self.way[lane]:
            return False
        raw = self.way[lane].popleft()
        self.sent_parts += isinstance(decode_frame(raw, LIMITS), RoundPart)
        self.send(lane, self.ends[lane].take(raw))
        return True

    def restart(self, lane: int, *, disk: bool) -> None:
        self.cut()
        self.ends[lane] = self.ends[lane].restarted(disk=disk)

    def finish(self, rounds: int) -> None:
        """Nothing breaks any more."""
        while any(end.at < rounds for end in self.ends):
            self.connect()
            moved = [self.deliver(lane) for lane in (0, 1)]
            before = [end.at for end in self.ends]
            for lane, end in enumerate(self.ends):
                if end.at < rounds:
                    self.send(lane, end.step())
            assert any(moved) or any(self.way) or before != [end.at for end in self.ends], "both wait"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_contribution_arrives_whatever_breaks(data: st.DataObject) -> None:
    pair, rounds = Pair(), data.draw(st.integers(1, 9))
    loser = data.draw(st.integers(0, 1))  # two that lose their disks in turn may lose what neither makes again
    actions = ["deliver", "deliver", "deliver", "step", "step", "connect", "save", "cut", "restart", "lose"]
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=120)):
        lane = loser if action == "lose" else data.draw(st.integers(0, 1))
        end = pair.ends[lane]
        match action:
            case "deliver":
                pair.deliver(lane)
            case "step" if end.at < rounds:
                pair.send(lane, end.step())
            case "connect":
                pair.connect()
            case "save":
                end.save()
            case "cut":
                pair.cut()
            case "restart" | "lose":
                pair.restart(lane, disk=action == "restart")
    pair.finish(rounds)
    for end in pair.ends:
        assert end.taken == {round: content(1 - end.lane, round) for round in range(rounds)}


def test_an_undisturbed_link_sends_each_byte_once() -> None:
    pair = Pair()
    pair.finish(8)
    assert pair.sent_parts == 2 * sum(-(-size_of(round) // PART_BYTES) for round in range(8))


def test_what_has_arrived_is_not_sent_twice() -> None:
    """Of 17 parts of round 1 nine had come, of which two groups of four were written."""
    pair = Pair()
    for end in pair.ends:
        end.at = 0
    pair.connect()
    for _ in range(200):
        if len(pair.ends[0].partial) == 8 * PART_BYTES:
            break
        for lane, end in enumerate(pair.ends):
            pair.send(lane, end.step())
            pair.deliver(lane)
    assert pair.ends[0].first_lacking() == 1
    pair.cut()
    pair.restart(0, disk=True)
    pair.connect()
    for _ in range(6):
        pair.deliver(0), pair.deliver(1)
    # The other one's next part begins where those eight end.
    assert pair.ends[1].session.sender.acknowledged == (1, 8 * PART_BYTES)
    pair.finish(3)


# -- what is granted, what is forgotten -------------------------------------------------------------------------------


def greeted(*, kept: dict[int, bytes] | None = None, lane: int = 0) -> RoundSession:
    """A session of lane 0 to lane 1, with the greetings exchanged; its own contributions are these."""
    end = End(lane, own=dict(kept or {}), kept={round: described(data) for round, data in (kept or {}).items()})
    end.greet()
    end.session.receive(End(1 - lane).greet()[0])
    return end.session


def wanted(round: int, offset: int = 0, granted_before: int = 100, forget_before: int = 0) -> bytes:
    frame = RoundsWanted(round=round, offset=offset, granted_before=granted_before, forget_before=forget_before)
    return encode_frame(frame)


def received(round: int, offset: int = 0, granted_before: int = 100, forget_before: int = 0) -> bytes:
    frame = RoundsReceived(round=round, offset=offset, granted_before=granted_before, forget_before=forget_before)
    return encode_frame(frame)


def part(round: int, offset: int = 0, length: int = PART_BYTES, **other: Any) -> bytes:
    data = content(1, round)
    known = {"total_bytes": len(data), "contribution_xxh3": described(data).xxh3}
    frame = RoundPart(round=round, offset=offset, data=data[offset : offset + length], **{**known, **other})
    return encode_frame(frame)


def test_no_round_is_sent_before_it_is_granted() -> None:
    session = greeted(kept={round: content(0, round) for round in range(6)})
    session.receive(wanted(0, granted_before=1))
    assert [each.round for each in session.parts(100)] == [0]
    session.receive(received(1, granted_before=3))
    assert {each.round for each in session.parts(100)} == {1}  # the window is full
    session.receive(received(1, 3 * PART_BYTES, granted_before=2))  # a grant is never taken back
    assert {each.round for each in session.parts(100)} == {1}
    session.receive(received(1, 9 * PART_BYTES, granted_before=2))
    assert {each.round for each in session.parts(100)} == {1, 2}


def test_what_is_granted_goes_with_the_rounds_of_this_node() -> None:
    session = greeted()
    session.wanted((0, 0))
    assert session.receiver.granted_before == ROUNDS_AHEAD
    for round in range(3):
        session.receiver.need(round)
        assert session.receiver.granted_before == round + 1 + ROUNDS_AHEAD
    assert session.receiver.tell_due
    assert session.received() == received(0, granted_before=3 + ROUNDS_AHEAD)
    assert not session.receiver.tell_due
    session.receiver.need(3)
    assert not session.receiver.tell_due  # one round more is worth no frame
    session.receiver.need(40)  # but what this node waits for is always granted
    assert session.receiver.tell_due


def test_who_has_more_than_is_granted_by_now_goes_on_where_it_is() -> None:
    """After a restart from an early checkpoint, with all that had come still on the disk."""
    frame = decode_frame(greeted().wanted((50, 3), 7), LIMITS)
    assert frame == RoundsWanted(round=50, offset=3, granted_before=51, forget_before=0)


def test_nothing_is_said_to_be_forgotten_before_it_has_come() -> None:
    session = greeted()
    session.wanted((0, 0))
    session.receiver.forget(1)
    assert session.receiver.jumped
    session.receive(part(0))
    session.receiver.written()
    assert not session.receiver.jumped
    session.receiver.forget(3)
    assert session.receiver.jumped  # it has to ask anew
    assert session.received() == received(1, granted_before=3 + ROUNDS_AHEAD, forget_before=1)


def test_a_round_that_will_not_be_made_again_is_refused_when_that_is_known() -> None:
    session = greeted()
    session.receive(wanted(3))
    assert session.parts() == []  # it may still be made
    kept = session.sender._kept
    assert isinstance(kept, dict)
    kept[5] = described(content(0, 5))
    with pytest.raises(RemoteProtocolError, match="round 3 is asked for, of which nothing is kept any more; 5 is") as e:
        session.parts()
    assert e.value.fault is Fault.RESUME


@pytest.mark.parametrize("there", [0, 7, None], ids=str)
def test_nothing_is_sent_while_the_two_mean_other_histories(there: int | None) -> None:
    """One of them will learn of more decisions. Whatever is sent then, or asked for anew, is what both mean."""
    stays: dict[int, int | None] = {0: 0, 1: 5, 2: there, 3: 5}
    end = End(0, own={round: content(0, round) for round in range(4)})
    kept = {round: described(data) for round, data in end.own.items()}
    session = RoundSession(
        identity=end.session.identity,
        peer_lane=1,
        kept=kept,
        contribution_bytes=size_of,
        part_bytes=PART_BYTES,
        window_bytes=100 * PART_BYTES,
        stay_of=lambda round: stays[round],
    )

    def sent(frame: RoundsWanted) -> set[int]:
        session.connect()
        session.receive(End(1).greet()[0])
        session.receive(encode_frame(frame))
        return {each.round for each in session.parts(100)}

    asked = RoundsWanted(round=0, offset=0, granted_before=4, forget_before=0)
    assert sent(asked) == {0}
    assert sent(replace(asked, round=1)) == set()
    assert sent(replace(asked, round=1, stay=5)) == {1}  # and not round 2 yet
    stays[2] = 5
    assert {each.round for each in session.parts(100)} == {2, 3}


def test_a_status_is_said_to_whom_is_greeted_also_after_the_goodbye() -> None:
    session = End(0).session
    with pytest.raises(LocalProtocolError, match="a status while the link is closed"):
        session.status(STATUS)
    session.connect()
    with pytest.raises(LocalProtocolError, match="a status while the link is awaiting"):
        session.status(STATUS)
    session = greeted()
    session.goodbye()
    assert decode_frame(session.status(STATUS), LIMITS) == STATUS
    session.receive(encode_frame(Goodbye()))
    assert session.receive(encode_frame(STATUS)) == PeerTold(status=STATUS)


def test_nothing_is_asked_for_before_this_node_knows_where_it_is() -> None:
    session = greeted()
    session.receiver.forget_before = None
    with pytest.raises(LocalProtocolError):
        session.wanted((0, 0))
    session.receiver.forget(2)
    with pytest.raises(LocalProtocolError):
        session.wanted((1, 0))
    session.wanted((2, 0))
    with pytest.raises(LocalProtocolError, match="second"):
        session.wanted((2, 0))


def test_who_needs_nothing_more_still_sends() -> None:
    session = greeted(kept={0: content(0, 0)})
    session.goodbye()
    session.receive(wanted(0))
    assert [each.round for each in session.parts()] == [0]
    assert isinstance(session.receive(encode_frame(Goodbye())), PeerDone)
    assert session.parts() == []
    with pytest.raises(LocalProtocolError, match="an acknowledgement after the goodbye"):
        session.received()


def test_the_second_goodbye_says_that_the_first_one_of_the_other_was_heard() -> None:
    here, there = greeted(), greeted(lane=1)
    with pytest.raises(LocalProtocolError, match="a second goodbye while the link is open"):
        here.parting()
    assert isinstance(there.receive(here.goodbye()), PeerDone)
    assert not there.parting_due  # it still needs something
    assert isinstance(here.receive(there.goodbye()), PeerDone)
    assert here.parting_due
    assert isinstance(there.receive(here.parting()), PeerParted)
    assert isinstance(here.receive(there.parting()), PeerParted)
    assert (here.parting_due, there.parting_due) == (False, False)
    here.connect()  # on another connection all is said again
    assert (here.done, here.parted) == (False, False)


def test_a_second_goodbye_before_this_node_s_first_is_refused() -> None:
    session = greeted()
    session.receive(encode_frame(Goodbye()))
    with pytest.raises(RemoteProtocolError, match="a second goodbye, and this node has said none") as caught:
        session.receive(encode_frame(Goodbye()))
    assert caught.value.fault is Fault.UNEXPECTED


# -- what may not come ------------------------------------------------------------------------------------------------


ASKED = {"granted_before": 100}


@pytest.mark.parametrize(
    ("raw", "fault", "words"),
    [
        (part(1), Fault.OUT_OF_ORDER, "byte 0 of round 1 came where byte 0 of round 0 was due"),
        (part(0, 1), Fault.OUT_OF_ORDER, "byte 1 of round 0"),
        (part(0, total_bytes=6), Fault.OVERSIZED, "6 bytes to round 0, which has 5 here"),
        (part(0, 0, 4, total_bytes=4), Fault.MALFORMED, "4 bytes to round 0, which has 5 here"),
        (received(0), Fault.UNEXPECTED, "RoundsReceived frame while the link is open"),
        (wanted(1, 130), Fault.UNEXPECTED, "byte 130 of round 1 of 130 bytes"),
        (encode_frame(Heartbeat(generation=0, completed_steps=1, missing=5)), Fault.MALFORMED, "stage 4 cannot be"),
        (encode_frame(Heartbeat(generation=0, completed_steps=1, preparing=5)), Fault.MALFORMED, "stage 4 cannot"),
        (encode_frame(Drain()), Fault.UNEXPECTED, "a Drain frame"),
        (b"\x07", Fault.MALFORMED, "not a frame"),
    ],
    ids=str,
)
def test_it_is_refused_and_nothing_changes(raw: bytes, fault: Fault, words: str) -> None:
    session = greeted(kept={0: content(0, 0)})
    session.wanted((0, 0))
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        session.receive(raw)
    assert caught.value.fault is fault
    assert session.state is RoundState.CLOSED
    session.connect()
    session.receive(End(1).greet()[0])
    session.wanted((0, 0))
    session.receive(part(0))
    session.receive(wanted(0))


def test_parts_are_bounded_by_what_was_asked_for_and_granted() -> None:
    session = greeted()
    with pytest.raises(RemoteProtocolError, match="of which nothing was asked for"):
        session.receive(part(0))
    session = greeted()
    session.wanted((ROUNDS_AHEAD - 1, 0))
    for at in range(0, size_of(ROUNDS_AHEAD - 1), PART_BYTES):
        session.receive(part(ROUNDS_AHEAD - 1, at))
    with pytest.raises(RemoteProtocolError, match=f"round {ROUNDS_AHEAD} came, granted is") as caught:
        session.receive(part(ROUNDS_AHEAD))
    assert caught.value.fault is Fault.OVERDRAWN


def test_a_contribution_that_changes_on_its_way_is_refused() -> None:
    session = greeted()
    session.wanted((1, 8), xxh3=described(content(1, 1)).xxh3)
    session.receive(part(1, 8))
    with pytest.raises(RemoteProtocolError, match="changed at byte 16") as caught:
        session.receive(part(1, 16, contribution_xxh3=9))
    assert caught.value.fault is Fault.PAYLOAD


@pytest.mark.parametrize("raw", [received(0, 3), received(1), received(2), received(0, 4)], ids=str)
def test_an_acknowledgement_where_no_part_ends_is_refused(raw: bytes) -> None:
    session = greeted(kept={0: content(0, 0), 1: content(0, 1)})
    session.receive(wanted(0, 4))
    if raw != received(1):
        session.parts(1)
    else:  # it was not sent yet
        assert session.sender.unacknowledged_bytes == 0
    if raw == received(0, 4):
        session.receive(received(1))  # nor back
    with pytest.raises(RemoteProtocolError, match="where parts from") as caught:
        session.receive(raw)
    assert caught.value.fault is Fault.OUT_OF_ORDER


def test_a_promise_lasts_until_the_next_request() -> None:
    """Who made it may have been a stranger that knew how to greet."""
    session = greeted(kept={round: content(0, round) for round in range(2, 6)})
    session.receive(wanted(4, forget_before=3))
    session.receive(received(4, forget_before=1))  # while the connection lasts it is not taken back
    assert session.sender.forget_before == 3
    session.disconnect()
    assert session.sender.forget_before == 3
    session.connect()
    session.receive(End(1).greet()[0])
    session.receive(wanted(2, forget_before=2))
    assert session.sender.forget_before == 2
    assert session.parts(1)[0].round == 2


@pytest.mark.parametrize(
    ("other", "fault", "words"),
    [
        ({"protocol_version": 2}, Fault.PROTOCOL_VERSION, "protocol version"),
        ({"run_id": "q"}, Fault.RUN_ID, "run id"),
        ({"configuration": "d"}, Fault.CONFIGURATION, "configuration"),
        ({"stages": 5}, Fault.STAGE, "number of stages"),
        ({"stage": 1}, Fault.STAGE, "stage index: stage 2 expects 2, the peer .stage 1. says 1"),
        ({"lane": 0}, Fault.LANE, "lane 0: the other's lane: stage 2 expects 1, the peer .stage 2. says 0"),
        ({"lane": 2}, Fault.LANE, "expects 1, the peer .stage 2. says 2; one of the two dials"),
    ],
    ids=str,
)
def test_another_node_is_refused(other: dict[str, Any], fault: Fault, words: str) -> None:
    end = End(0)
    end.greet()
    greeting = replace(End(1).session.identity.greeting(), **other)
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        end.session.receive(encode_frame(greeting))
    assert caught.value.fault is fault
    end.greet()
    end.session.receive(End(1).greet()[0])


def test_a_neighbour_of_another_lane_is_refused() -> None:
    mine, above = (identity(stage, 4, lane=1, lanes=2) for stage in (2, 1))
    check_greeting(above.greeting(), mine, GridPlace(1, 1))
    with pytest.raises(RemoteProtocolError, match=r"neighbour's lane: stage 2 expects 1, the peer .* says 0") as e:
        check_greeting(replace(above, lane=0).greeting(), mine, GridPlace(1, 1))
    assert e.value.fault is Fault.LANE


FRAMES: dict[type[Frame], bytes] = {
    type(decode_frame(raw, LIMITS)): raw
    for raw in [
        *End(1).greet(),
        encode_frame(Refusal(code=Fault.LANE, reason="no")),
        encode_frame(BEAT),
        encode_frame(STATUS),
        wanted(0),
        received(0),
        part(0),
        encode_frame(Goodbye()),
        encode_frame(Credit(next_sequence=0, granted_bytes=0)),
        encode_frame(Chunk(sequence=0, generation=0, data=b"x")),
        encode_frame(Drain()),
        encode_frame(CopyWanted(stage=2, completed_steps=4)),
        encode_frame(CopyOffer(stage=2, completed_steps=4, manifest=b"{}")),
        encode_frame(CopyPart(stage=2, completed_steps=4, offset=0, data=b"x")),
        encode_frame(CopyProgress(stage=2, completed_steps=4, offset=1)),
        encode_frame(CopyDeclined(stage=2, completed_steps=4, reason="no")),
    ]
}


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.__name__)
@pytest.mark.parametrize("state", RoundState, ids=lambda state: state.name)
def test_the_table_says_what_may_come_when(state: RoundState, frame: type[Frame]) -> None:
    assert {each for row in TRANSITIONS.values() for each in row} <= set(FRAMES)
    goodbye = encode_frame(Goodbye())
    end = End(0)
    raw = {RoundState.PULLED: [wanted(0)], RoundState.PEER_DONE: [goodbye], RoundState.PARTED: [goodbye, goodbye]}
    session = end.session
    if state is not RoundState.CLOSED:
        session.connect()
    if state not in (RoundState.CLOSED, RoundState.AWAIT):
        session.receive(End(1).greet()[0])
        session.wanted((0, 0))
    if state in (RoundState.PEER_DONE, RoundState.PARTED):
        session.goodbye()
    for each in raw.get(state, []):
        session.receive(each)
    assert session.state is state
    following = TRANSITIONS[state].get(frame)
    event: RoundEvent | None = None
    if following is None:
        with pytest.raises(RemoteProtocolError, match="while the link is") as caught:
            session.receive(FRAMES[frame])
        assert caught.value.fault is Fault.UNEXPECTED
    elif frame is Refusal:
        with pytest.raises(RefusedError):
            session.receive(FRAMES[frame])
    else:
        event = session.receive(FRAMES[frame])
        assert session.state is following
    in_vain = frame is RoundPart and session.done
    assert (event is None) == (following is None or frame is Refusal or in_vain)


def test_a_window_has_room_for_what_is_acknowledged_at_once() -> None:
    with pytest.raises(ValueError, match="in a window of 63"):
        RoundSender({}, size_of, part_bytes=8, window_bytes=63)
