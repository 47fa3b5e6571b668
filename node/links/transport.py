"""gRPC: two bidirectional streams for each boundary, opened by the upstream node. It moves frames as bytes and knows no
rules.

Link carries tensors within one generation, Control outlives generations; Probe measures the path, for anybody who
asks, Swarm (node/discovery/rendezvous.py) answers nodes that want to join, and Rounds (node/lanes/lateral_links.py)
joins the lanes, where there are any. Context is as Link is, between lanes (node/context/context_links.py).

The generic handler takes raw bytes on purpose: parsing happens in `protocol.messages`, so a malformed frame ends as a
named refusal at both ends and not as gRPC's "exception deserializing request". Message limits and keep-alive are set
on both ends; the server admits few streams at once and gives a stranger only the greeting deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from ...protocol.errors import Fault, RefusedError, RemoteProtocolError
from ...protocol.messages import CHUNK_BYTES_MAX, ENVELOPE_BYTES_MAX, Refusal, encode_frame
from ...protocol.path_probe import ProbeBusy
from ..addresses import ListenError
from ..security.policy import PLAIN, Security
from .link import GenerationEnded, Link, Read, Write
from .probe_server import ProbeService

if TYPE_CHECKING:  # it leads to torch, which takes seconds that `thinpipe probe` has no use for
    from .control_stream import Control

SERVICE = "thinpipe.v1.Stage"
METHOD, CONTROL_METHOD, PROBE_METHOD = f"/{SERVICE}/Link", f"/{SERVICE}/Control", f"/{SERVICE}/Probe"
ROUNDS_METHOD, CONTEXT_METHOD = f"/{SERVICE}/Rounds", f"/{SERVICE}/Context"
CONNECTIONS_MAX = 8  # the neighbour, its next connections while the old ones die, and a few strangers
REFUSAL_TIMEOUT_S = 2.0
# A new generation is on its way here or there: dial again at once.
PASSING = {Fault.GENERATION, Fault.STOPPED}

T = TypeVar("T")
Report = Callable[[str, str], None]  # (fault code, one line for people)
StreamHandler = Callable[[object, grpc.aio.ServicerContext], Awaitable[None]]


def channel_options(frame_bytes_max: int) -> list[tuple[str, int]]:
    """The same on both ends: message limits from the protocol, keep-alive that notices a dead path in half a minute."""
    return [
        ("grpc.max_receive_message_length", frame_bytes_max),
        ("grpc.max_send_message_length", frame_bytes_max),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),  # gRPC's own are 1 s and 120 s: a replacement would be long unseen
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # gRPC's own is 30 s: a node that comes back under its name at another address would be dialled at the old one.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # Or a new channel would take over the connection of the one before it, which may be why that one was given up.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.so_reuseport", 0),  # a busy port must be an error, not a silent share
        ("grpc.enable_http_proxy", 0),
    ]


FRAME_BYTES_MAX = CHUNK_BYTES_MAX + ENVELOPE_BYTES_MAX


@asynccontextmanager
async def listening(
    address: str,
    link: Link | Callable[[], Link | None],
    *,
    greeting_timeout_s: float,
    report: Report,
    control: Control | None = None,
    more: dict[str, StreamHandler] | None = None,
    more_streams: int = 0,
    security: Security = PLAIN,
) -> AsyncIterator[int]:
    """Serve the neighbour above on `address` (host:port) while the body runs; yields the port.

    `link`: the present one, None between two generations. A second stream on it is admitted only if it is the same
    process dialling again (its first stream is then half-dead and is closed); anything else is refused while a stream
    is open. `more`: methods to serve beside the run's own; `more_streams` of them are expected to last. Raises
    ListenError for a taken or malformed address.
    """
    current = link if callable(link) else lambda: link
    waits = {"greeting_timeout_s": greeting_timeout_s, "report": report, "security": security}
    links = LinkStreams(lambda _: current(), **waits)

    def busy() -> bool:
        """Whether a neighbour has come, so that the wire is the run's. (Somebody who only greeted on Link, and is gone,
        was none.)"""
        now, met = current(), control is not None and any(event.is_set() for event in control.met.values())
        return met or (now is not None and now.serving.locked())

    probes = ProbeService(busy=busy, terms_timeout_s=greeting_timeout_s)
    handlers = {"Link": links.serve, "Probe": probe_handler(probes, report, security)}
    handlers |= {"Rounds": _without_lanes(report), "Context": _without_chunks(report), **(more or {})}
    if control:
        handlers["Control"] = control_handler(
            control, greeting_timeout_s, report, security, stopping=lambda: links.stopping
        )
    async with serving(address, handlers, security, more_streams=more_streams) as port:
        try:
            yield port
        finally:
            links.stopping = True


@asynccontextmanager
async def serving(
    address: str, streams: dict[str, StreamHandler], security: Security = PLAIN, *, more_streams: int = 0
) -> AsyncIterator[int]:
    """A server with these methods, while the body runs; yields the port. more_streams: that are expected to last,
    beside those to a neighbour. Raises ListenError."""
    streams_max = CONNECTIONS_MAX + 2 * more_streams  # each may be dialled again while the old one dies
    server = grpc.aio.server(options=channel_options(FRAME_BYTES_MAX), maximum_concurrent_rpcs=streams_max)
    handlers = {name: grpc.stream_stream_rpc_method_handler(handler) for name, handler in streams.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        port = security.add_port(server, address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ListenError(
            f"cannot listen on {address}: it is in use or not host:port of this machine; choose another --listen"
        )
    await server.start()
    try:
        yield port
    finally:
        await server.stop(grace=1.0)


def probe_handler(probes: ProbeService, report: Report, security: Security = PLAIN) -> StreamHandler:
    """What a server does with a stream of the method Probe."""

    async def probe(_: object, context: grpc.aio.ServicerContext) -> None:
        read, write = both_ways(context)
        try:
            security.admit_any(context)
            await probes.serve(read, write, context.peer())
        except RemoteProtocolError as error:
            if not isinstance(error, ProbeBusy):
                report(error.fault, f"probe: refused the peer at {context.peer()}: {error}")
            await tell(write, error)
            await linger(read)

    return probe


def _without_lanes(report: Report) -> StreamHandler:
    """What a server does with a stream of the method Rounds that it has no use for."""
    reason = "this node has no lanes beside it; check the lanes and addresses of both"
    return _refusing("lateral link", reason, report)


def _without_chunks(report: Report) -> StreamHandler:
    """The same of the method Context."""
    reason = "lanes of this node hold no chunks of one sequence; check the settings and addresses of both"
    return _refusing("context link", reason, report)


def _refusing(what: str, reason: str, report: Report) -> StreamHandler:
    async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
        read, write = both_ways(context)
        error = RemoteProtocolError(Fault.LANE, reason)
        report(error.fault, f"{what}: refused the peer at {context.peer()}: {error}")
        await tell(write, error)
        await linger(read)

    return refuse


def control_handler(
    control: Control,
    greeting_timeout_s: float,
    report: Report,
    security: Security = PLAIN,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> StreamHandler:
    """What a server does with a stream of the method Control, of whichever neighbour dials this node. stopping: that a
    connection ends is nothing to report any more."""

    async def converse(_: object, context: grpc.aio.ServicerContext) -> None:
        receive, write = both_ways(context)
        admitted = False

        async def read() -> bytes | None:
            nonlocal admitted
            frame = await receive()
            if frame is not None and not admitted:
                identity = control.machine.identity
                security.admit(context, frame, identity.place_of if identity.chain else None)
                admitted = True
            return frame

        try:
            await control.converse(None, read, write, speaks_first=False, greeting_timeout_s=greeting_timeout_s)
        except RemoteProtocolError as error:
            report(error.fault, f"control stream: refused the peer at {context.peer()}: {error}")
            await tell(write, error)
            await linger(read)
        except (RefusedError, ConnectionError) as error:
            if not stopping():
                report("connection-lost", f"control stream from {context.peer()}: {error}")

    return converse


class LinkStreams:
    """What a server does with each stream of links that a peer opens. find: the link for which a first frame is meant
    (None: it has not come yet), None between two generations; raises RemoteProtocolError where there is none. what: of
    which kind they are."""

    def __init__(
        self,
        find: Callable[[bytes | None], Link | None],
        *,
        greeting_timeout_s: float,
        report: Report,
        security: Security = PLAIN,
        what: str = "link",
    ) -> None:
        self.stopping = False
        self._find, self._what = find, what
        self._greeting_timeout_s, self._report, self._security = greeting_timeout_s, report, security

    async def serve(self, _: object, context: grpc.aio.ServicerContext) -> None:
        receive, write = both_ways(context)
        first: list[bytes] = []

        async def read() -> bytes | None:
            return first.pop() if first else await receive()

        peer, ended, refused, link = context.peer(), "broke", False, self._find(None)

        async def refuse(error: RemoteProtocolError) -> None:
            nonlocal ended, refused
            refused = True
            ended = ""  # said here before it is told there: the peer may be gone as soon as it knows
            if error.fault is not Fault.STOPPED:
                self._report(error.fault, f"{link.name if link else self._what}: refused the peer at {peer}: {error}")
            await tell(write, error)

        try:
            try:
                async with asyncio.timeout(self._greeting_timeout_s):  # who says nothing takes nobody's place
                    frame = await read()
            except TimeoutError:
                reason = f"no greeting within {self._greeting_timeout_s:g} s"
                return await refuse(RemoteProtocolError(Fault.TIMEOUT, reason))
            if frame is None:
                return None
            try:
                self._security.admit(context, frame)
                link = self._find(frame)
            except RemoteProtocolError as error:
                await refuse(error)
                return await linger(read)
            if link is None:
                await refuse(RemoteProtocolError(Fault.STOPPED, "this stage waits for a new generation; dial again"))
                return await linger(read)
            if link.serving.locked() and not link.take_over(frame):
                reason = f"{link.name} has a connection already; close that one first"
                await refuse(RemoteProtocolError(Fault.UNEXPECTED, reason))
                return await linger(read)
            first.append(frame)
            async with link.serving:
                try:
                    await link.attach(read, write, speaks_first=False, greeting_timeout_s=self._greeting_timeout_s)
                    ended = "was ended there"
                except GenerationEnded:
                    ended = ""
                except RemoteProtocolError as error:
                    await refuse(error)
                except RefusedError as error:
                    ended = ""
                    if error.fault not in PASSING:
                        self._report(error.fault, f"{link.name}: refused by the peer at {peer}: {error}")
                finally:
                    link.fix_peer()
            if refused:
                await linger(read)
        finally:  # by a cancellation too: gRPC cancels the handler when the peer is gone
            if ended and not (self.stopping or link is None or link.finished or link.over):
                self._report("connection-lost", f"{link.name}: the connection from {peer} {ended}")


async def tell(write: Write, error: RemoteProtocolError) -> None:
    """Why we refuse. That the peer cannot be told, being gone or not listening, matters less than the reason itself."""
    with suppress(Exception):
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            await write(encode_frame(Refusal(code=error.fault, reason=error.reason)))


async def linger(read: Read) -> None:
    """Ending a stream on which the peer still writes may overtake the refusal: read on until the peer ends it."""
    with suppress(Exception):
        async with asyncio.timeout(REFUSAL_TIMEOUT_S):
            while await read() is not None:
                pass


def both_ways(stream: Any) -> tuple[Read, Write]:
    """What reads frames from gRPC's end of a stream, a call's or a context's, and what writes them; uncancelled. What
    reads gives None at the end of the stream, which in gRPC is an object of its own."""
    receive = uncancelled(stream.read)

    async def read() -> bytes | None:
        frame = await receive()
        return frame if isinstance(frame, bytes) else None

    return read, uncancelled(stream.write)


def uncancelled(operation: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """gRPC takes the cancellation of a read or a write for that of the whole call, and with it of what was written
    last. So the operation runs on, and the next one waits for it."""
    running: asyncio.Future[T] | None = None

    async def run(*arguments: bytes) -> T:
        nonlocal running
        if running is not None and not running.done():
            await asyncio.wait([running])
        running = asyncio.ensure_future(operation(*arguments))
        running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, if nobody waits for it
        return await asyncio.shield(running)

    return run
