"""The upstream end of a boundary's two streams: dial, retry while that can help, and say why when it cannot.

Where the stage below is may change: a replacement has another address. So the address may be looked up before each
attempt (`Where`), and an address found in this way is dropped after a few seconds without a connection. A pause of this
process (`node.process_pause`) says nothing of the stage below, so the wait for it begins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio

from ...protocol.errors import Fault, ProtocolError, RefusedError, RemoteProtocolError
from ...protocol.grid_place import GridPlace
from ...protocol.rollback_actions import Side
from ..security.policy import PLAIN, Security
from .control_stream import Control
from .link import LAST_WORD_S, GenerationEnded, Link, Read
from .outgoing import Write
from .transport import (
    CONTEXT_METHOD,
    CONTROL_METHOD,
    FRAME_BYTES_MAX,
    METHOD,
    PASSING,
    Report,
    both_ways,
    channel_options,
    tell,
)

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 2.0
ASK_AGAIN_S = 4.0  # without a connection; a name, a handshake and a slow path together take less
Where = Callable[[], Awaitable[str | None]]  # host:port of the stage below now; None: nobody knows
# A peer that differs in one of these will differ again: nothing is gained by dialling it anew.
PERMANENT = {
    Fault.PROTOCOL_VERSION,
    Fault.RUN_ID,
    Fault.CONFIGURATION,
    Fault.STAGE,
    Fault.LANE,
    Fault.CERTIFICATE,
    Fault.FENCED,
    Fault.INCARNATION,
    Fault.RESUME,
}


# Refused here, these mean that the process there is the wrong one for its place, and the right one may still come.
THEIR_PLACE = {Fault.FENCED, Fault.INCARNATION}


def hopeless(error: ProtocolError, where: str | Where) -> bool:
    """Of an address that was found, and not given by the user, only that this process was replaced: else a stranger's
    record, or a stale one, could end a node; the right one may be found next."""
    refused = isinstance(error, RefusedError)
    if not isinstance(where, str):
        return refused and error.fault is Fault.FENCED
    return error.fault in PERMANENT and (refused or error.fault not in THEIR_PLACE)


class NeighbourMismatch(ValueError):
    """The node at the other end is not the neighbour that this run needs."""


class Unconnected:
    """How long there has been no connection. paused_ago_s: how long ago the last pause of this process ended."""

    def __init__(self, paused_ago_s: Callable[[], float]) -> None:
        self._paused_ago_s = paused_ago_s
        self.begin()

    def begin(self) -> None:
        """There was one until now."""
        self._since_s = asyncio.get_running_loop().time()

    def left_s(self, deadline_s: float) -> float:
        """Of so many seconds without a connection."""
        now = asyncio.get_running_loop().time()
        return max(self._since_s, now - self._paused_ago_s()) + deadline_s - now


def never_paused() -> float:
    """For who is not watched."""
    return float("inf")


async def dial(
    where: str | Where,
    link: Link,
    *,
    greeting_timeout_s: float,
    deadline_s: Callable[[], float],
    report: Report,
    security: Security = PLAIN,
    paused_ago_s: Callable[[], float] = never_paused,
) -> None:
    """Keep a stream to the neighbour below, or to a lower lane, open until both sides said goodbye.

    Retries while the neighbour is not there yet or the connection breaks, also where that may have read our goodbye or
    not: it would wait in vain. Raises NeighbourMismatch when the two can never agree (another run, configuration,
    stage), and TimeoutError after `deadline_s()` without a connection, or after as long from the end of this process's
    last pause on; but not where only the goodbye is left to be said.
    """
    unconnected, pause_s = Unconnected(paused_ago_s), RETRY_FIRST_S
    unlike = ""
    while not link.finished:
        link.opened.clear()
        connect_timeout_s = deadline_s()
        address, attempt_s = await find_address(where, unconnected.left_s(connect_timeout_s))
        try:
            await _one_connection(address, link, attempt_s, greeting_timeout_s, security)
        except NoTls as error:  # that the control stream tells; here it is told if it stays so
            unlike = f"{error}; "
        except NotReached:
            if unconnected.left_s(connect_timeout_s) > 0:  # it may be somewhere else by now
                await asyncio.sleep(RETRY_FIRST_S)
                continue
            if link.parting:
                return
            why = f"the last one ended with {link.fault}; " if link.fault else unlike
            raise TimeoutError(
                f"{link.name}: no connection to {address} for {connect_timeout_s:g} s; "
                f"{why}is {link.session.peer_name} running there?"
            ) from None
        except ProtocolError as error:
            blame = "refused by" if isinstance(error, RefusedError) else "refused"
            line = f"{link.name}: {blame} the node at {address}: {error}"
            if hopeless(error, where):
                if link.parting:
                    return
                raise NeighbourMismatch(line) from None
            if error.fault in PASSING:
                pause_s = RETRY_FIRST_S
            else:
                report(error.fault, line)
        except GenerationEnded:
            return
        except (OSError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            if not link.finished:
                detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                report("connection-lost", f"{link.name}: the connection to {address} broke ({detail})")
        else:
            if not link.finished:
                report("connection-lost", f"{link.name}: the node at {address} ended the stream")
        if link.opened.is_set():
            unconnected.begin()
            pause_s, unlike = RETRY_FIRST_S, ""
        if not link.finished:
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_MOST_S, 2 * pause_s)


class NotReached(Exception):
    """Nobody listens there, or not in time."""


class NoTls(Exception):
    """Somebody is there, and the two cannot agree on TLS; the message is a line for people."""


NOWHERE = "any node of that stage, since none is announced that may be dialled"


async def find_address(where: str | Where, remaining_s: float) -> tuple[str, float]:
    """The address to dial, and for how long to try; 0 s: there is nobody to dial."""
    if isinstance(where, str):
        return where, remaining_s
    address = await where()
    return (NOWHERE, 0.0) if address is None else (address, min(ASK_AGAIN_S, remaining_s))


async def _one_connection(
    address: str, link: Link, connect_timeout_s: float, greeting_timeout_s: float, security: Security
) -> None:
    method = CONTEXT_METHOD if link.of_context else METHOD
    place = link.session.place
    opening = stream_to(address, method, connect_timeout_s, greeting_timeout_s, security, place)
    heard = False
    try:
        async with opening as (call, read, write):
            await link.attach(read, write, speaks_first=True, greeting_timeout_s=greeting_timeout_s)
            heard = await end_gently(call, read, greeting_timeout_s)
    finally:
        if not heard:
            link.unheard()
        link.fix_peer()


async def dial_control(
    where: str | Where,
    control: Control,
    *,
    side: Side = "below",
    greeting_timeout_s: float,
    deadline_s: Callable[[], float],
    report: Report,
    security: Security = PLAIN,
    paused_ago_s: Callable[[], float] = never_paused,
) -> None:
    """Keep the control stream to the neighbour on that side open until all stages are through, or the run has failed.

    Raises NeighbourMismatch when the two can never agree (or this process was replaced), and TimeoutError as `dial`
    does. A TLS fault before the two have ever met is final. Later it may be a
    replacement with the wrong keys, which somebody can still correct, so it is reported and the wait goes on.
    """
    unconnected, pause_s = Unconnected(paused_ago_s), RETRY_FIRST_S
    unlike = ""
    while True:
        before = control.meetings[side]
        # At the end the neighbour has to be told; if it knows already, nobody is there any more.
        connect_timeout_s = LAST_WORD_S if control.over else deadline_s()
        address, attempt_s = await find_address(where, unconnected.left_s(connect_timeout_s))
        try:
            if await _one_control(address, control, side, attempt_s, greeting_timeout_s, security):
                return
        except NoTls as error:
            if isinstance(where, str) and not control.met[side].is_set():
                raise NeighbourMismatch(str(error)) from None
            if unlike != str(error) and not control.over:
                unlike = str(error)
                report("tls", unlike)
        except NotReached:
            if control.over:
                return
            if unconnected.left_s(connect_timeout_s) > 0:
                await asyncio.sleep(RETRY_FIRST_S)
                continue
            identity = control.machine.identity
            name = identity.name_of(identity.beside(side))
            raise TimeoutError(
                f"no connection to {address} for {connect_timeout_s:g} s; {unlike and f'{unlike}; '}"
                f"is {name} running there? If it was lost, start it again with --resume"
            ) from None
        except ProtocolError as error:
            blame = "refused by" if isinstance(error, RefusedError) else "refused"
            line = f"control stream: {blame} the node at {address}: {error}"
            if hopeless(error, where):
                raise NeighbourMismatch(line) from None
            report(error.fault, line)
        except (OSError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            stranger = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED
            if not control.over and not stranger:  # of a server that is no node the other stream says enough
                detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                report("connection-lost", f"control stream to {address}: {detail}")
        if control.meetings[side] != before:
            unconnected.begin()
            pause_s, unlike = RETRY_FIRST_S, ""
        await asyncio.sleep(pause_s)
        pause_s = min(RETRY_MOST_S, 2 * pause_s)


async def _one_control(
    address: str,
    control: Control,
    side: Side,
    connect_timeout_s: float,
    greeting_timeout_s: float,
    security: Security,
) -> bool:
    """One connection; whether the neighbour took the last word."""
    identity = control.machine.identity
    place = identity.place_of(identity.beside(side))
    opening = stream_to(address, CONTROL_METHOD, connect_timeout_s, greeting_timeout_s, security, place)
    async with opening as (call, read, write):
        last = await control.converse(side, read, write, speaks_first=True, greeting_timeout_s=greeting_timeout_s)
        return await end_gently(call, read, greeting_timeout_s) and last


Call = grpc.aio.StreamStreamCall


@asynccontextmanager
async def stream_to(
    address: str, method: str, connect_timeout_s: float, farewell_timeout_s: float, security: Security, place: GridPlace
) -> AsyncIterator[tuple[Call, Read, Write]]:
    """A stream of that method, gone at the end of the block; a peer that the block refuses is told why first.

    Raises NotReached if nobody listens there in time, and NoTls if TLS is why there is no connection."""
    if address is NOWHERE:
        raise NotReached
    async with security.channel(address, place, channel_options(FRAME_BYTES_MAX)) as channel:
        try:
            async with asyncio.timeout(connect_timeout_s):
                await _until_ready(channel, address, security, place)
        except TimeoutError:
            raise NotReached from None
        call = channel.stream_stream(method)()
        read, write = both_ways(call)
        try:
            yield call, read, write
        except RemoteProtocolError as error:
            await tell(write, error)
            await end_gently(call, read, farewell_timeout_s)
            raise
        finally:
            call.cancel()


async def _until_ready(channel: grpc.aio.Channel, address: str, security: Security, place: GridPlace) -> None:
    """gRPC retries, and never says why an attempt failed. If TLS may be the cause, the handshake is diagnosed."""
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and (why := await security.fault(address, place)):
            raise NoTls(why)
        await channel.wait_for_state_change(state)


async def end_gently(call: Call, read: Read, timeout_s: float) -> bool:
    """Cancelling a stream may overtake the goodbye or the refusal on it: end ours, and wait for the peer to end its.
    Whether that came in time and without an error, so that the peer has read all of ours."""
    with suppress(TimeoutError, asyncio.InvalidStateError, grpc.aio.AioRpcError):
        async with asyncio.timeout(timeout_s):
            await call.done_writing()
            while await read() is not None:  # gRPC tells the status only when all that came has been read
                pass
            return await call.code() is grpc.StatusCode.OK
    return False
