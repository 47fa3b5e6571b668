"""Laws of records, claims and door: what is told is what is read; strangers cost nothing but a count; two claims never
both hold."""

from __future__ import annotations

import functools
import random
import string
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.protocol.errors import Fault, LocalProtocolError, RemoteProtocolError
from thinpipe.protocol.grid_place import GridPlace, grid
from thinpipe.protocol.node_record import (
    CONFIGURATION_BYTES_MAX,
    RECORD_BYTES_MAX,
    NodeRecord,
    NodeState,
    RunRecord,
    Seen,
    decode_record,
    decode_run,
    encode_record,
    encode_run,
    is_endpoint,
    read_records,
    renew_every_s,
    stale_after_s,
)
from thinpipe.protocol.rendezvous_messages import (
    REQUEST_BYTES_MAX,
    TELL_BYTES_MAX,
    RendezvousRequest,
    RendezvousResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from thinpipe.protocol.stage_choice import (
    CLAIM_WAIT_S,
    better,
    choose,
    finished_lanes,
    fitting,
    has_started,
    neediest,
    of_place,
    rival,
)

from .builders import node_record

DIGEST = "0123456789abcdef" * 4
OF = {"run": "demo", "configuration": DIGEST, "stages": 4}

steps = st.integers(0, 2**48 - 1)
states = st.sampled_from(NodeState)
RECORD = node_record(configuration=DIGEST)
records = st.builds(
    replace,
    st.just(RECORD),
    stage=st.integers(0, 3),
    state=states,
    endpoint=st.sampled_from(["a.example:1", "[fe80::1%2]:65535", "192.0.2.7:7001"]),
    incarnation=st.integers(0, 2**64 - 1),
    claimed_at_s=st.floats(0, 1e11),
    generation=steps,
    completed_steps=steps,
    committed_steps=steps,
    tokens_per_s=st.floats(0, 1e12),
)


@given(records)
def test_what_is_told_is_what_is_read(record: NodeRecord) -> None:
    raw = encode_record(record)
    assert len(raw) <= RECORD_BYTES_MAX
    assert decode_record(raw, **OF) == record


def printable_line(error: Exception) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) < 400


@given(st.binary(max_size=2 * RECORD_BYTES_MAX))
def test_any_bytes_end_in_a_value_or_a_named_fault(raw: bytes) -> None:
    for decode in (
        lambda: decode_record(raw, **OF),
        lambda: decode_run(raw),
        lambda: decode_request(raw),
        lambda: decode_response(raw),
    ):
        try:
            decode()
        except RemoteProtocolError as error:
            printable_line(error)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from([*msgpack.unpackb(encode_record(RECORD))]), anything)
def test_a_changed_field_is_read_as_it_is_or_refused(name: str, value: object) -> None:
    raw = msgpack.packb({**msgpack.unpackb(encode_record(RECORD)), name: value})
    try:
        record = decode_record(raw, **OF)
    except RemoteProtocolError as error:
        printable_line(error)
    else:
        assert name not in ("run", "configuration", "stages", "version") or getattr(RECORD, name, 1) == value
        assert decode_record(encode_record(record), **OF) == record


@given(st.dictionaries(st.text(max_size=8) | st.integers(-9, 9), anything, min_size=1, max_size=3))
def test_another_field_more_or_less_is_refused(more: dict[object, object]) -> None:
    values = msgpack.unpackb(encode_record(RECORD))
    for odd in ({**values, **more}, {key: value for key, value in values.items() if key != "generation"}):
        if odd.keys() != values.keys():
            with pytest.raises(RemoteProtocolError):
                decode_record(msgpack.packb(odd), **OF)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"run": "other"}, Fault.RUN_ID),
        ({"configuration": "f" * 64}, Fault.CONFIGURATION),
        ({"stages": 5}, Fault.STAGE),
        ({"stage": 4}, Fault.STAGE),
        ({"version": 10**6}, Fault.PROTOCOL_VERSION),
        ({"generation": True}, Fault.MALFORMED),
        ({"generation": 2.0}, Fault.MALFORMED),
        ({"tokens_per_s": 5}, Fault.MALFORMED),
        ({"tokens_per_s": float("nan")}, Fault.MALFORMED),
        ({"state": "dreaming"}, Fault.MALFORMED),
        ({"endpoint": "host:70000"}, Fault.MALFORMED),
        ({"endpoint": "x" * 2000 + ":1"}, Fault.OVERSIZED),
    ],
)
def test_strangers_are_counted_by_name(change: dict[str, object], fault: Fault) -> None:
    odd = msgpack.packb({**msgpack.unpackb(encode_record(RECORD)), **change})
    seen, left_out = read_records([(odd, 1.0), (encode_record(RECORD), 2.0), (b"\xc1", 0.0)], **OF)
    assert [each.record for each in seen] == [RECORD]
    assert left_out[fault] >= 1
    assert left_out.total() == 2


def test_nothing_is_told_that_nobody_would_take() -> None:
    for odd in ({"endpoint": "no port"}, {"generation": -1}, {"tokens_per_s": float("inf")}, {"run": "a b"}):
        with pytest.raises(LocalProtocolError):
            encode_record(replace(RECORD, **odd))


@given(st.text(string.printable, max_size=200))
def test_a_run_is_told_as_it_is(toml: str) -> None:
    run = RunRecord(run="demo", configuration=DIGEST, toml=toml)
    try:
        raw = encode_run(run)
    except LocalProtocolError:
        assert not toml.replace("\n", " ").replace("\t", " ").isprintable()
    else:
        assert decode_run(raw) == run


def test_a_configuration_has_a_bound() -> None:
    with pytest.raises(LocalProtocolError, match=f"at most {CONFIGURATION_BYTES_MAX}"):
        encode_run(RunRecord(run="demo", configuration=DIGEST, toml="x" * CONFIGURATION_BYTES_MAX))


@pytest.mark.parametrize("good", ["a:1", "192.0.2.1:65535", "[::1]:7001", "node-1.example.org:80"])
def test_endpoints(good: str) -> None:
    assert is_endpoint(good)
    for bad in (good + "0" * 6, f" {good}", good.rpartition(":")[0], "a:0", "a\n:1", "a/b:1", 7, None):
        assert not is_endpoint(bad)
    for bad in ("a..b:1", ".a:1", "a.:1", "x" * 64 + ":1"):  # names that resolvers do not take
        assert not is_endpoint(bad)


def test_questions_and_answers_are_told_as_they_are() -> None:
    ask = RendezvousRequest(reach="192.0.2.7:7001", incarnation=2**63)
    assert decode_request(encode_request(ask)) == ask
    told = RendezvousResponse(
        addresses=("/ip4/1.2.3.4/tcp/1/p2p/Qm",), run="demo", configuration=DIGEST, toml="[run]\n", incarnation=3
    )
    assert decode_response(encode_response(told)) == told
    for decode, most in ((decode_request, REQUEST_BYTES_MAX), (decode_response, TELL_BYTES_MAX)):
        with pytest.raises(RemoteProtocolError, match="oversized"):
            decode(b"\x80" * (most + 1))
    other = {**msgpack.unpackb(encode_request(ask)), "version": 99}
    with pytest.raises(RemoteProtocolError, match="protocol version 99 there"):
        decode_request(msgpack.packb(other))


# -- claims ---------------------------------------------------------------------------------------------------------


def seen(age_s: float = 1.0, **change: object) -> Seen:
    return Seen(record=replace(RECORD, **change), age_s=age_s)


@given(records, records)
def test_of_two_claims_one_is_better(a: NodeRecord, b: NodeRecord) -> None:
    if (a.state is NodeState.CLAIMING, a.generation, a.claimed_at_s, a.incarnation) != (
        b.state is NodeState.CLAIMING,
        b.generation,
        b.claimed_at_s,
        b.incarnation,
    ):
        assert better(a, b) != better(b, a)


@given(st.lists(st.builds(Seen, record=records, age_s=st.floats(0, 400)), max_size=12), st.integers(0, 100))
def test_only_a_stage_without_a_node_is_chosen(found: list[Seen], drawn: int) -> None:
    places = grid(4, 1)
    chosen = choose(found, places, lambda count: drawn % count)
    served = {each.record.place for each in found if each.living}
    if chosen is None:
        assert served == set(places)
    else:
        assert chosen not in served
        never = {place for place in places if all(each.record.place != place for each in found)}
        ages = {place: min((e.age_s for e in found if e.record.place == place), default=1e9) for place in places}
        assert chosen in never if never else ages[chosen] == max(ages[place] for place in places if place not in served)


grid_records = st.builds(replace, records, lane=st.integers(0, 2), lanes=st.just(3))


@given(st.lists(st.builds(Seen, record=grid_records, age_s=st.floats(0, 400)), max_size=16), st.integers(0, 100))
def test_a_lane_is_filled_before_the_next_one(found: list[Seen], drawn: int) -> None:
    places = grid(4, 3)
    chosen = choose(found, places, lambda count: drawn % count)
    served = {each.record.place for each in found if each.living}
    in_part = {place.lane for place in served if any(GridPlace(stage, place.lane) not in served for stage in range(4))}
    if chosen is None:
        assert served == set(places)
    elif in_part:
        assert chosen not in served
        assert chosen.lane in in_part
    else:
        assert chosen.lane == min(place.lane for place in places if place not in served)


def test_of_lanes_that_lack_a_stage_who_is_lost_longest_comes_first() -> None:
    kept = [seen(stage=0, incarnation=1, lanes=2), seen(stage=0, lane=1, incarnation=2, lanes=2)]
    lost = [seen(100, stage=1, incarnation=3, lanes=2), seen(200, stage=1, lane=1, incarnation=4, lanes=2)]
    both = grid(2, 2)
    assert neediest([*kept, *lost], both) == [GridPlace(1, 1)]
    assert neediest(kept, both) == [GridPlace(1, 0), GridPlace(1, 1)]
    assert neediest([], both) == [GridPlace(0, 0), GridPlace(1, 0)]
    assert neediest(kept[1:], both) == [GridPlace(1, 1)]
    assert neediest(kept[1:], [GridPlace(0, 0), GridPlace(1, 0)]) == [
        GridPlace(0, 0),
        GridPlace(1, 0),
    ]  # what it may serve


def test_who_is_lost_longest_needs_a_node_most() -> None:
    lost = [seen(100, stage=0, incarnation=1), seen(200, stage=1, incarnation=2), seen(stage=2, incarnation=3)]
    places = grid(4, 1)
    assert neediest([*lost, seen(stage=3, incarnation=4)], places) == [GridPlace(1)]
    assert neediest(lost, places) == [GridPlace(3)]  # never served
    assert neediest([], places) == places
    assert neediest(lost, [GridPlace(0), GridPlace(2)]) == [GridPlace(0)]  # what a certificate is for
    assert of_place(lost, GridPlace(1)) == []
    assert neediest([seen(stage=stage, incarnation=stage) for stage in range(4)], places) == []


@pytest.mark.parametrize(
    ("stages", "speeds", "own", "expected"),
    [
        ([0, 1, 2, 3], (1.0, 1.0, 0.5, 0.25), 1.0, [0, 1]),
        ([0, 1, 2, 3], (1.0, 1.0, 0.5, 0.25), 0.6, [2]),
        ([0, 1, 2, 3], (1.0, 1.0, 0.5, 0.25), 0.95, [0, 1]),  # as good as 1
        ([0, 1, 2, 3], (1.0, 1.0, 0.5, 0.25), 0.1, [3]),  # too slow for any: where it holds the others up least
        ([0, 1, 2], (1.0, 1.0, 0.5, 0.25), 9.0, [0, 1]),
        ([2, 3], (1.0, 1.0, 0.5, 0.25), 1.0, [2]),
        ([0, 3], (), 1.0, [0, 3]),
        ([0, 3], (1.0, 1.0, 0.5, 0.25), None, [0, 3]),
        ([], (1.0, 1.0), 1.0, []),
    ],
)
def test_a_machine_prefers_a_stage_cut_for_its_speed(
    stages: list[int], speeds: tuple[float, ...], own: float | None, expected: list[int]
) -> None:
    assert fitting([*map(GridPlace, stages)], speeds, own) == [*map(GridPlace, expected)]


def test_need_comes_before_speed() -> None:
    """A stage that was served and lost waits for whoever comes; those never served come first, and among them the
    machine has a choice."""
    prefer = functools.partial(fitting, speeds=(1.0, 0.5, 0.25), own=0.5)
    assert choose([], grid(3, 1), lambda count: count - 1, prefer) == GridPlace(1)
    others = [seen(stage=stage, incarnation=stage) for stage in (0, 1)]
    assert choose(others, grid(3, 1), lambda count: count - 1, prefer) == GridPlace(2)
    assert choose([*others, seen(stage=2, incarnation=2)], grid(3, 1), lambda count: count - 1, prefer) is None


def test_who_has_settled_is_not_overtaken_by_an_earlier_clock() -> None:
    settled = replace(RECORD, state=NodeState.STARTING, generation=0, claimed_at_s=100.0)
    late = replace(RECORD, state=NodeState.CLAIMING, generation=0, claimed_at_s=50.0, incarnation=8)
    assert rival([Seen(record=settled, age_s=0)], late) == settled
    assert rival([Seen(record=late, age_s=0)], settled) is None
    later_generation = replace(RECORD, claimed_at_s=900.0, generation=3, incarnation=9)
    assert better(later_generation, RECORD)  # whose process was replaced


def test_a_run_has_begun_when_anybody_has_trained_or_waited_in_that_place() -> None:
    fresh = {"generation": 0, "completed_steps": 0, "committed_steps": 0}
    assert not has_started([], GridPlace(1))
    assert not has_started(
        [seen(state=NodeState.CLAIMING, **fresh), seen(state=NodeState.STARTING, **fresh)], GridPlace(1)
    )
    assert not has_started([seen(state=NodeState.WAITING, **fresh)], GridPlace(0))
    assert has_started([seen(state=NodeState.WAITING, **fresh)], GridPlace(1))
    assert has_started([seen(state=NodeState.TRAINING, **fresh)], GridPlace(0))
    assert has_started([seen(500, state=NodeState.WAITING)], GridPlace(0))
    assert not has_started([seen(state=NodeState.TRAINING, lanes=2)], GridPlace(1, 1))  # another lane has


def test_a_run_is_through_when_somebody_left_after_the_last_step() -> None:
    assert finished_lanes([seen(state=NodeState.LEFT, completed_steps=40)], 40) == {0}
    assert finished_lanes([seen(state=NodeState.LEFT, completed_steps=40, lane=1, lanes=2)], 40) == {1}
    assert not finished_lanes([seen(state=NodeState.LEFT, completed_steps=39)], 40)
    assert not finished_lanes([seen(state=NodeState.WAITING, completed_steps=40)], 40)
    assert not seen(state=NodeState.LEFT).living


def test_larger_swarms_renew_less_often() -> None:
    assert renew_every_s(4) == 5.0
    assert renew_every_s(64) == 20.0
    assert not seen(stale_after_s(4)).living
    assert seen(stale_after_s(4), stages=64).living
    assert seen(stale_after_s(4), stages=16, lanes=4).living
    assert seen(stale_after_s(4) - 0.1).living


@given(st.integers(2, 6), st.integers(0, 2**32))
def test_of_many_who_claim_each_stage_is_held_by_one(count: int, seed: int) -> None:
    """Any interleaving in which writing and reading take less than the settle time; clocks up to 3 s apart."""
    draw = random.Random(seed)
    offset_s = [draw.uniform(-3, 3) for _ in range(count)]
    table: dict[int, NodeRecord] = {}
    # (time, node, what): each claims at a moment, its words take a while to arrive, as does what it reads.
    events: list[tuple[float, int, str]] = [(draw.uniform(0, 2 * CLAIM_WAIT_S), node, "claim") for node in range(count)]
    held: dict[int, int] = {}
    while events:
        events.sort()
        now, node, what = events.pop(0)
        delay_s = draw.uniform(0, CLAIM_WAIT_S / 4)
        mine = replace(RECORD, incarnation=node, generation=0, stage=0)
        if what == "claim":
            record = replace(mine, state=NodeState.CLAIMING, claimed_at_s=100 + now + offset_s[node])
            events += [
                (now + delay_s, node, f"arrives {record.claimed_at_s}"),
                (now + delay_s + CLAIM_WAIT_S, node, "look"),
            ]
        elif what.startswith("arrives"):
            table[node] = replace(mine, state=NodeState.CLAIMING, claimed_at_s=float(what.split()[1]))
        elif what == "look":
            others = [Seen(record=record, age_s=0) for other, record in table.items() if other != node]
            if rival(others, table[node]):
                table[node] = replace(table[node], state=NodeState.LEFT)
            else:
                held[node] = 0
                events.append((now + delay_s, node, "settles"))
        else:
            table[node] = replace(table[node], state=NodeState.STARTING)
    assert len(held) == 1
