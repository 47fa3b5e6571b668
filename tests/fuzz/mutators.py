"""Damage that keeps the form: valid messages with one thing wrong, under a right checksum more often than not.

Random bytes die at the first check; what lies behind is reached by inputs that are almost right. Each mutator takes
whatever bytes it is given (a seed, or what an earlier mutation made of one) and a generator, and falls back on plain
damage where it cannot make sense of them. All draws are the generator's, so a seed names an input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
from google.protobuf.message import DecodeError, Message
from thinpipe.protocol import control_messages, dictionary, messages, round_messages
from thinpipe.protocol import stage_pb2 as pb
from thinpipe.protocol.dictionary import Replica
from thinpipe.protocol.dictionary_delta import DIGEST_BYTES, Delta, DictionarySpec, as_version, check_delta
from thinpipe.protocol.errors import ProtocolError

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48 - 1, 2**48]
NUMBERS += [2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
PARTS_MAX = 8  # of one conversation
WEIGHTS = {"head": 4, "codec_header": 4}  # fields with much in them
TEXTS = [
    "",
    "fp32",
    "int8",
    "int4",
    "bf16",
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "x" * 513,
    "\ud800",
    "step",
    "\x00",
    "ä",
    "F4",
]


def number(old: int, draw: Random) -> int:
    match draw.randrange(4):
        case 0:
            return old + draw.choice([-1, 1])
        case 1:
            return old ^ (1 << draw.randrange(64))
        case _:
            return draw.choice(NUMBERS)


def hostile(draw: Random) -> Any:
    """A value that a JSON or msgpack tree may hold."""
    deep: Any = 0
    for _ in range(draw.choice([1, 7, 9, 40])):
        deep = [deep]
    some = [None, True, False, number(0, draw), -number(0, draw), 1.5, -0.0, float("nan"), float("inf")]
    some += [draw.choice(TEXTS), [], {}, deep, [0] * draw.choice([1, 4, 255, 300]), {"a": 1}]
    return draw.choice(some)


def damage(data: bytes, draw: Random) -> bytes:
    """Flip, cut, repeat, insert, overwrite: of any bytes whatever."""
    raw = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, length = draw.randrange(len(raw) + 1), draw.choice([1, 1, 2, 4, 8, 33])
        match draw.randrange(7):
            case 0 if raw:
                raw[at % len(raw)] ^= 1 << draw.randrange(8)
            case 1:
                del raw[at:]
            case 2:
                del raw[at : at + length]
            case 3:
                raw[at:at] = raw[at : at + length]
            case 4:
                raw[at:at] = draw.randbytes(length)
            case 5:
                raw[at : at + length] = draw.choice([b"\xff", b"\x00", b"\x80", b"\x7f"]) * length
            case _:
                size = draw.choice([1, 2, 4, 8])
                raw[at : at + size] = (number(0, draw) % 256**size).to_bytes(size, draw.choice(["little", "big"]))
    return bytes(raw)


def tree(value: Any, draw: Random) -> Any:
    """The same tree with one value, somewhere in it, replaced, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {other: held for other, held in value.items() if other != key}
            case 1:
                return {**value, draw.choice(TEXTS): hostile(draw)}
            case 2:
                items = list(value.items())
                draw.shuffle(items)
                return dict(items)
            case _:
                return {**value, key: tree(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        match draw.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value[:at], hostile(draw), *value[at:]]
            case _:
                return [*value[:at], tree(value[at], draw), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.7:
        return number(value, draw)
    if isinstance(value, bytes) and draw.random() < 0.7:
        return damage(value, draw)
    return hostile(draw)


# -- protobuf ---------------------------------------------------------------------------------------------------------


def _fields(message: Message, draw: Random) -> None:
    """One field of a message, or of one within it, changed in place."""
    descriptor = message.DESCRIPTOR
    if not descriptor.fields:
        return
    present = [name for each, _ in message.ListFields() for name in [each.name] * WEIGHTS.get(each.name, 1)]
    chosen = draw.choice(present) if present and draw.random() < 0.8 else draw.choice(descriptor.fields).name
    each = descriptor.fields_by_name[chosen]
    old = getattr(message, each.name)
    if each.type == each.TYPE_MESSAGE and each.is_repeated:
        _listed(old, draw)
    elif each.type == each.TYPE_MESSAGE:
        old.SetInParent()
        _fields(old, draw)
    elif each.is_repeated:
        values = list(old)
        match draw.randrange(5):
            case 0:
                values = values[: draw.randrange(len(values) + 1)]
            case 1:
                values = values * 2
            case 2:
                values = list(range(draw.choice([2, 1023, 1024, 1100]), -1, -1))
            case _:
                values.insert(draw.randrange(len(values) + 1), number(0, draw) % 2 ** int(_name(each)))
        message.ClearField(each.name)
        getattr(message, each.name).extend(values)
    elif each.type == each.TYPE_BYTES:
        changed = _header(old, draw) if each.name == "codec_header" else damage(old, draw)
        setattr(message, each.name, changed * (draw.choice([2, 9, 40]) if draw.random() < 0.1 else 1))
    elif each.type == each.TYPE_STRING:
        setattr(message, each.name, draw.choice([text for text in TEXTS if text.isascii()]))
    elif each.type == each.TYPE_DOUBLE:
        setattr(message, each.name, draw.choice([0.0, -1.5, float("nan"), float("inf"), 1e308]))
    else:
        setattr(message, each.name, number(old, draw) % 2 ** int(_name(each)))


def _listed(messages: Any, draw: Random) -> None:
    """A list of messages, changed in place."""
    match draw.randrange(5) if len(messages) else 0:
        case 0:
            messages.add()
        case 1:
            del messages[draw.randrange(len(messages))]
        case 2 if len(messages) < 64:
            messages.extend(list(messages))
        case _:
            _fields(draw.choice(list(messages)), draw)


def _name(each: Any) -> str:
    return "32" if each.type in (each.TYPE_UINT32, each.TYPE_FIXED32) else "64"


def _header(raw: bytes, draw: Random) -> bytes:
    """A codec's header with something else in it; more rarely, other bytes."""
    try:
        if draw.random() < 0.8:
            changed = tree(msgpack.unpackb(raw) if raw else {}, draw)
            return msgpack.packb(changed, use_single_float=draw.random() < 0.1) or b""
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        pass
    return damage(raw, draw)


def frame(data: bytes, draw: Random) -> bytes:
    """A frame with another value in one of its fields. Three chunks of four get the lengths and the checksum that they
    need to be looked at further."""
    if draw.random() < 0.25:
        return damage(data, draw)
    parsed = pb.Frame()
    try:
        parsed.ParseFromString(data)
    except DecodeError:
        return damage(data, draw)
    body = parsed.WhichOneof("body")
    if body is None or draw.random() < 0.05:
        getattr(parsed, draw.choice(pb.Frame.DESCRIPTOR.fields).name).SetInParent()
        body = parsed.WhichOneof("body")
    for _ in range(draw.choice([1, 1, 2])):
        _fields(getattr(parsed, body or "chunk"), draw)
    if parsed.HasField("chunk") and draw.random() < 0.75:
        chunk = parsed.chunk
        rest = len(chunk.data) - chunk.head.token_ids_bytes - chunk.head.dictionary_bytes
        if chunk.HasField("head") and draw.random() < 0.6 and rest >= 0:
            chunk.head.body_bytes = rest
        chunk.xxh3 = messages._checksum(chunk, chunk.data)
    if parsed.HasField("copy_part") and draw.random() < 0.75:
        part = parsed.copy_part
        numbers = {"stage": part.stage, "completed_steps": part.completed_steps, "offset": part.offset}
        part.xxh3 = control_messages.part_checksum(control_messages.CopyPart(**numbers, data=part.data))
    if parsed.HasField("round_part") and draw.random() < 0.75:
        said = parsed.round_part
        numbers = {name: getattr(said, name) for name in ("round", "offset", "total_bytes", "contribution_xxh3")}
        said.xxh3 = round_messages.round_part_checksum(round_messages.RoundPart(**numbers, data=said.data))
    return parsed.SerializeToString()


def probe_frame(data: bytes, draw: Random) -> bytes:
    """A frame of a probe with another value in one of its fields, or another body."""
    parsed = pb.ProbeFrame()
    try:
        parsed.ParseFromString(data)
    except DecodeError:
        return damage(data, draw)
    if draw.random() < 0.2:
        return damage(data, draw)
    body = parsed.WhichOneof("body")
    if body is None or draw.random() < 0.05:
        body = draw.choice(pb.ProbeFrame.DESCRIPTOR.fields).name
        getattr(parsed, body).SetInParent()
    _fields(getattr(parsed, body), draw)
    return parsed.SerializeToString()


# -- several in a row -------------------------------------------------------------------------------------------------


def join(parts: list[tuple[int, bytes]]) -> bytes:
    """A conversation: of each part a byte that says how it comes, and its length (3 bytes)."""
    return b"".join(bytes([how]) + len(part).to_bytes(3, "little") + part for how, part in parts)


def cut(data: bytes) -> list[tuple[int, bytes]]:
    """Inverse of `join`, of any bytes: the last part may be short."""
    parts, at = [], 0
    while len(data) - at >= 4 and len(parts) < PARTS_MAX:
        length = int.from_bytes(data[at + 1 : at + 4], "little")
        parts.append((data[at], data[at + 4 : at + 4 + length]))
        at += 4 + length
    return parts


def conversation(data: bytes, draw: Random, change: Mutator = frame) -> bytes:
    """A first byte and a conversation, in which one frame is changed, left out, repeated, or comes elsewhere."""
    if not data or draw.random() < 0.05:
        return damage(data, draw)
    first, parts = data[:1], cut(data[1:])
    if draw.random() < 0.1:
        first = bytes([draw.randrange(256)])
    if not parts:
        return first + join([(0, b"")])
    at, other = draw.randrange(len(parts)), draw.randrange(len(parts))
    how, raw = parts[at]
    match draw.randrange(10):
        case 0:
            del parts[at]
        case 1:
            parts.insert(other, parts[at])
        case 2:
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts[at] = (draw.randrange(256), raw)
        case _:
            parts[at] = (how, change(raw, draw))
    return first + join(parts)


def choosing(mutate: Mutator) -> Mutator:
    """For inputs whose first byte chooses where they go: it is seldom changed."""

    def mutated(data: bytes, draw: Random) -> bytes:
        first = data[:1] if data and draw.random() < 0.95 else bytes([draw.randrange(256)])
        return first + mutate(data[1:], draw)

    return mutated


# -- dictionaries -----------------------------------------------------------------------------------------------------


def delta(data: bytes, draw: Random, ends: Callable[[], tuple[DictionarySpec, Replica]]) -> bytes:
    """A dictionary's change, damaged; mostly with the digest of the table that it would lead to."""
    end = 2 + int.from_bytes(data[:2], "little")
    head, rest = data[2:end], data[end:]
    try:
        values = msgpack.unpackb(head)
        if draw.random() < 0.5:
            values = tree(values, draw)
        else:
            rest = damage(rest, draw)
        if draw.random() < 0.8:
            values["digest"] = _digest(values, rest, *ends())
        head = msgpack.packb(values) or b""
    except (ProtocolError, ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError, RecursionError):
        return damage(data, draw)
    except msgpack.UnpackException:
        return damage(data, draw)
    length = len(head) if draw.random() < 0.95 else number(len(head), draw)
    return (length % 2**16).to_bytes(2, "little") + head + rest


def _digest(values: dict[str, Any], rest: bytes, spec: DictionarySpec, replica: Replica) -> bytes:
    import numpy as np

    count = values["entries"]
    indices = None if count is None else np.frombuffer(rest, spec.index_dtype, count)
    payload = rest[(count or 0) * spec.index_dtype.itemsize :]
    version = as_version(values["version"])
    previous = None if values["previous"] is None else as_version(values["previous"])
    made = Delta(
        name=values["name"],
        version=version,
        previous=previous,
        indices=indices,
        encoding=values["encoding"],
        payload=payload,
        digest=bytes(DIGEST_BYTES),
    )
    check_delta(made, spec)
    before = None if replica.version is None else replica.table
    return dictionary._digest(spec, version, dictionary._advance(before, made, spec))


# -- files ------------------------------------------------------------------------------------------------------------


def manifest(data: bytes, draw: Random) -> bytes:
    """A manifest with another value somewhere, mostly in the one spelling that is read and under a right digest."""
    if draw.random() < 0.2:
        return damage(data, draw)
    try:
        values = tree(json.loads(data), draw)
        if draw.random() < 0.8:
            del values["manifest_sha256"]
            values["manifest_sha256"] = hashlib.sha256(_rendered(values)).hexdigest()
        raw = _rendered(values)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return damage(data, draw)
    return raw if draw.random() < 0.95 else raw * draw.choice([2, 50])


def _rendered(values: Any) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode("utf-8", "surrogatepass")


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"]
DTYPES += ["F6_E2M3", "U16", "U64", "C64", "X", ""]


def tensors(data: bytes, draw: Random) -> bytes:
    """A safetensors file whose header says something else than its bytes hold."""
    end = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        return damage(data, draw)
    try:
        values = json.loads(data[8:end])
        named = [name for name in values if name != "__metadata__"]
        if named and draw.random() < 0.7:
            entry = values[draw.choice(named)]
            match draw.randrange(4):
                case 0:
                    entry["dtype"] = draw.choice(DTYPES)
                case 1:
                    entry["shape"] = [*entry["shape"], draw.choice([0, 1, 2, 2**32, 2**62])]
                case 2:
                    entry["shape"] = tree(entry["shape"], draw)
                case _:
                    entry["data_offsets"] = tree(entry["data_offsets"], draw)
        else:
            values = tree(values, draw)
        head = json.dumps(values).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return damage(data, draw)
    length = len(head) if draw.random() < 0.95 else number(len(head), draw)
    return (length % 2**64).to_bytes(8, "little") + head + data[end:]
