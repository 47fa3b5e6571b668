"""Test vectors of the protocol (docs/protocol.md): `python -m tests.protocol_vectors` writes tests/vectors/*.json.

For whoever writes another implementation, and for this one: bytes that are agreed once must not change by accident.
Bytes are hexadecimal text, tables are little-endian numbers in C order, and every number is an exact integer, since
JSON's readers differ in what else they keep; a float is the eight bytes of its float64. All of it is a function of
this file: there is no clock, no path and no generator but Philox in it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash
from thinpipe.protocol.control_messages import (
    AllFinished,
    CopiesHeld,
    CopyDeclined,
    CopyOffer,
    CopyPart,
    CopyProgress,
    CopyWanted,
    DoViewChange,
    Drain,
    Failed,
    Finished,
    Heartbeat,
    LastStep,
    StartView,
    StartViewChange,
)
from thinpipe.protocol.dictionary import Publisher
from thinpipe.protocol.dictionary_delta import Delta, DictionarySpec, Version, encode_delta, join_deltas
from thinpipe.protocol.dictionary_selection import Policy, select
from thinpipe.protocol.errors import Fault
from thinpipe.protocol.global_norm import NORM
from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.protocol.header import encode_header
from thinpipe.protocol.membership_log import Entry, MembershipLog, Stretch
from thinpipe.protocol.messages import (
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
    encode_frame,
    split,
)
from thinpipe.protocol.reassembly import message_cost
from thinpipe.protocol.round_messages import RoundPart, RoundsReceived, RoundStatus, RoundsWanted
from thinpipe.protocol.rows import decode_rows, encode_rows
from thinpipe.protocol.session import LinkSession, Opened, Received

from .dictionary_ends import End, Plan, Run

DIRECTORY = Path(__file__).parent / "vectors"
LIMITS = Limits(message_bytes=4096, chunk_bytes=512)
LARGEST = 2**64 - 1

ENTRY = Entry(lane=1, first=7, begins=70, source=0, copied=20)
ENTRY_AT_3 = Entry(lane=1, first=3, begins=30, source=1, copied=10)


def plain(value: Any) -> Any:
    """As JSON: bytes as {"hex": ...}, a float as {"float64": ...}."""
    match value:
        case bytes() | memoryview():
            return {"hex": bytes(value).hex()}
        case float():
            return {"float64": struct.pack("<d", value).hex()}
        case dict():
            return {key: plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case bool() | int() | str() | None:
            return value
        case _:
            raise TypeError(f"{type(value).__name__} in a vector")


def table_of(spec: DictionarySpec, number: int) -> np.ndarray:
    """Numbers of different size and sign, from 64-bit integers: the same on every processor."""
    raw = np.random.Philox(key=np.array([number, 0], np.uint64)).random_raw(spec.entries * spec.width)
    numbers = (raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return (numbers * 2.0 ** (raw % np.uint64(7)).astype(np.float64)).astype(spec.dtype).reshape(spec.entries, -1)


# -- one file each -----------------------------------------------------------------------------------------------------


def a_head() -> Head:
    header = {"shape": [2, 3], "projector": [4, 9, 0, 0, bytes(range(16))], "ratio": -0.5, "none": None, "ok": True}
    return Head(
        kind=Kind.ACTIVATION,
        step=70000,
        microbatch=3,
        codec="int8",
        codec_header=header,
        token_ids_bytes=5,
        dictionary_bytes=0,
        body_bytes=7,
        loss_sum=-0.0,
    )


def all_frames() -> dict[str, Frame]:
    greeting = Greeting(
        run_id="run \N{GREEK SMALL LETTER ALPHA}",
        configuration="c0ffee table beef",
        stage=1,
        stages=3,
        incarnation=LARGEST,
        next_sequence=300,
        granted_bytes=16 * 2**20,
        generation=4,
        completed_steps=70000,
    )
    return {
        "greeting": greeting,
        "greeting, fields of their default value": replace(
            greeting, stage=0, generation=0, completed_steps=0, next_sequence=0, granted_bytes=0
        ),
        "greeting of who joins": replace(greeting, joining=True),
        "greeting of another lane": replace(greeting, lane=1, next_sequence=0, granted_bytes=0),
        "refusal": Refusal(code=Fault.GENERATION, reason="generation: stage 1 expects 4, the peer (stage 0) says 3"),
        "chunk with a head": Chunk(
            sequence=300, generation=4, data=b"idsidbodybod", head=a_head(), next_sequence=17, granted_bytes=99999
        ),
        "chunk without a head": Chunk(
            sequence=301, generation=4, data=bytes(range(64)), next_sequence=18, granted_bytes=100000, acknowledge=True
        ),
        "chunk that is a whole message without data": Chunk(
            sequence=0,
            generation=0,
            data=b"",
            head=Head(kind=Kind.EVALUATION_LOSS, step=1, microbatch=0, loss_sum=12.25),
        ),
        "chunk of a gradient norm": Chunk(
            sequence=7,
            generation=1,
            data=NORM.pack(0.1),
            head=Head(kind=Kind.GRADIENT_NORM, step=12, microbatch=0, body_bytes=8),
        ),
        "chunk of keys and values": Chunk(
            sequence=8,
            generation=1,
            data=bytes(range(9)),
            head=Head(kind=Kind.CONTEXT, step=12, microbatch=3, body_bytes=9, layer=65535, segment=127),
        ),
        "chunk of a change of a dictionary": Chunk(
            sequence=LARGEST,
            generation=LARGEST,
            data=b"\0",
            head=Head(kind=Kind.GRADIENT, step=2**48 - 1, microbatch=2**32 - 1, dictionary_bytes=1, loss_sum=1e300),
            next_sequence=LARGEST,
            granted_bytes=LARGEST,
        ),
        "credit": Credit(next_sequence=301, granted_bytes=16 * 2**20 + 4096),
        "credit that says nothing yet": Credit(next_sequence=0, granted_bytes=0),
        "goodbye": Goodbye(),
        "heartbeat": Heartbeat(generation=4, completed_steps=12, missing=3, copied_steps=10, preparing=1),
        "start_view_change": StartViewChange(generation=4),
        "do_view_change": DoViewChange(generation=4, incarnations=(1, LARGEST), steps=(300, 12, 0)),
        "start_view": StartView(generation=5, completed_steps=12, incarnations=(7, 1, LARGEST)),
        "finished": Finished(),
        "all_finished": AllFinished(),
        "drain": Drain(),
        "last step": LastStep(completed_steps=2**48 - 1),
        "failed": Failed(stage=2, completed_steps=12, reason="the gradient is not finite", replays=True),
        "failed, by what may pass": Failed(stage=0, completed_steps=12, reason="the source is away"),
        "copies held": CopiesHeld(stage=2, steps=(12, 10)),
        "copies held: none": CopiesHeld(stage=2, steps=()),
        "copy offer": CopyOffer(stage=2, completed_steps=12, manifest=b"{}\n"),
        "copy progress": CopyProgress(stage=2, completed_steps=12, offset=65536),
        "copy part": CopyPart(stage=2, completed_steps=12, offset=65536, data=b"part"),
        "copy wanted": CopyWanted(stage=2, completed_steps=12),
        "copy declined": CopyDeclined(stage=2, completed_steps=12, reason="the disk is full"),
        "rounds wanted": RoundsWanted(round=7, offset=262144, granted_before=12, forget_before=5),
        "rounds wanted of a lane that came back": RoundsWanted(
            round=7, offset=0, granted_before=12, forget_before=5, stay=2**48 - 1
        ),
        "rounds wanted: all": RoundsWanted(round=0, offset=0, granted_before=4, forget_before=0),
        "round part": RoundPart(round=7, offset=262144, total_bytes=262148, contribution_xxh3=LARGEST, data=b"part"),
        "round part: the first of round 0": RoundPart(
            round=0, offset=0, total_bytes=5, contribution_xxh3=0, data=b"part"
        ),
        "rounds received": RoundsReceived(round=8, offset=0, granted_before=12, forget_before=5),
        "round status": RoundStatus(held=(300, 0), decided=299),
        "round status with a log": RoundStatus(
            held=(8, 8, 0),
            decided=8,
            stretches=(
                Stretch(first=0, members=(0, 1, 2)),
                Stretch(first=3, members=(0, 2)),
                Stretch(first=7, members=(0, 1, 2), entered=(ENTRY,)),
            ),
        ),
        "round status of who comes back": RoundStatus(
            held=(7, 2, 6), decided=6, admitted=(ENTRY, replace(ENTRY, lane=2)), returning=21
        ),
        "round status within a lane": RoundStatus(held=(0, 0, 0), decided=299, there=(0, 2)),
        "round status of who takes up a state": RoundStatus(
            held=(7, 2, 6), decided=6, returning=31, source=1, saved=30, kept=5, forgot=3
        ),
    }


def values_of(frame: Any) -> dict[str, Any]:
    """All fields by their names in stage.proto; a codec's header as the bytes of its msgpack."""
    values: dict[str, Any] = {}
    for field in fields(frame):
        value = getattr(frame, field.name)
        if isinstance(value, Head):
            value = values_of(value)
        elif field.name == "codec_header":
            value = encode_header("", value)
        elif field.name in ("joining", "acknowledge", "kind", "replays"):
            value = int(value)
        if isinstance(value, tuple):
            value = [values_of(each) if is_dataclass(each) else each for each in value]
        values[field.name] = value
    return values


def frames() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "body": "".join(f"_{c.lower()}" if c.isupper() else c for c in type(frame).__name__)[1:],
            "fields": plain(values_of(frame)),
            "frame": encode_frame(frame).hex(),
        }
        for name, frame in all_frames().items()
    ]


def checksums() -> list[dict[str, Any]]:
    """Spelled out here once more, and not taken from the code."""
    out = []
    for name, chunk in all_frames().items():
        if isinstance(chunk, CopyPart):
            covered = struct.pack("<3Q", chunk.stage, chunk.completed_steps, chunk.offset) + chunk.data
            out.append({"frame": name, "covered": covered.hex(), "xxh3": xxhash.xxh3_64_intdigest(covered)})
        if isinstance(chunk, RoundPart):
            numbers = (chunk.round, chunk.offset, chunk.total_bytes, chunk.contribution_xxh3)
            covered = struct.pack("<4Q", *numbers) + bytes(chunk.data)
            out.append({"frame": name, "covered": covered.hex(), "xxh3": xxhash.xxh3_64_intdigest(covered)})
        if not isinstance(chunk, Chunk):
            continue
        head = chunk.head or Head(kind=0, step=0, microbatch=0)  # type: ignore[arg-type]
        codec, header = head.codec.encode(), encode_header("", head.codec_header)
        covered = struct.pack(
            "<8I8Qd",
            *(head.kind, head.microbatch, len(codec), len(header), chunk.head is not None, chunk.acknowledge),
            *(head.layer, head.segment),
            *(
                chunk.sequence,
                chunk.generation,
                head.step,
                head.token_ids_bytes,
                head.body_bytes,
                head.dictionary_bytes,
            ),
            *(chunk.next_sequence, chunk.granted_bytes, head.loss_sum),
        )
        covered += codec + header + bytes(chunk.data)
        out.append({"frame": name, "covered": covered.hex(), "xxh3": xxhash.xxh3_64_intdigest(covered)})
    return out


def headers() -> list[dict[str, Any]]:
    wide: dict[str, Any] = {
        "integers": [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, LARGEST],
        "below zero": [-1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)],
        "floats": [1.0, -0.0, 5e-324],
        "texts": ["", "x" * 31, "x" * 32, "\N{EURO SIGN}"],
        "bytes": [b"", b"\xff" * 255, b"\x00" * 256],
        "nested": {"a": {"b": [[], {}, None, True, False]}},
        "long": list(range(16)),
    }
    versions = {"projector": [4, 9, 0, 0, bytes(range(16))], "codes forward": [4, 9, 1, 0, bytes(16)]}
    some: list[dict[str, Any]] = [{}, {"shape": [1, 2]}, wide, versions, {str(n): n for n in range(16)}]
    return [{"header": plain(header), "msgpack": encode_header("", header).hex()} for header in some]


def rows() -> list[dict[str, Any]]:
    out = []
    for dtype in ("float32", "float64"):
        cases: dict[str, list[list[float]]] = {
            "of different size": [[1.0, -2.5, 2**-20], [127.0, -127.0, 0.49], [0.3, 0.2, -0.1], [0.0, -0.0, 0.0]],
            "ties": [[1 + 2**-8, 1 + 3 * 2**-8, 1.0], [127.0, 0.5, 1.5], [7.0, 0.5, -1.5], [14.0, 3.0, 5.0]],
            "tiny": [[2.0**-126, -(2.0**-149), 2.0**-130]],
        }
        for name, values in cases.items():
            for encoding in ("fp64", "fp32", "bf16", "int8", "int4"):
                x = np.array(values, dtype)
                payload = encode_rows(x, encoding)
                decoded = decode_rows(payload, encoding, x.shape, dtype, "vector")
                out.append(
                    {
                        "name": name,
                        "encoding": encoding,
                        "dtype": dtype,
                        "shape": list(x.shape),
                        "values": x.astype(x.dtype.newbyteorder("<")).tobytes().hex(),
                        "payload": payload.hex(),
                        "decoded": decoded.astype(x.dtype.newbyteorder("<")).tobytes().hex(),
                    }
                )
    return out


def described(delta: Delta, table: np.ndarray) -> dict[str, Any]:
    little = table.astype(table.dtype.newbyteorder("<")).tobytes()
    return {
        "bytes": encode_delta(delta).hex(),
        "version": list(delta.version),
        "previous": delta.previous and list(delta.previous),
        "entries": None if delta.indices is None else delta.indices.tolist(),
        "encoding": delta.encoding,
        "payload": delta.payload.hex(),
        "digest": delta.digest.hex(),
        "table_sha256": hashlib.sha256(little).hexdigest(),
        **({"table": little.hex()} if len(little) <= 512 else {}),
    }


def deltas() -> list[dict[str, Any]]:
    """Sequences: each from nothing, or from a table of zeros, by as many changes as there are."""
    out = []
    for dtype in ("float32", "float64"):
        for encoding in ("fp64", "fp32", "bf16", "int8", "int4"):
            spec = DictionarySpec("codes forward", 6, 3, dtype, encoding)  # type: ignore[arg-type]
            publisher, sequence = Publisher(spec, 4), []
            for number, (step, microbatch, entries) in enumerate(
                [(0, 0, None), (0, 1, None), (0, 2, [1, 4]), (70000, 0, [5]), (70000, 0, None)]
            ):
                delta = publisher.publish(
                    table_of(spec, number),
                    step=step,
                    microbatch=microbatch,
                    entries=None if entries is None else np.array(entries),
                )
                sequence.append(described(delta, publisher.shipped))
            out.append({"spec": asdict(spec), "generation": 4, "zeros_at": None, "deltas": sequence})
    for entries, changed in ((1, [0]), (256, [0, 255]), (257, [0, 255, 256]), (65536, [65535]), (65537, [1, 65536])):
        spec = DictionarySpec("p", entries, 1, "float32", "int4")
        publisher, zeros = Publisher(spec, 2**64 - 1), np.zeros((entries, 1), np.float32)
        publisher.publish(zeros, step=0, microbatch=0)
        delta = publisher.publish(table_of(spec, 1), step=1, microbatch=0, entries=np.array(changed))
        sequence = [described(delta, publisher.shipped)]
        start = [2**64 - 1, 0, 0, 0]
        out.append({"spec": asdict(spec), "generation": 2**64 - 1, "zeros_at": start, "deltas": sequence})
    return out


def digests() -> list[dict[str, Any]]:
    out, largest = [], Version(LARGEST, 2**48 - 1, 2**32 - 1, 0)
    for name, version, dtype in (
        ("projector", Version(0, 0, 0, 0), "float32"),
        ("projector", Version(0, 0, 0, 1), "float32"),
        ("code\N{LATIN SMALL LETTER O WITH DIAERESIS}k", largest, "float64"),
        ("x" * 32, Version(128, 65536, 256, 0), "float32"),
    ):
        spec = DictionarySpec(name, 3, 2, dtype)  # type: ignore[arg-type]
        publisher = Publisher(spec, version.generation)
        table = table_of(spec, 9)
        for _ in range(version.index + 1):
            delta = publisher.publish(table, step=version.step, microbatch=version.microbatch)
        out.append(
            {
                "spec": asdict(spec),
                "version": list(delta.version),
                "table": table.astype(table.dtype.newbyteorder("<")).tobytes().hex(),
                "digest": delta.digest.hex(),
            }
        )
    return out


def sections() -> list[dict[str, Any]]:
    specs = [DictionarySpec("projector", 4, 3, encoding="int8"), DictionarySpec("codes forward", 7, 2)]
    made = [Publisher(spec, 4).publish(table_of(spec, 3), step=9, microbatch=0) for spec in specs]
    raw = [encode_delta(delta) for delta in made]
    names = [spec.name for spec in specs]
    return [
        {"names": chosen, "deltas": [each.hex() for each in some], "section": join_deltas(some).hex()}
        for chosen, some in (([], []), (names[:1], raw[:1]), (names[1:], raw[1:]), (names, raw))
    ]


def selections() -> list[dict[str, Any]]:
    out = []
    cases = ((16, 4, 0, 0), (16, 4, 5, 3), (10, 3, 7, 1), (5, 1, 0, 0), (9, 4, 3, 2))
    for policy in get_args(Policy):
        for entries, divisor, step, microbatch in cases:
            spec = DictionarySpec("codes", entries, 2)
            key, counter = [1234, 3], [0, microbatch, step, 2]
            cursor = 4 * step + microbatch
            drift = table_of(spec, cursor)
            usage = np.arange(entries, dtype=np.float64) % 5
            chosen = select(
                policy,
                divisor,
                entries=entries,
                cursor=cursor,
                draw=np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)),
                drift=drift,
                usage=usage,
            )
            out.append(
                {
                    "policy": policy,
                    "divisor": divisor,
                    "entries": entries,
                    "cursor": cursor,
                    "philox_key": key,
                    "philox_counter": counter,
                    "drift": drift.astype("<f4").tobytes().hex(),
                    "usage": usage.astype("<f8").tobytes().hex(),
                    "chosen": None if chosen is None else chosen.tolist(),
                }
            )
    return out


def conversation() -> dict[str, Any]:
    """Two ends over two connections, as both would record it: a cut in the middle of a message, what is sent again, a
    duplicate, two dictionaries on one message, an evaluation tensor."""
    run = Run(
        seed=7,
        microbatches=2,
        plans=(
            Plan(spec=DictionarySpec("projector", 4, 3, encoding="int8"), kind=Kind.ACTIVATION, every=2),
            Plan(
                spec=DictionarySpec("codes forward", 7, 3, encoding="int4"),
                kind=Kind.ACTIVATION,
                policy="random",
                divisor=3,
            ),
            Plan(spec=DictionarySpec("codes backward", 5, 2), kind=Kind.GRADIENT, policy="drift", divisor=2),
        ),
    )
    limits = Limits(message_bytes=run.message_bytes_max, chunk_bytes=160)
    ends = End(run, 0, 3), End(run, 1, 3)
    sessions = [
        LinkSession(
            identity=NodeIdentity(
                run_id="vectors",
                configuration="c0ffee",
                stage=stage,
                stages=2,
                incarnation=2**40 + stage,
                generation=3,
            ),
            peer_stage=1 - stage,
            limits=limits,
            receive_buffer_bytes=3 * message_cost(limits.message_bytes),
        )
        for stage in (0, 1)
    ]
    said: list[dict[str, Any]] = []
    messages: dict[str, list[dict[str, Any]]] = {"0": [], "1": []}  # by receiving stage, in order
    coming: tuple[deque[Any], deque[Any]] = (deque(), deque())  # to the other stage, not stamped yet
    meant: tuple[deque[Any], deque[Any]] = (deque(), deque())
    connection = 0

    def tell(sender: int, frame: bytes, *, lost: bool = False) -> None:
        said.append({"connection": connection, "to": 1 - sender, "lost": lost, "frame": frame.hex()})
        if lost:
            return
        for event in sessions[1 - sender].receive(frame):
            if isinstance(event, Opened) and sender == 0:
                tell(1, sessions[1].greeting())
                for kept in sessions[1].retransmissions():
                    tell(1, kept)
            if isinstance(event, Opened) and sender == 1:
                for kept in sessions[0].retransmissions():
                    tell(0, kept)
            if isinstance(event, Received):
                sessions[1 - sender].consume(event.cost_bytes)
                sent, end = meant[sender].popleft(), ends[1 - sender]
                assert end.take(event.message) == sent.meant
                message: Message = event.message
                messages[str(1 - sender)].append(
                    {
                        "kind": int(message.kind),
                        "step": message.step,
                        "microbatch": message.microbatch,
                        "dictionary": bytes(message.dictionary).hex(),
                        "body": bytes(message.body).hex(),
                        "decoded": sent.meant.hex(),
                        "tables": {name: held[2].hex() for name, held in sent.tables.items()},
                    }
                )

    def connect() -> None:
        nonlocal connection
        connection += 1
        for session in sessions:
            session.disconnect()
            session.connect()
        tell(0, sessions[0].greeting())

    def queue(stage: int, sent: Any) -> None:
        if sent:
            meant[stage].append(sent)
            coming[stage].extend(split(sent.message, limits.chunk_bytes))

    def send(stage: int, *, count: int = 1000, lost: bool = False) -> None:
        for _ in range(min(count, len(coming[stage]))):
            tell(stage, sessions[stage].send(*coming[stage].popleft(), acknowledge=count < 1000), lost=lost)

    connect()
    queue(0, ends[0].work())
    send(0, count=2)
    send(0, lost=True)  # the rest of the first message is on its way when the connection breaks
    connect()
    for _ in range(6):
        for stage in (0, 1):
            queue(stage, ends[stage].work())
            queue(0, ends[0].evaluate(len(said)) if stage == 0 and ends[0].completed == 1 else None)
            send(stage)
    first = next(each for each in said if each["to"] == 1 and each["connection"] == 2 and len(each["frame"]) > 200)
    tell(0, bytes.fromhex(first["frame"]))  # a duplicate
    tell(1, sessions[1].credit())
    tell(0, sessions[0].credit())
    tell(0, sessions[0].goodbye())
    tell(1, sessions[1].goodbye())
    specs = [{**asdict(plan.spec), "kind": int(plan.kind)} for plan in run.plans]
    return {"generation": 3, "dictionaries": specs, "said": said, "messages": messages}


def histories() -> list[dict[str, Any]]:
    """What a lane's contribution to a round follows from, as a number."""
    log = MembershipLog.begin(3)
    for members in ((0, 1, 2), (0, 2), (0, 2)):
        log = log.then(members)
    log = log.then((0, 1, 2), (ENTRY_AT_3,))
    later = Entry(lane=2, first=6, begins=60, source=2, copied=30)
    asked = [(lane, round, max(0, round - delay)) for lane in range(3) for round in (0, 2, 5) for delay in (0, 2)]
    return [
        {
            "lane": lane,
            "round": round,
            "used": used,
            "stretches": [plain(values_of(each)) for each in log.stretches],
            "admitted": [plain(values_of(each)) for each in admitted],
            "history": log.history_of(lane, round, used, admitted, lanes=3),
        }
        for admitted, some in (((), asked), ((later,), [(2, 6, 5), (1, 6, 5), (2, 5, 5)]))
        for lane, round, used in some
    ]


def vectors() -> dict[str, Any]:
    """File name -> content."""
    made = {
        "frames": frames(),
        "checksums": checksums(),
        "headers": headers(),
        "rows": rows(),
        "deltas": deltas(),
        "digests": digests(),
        "sections": sections(),
        "selections": selections(),
        "histories": histories(),
        "conversation": conversation(),
    }
    return {f"{name}.json": content for name, content in made.items()}


def rendered(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name, content in vectors().items():
        (DIRECTORY / name).write_text(rendered(content), encoding="ascii")
        print(f"{DIRECTORY.name}/{name}: {(DIRECTORY / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
