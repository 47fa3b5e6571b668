"""The dialling end of a lateral link: dial, and dial again, for as long as either side needs the other.

A lane may start, be set back or be away for long while this one trains on, so there is no deadline for a connection
here. Who needs something of it has one (`LateralLink.until_received`), and says what was the matter last. Only what
will not change by itself ends the attempts: another run, configuration, stage or lane, or a round that is gone.
"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

from ...protocol.errors import Fault, ProtocolError, RefusedError
from ...protocol.grid_place import GridPlace
from ..links.dialling import (
    ASK_AGAIN_S,
    RETRY_FIRST_S,
    RETRY_MOST_S,
    NeighbourMismatch,
    NoTls,
    NotReached,
    Where,
    end_gently,
    find_address,
    hopeless,
    stream_to,
)
from ..links.transport import PASSING, ROUNDS_METHOD, Report
from ..security.policy import Security
from .lateral_link import LateralLink, LateralLinkEnded


async def dial_lane(where: str | Where, link: LateralLink, report: Report, security: Security) -> None:
    """Keep the stream to a lower lane open until neither side needs the other. Raises NeighbourMismatch when the two
    can never agree, and ContributionError for this node's own disk."""
    pause_s, told = RETRY_FIRST_S, ""
    while not link.finished:
        connections, line, code = link.connections, "", "connection-lost"
        address, attempt_s = await find_address(where, ASK_AGAIN_S)
        try:
            await _one_connection(address, link, attempt_s, security)
            line = f"{link.name}: the node at {address} ended the stream"
        except NotReached:
            link.peer.fault = f"there is no connection to {address}"
        except NoTls as error:
            if isinstance(where, str) and not link.connections:
                raise NeighbourMismatch(f"{link.name}: {error}") from None
            line, code, link.peer.fault = f"{link.name}: {error}", "tls", str(error)
        except LateralLinkEnded:
            pass
        except ProtocolError as error:
            blame = "refused by" if isinstance(error, RefusedError) else "refused"
            line, code = f"{link.name}: {blame} the node at {address}: {error}", error.fault
            if hopeless(error, where) or error.fault is Fault.RESUME:
                raise NeighbourMismatch(line) from None
        except (OSError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            line = f"{link.name}: the connection to {address} broke ({detail})"
        if link.finished:
            return
        if line and line != told and code not in PASSING:
            report(code, line)
        if link.connections != connections:
            pause_s, told = RETRY_FIRST_S, ""
        else:
            told = line or told
        await asyncio.sleep(pause_s)
        pause_s = min(RETRY_MOST_S, 2 * pause_s)


async def _one_connection(address: str, link: LateralLink, attempt_s: float, security: Security) -> None:
    place, timeout_s = GridPlace(link.session.identity.stage, link.lane), link.greeting_timeout_s
    async with stream_to(address, ROUNDS_METHOD, attempt_s, timeout_s, security, place) as (call, read, write):
        await link.attach(read, write, speaks_first=True)
        await end_gently(call, read, timeout_s)
