"""Mutual TLS over real gRPC on loopback: the right pair talks, any other is refused by name and disturbs nobody."""

import asyncio
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from thinpipe.node.config_file import dump_config
from thinpipe.node.links.control_stream import Control
from thinpipe.node.links.dialling import NeighbourMismatch, dial, dial_control
from thinpipe.node.links.link import Link
from thinpipe.node.links.transport import METHOD, listening
from thinpipe.node.local import run_local
from thinpipe.node.probing.probe_client import ask, visit
from thinpipe.node.probing.reach import ProbeError
from thinpipe.node.run_directory import LocalRunError
from thinpipe.node.security import certificates
from thinpipe.node.security.handshake_diagnosis import PREFACE
from thinpipe.node.security.key_directory import init, issue, load
from thinpipe.node.security.policy import PLAIN, Security
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.protocol.messages import Kind, Limits, Message, Refusal, decode_frame, encode_frame
from thinpipe.protocol.path_probe import TOKEN_BYTES
from thinpipe.protocol.rollback import Rollback
from thinpipe.protocol.rollback_actions import Side
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.reports.summary import read_records

from .builders import identity
from .conftest import TinyConfig
from .in_memory import read_outcome, run_reference
from .links import make_link
from .preloaded import forks
from .real_node import node, until

NOW = datetime.now(UTC)
AGO, HENCE = NOW - timedelta(days=100), NOW + timedelta(days=100)
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Security]:
    """By name: `0`, `1`, `2` are those of the stages; most others are wrong in one way each.

    The authority is of long ago, so that what it issued can be over.
    """
    root = tmp_path_factory.mktemp("keys")
    init("r", root / "authority", days=3650, now=AGO)
    init("r", root / "foreign authority", days=365, now=NOW)
    init("other", root / "other authority", days=365, now=NOW)
    kinds = {
        "0": ([0], "authority", NOW),
        "1": ([1], "authority", NOW),
        "2": ([2], "authority", NOW),
        "all": ([*range(256)], "authority", NOW),
        "0 of lane 0": ([0], "authority", NOW),
        "1 of lane 0": ([1], "authority", NOW),
        "0 of lane 1": ([0], "authority", NOW),
        "1 of lane 1": ([1], "authority", NOW),
        "over": ([0, 1], "authority", AGO),
        "early": ([0, 1], "authority", HENCE),
        "foreign": ([0, 1], "foreign authority", NOW),
        "other run": ([0, 1], "other authority", NOW),
    }
    made = {"plain": PLAIN}
    for name, (stages, authority, moment) in kinds.items():
        lanes = [int(name[-1])] if "of lane" in name else []
        issue(stages, root / authority, root / name, lanes=lanes, days=30, now=moment)
        made[name] = Security(load(root / name, now=moment))
    keys = made["1"].keys
    foreign = made["foreign"].keys
    assert keys
    assert foreign
    # Of the same authority, which was used for two runs by hand; who shows it says that it is of `r` all the same.
    own = certificates.new_key()
    signing = load_pem_private_key((root / "authority" / "authority.key").read_bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "read", lambda _: replace(keys.said, run="q"))
        of_q = certificates.make_certificate([0, 1], own.public_key(), keys.authority, signing, now=NOW, days=30)
    own_pem = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    of_q_pem = certificates.pem(of_q)
    made["of q"] = Security(replace(keys, certificate=of_q, certificate_pem=of_q_pem, key_pem=own_pem))
    made["takes others"] = Security(replace(keys, authority_pem=foreign.authority_pem))
    return made


def make_control(stage: int, run: str = "r") -> Control:
    sent: dict[Side, Counter[str]] = {"above": Counter(), "below": Counter()}
    return Control(
        Rollback(identity(stage, run_id=run), joining=False),
        heartbeat_timeout_s=60,
        on_effect=lambda _: None,
        sent=sent,
    )


@dataclass
class Listener:
    """Stage 1, and what it complained about."""

    security: Security
    link: Link = field(default_factory=lambda: make_link(1))
    control: Control = field(default_factory=lambda: make_control(1))
    faults: list[str] = field(default_factory=list)
    address: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Listener"]:
        async with listening(
            "127.0.0.1:0",
            self.link,
            greeting_timeout_s=5,
            report=lambda code, line: self.faults.append(f"{code}: {line}"),
            control=self.control,
            security=self.security,
        ) as port:
            self.address = f"127.0.0.1:{port}"
            yield self


def run(job: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await job

    asyncio.run(bounded())


async def call(address: str, security: Security, *, run: str = "r", deadline_s: float = 10.0) -> None:
    """As stage 0 does on its control stream, until it ends. Raises NeighbourMismatch or TimeoutError."""
    await dial_control(
        address,
        make_control(0, run),
        greeting_timeout_s=5,
        deadline_s=lambda: deadline_s,
        report=lambda *_: None,
        security=security,
    )


@asynccontextmanager
async def talking(listener: Listener, security: Security) -> AsyncIterator[Link]:
    """A good pair's link; at the end messages still pass, both ways, on the same connection."""
    upper, lower, lost = make_link(0), listener.link, []
    calling = asyncio.create_task(
        dial(
            listener.address,
            upper,
            greeting_timeout_s=5,
            deadline_s=lambda: 10,
            report=lambda _, line: lost.append(line),
            security=security,
        )
    )
    await asyncio.gather(upper.opened.wait(), lower.opened.wait())
    yield upper
    for number in range(3):
        message = Message(kind=Kind.ACTIVATION, step=number, microbatch=0, codec="x", body=bytes([number]) * 300_000)
        for sender, receiver in ((upper, lower), (lower, upper)):
            await sender.send(message)
            assert bytes((await receiver.receive()).body) == message.body
    await asyncio.gather(upper.drain(10), lower.drain(10))
    await calling
    assert lost == []


@pytest.mark.parametrize(
    "pair", [("0", "1"), ("all", "all"), ("0 of lane 0", "1 of lane 0"), ("plain", "plain")], ids=str
)
def test_the_right_pair_talks(pair: tuple[str, str], made: dict[str, Security]) -> None:
    async def story() -> None:
        async with Listener(made[pair[1]]).running() as listener, talking(listener, made[pair[0]]):
            controlling = asyncio.create_task(call(listener.address, made[pair[0]]))
            await listener.control.met["above"].wait()
            controlling.cancel()
        assert listener.faults == []

    run(story())


# (who dials, who listens): what the dialler says
REFUSED = {
    ("of q", "1"): r"refused by the node .*wrong-certificate: the certificate is for stages 0-1 of run 'q', this is",
    ("0", "over"): r"the node at 127\.0\.0\.1:\d+: its certificate expired on \d{4}-.* UTC; issue it a new one",
    ("0", "early"): r"its certificate is not valid before .* UTC; are the clocks of both machines right\?",
    ("0", "foreign"): r"its certificate is from another authority than this run's; start both with keys from one",
    ("0", "other run"): r"its certificate is from another authority than this run's, for run 'other'; ",
    ("0", "of q"): r"the node at 127\.0\.0\.1:\d+: its certificate is for run 'q', not for 'r'; start it with keys of",
    ("0", "2"): r"its certificate is for stage 2 of run 'r', not for stage 1; start it with keys of its place",
    ("0", "1 of lane 1"): r"its certificate is for stage 1 of lane 1 of run 'r', not for stage 1 of lane 0; start it",
    ("0 of lane 1", "1"): (
        r"wrong-certificate: the greeting says stage 0 of lane 0 of run 'r', the certificate is for stage 0 of lane 1"
    ),
    ("0", "plain"): r"the node at 127\.0\.0\.1:\d+ speaks no TLS and this one does; start it with --keys DIR",
    ("0", "takes others"): r"does not take this node's certificate, for stage 0 of run 'r', valid from .* closed the ",
    ("plain", "1"): r"the node at 127\.0\.0\.1:\d+ speaks TLS and this one does not; start this one with --keys DIR",
    ("over", "1"): r"node\.crt: this node's own certificate expired on .* UTC; issue a new one and start it with that",
    ("early", "1"): r"this node's own certificate is not valid before",
    ("foreign", "1"): r"its certificate is from another authority than this run's",
    ("other run", "1"): r"its certificate is from another authority than this run's, for run 'r'",
    ("2", "1"): (
        r"refused by the node at .*wrong-certificate: the greeting says stage 0 of run 'r', the certificate is for "
        r"stage 2 of run 'r'; start that node with keys of its place: thinpipe keys issue --stages 0"
    ),
}


async def refused(dialler: Security, server: Security) -> tuple[Listener, BaseException | None, BaseException | None]:
    """The listener, and how a call on the control stream and one on the other stream end."""
    async with Listener(server).running() as listener:
        (control,) = await asyncio.gather(call(listener.address, dialler), return_exceptions=True)
        patient = dial(
            listener.address,
            make_link(0),
            greeting_timeout_s=5,
            deadline_s=lambda: 3.0,
            report=lambda *_: None,
            security=dialler,
        )
        (other,) = await asyncio.gather(patient, return_exceptions=True)
    return listener, control, other


Refusals = dict[tuple[str, str], tuple[Listener, BaseException | None, BaseException | None]]


@pytest.fixture(scope="module")
def refusals(made: dict[str, Security]) -> Refusals:
    """Of all pairs at once: most of them wait until patience is over."""
    found: Refusals = {}

    async def story() -> None:
        outcomes = await asyncio.gather(*(refused(made[dialler], made[server]) for dialler, server in REFUSED))
        found.update(zip(REFUSED, outcomes, strict=True))

    run(story())
    return found


@pytest.mark.alone  # a diagnosis has to be done while patience lasts
@pytest.mark.pairwise(3)
@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_a_wrong_pair_is_refused_by_name(pair: tuple[str, str], refusals: Refusals) -> None:
    """On the control stream at once; on the other one, which leaves it to that, when patience is over."""
    listener, control, other = refusals[pair]
    for error, kinds in ((control, NeighbourMismatch), (other, (NeighbourMismatch, TimeoutError))):
        assert isinstance(error, kinds)
        assert re.search(REFUSED[pair], str(error))
    assert not listener.control.met["above"].is_set()
    assert not listener.link.opened.is_set()
    told = [line for line in listener.faults if line.startswith("wrong-certificate: ")]
    assert len(told) == (2 if pair in (("2", "1"), ("of q", "1"), ("0 of lane 1", "1")) else 0)


@pytest.mark.slow
@pytest.mark.alone  # the first connection has to stand before the certificate ends
def test_a_certificate_that_ends_during_the_run(made: dict[str, Security], tmp_path: Path) -> None:
    """The connection that stands goes on; the next one fails, and both ends' reasons are named."""
    left = timedelta(seconds=8)
    began = datetime.now(UTC)
    init("r", tmp_path / "authority", days=365, now=AGO)
    for stage in (0, 1):
        issue([stage], tmp_path / "authority", tmp_path / str(stage), days=1, now=began - timedelta(days=1) + left)
    upper, lower = (Security(load(tmp_path / str(stage), now=began)) for stage in (0, 1))
    assert upper.warning
    assert "open connections stay" in upper.warning
    assert made["0"].warning is None

    async def story() -> None:
        async with Listener(lower).running() as listener, talking(listener, upper):
            await asyncio.sleep((began + left - datetime.now(UTC)).total_seconds() + 1)
            with pytest.raises(NeighbourMismatch, match=r"0/node\.crt: this node's own certificate expired"):
                await call(listener.address, upper)

    run(story())


def test_strangers_do_not_disturb_who_talks(made: dict[str, Security]) -> None:
    async def story() -> None:
        async with Listener(made["1"]).running() as listener, talking(listener, made["0"]):
            for dialler, server in REFUSED:
                if server == "1":
                    with pytest.raises(NeighbourMismatch, match=REFUSED[dialler, server]):
                        await call(listener.address, made[dialler])
            for said in (b"", b"\x16\x03\x01\xff\xff" + bytes(100), b"GET / HTTP/1.1\r\n\r\n", PREFACE):
                reader, writer = await asyncio.open_connection(*listener.address.split(":"))
                writer.write(said)
                writer.write_eof()
                assert PREFACE not in await reader.read(1000)
                writer.close()

    run(story())


def test_a_greeting_of_another_run_than_the_certificate(made: dict[str, Security]) -> None:
    async def story() -> None:
        async with Listener(made["1"]).running() as listener:
            with pytest.raises(NeighbourMismatch, match="wrong-certificate: the greeting says stage 0 of run 'q', the"):
                await call(listener.address, made["0"], run="q")

    run(story())


def test_whatever_comes_before_a_greeting_is_refused(made: dict[str, Security]) -> None:
    """The check of the first frame cannot be passed by saying something else first."""

    async def first(security: Security, address: str, frames: list[bytes]) -> str:
        async with security.channel(address, GridPlace(1), []) as channel:
            calling = channel.stream_stream(METHOD)()
            for frame in frames:
                await calling.write(frame)
            raw = await calling.read()
            assert isinstance(raw, bytes)
            refusal = decode_frame(raw, Limits(message_bytes=1))
            assert isinstance(refusal, Refusal)
            calling.cancel()
            return refusal.code

    async def story() -> None:
        hello = encode_frame(make_link(0).session.identity.greeting())
        async with Listener(made["1"]).running() as listener:
            told = await first(made["2"], listener.address, [b"\x2a\x00", hello])  # a goodbye
            assert told == "unexpected-frame"
            assert await first(made["2"], listener.address, [b"", hello]) == "malformed-frame"
            assert await first(made["2"], listener.address, [hello]) == "wrong-certificate"
            assert not listener.link.opened.is_set()

    run(story())


def test_a_probe_may_come_from_any_stage_and_from_nobody_else(made: dict[str, Security]) -> None:
    profile = LinkProfile.parse("none")

    async def story() -> None:
        async with Listener(made["1"]).running() as listener:
            for name in ("0", "1", "2", "all"):
                assert (await ask(listener.address, profile, 0.2, security=made[name])).trips
            for name, said in (
                ("plain", "speaks TLS and this one does not"),
                ("foreign", "from another authority"),
                ("over", "own certificate expired"),
                ("of q", "refuses the probe: wrong-certificate: the certificate is for stages 0-1 of run 'q', this is"),
            ):
                with pytest.raises(ProbeError, match=said) as caught:
                    await ask(listener.address, profile, 0.2, security=made[name])
                assert caught.value.exit_code == (1 if name == "of q" else 2)
        async with Listener(PLAIN).running() as listener:
            with pytest.raises(ProbeError, match="speaks no TLS and this one does"):
                await ask(listener.address, profile, 0.2, security=made["0"])

    run(story())


def test_who_is_not_there_or_says_nothing_is_no_fault_of_tls(made: dict[str, Security]) -> None:
    async def story() -> None:
        with socket.socket() as closed, socket.socket() as silent:
            for each in (closed, silent):
                each.bind(("127.0.0.1", 0))
            silent.listen()

            async def refused(address: str, name: str) -> None:
                with pytest.raises(TimeoutError, match=rf"no connection to {address} for 1 s; is stage 1 running"):
                    await call(address, made[name], deadline_s=1.0)

            addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (closed, silent)]
            await asyncio.gather(*(refused(address, name) for address in addresses for name in ("0", "plain")))

    run(story())


@pytest.mark.parametrize("host", ["a..b", ".x", "x" * 64])
def test_a_name_that_is_none_is_no_bug(host: str, made: dict[str, Security]) -> None:
    """It may come from a stranger's record."""

    async def story() -> None:
        for name in ("0", "plain"):
            with pytest.raises(TimeoutError, match="no connection to"):
                await call(f"{host}:7001", made[name], deadline_s=0.2)

    run(story())


async def settle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP/2 server that takes a connection, answers pings, and lets no stream begin (RFC 9113)."""
    with suppress(asyncio.IncompleteReadError, ConnectionError), closing(writer):
        await reader.readexactly(24)  # the client's preface
        most_streams = struct.pack(">HI", 3, 0)
        writer.write(struct.pack(">I", len(most_streams))[1:] + bytes([4, 0]) + bytes(4) + most_streams)
        while True:
            head = await reader.readexactly(9)
            body = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind in (4, 6) and not flags & 1:  # SETTINGS, PING: acknowledged
                said = body if kind == 6 else b""
                writer.write(struct.pack(">I", len(said))[1:] + bytes([kind, 1]) + bytes(4) + said)


@pytest.mark.slow
def test_who_lets_no_stream_begin_is_given_up() -> None:
    """A listener that is no node can hold nobody up: each attempt ends, and the address is asked for again."""

    async def story() -> None:
        asked = 0

        async def where() -> str:
            nonlocal asked
            asked += 1
            return address

        async with await asyncio.start_server(settle, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            waits = {"greeting_timeout_s": 0.5, "deadline_s": lambda: 3.0, "report": lambda *_: None}
            with pytest.raises(TimeoutError):
                await dial_control(where, make_control(0), **waits)
            assert asked > 1
            with pytest.raises(TimeoutError):
                await dial(address, make_link(0), **waits)
            with pytest.raises(ProbeError, match=r"takes no visit within 0\.5 s"):
                await visit(address, port=0, token=bytes(TOKEN_BYTES), deadline_s=0.5)
            with pytest.raises(ProbeError, match=r"takes no probe within 0\.5 s"):
                await ask(address, LinkProfile.parse("none"), 0.2, deadline_s=0.5)

    run(story())


def test_a_replacement_with_wrong_keys_is_said_and_waited_for(made: dict[str, Security]) -> None:
    """Once the neighbour was there, no process that takes its address ends this one."""
    reports: list[str] = []

    async def story() -> None:
        control = make_control(0)
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(Listener(made["1"]).running())
            port = first.address
            calling = asyncio.create_task(
                dial_control(
                    port,
                    control,
                    greeting_timeout_s=5,
                    deadline_s=lambda: 15,
                    report=lambda code, line: reports.append(f"{code}: {line}"),
                    security=made["0"],
                )
            )
            await control.met["below"].wait()
            await stack.aclose()
        for name in ("foreign", "1"):
            replacement = Listener(made[name])
            async with listening(
                port,
                replacement.link,
                greeting_timeout_s=5,
                report=lambda *_: None,
                control=replacement.control,
                security=replacement.security,
            ):
                if name == "1":
                    await replacement.control.met["above"].wait()
                else:
                    while not any(line.startswith("tls: ") for line in reports):  # noqa: ASYNC110 (no event tells)
                        await asyncio.sleep(0.05)
                    assert not calling.done()
        calling.cancel()

    run(story())
    (told,) = [line for line in reports if line.startswith("tls: ")]
    assert "its certificate is from another authority" in told


# -- real processes ---------------------------------------------------------------------------------------------------


def keys_for(stages: list[int], root: Path, run: str = "run", lanes: Sequence[int] = ()) -> Path:
    if not (root / "authority").exists():
        init(run, root / "authority", days=365, now=NOW)
    out = root / f"node-{'-'.join(map(str, stages))}"
    issue(stages, root / "authority", out, lanes=lanes, days=30, now=NOW)
    return out


@pytest.mark.slow
def test_a_swarm_over_tls_ends_in_the_same_bits(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "codec.codec": "int8"})
    run_local(config, tmp_path / "swarm", quiet=True, keys=keys_for([0, 1], tmp_path), forks=forks())
    assert read_outcome(tmp_path / "swarm", 2) == run_reference(config, tmp_path / "reference")
    for stage in range(2):
        assert read_records(tmp_path / "swarm" / f"stage-{stage}.jsonl")[0]["tls"] is True
    run_local(config, tmp_path / "plain", quiet=True, forks=forks())
    assert read_outcome(tmp_path / "plain", 2) == read_outcome(tmp_path / "swarm", 2)
    assert read_records(tmp_path / "plain" / "stage-0.jsonl")[0]["tls"] is False


def test_keys_for_some_of_the_stages_are_refused_before_anything_starts(tiny: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(LocalRunError, match=r"is for stage 0 of run 'run', not for stage 1") as caught:
        run_local(tiny({"pipeline.stages": 2}), tmp_path / "swarm", quiet=True, keys=keys_for([0], tmp_path))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "swarm").exists()


def test_keys_for_some_of_the_lanes_are_refused_too(tiny: TinyConfig, tmp_path: Path) -> None:
    config, keys = tiny({"pipeline.stages": 2, "lanes.count": 2}), keys_for([0, 1], tmp_path, lanes=[1])
    with pytest.raises(LocalRunError, match=r"is for stages 0-1 of lane 1 of run 'run', not for stage 0 of lane 0"):
        run_local(config, tmp_path / "swarm", quiet=True, keys=keys)


@pytest.mark.slow
def test_two_nodes_with_keys_of_two_authorities_say_so_and_end(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2})))
    other = tmp_path / "other"
    good, bad = keys_for([1], tmp_path), keys_for([0], other)
    address = f"127.0.0.1:{_free_port()}"
    with node(tmp_path, 1, "--listen", address, "--keys", str(good)):
        log = tmp_path / "stage-1.log"
        until(lambda: "listens on" in log.read_text(), "stage 1 to listen")
        with node(tmp_path, 0, "--next", address, "--keys", str(bad)) as dialler:
            assert dialler.wait(60) == 2
    line = (tmp_path / "stage-0.log").read_text().splitlines()[-1]
    assert f"the node at {address}: its certificate is from another authority than this run's; start both with" in line


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]
