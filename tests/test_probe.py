"""`thinpipe probe`: what it measures over real sockets, how it ends, and what a hostile peer does to who answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from thinpipe.cli import app
from thinpipe.node.links.dialling import dial
from thinpipe.node.links.probe_server import ProbeService
from thinpipe.node.links.transport import FRAME_BYTES_MAX, PROBE_METHOD, listening, probe_handler, serving
from thinpipe.node.probing.probe import figures
from thinpipe.node.probing.probe_client import ask
from thinpipe.node.probing.reach import ProbeError
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.messages import Refusal, encode_frame
from thinpipe.protocol.path_probe import (
    BYTES_MAX,
    ECHOES_MAX,
    FILLER_BYTES_MAX,
    PROBE_FRAME_BYTES_MAX,
    TOKEN_BYTES,
    DialBackResult,
    Done,
    Echo,
    Filler,
    InfoRequest,
    InfoResponse,
    Measured,
    Outcome,
    ProbeMessage,
    ProbePhase,
    ProbeResponder,
    Terms,
    Turn,
    decode_probe,
    encode_probe,
    filler_frame,
)
from thinpipe.sim.links.shaper import LinkProfile
from typer.testing import CliRunner

from .test_transport import complain, make_link

pytestmark = pytest.mark.alone

WISH = Terms(milliseconds=200)
HUGE = Terms(
    milliseconds=2**32 - 1,
    bytes=2**64 - 1,
    rate_bits_per_s=2**64 - 1,
    latency_us=2**64 - 1,
    jitter_us=2**64 - 1,
    burst_bytes=2**64 - 1,
)
VISIT = InfoRequest(port=7001, token=bytes(range(TOKEN_BYTES)), version="0.1.0")
Encodable = Terms | Echo | Turn | Done | Measured | InfoRequest | InfoResponse | DialBackResult
SAID: list[Encodable] = [
    WISH,
    HUGE,
    replace(WISH, round_trips_only=True),
    Echo(7),
    Turn(),
    Done(),
    Measured(2**40, 10**6),
    VISIT,
    InfoResponse(version="0.1.0", unix_us=2**50, seen_as="2001:db8::7", in_a_run=True),
    *map(DialBackResult, Outcome),
]

# -- the rules, without a socket ------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", SAID, ids=str)
def test_a_frame_is_read_as_it_was_written(said: Encodable) -> None:
    assert decode_probe(encode_probe(said)) == said


def test_a_refusal_is_the_same_bytes_in_every_stream() -> None:
    refusal = Refusal(code="oversized", reason="too much")
    assert decode_probe(encode_frame(refusal)) == refusal
    assert decode_probe(filler_frame(bytes(100))) == Filler(100)


def test_any_wish_is_cut_down_and_allocates_nothing() -> None:
    terms = ProbeResponder(round_trips_only=False).receive(HUGE)
    assert terms == Terms(
        milliseconds=10_000,
        bytes=BYTES_MAX,
        rate_bits_per_s=10**12,
        latency_us=10**6,
        jitter_us=10**6,
        burst_bytes=2**24,
    )
    slow = ProbeResponder(round_trips_only=False).receive(replace(WISH, rate_bits_per_s=1))
    assert (slow.rate_bits_per_s, slow.burst_bytes) == (10_000, 1)


def test_damaged_frames_are_refused_and_raise_nothing_else() -> None:
    for said in SAID:
        whole = encode_probe(said)
        for frame in (
            *(whole[:end] for end in range(len(whole))),
            *(_flipped(whole, bit) for bit in range(8 * len(whole))),
        ):
            with suppress(RemoteProtocolError):
                decode_probe(frame)
    with pytest.raises(RemoteProtocolError, match="oversized"):
        decode_probe(bytes(PROBE_FRAME_BYTES_MAX + 1))


def _flipped(raw: bytes, bit: int) -> bytes:
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


@pytest.mark.parametrize(
    ("phase", "allowed"),
    [
        (ProbePhase.TERMS, {Terms, InfoRequest}),
        (ProbePhase.ECHOES, {Echo, Turn}),
        (ProbePhase.TAKING, {Filler, Done}),
        (ProbePhase.OVER, set[type]()),
    ],
)
def test_each_frame_has_its_time(phase: ProbePhase, allowed: set[type]) -> None:
    way: dict[ProbePhase, list[ProbeMessage]] = {
        ProbePhase.TERMS: [],
        ProbePhase.ECHOES: [WISH],
        ProbePhase.TAKING: [WISH, Turn()],
    }
    way[ProbePhase.OVER] = [WISH, Turn(), Done()]
    for said in (*SAID, Filler(5), Refusal(code="x", reason="y")):
        rules = ProbeResponder(round_trips_only=False)
        for before in way[phase]:
            rules.receive(before)
        assert rules.phase is phase
        if type(said) in allowed:
            rules.receive(said)
        else:
            with pytest.raises(RemoteProtocolError, match="unexpected-frame"):
                rules.receive(said)


# -- over sockets -----------------------------------------------------------------------------------------------------


class Scene:
    """A listener that answers probes, and what it complained about."""

    def __init__(self) -> None:
        self.busy = False
        self.faults: list[str] = []
        self.service = ProbeService(busy=lambda: self.busy, terms_timeout_s=0.4, wait_s=0.4)
        self.address = ""


@asynccontextmanager
async def listener() -> AsyncIterator[Scene]:
    scene = Scene()
    door = probe_handler(scene.service, lambda code, _: scene.faults.append(code))
    async with serving("127.0.0.1:0", {"Probe": door}) as port:
        scene.address = f"127.0.0.1:{port}"
        yield scene


def test_a_capped_path_is_measured_as_it_is_both_ways() -> None:
    async def story() -> dict[str, object]:
        async with listener() as scene:
            found = figures(scene.address, await ask(scene.address, LinkProfile.parse("100mbit,10ms"), 0.5))
            assert scene.faults == []
            return found

    for tries in range(3):  # a machine that stalls may be below it once
        found = asyncio.run(story())
        if not found["warnings"] or tries == 2:
            break
    assert found["warnings"] == []
    for way in ("up", "down"):
        assert found[way]["configured_bits_per_s"] == 100e6
        assert found[way]["measured_bits_per_s"] == pytest.approx(100e6, rel=0.1)
        assert 0.2 < found[way]["steady_s"] < 0.6
    assert found["round_trip"]["configured_s"] == 0.02
    assert 0.02 <= found["round_trip"]["least_s"] <= found["round_trip"]["median_s"] < 0.03
    assert found["round_trip"]["count"] == 20


def test_a_cap_that_the_path_cannot_carry_is_a_warning() -> None:
    async def story() -> list[str]:
        async with listener() as scene:
            found = figures(scene.address, await ask(scene.address, LinkProfile.parse("200gbit"), 0.2))
            return found["warnings"]

    up, down = asyncio.run(story())
    assert re.match(r"up: configured 2e\+05 Mb/s, measured .* Mb/s \(-9\d\.\d%", up)
    assert down.startswith("down: configured")


def test_a_node_in_a_run_answers_round_trips_only() -> None:
    async def story() -> dict[str, object]:
        async with listener() as scene:
            scene.busy = True
            return figures("there:1", await ask(scene.address, LinkProfile.parse("none"), 0.5))

    found = asyncio.run(story())
    assert found["in_a_run"]
    assert found["round_trip"]["median_s"] > 0
    assert (found["up"]["measured_bits_per_s"], found["down"]["measured_bits_per_s"]) == (None, None)
    assert found["warnings"] == ["there:1 is in a run, so rates are not measured: a probe must not fill its link"]


def test_a_listener_is_in_a_run_from_its_neighbours_first_word_on() -> None:
    async def story() -> list[bool]:
        upper, lower = make_link(0), make_link(1)
        asked: list[bool] = []
        async with listening("127.0.0.1:0", lower, greeting_timeout_s=5, report=complain) as port:
            address, free = f"127.0.0.1:{port}", LinkProfile.parse("none")
            asked.append((await ask(address, free, 0.2)).terms.round_trips_only)
            dialling = dial(address, upper, greeting_timeout_s=5, deadline_s=lambda: 10, report=complain)
            calling = asyncio.create_task(dialling)
            await asyncio.gather(upper.opened.wait(), lower.opened.wait())
            asked.append((await ask(address, free, 0.2)).terms.round_trips_only)
            await asyncio.gather(upper.drain(10), lower.drain(10))
            await calling
        return asked

    assert asyncio.run(story()) == [False, True]


def test_a_run_that_begins_ends_the_probe() -> None:
    async def story() -> None:
        async with listener() as scene:
            asyncio.get_running_loop().call_later(0.3, setattr, scene, "busy", True)
            with pytest.raises(ProbeError, match=r"refuses the probe: .*begins to train") as raised:
                await ask(scene.address, LinkProfile.parse("50mbit"), 5.0)
            assert raised.value.exit_code == 1
            assert scene.faults == []  # nobody's

    asyncio.run(story())


def test_one_probe_at_a_time() -> None:
    async def story() -> None:
        async with listener() as scene:
            first = asyncio.create_task(ask(scene.address, LinkProfile.parse("10mbit"), 0.5))
            await asyncio.sleep(0.2)
            with pytest.raises(ProbeError, match="another probe is under way") as raised:
                await ask(scene.address, LinkProfile.parse("none"), 0.2)
            assert raised.value.exit_code == 1
            assert (await first).up
            assert (await ask(scene.address, LinkProfile.parse("none"), 0.2)).up

    asyncio.run(story())


# -- a hostile peer of the one that answers ---------------------------------------------------------------------------

TERMS, TURN = encode_probe(WISH), encode_probe(Turn())
HOSTILE: dict[str, tuple[list[bytes], str]] = {
    "random bytes": ([bytes(range(256)) * 4], "malformed-frame"),
    "an empty frame": ([b""], "malformed-frame"),
    "truncated terms": ([TERMS[:-1]], "malformed-frame"),
    "a frame over the limit": ([bytes(PROBE_FRAME_BYTES_MAX + 1)], "oversized"),
    "a frame over gRPC's limit": ([TERMS, bytes(FRAME_BYTES_MAX + 1)], "RESOURCE_EXHAUSTED"),
    "silence": ([], "timeout"),
    "silence after the terms": ([TERMS], "timeout"),
    "silence after the turn": ([TERMS, TURN], "timeout"),
    "another version": ([encode_probe(replace(WISH, protocol_version=99))], "protocol-version"),
    "an echo before the terms": ([encode_probe(Echo(1))], "unexpected-frame"),
    "terms twice": ([TERMS, TERMS], "unexpected-frame"),
    "filler before the turn": ([TERMS, filler_frame(bytes(1000))], "unexpected-frame"),
    "filler that is too much in a frame": ([TERMS, TURN, filler_frame(bytes(2 * FILLER_BYTES_MAX))], "oversized"),
    "filler beyond the terms": (
        [encode_probe(replace(WISH, bytes=1000)), TURN, filler_frame(bytes(1001))],
        "oversized",
    ),
    "too many echoes": ([TERMS, *(encode_probe(Echo(number)) for number in range(ECHOES_MAX + 1))], "unexpected-frame"),
    "what only the other side may say": ([TERMS, encode_probe(Measured(1, 1))], "unexpected-frame"),
    "a message of the other streams": ([TERMS, b"\x22\x02\x08\x01"], "malformed-frame"),
    "more after the end": ([TERMS, TURN, encode_probe(Done()), TURN], "closed without a word"),  # what was due was said
    "a visit within a probe": ([TERMS, encode_probe(VISIT)], "unexpected-frame"),
    "a visit with a short token": ([encode_probe(replace(VISIT, token=b"short"))], "malformed-frame"),
    "a visit to a port that there is not": ([encode_probe(replace(VISIT, port=65536))], "malformed-frame"),
    "a refusal": ([TERMS, encode_frame(Refusal(code="x", reason="y"))], "unexpected-frame"),
}


async def attempt(address: str, frames: list[bytes]) -> str:
    """Send frames; returns the code of the refusal, or the gRPC status that ended it."""
    options = [("grpc.max_send_message_length", -1)]
    async with asyncio.timeout(20), grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(PROBE_METHOD)()
        try:
            for frame in frames:
                await call.write(frame)
            while isinstance(raw := await call.read(), bytes):
                if isinstance(said := decode_probe(raw), Refusal):
                    return said.code
            return "closed without a word"
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return str((await call.code()).name)
        finally:
            call.cancel()


def test_a_hostile_peer_ends_its_own_stream_by_name_and_disturbs_nothing() -> None:
    async def story() -> None:
        async with listener() as scene:
            for name, (frames, code) in HOSTILE.items():
                assert await attempt(scene.address, frames) == code, name
                await _free(scene)
            huge = encode_probe(replace(HUGE, rate_bits_per_s=0, latency_us=0, jitter_us=0))
            for frames in ([huge], [huge, TURN], [TERMS, TURN, filler_frame(bytes(1000))]):
                await _leave(scene.address, frames)
                await _free(scene)
            assert (await ask(scene.address, LinkProfile.parse("none"), 0.2)).up

    asyncio.run(story())


async def _free(scene: Scene) -> None:
    """The place is given back; a refusal of it, and not a wait, would be what the next one gets."""
    async with asyncio.timeout(5):
        while scene.service._taken:  # noqa: ASYNC110 (no event tells of it)
            await asyncio.sleep(0.01)


async def _leave(address: str, frames: list[bytes]) -> None:
    """Go away in the middle, with filler under way."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(PROBE_METHOD)()
        for frame in frames:
            await call.write(frame)
        await call.read()
        call.cancel()


def test_who_does_not_read_holds_nothing_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinpipe.node.links.probe_server.WAIT_S", 0.3)

    async def story() -> None:
        async with listener() as scene, grpc.aio.insecure_channel(scene.address) as channel:
            call = channel.stream_stream(PROBE_METHOD)()
            await call.write(encode_probe(replace(WISH, milliseconds=10_000)))
            await call.write(TURN)
            await asyncio.sleep(0.2)
            assert scene.service._taken
            await _free(scene)
            assert scene.faults == ["timeout"]
            call.cancel()

    asyncio.run(story())


# -- the command ------------------------------------------------------------------------------------------------------


def said_of(arguments: list[str], exit_code: int) -> str:
    result = CliRunner().invoke(app, ["probe", *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    return line


def test_a_link_to_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinpipe.node.probing.probe.DEADLINE_S", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{closed.getsockname()[1]}"
        assert f"nobody listens at {nowhere}: start `thinpipe probe --listen" in said_of(["--to", nowhere], 2)
    line = said_of(["--to", "no-such-machine.invalid:7001", "--insecure"], 2)
    assert "no machine is known as 'no-such-machine.invalid'; check the name" in line
    with _other_program(b"HTTP/1.0 400 Bad Request\r\n\r\n") as address:
        assert f"something listens at {address}, but it is not thinpipe" in said_of(["--to", address], 2)
    with _other_program(None) as address:
        assert f"{address} accepts connections but does not answer within 0.5 s" in said_of(["--to", address], 1)


@contextmanager
def _other_program(answer: bytes | None) -> Iterator[str]:
    """Says `answer` to whoever connects, and ends; None: takes the connection and says nothing."""
    held: list[socket.socket] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def test_another_grpc_server_is_said_to_be_one() -> None:
    async def story() -> None:
        async with serving("127.0.0.1:0", {}) as port:
            with pytest.raises(ProbeError, match="speaks gRPC but answers no probe") as raised:
                await ask(f"127.0.0.1:{port}", LinkProfile.parse("none"), 0.2)
            assert raised.value.exit_code == 2

    asyncio.run(story())


@pytest.mark.slow
def test_two_processes_a_table_and_json() -> None:
    """As on two machines: one answers, two measure, Ctrl-C ends it."""
    command = [sys.executable, "-m", "thinpipe.cli", "probe"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    ) as answering:
        assert answering.stdout
        address = answering.stdout.readline().split()[-1]
        given = ["probe", "--to", address, "--seconds", "0.2"]
        shown = CliRunner().invoke(app, [*given, "--link", "100mbit,5ms"], env={"COLUMNS": "100"})
        assert shown.exit_code == 0, shown.output
        for phrase in ("up, from here", "down, to here", "round trip, median", "100.0 Mb/s", "10.00 ms"):
            assert phrase in shown.stdout
        plain = CliRunner().invoke(app, [*given, "--json"])
        assert json.loads(plain.stdout)["up"]["measured_bits_per_s"] > 1e6
        assert plain.stderr == ""
        answering.send_signal(signal.SIGINT)
        _, errors = answering.communicate(timeout=20)
        assert (answering.returncode, errors) == (0, "")


@pytest.mark.slow
def test_once_is_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "thinpipe.cli", "probe", "--listen", "127.0.0.1:0", "--once"],
        stdout=subprocess.PIPE,
        text=True,
    ) as answering:
        assert answering.stdout
        address = answering.stdout.readline().split()[-1]
        asyncio.run(ask(address, LinkProfile.parse("none"), 0.2))
        assert answering.wait(20) == 0


def test_faults_have_names() -> None:
    """Every code that a hostile peer is given is in the protocol's vocabulary."""
    assert {code for _, code in HOSTILE.values()} - {"RESOURCE_EXHAUSTED", "closed without a word"} <= set(Fault)


def test_a_probe_starts_without_torch() -> None:
    """Which takes seconds to import, and which a machine that is only measured need not have."""
    looked = "import sys, thinpipe.node.probing.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", looked], timeout=120, check=False).returncode == 0
