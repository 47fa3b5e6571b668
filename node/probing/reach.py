"""What listens at an address, found out before gRPC is used, because gRPC does not say why a connection failed.

A name that cannot be resolved, a port where nothing listens, another program's port, and silence are four faults with
four remedies. Failures are `ProbeError` with an exit code: 2 for what the user can correct, 1 for what happened (no
answer in time, a refusal, a connection that broke).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import grpc
import grpc.aio

from ..addresses import split_address
from ..links.link import Read
from ..links.outgoing import Write
from ..links.transport import FRAME_BYTES_MAX, both_ways, channel_options
from ..security.policy import Security

T = TypeVar("T")
REMEDY = "start `thinpipe probe --listen host:port` there, or name a node's listener"


class ProbeError(RuntimeError):
    """No measurement; `str(error)` is the one line that says why. absent: nobody is there, at least not yet."""

    def __init__(self, line: str, exit_code: int, *, absent: bool = False) -> None:
        super().__init__(line)
        self.exit_code, self.absent = exit_code, absent


async def reachable(address: str, deadline_s: float, remedy: str = REMEDY) -> str:
    """The address of the socket that takes connections there, for gRPC, which does not say why one failed."""
    host, port = split_address(address)
    loop = asyncio.get_running_loop()
    try:
        resolving = loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = await within(deadline_s, resolving, f"the name '{host}' is not resolved")
    except (socket.gaierror, UnicodeError):
        raise ProbeError(
            f"{address}: no machine is known as '{host}'; check the name, or give its IP address", 2, absent=True
        ) from None
    refused = False
    until_s = loop.time() + deadline_s
    for left, (*_, where) in zip(range(len(found), 0, -1), found, strict=True):
        name = str(where[0])
        try:
            async with asyncio.timeout((until_s - loop.time()) / left):  # one that is silent leaves time for the others
                _, writer = await asyncio.open_connection(name, port)
        except ConnectionRefusedError:
            refused = True
        except OSError:  # TimeoutError too
            continue
        else:
            writer.close()
            return f"ipv6:[{name}]:{port}" if ":" in name else f"ipv4:{name}:{port}"
    if refused:
        raise ProbeError(f"nobody listens at {address}: {remedy}", 2, absent=True)
    why = f"nobody answers at {address} within {deadline_s:g} s: is it on, and reachable from here?"
    raise ProbeError(why, 1, absent=True)


async def until_ready(address: str, channel: grpc.aio.Channel, security: Security, remedy: str = REMEDY) -> None:
    """The other end speaks HTTP/2, as gRPC does, and TLS or none, as we do. Raises ProbeError."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            if why := await security.fault(address, None):
                raise ProbeError(why, 2)
            raise ProbeError(f"something listens at {address}, but it is not thinpipe: {remedy}", 2)
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


@asynccontextmanager
async def stream(
    address: str, target: str, method: str, deadline_s: float, security: Security, remedy: str = REMEDY
) -> AsyncIterator[tuple[Read, Write]]:
    """A stream of `method` to `target`, which is what `reachable` found at `address`. Raises ProbeError, and what gRPC
    raises; also of a stream that has ended, whose status says why."""
    # Nothing is tried again here, and a connection attempt may take as long as gRPC allows: a path can be slow.
    options = [option for option in channel_options(FRAME_BYTES_MAX) if "backoff" not in option[0]]
    async with security.channel(target, None, options) as channel:
        ready = until_ready(address, channel, security, remedy)
        await within(deadline_s, ready, f"{address} accepts connections but does not answer")
        call = channel.stream_stream(method)()
        receive, send = both_ways(call)

        async def read() -> bytes | None:
            frame = await receive()
            if frame is None and await call.code() is not grpc.StatusCode.OK:
                raise await _status(call)
            return frame

        async def write(frame: bytes) -> None:
            try:
                await send(frame)
            except asyncio.InvalidStateError:
                raise await _status(call) from None

        try:
            yield read, write
            with suppress(Exception):  # all is said: only so that the other side sees an end and no break
                async with asyncio.timeout(1.0):
                    await call.done_writing()
                    while await receive() is not None:
                        pass
        finally:
            call.cancel()


async def _status(call: grpc.aio.StreamStreamCall) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


async def within(deadline_s: float, job: Awaitable[T], what: str) -> T:
    try:
        async with asyncio.timeout(deadline_s):
            return await job
    except TimeoutError:
        raise ProbeError(f"{what} within {deadline_s:g} s: is it on, and reachable from here?", 1) from None
