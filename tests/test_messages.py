"""Frames and messages: round trips, and that no bytes whatever get more out of `decode_frame` than a named refusal."""

from __future__ import annotations

import math
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from thinpipe.protocol import messages
from thinpipe.protocol import stage_pb2 as pb
from thinpipe.protocol.control_messages import (
    BYTES_MAX,
    PART_BYTES_MAX,
    STEP_MAX,
    AllFinished,
    CopiesHeld,
    CopyDeclined,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
    DoViewChange,
    Failed,
    Finished,
    Heartbeat,
    StartView,
    StartViewChange,
)
from thinpipe.protocol.envelope import Gathered
from thinpipe.protocol.errors import Fault, LocalProtocolError, RefusedError, RemoteProtocolError
from thinpipe.protocol.header import (
    HEADER_BYTES_MAX,
    HEADER_DEPTH_MAX,
    HEADER_VALUES_MAX,
    TEXT_CHARACTERS_MAX,
    decode_header,
    encode_header,
)
from thinpipe.protocol.membership_log import STRETCHES_MAX, Entry, Stretch
from thinpipe.protocol.messages import (
    ENVELOPE_BYTES_MAX,
    LAYERS_MAX,
    MICROBATCH_MAX,
    OF_CONTEXT,
    PROTOCOL_VERSION,
    SEGMENTS_MAX,
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
from thinpipe.protocol.reassembly import MESSAGE_COST_BYTES, Assembly
from thinpipe.protocol.round_messages import (
    LANES_MAX,
    RoundPart,
    RoundsReceived,
    RoundStatus,
    RoundsWanted,
    round_part_checksum,
)

unhurried = settings(deadline=None)  # the machine may be busy; what is asserted is never the time

LIMITS = Limits(message_bytes=4096, chunk_bytes=1024)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PRINTABLE = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=20)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    PRINTABLE,
    st.binary(max_size=20),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PRINTABLE, inner, max_size=4), max_leaves=8
)
headers = st.dictionaries(PRINTABLE, values, max_size=4)

plain_heads = st.builds(
    Head,
    kind=st.sampled_from(sorted(set(Kind) - OF_CONTEXT)),
    step=st.integers(0, STEP_MAX - 1),
    microbatch=U32,
    codec=PRINTABLE,
    codec_header=headers,
    token_ids_bytes=st.integers(0, LIMITS.message_bytes // 2),
    body_bytes=st.integers(0, LIMITS.message_bytes // 2),
    loss_sum=st.floats(allow_nan=False, allow_infinity=False),
)
heads = plain_heads | st.builds(
    replace,
    plain_heads,
    kind=st.sampled_from(sorted(OF_CONTEXT)),
    layer=st.integers(0, LAYERS_MAX - 1),
    segment=st.integers(0, SEGMENTS_MAX - 1),
)
chunks = st.builds(
    Chunk, sequence=U64, generation=U64, data=st.binary(max_size=LIMITS.chunk_bytes), head=st.none() | heads
)
STEPS = st.integers(0, STEP_MAX - 1)
INCARNATIONS = st.lists(U64, max_size=64).map(tuple)
parts = st.builds(CopyPart, stage=U32, completed_steps=STEPS, offset=STEPS, data=st.binary(max_size=100))


@st.composite
def round_frames(draw: st.DrawFn) -> RoundsWanted | RoundsReceived:
    forget_before, round, granted_before = sorted(draw(st.lists(STEPS, min_size=3, max_size=3)))
    offset = draw(STEPS) if round < granted_before else 0
    known = {"forget_before": forget_before, "round": round, "granted_before": granted_before, "offset": offset}
    if draw(st.booleans()):
        return RoundsReceived(**known)
    return RoundsWanted(**known, stay=draw(STEPS))


LANES = st.sets(st.integers(0, LANES_MAX - 1), min_size=1, max_size=5).map(lambda lanes: tuple(sorted(lanes)))


@st.composite
def entries(draw: st.DrawFn, lane: int, first: int | None = None) -> Entry:
    copied, begins = sorted(draw(st.tuples(STEPS, STEPS)))
    source = draw(st.integers(0, LANES_MAX - 1))
    return Entry(lane=lane, first=draw(STEPS) if first is None else first, begins=begins, source=source, copied=copied)


@st.composite
def round_statuses(draw: st.DrawFn) -> RoundStatus:
    stretches: list[Stretch] = []
    for first in sorted({0, *draw(st.sets(STEPS, max_size=3))}) if draw(st.booleans()) else ():
        members = draw(LANES)
        same = bool(stretches) and members == stretches[-1].members
        entered = [lane for lane in members if same or draw(st.booleans())]
        new = tuple(draw(entries(lane, first)) for lane in entered)
        stretches.append(Stretch(first=first, members=members, entered=new))
    least = stretches[-1].first + 1 if stretches and stretches[-1].first else 0
    return RoundStatus(
        held=tuple(draw(st.lists(STEPS, max_size=LANES_MAX))),
        decided=draw(st.integers(min(least, STEP_MAX - 1), STEP_MAX - 1)),
        stretches=tuple(each for each in stretches if each.first < STEP_MAX - 1),
        admitted=tuple(draw(entries(lane)) for lane in draw(LANES)) if draw(st.booleans()) else (),
        returning=draw(STEPS),
        there=draw(LANES) if draw(st.booleans()) else (),
    )


@st.composite
def round_parts(draw: st.DrawFn) -> RoundPart:
    data = draw(st.binary(min_size=1, max_size=100))
    offset, rest = draw(st.integers(0, STEP_MAX - 300)), draw(st.integers(0, 100))
    total = offset + len(data) + rest
    return RoundPart(round=draw(STEPS), offset=offset, total_bytes=total, contribution_xxh3=draw(U64), data=data)


frames: st.SearchStrategy[Frame] = st.one_of(
    chunks,
    st.builds(Credit, next_sequence=U64, granted_bytes=U64),
    st.builds(
        Greeting,
        run_id=PRINTABLE,
        configuration=PRINTABLE,
        stage=U32,
        stages=U32,
        incarnation=U64,
        next_sequence=U64,
        granted_bytes=U64,
        generation=U64,
        completed_steps=U64,
        protocol_version=U32,
        joining=st.booleans(),
        lane=U32,
    ),
    st.builds(Refusal, code=PRINTABLE, reason=PRINTABLE),
    st.builds(Goodbye),
    st.builds(Heartbeat, generation=STEPS, completed_steps=STEPS, missing=U32, copied_steps=STEPS, preparing=U32),
    st.builds(Failed, stage=U32, completed_steps=STEPS, reason=PRINTABLE, replays=st.booleans()),
    st.builds(StartViewChange, generation=STEPS),
    st.builds(
        CopiesHeld, stage=U32, steps=st.sets(STEPS, max_size=64).map(lambda steps: tuple(sorted(steps, reverse=True)))
    ),
    st.builds(CopyOffer, stage=U32, completed_steps=STEPS, manifest=st.binary(max_size=100)),
    st.builds(CopyProgress, stage=U32, completed_steps=STEPS, offset=STEPS),
    parts,
    st.builds(CopyWanted, stage=U32, completed_steps=STEPS),
    st.builds(CopyDeclined, stage=U32, completed_steps=STEPS, reason=PRINTABLE),
    st.builds(
        DoViewChange,
        generation=STEPS,
        incarnations=INCARNATIONS,
        steps=st.sets(st.integers(1, STEP_MAX - 1), max_size=32).map(lambda some: (*sorted(some, reverse=True), 0)),
    ),
    st.builds(StartView, generation=STEPS, completed_steps=STEPS, incarnations=INCARNATIONS),
    st.builds(Finished),
    st.builds(AllFinished),
    round_frames(),
    round_parts(),
    round_statuses(),
)


def refusal_of(raw: bytes, limits: Limits = LIMITS) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_frame(raw, limits)
    return caught.value


def reencoded(frame: pb.Frame) -> bytes:
    """The bytes of a frame that was tampered with, under a right checksum: the peer is dishonest, not the network."""
    if frame.HasField("chunk"):
        frame.chunk.xxh3 = messages._checksum(frame.chunk, frame.chunk.data)
    return frame.SerializeToString()


def chunk_pb(**head: Any) -> pb.Frame:
    data = head.pop("data", b"")
    return pb.Frame(chunk=pb.Chunk(data=data, head=pb.MessageHead(**{"kind": 1, **head})))


def round_part(**fields: Any) -> pb.Frame:
    """With the checksum that belongs to it."""
    said = {"round": 2, "offset": 0, "contribution_xxh3": 5, **fields}
    return pb.Frame(round_part=pb.RoundPart(**said, xxh3=round_part_checksum(RoundPart(**said))))


def round_status(**fields: Any) -> pb.Frame:
    return pb.Frame(round_status=pb.RoundStatus(**fields))


def stretch(**fields: Any) -> pb.RoundStretch:
    return pb.RoundStretch(**{"members": [0, 1], **fields})


def entry(**fields: Any) -> pb.RoundEntry:
    return pb.RoundEntry(**{"lane": 1, "begins": 10, "copied": 10, **fields})


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (pb.Frame(heartbeat=pb.Heartbeat(generation=2**48)), Fault.MALFORMED),
        (pb.Frame(start_view=pb.StartView(completed_steps=2**48)), Fault.MALFORMED),
        (pb.Frame(start_view=pb.StartView(incarnations=range(1025))), Fault.OVERSIZED),
        (pb.Frame(do_view_change=pb.DoViewChange(steps=[])), Fault.MALFORMED),
        (pb.Frame(do_view_change=pb.DoViewChange(steps=[4, 2])), Fault.MALFORMED),
        (pb.Frame(do_view_change=pb.DoViewChange(steps=[2, 4, 0])), Fault.MALFORMED),
        (pb.Frame(do_view_change=pb.DoViewChange(steps=[2, 0, 0])), Fault.MALFORMED),
        (pb.Frame(greeting=pb.Greeting(protocol_version=1, joining=2)), Fault.MALFORMED),
        (pb.Frame(copies_held=pb.CopiesHeld(steps=[2, 4])), Fault.MALFORMED),
        (pb.Frame(copies_held=pb.CopiesHeld(steps=range(1025, 0, -1))), Fault.OVERSIZED),
        (pb.Frame(copy_part=pb.CopyPart(data=bytes(PART_BYTES_MAX + 1))), Fault.OVERSIZED),
        (pb.Frame(copy_part=pb.CopyPart(offset=2**48)), Fault.MALFORMED),
        (pb.Frame(copy_offer=pb.CopyOffer(manifest=bytes(BYTES_MAX["manifest"] + 1))), Fault.OVERSIZED),
        (pb.Frame(copy_declined=pb.CopyDeclined(reason="a\nb")), Fault.MALFORMED),
        (pb.Frame(copy_declined=pb.CopyDeclined(reason="x" * 5000)), Fault.OVERSIZED),
        (pb.Frame(failed=pb.Failed(reason="a\x1b[31m")), Fault.MALFORMED),
        (pb.Frame(failed=pb.Failed(reason="x" * 513)), Fault.OVERSIZED),
        (pb.Frame(failed=pb.Failed(completed_steps=2**48)), Fault.MALFORMED),
        (pb.Frame(failed=pb.Failed(replays=2)), Fault.MALFORMED),
        (pb.Frame(rounds_wanted=pb.RoundsWanted(round=2**48, granted_before=2**48)), Fault.MALFORMED),
        (pb.Frame(rounds_wanted=pb.RoundsWanted(round=3, granted_before=2)), Fault.MALFORMED),
        (pb.Frame(rounds_wanted=pb.RoundsWanted(round=3, offset=1, granted_before=3)), Fault.MALFORMED),
        (pb.Frame(rounds_received=pb.RoundsReceived(round=3, granted_before=3, forget_before=4)), Fault.MALFORMED),
        (round_part(data=bytes(PART_BYTES_MAX + 1), total_bytes=2**30), Fault.OVERSIZED),
        (round_part(data=b"abc", total_bytes=2**48), Fault.MALFORMED),
        (round_part(data=b"abc", offset=1, total_bytes=3), Fault.MALFORMED),
        (round_part(data=b"", total_bytes=3), Fault.MALFORMED),
        (pb.Frame(rounds_wanted=pb.RoundsWanted(granted_before=1, stay=2**48)), Fault.MALFORMED),
        (round_status(held=[2**48]), Fault.MALFORMED),
        (round_status(decided=2**48), Fault.MALFORMED),
        (round_status(returning=2**48), Fault.MALFORMED),
        (round_status(held=[0] * (LANES_MAX + 1)), Fault.OVERSIZED),
        (round_status(admitted=[entry()] * (LANES_MAX + 1)), Fault.OVERSIZED),
        (round_status(there=range(LANES_MAX + 1)), Fault.OVERSIZED),
        (round_status(there=[LANES_MAX]), Fault.MALFORMED),
        (round_status(there=[2, 1]), Fault.MALFORMED),
        (round_status(there=[1, 1]), Fault.MALFORMED),
        (round_status(admitted=[entry(lane=2), entry(lane=1)]), Fault.MALFORMED),
        (round_status(admitted=[entry(), entry()]), Fault.MALFORMED),
        (round_status(admitted=[entry(lane=LANES_MAX)]), Fault.MALFORMED),
        (round_status(admitted=[entry(source=LANES_MAX)]), Fault.MALFORMED),
        (round_status(admitted=[entry(copied=11)]), Fault.MALFORMED),
        (round_status(admitted=[entry(first=2**48)]), Fault.MALFORMED),
        (round_status(stretches=[stretch(first=1)]), Fault.MALFORMED),
        (round_status(stretches=[stretch(), stretch(first=8, members=[1])], decided=8), Fault.MALFORMED),
        (round_status(stretches=[stretch(), stretch(first=5), stretch(first=4)], decided=8), Fault.MALFORMED),
        (round_status(stretches=[stretch(), stretch(first=4)], decided=8), Fault.MALFORMED),
        (round_status(stretches=[stretch(members=[])]), Fault.MALFORMED),
        (round_status(stretches=[stretch(members=[1, 0])]), Fault.MALFORMED),
        (round_status(stretches=[stretch(members=[0, 0])]), Fault.MALFORMED),
        (round_status(stretches=[stretch(members=[LANES_MAX])]), Fault.MALFORMED),
        (round_status(stretches=[stretch(entered=[entry(first=1)])]), Fault.MALFORMED),
        (round_status(stretches=[stretch(entered=[entry(lane=3)])]), Fault.MALFORMED),
        (
            round_status(stretches=[stretch(first=at, members=[at % 2]) for at in range(STRETCHES_MAX + 1)]),
            Fault.OVERSIZED,
        ),
    ],
    ids=lambda value: str(value).split("{")[0].strip(),
)
def test_control_frames_out_of_bounds_are_refused(frame: pb.Frame, fault: Fault) -> None:
    limits = Limits(message_bytes=1)  # its chunks may be longer than any of these
    assert refusal_of(frame.SerializeToString(), limits).fault is fault


# -- round trips ------------------------------------------------------------------------------------------------------


@given(frames)
@settings(unhurried, max_examples=300)
def test_every_frame_comes_back(frame: Frame) -> None:
    raw = encode_frame(frame)
    assert len(raw) <= LIMITS.frame_bytes
    assert decode_frame(raw, LIMITS) == frame


@given(chunks | parts | round_parts())
@unhurried
def test_a_frame_around_data_is_what_protobuf_writes(frame: Chunk | CopyPart | RoundPart) -> None:
    raw = encode_frame(frame)
    assert pb.Frame.FromString(raw).SerializeToString() == raw


def judged(decode: Callable[[bytes, Limits], Any], raw: bytes) -> Any:
    """The frame, or why there is none."""
    try:
        return decode(raw, LIMITS)
    except RemoteProtocolError as error:
        return error.fault


@given(chunks, st.data())
@unhurried
def test_data_that_are_not_copied_are_judged_as_protobuf_judges_the_whole(frame: Chunk, data: st.DataObject) -> None:
    raw = bytearray(encode_frame(frame))
    assert judged(decode_frame, bytes(raw)) == judged(messages._decode_whole, bytes(raw)) == frame
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    assert judged(decode_frame, bytes(raw)) == judged(messages._decode_whole, bytes(raw))


def test_the_data_of_a_frame_are_a_view_of_it() -> None:
    raw = encode_frame(Chunk(sequence=1, generation=0, data=bytes(100_000)))
    frame = decode_frame(raw, Limits(message_bytes=2**20))
    assert isinstance(frame, Chunk)
    assert isinstance(frame.data, memoryview)
    assert frame.data.obj is raw


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, PART_BYTES_MAX])
def test_a_part_of_any_length_comes_back(size: int) -> None:
    part = CopyPart(stage=1, completed_steps=5, offset=2**40, data=bytes(size))
    assert decode_frame(encode_frame(part), Limits(message_bytes=1)) == part


@pytest.mark.parametrize("loss", [0.0, -0.0, 5e-324, -1.7976931348623157e308, math.pi])
def test_a_loss_keeps_its_bits(loss: float) -> None:
    head = Head(kind=Kind.GRADIENT, step=0, microbatch=0, loss_sum=loss)
    frame = decode_frame(encode_frame(Chunk(sequence=0, generation=0, data=b"", head=head)), LIMITS)
    assert isinstance(frame, Chunk)
    assert frame.head is not None
    assert struct.pack("<d", frame.head.loss_sum) == struct.pack("<d", loss)


def test_the_largest_legal_frames_pass() -> None:
    """What the rules allow one by one must be allowed together, or an honest frame is refused for ever."""
    wide = "\N{MATHEMATICAL BOLD CAPITAL A}" * TEXT_CHARACTERS_MAX  # four bytes each
    header = {"k": b"\xff" * (HEADER_BYTES_MAX - len(msgpack.packb({"k": b""})) - 1)}
    assert len(msgpack.packb(header)) == HEADER_BYTES_MAX
    limits = Limits(message_bytes=2**63)
    head = Head(
        kind=Kind.CONTEXT_GRADIENT,
        step=STEP_MAX - 1,
        microbatch=MICROBATCH_MAX - 1,
        codec=wide,
        codec_header=header,
        token_ids_bytes=2**62,
        body_bytes=2**62,
        loss_sum=-1e300,
        layer=LAYERS_MAX - 1,
        segment=SEGMENTS_MAX - 1,
    )
    largest: list[Frame] = [
        Chunk(sequence=2**64 - 1, generation=2**64 - 1, data=b"\xff" * limits.chunk_bytes, head=head),
        Refusal(code=wide, reason=wide),
        Greeting(
            run_id=wide,
            configuration=wide,
            stage=2**32 - 1,
            stages=2**32 - 1,
            incarnation=2**64 - 1,
            next_sequence=2**64 - 1,
            granted_bytes=2**64 - 1,
            generation=2**64 - 1,
            completed_steps=2**64 - 1,
            protocol_version=2**32 - 1,
        ),
    ]
    for frame in largest:
        assert decode_frame(encode_frame(frame), limits) == frame


@given(
    ids=st.binary(max_size=300),
    body=st.binary(max_size=900),
    chunk_bytes=st.integers(1, 1300),
    header=headers,
    kind=st.sampled_from(Kind),
)
@example(ids=b"", body=b"", chunk_bytes=1, header={}, kind=Kind.EVALUATION_LOSS)
@example(ids=b"abc", body=b"", chunk_bytes=3, header={}, kind=Kind.ACTIVATION)
@example(ids=b"", body=b"abcd", chunk_bytes=3, header={}, kind=Kind.GRADIENT)
@example(ids=b"ab", body=b"c", chunk_bytes=3, header={}, kind=Kind.EVALUATION)
@unhurried
def test_a_split_message_comes_back(
    ids: bytes, body: bytes, chunk_bytes: int, header: dict[str, Any], kind: Kind
) -> None:
    message = Message(
        kind=kind, step=7, microbatch=3, codec="int4", codec_header=header, token_ids=ids, body=body, loss_sum=1.5
    )
    parts = list(split(message, chunk_bytes))
    assert [head is not None for head, _ in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[0][0] == message.head
    assert all(len(data) <= chunk_bytes for _, data in parts)
    assert b"".join(bytes(data) for _, data in parts) == ids + body
    assert len(parts) <= 2 + (len(ids) + len(body)) // chunk_bytes
    assembly = Assembly()
    out: Message | None = None
    for sequence, (head, data) in enumerate(parts):
        assert out is None, "whole before its last part"
        raw = encode_frame(Chunk(sequence=sequence, generation=0, data=data, head=head))
        frame = decode_frame(raw, Limits(message_bytes=1200, chunk_bytes=chunk_bytes))
        assert isinstance(frame, Chunk)
        out = assembly.add(frame)
        assert assembly.under_way == (out is None)
    assert out is not None
    assert (bytes(out.token_ids), bytes(out.body)) == (ids, body)
    assert out.head == message.head


def test_what_comes_in_one_part_stays_where_it_came() -> None:
    message = Message(kind=Kind.ACTIVATION, step=0, microbatch=0, token_ids=b"ids", body=bytes(600))
    [(head, data)] = split(message, 1000)
    raw = encode_frame(Chunk(sequence=0, generation=0, data=data, head=head))
    frame = decode_frame(raw, LIMITS)
    assert isinstance(frame, Chunk)
    out = Assembly().add(frame)
    assert out is not None
    assert isinstance(out.body, memoryview)
    assert out.body.obj is raw
    assert (bytes(out.token_ids), bytes(out.body)) == (b"ids", bytes(600))


def test_one_frame_is_the_same_bytes_whether_its_data_were_joined_before_or_not() -> None:
    message = Message(kind=Kind.ACTIVATION, step=1, microbatch=2, token_ids=b"ids", dictionary=b"d", body=b"body")
    [(head, data)] = split(message, 1000)
    assert isinstance(data, Gathered)
    apart, joined = (Chunk(sequence=0, generation=0, data=each, head=head) for each in (data, b"idsdbody"))
    assert encode_frame(apart) == encode_frame(joined)


def test_views_of_wider_items_are_counted_in_bytes() -> None:
    """A tensor's memoryview has len() in numbers; a length in numbers on the wire would cut the message short."""
    body = memoryview(bytes(range(24))).cast("I")
    message = Message(kind=Kind.GRADIENT, step=0, microbatch=0, body=body)
    assert len(body) == 6
    assert message.head.body_bytes == 24
    assert b"".join(bytes(data) for _, data in split(message, 10)) == bytes(range(24))


def test_a_refusal_arrives_whatever_it_quotes() -> None:
    quoted = "bad\x1b[2J\ntext \u202e\udcff " + "x" * 2000
    frame = decode_frame(encode_frame(Refusal(code=Fault.MALFORMED, reason=quoted)), LIMITS)
    assert isinstance(frame, Refusal)
    assert frame.code == "malformed-frame"
    assert frame.reason.startswith("bad\ufffd[2J\ufffdtext \ufffd\ufffd xxx")
    assert len(frame.reason) == TEXT_CHARACTERS_MAX


def test_a_refusal_with_a_code_from_the_future_keeps_it() -> None:
    error = RefusedError("too-tired", "come back tomorrow")
    assert error.code == "too-tired"
    assert "too-tired" in str(error)
    assert RefusedError("run-id", "other").fault is Fault.RUN_ID
    assert str(RefusedError("run-id", "other")) == "run-id: other"


UNKNOWN = b"\xfa\x3f\x04what"  # field 1023, four bytes


@given(frames)
@unhurried
def test_a_frame_is_exactly_one_frame(frame: Frame) -> None:
    """Protobuf would take the last of several bodies, and pass over what it does not know."""
    raw = encode_frame(frame)
    for more in (UNKNOWN, b"\x30\x00", encode_frame(Credit(next_sequence=1, granted_bytes=1)), encode_frame(Goodbye())):
        for joined in (raw + more, more + raw):
            got = survives(joined)
            assert got is None or (isinstance(got, Greeting) and got.protocol_version != PROTOCOL_VERSION)


def test_a_greeting_of_a_later_version_can_be_refused_for_its_version() -> None:
    later = pb.Greeting(protocol_version=PROTOCOL_VERSION + 1, run_id="r", configuration="c")
    raw = pb.Frame(greeting=later).SerializeToString()
    with_more = raw[:1] + bytes([raw[1] + len(UNKNOWN)]) + raw[2:] + UNKNOWN
    greeting = decode_frame(with_more, LIMITS)
    assert isinstance(greeting, Greeting)
    assert greeting.protocol_version == PROTOCOL_VERSION + 1
    same = with_more.replace(bytes([8, PROTOCOL_VERSION + 1]), bytes([8, PROTOCOL_VERSION]), 1)
    assert refusal_of(same).fault is Fault.MALFORMED


# -- hostile bytes ----------------------------------------------------------------------------------------------------


def survives(raw: bytes) -> Frame | None:
    try:
        return decode_frame(raw, LIMITS)
    except RemoteProtocolError as caught:
        error = caught
    assert error.fault in {Fault.MALFORMED, Fault.OVERSIZED, Fault.CORRUPT, Fault.PAYLOAD}
    assert str(error).isprintable()
    return None


@given(st.binary(max_size=200) | st.binary(min_size=LIMITS.frame_bytes - 2, max_size=LIMITS.frame_bytes + 2))
@settings(unhurried, max_examples=300)
def test_random_bytes(raw: bytes) -> None:
    frame = survives(raw)
    assert frame is None or len(raw) <= LIMITS.frame_bytes


@given(frames, frames, st.randoms(use_true_random=False))
@settings(unhurried, max_examples=400)
def test_mutated_frames(frame: Frame, other: Frame, rng: random.Random) -> None:
    raw = bytearray(encode_frame(frame))
    match rng.choice(["flip", "truncate", "extend", "splice", "overwrite"]):
        case "flip" if raw:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        case "truncate":
            del raw[rng.randrange(len(raw) + 1) :]
        case "extend":
            raw += rng.randbytes(rng.randrange(1, 40))
        case "splice":
            cut = encode_frame(other)
            at = rng.randrange(len(raw) + 1)
            raw[at:at] = cut[: rng.randrange(len(cut) + 1)]
        case _:
            at = rng.randrange(len(raw) + 1)
            raw[at : at + 10] = b"\xff" * 10
    survives(bytes(raw))


@given(heads, st.binary(max_size=40))
@example(Head(kind=Kind.ACTIVATION, step=0, microbatch=2**28), b"")  # a varint with bits beyond the 32 that count
@settings(unhurried, max_examples=30)
def test_no_flipped_bit_makes_another_chunk(head: Head, data: bytes) -> None:
    """The checksum covers step, loss and header too, and the bytes around them have to be just so.

    What may pass is the same chunk, or a greeting that is refused for its version.
    """
    chunk = Chunk(
        sequence=5, generation=1, data=data, head=head, next_sequence=300, granted_bytes=2**33, acknowledge=True
    )
    raw = encode_frame(chunk)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        got = survives(bytes(flipped))
        assert got in (None, chunk) or (isinstance(got, Greeting) and got.protocol_version != PROTOCOL_VERSION)


@given(parts)
@unhurried
def test_no_flipped_bit_makes_another_part(part: CopyPart) -> None:
    """Nor an offer, which has the same fields but for one."""
    raw = encode_frame(part)
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        got = survives(bytes(flipped))
        assert got in (None, part) or (isinstance(got, Greeting) and got.protocol_version != PROTOCOL_VERSION)


@pytest.mark.parametrize(
    "frame", [Goodbye(), Credit(next_sequence=300, granted_bytes=2**40)], ids=["goodbye", "credit"]
)
def test_every_prefix_of_a_frame_is_harmless(frame: Frame) -> None:
    raw = encode_frame(frame)
    for length in range(len(raw)):
        assert survives(raw[:length]) != frame
    assert decode_frame(raw, LIMITS) == frame


def test_a_truncated_chunk_is_refused_byte_by_byte() -> None:
    raw = encode_frame(
        Chunk(sequence=1, generation=2, data=b"data" * 9, head=Head(kind=Kind.GRADIENT, step=1, microbatch=2))
    )
    for length in range(len(raw)):
        assert refusal_of(raw[:length]).fault is Fault.MALFORMED


def test_a_frame_that_is_too_long_is_refused_before_it_is_parsed() -> None:
    assert refusal_of(b"\x00" * (LIMITS.frame_bytes + 1)).fault is Fault.OVERSIZED
    assert LIMITS.frame_bytes == LIMITS.chunk_bytes + ENVELOPE_BYTES_MAX


def test_data_beyond_the_chunk_size_is_refused() -> None:
    within = Chunk(sequence=0, generation=0, data=b"x" * LIMITS.chunk_bytes)
    assert decode_frame(encode_frame(within), LIMITS) == within
    beyond = Chunk(sequence=0, generation=0, data=b"x" * (LIMITS.chunk_bytes + 1))
    assert refusal_of(encode_frame(beyond)).fault is Fault.OVERSIZED


@pytest.mark.alone  # other threads of a test worker allocate, too
@pytest.mark.parametrize(("ids", "body"), [(2**62, 0), (0, 2**62), (2**63, 2**63), (2**64 - 1, 1), (4000, 97)])
def test_an_announcement_beyond_the_limit_allocates_nothing(ids: int, body: int) -> None:
    raw = reencoded(chunk_pb(token_ids_bytes=ids, body_bytes=body))
    refusal_of(raw)  # what is imported and cached once is not counted
    tracemalloc.start()
    try:
        error = refusal_of(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.fault is Fault.OVERSIZED
    assert str(ids + body) in str(error)
    assert peak < 64 * 1024


def test_a_message_at_the_limit_is_taken() -> None:
    frame = decode_frame(reencoded(chunk_pb(token_ids_bytes=4000, body_bytes=96)), LIMITS)
    assert isinstance(frame, Chunk)
    assert frame.head is not None
    assert frame.head.data_bytes == LIMITS.message_bytes


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_at_both_ends(loss: float) -> None:
    error = refusal_of(reencoded(chunk_pb(kind=2, step=12, microbatch=5, loss_sum=loss)))
    assert error.fault is Fault.PAYLOAD
    assert "gradient of step 12, microbatch 5" in str(error)
    assert str(loss) in str(error)
    message = Message(kind=Kind.GRADIENT, step=12, microbatch=5, loss_sum=loss)
    with pytest.raises(LocalProtocolError) as caught:
        next(split(message, 10))
    assert caught.value.fault is Fault.PAYLOAD
    with pytest.raises(LocalProtocolError):
        encode_frame(Chunk(sequence=0, generation=0, data=b"", head=message.head))


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        ({"kind": 0}, Fault.MALFORMED),
        ({"kind": max(Kind) + 1}, Fault.MALFORMED),
        ({"kind": 2**32 - 1}, Fault.MALFORMED),
        ({"step": STEP_MAX}, Fault.MALFORMED),
        ({"step": 2**64 - 1}, Fault.MALFORMED),
        ({"kind": Kind.CONTEXT, "layer": LAYERS_MAX}, Fault.MALFORMED),
        ({"kind": Kind.CONTEXT_EVALUATION, "segment": SEGMENTS_MAX}, Fault.MALFORMED),
        ({"kind": Kind.ACTIVATION, "layer": 1}, Fault.MALFORMED),
        ({"kind": Kind.GRADIENT, "segment": 1}, Fault.MALFORMED),
        ({"codec": "a\nb"}, Fault.MALFORMED),
        ({"codec": "a" * (TEXT_CHARACTERS_MAX + 1)}, Fault.OVERSIZED),
        ({"codec_header": b"\x81"}, Fault.MALFORMED),
        ({"codec_header": b"\x90"}, Fault.MALFORMED),
    ],
    ids=str,
)
def test_a_bad_head_is_refused(head: dict[str, Any], fault: Fault) -> None:
    assert refusal_of(reencoded(chunk_pb(**head))).fault is fault


@pytest.mark.parametrize(
    "head",
    [
        Head(kind=Kind.GRADIENT, step=STEP_MAX, microbatch=0),
        Head(kind=Kind.GRADIENT, step=-1, microbatch=0),
        Head(kind=Kind.GRADIENT, step=0, microbatch=-1),
        Head(kind=Kind.GRADIENT, step=0, microbatch=MICROBATCH_MAX),
        Head(kind=Kind.GRADIENT, step=0, microbatch=0, layer=1),
        Head(kind=Kind.CONTEXT, step=0, microbatch=0, layer=LAYERS_MAX),
        Head(kind=Kind.CONTEXT_GRADIENT, step=0, microbatch=0, segment=-1),
        Head(kind=Kind.GRADIENT, step=0, microbatch=0, codec="tab\t"),
        Head(kind=Kind.GRADIENT, step=0, microbatch=0, codec_header={"scale": math.nan}),
    ],
    ids=str,
)
def test_what_the_peer_would_refuse_is_refused_here(head: Head) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(Chunk(sequence=0, generation=0, data=b"", head=head))


def test_a_wrong_checksum_is_named() -> None:
    frame = pb.Frame(chunk=pb.Chunk(sequence=9, data=b"abc", xxh3=1))
    error = refusal_of(frame.SerializeToString())
    assert error.fault is Fault.CORRUPT
    assert "chunk 9" in str(error)
    part = pb.Frame(copy_part=pb.CopyPart(stage=3, completed_steps=7, offset=9, data=b"abc", xxh3=1))
    error = refusal_of(part.SerializeToString())
    assert error.fault is Fault.CORRUPT
    assert "bytes from 9 of the copy of stage 3 after 7 steps" in str(error)
    frame = pb.Frame(round_part=pb.RoundPart(round=3, offset=9, total_bytes=12, data=b"abc", xxh3=1))
    error = refusal_of(frame.SerializeToString())
    assert error.fault is Fault.CORRUPT
    assert "bytes 9 to 12 of a contribution of 12 to round 3 do not match" in str(error)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\x00", "\u202e", "\x7f", "\u2028"])
def test_control_characters_are_refused_wherever_text_travels(text: str) -> None:
    greeting = {"run_id": "r", "configuration": "c"}
    bodies = [
        pb.Frame(greeting=pb.Greeting(**{**greeting, "run_id": text})),
        pb.Frame(greeting=pb.Greeting(**{**greeting, "configuration": text})),
        pb.Frame(refusal=pb.Refusal(code=text)),
        pb.Frame(refusal=pb.Refusal(reason=text)),
        chunk_pb(codec=text),
        chunk_pb(codec_header=msgpack.packb({"k": [text]})),
        chunk_pb(codec_header=msgpack.packb({"k": {text: 1}})),
    ]
    for body in bodies:
        error = refusal_of(reencoded(body))
        assert error.fault is Fault.MALFORMED
        assert str(error).isprintable()


@pytest.mark.parametrize("field", ["run_id", "configuration"])
def test_a_text_of_any_length_is_refused_beyond_its_limit(field: str) -> None:
    raw = pb.Frame(greeting=pb.Greeting(**{field: "x" * (TEXT_CHARACTERS_MAX + 1)})).SerializeToString()
    assert refusal_of(raw).fault is Fault.OVERSIZED


NO_KNOWN_KIND = {"empty": b"", "unknown field": b"\xfa\x3f\x04what", "unknown kind": b"\xfa\x01\x00"}


@pytest.mark.parametrize("raw", NO_KNOWN_KIND.values(), ids=NO_KNOWN_KIND)
def test_a_frame_of_no_known_kind_is_refused(raw: bytes) -> None:
    assert refusal_of(raw).fault is Fault.MALFORMED


def test_text_that_is_not_utf8_is_refused() -> None:
    raw = encode_frame(Refusal(code="aaaa", reason="")).replace(b"aaaa", b"a\xff\xfea")
    assert refusal_of(raw).fault is Fault.MALFORMED


# -- codec headers ----------------------------------------------------------------------------------------------------


@given(headers)
@unhurried
def test_a_header_comes_back(header: dict[str, Any]) -> None:
    assert decode_header(encode_header("c", header)) == header


@given(st.binary(max_size=HEADER_BYTES_MAX + 3))
@example(b"\xc1")
@settings(unhurried, max_examples=300)
def test_random_header_bytes(raw: bytes) -> None:
    try:
        header = decode_header(raw)
    except RemoteProtocolError:
        return
    assert all(isinstance(key, str) for key in header)


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


BOMBS = {
    "huge claimed array": b"\xdd\xff\xff\xff\xff",
    "huge claimed map": b"\xdf\xff\xff\xff\xff",
    "huge claimed text": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "huge claimed bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "huge claimed extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x05",
    "claims within claims": b"\x81\xa1a" + b"\xdc\x0f\xff" * 1300,
    "nested beyond the parser": b"\x81\xa1a" + b"\x91" * 4000 + b"\x00",
    "nested beyond the limit": msgpack.packb({"a": deep(HEADER_DEPTH_MAX)}),
    "maps of one byte": b"\x81\xa1a\xdc\x0f\xa0" + b"\x80" * 4000,
    "flat but many": msgpack.packb({"a": [0] * (HEADER_VALUES_MAX - 2)}),
    "many keys": msgpack.packb({f"{i}": 0 for i in range(HEADER_VALUES_MAX // 2)}),
    "many in turn": msgpack.packb({"a": [[0] * 100] * 3}),
    "an extension": msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
    "an empty extension": b"\x81\xa1a\xc7\x00\x05",
    "a timestamp": msgpack.packb({"a": msgpack.Timestamp(1, 0)}),
    "a number as key": msgpack.packb({1: 2}),
    "bytes as key": msgpack.packb({b"a": 2}),
    "bytes as inner key": msgpack.packb({"a": [{b"a": 2}]}),
    "no map": msgpack.packb([1, 2]),
    "nil": b"\xc0",
    "not a number": msgpack.packb({"scale": math.nan}),
    "infinity within": msgpack.packb({"scales": [1.0, {"x": -math.inf}]}),
    "infinity in single precision": b"\x81\xa1a\xca\x7f\x80\x00\x00",
    "text that is not utf-8": b"\x81\xa1a\xa2\xff\xfe",
    "trailing bytes": msgpack.packb({"a": 1}) + b"\x00",
    "cut short": msgpack.packb({"a": [1, 2]})[:-1],
    "too long": msgpack.packb({"a": b"x" * HEADER_BYTES_MAX}),
    "never used byte": b"\x81\xa1a\xc1",
}


@pytest.mark.alone  # other threads of a test worker allocate, too
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_is_a_bomb_is_refused_cheaply(name: str) -> None:
    raw = BOMBS[name]
    with pytest.raises(RemoteProtocolError):
        decode_header(raw)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            decode_header(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 1024
    assert str(caught.value).isprintable()
    numbers = {"not a number", "infinity within", "infinity in single precision"}
    assert (caught.value.fault is Fault.PAYLOAD) == (name in numbers)


def test_the_header_limits_are_exact() -> None:
    for fits in ({"a": deep(HEADER_DEPTH_MAX - 1)}, {"a": [0] * (HEADER_VALUES_MAX - 3)}):
        assert decode_header(encode_header("c", fits)) == fits


@pytest.mark.parametrize(
    "header",
    [
        {1: 2},
        {"a": object()},
        {"a": 2**64},
        {"a": math.inf},
        {"a": "x" * (TEXT_CHARACTERS_MAX + 1)},
        {"a": [0] * HEADER_VALUES_MAX},
        {"a": "\n"},
        {"a": "\udcff"},
        {"a": b"x" * HEADER_BYTES_MAX},
    ],
    ids=lambda header: re.sub(r" at 0x\w+", "", repr(header))[:30],
)
def test_a_header_no_peer_would_take_is_a_local_fault(header: dict[Any, Any]) -> None:
    with pytest.raises(LocalProtocolError, match="int4"):
        encode_header("int4", header)


ASTRAL = "\N{MATHEMATICAL BOLD CAPITAL A}"  # one such character makes every one of its text four bytes wide
WORST_HEADERS = {
    "maps": lambda _salt: {"a": [{} for _ in range(HEADER_VALUES_MAX - 3)]},
    "lists": lambda _salt: {"a": [[] for _ in range(HEADER_VALUES_MAX - 3)]},
    "short texts": lambda salt: {"a": [ASTRAL * 2 + chr(salt + i) for i in range(HEADER_VALUES_MAX - 3)]},
    "keys": lambda salt: {ASTRAL + chr(salt + i): {} for i in range(HEADER_VALUES_MAX // 2 - 1)},
    "numbers": lambda _salt: {"a": [-(2**60) - i for i in range(HEADER_VALUES_MAX - 3)]},
    "maps and long texts": lambda salt: {
        "a": [{ASTRAL + chr(salt + i): 0} for i in range(HEADER_VALUES_MAX // 3 - 5)],
        "b": [ASTRAL + "x" * (TEXT_CHARACTERS_MAX - 10) + f"{i}" for i in range(6)],
    },
}


@pytest.mark.parametrize("name", WORST_HEADERS)
def test_the_worst_head_costs_no_more_than_it_is_charged(name: str) -> None:
    """Credit bounds memory only if each message's price covers what its head takes as Python objects."""
    # The least of three: the interpreter's table of interned keys may have to grow by megabytes at any key.
    assert min(cost_of_heads(name, 0x4E00 + 0x1400 * attempt) for attempt in range(3)) <= MESSAGE_COST_BYTES


def cost_of_heads(name: str, salt: int, count: int = 20) -> float:
    """Bytes of Python objects that one message takes, as the mean of `count` with keys of their own, since msgpack
    shares equal ones."""
    raws = []
    for nth in range(count):
        header = WORST_HEADERS[name](salt + 256 * nth)
        head = Head(kind=Kind.ACTIVATION, step=2**40, microbatch=2**31, codec=ASTRAL * 512, codec_header=header)
        raws.append(encode_frame(Chunk(sequence=2**40, generation=2**40, data=b"", head=head)))
    held: list[Message] = []
    tracemalloc.start()
    try:
        for raw in raws:
            frame = decode_frame(raw, LIMITS)
            assert isinstance(frame, Chunk)
            message = Assembly().add(frame)
            assert message is not None
            held.append(message)
        del frame, message
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return used / len(held)
