"""`thinpipe doctor`: what it finds on this machine, and what its neighbour says of it over real sockets."""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import json
import os
import re
import shutil
import socket
from collections import namedtuple
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from thinpipe import __version__
from thinpipe.cli import app
from thinpipe.node.addresses import ListenError, host_of
from thinpipe.node.config_file import dump_config
from thinpipe.node.links import probe_server
from thinpipe.node.links.probe_server import ProbeService, dial_back
from thinpipe.node.links.transport import listening, probe_handler, serving
from thinpipe.node.measuring import machine_speed as speed_module
from thinpipe.node.measuring.machine_speed import machine_speed
from thinpipe.node.preparation import resolve_architecture
from thinpipe.node.probing import doctor, machine
from thinpipe.node.probing.doctor import Questions, examine, report, table
from thinpipe.node.probing.machine import Finding
from thinpipe.node.probing.probe_client import Visited, visit
from thinpipe.node.probing.reach import ProbeError
from thinpipe.node.security.key_directory import clock, init, issue
from thinpipe.node.security.policy import PLAIN, Security, choose
from thinpipe.protocol.path_probe import (
    TOKEN_BYTES,
    InfoRequest,
    InfoResponse,
    Outcome,
    decode_probe,
    dial_back_proof,
    encode_probe,
)
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.links.tc import KernelLinkError
from typer.testing import CliRunner

from .conftest import TinyConfig
from .links import make_link
from .test_transport import complain

TOKEN = bytes(range(TOKEN_BYTES))


@asynccontextmanager
async def neighbour(security: Security = PLAIN) -> AsyncIterator[str]:
    """A probe --listen."""
    service = ProbeService(busy=lambda: False)
    async with serving("127.0.0.1:0", {"Probe": probe_handler(service, complain, security)}, security) as port:
        yield f"127.0.0.1:{port}"


# -- the visit --------------------------------------------------------------------------------------------------------


def test_a_visit_tells_versions_clock_and_whether_the_way_back_is_open() -> None:
    async def story() -> tuple[Visited, str | None]:
        came = asyncio.get_running_loop().create_future()
        async with neighbour() as address, doctor._door("127.0.0.1:0", dial_back_proof(TOKEN), came) as port:
            visited = await visit(address, port=port, token=TOKEN)
            await asyncio.wait([came], timeout=5)
        return visited, came.result() if came.done() else None

    visited, came = asyncio.run(story())
    about = visited.about
    assert (about.version, about.seen_as, about.in_a_run) == (__version__, "127.0.0.1", False)
    assert abs(visited.offset_s) <= visited.round_trip_s + 0.001
    assert (visited.outcome, came) == (Outcome.CONNECTED, "127.0.0.1")


def test_nothing_is_dialled_unless_it_is_asked_for_and_a_shut_port_is_said() -> None:
    async def story() -> list[Outcome | None]:
        async with neighbour() as address:
            (shut,) = free_ports(1)
            return [(await visit(address, port=port, token=TOKEN)).outcome for port in (0, shut)]

    assert asyncio.run(story()) == [None, Outcome.REFUSED]


def test_a_strangers_call_proves_nothing() -> None:
    async def story() -> bool:
        came = asyncio.get_running_loop().create_future()
        async with doctor._door("127.0.0.1:0", dial_back_proof(TOKEN), came) as port:
            for words in (
                dial_back_proof(bytes(TOKEN_BYTES)),
                TOKEN,
                dial_back_proof(TOKEN)[:-1],
                b"",
                b"GET / HTTP/1.0\r\n\r\n" * 9,
            ):
                await dial_back("127.0.0.1", port, words)
            await asyncio.sleep(0.05)
            strangers = came.done()
            await dial_back("127.0.0.1", port, dial_back_proof(TOKEN))
            await asyncio.wait_for(came, 5)
            return strangers

    assert asyncio.run(story()) is False


def test_the_door_dials_where_the_visit_came_from_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a visitor says, the host is not among it: it is the connection's, in gRPC's spelling."""
    assert host_of("ipv4:192.0.2.7:50123") == "192.0.2.7"
    assert host_of("ipv6:%5B2001:db8::7%5D:50123") == "2001:db8::7"
    assert host_of("ipv6:%5Bfe80::1%25eth0%5D:50123") == "fe80::1%eth0"
    for none in ("unix:/tmp/socket", "", "ipv4", "dns:evil.example:1"):
        assert host_of(none) == ""
    assert {field for field in InfoRequest.__dataclass_fields__ if "host" in field or "address" in field} == set()
    assert asyncio.run(dial_back("", free_ports(1)[0], b"x")) is Outcome.UNREACHABLE

    dialled = []

    async def note(host: str, port: int, words: bytes) -> Outcome:
        dialled.append((host, port, words))
        return Outcome.SILENT

    monkeypatch.setattr(probe_server, "dial_back", note)

    async def story() -> Outcome | None:
        async with neighbour() as address:
            return (await visit(address, port=7001, token=TOKEN)).outcome

    assert asyncio.run(story()) is Outcome.SILENT
    assert dialled == [("127.0.0.1", 7001, dial_back_proof(TOKEN))]


def test_one_visitor_is_dialled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        hangs, dialling = asyncio.Event(), asyncio.Event()

        async def hang(*_: object) -> Outcome:
            dialling.set()
            await hangs.wait()
            return Outcome.SILENT

        monkeypatch.setattr(probe_server, "dial_back", hang)
        async with neighbour() as address:
            first = asyncio.create_task(visit(address, port=1, token=TOKEN))
            await dialling.wait()
            with pytest.raises(ProbeError, match="is connecting back to another machine"):
                await visit(address, port=1, token=TOKEN)
            assert (await visit(address, port=0, token=TOKEN)).outcome is None  # who asks for nothing is answered
            hangs.set()
            assert (await first).outcome is Outcome.SILENT
            monkeypatch.undo()
            (shut,) = free_ports(1)
            assert (await visit(address, port=shut, token=TOKEN)).outcome is Outcome.REFUSED

    asyncio.run(story())


def test_another_version_is_answered_because_that_is_the_question() -> None:
    frames = (
        encode_probe(replace(InfoRequest(port=0, token=TOKEN, version="9"), protocol_version=99)),
        encode_probe(InfoResponse(version="9", unix_us=1, seen_as="x", in_a_run=False, protocol_version=99)),
    )
    for frame in frames:
        assert decode_probe(frame + b"\xf8\x01\x01")  # with a field that is not known here

    async def story() -> InfoResponse:
        said: list[bytes] = []

        async def read() -> bytes | None:
            return frames[0]

        async def write(frame: bytes) -> None:
            said.append(frame)

        await ProbeService(busy=lambda: True).serve(read, write, "ipv4:127.0.0.1:1")
        about = decode_probe(said[0])
        assert isinstance(about, InfoResponse)
        return about

    assert asyncio.run(story()).in_a_run


def test_a_node_is_a_door_too() -> None:
    async def story() -> Visited:
        async with listening("127.0.0.1:0", make_link(1), greeting_timeout_s=5, report=complain) as port:
            return await visit(f"127.0.0.1:{port}", port=0, token=TOKEN)

    assert not asyncio.run(story()).about.in_a_run


# -- what is found ----------------------------------------------------------------------------------------------------


def found_with(questions: Questions) -> dict[str, Finding]:
    """The network's findings."""
    return {finding.name: finding for finding in doctor._network(questions)}


def with_neighbour(listen: str | None, security: Security = PLAIN, keys: Path | None = None) -> dict[str, Finding]:
    async def story() -> dict[str, Finding]:
        async with neighbour(security) as address:
            questions = Questions(listen=listen, to=address, keys=keys)
            return await asyncio.to_thread(found_with, questions)

    return asyncio.run(story())


def test_a_machine_that_can_be_reached() -> None:
    (port,) = free_ports(1)
    found = with_neighbour(f"127.0.0.1:{port}")
    assert [(name, each.state) for name, each in found.items()] == [
        ("port", "ok"),
        ("keys", "ok"),
        ("neighbour", "ok"),
        ("reachable", "ok"),
        ("clock", "ok"),
    ]
    assert found["reachable"].found == f"the neighbour dialled 127.0.0.1:{port}, and came in from 127.0.0.1"
    assert f"thinpipe {__version__}" in found["neighbour"].found


def test_over_tls_and_without_the_keys_for_it(tmp_path: Path) -> None:
    now = clock()
    init("run", tmp_path / "authority", days=30, now=now)
    for days in (1, 9):
        issue([0, 1], tmp_path / "authority", tmp_path / f"{days}", days=days, now=now)
    theirs, listen = choose(tmp_path / "9", insecure=False), f"127.0.0.1:{free_ports(1)[0]}"
    found = with_neighbour(listen, theirs, tmp_path / "9")
    assert {name: each.state for name, each in found.items()} == dict.fromkeys(found, "ok")
    assert found["keys"].found.startswith("for stages 0-1 of run 'run', until ")
    assert found["reachable"].found.endswith("came in from 127.0.0.1")
    assert with_neighbour(listen, theirs, tmp_path / "1")["keys"].state == "warning"  # it ends tomorrow
    plain = with_neighbour(listen, theirs)["neighbour"]
    assert plain.state == "fault"
    assert "TLS" in plain.found
    for questions, expected in (
        (Questions(listen="0.0.0.0:0"), r"--listen 0\.0\.0\.0:0 connects to other machines, so it needs --keys DIR"),
        (Questions(to="192.0.2.7:1"), r"--to 192\.0\.2\.7:1 connects to other machines"),
        (Questions(to="192.0.2.7:1", keys=tmp_path / "none"), "none"),
    ):
        found = found_with(questions)
        assert found["keys"].state == "fault"
        assert re.search(expected, found["keys"].found)
        assert {found[name].state for name in ("neighbour", "reachable", "clock")} == {"not asked"}
    assert found_with(Questions(listen="0.0.0.0:0", insecure=True))["keys"].state == "ok"


def test_a_port_that_is_taken_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = with_neighbour(address)
    assert (found["port"].state, found["port"].found) == ("fault", f"cannot listen on {address}: it is in use")
    assert re.match(rf"end process {os.getpid()} \(.+\), or choose another --listen", found["port"].remedy)
    assert found["reachable"].state == "fault"  # somebody answers, and it is not this doctor
    assert "but not by this machine's" in found["reachable"].found


def test_where_nobody_can_be_asked_it_says_so() -> None:
    for questions, asked in (
        (Questions(), {"keys"}),
        (Questions(listen=f"127.0.0.1:{free_ports(1)[0]}"), {"port", "keys"}),
    ):
        found = found_with(questions)
        assert {name for name, each in found.items() if each.state != "not asked"} == asked
        assert all(
            each.remedy.startswith(("start thinpipe probe --listen there", "say --listen")) or name in asked
            for name, each in found.items()
        )
    found = with_neighbour(None)
    assert found["reachable"].state == "not asked"
    assert found["reachable"].found == "the neighbour sees this machine as 127.0.0.1"


def test_a_neighbour_that_is_not_there_is_a_fault() -> None:
    (port,) = free_ports(1)
    found = found_with(Questions(to=f"127.0.0.1:{port}"))
    assert found["neighbour"].state == "fault"
    assert "nobody listens at" in found["neighbour"].found
    assert "reachable" not in found


ABOUT = InfoResponse(version=__version__, unix_us=0, seen_as="192.0.2.7", in_a_run=False)
MET = Visited(about=ABOUT, round_trip_s=0.05, offset_s=0.0, outcome=Outcome.CONNECTED)


@pytest.mark.parametrize(
    ("listen", "outcome", "remedy"),
    [
        ("127.0.0.1:7001", Outcome.REFUSED, "127.0.0.1:7001 is this machine alone: listen on 0.0.0.0:7001"),
        ("0.0.0.0:7001", Outcome.REFUSED, "is 192.0.2.7 this machine, or its router? forward port 7001"),
        ("0.0.0.0:7001", Outcome.SILENT, "open port 7001/tcp in the firewall"),
        ("0.0.0.0:7001", Outcome.UNREACHABLE, "open port 7001/tcp in the firewall"),
    ],
)
def test_each_way_of_not_being_reached_has_its_remedy(listen: str, outcome: Outcome, remedy: str) -> None:
    finding = doctor._reachable(Questions(listen=listen, to="x:1"), replace(MET, outcome=outcome), None)
    assert finding.state == "fault"
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("offset_s", "trip_s", "state"),
    [(0.5, 0.1, "ok"), (-1.5, 0.1, "warning"), (4.0, 0.1, "fault"), (-4.0, 0.1, "fault"), (4.0, 4.0, "warning")],
)
def test_a_clock_is_judged_by_what_is_certain(offset_s: float, trip_s: float, state: str) -> None:
    finding = doctor._clock(replace(MET, offset_s=offset_s, round_trip_s=trip_s))
    assert finding.state == state
    assert ("ahead" in finding.found) == (offset_s >= 0)


def test_versions_of_the_neighbour() -> None:
    assert doctor._neighbour("x:1", MET).state == "ok"
    other = doctor._neighbour("x:1", replace(MET, about=replace(ABOUT, version="9.9")))
    assert (other.state, other.remedy) == ("warning", "the protocol is the same; install 9.9 at both ends")
    assert doctor._neighbour("x:1", replace(MET, about=replace(ABOUT, protocol_version=99))).state == "fault"


Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "total available")


def test_what_a_machine_lacks_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyConfig, tmp_path: Path
) -> None:
    config = tiny({"pipeline.stages": 4, "checkpoint.every": 10})
    assert machine.python().state == "ok"
    assert machine.packages().state == "ok", machine.packages()
    assert machine.disk(tmp_path / "new" / "deep", config).state in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 2**20))
    full = machine.disk(tmp_path, config)
    assert (full.state, full.remedy) == ("fault", "make room, or choose another --out")
    assert "checkpoints take about" in full.found
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Memory(2**40, 2**20))
    assert machine.memory(config, 4).state == "warning"
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Memory(2**20, 2**20))
    assert machine.memory(config, 4).state == "fault"
    assert machine.memory(None, 1).state == "warning"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert machine.cores(2).state == "ok"
    assert (machine.cores(4).state, machine.cores(4).found) == ("warning", "2 for 4 stages here")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert machine.root().state == "warning"
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert machine.traffic_control().found == "tc not installed"
    monkeypatch.setattr(shutil, "which", lambda name: f"/sbin/{name}")
    assert "without root" in machine.traffic_control().found
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for answer, state in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(machine, "has_netem", lambda answer=answer: answer)
        assert machine.traffic_control().state == state

    def refused() -> bool:
        raise KernelLinkError("no namespaces here")

    monkeypatch.setattr(machine, "has_netem", refused)
    assert machine.traffic_control().found == "no namespaces here"


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "hivemind":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "grpcio" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["grpcio<2,>=1.78", "pytest; extra == 'dev'"])
    finding = machine.packages()
    assert finding.state == "fault"
    assert finding.remedy == "pip install hivemind 'grpcio<2,>=1.78'"


def test_a_cpu_without_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch, tiny: TinyConfig) -> None:
    assert machine.product_seconds("float32") > 0
    for times, state in ((0.4, "ok"), (9.0, "warning")):
        monkeypatch.setattr(machine, "product_seconds", lambda dtype, t=times: t if dtype == "bfloat16" else 1.0)
        for asked in ("compute.dtype", "optim.msign_dtype"):
            found = machine.arithmetic(tiny({asked: "bfloat16"}))
            assert (found.state, bool(found.remedy)) == (state, state == "warning")
            assert f"takes {times} times as long" in found.found
        assert machine.arithmetic(tiny({})).state == "ok"
        assert machine.arithmetic(tiny({"compute.dtype": "bfloat16", "compute.device": "cuda:0"})).state == "ok"
        assert machine.arithmetic(None).state == "ok"


def test_a_gpu_that_is_wanted_and_not_there(monkeypatch: pytest.MonkeyPatch, tiny: TinyConfig) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert machine.gpu(None).state == "ok"
    assert machine.gpu(tiny({"compute.device": "cuda:1"})).state == "fault"
    nonsense = machine.gpu(tiny({"compute.device": "nonsense"}))
    assert (nonsense.state, nonsense.remedy) == ("fault", "use cpu, cuda or cuda:N")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert machine.gpu(None).state == "warning"


def test_a_gpu_beyond_those_that_are_there(monkeypatch: pytest.MonkeyPatch, tiny: TinyConfig) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="one", total_memory=2**33))
    assert machine.gpu(tiny({"compute.device": "cuda:0"})).state == "ok"
    beyond = machine.gpu(tiny({"compute.device": "cuda:5"}))
    assert (beyond.state, beyond.found) == (
        "fault",
        "compute.device 'cuda:5' is not on this machine, which has 1 of them",
    )


def test_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.timer().state in ("ok", "warning")
    clock = iter(range(1000))
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    monkeypatch.setattr(machine.time, "monotonic", lambda: 5.0)
    assert machine.timer().state == "fault"
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock) / 100)
    assert machine.timer().state == "warning"  # sleepers wake up 8 ms late, and the wall clock stands still


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns() -> None:
    findings = [
        Finding(name="port", state="ok", found="can listen on 0.0.0.0:7001"),
        Finding(name="clock", state="not asked", found="no neighbour is named", remedy="start " + "long words " * 20),
        Finding(name="reachable", state="fault", found="the neighbour dialled [bold]", remedy="open the port"),
    ]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(table(findings))
    text: str = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"reachable +fault +the neighbour dialled \[bold\]", text)
    assert "→ open the port" in text
    said = report(findings)
    assert (said["faults"], said["warnings"]) == (1, 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes its time and is looked at above."""
    for name in ("timer", "traffic_control", "root", "speed"):
        monkeypatch.setattr(machine, name, lambda *_, name=name: Finding(name=name, state="ok", found="looked at"))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80"})


def test_a_machine_s_speed_is_its_own_and_not_the_model_s(tiny: TinyConfig) -> None:
    """Operations a second are about alike for two lengths of a sequence, of which one is twice the work."""
    configs = [tiny({"data.sequence_length": length}) for length in (64, 128)]
    found = [machine_speed(config, resolve_architecture(config), seconds=0.1) for config in configs]
    assert max(found) < 4 * min(found)
    assert 1e7 < min(found) < 1e13
    finding = machine.speed(tiny({"codec.codec": "nosuch"}))  # no codec is asked for
    assert finding.state == "ok"
    assert re.fullmatch(r"[0-9.e-]+ Tflop/s, for a layer and the head of tiny, float32 on cpu: .*", finding.found)
    assert machine.speed(tiny({"compute.device": "cuda:7"})).state == "not asked"


def test_a_machine_s_speed_is_operations_by_seconds(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass forward and backward is three times the operations of a pass forward. Each takes a quarter of a second
    here, so that two seconds are eight of them, and two come before."""
    config, began = tiny({}), 0
    real = torch.nn.functional.cross_entropy

    def counted(*given: Any, **named: Any) -> torch.Tensor:
        nonlocal began
        began += 1
        return real(*given, **named)

    monkeypatch.setattr(speed_module, "time", SimpleNamespace(perf_counter=lambda: began / 4))
    monkeypatch.setattr(speed_module, "F", SimpleNamespace(cross_entropy=counted))
    architecture = resolve_architecture(config)
    found = machine_speed(config, architecture, seconds=2.0)
    assert began == 10
    width, ffn_width = architecture.hidden_size, architecture.intermediate_size
    layer = 2 * (4 * width**2 + 3 * width * ffn_width) + 2 * config.data.sequence_length * width
    a_pass = 3 * (layer + 2 * architecture.vocab_size * width) * config.microbatch_size * config.data.sequence_length
    assert found == pytest.approx(8 * a_pass / 2.0)


def test_a_model_that_does_not_compute_has_no_speed(odd_heads: Path, tiny: TinyConfig) -> None:
    finding = machine.speed(tiny({"model.path": str(odd_heads)}))
    assert finding.state == "fault"
    assert re.match("a layer and the head of architecture 'llama' do not compute: .", finding.found)
    assert finding.remedy == "choose another model, or a machine with more memory"


@pytest.mark.usefixtures("quick")
def test_the_command_says_it_all_and_its_exit_code(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2, "watch.prometheus": "0"})))
    (port,) = free_ports(1)
    healthy = invoke("--config", str(tmp_path / "run.toml"), "--listen", f"127.0.0.1:{port}", "--json")
    assert healthy.exit_code == 0, healthy.output
    told = json.loads(healthy.stdout)
    names = [finding["name"] for finding in told["findings"]]
    network = ["port", "figures", "keys", "neighbour", "reachable", "clock"]
    machines = ["timer", "cores", "memory", "disk", "GPU", "arithmetic", "speed", "root", "traffic_control"]
    assert names == ["Python", "packages", *network, *machines]
    assert told["faults"] == 0
    sick = invoke("--listen", "a..b:7001", "--json")
    assert sick.exit_code == 1
    port = json.loads(sick.stdout)["findings"][2]
    assert (port["state"], port["found"]) == ("fault", "cannot listen on a..b:7001: no machine is known as 'a..b'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sick = invoke("--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert sick.exit_code == 1
    assert re.search(r"port +fault +cannot listen on", sick.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--listen", "here"], "'here' is not host:port"),
        (["--to", "host:x"], "'host:x' is not host:port"),
        (["--config", "/nowhere/run.toml"], "no such configuration file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert expected in line


def test_examine_refuses_an_address_before_it_looks() -> None:
    with pytest.raises(ListenError):
        next(examine(Questions(to="nowhere")))
