"""The test vectors are what this code makes and takes, byte for byte.

Another implementation, written from docs/protocol.md alone, reads them in test_plain_reader.py.
"""

from __future__ import annotations

import hashlib

import numpy as np
from thinpipe.protocol.dictionary import Publisher, Replica
from thinpipe.protocol.dictionary_delta import (
    DictionarySpec,
    Version,
    decode_delta,
    encode_delta,
    join_deltas,
    joined_bytes_max,
    split_deltas,
)
from thinpipe.protocol.header import decode_header, encode_header
from thinpipe.protocol.messages import Limits, decode_frame, encode_frame

from .protocol_vectors import rendered, values_of, vectors
from .test_plain_reader import HERE, load, real  # which uses nothing of anybody, so it cannot import them


def test_the_vectors_are_what_the_code_makes() -> None:
    """After a change that is meant: `python -m tests.protocol_vectors`."""
    made = vectors()
    assert {path.name for path in (HERE / "vectors").iterdir()} == set(made)
    for name, content in made.items():
        assert rendered(content) == (HERE / "vectors" / name).read_text(), name


def test_frames_are_read() -> None:
    limits = Limits(message_bytes=4096, chunk_bytes=512)
    for vector in load("frames"):
        raw = bytes.fromhex(vector["frame"])
        frame = decode_frame(raw, limits)
        assert values_of(frame) == real(vector["fields"]), vector["name"]
        assert encode_frame(frame) == raw
    for said in load("conversation")["said"]:
        raw = bytes.fromhex(said["frame"])
        assert encode_frame(decode_frame(raw, limits)) == raw


def test_headers_are_read() -> None:
    for vector in load("headers"):
        assert decode_header(bytes.fromhex(vector["msgpack"])) == real(vector["header"])
        assert encode_header("", real(vector["header"])).hex() == vector["msgpack"]


def test_deltas_are_followed() -> None:
    for vector in load("deltas"):
        spec = DictionarySpec(**vector["spec"])
        replica = Replica(spec, vector["generation"])
        if start := vector["zeros_at"]:
            version = Version(*start)
            zeros = np.zeros((spec.entries, spec.width), spec.dtype)
            has_started = Publisher(spec, version.generation).publish(
                zeros, step=version.step, microbatch=version.microbatch
            )
            assert has_started.version == version
            replica.apply(has_started)
        for each in vector["deltas"]:
            delta = decode_delta(bytes.fromhex(each["bytes"]), spec)
            assert encode_delta(delta).hex() == each["bytes"]
            table = replica.apply(delta)
            assert [*delta.version] == each["version"]
            assert hashlib.sha256(table.tobytes()).hexdigest() == each["table_sha256"]


def test_sections_are_split() -> None:
    for vector in load("sections"):
        section = bytes.fromhex(vector["section"])
        found = split_deltas(section, vector["names"])
        assert [*found] == vector["names"]
        assert [raw.hex() for raw in found.values()] == vector["deltas"]
        assert join_deltas(found.values()) == section


def test_the_conversation_has_no_longer_section_than_its_dictionaries_can_make() -> None:
    vector = load("conversation")
    specs = [DictionarySpec(**{k: v for k, v in each.items() if k != "kind"}) for each in vector["dictionaries"]]
    sections = [message["dictionary"] for got in vector["messages"].values() for message in got]
    assert 0 < max(map(len, sections)) // 2 <= joined_bytes_max(specs)
