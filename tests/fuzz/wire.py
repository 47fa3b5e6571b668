"""Targets for what comes from the network: data frames, control frames, greetings.

Each one runs the code that a node runs (sessions, the rollback automaton) from a state that a real peer has brought
about, and checks beside the error's class what the code promises: a refusal changes nothing, what is held stays within
the credit, what this node answers is what a peer takes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

from thinpipe.node.links.control_stream import LIMITS as CONTROL_LIMITS
from thinpipe.protocol import stage_pb2 as pb
from thinpipe.protocol.control_messages import (
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
from thinpipe.protocol.errors import Fault, RefusedError, RemoteProtocolError
from thinpipe.protocol.global_norm import norm_message
from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.protocol.header import HEADER_DEPTH_MAX
from thinpipe.protocol.lane_status import LaneStatus, StatusExchange
from thinpipe.protocol.membership_log import Stretch
from thinpipe.protocol.messages import (
    MICROBATCH_MAX,
    OF_CONTEXT,
    PROTOCOL_VERSION,
    STEP_MAX,
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
from thinpipe.protocol.reassembly import message_cost
from thinpipe.protocol.rollback import GENERATIONS_AHEAD_MAX, Rollback
from thinpipe.protocol.rollback_actions import SIDES, Effect, End, Leave, Send, Side, Stop
from thinpipe.protocol.round_messages import RoundStatus
from thinpipe.protocol.session import LinkSession, Opened, Received

from ..builders import identity
from ..session_state import transfer_state
from . import mutators
from .judge import Ends, Finding, Target, check_refusal

LIMITS = Limits(message_bytes=1024, chunk_bytes=256)
BUFFER_BYTES = 2 * message_cost(LIMITS.message_bytes)
# What reading one frame may take beside the credit: a copy of it and of its data, the objects of the worst header (at
# most 256 KiB; tests/test_messages.py measures them), and the 256 KiB that msgpack's packer takes whatever it packs.
READING_BYTES = 512 * 1024 + 3 * max(LIMITS.frame_bytes, CONTROL_LIMITS.frame_bytes)
INPUT_BYTES_MAX = 8 * 1024

MINE = identity(1, 4, configuration="c0ffee table beef", incarnation=0xB, generation=3)
ABOVE, BELOW = replace(MINE, stage=0, incarnation=0xA), replace(MINE, stage=2, incarnation=0xC)


def _session(identity: NodeIdentity = MINE, peer_stage: int = 0, member: int | None = None) -> LinkSession:
    session = LinkSession(
        identity=identity, peer_stage=peer_stage, limits=LIMITS, receive_buffer_bytes=BUFFER_BYTES, member=member
    )
    session.connect()
    return session


def _greeting(identity: NodeIdentity, **other: Any) -> Greeting:
    return replace(identity.greeting(granted_bytes=BUFFER_BYTES), **other)


GREETING = encode_frame(_greeting(ABOVE))
OURS = Head(kind=Kind.GRADIENT, step=0, microbatch=0, codec="fp32", body_bytes=8)


def _opened(member: int | None = None) -> LinkSession:
    """A session in the middle of its work: greeted, and one chunk sent that is not acknowledged."""
    session = _session(member=member)
    session.receive(GREETING)
    session.send(OURS, bytes(8))
    return session


def _check_taken(frame: pb.Frame, session: LinkSession, due: int) -> None:
    """What holds of every frame that a session took where chunk number `due` was due."""
    if frame.chunk.sequence > due:
        raise Finding(f"chunk {frame.chunk.sequence} was taken for {due}")
    if len(frame.chunk.data) > LIMITS.chunk_bytes:
        raise Finding(f"a chunk of {len(frame.chunk.data)} bytes was taken")
    if max(frame.chunk.next_sequence, frame.credit.next_sequence) > session._next_sequence:
        raise Finding(f"what was never sent is acknowledged: {frame}")


def _check_message(message: Message, announced: int) -> None:
    """What a stage may rely on in a message that has come."""
    if not (0 <= message.step < STEP_MAX and 0 <= message.microbatch < MICROBATCH_MAX):
        raise Finding(f"step {message.step}, microbatch {message.microbatch} came through")
    if not (math.isfinite(message.loss_sum) and message.codec.isprintable()):
        raise Finding(f"loss {message.loss_sum}, codec {message.codec!a} came through")
    if (message.layer or message.segment) and message.kind not in OF_CONTEXT:
        raise Finding(f"layer {message.layer}, segment {message.segment} of {message.kind} came through")
    if message.head.data_bytes != announced or announced > LIMITS.message_bytes:
        raise Finding(f"a message of {message.head.data_bytes} bytes came through, announced were {announced}")
    header: Any = message.codec_header
    if not isinstance(header, dict) or _depth(header) > HEADER_DEPTH_MAX + 1 or not ascii(header).isprintable():
        raise Finding(f"the header {header!a} came through")


def _depth(value: Any) -> int:
    """Of containers within each other. Raises Finding for a text that must not be printed, a number that is none."""
    if (isinstance(value, str) and not value.isprintable()) or (isinstance(value, float) and not math.isfinite(value)):
        raise Finding(f"{value!a} came through in a header")
    within = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(_depth, within), default=0)


def frames(data: bytes) -> Ends:
    """A conversation on the tensors' stream, after the greeting; each refusal is followed by a new connection.

    Of a part's first byte, bit 0: the connection breaks before it; bit 1: what is held is consumed before it; bit 2:
    the part comes where a greeting is due.
    """
    taken, refused = 0, 0
    first = data[0] if data else 0
    session = _opened(ABOVE.incarnation if first & 1 else None)
    session.used = bool(first & 2)
    held: list[Received] = []
    announced = 0  # bytes of the message that is coming in
    for how, raw in mutators.cut(data[1:]):
        if how & 1 or session.state.name == "CLOSED":
            session.disconnect()
            session.connect()
            if not how & 4:
                peer = session.peer.incarnation if session.peer else ABOVE.incarnation
                again = _greeting(ABOVE, incarnation=peer, next_sequence=session._next_sequence)
                session.receive(encode_frame(again))  # who was greeted before is let in again, whatever came since
        if how & 2:
            for received in held:
                session.consume(received.cost_bytes)
            held.clear()
        before, due = transfer_state(session), session._expected
        try:
            events = session.receive(raw)
        except (RemoteProtocolError, RefusedError) as error:
            refused += 1
            check_refusal(error)
            if transfer_state(session) != before:
                raise Finding(f"'{error}' changed {before} to {transfer_state(session)}") from error
            continue
        taken += 1
        parsed = pb.Frame.FromString(raw)
        _check_taken(parsed, session, due)
        if parsed.chunk.HasField("head") and parsed.chunk.sequence == due:  # else: one that came before
            head = parsed.chunk.head
            announced = head.token_ids_bytes + head.dictionary_bytes + head.body_bytes
        for event in events:
            if isinstance(event, Opened) and event.started_over:
                held.clear()
            elif isinstance(event, Received):
                held.append(event)
                _check_message(event.message, announced)
        buffered = len(session._assembly._buffer) + sum(event.cost_bytes for event in held)
        if buffered > BUFFER_BYTES + LIMITS.message_bytes:
            raise Finding(f"{buffered} bytes are buffered, {BUFFER_BYTES} were granted")
    decode_frame(session.credit(), LIMITS)
    return Ends(taken, refused)


def _message(kind: Kind, microbatch: int, body: bytes, **other: Any) -> Message:
    header = {"shape": [2, 7, 5], "projector": [3, 1, 0, 0, bytes(16)]}
    return Message(kind=kind, step=1, microbatch=microbatch, codec="fp32", codec_header=header, body=body, **other)


def _frame_seeds() -> list[bytes]:
    mine, peer = _opened(), _session(ABOVE, 1)
    peer.receive(encode_frame(_greeting(MINE, granted_bytes=2**30)))  # seeds may say more than is granted
    peer.receive(mine.retransmissions()[0])
    sent: list[bytes] = []
    for nth, message in enumerate(
        [
            _message(Kind.ACTIVATION, 0, bytes(range(200)), token_ids=b"ids", dictionary=b"dictionary"),
            _message(Kind.EVALUATION, 1, bytes(600)),
            Message(kind=Kind.CONTEXT, step=1, microbatch=3, layer=2, segment=5, body=bytes(range(100))),
            Message(kind=Kind.EVALUATION_LOSS, step=1, microbatch=2, loss_sum=2.5),
            norm_message(1, 2.5),
        ]
    ):
        sent += [peer.send(head, part, acknowledge=not nth) for head, part in split(message, LIMITS.chunk_bytes)]
    credit = encode_frame(Credit(next_sequence=1, granted_bytes=2**20))
    goodbye = encode_frame(Goodbye())
    refusal = encode_frame(Refusal(code=Fault.GENERATION, reason="the peer belongs to an earlier attempt"))
    again = encode_frame(_greeting(ABOVE, next_sequence=1))
    stranger = encode_frame(_greeting(ABOVE, incarnation=0xAA))
    return [
        b"\x03" + mutators.join([(2 * (raw in sent[-3:]), raw) for raw in sent]),
        b"\x03" + mutators.join([(0, raw) for raw in (*sent[:1], credit, goodbye, credit)]),
        b"\x01" + mutators.join([(0, sent[0]), (5, again), (2, sent[1])]),
        b"\x00" + mutators.join([(5, stranger)]),
        b"\x02" + mutators.join([(0, refusal)]),
    ]


# -- greetings --------------------------------------------------------------------------------------------------------


def greetings(data: bytes) -> Ends:
    """One frame where a greeting is due. The first byte says before whom: a session that is fresh (0), in use (1), or
    open but unused (2), an automaton that trains (3) or takes a stage's place (4)."""
    who, raw = (data[0] % 5 if data else 0), data[1:]
    if who >= 3:
        return _greet_machine(raw, joining=who == 4)
    session = _session() if who == 0 else _opened()
    session.used = who == 1
    if who:
        session.disconnect()
        session.connect()
    before = transfer_state(session)
    try:
        session.receive(raw)
    except (RemoteProtocolError, RefusedError) as error:
        check_refusal(error)
        if transfer_state(session) != before:
            raise Finding(f"'{error}' changed {before} to {transfer_state(session)}") from error
        session.connect()
        session.receive(GREETING)  # the true neighbour finds its place
        return Ends(0, 1)
    decode_frame(session.greeting(), LIMITS)
    _check_kin(session.peer)
    if session.peer and session.peer.generation != MINE.generation:
        raise Finding(f"{session.peer} was let in")
    return Ends(1, 0)


def _check_kin(peer: Greeting | None) -> None:
    """Whoever was let in said what the stage above says."""
    said = peer and (peer.run_id, peer.configuration, peer.stages, peer.stage, peer.lane, peer.protocol_version)
    if said != (MINE.run_id, MINE.configuration, MINE.stages, ABOVE.stage, MINE.lane, PROTOCOL_VERSION):
        raise Finding(f"{peer} was let in")


def _greet_machine(raw: bytes, *, joining: bool) -> Ends:
    machine = Rollback(MINE, joining=joining)
    machine.generation = 0 if joining else MINE.generation
    if joining:
        machine.stopped({4, 2})
    try:
        frame = decode_frame(raw, CONTROL_LIMITS)
        if not isinstance(frame, Greeting):
            return Ends(0, 1)
        effects = machine.meet("above", frame)
    except RemoteProtocolError as error:
        check_refusal(error)
        if machine.peers["above"] is not None or machine.phase.name != ("STOPPED" if joining else "RUNNING"):
            raise Finding(f"'{error}' left {vars(machine)}") from error
        machine.meet("above", _greeting(ABOVE))
        return Ends(0, 1)
    _check_kin(frame)
    _carry_out(machine, effects)
    return Ends(1, 0)


def _greeting_seeds() -> list[bytes]:
    greeted = [_greeting(ABOVE), _greeting(ABOVE, next_sequence=1), _greeting(ABOVE, incarnation=0xAA)]
    greeted += [
        _greeting(ABOVE, joining=True),
        _greeting(ABOVE, generation=2),
        _greeting(ABOVE, configuration="c0ffed"),
    ]
    greeted += [_greeting(BELOW), _greeting(ABOVE, protocol_version=2)]
    greeted += [_greeting(ABOVE, incarnation=0xAA, next_sequence=1)]
    return [bytes([who]) + encode_frame(each) for who in range(5) for each in greeted]


# -- control ----------------------------------------------------------------------------------------------------------


def _carry_out(machine: Rollback, effects: list[Effect]) -> None:
    """What the node does with these: frames have to be such as a neighbour takes."""
    for effect in effects:
        if isinstance(effect, Send):
            raw = encode_frame(effect.frame)
            if decode_frame(raw, CONTROL_LIMITS) != effect.frame:
                raise Finding(f"the neighbour would read another frame than {effect.frame}")
        elif isinstance(effect, Stop):
            _carry_out(machine, machine.stopped({2, 4, 6}))


def _check_numbers(frame: Frame) -> None:
    """What every frame of the control stream keeps to."""
    for each in fields(frame):
        value = getattr(frame, each.name)
        numbers = value if isinstance(value, tuple) else [value] if isinstance(value, int) else []
        if len(numbers) > LISTED_MAX or (each.name != "incarnations" and any(number >= STEP_MAX for number in numbers)):
            raise Finding(f"{each.name} of {value} came through")
        if each.name == "steps" and any(later >= earlier for earlier, later in itertools.pairwise(numbers)):
            raise Finding(f"steps {value} came through")


def _check_status(status: LaneStatus) -> None:
    log = status.log
    lanes = {lane for each in log.stretches for lane in each.members} | {each.lane for each in status.admitted}
    if not lanes <= {0, 1, 2} or len(status.held) != 3 or log.stretches[-1].first > max(0, log.decided - 1):
        raise Finding(f"{status} came through")


def control(data: bytes) -> Ends:
    """A conversation on the control streams to both neighbours, with one automaton.

    Of the first byte, bit 0: this node takes a stage's place; bit 3: the run has lanes; the rest, by 3: whether it is
    first, last, or between. Of a part's first byte, bit 0: from below; bit 1: this stage is through; bit 2: that side
    dials anew.
    """
    first = data[0] if data else 0
    mine = replace(MINE, stage=(0, 3, 1)[first // 2 % 3])
    machine = Rollback(mine, joining=bool(first & 1))
    machine.generation = 0 if first & 1 else MINE.generation
    taken, refused = 0, 0
    statuses: dict[Side, StatusExchange] = {}
    if first & 1:
        _carry_out(machine, machine.stopped({2, 4}))
    sides = [side for side in SIDES if not (mine.first if side == "above" else mine.last)]
    for how, raw in mutators.cut(data[1:]):
        side = sides[how & 1 and len(sides) - 1]
        if how & 2:
            _carry_out(machine, machine.finished())
        if how & 4:
            machine.part(side)
        if machine.peers[side] is None:
            stage = mine.beside(side)
            incarnation = machine.members[stage] if machine.members else 0xA + stage
            statuses[side] = StatusExchange(3)
            near = _greeting(replace(mine, stage=stage, incarnation=incarnation), generation=machine.generation)
            _carry_out(machine, machine.meet(side, near))
        try:
            frame = decode_frame(raw, CONTROL_LIMITS)
            if isinstance(frame, Greeting):
                machine.check(side, frame)
                machine.part(side)
                effects = machine.meet(side, frame)
            elif isinstance(frame, RoundStatus) and first & 8:
                _check_status(statuses[side].hear(frame))
                effects = []
            else:
                if isinstance(frame, ControlFrame):
                    _check_numbers(frame)
                effects = machine.receive(side, frame)
        except RemoteProtocolError as error:
            refused += 1
            check_refusal(error)
            machine.part(side)
            continue
        taken += 1
        _carry_out(machine, effects)
        if machine.generation > MINE.generation + mutators.PARTS_MAX * (GENERATIONS_AHEAD_MAX + 1):
            raise Finding(f"{frame} led to generation {machine.generation}")
        decode_frame(encode_frame(machine.heartbeat("above")), CONTROL_LIMITS)
        if any(isinstance(effect, Leave | End) for effect in effects):
            break
    return Ends(taken, refused)


_STATUS = RoundStatus(
    held=(2, 1, 2), decided=2, stretches=(Stretch(first=0, members=(0, 1, 2)), Stretch(first=1, members=(0, 2)))
)


def _control_seeds() -> list[bytes]:
    do_view_change = DoViewChange(generation=3, incarnations=(0xC, 0xD), steps=(4, 2, 0))
    start_view = StartView(generation=4, completed_steps=4, incarnations=(0xA, 0xB, 0xC, 0xD))
    heartbeat, start_view_change, last = (
        Heartbeat(generation=3, completed_steps=2),
        StartViewChange(generation=3),
        LastStep(completed_steps=5),
    )
    greeting, joining = _greeting(ABOVE, granted_bytes=0), _greeting(BELOW, joining=True, generation=0, granted_bytes=0)
    spoken: list[tuple[int, list[tuple[int, Frame]]]] = [
        (
            4,
            [
                (0, heartbeat),
                (0, start_view_change),
                (1, do_view_change),
                (0, start_view),
                (0, Heartbeat(generation=4, completed_steps=4)),
            ],
        ),
        (5, [(1, replace(do_view_change, generation=0)), (0, replace(start_view, generation=1))]),
        (0, [(1, replace(do_view_change, incarnations=(0xB, 0xC, 0xD))), (1, Drain()), (1, Finished())]),
        (2, [(0, start_view_change), (0, replace(start_view, completed_steps=2)), (0, last)]),
        (4, [(1, Finished()), (2, heartbeat), (0, AllFinished())]),
        (4, [(1, Drain()), (0, last), (0, last), (5, heartbeat)]),
        (4, [(4, greeting), (5, joining), (1, replace(do_view_change, generation=2))]),
        (
            10,
            [(0, _STATUS), (1, _STATUS), (1, replace(_STATUS, stretches=(), decided=3)), (5, _STATUS), (0, heartbeat)],
        ),
        (4, [(0, _STATUS), (0, heartbeat)]),
        (4, [(0, replace(heartbeat, preparing=1)), (1, Failed(stage=2, completed_steps=2, reason="no disk"))]),
    ]
    return [
        bytes([first]) + mutators.join([(how, encode_frame(frame)) for how, frame in said]) for first, said in spoken
    ]


WIRE = [
    Target(
        name="frames",
        run=frames,
        mutate=mutators.conversation,
        seeds=_frame_seeds(),
        peak_bytes=READING_BYTES + BUFFER_BYTES + LIMITS.message_bytes + 2 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    ),
    Target(
        name="control",
        run=control,
        mutate=mutators.conversation,
        seeds=_control_seeds(),
        peak_bytes=READING_BYTES
        + 64 * INPUT_BYTES_MAX,  # a number of one byte in a packed list: an object of 32, twice
        input_bytes_max=INPUT_BYTES_MAX,
    ),
    Target(
        name="greetings",
        run=greetings,
        mutate=mutators.choosing(mutators.frame),
        seeds=_greeting_seeds(),
        peak_bytes=READING_BYTES + 2 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    ),
]
