"""Another implementation of the receiver, written from docs/protocol.md alone, finds in the vectors what the code does.

It imports nothing of the package and no library that knows protobuf or msgpack, and takes the fields of frames from the
document's own tables: so what the document says is enough.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "protocol.md"


def load(name: str) -> Any:
    return json.loads((HERE / "vectors" / f"{name}.json").read_text())


def real(value: Any) -> Any:
    """From JSON: {"hex": ...} is bytes, {"float64": ...} a float."""
    if isinstance(value, list):
        return [real(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"hex"}:
        return bytes.fromhex(value["hex"])
    if set(value) == {"float64"}:
        return struct.unpack("<d", bytes.fromhex(value["float64"]))[0]
    return {key: real(each) for key, each in value.items()}


def tables_of_fields() -> dict[str, dict[int, tuple[str, str]]]:
    """Message -> number -> (name, type), as the document lists them."""
    found: dict[str, dict[int, tuple[str, str]]] = {}
    row = re.compile(r"^\| (\w+) \| (\d+) \| `(\w+)` \| ([\w ]+) \|", re.MULTILINE)
    for message, number, name, kind in row.findall(DOCUMENT.read_text(encoding="utf-8")):
        found.setdefault(message, {})[int(number)] = (name, kind)
    return found


FIELDS = tables_of_fields()
DEFAULTS: dict[str, Any] = {"string": "", "bytes": b"", "double": 0.0}


def varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if raw[at - 1] < 128:
            return value, at


def read_message(name: str, raw: bytes) -> dict[str, Any]:
    """Protobuf: a key (number << 3 | wire type); a varint (0), 8 bytes (1), a length and so many (2) or 4 bytes (5)."""
    values: dict[str, Any] = {}
    for field, kind in FIELDS.get(name, {}).values():
        empty: Any = [] if kind.startswith("repeated") else DEFAULTS.get(kind, None if kind[0].isupper() else 0)
        values[field] = empty
    at = 0
    while at < len(raw):
        key, at = varint(raw, at)
        field, kind = FIELDS[name][key >> 3]
        if key & 7 == 0:
            values[field], at = varint(raw, at)
            continue
        if key & 7 == 1:
            value, at = raw[at : at + 8], at + 8
        elif key & 7 == 5:
            value, at = raw[at : at + 4], at + 4
        else:
            size, at = varint(raw, at)
            value, at = raw[at : at + size], at + size
        repeated = kind.removeprefix("repeated ")
        if kind != repeated and repeated[0].isupper():
            values[field] = [*values[field], read_message(repeated, value)]
        else:
            values[field] = value_of(kind, value)
    return values


def value_of(kind: str, value: bytes) -> Any:
    match kind:
        case "double":
            return struct.unpack("<d", value)[0]
        case "fixed64":
            return struct.unpack("<Q", value)[0]
        case "string":
            return value.decode()
        case "bytes":
            return value
        case "repeated fixed64":
            return list(struct.unpack(f"<{len(value) // 8}Q", value))
        case "repeated uint64" | "repeated uint32":
            numbers, at = [], 0
            while at < len(value):
                number, at = varint(value, at)
                numbers.append(number)
            return numbers
        case _:
            return read_message(kind, value)


def read_frame(raw: bytes) -> tuple[str, dict[str, Any]]:
    key, at = varint(raw, 0)
    size, at = varint(raw, at)
    assert key & 7 == 2
    assert at + size == len(raw)
    name, kind = FIELDS["Frame"][key >> 3]
    return name, read_message(kind, raw[at:])


def covered_by_checksum(chunk: dict[str, Any]) -> bytes:
    """Of a chunk, or of a part of a copy or of a contribution."""
    if "round" in chunk:
        numbers = [chunk[name] for name in ("round", "offset", "total_bytes", "contribution_xxh3")]
        return struct.pack("<4Q", *numbers) + chunk["data"]
    if "offset" in chunk:
        return struct.pack("<3Q", chunk["stage"], chunk["completed_steps"], chunk["offset"]) + chunk["data"]
    head = chunk["head"] or read_message("MessageHead", b"")
    codec = head["codec"].encode()
    numbers = [head["kind"], head["microbatch"], len(codec), len(head["codec_header"])]
    numbers += [int(chunk["head"] is not None), chunk["acknowledge"], head["layer"], head["segment"]]
    longer = [chunk["sequence"], chunk["generation"], head["step"], head["token_ids_bytes"], head["body_bytes"]]
    longer += [head["dictionary_bytes"], chunk["next_sequence"], chunk["granted_bytes"]]
    envelope = struct.pack("<8I8Qd", *numbers, *longer, head["loss_sum"])
    return envelope + codec + head["codec_header"] + chunk["data"]


def history(stretches: list[dict[str, Any]], entries: list[dict[str, Any]], lane: int, round: int, used: int) -> int:
    """Of a lane's contribution to a round before which it used so many."""

    def numbers(entry: dict[str, Any]) -> list[int]:
        return [entry[name] for name in ("lane", "first", "begins", "source", "copied")]

    before = [each for each in stretches if each["first"] < used and (each["first"] or each["members"] != [0, 1, 2])]
    own = [each for each in entries if each["lane"] == lane and each["first"] <= round][-1:]
    if not before and not own:
        return 0
    covered = [len(own), *(number for each in own for number in numbers(each))]
    for each in before:
        covered += [each["first"], len(each["members"]), *each["members"], len(each["entered"])]
        covered += [number for entry in each["entered"] for number in numbers(entry)]
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(covered)}Q", *covered)) % 2**48


def test_histories_are_what_the_document_says() -> None:
    vectors = load("histories")
    for vector in vectors:
        entries = [each for stretch in vector["stretches"] for each in stretch["entered"]] + vector["admitted"]
        known = [vector[name] for name in ("lane", "round", "used")]
        assert history(vector["stretches"], entries, *known) == vector["history"]
    assert len({vector["history"] for vector in vectors}) > 4


def read_msgpack(raw: bytes, at: int = 0) -> tuple[Any, int]:
    """(value, where it ends)."""
    first = raw[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return first - (256 if first >= 0xE0 else 0), at
    if 0xC0 <= first <= 0xC3:
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    numbers = {0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
    numbers |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
    if first in numbers:
        (value,) = struct.unpack_from(numbers[first], raw, at)
        return value, at + struct.calcsize(numbers[first])
    lengths = {0xC4: 1, 0xC5: 2, 0xD9: 1, 0xDA: 2, 0xDC: 2, 0xDE: 2}
    if first in lengths:
        size = lengths[first]
        count, at = int.from_bytes(raw[at : at + size], "big"), at + size
    else:
        count = first & (31 if 0xA0 <= first < 0xC0 else 15)
    if first in (0xC4, 0xC5):
        return raw[at : at + count], at + count
    if first in (0xD9, 0xDA) or 0xA0 <= first < 0xC0:
        return raw[at : at + count].decode(), at + count
    items = []
    is_map = first == 0xDE or 0x80 <= first < 0x90
    for _ in range(2 * count if is_map else count):
        item, at = read_msgpack(raw, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if is_map else items), at


def packed(value: Any) -> bytes:
    """msgpack of what a digest covers: a short list of texts and numbers, in the fewest bytes."""
    if isinstance(value, list):
        return bytes([0x90 + len(value)]) + b"".join(map(packed, value))
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 + len(text)]) if len(text) < 32 else bytes([0xD9, len(text)])) + text
    if value < 128:
        return bytes([value])
    sizes = {8: (0xCC, ">B"), 16: (0xCD, ">H"), 32: (0xCE, ">I"), 64: (0xCF, ">Q")}
    code, form = sizes[next(bits for bits in sizes if value < 2**bits)]
    return bytes([code]) + struct.pack(form, value)


def digest_of(spec: dict[str, Any], version: list[int], table: np.ndarray) -> bytes:
    head = packed([spec["name"], spec["entries"], spec["width"], spec["dtype"], *version])
    return hashlib.blake2b(head + table.tobytes(), digest_size=16).digest()


def dtype_of(spec: dict[str, Any]) -> np.dtype[Any]:
    return np.dtype({"float32": "<f4", "float64": "<f8"}[spec["dtype"]])


def rows_from(payload: bytes, encoding: str, rows: int, width: int, dtype: np.dtype[Any]) -> np.ndarray:
    """One value at a time, as the document says it."""
    out = np.zeros((rows, width), dtype)

    def bf16(at: int) -> np.floating[Any]:
        return dtype.type(struct.unpack("<f", b"\0\0" + payload[at : at + 2])[0])

    for row in range(rows):
        for column in range(width):
            nth = row * width + column
            if encoding == "bf16":
                out[row, column] = bf16(2 * nth)
            elif encoding in ("fp32", "fp64"):
                size = {"fp32": 4, "fp64": 8}[encoding]
                (value,) = struct.unpack_from({"fp32": "<f", "fp64": "<d"}[encoding], payload, size * nth)
                out[row, column] = value
            elif encoding == "int8":
                (code,) = struct.unpack_from("<b", payload, 2 * rows + nth)
                out[row, column] = dtype.type(code) * bf16(2 * row)
            else:
                code = (payload[2 * rows + nth // 2] >> 4 * (nth % 2) & 15) - 8
                out[row, column] = dtype.type(code) * bf16(2 * row)
    return out


class Table:
    """A replica."""

    def __init__(self, spec: dict[str, Any], generation: int) -> None:
        self.spec, self.generation = spec, generation
        self.version: list[int] | None = None
        self.digest = b""
        self.table = np.zeros((spec["entries"], spec["width"]), dtype_of(spec))

    def apply(self, raw: bytes) -> dict[str, Any]:
        size = int.from_bytes(raw[:2], "little")
        head, end = read_msgpack(raw[: 2 + size], 2)
        assert end == 2 + size
        assert list(head) == ["name", "version", "previous", "entries", "encoding", "digest"]
        assert head["name"] == self.spec["name"]
        assert head["previous"] == self.version
        assert head["version"][0] == self.generation
        assert self.version is None or head["version"] > self.version
        count, chosen = head["entries"], np.arange(self.spec["entries"])
        if count is not None:
            last = self.spec["entries"] - 1
            width = next(width for width in (1, 2, 4) if last < 256**width)
            chosen = np.frombuffer(raw, f"<u{width}", count, end)
            end += count * width
        head["payload"], head["chosen"] = raw[end:], None if count is None else chosen.tolist()
        dtype = self.table.dtype
        change = rows_from(raw[end:], head["encoding"], len(chosen), self.spec["width"], dtype)
        self.table = self.table.copy()
        self.table[chosen] = change if head["previous"] is None else self.table[chosen] + change
        self.version, self.digest = head["version"], digest_of(self.spec, head["version"], self.table)
        assert self.digest == head["digest"]
        return head


def deltas_in(section: bytes) -> dict[str, bytes]:
    found, at = {}, 0
    while at < len(section):
        size = int.from_bytes(section[at : at + 4], "little")
        delta = section[at + 4 : at + 4 + size]
        assert len(delta) == size
        name = read_msgpack(delta, 2)[0]["name"]
        assert name not in found
        found[name], at = delta, at + 4 + size
    return found


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox 4x64, ten rounds (Salmon et al., SC'11): the four numbers of one counter."""
    k, c, mask = list(key), list(counter), 2**64 - 1
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return c


def test_another_reader_finds_the_same_fields() -> None:
    for vector in load("frames"):
        name, fields = read_frame(bytes.fromhex(vector["frame"]))
        wanted = real(vector["fields"])
        assert name == vector["body"]
        if "xxh3" in fields:
            assert xxhash.xxh3_64_intdigest(covered_by_checksum(fields)) == fields.pop("xxh3"), vector["name"]
        assert fields == wanted, vector["name"]
        if name == "chunk" and fields["head"]:
            assert struct.pack("<d", fields["head"]["loss_sum"]) == struct.pack("<d", wanted["head"]["loss_sum"])


def test_another_reader_sums_the_same_bytes() -> None:
    by_name = {vector["name"]: bytes.fromhex(vector["frame"]) for vector in load("frames")}
    for vector in load("checksums"):
        _, chunk = read_frame(by_name[vector["frame"]])
        assert covered_by_checksum(chunk).hex() == vector["covered"]
        assert xxhash.xxh3_64_intdigest(bytes.fromhex(vector["covered"])) == vector["xxh3"] == chunk["xxh3"]


def test_another_reader_finds_the_same_headers() -> None:
    for vector in load("headers"):
        raw = bytes.fromhex(vector["msgpack"])
        value, end = read_msgpack(raw) if raw else ({}, 0)
        assert end == len(raw)
        assert value == real(vector["header"])


def test_another_reader_finds_the_same_rows() -> None:
    for vector in load("rows"):
        dtype = dtype_of(vector)
        found = rows_from(bytes.fromhex(vector["payload"]), vector["encoding"], *vector["shape"], dtype)
        assert found.tobytes().hex() == vector["decoded"], vector["name"]


def test_another_reader_follows_the_deltas() -> None:
    for vector in load("deltas"):
        table = Table(vector["spec"], vector["generation"])
        table.version = vector["zeros_at"]
        for each in vector["deltas"]:
            head = table.apply(bytes.fromhex(each["bytes"]))
            named = (head["version"], head["previous"], head["chosen"], head["encoding"], head["digest"].hex())
            assert named == tuple(each[key] for key in ("version", "previous", "entries", "encoding", "digest"))
            assert head["payload"].hex() == each["payload"]
            assert hashlib.sha256(table.table.tobytes()).hexdigest() == each["table_sha256"]
            assert table.table.tobytes().hex() == each.get("table", table.table.tobytes().hex())


def test_another_reader_finds_the_same_digests() -> None:
    for vector in load("digests"):
        table = np.frombuffer(bytes.fromhex(vector["table"]), dtype_of(vector["spec"]))
        assert digest_of(vector["spec"], vector["version"], table).hex() == vector["digest"]


def test_another_reader_splits_the_sections() -> None:
    for vector in load("sections"):
        found = deltas_in(bytes.fromhex(vector["section"]))
        assert [*found] == vector["names"]
        assert [raw.hex() for raw in found.values()] == vector["deltas"]


def test_another_owner_chooses_the_same_entries() -> None:
    for vector in load("selections"):
        entries, count = vector["entries"], -(-vector["entries"] // vector["divisor"])
        if vector["policy"] == "full" or count == entries:
            assert vector["chosen"] is None
            continue
        if vector["policy"] == "random":
            first, *rest = vector["philox_counter"]
            blocks = [philox(vector["philox_key"], [first + 1 + nth, *rest]) for nth in range(-(-entries // 4))]
            drawn = [number for block in blocks for number in block][:entries]
            chosen = sorted(range(entries), key=lambda entry: drawn[entry])[:count]
        elif vector["policy"] == "robin":
            chosen = [(vector["cursor"] * count + nth) % entries for nth in range(count)]
        else:
            drift = np.frombuffer(bytes.fromhex(vector["drift"]), "<f4").reshape(entries, -1).astype(np.float64)
            worth = np.sqrt((drift**2).sum(axis=1)) * np.frombuffer(bytes.fromhex(vector["usage"]), "<f8")
            chosen = sorted(range(entries), key=lambda entry: (-worth[entry], entry))[:count]
        assert sorted(chosen) == vector["chosen"]


@pytest.mark.parametrize("stage", [0, 1])
def test_another_receiver_follows_the_conversation(stage: int) -> None:
    """Frames of two connections to messages, messages to tables and tensors."""
    vector = load("conversation")
    specs = {each["name"]: each for each in vector["dictionaries"] if (each["kind"] == 1) == (stage == 1)}
    tables = {name: Table(spec, vector["generation"]) for name, spec in specs.items()}
    expected, dropped, connection = 0, 0, 0
    head: Any = None
    data, got = b"", []
    for said in vector["said"]:
        if said["to"] != stage or said["lost"]:
            continue
        name, fields = read_frame(bytes.fromhex(said["frame"]))
        if said["connection"] != connection:
            connection = said["connection"]
            assert name == "greeting"
            assert (fields["protocol_version"], fields["generation"], fields["stage"]) == (
                1,
                vector["generation"],
                1 - stage,
            )
        if name != "chunk":
            continue
        assert xxhash.xxh3_64_intdigest(covered_by_checksum(fields)) == fields["xxh3"]
        assert fields["generation"] == vector["generation"]
        if fields["sequence"] < expected:
            dropped += 1
            continue
        assert fields["sequence"] == expected
        expected += 1
        assert (fields["head"] is None) == (head is not None)
        head, data = head or fields["head"], data + fields["data"]
        if len(data) < head["token_ids_bytes"] + head["dictionary_bytes"] + head["body_bytes"]:
            continue
        got.append(decoded_from(head, data, tables))
        head, data = None, b""
    assert head is None
    assert dropped == (stage == 1)
    assert got == vector["messages"][str(stage)]


def decoded_from(head: dict[str, Any], data: bytes, tables: dict[str, Table]) -> dict[str, Any]:
    section = data[head["token_ids_bytes"] :][: head["dictionary_bytes"]]
    body = data[head["token_ids_bytes"] + head["dictionary_bytes"] :]
    for name, delta in deltas_in(section).items():
        tables[name].apply(delta)
    named = read_msgpack(head["codec_header"])[0]
    codes = np.frombuffer(body, "<u2").reshape(len(tables), -1)
    meant = b""
    for (name, table), of in zip(tables.items(), codes, strict=True):
        assert named[name] == [*table.version, table.digest]  # type: ignore[misc]
        meant += table.table[of].tobytes()
    return {
        "kind": head["kind"],
        "step": head["step"],
        "microbatch": head["microbatch"],
        "dictionary": section.hex(),
        "body": body.hex(),
        "decoded": meant.hex(),
        "tables": {name: table.table.tobytes().hex() for name, table in tables.items()},
    }


def test_nothing_of_the_package_is_used_here() -> None:
    source = Path(__file__).read_text()
    imported = set(re.findall(r"^ *(?:import|from) +(\w+)", source, re.M)) - {"__future__"}
    assert imported <= {"hashlib", "json", "numpy", "pathlib", "pytest", "re", "struct", "typing", "xxhash"}
    assert not re.search(r"^ *from +\.", source, re.M)
