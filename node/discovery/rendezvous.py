"""The rendezvous of a swarm over gRPC: the answering and the asking side of protocol/rendezvous_messages.py.

It is a method beside those of the run, on the same port, so a new node can join by the address of any node. A stranger
gets one answer of bounded size within a deadline, and an address is dialled for it only if it is the stranger's own.
With keys, it needs a certificate of the run to get that far.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import grpc
import grpc.aio

from ...protocol.errors import Fault, ProtocolError, RefusedError, RemoteProtocolError
from ...protocol.header import printable
from ...protocol.messages import Limits, Refusal, decode_frame
from ...protocol.rendezvous_messages import (
    WHY_CHARACTERS_MAX,
    RendezvousRequest,
    RendezvousResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from ..addresses import host_of, split_address
from ..links.transport import SERVICE, Report, StreamHandler, both_ways, linger, tell
from ..probing.reach import ProbeError, reachable, stream, within
from ..security.policy import PLAIN, Security

SWARM_METHOD = f"/{SERVICE}/Swarm"
WAIT_S = 10.0  # for one question, or one answer
DIAL_BACK_S = 5.0
REMEDY = "start `thinpipe dht --listen host:port` there, or name a node that was started with --join"


class RendezvousError(ProbeError):
    """No answer at a rendezvous; `str(error)` is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousAnswer:
    """The answer from `address`, which was reached at the IP address `host`."""

    address: str
    host: str
    response: RendezvousResponse


def rendezvous_handler(
    answer: Callable[[], RendezvousResponse], report: Report, security: Security = PLAIN
) -> StreamHandler:
    """What a server does with a stream of the method Swarm."""
    dialling_back = asyncio.Lock()

    async def swarm(_: object, context: grpc.aio.ServicerContext) -> None:
        read, write = both_ways(context)
        try:
            security.admit_any(context)
            try:
                async with asyncio.timeout(WAIT_S):
                    raw = await read()
            except TimeoutError:
                raise RemoteProtocolError(Fault.TIMEOUT, f"no question within {WAIT_S:g} s") from None
            if raw is None:
                return
            request = decode_request(raw)
            response = answer()
            if request.reach and not dialling_back.locked():
                async with dialling_back:
                    response = replace(response, dialled_back=await _dial_back(request, str(context.peer()), security))
            async with asyncio.timeout(WAIT_S):
                await write(encode_response(response))
                while await read() is not None:  # ended by the asker, once it has the answer
                    pass
        except RemoteProtocolError as error:
            report(error.fault, f"swarm rendezvous: refused the peer at {context.peer()}: {error}")
            await tell(write, error)
            await linger(read)
        except TimeoutError:
            pass  # it has its answer, or takes none

    return swarm


async def _dial_back(request: RendezvousRequest, peer: str, security: Security) -> str:
    """Whether the asker is reached where it says, in the words of `RendezvousResponse.dialled_back`."""
    host, port = split_address(request.reach)
    try:
        async with asyncio.timeout(DIAL_BACK_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return printable(f"no machine is known as '{host}' here")
    origin = host_of(peer)
    if origin not in {str(where[0]) for *_, where in found}:
        return ""  # another machine's: not for strangers to have dialled
    try:  # by number: asked again, the name might be another machine's
        address = f"[{origin}]:{port}" if ":" in origin else f"{origin}:{port}"
        answered = await ask_rendezvous(address, security, deadline_s=DIAL_BACK_S)
    except RendezvousError as error:
        return printable(str(error))[:WHY_CHARACTERS_MAX]
    if answered.response.incarnation != request.incarnation:
        return printable(f"another node answers at {request.reach}")[:WHY_CHARACTERS_MAX]
    return "yes"


async def ask_rendezvous(
    address: str, security: Security = PLAIN, request: RendezvousRequest | None = None, *, deadline_s: float = WAIT_S
) -> RendezvousAnswer:
    """Ask the rendezvous at `address` (host:port). Raises RendezvousError."""
    if not security.may_dial(address):
        raise RendezvousError(
            f"{address} connects to other machines, and this node has neither --keys nor --insecure", 2
        )
    try:
        target = await reachable(address, deadline_s, REMEDY)
        async with stream(address, target, SWARM_METHOD, deadline_s, security, REMEDY) as (read, write):
            await within(
                deadline_s, write(encode_request(request or RendezvousRequest())), f"{address} takes no question"
            )
            raw = await within(deadline_s + 2 * DIAL_BACK_S, read(), f"{address} gives no answer")
            if raw is None:
                raise RendezvousError(f"{address} ended the stream without an answer; try again", 1)
            return RendezvousAnswer(address=address, host=host_of(target), response=_told(raw))
    except RefusedError as error:
        raise RendezvousError(f"{address} refuses: {error}", 2) from None
    except ProtocolError as error:
        raise RendezvousError(f"{address} answers, but not like the rendezvous of a swarm: {error}", 2) from None
    except grpc.aio.AioRpcError as error:
        raise _broken(address, error) from None
    except asyncio.InvalidStateError:
        raise RendezvousError(f"{address} ended the stream without an answer; try again", 1) from None
    except RendezvousError:
        raise
    except ProbeError as error:
        raise RendezvousError(str(error), error.exit_code, absent=error.absent) from None


def _told(raw: bytes) -> RendezvousResponse:
    try:
        return decode_response(raw)
    except RemoteProtocolError as error:
        with suppress(RemoteProtocolError):
            if isinstance(refusal := decode_frame(raw, Limits(message_bytes=1)), Refusal):
                raise RefusedError(refusal.code, refusal.reason) from None
        raise error from None


def _broken(address: str, error: grpc.aio.AioRpcError) -> RendezvousError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return RendezvousError(f"{address} is not in a DHT (was that node started with --next?): {REMEDY}", 2)
    if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return RendezvousError(
            f"what answers at {address} speaks gRPC but is not the rendezvous of a swarm: {REMEDY}", 2
        )
    return RendezvousError(f"the connection to {address} broke ({error.details()}); try again", 1)
