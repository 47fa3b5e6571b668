"""Nodes started by hand, and what may happen to them: any order of starting, strangers in the middle of a run,
connections that break, servers that are not the neighbour. The run ends in the reference's bits, or says why it cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.links.dialling import PERMANENT, NeighbourMismatch, dial
from thinpipe.node.links.link import Link
from thinpipe.node.links.transport import FRAME_BYTES_MAX, METHOD, SERVICE, listening
from thinpipe.node.run_records import Tracer
from thinpipe.protocol.errors import Fault
from thinpipe.protocol.messages import Greeting, Limits, Refusal, decode_frame, encode_frame
from thinpipe.protocol.session import LinkSession
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.reports.summary import read_records

from .builders import identity
from .conftest import TinyConfig
from .in_memory import run_reference
from .real_node import LIMITS, activation, attempt, free_address, hello_of, node, parts, proxy, until

STEPS = 10
SLOW = ("--link", "2mbit,5ms")  # so that there is a middle of the run to be disturbed in


@pytest.fixture(scope="module")
def config(tiny: TinyConfig) -> RunConfig:
    return tiny({"pipeline.stages": 2, "run.steps": STEPS, "run.eval_every": 4, "link.greeting_timeout_s": 1.0})


@pytest.fixture(scope="module")
def expected(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run_reference(config, tmp_path_factory.mktemp("reference")).state_sha256


def outcome(run: Path) -> list[str]:
    records = [read_records(run / f"stage-{stage}.jsonl") for stage in range(2)]
    return [[record for record in of if record["event"] == "end"][-1]["state_sha256"] for of in records]


def faults(run: Path, stage: int) -> list[str]:
    return [record["code"] for record in read_records(run / f"stage-{stage}.jsonl") if record["event"] == "fault"]


@pytest.mark.slow
def test_broken_connections_and_strangers_leave_no_trace_in_the_result(
    config: RunConfig, expected: list[str], tmp_path: Path
) -> None:
    """The last stage is started first. Every second step something happens to the link; strangers keep knocking."""
    (tmp_path / "run.toml").write_text(dump_config(config))
    address = free_address()
    connect_probes = [encode_frame(hello_of(config, incarnation=31337)), b"\xff" * 64]
    answers: list[str] = []
    with node(tmp_path, 1, "--listen", address, *SLOW) as lower:
        until(lambda: "listens on" in (tmp_path / "stage-1.log").read_text() or lower.poll() is not None, "a listener")
        with proxy(address) as between, node(tmp_path, 0, "--next", between.address, *SLOW) as upper:

            def steps() -> int:
                return sum(record["event"] == "step" for record in read_records(tmp_path / "stage-0.jsonl"))

            for due in range(1, STEPS - 1, 2):
                until(lambda due=due: steps() >= due or None not in (upper.poll(), lower.poll()), f"step {due}")
                answers += [asyncio.run(attempt(address, [connect_probe])) for connect_probe in connect_probes]
                between.cut(half=due % 4 == 1)
            until(lambda: None not in (upper.poll(), lower.poll()), "the run to end")
            said = [(tmp_path / f"stage-{stage}.log").read_text() for stage in range(2)]
            assert (upper.returncode, lower.returncode) == (0, 0), said
            assert between.connections >= 4
    assert outcome(tmp_path) == expected
    assert set(answers) <= {"unexpected-frame", "restarted", "malformed-frame"}  # by whether a connection stood
    assert faults(tmp_path, 0).count("connection-lost") >= 3
    assert "unexpected-frame" in faults(tmp_path, 1)
    assert "Traceback" not in "".join(said)


# -- servers that are not the neighbour ---------------------------------------------------------------------------


Script = Callable[[grpc.aio.ServicerContext], Awaitable[None]]


@asynccontextmanager
async def serving(address: str, script: Script | None) -> AsyncIterator[int]:
    """A gRPC server at `address` that answers each stream as `script(context)` does; None: it has no such method."""

    async def handle(_: object, context: grpc.aio.ServicerContext) -> None:
        assert script
        await script(context)

    server = grpc.aio.server()
    if script:
        handler = grpc.stream_stream_rpc_method_handler(handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Link": handler}),))
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(grace=0)


async def says_nothing(context: grpc.aio.ServicerContext) -> None:
    await context.read()
    await asyncio.sleep(60)


async def hangs_up(context: grpc.aio.ServicerContext) -> None:
    await context.read()


async def talks_nonsense(context: grpc.aio.ServicerContext) -> None:
    await context.read()
    await context.write(b"\xff" * 1000)
    await context.read()


async def talks_too_much(context: grpc.aio.ServicerContext) -> None:
    await context.read()
    await context.write(bytes(FRAME_BYTES_MAX + 1))
    await context.read()


async def is_busy(context: grpc.aio.ServicerContext) -> None:
    await context.read()
    await context.write(encode_frame(Refusal(code="unexpected-frame", reason="busy")))


async def invents_codes(context: grpc.aio.ServicerContext) -> None:
    await context.read()
    await context.write(encode_frame(Refusal(code="no-such-code", reason="out of spite")))


STRANGE = [says_nothing, hangs_up, talks_nonsense, talks_too_much, is_busy, invents_codes]


@pytest.mark.slow
def test_a_node_outlasts_every_strange_server_until_its_neighbour_is_there(
    config: RunConfig, expected: list[str], tmp_path: Path
) -> None:
    """The first stage is started first, and meets at the neighbour's address one stranger after the other."""
    (tmp_path / "run.toml").write_text(dump_config(config))
    address = free_address()
    met: list[Script] = []

    async def next_one(context: grpc.aio.ServicerContext) -> None:
        script = STRANGE[len(met)] if len(met) < len(STRANGE) else hangs_up
        met.append(script)
        await script(context)

    async def strangers() -> None:
        async with serving(address, next_one):
            all_met = lambda: len(met) > len(STRANGE) or upper.poll() is not None  # noqa: E731
            await asyncio.to_thread(until, all_met, "the node to meet them all")

    log = tmp_path / "stage-0.log"
    with node(tmp_path, 0, "--next", address) as upper:
        asyncio.run(strangers())
        assert upper.poll() is None, log.read_text()
        with node(tmp_path, 1, "--listen", address) as lower:
            until(lambda: None not in (upper.poll(), lower.poll()), "the run to end")
            assert (upper.returncode, lower.returncode) == (0, 0), log.read_text()
    assert outcome(tmp_path) == expected
    codes = faults(tmp_path, 0)
    assert {"timeout", "connection-lost", "malformed-frame", "unexpected-frame"} <= set(codes)
    assert "unknown code 'no-such-code': out of spite" in log.read_text()
    assert "Traceback" not in log.read_text()


def make_link(stage: int = 0) -> Link:
    return Link(
        session=LinkSession(
            identity=identity(stage, configuration="c" * 64),
            peer_stage=1 - stage,
            limits=Limits(message_bytes=1024),
            receive_buffer_bytes=2**20,
        ),
        profile=LinkProfile.parse("none"),
        chunk_bytes=128 * 1024,
        send_buffer_bytes=2**20,
        uncapped_window_bytes=2**20,
        seed=1,
        tracer=Tracer(stage=stage, enabled=False),
    )


async def dialled(
    script: Script | None, connect_timeout_s: float = 10.0
) -> tuple[Exception | None, list[tuple[str, str]]]:
    """What `dial` ends with at such a server, and what it reported before."""
    reports: list[tuple[str, str]] = []
    async with asyncio.timeout(20), serving("127.0.0.1:0", script) as port:
        try:
            await dial(
                f"127.0.0.1:{port}",
                make_link(),
                greeting_timeout_s=0.3,
                deadline_s=lambda: connect_timeout_s,
                report=lambda code, line: reports.append((code, line)),
            )
        except (NeighbourMismatch, TimeoutError) as error:
            return error, reports
    return None, reports


NEIGHBOUR = Greeting(
    run_id="r", configuration="c" * 64, stage=1, stages=2, incarnation=2, next_sequence=0, granted_bytes=2**20
)
OTHERS = {
    "protocol version: stage 0 expects 1, the peer (stage 1) says 9": {"protocol_version": 9},
    "run id: stage 0 expects r, the peer (stage 1) says other": {"run_id": "other"},
    "configuration hash: stage 0 expects cccccccccccc…, the peer (stage 1) says dddddddddddd…": {
        "configuration": "d" * 64
    },
    "number of stages: stage 0 expects 2, the peer (stage 1) says 3": {"stages": 3},
    "neighbour's stage index: stage 0 expects 1, the peer (stage 2) says 2": {"stage": 2},
    "stage 1 asks for chunk 7": {"next_sequence": 7},
}


@pytest.mark.parametrize(("said", "other"), OTHERS.items(), ids=[next(iter(other)) for other in OTHERS.values()])
def test_a_neighbour_that_can_never_agree_ends_the_dialling(said: str, other: dict[str, object]) -> None:
    told: list[Refusal] = []

    async def differs(context: grpc.aio.ServicerContext) -> None:
        await context.read()
        await context.write(encode_frame(replace(NEIGHBOUR, **other)))
        refusal = decode_frame(await context.read(), LIMITS)
        assert isinstance(refusal, Refusal)
        told.append(refusal)

    error, reports = asyncio.run(dialled(differs))
    assert isinstance(error, NeighbourMismatch)
    assert said in str(error)
    assert reports == []
    assert said in told[0].reason  # the other end can print both values as well


@pytest.mark.parametrize("fault", sorted(PERMANENT))
def test_a_refusal_that_will_come_again_ends_the_dialling(fault: Fault) -> None:
    async def refuses(context: grpc.aio.ServicerContext) -> None:
        await context.read()
        await context.write(encode_frame(Refusal(code=fault, reason="both values")))

    error, _ = asyncio.run(dialled(refuses))
    assert isinstance(error, NeighbourMismatch)
    assert "boundary 0-1: refused by the node at 127.0.0.1:" in str(error)
    assert f"{fault}: both values" in str(error)


@pytest.fixture(scope="module")
def met() -> dict[Script | None, tuple[Exception | None, list[tuple[str, str]]]]:
    """What came of dialling each stranger, all at the same time."""

    async def each() -> list[tuple[Exception | None, list[tuple[str, str]]]]:
        return await asyncio.gather(*(dialled(script, connect_timeout_s=0.5) for script in (*STRANGE, None)))

    return dict(zip((*STRANGE, None), asyncio.run(each()), strict=True))


@pytest.mark.parametrize("script", [*STRANGE, None], ids=lambda script: script.__name__ if script else "no such method")
def test_dialling_a_stranger_does_not_go_on_for_ever(
    script: Script | None, met: dict[Script | None, tuple[Exception | None, list[tuple[str, str]]]]
) -> None:
    error, reports = met[script]
    assert isinstance(error, TimeoutError)
    assert "boundary 0-1: no connection to 127.0.0.1:" in str(error)
    assert "is stage 1 running there?" in str(error)
    assert reports
    if script in (says_nothing, talks_nonsense, is_busy):
        assert f"the last one ended with {'a refusal' if script is is_busy else reports[0][0]}" in str(error)


# -- one listener, several callers --------------------------------------------------------------------------------


async def call_in(address: str, incarnation: int | None, until_then: Awaitable[object]) -> list[type]:
    """Open a stream and greet as that process (None: stay silent); the kinds of frame that have come by then."""
    kinds: list[type] = []
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)()
        await call.wait_for_connection()
        if incarnation is not None:
            await call.write(encode_frame(replace(NEIGHBOUR, stage=0, incarnation=incarnation)))
            kinds.append(type(decode_frame(await call.read(), LIMITS)))
        await until_then
        with suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(0.2):
                while isinstance(raw := await call.read(), bytes):
                    kinds.append(type(decode_frame(raw, LIMITS)))
    return kinds


def test_who_may_take_whose_place() -> None:
    """A silent caller takes nobody's; a stranger not that of a peer that is there; a process its own, half-dead one."""

    async def job() -> list[list[type]]:
        link = make_link(stage=1)
        async with listening("127.0.0.1:0", link, greeting_timeout_s=5, report=lambda *_: None) as port:
            address = f"127.0.0.1:{port}"
            over = asyncio.Event()
            async with asyncio.timeout(4):  # less than what a silent caller is given
                silent = asyncio.create_task(call_in(address, None, over.wait()))
                first = asyncio.create_task(call_in(address, 5, over.wait()))
                await link.opened.wait()
                stranger = await call_in(address, 6, asyncio.sleep(0))
                again = await call_in(address, 5, asyncio.sleep(0))
                over.set()
                return [await silent, await first, stranger, again]

    assert asyncio.run(job()) == [[], [Greeting, Refusal], [Refusal], [Greeting]]


# -- the neighbour itself -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_neighbour_that_turns_bad_ends_the_run_by_name_and_a_stranger_before_it_does_not(
    config: RunConfig, tmp_path: Path
) -> None:
    """Two messages in one go, the first of them bad: the second must not be used, or it would bind the node to a
    stranger. What comes from the peer whose message was used cannot be had again."""
    (tmp_path / "run.toml").write_text(dump_config(config))
    address, log = free_address(), tmp_path / "stage-1.log"
    good = activation(config)
    bad = replace(good, body=np.full(len(good.body) // 2, 0x7FC0, dtype=np.uint16).tobytes())
    then = replace(bad, microbatch=1)
    with node(tmp_path, 1, "--listen", address) as victim:
        until(lambda: "listens on" in log.read_text() or victim.poll() is not None, "the node to listen")

        def says(incarnation: int, *frames: bytes) -> str:
            return asyncio.run(attempt(address, [encode_frame(hello_of(config, incarnation=incarnation)), *frames]))

        for incarnation in (1, 2):
            assert says(incarnation, *parts(bad), *parts(good, 1)) == "bad-payload"
            assert victim.poll() is None, log.read_text()
        assert says(3, *parts(good), *parts(then, 1)) == "bad-payload"
        until(lambda: victim.poll() is not None, "the node to end")
        assert victim.returncode == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("thinpipe: error: boundary 0-1: bad-payload: activation of step 0, microbatch 1")
    assert last.endswith("start the whole swarm again")
    assert faults(tmp_path, 1) == ["bad-payload"] * 6 + ["LinkLost"]
