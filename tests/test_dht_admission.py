"""What the DHT's process keeps and hands on, by itself, and beside a member of the DHT that lies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinpipe.node.discovery.dht_admission import (
    ASKED_KEPT,
    ASKED_MAX,
    ASKED_S,
    OWNER,
    Asked,
    StoredRecords,
    acceptable,
)
from thinpipe.sim.launch.node_launch import node_environment

from .real_node import until

OWN = b"[owner:ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB" + b"A" * 348 + b"]"


def test_only_records_of_our_form_are_kept() -> None:
    subkey, value = msgpack.packb(OWN), msgpack.packb(b"x")
    assert OWNER.fullmatch(OWN)
    assert acceptable(subkey, value, 1100.0, 1000.0)
    for odd_subkey in (
        b"",
        msgpack.packb(None),
        msgpack.packb("text"),
        msgpack.packb(b"me"),
        msgpack.packb(OWN + b"x"),
        msgpack.packb(OWN.replace(b"AQAB", b"AAAA")),  # another exponent
        b"\xc1",
    ):
        assert not acceptable(odd_subkey, value, 1100.0, 1000.0)
    for odd in (b"", b"\xc1", msgpack.packb("text"), msgpack.packb({}), value + b"more", msgpack.packb(b"x" * 70_000)):
        assert not acceptable(subkey, odd, 1100.0, 1000.0)
    for until_s in (float("inf"), float("nan"), 1e6):
        assert not acceptable(subkey, value, until_s, 1000.0)


def test_a_flood_keeps_out_who_comes_and_nobody_who_is_in() -> None:
    held = StoredRecords(records_max=3, bytes_max=100)
    for name in (b"a", b"b", b"c"):
        assert held.take((b"key", name), 50.0, 10, 0.0)
    assert not held.take((b"key", b"d"), 50.0, 10, 1.0)
    assert held.take((b"key", b"a"), 60.0, 20, 1.0)
    assert not held.take((b"key", b"a"), 61.0, 90, 1.0)
    assert held.take((b"key", b"d"), 90.0, 10, 51.0)  # b and c are over


def test_a_shorter_record_that_expires_earlier_makes_no_room() -> None:
    held = StoredRecords(records_max=9, bytes_max=100)
    assert held.take((b"key", b"a"), 50.0, 90, 0.0)
    assert held.take((b"key", b"a"), 40.0, 1, 0.0)  # hivemind keeps the other one
    assert not held.take((b"key", b"b"), 50.0, 20, 0.0)
    assert held.take((b"key", b"a"), 60.0, 1, 0.0)
    assert held.take((b"key", b"b"), 50.0, 20, 0.0)


def test_one_key_does_not_fill_the_shelf() -> None:
    held = StoredRecords(records_max=9, bytes_max=100, key_bytes_max=50)
    assert held.take((b"one", b"a"), 50.0, 40, 0.0)
    assert not held.take((b"one", b"b"), 50.0, 20, 0.0)
    assert held.take((b"two", b"a"), 50.0, 50, 0.0)
    assert not held.take((b"two", b"a"), 51.0, 51, 0.0)
    assert held.take((b"one", b"b"), 90.0, 20, 51.0)  # the first is over


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"k", b"l"]), st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 60), st.floats(0, 9)
        ),
        max_size=60,
    )
)
def test_the_shelf_keeps_its_books(takes: list[tuple[bytes, bytes, int, float]]) -> None:
    """Against what hivemind keeps: of each place the record that expires last, until it does."""
    held, kept = (
        StoredRecords(records_max=4, bytes_max=100, key_bytes_max=70),
        dict[tuple[bytes, bytes], tuple[float, int]](),
    )
    for number, (key, name, nbytes, lasts_s) in enumerate(takes):
        now_s = float(number)
        kept = {place: each for place, each in kept.items() if each[0] >= now_s}
        if held.take((key, name), now_s + lasts_s, nbytes, now_s):
            kept[key, name] = max(kept.get((key, name), (0.0, 0)), (now_s + lasts_s, nbytes), key=lambda each: each[0])
        assert sum(size for _, size in kept.values()) <= 100
        assert all(sum(size for (of, _), (_, size) in kept.items() if of == k) <= 70 for k in (b"k", b"l"))
        assert len(kept) <= 4


def test_a_peer_is_asked_a_few_times_under_whatever_names() -> None:
    asked = Asked()
    assert [asked.may("liar", ["key"], 0.1 * number) for number in range(20)] == [True] * ASKED_MAX + [False] * 4
    assert asked.may("another", ["key"], 2.0)
    assert asked.may("liar", ["other key"], 2.0)
    assert not asked.may("liar", ["other key", "key"], 2.0)
    assert asked.may("liar", ["key"], ASKED_S + 0.01)
    for number in range(3 * ASKED_KEPT):
        asked.may(number, ["key"], 3.0)
    assert len(asked._asked) <= ASKED_KEPT


# -- hivemind, for real ----------------------------------------------------------------------------------------------

# Takes and tells whatever it is told, beside records of its own that nobody signed, as fresh as it likes to say, in a
# dictionary that cannot be merged with another; and it knows somebody nearer, who is itself.
LIAR = """
import sys, time, hivemind
from hivemind.dht.protocol import DHTProtocol
from hivemind.proto import dht_pb2
find = DHTProtocol.rpc_find
async def rpc_find(self, request: dht_pb2.FindRequest, context: hivemind.p2p.P2PContext) -> dht_pb2.FindResponse:
    response = await find(self, request, context)
    for result in response.results:
        result.expiration_time = 1e18
        if result.type == dht_pb2.FOUND_DICTIONARY:
            value = self.serializer.loads(result.value)
            value.maxsize = value.latest_expiration_time = "x"
            with value.freeze():
                result.value = self.serializer.dumps(value)
        del result.nearest_node_ids[:], result.nearest_peer_ids[:]
        for _ in range(9):
            result.nearest_node_ids.append(hivemind.dht.routing.DHTID.generate().to_bytes())
            result.nearest_peer_ids.append(self.p2p.peer_id.to_bytes())
    return response
DHTProtocol.rpc_find = rpc_find
dht = hivemind.DHT(start=True, record_validators=[], nat_port_map=False, auto_nat=False, use_relay=False)
for number in range(5):
    assert dht.store("key", b"forged", time.time() + 100, subkey=b"nobody %d" % number)
print(dht.get_visible_maddrs()[0], flush=True)
time.sleep(300)
"""

OWNER_OF_ONE = """
import sys, time
from thinpipe.node.discovery.dht import start_dht
dht, place = start_dht(sys.argv[1:], ["/ip4/127.0.0.1/tcp/0"], None, False)
print(dht.store("key", b"signed", time.time() + 100, subkey=place))
dht.shutdown()
"""

READER = """
import json, sys, time
from thinpipe.node.discovery import dht as process
from thinpipe.node.discovery.dht_admission import StoredRecords, validator
process.validator = lambda: validator(StoredRecords(records_max=0))  # it has no room left for anything
dht, place = process.start_dht(sys.argv[1:], ["/ip4/127.0.0.1/tcp/0"], None, False)
dht.store("key", b"unsigned", time.time() + 50, subkey=b"x")  # not even here
began = time.monotonic()
found = dht.get("key", latest=True)
seconds = time.monotonic() - began
values = None if found is None else [each.value.decode() for each in found.value.values()]
print(json.dumps({"values": values, "ahead_s": found and found.expiration_time - time.time(),
                  "seconds": seconds}))
dht.shutdown()
"""


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[str]:
    """Its multiaddr."""
    log = tmp_path / "liar.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", LIAR], stdout=out, stderr=out, env=node_environment())
    try:
        until(lambda: "/p2p/" in log.read_text() or process.poll() is not None, "the liar to be there")
        assert process.poll() is None, log.read_text()
        yield next(line for line in log.read_text().splitlines() if line.startswith("/ip"))
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in family:
            each.kill()
        process.wait(10)


def of(script: str, address: str) -> str:
    """The last line that the script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, address],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=node_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_reader_hears_what_is_signed_beside_forgeries_and_with_a_full_shelf(liar: str) -> None:
    assert of(OWNER_OF_ONE, liar) == "True"
    found = json.loads(of(READER, liar))
    assert found["values"] == ["signed"]
    assert 0 < found["ahead_s"] <= 100  # and not as the liar says
    assert found["seconds"] < 5
