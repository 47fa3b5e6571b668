"""Joining, without a DHT: claims on a clock of their own, configurations that travel, and a real door on loopback."""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc.aio
import msgpack
import pytest
from rich.console import Console
from thinpipe.cli import app
from thinpipe.node.addresses import ListenError, host_of
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.config_file import dump_config, load_config, merge, parse_config
from thinpipe.node.discovery import claiming, entry_points, joining
from thinpipe.node.discovery.bootstrap import _keep, how_to_join
from thinpipe.node.discovery.claiming import ConnectProbe, Environment, RunFinished, StageTaken, take_place
from thinpipe.node.discovery.client import WORDS_BYTES_MAX, Discovery, DiscoveryError
from thinpipe.node.discovery.dht import Service, _answer
from thinpipe.node.discovery.entry_points import EntryPoints, ask_all_rendezvous, place
from thinpipe.node.discovery.joining import Member
from thinpipe.node.discovery.membership import RETURN_EVERY_S, Membership, Throughput
from thinpipe.node.discovery.multiaddr import Multiaddr, seen_from
from thinpipe.node.discovery.rendezvous import (
    SWARM_METHOD,
    RendezvousAnswer,
    RendezvousError,
    ask_rendezvous,
    rendezvous_handler,
)
from thinpipe.node.discovery.shared_config import agreed, shareable, verified
from thinpipe.node.discovery.status import as_figures, status_table
from thinpipe.node.links.transport import serving
from thinpipe.node.node_options import Addresses, NodeOptions
from thinpipe.node.node_process import NodeError, run_node
from thinpipe.node.probing.reach import reachable
from thinpipe.node.security.key_directory import KeysError, clock, init, issue, load
from thinpipe.node.security.policy import PLAIN, Security
from thinpipe.protocol.grid_place import GridPlace, grid
from thinpipe.protocol.messages import Limits, Refusal, decode_frame
from thinpipe.protocol.node_record import NodeRecord, NodeState, RunRecord, Seen, encode_run
from thinpipe.protocol.rendezvous_messages import RendezvousRequest, RendezvousResponse, encode_request
from thinpipe.sim.launch.node_launch import node_environment
from typer.testing import CliRunner

from .real_node import free_address
from .test_node_record import RECORD

# -- claiming --------------------------------------------------------------------------------------------------------


class Table:
    """The DHT of a test: who wrote what when, on a clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.written: dict[int, tuple[NodeRecord, float]] = {}
        self.said: list[str] = []
        self.connect_probes: dict[str, ConnectProbe] = {}
        self.later: list[tuple[float, Callable[[], None]]] = []

    def write(self, record: NodeRecord, age_s: float = 0.0) -> None:
        self.written[record.incarnation] = (record, self.now_s - age_s)

    def environment(self) -> Environment:
        return Environment(
            read=lambda: [Seen(record=record, age_s=self.now_s - when) for record, when in self.written.values()],
            publish=self.write,
            say=self.said.append,
            connect_probe=lambda endpoint: self.connect_probes.get(endpoint, ConnectProbe.ANSWERED),
            now=lambda: self.now_s,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        assert self.now_s < 2000, "it would wait for ever"
        self.now_s += seconds
        for due in [each for each in self.later if each[0] <= self.now_s]:
            self.later.remove(due)
            due[1]()


FRESH = replace(RECORD, generation=0, completed_steps=0, committed_steps=0, tokens_per_s=0.0, stages=2)
MINE = replace(FRESH, incarnation=99, endpoint="192.0.2.99:1", state=NodeState.CLAIMING)


def other(stage: int, **change: Any) -> NodeRecord:
    return replace(FRESH, **{"stage": stage, "incarnation": stage, "endpoint": f"192.0.2.{stage}:1", **change})


def test_who_is_alone_takes_a_stage_of_a_run_that_has_not_begun() -> None:
    table = Table()
    held, has_started = take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))
    assert held.state is NodeState.STARTING
    assert not has_started
    assert table.written[99][0] == held


def test_the_stage_whose_port_refuses_is_taken_at_once() -> None:
    table = Table()
    table.write(other(0))
    table.write(other(1, completed_steps=3))
    table.connect_probes["192.0.2.1:1"] = ConnectProbe.REFUSED
    held, has_started = take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))
    assert (held.stage, has_started) == (1, True)
    assert table.now_s < 1005


def test_a_spare_waits_until_a_record_goes_stale() -> None:
    table = Table()
    table.write(other(0))
    table.write(other(1), age_s=5)
    table.connect_probes["192.0.2.1:1"] = ConnectProbe.SILENCE  # a machine that is off
    for again_s in range(1005, 1100, 5):
        table.later.append((again_s, lambda: table.write(other(0))))
    held, has_started = take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))
    assert (held.stage, has_started) == (1, True)
    assert len(table.said) == 1
    assert "all 2 stages are served; waits as a spare" in table.said[0]
    assert 1014 < table.now_s < 1022


def test_a_grid_is_filled_lane_after_lane() -> None:
    table, taken, begun = Table(), list[GridPlace](), list[bool]()
    for incarnation in range(4):
        mine = replace(MINE, incarnation=incarnation, endpoint=f"192.0.2.{incarnation}:1", lanes=2)
        held, has_started = take_place(table.environment(), mine, None, steps=9, among=grid(2, 2))
        taken.append(held.place)
        begun.append(has_started)
        if held.lane == 0:
            table.write(replace(held, state=NodeState.TRAINING, completed_steps=1))
    assert {each.lane for each in taken[:2]} == {0}
    assert begun == [False, True, False, False]  # what lane 0 has done is nothing to lane 1
    assert sorted(taken) == sorted(grid(2, 2))
    table.write(replace(table.written[3][0], state=NodeState.TRAINING))
    with pytest.raises(StageTaken, match=r"of lane 1 is served by process 3 at .* \(training, 0 s ago\); stop"):
        take_place(table.environment(), replace(MINE, lanes=2), taken[3], steps=9, among=grid(2, 2))
    assert table.said == []


def test_a_lost_node_of_a_lane_is_replaced_there_and_its_lane_has_begun() -> None:
    table = Table()
    for number, at in enumerate(grid(2, 2)):
        table.write(other(at.stage, lane=at.lane, lanes=2, incarnation=number, endpoint=f"192.0.2.{number}:1"))
    table.connect_probes["192.0.2.2:1"] = ConnectProbe.REFUSED
    held, has_started = take_place(table.environment(), replace(MINE, lanes=2), None, steps=9, among=grid(2, 2))
    assert (held.place, has_started) == (GridPlace(0, 1), True)


def test_a_lane_that_is_through_needs_nobody_and_others_may() -> None:
    table = Table()
    table.write(other(0, lanes=2, state=NodeState.LEFT, completed_steps=9))
    mine = replace(MINE, lanes=2)
    with pytest.raises(RunFinished, match="all 9 steps are done in lane 0, so no stage needs a node"):
        take_place(table.environment(), mine, GridPlace(1, 0), steps=9, among=grid(2, 2))
    held, _ = take_place(table.environment(), mine, None, steps=9, among=grid(2, 2))
    assert held.lane == 1
    table.write(other(0, lane=1, lanes=2, incarnation=5, state=NodeState.LEFT, completed_steps=9))
    with pytest.raises(RunFinished, match="all 9 steps are done, so"):
        take_place(table.environment(), replace(mine, incarnation=6), None, steps=9, among=grid(2, 2))


def test_a_spare_outlives_a_dht_that_does_not_answer() -> None:
    table = Table()
    table.write(other(0))
    reads = 0

    def read() -> list[Seen]:
        nonlocal reads
        reads += 1
        if reads in (2, 3, 5):  # the last, after a claim
            raise DiscoveryError("the DHT did not answer within 15 s")
        table.write(other(0))
        return [] if reads > 3 else [Seen(record=other(0), age_s=1.0)]

    environment = replace(table.environment(), read=read)
    held, _ = take_place(environment, MINE, None, steps=9, among=[GridPlace(0)])
    assert held.stage == 0
    assert [line.startswith("warning: the DHT did not answer within 15 s") for line in table.said] == [
        False,
        True,
        True,
    ]


def test_who_waits_enters_the_dht_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    class Fresh:
        alive = True

        def ready(self) -> Fresh:
            return self

        def read(self, *_: Any) -> tuple[list[Seen], Counter[str]]:
            return [], Counter()

    def begin(peers: list[str], **_: Any) -> Fresh:
        asked.append(tuple(peers))
        return Fresh()

    monkeypatch.setattr(Discovery, "begin", begin)
    known, told = "/ip4/192.0.2.7/tcp/7002", "/ip4/192.0.2.8/tcp/2/p2p/QmAbcdefghijklmnopqrstu"
    member = Member(ended_discovery(), (told,), PLAIN)
    assert member.read(RUN, 2) == member.read(RUN, 2) == []
    assert asked == [(known, told)]


def test_a_dht_that_is_late_is_said_in_words() -> None:
    class Late:
        def get(self, *_: Any, **__: Any) -> Late:
            return self

        def result(self, timeout: float) -> None:
            del timeout
            raise TimeoutError

    answer = _answer(Service(Late(), b""), {"ask": "read", "key": "k", "kept_s": 1.0})
    assert answer["error"].startswith("the DHT did not answer within 15 s; ")


def test_a_spare_ends_with_the_run() -> None:
    table = Table()
    table.write(other(0))
    table.write(other(1))
    table.later.append((1004, lambda: table.write(other(1, state=NodeState.LEFT, completed_steps=9))))
    with pytest.raises(RunFinished, match="all 9 steps are done"):
        take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))


def test_the_loser_of_a_race_takes_another_stage() -> None:
    table = Table()
    rival_of = replace(MINE, incarnation=5, claimed_at_s=1.0, endpoint="192.0.2.5:1")

    def claim_the_same() -> None:
        table.write(replace(rival_of, stage=table.written[99][0].stage))

    table.later.append((1001, claim_the_same))
    held, _ = take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))
    assert {held.stage, table.written[5][0].stage} == {0, 1}
    assert "whose claim takes precedence; looks for another one" in table.said[0]


def test_an_explicit_stage_that_is_served_is_refused() -> None:
    table = Table()
    table.write(other(1))
    with pytest.raises(
        StageTaken, match=r"stage 1 is served by process 1 at 192\.0\.2\.1:1 \(training, 0 s ago\); stop"
    ):
        take_place(table.environment(), MINE, GridPlace(1), steps=9, among=grid(2, 1))
    assert 99 not in table.written


def test_an_explicit_stage_whose_machine_is_off_is_waited_for() -> None:
    table = Table()
    table.write(other(1))
    table.connect_probes["192.0.2.1:1"] = ConnectProbe.SILENCE
    held, has_started = take_place(table.environment(), MINE, GridPlace(1), steps=9, among=grid(2, 1))
    assert (held.stage, has_started) == (1, True)
    assert "waiting until its record goes stale" in table.said[0]
    table = Table()
    table.connect_probes["192.0.2.1:1"] = ConnectProbe.SILENCE
    table.write(other(1))
    table.later.append((1006, lambda: table.write(other(1))))  # behind a firewall, and alive
    with pytest.raises(StageTaken, match="stage 1 is served"):
        take_place(table.environment(), MINE, GridPlace(1), steps=9, among=grid(2, 1))


def test_of_two_for_one_explicit_stage_one_is_refused() -> None:
    table = Table()
    table.later.append((1001, lambda: table.write(replace(MINE, incarnation=5, claimed_at_s=1.0, stage=1))))
    with pytest.raises(StageTaken, match="stage 1 goes to the node at"):
        take_place(table.environment(), MINE, GridPlace(1), steps=9, among=grid(2, 1))
    assert table.written[99][0].state is NodeState.LEFT


def test_a_node_that_lost_only_the_dht_keeps_its_stage() -> None:
    table = Table()
    table.write(other(0), age_s=50)
    table.write(other(1), age_s=30)
    with pytest.raises(StageTaken, match="stage 1 is served by process 1"):
        take_place(table.environment(), MINE, GridPlace(1), steps=9, among=grid(2, 1))
    table.later.append((1010, lambda: table.connect_probes.update({"192.0.2.1:1": ConnectProbe.REFUSED})))
    held, has_started = take_place(table.environment(), MINE, None, steps=9, among=grid(2, 1))
    assert (held.stage, has_started) == (1, True)
    assert 1010 <= table.now_s < 1015
    table.connect_probes.clear()
    for stage in (
        None,
        GridPlace(1),
    ):  # a map of ports may answer for the node that is to be replaced, and that is this one
        again = replace(MINE, incarnation=98, endpoint="192.0.2.1:1")
        del table.written[99 if stage is None else 98]
        held, _ = take_place(table.environment(), again, stage, steps=9, among=[GridPlace(1)])
        assert held.stage == 1


def test_two_lost_nodes_may_come_back_in_each_others_places() -> None:
    table = Table()
    table.write(other(0), age_s=50)
    table.write(other(1), age_s=50)
    table.write(other(1, incarnation=7, endpoint="192.0.2.0:1"))
    held, _ = take_place(table.environment(), replace(MINE, endpoint="192.0.2.1:1"), None, steps=9, among=grid(2, 1))
    assert held.stage == 0
    assert table.now_s < 1005


def test_silent_strangers_do_not_hold_up_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "CONNECT_PROBES_S", 0.05)
    table, gate, asked = Table(), threading.Event(), list[str]()
    table.write(other(1))
    for number in range(100, 400):
        table.write(other(0, incarnation=number, endpoint=f"192.0.2.7:{number}"))

    def connect_probe(endpoint: str) -> ConnectProbe:
        asked.append(endpoint)
        if endpoint == "192.0.2.1:1":
            return ConnectProbe.REFUSED
        gate.wait(10)
        return ConnectProbe.SILENCE

    try:
        environment = replace(table.environment(), connect_probe=connect_probe)
        held, _ = take_place(environment, MINE, GridPlace(1), steps=9, among=grid(2, 1))
        assert held.stage == 1
        assert set(asked) == {"192.0.2.1:1"}
        began_s = time.monotonic()
        living = environment.without_dead(environment.others(MINE), grid(2, 1))
        assert time.monotonic() - began_s < 5
        assert sum(each.living for each in living) >= 300
    finally:
        gate.set()


@contextmanager
def taking(then: Callable[[socket.socket], object]) -> Iterator[str]:
    """A listener that does that with each connection, and keeps it open unless it closes it."""
    kept: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                then(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in kept:
        connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_port_map_before_nobody_is_nobody(tmp_path: Path) -> None:
    """A process that hangs has its connections taken by the kernel, and is not dead; nor is one that speaks TLS."""
    with taking(lambda _: None) as hung, taking(socket.socket.close) as mapped, taking(reset) as torn:
        found = [claiming.connect_probe(endpoint) for endpoint in (hung, mapped, torn, free_address())]
    assert found == [ConnectProbe.ANSWERED, ConnectProbe.REFUSED, ConnectProbe.REFUSED, ConnectProbe.REFUSED]
    now = clock()
    init("demo", tmp_path / "authority", days=9, now=now)
    issue([0], tmp_path / "authority", tmp_path / "node", days=9, now=now)
    keys = Security(load(tmp_path / "node", now=now))

    async def real(security: Security) -> ConnectProbe:
        async with serving("127.0.0.1:0", {}, security) as port:
            return await asyncio.to_thread(claiming.connect_probe, f"127.0.0.1:{port}")

    assert [asyncio.run(real(each)) for each in (PLAIN, keys)] == [ConnectProbe.ANSWERED] * 2


# -- configurations that travel -------------------------------------------------------------------------------------


def config(**settings: Any) -> RunConfig:
    return parse_config(merge({}, {key.replace("__", "."): value for key, value in settings.items()}))


def test_a_run_that_was_given_more_steps_keeps_its_room(tmp_path: Path) -> None:
    """The checkpoints in it are taken too; those of a run that computes something else stay alone."""
    before, longer, other = config(run__steps=40), config(run__steps=60, run__extended=[[40, 40]]), config(run__seed=7)
    assert joining._room(tmp_path, before) == tmp_path
    assert joining._room(tmp_path, longer) == tmp_path
    assert load_config(tmp_path / "run.toml") == longer
    with pytest.raises(ConfigError, match=r"is of another run .*; choose another --out"):
        joining._room(tmp_path, other)
    assert load_config(tmp_path / "run.toml") == longer


def test_a_configuration_arrives_as_it_left_less_its_places() -> None:
    places = {"data__cache": "/here", "checkpoint__directory": "/there"}
    mine = config(run__name="demo", **places, optim__clip=0.5, watch__prometheus="0.0.0.0:9400")
    record = shareable(mine)
    arrived = verified(record, "a:1")
    assert arrived.digest() == mine.digest() == record.configuration
    assert arrived.data.cache is None
    assert arrived.watch.prometheus == ""  # who may look on, whoever tells of the run does not decide
    loud = replace(shareable(mine), toml=dump_config(mine))
    assert verified(loud, "a:1").watch.prometheus == ""
    assert arrived.checkpoint.directory is None
    evil = replace(record, toml=record.toml + "\n[checkpoint2]\nx=1\n")
    with pytest.raises(ConfigError, match="from a:1: unknown section"):
        verified(evil, "a:1")
    placed = dump_config(mine)
    assert "/there" in placed
    assert verified(replace(record, toml=placed), "a:1").checkpoint.directory is None


def test_a_configuration_that_is_not_what_its_fingerprint_says_is_refused() -> None:
    record = shareable(config(run__name="demo"))
    changed = replace(record, toml=shareable(config(run__name="demo", run__steps=7)).toml)
    with pytest.raises(
        ConfigError, match=rf"fingerprint {record.configuration[:12]}, but .* has [0-9a-f]{{12}}: another"
    ):
        verified(changed, "a:1")
    for odd in ("[[[[", "x = " + "[" * 20000):
        with pytest.raises(ConfigError, match="is not TOML"):
            verified(replace(record, toml=odd), "a:1")
    with pytest.raises(ConfigError, match="cannot be the name of a directory"):
        verified(shareable(config(run__name="..")), "a:1")


def test_a_file_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    record = shareable(config(optim__clip=0.5))
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config(optim__clip=2.0, link__link="80mbit,5ms")))
    with pytest.raises(ConfigError) as error:
        agreed(record, "a:1", path, {})
    assert f"has {record.configuration[:12]}: optim.clip is 2.0 here and 0.5 there; give" in str(error.value)
    path.write_text(dump_config(config(optim__clip=0.5, link__link="80mbit,5ms", data__cache="/here")))
    mine, same = agreed(record, "a:1", path, {"compute.device": "cpu"})
    assert same == record
    assert (str(mine.data.cache), mine.link.link) == ("/here", "80mbit,5ms")


def test_only_what_is_local_may_be_overridden() -> None:
    record = shareable(config())
    mine, _ = agreed(record, "a:1", None, {"link.link": "80mbit,5ms", "data.source": "text.txt", "checkpoint.every": 7})
    assert (mine.link.link, mine.data.source, mine.checkpoint.every) == ("80mbit,5ms", "text.txt", 7)
    with pytest.raises(ConfigError, match=r"run\.steps changes what the run computes: its fingerprint would be"):
        agreed(record, "a:1", None, {"run.steps": 7, "link.link": "80mbit,5ms"})
    with pytest.raises(ConfigError, match="no node at a:1 knows of a run; give its --config"):
        agreed(None, "a:1", None, {})


class QuietDiscovery:
    """A DHT that holds nothing, and what was told there."""

    alive = True

    def __init__(self) -> None:
        self.published: list[NodeRecord] = []
        self.closed = False
        self.told: list[RunRecord] = []

    def ready(self) -> QuietDiscovery:
        return self

    def close(self) -> None:
        self.closed = True

    def read(self, *_: Any) -> tuple[list[Seen], Counter[str]]:
        return [], Counter()

    def runs(self) -> tuple[list[RunRecord], Counter[str]]:
        return self.told, Counter()

    def publish(self, record: NodeRecord, **_: Any) -> bool:
        self.published.append(record)
        return True


def swarm_of(settings: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, QuietDiscovery]:
    """A rendezvous that tells of this run, and the DHT behind it, where nobody is yet."""
    record, discovery = shareable(settings), QuietDiscovery()
    rendezvous = RendezvousAnswer(
        address="127.0.0.1:1",
        host="127.0.0.1",
        response=RendezvousResponse(addresses=(), run=record.run, configuration=record.configuration, toml=record.toml),
    )
    monkeypatch.setattr(joining, "ask_all_rendezvous", lambda *_, **__: EntryPoints(rendezvous=(rendezvous,), peers=()))
    monkeypatch.setattr(joining.Discovery, "begin", lambda *_, **__: discovery)
    return rendezvous.address, discovery


@pytest.mark.parametrize(("speed", "fit"), [("1", {0, 1}), ("0.5", {2}), ("0.45", {3}), ("0.1", {3})])
def test_who_joins_says_its_speed_and_gets_a_stage_for_it(
    speed: str, fit: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(run__name="demo", pipeline__stages=4, pipeline__speeds="1,1,0.5,0.25")
    address, discovery = swarm_of(settings, monkeypatch)
    monkeypatch.setattr(claiming, "CLAIM_WAIT_S", 0.0)
    served = list[int]()
    monkeypatch.setattr("thinpipe.node.node_process.run_node", lambda _, stage, *__: served.append(stage))
    arguments = ["node", "--join", address, "--stage", "auto", "--speed", speed, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(served) == 1
    assert fit.issuperset(served)
    assert {record.stage for record in discovery.published} == set(served)


def test_who_joins_a_run_of_lanes_may_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(run__name="demo", pipeline__stages=2, lanes__count=3)
    address, discovery = swarm_of(settings, monkeypatch)
    monkeypatch.setattr(claiming, "CLAIM_WAIT_S", 0.0)
    served = list[NodeOptions]()
    monkeypatch.setattr("thinpipe.node.node_process.run_node", lambda *given: served.append(given[3]))
    for lane, at in (("2", GridPlace(1, 2)), ("auto", GridPlace(1, 0))):
        arguments = ["node", "--join", address, "--stage", "1", "--lane", lane, "--out", str(tmp_path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert {record.place for record in discovery.published} == {at}
        assert (served[-1].lane, served[-1].run, served[-1].out) == (
            at.lane,
            tmp_path,
            tmp_path / f"lane-{at.lane}",
        )
        discovery.published.clear()
    refused = CliRunner().invoke(
        app, ["node", "--join", address, "--stage", "1", "--lane", "3", "--out", str(tmp_path)]
    )
    assert refused.exit_code == 2
    assert "--lane 3: the run has 3 lanes, so 0 to 2" in refused.stderr
    assert discovery.published == []


def test_a_certificate_for_some_places_leaves_those(tmp_path: Path) -> None:
    init("demo", tmp_path / "authority", days=9, now=clock())
    issue([1], tmp_path / "authority", tmp_path / "node", lanes=[0, 2], days=9, now=clock())
    settings, security = (
        config(run__name="demo", pipeline__stages=2, lanes__count=3),
        Security(load(tmp_path / "node", now=clock())),
    )
    wish = joining.JoinOptions(join=("a:1",), stage=None, keys=tmp_path / "node")
    assert joining._may_serve(wish, settings, security) == [GridPlace(1, 0), GridPlace(1, 2)]
    assert joining._may_serve(replace(wish, lane=2), settings, security) == [GridPlace(1, 2)]
    with pytest.raises(
        KeysError, match="for stage 1 of lanes 0,2 of run 'demo', is for none of the places that it may"
    ):
        joining._may_serve(replace(wish, stage=0), settings, security)
    with pytest.raises(KeysError, match="not for stage 1 of lane 1; issue one that names it"):
        joining._may_serve(replace(wish, stage=1, lane=1), settings, security)


def test_a_link_that_is_none_is_refused_before_a_stage_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, discovery = swarm_of(config(run__name="demo"), monkeypatch)
    wish = joining.JoinOptions(join=(address,), stage=0, out=tmp_path, overrides={"link.link": "nonsense"})
    with pytest.raises(ConfigError, match="link 'nonsense'"):
        joining.join(wish)
    assert discovery.published == []
    assert discovery.closed


def test_who_cannot_begin_gives_its_stage_back(tmp_path: Path) -> None:
    def ends(settings: RunConfig, out: Path) -> str:
        discovery, run = QuietDiscovery(), shareable(settings)
        membership = Membership(discovery=discovery, record=replace(MINE, state=NodeState.STARTING), run=run)  # pyright: ignore[reportArgumentType]
        with pytest.raises(NodeError) as error:
            run_node(settings, 0, Addresses(listen=None, next=None), NodeOptions(out=out, membership=membership))
        assert error.value.exit_code == 2
        assert [each.state for each in discovery.published] == [NodeState.LEFT]
        return str(error.value)

    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert "in use" in ends(config(watch__prometheus=f"127.0.0.1:{busy.getsockname()[1]}"), tmp_path)
    assert "choose another --out" in ends(config(), tmp_path / "nowhere")


def test_one_run_with_two_machines_settings_is_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = shareable(config(run__name="demo"))
    same = shareable(config(run__name="demo", link__link="80mbit,5ms"))
    another = shareable(config(run__name="demo", optim__clip=0.5))
    assert one.toml != same.toml
    raw = [(encode_run(each), 0.0) for each in (one, same, another)]
    monkeypatch.setattr(Discovery, "_read", lambda *_: raw)
    discovery = Discovery.__new__(Discovery)  # without its process
    assert discovery.runs() == ([one, another], Counter())
    wish = joining.JoinOptions(join=(), stage=0)
    with pytest.raises(ConfigError, match="this DHT has several runs"):
        joining._from_dht(wish, discovery)
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config(run__name="demo", optim__clip=0.5)))
    assert joining._from_dht(replace(wish, config=path), discovery) == another
    raw.pop()
    assert joining._from_dht(wish, discovery) == one
    assert joining._from_dht(replace(wish, config=path), discovery) == one  # whose differences are then said


# -- addresses ------------------------------------------------------------------------------------------------------


def test_multiaddrs() -> None:
    for text in ("/ip4/192.0.2.7/tcp/7002/p2p/QmAbcdefghijklmnopqrstu", "/ip6/::1/tcp/1", "/dns/a.example/tcp/65535"):
        assert str(Multiaddr.parse(text)) == text
    for odd in (
        "",
        "/ip4/a.example/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3.4/tcp/70000",
        "/ip4/1.2.3.4/tcp/1,/x",
    ):
        assert Multiaddr.parse(odd) is None


def test_a_peer_is_dialled_where_its_door_was_reached() -> None:
    peer = "/p2p/QmAbcdefghijklmnopqrstu"
    addresses = (f"/ip4/127.0.0.1/tcp/2{peer}", f"/ip4/10.0.0.5/tcp/2{peer}", "/ip4/10.0.0.5/udp/2/quic", "junk")
    assert seen_from("192.0.2.7", addresses) == [f"/ip4/192.0.2.7/tcp/2{peer}", f"/ip4/10.0.0.5/tcp/2{peer}"]
    assert seen_from("127.0.0.1", addresses)[0] == f"/ip4/127.0.0.1/tcp/2{peer}"


def test_ports_are_settled_before_they_are_told() -> None:
    def free(host: str, wish: int | None) -> int:
        assert host in ("0.0.0.0", "127.0.0.1")
        return wish or 40000

    here = place("0.0.0.0:7001", None, None, free, "192.0.2.7")
    assert (here.endpoint, here.dht_listen.port, here.dht_announce) == ("192.0.2.7:7001", 7002, None)
    here = place("127.0.0.1:0", "a.example:99", 5, free, "192.0.2.7")
    assert (here.listen, here.endpoint) == ("127.0.0.1:40000", "a.example:99")
    assert str(here.dht_announce) == "/dns/a.example/tcp/5"
    with pytest.raises(ListenError, match="not a host:port that others could connect to"):
        place("127.0.0.1:0", "a.example:0", None, free, "192.0.2.7")


def test_throughput_is_of_the_last_steps_and_begins_anew_after_a_rollback() -> None:
    meter = Throughput(100, window_s=10)
    assert meter.note(0.0, 5) == 0.0
    assert meter.note(1.0, 5) == 0.0
    assert meter.note(2.0, 6) == 50.0
    assert meter.note(4.0, 8) == 75.0
    assert meter.note(9.0, 8) == 75.0
    assert meter.note(30.0, 10) == pytest.approx(100 * 2 / 26)
    assert meter.note(31.0, 4) == 0.0


def test_status_shows_who_is_lost_and_who_was_never_there() -> None:
    found = [Seen(record=replace(RECORD, stage=0), age_s=2.0), Seen(record=replace(RECORD, stage=1), age_s=50.0)]
    run = RunRecord(run="demo", configuration=RECORD.configuration, toml="")
    figures = as_figures(run, grid(4, 1), 200, found, Counter({"malformed-frame": 2}), ["warning: one"])
    states = [[node["state"] for node in stage["nodes"]] for stage in figures["stages"]]
    assert states == [["training"], ["lost"], [], []]
    table = status_table(figures)
    assert table.row_count == 4
    assert str(table.caption) == "records left out: 2 malformed-frame\nwarning: one"


def test_status_shows_each_lane() -> None:
    found = [Seen(record=replace(RECORD, stage=1, stages=2, lane=1, lanes=2), age_s=2.0)]
    run = RunRecord(run="demo", configuration=RECORD.configuration, toml="")
    figures = as_figures(run, grid(2, 2), 200, found, Counter(), [])
    places = [(stage["lane"], stage["stage"], len(stage["nodes"])) for stage in figures["stages"]]
    assert places == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(status_table(figures))
    assert "1-1" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_status_prints_what_strangers_wrote_as_they_wrote_it() -> None:
    endpoint, reason = "[fd00:ab:1::7]:7001", "a.example:1 refuses: [bold]no[/x] [/] :ab:"
    found = [Seen(record=replace(RECORD, endpoint=endpoint), age_s=2.0)]
    run = RunRecord(run="demo", configuration=RECORD.configuration, toml="")
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(status_table(as_figures(run, grid(4, 1), 200, found, Counter(), [reason])))
    text: str = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert endpoint in text
    assert reason in text


# -- a member ------------------------------------------------------------------------------------------------------


class Ended:
    """The process of a DHT that is over."""

    def __init__(self) -> None:
        self.stdin, self.stdout = io.BytesIO(), io.BytesIO()

    def wait(self, timeout: float) -> int:
        del timeout
        return 0

    def poll(self) -> int:
        return 0


RUN = RunRecord(run=RECORD.run, configuration=RECORD.configuration, toml="")


def ended_discovery() -> Discovery:
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with what is returned)
    complaints.write(b"much\np2pd has ended\n")
    process = cast("subprocess.Popen[bytes]", Ended())
    return Discovery(process, complaints, ["/ip4/192.0.2.7/tcp/7002"], Multiaddr(host="127.0.0.1", port=0), None)


# In the place of the DHT's process: it prints as much as a fault that lasts for long, and knows nothing.
COMPLAINS = """
import sys
from thinpipe.node.discovery.dht import read_frame, write_frame
while (question := read_frame(sys.stdin.buffer)) is not None:
    print("the network is down\\n" * 20_000, file=sys.stderr, flush=True)
    write_frame(sys.stdout.buffer, {"number": question["number"], "error": "nobody answers"})
print("its last word", file=sys.stderr)
"""


def test_what_the_process_of_the_dht_prints_does_not_fill_a_disk() -> None:
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", COMPLAINS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env=node_environment(),
        )
        discovery = Discovery(process, printed, [], Multiaddr(host="127.0.0.1", port=0), None)
        for _ in range(10):
            with pytest.raises(DiscoveryError, match="nobody answers"):
                discovery.runs()
            assert os.fstat(printed.fileno()).st_size < 2 * WORDS_BYTES_MAX
        discovery.close()
        with pytest.raises(DiscoveryError, match="has ended: its last word"):
            discovery.runs()


def test_who_cannot_enter_the_dht_again_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[list[str]] = []

    def begin(peers: list[str], **_: Any) -> Discovery:
        tries.append(peers)
        raise DiscoveryError("none of the DHT's peers answers")

    monkeypatch.setattr(Discovery, "begin", begin)
    said: list[str] = []
    now_s = 0.0
    member = Membership(discovery=ended_discovery(), record=RECORD, run=RUN, clock=lambda: now_s)
    member.discovery.close()
    with pytest.raises(DiscoveryError, match="the DHT's process has ended: p2pd has ended"):
        member.discovery.read(RUN.run, RUN.configuration, 4)

    def report(_: str, line: str) -> None:
        said.append(line)

    async def story() -> None:
        nonlocal now_s
        where = member.where(GridPlace(2), report)
        for _ in range(2):
            await member._publish(report)
            assert await where() is None
            now_s += RETURN_EVERY_S + 1

    asyncio.run(story())
    member.leave()
    assert tries == [["/ip4/192.0.2.7/tcp/7002"]] * 2
    assert "p2pd has ended; training goes on" in said[0]
    assert "none of the DHT's peers answers; training goes on" in said[1]


def test_a_neighbour_without_a_record_is_dialled_where_it_was() -> None:
    now_s = 0.0
    below = Seen(record=replace(RECORD, stage=2), age_s=1.0)
    told: list[Seen] | None = [below]

    class Dht:
        def read(self, *_: Any) -> tuple[list[Seen], Counter[str]]:
            if told is None:
                raise DiscoveryError("the DHT did not answer")
            return told, Counter()

    async def story() -> None:
        nonlocal now_s, told
        dht = cast("Discovery", Dht())
        security = Security(insecure=True)
        member = Membership(discovery=dht, record=RECORD, run=RUN, security=security, clock=lambda: now_s)
        where = member.where(GridPlace(2), lambda *_: None)
        assert await where() == below.record.endpoint
        stale, left = replace(below, age_s=100.0), replace(below, record=replace(below.record, state=NodeState.LEFT))
        cases = [([stale], below.record.endpoint), ([], below.record.endpoint), (None, below.record.endpoint)]
        for records, expected in [*cases, ([left], None)]:
            now_s, told = now_s + 10.0, records
            assert await where() == expected
            assert await member.where(GridPlace(2), lambda *_: None)() == expected  # a new generation's link
        assert await member.where(GridPlace(3), lambda *_: None)() is None

    asyncio.run(story())


def test_plain_text_does_not_leave_the_machine_because_a_record_says_so() -> None:
    """Without --insecure; with it, or with keys, the record is believed."""
    near, far = (Seen(record=replace(RECORD, stage=2, endpoint=e), age_s=1.0) for e in ("127.0.0.1:9", "192.0.2.7:9"))
    told: list[Seen] = [far]

    class Dht:
        def read(self, *_: Any) -> tuple[list[Seen], Counter[str]]:
            return told, Counter()

    async def story(security: Security) -> tuple[list[str | None], list[str]]:
        nonlocal told
        now_s, said = 0.0, list[str]()
        member = Membership(
            discovery=cast("Discovery", Dht()), record=RECORD, run=RUN, security=security, clock=lambda: now_s
        )
        where, found = member.where(GridPlace(2), lambda _, line: said.append(line)), []
        for records in ([far], [far], [far, near]):
            now_s, told = now_s + 10.0, records
            found.append(await where())
        return found, said

    found, said = asyncio.run(story(Security()))
    assert found == [None, None, "127.0.0.1:9"]
    assert len(said) == 1
    assert "stage 2 is announced at 192.0.2.7:9, on another machine" in said[0]
    found, said = asyncio.run(story(Security(insecure=True)))
    assert found[:2] == ["192.0.2.7:9"] * 2
    assert not said
    with pytest.raises(RendezvousError, match=r"192\.0\.2\.7:9 connects to other machines"):
        asyncio.run(ask_rendezvous("192.0.2.7:9"))


ECHO = """
from thinpipe.node.discovery import dht

def serve(questions, answers):
    while raw := questions.read(1):
        answers.write(raw)
        answers.flush()

dht._serve = serve
dht.main()
"""


def test_the_dht_outlives_the_thread_that_started_it_and_ends_with_the_pipe() -> None:
    """Without a DHT: what it serves by is replaced by an echo."""
    command = [sys.executable, "-c", ECHO]
    started: list[tuple[subprocess.Popen[bytes], int]] = []

    def start() -> None:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=node_environment(), bufsize=0)
        started.append((process, threading.get_native_id()))
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"1")
        assert process.stdout.read(1) == b"1"

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    process, number = started[0]
    with process:
        while Path(f"/proc/self/task/{number}").exists():  # the kernel sees its end after Python does
            pass
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"2")
        assert process.stdout.read(1) == b"2"
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_bootstrap_that_has_nothing_to_ask_ends_with_its_dht() -> None:
    discovery = ended_discovery()
    with pytest.raises(DiscoveryError, match="has ended; start this bootstrap again"):
        asyncio.run(_keep(discovery, None, [RUN]))
    discovery.close()


# -- a door ---------------------------------------------------------------------------------------------------------


TOLD = RendezvousResponse(addresses=("/ip4/127.0.0.1/tcp/1/p2p/QmAbcdefghijklmnopqrstu",), incarnation=7)


async def say_at_door(address: str, raw: bytes) -> str:
    """The code with which a stranger's words are refused."""
    async with asyncio.timeout(20), grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(SWARM_METHOD)()
        await call.write(raw)
        answer = await call.read()
        assert isinstance(answer, bytes)
        frame = decode_frame(answer, Limits(message_bytes=1))
        assert isinstance(frame, Refusal)
        return frame.code


def test_a_rendezvous_answers_and_refuses_by_name() -> None:
    faults: list[str] = []

    async def story() -> None:
        rendezvous = rendezvous_handler(lambda: TOLD, lambda code, _: faults.append(code))
        async with serving("127.0.0.1:0", {"Swarm": rendezvous}) as port:
            address = f"127.0.0.1:{port}"
            answered = await ask_rendezvous(address)
            assert (answered.response, answered.host) == (TOLD, "127.0.0.1")
            assert await say_at_door(address, b"\xc1") == "malformed-frame"
            assert await say_at_door(address, msgpack.packb({"version": 1})) == "malformed-frame"
            assert await say_at_door(address, b"\x80" * 1000) == "oversized"
            other = msgpack.packb({**msgpack.unpackb(encode_request(RendezvousRequest())), "version": 99})
            assert await say_at_door(address, other) == "protocol-version"
            nobody = free_address()
            back = [(address, 7, "yes"), (address, 8, "another node answers at"), (nobody, 7, "nobody listens at")]
            for reach, incarnation, said in back:
                answered = await ask_rendezvous(address, PLAIN, RendezvousRequest(reach=reach, incarnation=incarnation))
                assert answered.response.dialled_back.startswith(said)
            elsewhere = await ask_rendezvous(address, PLAIN, RendezvousRequest(reach="192.0.2.1:9", incarnation=7))
            assert elsewhere.response.dialled_back == ""  # not for a stranger to have dialled

    asyncio.run(story())
    assert faults == ["malformed-frame", "malformed-frame", "oversized", "protocol-version"]


def test_who_is_no_rendezvous_is_named() -> None:
    async def story() -> None:
        async def probe(_: object, context: grpc.aio.ServicerContext) -> None:
            del context

        with pytest.raises(RendezvousError, match=r"nobody listens at .*: start `thinpipe dht"):
            await ask_rendezvous(free_address())
        async with serving("127.0.0.1:0", {"Probe": probe}) as port:
            with pytest.raises(RendezvousError, match="is not in a DHT"):
                await ask_rendezvous(f"127.0.0.1:{port}")

        async def silent(_: object, context: grpc.aio.ServicerContext) -> None:
            await context.read()  # an end before that may cross the question, and is another error

        async with serving("127.0.0.1:0", {"Swarm": silent}) as port:
            with pytest.raises(RendezvousError, match="without an answer"):
                await ask_rendezvous(f"127.0.0.1:{port}")

        async def liar(_: object, context: grpc.aio.ServicerContext) -> None:
            await context.read()
            await context.write(b"\x93\x01\x02\x03")

        async with serving("127.0.0.1:0", {"Swarm": liar}) as port:
            with pytest.raises(
                RendezvousError, match="answers, but not like the rendezvous of a swarm: malformed-frame"
            ):
                await ask_rendezvous(f"127.0.0.1:{port}")

    asyncio.run(story())


def test_a_silent_address_of_a_name_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = asyncio.open_connection

    async def dial(host: str, port: int) -> Any:
        return await (asyncio.Event().wait() if host == "2001:db8::1" else connect(host, port))

    async def resolve(*_: object, **__: object) -> list[Any]:
        return [(0, 0, 0, "", (name, 1)) for name in ("2001:db8::1", "127.0.0.1")]

    async def story(port: int) -> str:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        return await reachable(f"dual.example:{port}", 0.4)

    monkeypatch.setattr(asyncio, "open_connection", dial)
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        assert asyncio.run(story(port)) == f"ipv4:127.0.0.1:{port}"


def test_hosts_of_grpc_peers() -> None:
    assert host_of("ipv4:192.0.2.7:4711") == "192.0.2.7"
    assert host_of("ipv6:%5B::1%5D:4711") == "::1"
    assert host_of("unix:/tmp/x") == ""


REFUSED = [
    (["node", "--stage", "auto"], "--stage auto goes with --join"),
    (["node", "--stage", "1", "--speed", "2"], "--speed goes with --join"),
    (["node", "--join", "127.0.0.1:1", "--stage", "1", "--speed", "2"], "--speed goes with --stage auto"),
    (["node", "--stage", "0"], "say which run: --config run.toml and the addresses, or --join"),
    (["node", "--stage", "0", "--next", "a:1", "--join", "b:1"], "--next and --join contradict each other"),
    (["node", "--stage", "0", "--lateral", "0=a:1", "--join", "b:1"], "--lateral and --join contradict each other"),
    (["node", "--stage", "0", "--lane", "auto", "--config", "run.toml"], "--lane auto goes with --join"),
    (["node", "--stage", "0", "--lane", "-1", "--join", "b:1"], "'-1' is neither a lane, from 0, nor auto"),
    (["node", "--stage", "0", "--join", "nonsense"], "--join nonsense: neither host:port"),
    (["node", "--stage", "0", "--join", "/ip4/192.0.2.7/tcp/1"], "not a multiaddr such as"),
    (["node", "--stage", "most", "--join", "127.0.0.1:1"], "'most' is neither a stage, from 0, nor auto"),
    (["status"], "say whom to ask: --join host:port"),
    (["status", "--join", "127.0.0.1:1"], "nobody listens at 127.0.0.1:1"),
    (["dht", "--listen", "nonsense"], "'nonsense' is not host:port"),
    (["dht", "--listen", "a..b:7000", "--insecure"], "cannot listen at a..b: no machine is known by that name"),
    (["dht", "--listen", "127.0.0.1:0", "--join", "127.0.0.1:1"], "nobody listens at 127.0.0.1:1"),
    (["dht", "--config", "none.toml"], "no such configuration file"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), REFUSED, ids=lambda each: " ".join(each) if type(each) is list else ""
)
def test_bad_input_is_one_line(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    assert expected in line


# -- a node that is there before its bootstrap ------------------------------------------------------------------------


class Waiting:
    """A clock that only sleeping moves, and what is said meanwhile."""

    def __init__(self) -> None:
        self.now_s, self.said = 0.0, list[str]()

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def ask(self, *join: str, wait_s: float) -> EntryPoints:
        how: dict[str, Any] = {"wait_s": wait_s, "clock": lambda: self.now_s, "sleep": self.sleep}
        return ask_all_rendezvous(join, self.said.append, PLAIN, **how)


def test_a_bootstrap_that_comes_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting()
    told = RendezvousResponse(addresses=("/ip4/127.0.0.1/tcp/7001/p2p/" + "Q" * 46,))

    async def ask(address: str, _: Security) -> RendezvousAnswer:
        if waiting.now_s < 30:
            raise RendezvousError(f"nobody listens at {address}", 2, absent=True)
        return RendezvousAnswer(address=address, host="127.0.0.1", response=told)

    monkeypatch.setattr(entry_points, "ask_rendezvous", ask)
    assert waiting.ask("127.0.0.1:7000", wait_s=120).peers == told.addresses
    assert waiting.now_s == 30
    assert waiting.said == ["nobody listens at 127.0.0.1:7000; waits 120 s for it"]


def test_a_bootstrap_that_does_not_come_is_not_the_users_fault() -> None:
    """Exit code 1: whoever started the node may start it again."""
    waiting, address = Waiting(), free_address()
    with pytest.raises(DiscoveryError, match=rf"nobody listens at {address}: .* \(waited 7 s for it") as late:
        waiting.ask(address, wait_s=7)
    assert (late.value.exit_code, waiting.now_s) == (1, 7)


def test_who_answers_and_is_no_rendezvous_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mail:
        threading.Thread(target=_hang_up_on_all, args=(mail,), daemon=True).start()
        with pytest.raises(DiscoveryError, match="not thinpipe") as other:
            Waiting().ask(f"127.0.0.1:{mail.getsockname()[1]}", wait_s=100)
    assert other.value.exit_code == 2


def _hang_up_on_all(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()


def test_how_long_to_wait_is_said_by_option_or_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(config(link__connect_timeout_s=50.0)))
    wish = joining.JoinOptions(join=("a:1",), stage=0)
    assert joining._wait_s(wish) == 120
    assert joining._wait_s(replace(wish, config=tmp_path / "run.toml")) == 50
    both = replace(wish, config=tmp_path / "run.toml", overrides={"link.connect_timeout_s": 3, "link.link": "none"})
    assert joining._wait_s(both) == 3
    with pytest.raises(ConfigError, match=r"link\.connect_timeout_s"):
        joining._wait_s(replace(wish, overrides={"link.connect_timeout_s": -1}))


def test_a_node_whose_bootstrap_never_comes_ends_with_1() -> None:
    arguments = ["node", "--stage", "0", "--join", free_address(), "--set", "link.connect_timeout_s=0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "waits 0.5 s for it" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "nobody listens at" in line


@pytest.mark.parametrize(
    ("endpoint", "insecure", "line"),
    [
        ("192.0.2.7:7000", True, "thinpipe node --join 192.0.2.7:7000 --stage auto --insecure"),
        ("[2001:db8::7]:7000", True, "thinpipe node --join '[2001:db8::7]:7000' --stage auto --insecure"),
        ("127.0.0.1:7000", False, "thinpipe node --join 127.0.0.1:7000 --stage auto"),
    ],
)
def test_a_bootstrap_prints_a_line_that_works(endpoint: str, insecure: bool, line: str) -> None:
    assert how_to_join(endpoint, Security(insecure=insecure)) == line
    words = shlex.split(line)  # as a shell reads it
    assert words[words.index("--join") + 1] == endpoint


def test_a_bootstrap_with_keys_says_that_others_need_theirs(tmp_path: Path) -> None:
    init("my-run", tmp_path / "authority", days=30, now=clock())
    issue([0], tmp_path / "authority", tmp_path / "node", days=10, now=clock())
    security = Security(load(tmp_path / "node", now=clock()))
    assert how_to_join("boot.example:7000", security).endswith("--join boot.example:7000 --stage auto --keys DIR")


def test_an_address_that_only_this_machine_reaches_is_told_to_nobody_without_a_warning() -> None:
    near, far = (f"/ip4/{host}/tcp/7001/p2p/{'Q' * 46}" for host in ("127.0.0.1", "192.0.2.7"))
    assert joining._only_here("127.0.0.1:7002", [near]) == ""
    assert joining._only_here("192.0.2.8:7002", [near, far]) == ""
    for endpoint in ("127.0.0.1:7002", "localhost:7002", "[::1]:7002"):
        assert f"announced at {endpoint}, where no other machine" in joining._only_here(endpoint, [near, far])
