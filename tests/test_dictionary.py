"""Dictionaries stay bit-identical at both ends, lose no rounding error, and take nothing that is not the next delta."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thinpipe.protocol.dictionary import Publisher, Replica
from thinpipe.protocol.dictionary_delta import DIGEST_BYTES, Delta, DictionarySpec, Version, decode_delta, encode_delta
from thinpipe.protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from thinpipe.protocol.messages import MICROBATCH_MAX, STEP_MAX
from thinpipe.protocol.rows import Encoding

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
DTYPES = ("float32", "float64")
# What may be left of a row's greatest distance to the master after one delta: half a step of the encoding, where a step
# may be off by one part in 256 (it is a bf16 number).
LEFT = {"fp64": 2**-23, "fp32": 2**-23, "bf16": 2**-8, "int8": 0.5 / 127 * 1.01, "int4": 0.5 / 7 * 1.01}

unhurried = settings(deadline=None, max_examples=40)  # the machine may be busy; what is asserted is never the time
specs = st.builds(
    DictionarySpec,
    name=st.sampled_from(["projector", "code\N{LATIN SMALL LETTER O WITH DIAERESIS}k"]),
    entries=st.integers(1, 9) | st.just(300),
    width=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    encoding=st.sampled_from(ENCODINGS),
)
each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def table_of(spec: DictionarySpec, seed: int, scale: float = 1.0) -> np.ndarray:
    """Numbers of very different size, in one row too."""
    draw = np.random.default_rng(seed)
    shape = (spec.entries, spec.width)
    return (scale * draw.standard_normal(shape) * 2.0 ** draw.integers(-12, 3, shape)).astype(spec.dtype)


def some_entries(spec: DictionarySpec, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.sort(draw.choice(spec.entries, size=draw.integers(1, spec.entries + 1), replace=False))


def delivered(delta: Delta, spec: DictionarySpec) -> Delta:
    return decode_delta(encode_delta(delta), spec)


def bits(table: np.ndarray) -> bytes:
    return table.tobytes()


def held(end: Publisher | Replica) -> tuple[Any, ...]:
    return end.version, end.digest, None if end.version is None else bits(end.table)


def refused(fault: Fault, call: Callable[[], object], match: str = ".") -> None:
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        call()
    assert caught.value.fault == fault


def ready(encoding: Encoding = "int8", **other: Any) -> tuple[DictionarySpec, Publisher, Replica, Delta]:
    """Both ends after a snapshot, and the delta that comes next."""
    spec = DictionarySpec(**{"name": "table", "entries": 6, "width": 5, "encoding": encoding, **other})
    publisher, replica = Publisher(spec, 3), Replica(spec, 3)
    replica.apply(delivered(publisher.publish(table_of(spec, 1), step=0, microbatch=0), spec))
    return spec, publisher, replica, publisher.publish(table_of(spec, 2), step=1, microbatch=0)


class Sent(NamedTuple):
    raw: bytes
    after: tuple[Any, ...]  # version, digest, bits: what the publisher shipped


class TwoEnds(RuleBasedStateMachine):
    """One publisher, one replica, and a network that delays, repeats, reorders and damages; and rollbacks."""

    @initialize(spec=specs, seed=st.integers(0, 99))
    def start(self, spec: DictionarySpec, seed: int) -> None:
        self.spec, self.generation, self.step, self.microbatch = spec, 3, 0, 0
        self.publisher, self.replica = Publisher(spec, self.generation), Replica(spec, self.generation)
        self.master = table_of(spec, seed)
        self.expected = held(self.replica)  # of the replica, by what was delivered
        self.coming: deque[Sent] = deque()
        self.seen: list[bytes] = []  # delivered, or of an earlier generation
        self.handed_out: list[tuple[np.ndarray, bytes]] = []
        self.checkpoint = (self.publisher.state(), self.replica.state(), self.expected)

    @rule(
        seed=st.integers(0, 2**32 - 1),
        drift=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]),
        whole=st.booleans(),
        later=st.sampled_from([(0, 0), (0, 1), (1, 0)]),
    )
    def publish(self, seed: int, drift: float, whole: bool, later: tuple[int, int]) -> None:
        self.master = self.master + table_of(self.spec, seed, drift)
        self.step, self.microbatch = self.step + later[0], 0 if later[0] else self.microbatch + later[1]
        entries = None if whole else some_entries(self.spec, seed)
        before = None if self.publisher.version is None else self.publisher.shipped
        delta = self.publisher.publish(self.master, step=self.step, microbatch=self.microbatch, entries=entries)
        after = self.publisher.shipped
        if before is None:
            assert delta.snapshot
            assert bits(after) == bits(self.master)
        elif entries is not None:
            others = np.setdiff1d(np.arange(self.spec.entries), entries)
            assert bits(after[others]) == bits(before[others])
        raw = encode_delta(delta)
        assert len(raw) <= self.spec.delta_bytes_max
        self.coming.append(Sent(raw, held(self.publisher)))
        self.handed_out.append((after, bits(after)))

    def _deliver(self, raw: bytes) -> None:
        table = self.replica.apply(decode_delta(raw, self.spec))
        self.handed_out.append((table, bits(table)))

    def _refused(self, raw: bytes) -> None:
        with pytest.raises(RemoteProtocolError):
            self._deliver(raw)

    @precondition(lambda self: self.coming)
    @rule()
    def deliver(self) -> None:
        sent = self.coming.popleft()
        self._deliver(sent.raw)
        self.expected = sent.after
        self.replica.check(*sent.after[:2])
        self.seen.append(sent.raw)

    @precondition(lambda self: len(self.coming) > 1)
    @rule(data=st.data())
    def overtake(self, data: st.DataObject) -> None:
        self._refused(data.draw(st.sampled_from(list(self.coming)[1:])).raw)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self._refused(data.draw(st.sampled_from(self.seen)))

    @precondition(lambda self: self.coming)
    @rule(position=st.integers(0, 2**20), flip=st.integers(1, 255))
    def damage(self, position: int, flip: int) -> None:
        sent = self.coming[0]
        raw = bytearray(sent.raw)
        raw[position % len(raw)] ^= flip
        try:
            self._deliver(bytes(raw))
        except RemoteProtocolError:
            return
        self.coming.popleft()  # accepted only where it makes no difference, as a zero of the other sign
        self.expected = sent.after

    @rule()
    def restart_both(self) -> None:
        for end in ("publisher", "replica"):
            old = getattr(self, end)
            new = type(old)(self.spec, self.generation)
            new.load_state(old.state())
            setattr(self, end, new)

    @precondition(lambda self: not self.coming)
    @rule()
    def commit(self) -> None:
        self.checkpoint = (self.publisher.state(), self.replica.state(), self.expected)

    @rule()
    def rollback(self) -> None:
        self.generation, self.step, self.microbatch = self.generation + 1, 0, 0
        self.publisher, self.replica = Publisher(self.spec, self.generation), Replica(self.spec, self.generation)
        self.publisher.load_state(self.checkpoint[0])
        self.replica.load_state(self.checkpoint[1])
        self.expected = self.checkpoint[2]
        self.seen += [sent.raw for sent in self.coming]
        self.coming.clear()

    @invariant()
    def replica_holds_what_was_shipped(self) -> None:
        assert held(self.replica) == self.expected

    @invariant()
    def nothing_handed_out_changes(self) -> None:
        assert all(bits(table) == before and not table.flags.writeable for table, before in self.handed_out)
        assert len({id(table) for table, _ in self.handed_out}) == len(self.handed_out)


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# What the encodings do ------------------------------------------------------------------------------------------------


@each_dtype
@each_encoding
def test_a_constant_master_is_reached_to_its_last_bit(encoding: Encoding, dtype: Any) -> None:
    spec = DictionarySpec("table", 20, 8, dtype, encoding)
    publisher, master = Publisher(spec, 0), table_of(spec, 1)
    publisher.publish(table_of(spec, 2), step=0, microbatch=0)
    ulp = np.spacing(np.abs(master).max())
    for step in range(1, 40):
        before = np.abs(master - publisher.shipped).max(axis=1)
        publisher.publish(master, step=step, microbatch=0)
        after = np.abs(master - publisher.shipped).max(axis=1)
        assert np.all(after <= LEFT[encoding] * before + ulp)
    assert bits(publisher.shipped) == bits(master)


@each_encoding
def test_rounding_error_is_never_lost(encoding: Encoding) -> None:
    """However long the master has drifted, and whichever entries went when: one delta leaves one rounding."""
    spec = DictionarySpec("table", 32, 16, "float64", encoding)
    master = table_of(spec, 1)
    publisher, open_loop = Publisher(spec, 0), master.copy()
    publisher.publish(master, step=0, microbatch=0)
    for step in range(1, 300):
        drift = 1e-2 * table_of(spec, step)
        fresh = Publisher(spec, 0)  # the known alternative: the difference of successive masters
        fresh.publish(np.zeros_like(drift), step=0, microbatch=0)
        fresh.publish(drift, step=1, microbatch=0)
        open_loop += fresh.shipped
        master = master + drift
        entries = None if step % 4 else some_entries(spec, step)
        chosen = slice(None) if entries is None else entries
        before = np.abs(master - publisher.shipped)[chosen].max(axis=1)
        publisher.publish(master, step=step, microbatch=0, entries=entries)
        after = np.abs(master - publisher.shipped)[chosen].max(axis=1)
        assert np.all(after <= LEFT[encoding] * before + 1e-14)
    publisher.publish(master, step=300, microbatch=0)
    if encoding != "fp64":
        assert np.abs(master - publisher.shipped).mean() < np.abs(master - open_loop).mean() / 5


def test_payloads_spelled_out() -> None:
    def payload(encoding: Encoding, rows: list[list[float]]) -> str:
        x = np.array(rows, np.float32)
        publisher = Publisher(DictionarySpec("table", *x.shape, encoding=encoding), 0)
        publisher.publish(np.zeros_like(x), step=0, microbatch=0)
        return publisher.publish(x, step=0, microbatch=0).payload.hex(" ")

    assert payload("fp32", [[1.0, -2.0]]) == "00 00 80 3f 00 00 00 c0"
    assert payload("fp64", [[1.0]]) == "00 00 00 00 00 00 f0 3f"
    assert payload("bf16", [[1.0], [1 + 2**-8], [1 + 3 * 2**-8]]) == "80 3f 80 3f 82 3f"
    assert payload("int8", [[127, -127, 0.5], [0, 0, 0]]) == "80 3f 80 00 7f 81 00 00 00 00"
    assert payload("int4", [[7, -7, 1.5], [3.5, 0.1, -1]]) == "80 3f 00 3f 1f fa 68"
    assert payload("int4", [[7, -1, -7]]) == "80 3f 7f 81"  # the spare nibble is 8


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@unhurried
def test_bf16_is_rounded_as_torch_does(values: list[float]) -> None:
    x = np.array([values], np.float32)
    publisher = Publisher(DictionarySpec("table", *x.shape, encoding="bf16"), 0)
    publisher.publish(np.zeros_like(x), step=0, microbatch=0)
    wanted = torch.tensor(x).to(torch.bfloat16)
    if torch.isfinite(wanted).all():
        assert publisher.publish(x, step=0, microbatch=0).payload == wanted.view(torch.int16).numpy().tobytes()
    else:
        with pytest.raises(LocalProtocolError, match="not be finite"):
            publisher.publish(x, step=0, microbatch=0)


@given(specs, st.integers(0, 99))
@unhurried
def test_sizes_are_those_of_the_spec(spec: DictionarySpec, seed: int) -> None:
    publisher = Publisher(spec, 2**64 - 1)
    snapshot = publisher.publish(table_of(spec, seed), step=STEP_MAX - 1, microbatch=MICROBATCH_MAX - 1)
    assert len(snapshot.payload) == spec.entries * spec.width * np.dtype(spec.dtype).itemsize
    full = publisher.publish(table_of(spec, 5), step=STEP_MAX - 1, microbatch=MICROBATCH_MAX - 1)
    part = publisher.publish(
        table_of(spec, 6), step=STEP_MAX - 1, microbatch=MICROBATCH_MAX - 1, entries=some_entries(spec, seed)
    )
    assert part.indices is not None
    for delta, rows in ((full, spec.entries), (part, len(part.indices))):
        assert len(delta.payload) == spec.payload_bytes(rows)
    longest = replace(full, version=Version(2**64 - 1, STEP_MAX - 1, MICROBATCH_MAX - 1, MICROBATCH_MAX - 1))
    longest = replace(longest, indices=np.arange(spec.entries).astype(spec.index_dtype))
    for delta in (snapshot, longest):
        assert len(encode_delta(delta)) <= spec.delta_bytes_max
        assert encode_delta(delivered(delta, spec)) == encode_delta(delta)


def test_int4_is_half_of_int8() -> None:
    eight, four = (DictionarySpec("table", 64, 32, encoding=encoding) for encoding in ("int8", "int4"))
    scales = 2 * 64
    assert eight.payload_bytes(64) - scales == 64 * 32 == 2 * (four.payload_bytes(64) - scales)
    assert eight.payload_bytes(3, "bf16") == 3 * 32 * 2


# What is refused ------------------------------------------------------------------------------------------------------


def test_the_publisher_refuses_what_no_peer_would_take() -> None:
    spec, publisher, _, _ = ready("bf16")
    good = table_of(spec, 4)
    before = held(publisher)
    bad = good.copy()
    bad.view(np.uint32)[2, 3] = 0x7FFFFFFF  # the nan that would round to a bf16 zero

    def refuses(fault: Fault, master: np.ndarray = good, step: int = 2, **other: Any) -> None:
        with pytest.raises(LocalProtocolError) as caught:
            publisher.publish(master, **{"step": step, "microbatch": 0, **other})
        assert caught.value.fault == fault
        assert held(publisher) == before

    refuses(Fault.PAYLOAD, bad)
    refuses(Fault.PAYLOAD, np.full_like(good, np.inf))
    refuses(Fault.PAYLOAD, good[:-1])
    refuses(Fault.PAYLOAD, good.astype(np.float64))
    refuses(Fault.MALFORMED, step=0)  # earlier than what went before
    refuses(Fault.MALFORMED, step=-1)
    refuses(Fault.MALFORMED, step=STEP_MAX)
    refuses(Fault.MALFORMED, microbatch=MICROBATCH_MAX)
    for entries in ([], [6], [-1], [1, 1], [2, 1], [[1]], [0.0, 1.0]):
        refuses(Fault.MALFORMED, entries=np.array(entries))
    publisher.publish(good, step=2, microbatch=0)


@each_dtype
@each_encoding
def test_a_difference_too_large_for_the_encoding_is_refused(encoding: Encoding, dtype: Any) -> None:
    """In float64 fp64 has room for it."""
    spec = DictionarySpec("table", 2, 3, dtype, encoding)
    publisher, huge = Publisher(spec, 0), np.full((2, 3), np.finfo(dtype).max)
    publisher.publish(-huge, step=0, microbatch=0)
    before = held(publisher)
    with pytest.raises(LocalProtocolError):
        publisher.publish(huge, step=1, microbatch=0)
    assert held(publisher) == before


def test_one_microbatch_may_bring_several_deltas() -> None:
    spec, publisher, replica, delta = ready()
    assert delta.version == (3, 1, 0, 0)
    again = publisher.publish(table_of(spec, 3), step=1, microbatch=0)
    assert (again.previous, again.version) == ((3, 1, 0, 0), (3, 1, 0, 1))
    assert publisher.publish(table_of(spec, 3), step=1, microbatch=1).version == (3, 1, 1, 0)
    refused(Fault.OUT_OF_ORDER, lambda: replica.apply(again))


def test_nothing_can_be_had_before_the_snapshot() -> None:
    spec = DictionarySpec("table", 2, 2)
    with pytest.raises(LocalProtocolError):
        _ = Publisher(spec, 0).shipped
    with pytest.raises(LocalProtocolError):
        _ = Replica(spec, 0).table
    refused(Fault.OUT_OF_ORDER, lambda: Replica(spec, 0).check(Version(0, 0, 0, 0), bytes(DIGEST_BYTES)))


def test_the_replica_names_what_it_refuses() -> None:
    spec, publisher, replica, delta = ready()
    version, before = delta.version, held(replica)
    snapshot = Publisher(spec, 3).publish(table_of(spec, 1), step=9, microbatch=0)
    cases: list[tuple[Fault, Delta]] = [
        (Fault.OUT_OF_ORDER, publisher.publish(table_of(spec, 3), step=2, microbatch=0)),
        (Fault.OUT_OF_ORDER, snapshot),
        (Fault.GENERATION, replace(delta, version=version._replace(generation=2), previous=Version(2, 0, 0, 0))),
        (Fault.GENERATION, replace(delta, version=version._replace(generation=4))),
        (Fault.UNEXPECTED, replace(delta, name="another")),
        (Fault.CONFIGURATION, replace(delta, encoding="int4")),
        (Fault.MALFORMED, replace(delta, previous=version)),
        (Fault.MALFORMED, replace(delta, payload=delta.payload + b"\0")),
        (Fault.MALFORMED, replace(delta, digest=delta.digest[:-1])),
        (Fault.MALFORMED, replace(snapshot, indices=np.arange(6))),
        (Fault.PAYLOAD, replace(delta, digest=bytes(DIGEST_BYTES))),
        (Fault.PAYLOAD, replace(delta, version=version._replace(index=7))),  # the digest is of another version
        *[
            (Fault.MALFORMED, replace(delta, indices=np.array(wrong), payload=delta.payload[: 7 * len(wrong)]))
            for wrong in ([], [6], [-1], [1, 1], [2, 1])
        ],
    ]
    for fault, wrong in cases:
        refused(fault, lambda wrong=wrong: replica.apply(wrong))
        assert held(replica) == before
    refused(Fault.OUT_OF_ORDER, lambda: Replica(spec, 3).apply(delta))  # the first is a snapshot
    replica.apply(delta)
    refused(Fault.OUT_OF_ORDER, lambda: replica.apply(delta))


@each_dtype
@each_encoding
def test_values_that_are_not_finite_are_refused(encoding: Encoding, dtype: Any) -> None:
    """Scales of nan, infinity, zero, a subnormal and below zero; codes below the least one; plain nan and infinity."""
    _, _, replica, delta = ready(encoding, dtype=dtype)
    before = held(replica)
    if encoding in ("int8", "int4"):
        scales = (0x7FC0, 0x7F80, 0x0000, 0x007F, 0x8000, 0xBF80, 0xFFFF)
        wrong = [scale.to_bytes(2, "little") + delta.payload[2:] for scale in scales]
        wrong += [delta.payload[:12] + b"\x80" + delta.payload[13:]]
    else:
        width = {"fp64": 8, "fp32": 4, "bf16": 2}[encoding]
        top = {"fp64": (0x7FF0, 0xFFF8), "fp32": (0x7F80, 0xFFC0), "bf16": (0x7F80, 0xFFC0)}[encoding]
        wrong = [bytes(width - 2) + value.to_bytes(2, "little") + delta.payload[width:] for value in top]
    why = "scale or code" if encoding in ("int8", "int4") else "not be finite"  # and not: the digest differs
    for payload in wrong:
        refused(Fault.PAYLOAD, lambda payload=payload: replica.apply(replace(delta, payload=payload)), why)
        assert held(replica) == before


def test_the_spare_nibble_is_not_free() -> None:
    _, _, replica, delta = ready("int4", entries=3, width=3)
    assert delta.payload[-1] >> 4 == 8
    refused(Fault.PAYLOAD, lambda: replica.apply(replace(delta, payload=delta.payload[:-1] + b"\x98")), "code")
    replica.apply(delta)


def test_a_table_that_differs_in_one_bit_is_noticed() -> None:
    """Also where the next delta does not touch it."""
    spec, publisher, replica, delta = ready("bf16")
    replica.apply(delta)
    state = replica.state()
    other = state["table"].copy()
    other.view(np.uint32)[5, 4] ^= 1
    replica.__dict__["_table"] = other
    delta = publisher.publish(table_of(spec, 9), step=2, microbatch=0, entries=np.array([0]))
    refused(Fault.PAYLOAD, lambda: replica.apply(delta))
    with pytest.raises(LocalProtocolError):
        replica.load_state({**state, "table": other})
    replica.load_state(state)
    assert bits(replica.apply(delta)) == bits(publisher.shipped)


def test_a_tensor_names_the_version_it_was_coded_with() -> None:
    _, _, replica, delta = ready()
    refused(Fault.OUT_OF_ORDER, lambda: replica.check(delta.version, delta.digest))
    replica.apply(delta)
    replica.check(delta.version, delta.digest)
    assert delta.previous is not None
    refused(Fault.OUT_OF_ORDER, lambda: replica.check(delta.previous, delta.digest))  # type: ignore[arg-type]
    refused(Fault.PAYLOAD, lambda: replica.check(delta.version, bytes(DIGEST_BYTES)))


def test_digests_of_other_dictionaries_differ() -> None:
    table = np.zeros((2, 2), np.float32)
    spec = DictionarySpec("table", 2, 2)
    others = [spec, replace(spec, name="other"), replace(spec, entries=1, width=4), replace(spec, entries=4, width=1)]
    found = {
        Publisher(other, 0).publish(table.reshape(other.entries, other.width), step=step, microbatch=0).digest
        for other in others
        for step in (0, 1)
    }
    assert len(found) == 2 * len(others)


@pytest.mark.parametrize(
    "wrong",
    [{"entries": 0}, {"width": 0}, {"entries": 2**32 + 1}, {"dtype": "float16"}, {"encoding": "int2"}, {"name": "a\n"}],
    ids=str,
)
def test_specs_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        DictionarySpec(**{"name": "table", "entries": 2, "width": 2, **wrong})


# Bytes from outside ---------------------------------------------------------------------------------------------------

SMALL = DictionarySpec("table", 6, 5, encoding="int4")


def an_encoded_delta(*, part: bool) -> bytes:
    spec, publisher, _, delta = ready("int4")
    assert spec == SMALL
    entries = np.array([1, 4])
    return encode_delta(publisher.publish(table_of(spec, 3), step=2, microbatch=0, entries=entries) if part else delta)


@given(st.binary(max_size=400))
@unhurried
def test_random_bytes_are_refused_by_name(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_delta(raw, SMALL)


@pytest.mark.parametrize("part", [False, True])
def test_every_flipped_bit_and_every_cut_is_refused_or_is_what_it_says(part: bool) -> None:
    raw = an_encoded_delta(part=part)
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        try:
            delta = decode_delta(bytes(flipped), SMALL)
        except RemoteProtocolError:
            continue
        assert encode_delta(delta) == flipped
    for cut in range(len(raw)):
        refused(Fault.MALFORMED, lambda cut=cut: decode_delta(raw[:cut], SMALL))
    refused(Fault.MALFORMED, lambda: decode_delta(raw + b"\0", SMALL))
    refused(Fault.OVERSIZED, lambda: decode_delta(raw + bytes(SMALL.delta_bytes_max), SMALL))
    assert encode_delta(decode_delta(memoryview(raw), SMALL)) == raw


HEAD = {
    "name": "table",
    "version": [3, 1, 0, 0],
    "previous": [3, 0, 0, 0],
    "entries": None,
    "encoding": "int4",
    "digest": bytes(DIGEST_BYTES),
}
odd = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def bytes_of(head: Any, payload: bytes) -> bytes:
    packed: Any = msgpack.packb(head)
    return len(packed).to_bytes(2, "little") + packed + payload


@given(st.dictionaries(st.sampled_from([*HEAD, "more"]), odd, min_size=1))
@unhurried
def test_odd_headers_are_refused_by_name(changes: dict[str, Any]) -> None:
    payload = bytes(SMALL.payload_bytes(SMALL.entries))
    decode_delta(bytes_of(HEAD, payload), SMALL)
    raw = bytes_of({**HEAD, **changes}, payload)
    try:
        delta = decode_delta(raw, SMALL)
    except RemoteProtocolError:
        return
    assert encode_delta(delta) == raw


@pytest.mark.parametrize(
    "changes",
    [
        {"version": [True, 1, 0, 0]},
        {"version": [3.0, 1, 0, 0]},
        {"version": [3, -1, 0, 0]},
        {"version": [3, STEP_MAX, 0, 0]},
        {"version": [3, 1, MICROBATCH_MAX, 0]},
        {"version": [3, 1, 0, MICROBATCH_MAX]},
        {"version": [3, 1, 0]},
        {"version": None},
        {"version": [3, 0, 0, 0]},
        {"previous": [3, 0]},
        {"previous": [3, 1, 0, 0]},
        {"entries": True},
        {"entries": 0},
        {"entries": -1},
        {"entries": 7},
        {"entries": 2**63},
        {"digest": "text"},
        {"digest": b"short"},
        {"encoding": None},
        {"encoding": ["int4"]},
        {"encoding": "fp64"},
        {"more": 1},
    ],
    ids=str,
)
def test_one_wrong_field_is_malformed(changes: dict[str, Any]) -> None:
    raw = bytes_of({**HEAD, **changes}, bytes(SMALL.payload_bytes(SMALL.entries)))
    refused(Fault.MALFORMED, lambda: decode_delta(raw, SMALL))


def test_a_header_has_one_spelling() -> None:
    payload = bytes(SMALL.payload_bytes(SMALL.entries))
    packed: Any = msgpack.packb(HEAD)
    name = packed[1 : packed.index(b"\xa7version")]
    twice = bytes([packed[0] + 1]) + name + packed[1:]
    longer = packed.replace(b"\x94\x03\x01\x00\x00", b"\x94\xcc\x03\x01\x00\x00")
    for head in (twice, longer):
        assert head != packed
        raw = len(head).to_bytes(2, "little") + head + payload
        refused(Fault.MALFORMED, lambda raw=raw: decode_delta(raw, SMALL))
    shuffled = dict(reversed(HEAD.items()))
    refused(Fault.MALFORMED, lambda: decode_delta(bytes_of(shuffled, payload), SMALL))


@pytest.mark.alone  # other threads of a test worker allocate, too
def test_memory_stays_within_the_spec() -> None:
    """Whatever the header claims, and however much arrives."""
    spec = DictionarySpec("table", 4096, 64, encoding="int8")
    bombs = [
        bytes_of({**HEAD, "encoding": "int8", "entries": 2**32}, b""),
        bytes_of({**HEAD, "encoding": "fp64", "entries": 2**63}, b""),
        bytes_of([[]] * 4000, b""),
        b"\x05\x00\xdd\xff\xff\xff\xff",
        b"\x05\x00\xc6\xff\xff\xff\xff",
        b"\xff\xff" + b"\x90" * 65535,
        b"\xff\xff" + b"\x98" * (spec.delta_bytes_max - 2),
        bytes(40 * spec.delta_bytes_max),
        encode_delta(Publisher(spec, 3).publish(table_of(spec, 1), step=0, microbatch=0)),
    ]
    for raw in bombs:
        tracemalloc.start()
        try:
            decode_delta(raw, spec)
        except RemoteProtocolError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= spec.delta_bytes_max + 400_000


# Checkpoints ----------------------------------------------------------------------------------------------------------


@each_dtype
@each_encoding
def test_a_restored_publisher_goes_on_bit_for_bit(encoding: Encoding, dtype: Any) -> None:
    spec, publisher, replica, delta = ready(encoding, dtype=dtype)
    replica.apply(delta)
    restored, followed = Publisher(spec, 3), Replica(spec, 3)
    restored.load_state(publisher.state())
    followed.load_state(replica.state())
    for step in range(2, 6):
        entries = None if step % 2 else np.array([0, 3])
        sent = [
            end.publish(table_of(spec, step), step=step, microbatch=1, entries=entries) for end in (publisher, restored)
        ]
        assert encode_delta(sent[0]) == encode_delta(sent[1])
        assert bits(followed.apply(sent[0])) == bits(replica.apply(sent[1])) == bits(publisher.shipped)


def test_an_empty_state_is_one_too() -> None:
    spec = DictionarySpec("table", 2, 2)
    publisher = Publisher(spec, 0)
    publisher.load_state(Publisher(spec, 0).state())
    assert publisher.publish(np.ones((2, 2), np.float32), step=0, microbatch=0).snapshot


def test_a_restored_table_is_a_copy() -> None:
    spec, publisher, _, _ = ready()
    state = {**publisher.state(), "table": publisher.shipped.copy()}
    restored = Publisher(spec, 3)
    restored.load_state(state)
    state["table"][:] = 0
    assert bits(restored.shipped) == bits(publisher.shipped)
    assert not restored.shipped.flags.writeable


def test_a_damaged_state_is_refused() -> None:
    spec, publisher, _, _ = ready()
    state = publisher.state()
    other = table_of(spec, 8)
    wrong: list[dict[str, Any]] = [
        {},
        {**state, "table": other},
        {**state, "table": state["table"].astype(np.float64)},
        {**state, "table": state["table"][:-1]},
        {**state, "version": [3, 1, 0, 1]},
        {**state, "version": [3, 1]},
        {**state, "version": None},
        {**state, "version": "3100"},
        {**state, "digest": "xyz"},
        {**state, "digest": None},
    ]
    for end in (Publisher(spec, 3), publisher):
        before = held(end)
        for bad in wrong:
            with pytest.raises(LocalProtocolError) as caught:
                end.load_state(bad)
            assert caught.value.fault == Fault.RESUME
            assert held(end) == before
    with pytest.raises(LocalProtocolError) as caught:
        Publisher(spec, 2).load_state(state)
    assert caught.value.fault == Fault.GENERATION


def test_a_rollback_raises_the_generation_and_repeats_the_steps() -> None:
    spec, publisher, replica, delta = ready()
    committed = publisher.state()
    late = publisher.publish(table_of(spec, 3), step=2, microbatch=0)
    replica.apply(delta)
    again, followed = Publisher(spec, 4), Replica(spec, 4)
    again.load_state(committed)
    followed.load_state(replica.state())
    refused(Fault.GENERATION, lambda: followed.apply(late))
    redone = again.publish(table_of(spec, 3), step=2, microbatch=0)
    assert redone.payload == late.payload
    assert bits(followed.apply(redone)) == bits(publisher.shipped)
