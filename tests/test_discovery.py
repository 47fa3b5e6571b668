"""Real DHTs on loopback: nodes that know one address train to the bits of one process, whoever is lost on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, load_config, merge, parse_config
from thinpipe.node.discovery.dht import write_frame
from thinpipe.node.one_process import OneProcess
from thinpipe.protocol.grid_place import GridPlace, grid
from thinpipe.sim.launch.node_launch import node_environment

from .conftest import TinyConfig
from .in_memory import run_reference
from .real_faults import records
from .real_node import free_address, until
from .real_swarm import DOOR, MULTIADDR, Process, Scene, all_gone, end_of, served, served_place

pytestmark = pytest.mark.timeout(300)

SETTINGS: dict[str, Any] = {
    "pipeline.stages": 2,
    "run.name": "found",
    "run.steps": 100_000,  # nobody reaches them
    "checkpoint.every": 5,
    "codec.codec": "mapl:r=8,anchors=full,every=2",
    "link.link": "100mbit,40ms",  # a step takes some 200 ms, and hardly any of it is work
}


@pytest.fixture(scope="module")
def config(tiny: TinyConfig) -> RunConfig:
    return tiny(SETTINGS)


class Enough(Exception):
    """Of training."""


def states_after(config: RunConfig, steps: int) -> list[str]:
    """Of all stages, in one process that nothing disturbs."""
    reference = OneProcess(config)

    def stop(step: int, loss: float) -> None:
        del loss
        if step + 1 == steps:
            raise Enough

    with pytest.raises(Enough):
        reference.train(stop)
    return [stage.state_sha256() for stage in reference.stages]


def flat(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude_none=True)
    return {f"{section}.{key}": value for section, table in tree.items() for key, value in table.items()}


@pytest.fixture
def scene(config: RunConfig, tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "run.toml").write_text(dump_config(config))
    made = Scene(tmp_path, ["--set", f"data.cache={config.data.cache}"])
    yield made
    made.close()


# A member of the DHT that knows no rules: records of every wrong kind, under its own signature or none.
STRANGER = """
import sys, time, msgpack, hivemind
from hivemind.dht.crypto import RSASignatureValidator
if __name__ == "__main__":
    rules = RSASignatureValidator()
    local = {"nat_port_map": False, "auto_nat": False, "use_relay": False}
    dht = hivemind.DHT(sys.argv[1:2], start=True, record_validators=[rules], **local)
    key, mine, until = "thinpipe/run/found", rules.local_public_key, time.time() + 200
    odd = {"version": 1, "run": "found", "configuration": "f" * 64, "stage": 0, "stages": 2, "endpoint": "127.0.0.1:9",
           "state": "training", "incarnation": 5, "claimed_at_s": 1.0, "generation": 9, "completed_steps": 1,
           "committed_steps": 1, "tokens_per_s": 1.0}
    def store(value, subkey, key=key, until=until):
        print(dht.store(key, value, until, subkey=subkey), flush=True)
    store(b"\\xc1 no msgpack", mine)                      # True: of our form, and of no use
    store(msgpack.packb(odd), b"someone else")             # False from here on: not signed,
    store(msgpack.packb(odd), None)                        # the whole key for itself,
    store({"a": 1}, mine, until=until + 1)                 # no bytes,
    store(b"for ever", mine, until=time.time() + 1e9)      # for too long
    print("done", flush=True)
    time.sleep(300)
"""


def strangers(address: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", STRANGER, address],
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=node_environment(),
            start_new_session=True,  # hivemind by itself leaves its children behind
        )


def states(directories: dict[int, Path]) -> list[str]:
    return [end_of(directories[stage], stage) for stage in sorted(directories)]


@pytest.mark.slow
def test_a_swarm_finds_itself_and_mends_itself(scene: Scene, config: RunConfig, tmp_path: Path) -> None:
    """With TLS, and strangers in the DHT: two stages, a third node for one of them, and then losses: of the bootstrap,
    of a node's own part of the DHT, of a node."""
    scene.use_keys("found", "0-1")
    bootstrap = scene.dht("bootstrap", "--config", str(tmp_path / "run.toml"))
    rendezvous, address = bootstrap.until_says(DOOR)[1], bootstrap.until_says(MULTIADDR)[1]
    stranger = strangers(address, tmp_path / "stranger.log")
    try:
        nodes = [scene.node(name, rendezvous, "auto") for name in ("a", "b")]  # at once, for two stages
        places = dict(map(served, nodes))
        assert sorted(places) == [0, 1]
        at = {served(node)[0]: node for node in nodes}
        directories = {served(node)[0]: tmp_path / node.log.stem for node in nodes}
        until(lambda: "done" in (tmp_path / "stranger.log").read_text(), "a stranger to write")
        assert (tmp_path / "stranger.log").read_text().split() == ["True", *["False"] * 4, "done"]
        late = scene.node("late", rendezvous, "1")
        without = scene.run("without", "status", "--join", rendezvous)
        until(lambda: records(directories[0], 0, "step"), "the first step")

        found = scene.status(rendezvous)
        assert [stage["nodes"][0]["endpoint"] for stage in found["stages"]] == [places[0], places[1]]
        assert all(stage["nodes"][0]["state"] in ("training", "waiting") for stage in found["stages"])
        assert found["left_out"] == {"malformed-frame": 1}
        line = late.ends(2).splitlines()[-1]
        assert "thinpipe: error: stage 1 is served by process" in line
        assert places[1] in line
        assert f"{rendezvous} speaks TLS and this one does not" in without.ends(2)

        family = bootstrap.family()[1:]
        bootstrap.dht().kill()
        all_gone(family)  # the kernel sees to it
        bootstrap.kill()  # those inside know each other
        before = len(records(directories[0], 0, "step"))
        family = at[0].family()[1:]
        at[0].p2pd().kill()
        all_gone(family)
        found = scene.status(places[1])
        assert found["stages"][1]["nodes"][0]["endpoint"] == places[1]
        assert found["stages"][1]["nodes"][0]["tokens_per_s"] > 0
        until(lambda: len(records(directories[0], 0, "step")) > before + 2, "training to go on")
        at[0].until_says("the DHT's process has ended: .*p2pd has ended; training goes on")
        at[0].until_says("is in the DHT again")

        at[1].kill()
        newcomer = scene.node("c", places[0], "auto")
        stage, endpoint = served(newcomer)
        assert stage == 1
        assert endpoint != places[1]
        assert "takes the stage's place there" in newcomer.words
        directories[1] = tmp_path / "c"
        until(lambda: len(records(directories[1], 1, "step")) > 2, "the newcomer to train")
        at[0].popen.terminate()  # after the step under way, for all
        at[0].ends()
        newcomer.ends()
    finally:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()
    assert records(directories[1], 1, "rollback")[-1]["completed"] > 0  # from its neighbour's copy: its disk is new
    steps = records(directories[0], 0, "end")[-1]["steps"]
    assert states(directories) == states_after(config, steps)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [False, pytest.param(True, marks=pytest.mark.long)], ids=["replicas", "chunks"])
def test_lanes_find_each_other_and_a_lost_node_of_one_is_replaced(
    scene: Scene, config: RunConfig, tmp_path: Path, chunks: bool
) -> None:
    """Four nodes that know one address fill a grid, and give each other rounds; one is lost, and a fifth one takes its
    place on a disk of its own."""
    settings = {"lanes.count": 2, "lanes.average": "outer:every=4", "run.steps": 40}
    if chunks:
        settings |= {"lanes.average": "gradients", "context.method": "full"}
    lanes = parse_config(merge({}, {**flat(config), **settings}))
    (tmp_path / "run.toml").write_text(dump_config(lanes))
    scene.use_keys("found", "0-1")
    bootstrap = scene.dht("bootstrap", "--config", str(tmp_path / "run.toml"))
    rendezvous = bootstrap.until_says(DOOR)[1]
    came = [scene.node(name, rendezvous, "auto") for name in ("a", "b", "c", "d")]
    nodes = {served_place(node): node for node in came}
    assert sorted(nodes) == sorted(grid(2, 2))
    homes = {place: node.log.with_suffix("") / f"lane-{place.lane}" for place, node in nodes.items()}
    lost = GridPlace(1, 1)
    until(lambda: len(records(homes[lost], 1, "round")) > 2, "rounds of lane 1")
    if chunks:  # there is one after every step, and no checkpoint yet
        until(lambda: any(each["bytes"] for each in records(homes[lost], 1, "copy")), "a copy of its checkpoint")
    nodes[lost].kill()  # from here on all wait, lane 0 in its next round
    late = scene.node("late", rendezvous, "1", "--lane", "0")
    found = scene.status(rendezvous)
    assert [(stage["lane"], stage["stage"]) for stage in found["stages"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [stage["nodes"][0]["endpoint"] for stage in found["stages"]] == [
        served(nodes[each])[1] for each in grid(2, 2)
    ]
    assert "stage 1 of lane 0 is served by process" in late.ends(2)
    nodes[lost] = scene.node("e", served(nodes[GridPlace(0, 0)])[1], "auto")
    assert served_place(nodes[lost]) == lost
    assert "takes the stage's place there" in nodes[lost].words
    homes[lost] = tmp_path / "e" / "lane-1"
    for node in nodes.values():
        node.ends()
    reference = OneProcess(lanes)
    reference.train()
    expected = {
        GridPlace(stage.index, number): stage.state_sha256()
        for number, lane in enumerate(reference.lanes)
        for stage in lane.stages
    }
    assert {place: end_of(home, place.stage) for place, home in homes.items()} == expected
    assert records(homes[lost], 1, "rollback")[-1]["completed"] > 0
    back = [len(records(home, place.stage, "rollback")) for place, home in homes.items() if place.lane == 0]
    assert back == ([1, 1] if chunks else [0, 0])  # what is lost is its own lane's loss, or that of all


@pytest.mark.slow
def test_by_multiaddr_the_configuration_comes_from_the_dht(scene: Scene, config: RunConfig, tmp_path: Path) -> None:
    """And without any bootstrap's help: that one knows of no run, which the first node brings."""
    (tmp_path / "run.toml").write_text(dump_config(parse_config(merge({}, {**flat(config), "run.steps": 20}))))
    bootstrap = scene.dht("bootstrap")
    address = bootstrap.until_says(MULTIADDR)[1]
    first = scene.node("a", address, "0", "--config", str(tmp_path / "run.toml"), "--link", "none")
    assert served(first)[0] == 0
    nobody = free_address()
    second = scene.node("b", nobody, "auto", "--join", address, "--link", "none")
    assert served(second)[0] == 1
    assert f"warning: nobody listens at {nobody}" in second.words
    family = [*first.family(), *second.family()]
    assert any("p2pd" in each.name() for each in family)
    print(f"from `node --join` to its first step: {seconds_to_first_step(tmp_path / 'b', 1, second):.1f} s")
    for process in (first, second):
        process.ends()
    all_gone(family)
    whole = run_reference(load_config(tmp_path / "run.toml"), tmp_path / "reference")
    assert states({0: tmp_path / "a", 1: tmp_path / "b"}) == whole.state_sha256


@pytest.mark.slow
def test_a_node_that_cannot_be_reached_is_told(scene: Scene, tmp_path: Path) -> None:
    bootstrap = scene.dht("bootstrap", "--config", str(tmp_path / "run.toml"))
    rendezvous, nobody = bootstrap.until_says(DOOR)[1], free_address()
    node = scene.node("a", rendezvous, "1", "--announce", nobody)
    node.until_says(r"this node is announced at")
    line = next(line for line in node.words.splitlines() if "this node is announced at" in line)
    assert f"at {nobody} and cannot be reached there by itself (nobody listens at {nobody}" in line
    assert f", nor by {rendezvous} (nobody listens at {nobody}" in line
    assert "give the host:port at which the stage above reaches it with --announce" in line
    node.popen.terminate()
    assert "stopped by SIGTERM" in node.ends(130)


def seconds_to_first_step(directory: Path, stage: int, process: Process) -> float:
    """Seconds from the start of the process to its first step."""
    until(lambda: records(directory, stage, "step"), "its first step")
    return records(directory, stage, "step")[0]["time_s"] - psutil.Process(process.popen.pid).create_time()


@pytest.mark.slow
def test_without_join_hivemind_is_not_even_imported(config: RunConfig, tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "hivemind.py").write_text("raise SystemExit('hivemind was imported')")
    (tmp_path / "run.toml").write_text(dump_config(config))
    environment = node_environment()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(poison), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "thinpipe.cli", "up", "--config", str(tmp_path / "run.toml"), "--json"]
    command += ["--out", str(tmp_path / "run"), "--set", "run.steps=2", "--link", "none"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as up:
        started: set[str] = set()
        while up.poll() is None:
            with suppress(psutil.NoSuchProcess):
                started |= {each.name() for each in psutil.Process(up.pid).children(recursive=True)}
            time.sleep(0.05)
        assert up.stderr
        assert up.returncode == 0, up.stderr.read().decode()
    assert not any("p2pd" in name for name in started)
    daemon = [sys.executable, "-m", "thinpipe.node.discovery.dht"]
    question = io.BytesIO()
    write_frame(question, {"peers": [], "listen": [], "announce": None, "client": False})
    done = subprocess.run(daemon, env=environment, capture_output=True, input=question.getvalue(), check=False)
    assert b"hivemind was imported" in done.stderr  # or the above would prove nothing
