"""`thinpipe doctor`: can this machine host a stage, and can its neighbour reach it?

A machine cannot see by itself whether its port can be reached, because a firewall or a router may let connections out
but not in. So the neighbour is asked to connect back (`protocol.path_probe`, InfoRequest), and the incoming connection
has to prove that it is that one. The listener of any node answers, or `thinpipe probe --listen`. If there is none, the
finding says that the test was not made, and how to make it. The same answer gives the neighbour's clock and versions.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import __version__
from ...protocol.messages import PROTOCOL_VERSION
from ...protocol.path_probe import TOKEN_BYTES, Outcome, dial_back_proof
from ...sim.reports.metrics_address import MetricsAddress, MetricsAddressError
from ..addresses import ListenError, check_listen, is_loopback, split_address
from ..config import RunConfig
from ..security.certificates import spell_moment
from ..security.key_directory import KeysError
from ..security.policy import Security, choose
from . import machine
from .machine import Finding, State
from .probe_client import Visited, visit
from .reach import ProbeError

DEADLINE_S = 10.0  # for the neighbour, at each of the steps there
DIAL_BACK_S = 2.0  # for whoever dials in to say who it is
CLOCK_FAULT_S = 3.0  # hivemind takes no record from a clock that is further off (MAX_DHT_TIME_DISCREPANCY_SECONDS)
CLOCK_WARNING_S = 1.0
COLOURS: dict[State, str] = {"ok": "green", "warning": "yellow", "fault": "bold red", "not asked": "bright_black"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """listen: where this node is to listen; to: address of a neighbour's listener; keys: directory of its keys; out:
    where it would write. None: not given."""

    listen: str | None = None
    to: str | None = None
    keys: Path | None = None
    insecure: bool = False
    config: RunConfig | None = None
    out: Path = Path()

    @property
    def stages_here(self) -> int:
        """All of the run's, unless addresses say that it has machines of its own."""
        return self.config.pipeline.stages if self.config and not (self.listen or self.to) else 1


def examine(questions: Questions) -> Iterator[Finding]:
    """One finding after the other. Raises ListenError for an address that is none."""
    for address in (questions.listen, questions.to):
        if address is not None:
            split_address(address)
    config = questions.config
    yield machine.python()
    yield machine.packages()
    yield from _network(questions)
    yield machine.timer()
    yield machine.cores(questions.stages_here)
    yield machine.memory(config, questions.stages_here)
    yield machine.disk(questions.out, config)
    yield machine.gpu(config)
    yield machine.arithmetic(config)
    yield machine.speed(config)
    yield machine.root()
    yield machine.traffic_control()


# -- the network ------------------------------------------------------------------------------------------------------


def _network(questions: Questions) -> Iterator[Finding]:
    port = _port(questions.listen)
    yield port
    if questions.config and questions.config.watch.prometheus:
        yield _figures_port(MetricsAddress.parse(questions.config.watch.prometheus))
    security, keys = _keys(questions)
    yield keys
    why, remedy = None, "start thinpipe probe --listen there, and say --to HOST:PORT here"
    if security is None:
        why, remedy = "the keys come first", "see keys"
    elif questions.to is None:
        why = "no neighbour is named"
    if questions.to is None or security is None:
        for name in ("neighbour", "reachable", "clock"):
            yield Finding(name=name, state="not asked", found=str(why), remedy=remedy)
        return
    visited, came = asyncio.run(_visit(questions.to, questions.listen, security, free=port.state == "ok"))
    if isinstance(visited, ProbeError):
        remedy = "without it, nobody can tell whether this machine can be reached"
        yield Finding(name="neighbour", state="fault", found=str(visited), remedy=remedy)
        return
    yield _neighbour(questions.to, visited)
    yield _reachable(questions, visited, came)
    yield _clock(visited)


def _port(listen: str | None) -> Finding:
    if listen is None:
        remedy = "say --listen HOST:PORT, as for thinpipe node (stage 0 needs none)"
        return Finding(name="port", state="not asked", found="no address to listen on is named", remedy=remedy)
    try:
        check_listen(listen)
    except ListenError as error:
        holder = _holder(split_address(listen)[1])
        remedy = f"end {holder}, or choose another --listen" if holder else "choose another --listen"
        return Finding(name="port", state="fault", found=str(error).partition(";")[0], remedy=remedy)
    return Finding(name="port", state="ok", found=f"can listen on {listen}")


def _keys(questions: Questions) -> tuple[Security | None, Finding]:
    """What a node with these addresses and options would have; None if it would be refused."""
    try:
        security = choose(
            questions.keys,
            insecure=questions.insecure,
            listen=questions.listen,
            dial=questions.to,
            dial_option="--to",
            run=questions.config.run.name if questions.config else None,
        )
    except KeysError as error:
        found, _, remedy = str(error).partition("; ")
        return None, Finding(name="keys", state="fault", found=found, remedy=remedy)
    if security.keys is None:
        found = "none, as --insecure says" if questions.insecure else "none, and none are needed on loopback"
        return security, Finding(name="keys", state="ok", found=found)
    said = security.keys.said
    if security.warning:
        remedy = "thinpipe keys issue makes new ones; then start the node again"
        return security, Finding(name="keys", state="warning", found=security.warning, remedy=remedy)
    return security, Finding(name="keys", state="ok", found=f"for {said}, until {spell_moment(said.ends)}")


def _figures_port(endpoint: MetricsAddress) -> Finding:
    try:
        endpoint.check_free()
    except MetricsAddressError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding(name="figures", state="fault", found=found, remedy=remedy)
    return Finding(name="figures", state="ok", found=f"can serve figures at {endpoint}")


def _holder(port: int) -> str | None:
    """Who listens at that port, as far as this user may see."""
    try:
        found = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        pid = next((each.pid for each in found if each.laddr.port == port and each.pid), None)  # pyright: ignore
        return f"process {pid} ({psutil.Process(pid).name()})" if pid else None
    except (psutil.Error, OSError):
        return None


async def _visit(
    to: str, listen: str | None, security: Security, *, free: bool
) -> tuple[Visited | ProbeError, str | None]:
    """What the neighbour says; and where the call came from that proved to be its, None if none did."""
    token = secrets.token_bytes(TOKEN_BYTES)
    came: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    port = split_address(listen)[1] if listen else 0
    try:
        async with _door(listen if free else None, dial_back_proof(token), came) as own_port:
            visited = await visit(to, port=own_port or port, token=token, deadline_s=DEADLINE_S, security=security)
            if visited.outcome is Outcome.CONNECTED and own_port:
                await asyncio.wait([came], timeout=DIAL_BACK_S)
    except ProbeError as error:
        return error, None
    return visited, came.result() if came.done() else None


@asynccontextmanager
async def _door(listen: str | None, words: bytes, came: asyncio.Future[str]) -> AsyncIterator[int]:
    """Listens for the call; yields the port, 0 if it does not."""
    if listen is None:
        yield 0
        return
    callers = asyncio.Semaphore(8)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if callers.locked():
                return
            async with callers, asyncio.timeout(DIAL_BACK_S):
                said = await reader.readexactly(len(words))
            if secrets.compare_digest(said, words) and not came.done():
                came.set_result(str(writer.get_extra_info("peername")[0]))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # somebody else
        finally:
            writer.close()

    host, port = split_address(listen)
    server = await asyncio.start_server(answer, host, port, limit=1024)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _neighbour(to: str, visited: Visited) -> Finding:
    about = visited.about
    trip = f"answers in {visited.round_trip_s * 1000:.1f} ms"
    found = f"{to}: thinpipe {about.version}, {trip}{', is in a run' if about.in_a_run else ''}"
    if about.protocol_version != PROTOCOL_VERSION:
        found += f"; protocol {about.protocol_version} there, {PROTOCOL_VERSION} here"
        return Finding(name="neighbour", state="fault", found=found, remedy="install the same thinpipe at both ends")
    if about.version != __version__:
        remedy = f"the protocol is the same; install {max(about.version, __version__)} at both ends"
        return Finding(name="neighbour", state="warning", found=f"{found} ({__version__} here)", remedy=remedy)
    return Finding(name="neighbour", state="ok", found=found)


def _reachable(questions: Questions, visited: Visited, came: str | None) -> Finding:
    listen, seen_as = questions.listen, visited.about.seen_as
    if listen is None:
        remedy = "say --listen HOST:PORT: the neighbour is then asked to connect to it"
        found = f"the neighbour sees this machine as {seen_as}"
        return Finding(name="reachable", state="not asked", found=found, remedy=remedy)
    _, port = split_address(listen)
    there = f"{seen_as}:{port}"
    if came:
        return Finding(name="reachable", state="ok", found=f"the neighbour dialled {there}, and came in from {came}")
    if visited.outcome is Outcome.CONNECTED:
        found = f"the neighbour dialled {there} and was answered, but not by this machine's {listen}"
        remedy = "forward that port to this machine, or free it here and ask again"
        return Finding(name="reachable", state="fault", found=found, remedy=remedy)
    why = {
        Outcome.REFUSED: "nobody listens there",
        Outcome.SILENT: "no answer in 5 s",
        Outcome.UNREACHABLE: "no way there",
        None: "it did not try",
    }[visited.outcome]
    if is_loopback(listen) and not is_loopback(f"{seen_as}:{port}"):
        remedy = f"{listen} is this machine alone: listen on 0.0.0.0:{port}"
    elif visited.outcome is Outcome.REFUSED:
        remedy = f"is {seen_as} this machine, or its router? forward port {port} there to this one"
    else:
        remedy = f"open port {port}/tcp in the firewall of this machine, and forward it in its router"
    return Finding(name="reachable", state="fault", found=f"the neighbour dialled {there}: {why}", remedy=remedy)


def _clock(visited: Visited) -> Finding:
    off, give_s = visited.offset_s, visited.round_trip_s / 2
    found = f"the neighbour's is {abs(off):.3f} s {'ahead' if off >= 0 else 'behind'} (± {give_s:.3f} s)"
    certain = max(0.0, abs(off) - give_s)
    remedy = "let both follow a time server: timedatectl set-ntp true"
    if certain > CLOCK_FAULT_S:
        remedy = f"{remedy}; discovery takes no records from a clock that is {CLOCK_FAULT_S:g} s off"
        return Finding(name="clock", state="fault", found=found, remedy=remedy)
    if certain > CLOCK_WARNING_S:
        return Finding(name="clock", state="warning", found=found, remedy=remedy)
    return Finding(name="clock", state="ok", found=found)


# -- for people -------------------------------------------------------------------------------------------------------


def doctor(questions: Questions, *, as_json: bool) -> bool:
    """Print what was found; whether there was no fault. Raises ListenError."""
    console = Console()
    if as_json:
        findings = list(examine(questions))
        print(json.dumps(report(findings), indent=2))
    else:
        findings = list[Finding]()
        with console.status("looking", spinner="line") as status:
            for finding in examine(questions):
                findings.append(finding)
                status.update(f"looked at {finding.name}")
        console.print(table(findings))
    return not any(finding.state == "fault" for finding in findings)


def report(findings: list[Finding]) -> dict[str, Any]:
    """For --json."""
    states = [finding.state for finding in findings]
    return {
        "thinpipe": __version__,
        "protocol": PROTOCOL_VERSION,
        "faults": states.count("fault"),
        "warnings": states.count("warning"),
        "findings": [asdict(finding) for finding in findings],
    }


def table(findings: list[Finding]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    drawn.add_column("found, and what to do", ratio=1)
    for each in findings:
        said = Text(each.found)
        if each.remedy:
            said.append(f"\n→ {each.remedy}", COLOURS[each.state])
        name = "OK" if each.state == "ok" else each.state
        drawn.add_row(each.name, Text(name, COLOURS[each.state]), said)
    return drawn
