"""What a node does with the streams that nodes of higher lanes open for averaging: whose each is, and how it ended.

A stream says in its greeting which lane it comes from; which of two processes of that lane has the place is the link's
to decide (lateral_link.py). Who is refused is told why, and one line of it stands in this node's records, but not for
what passes by itself. Most ends are nobody's fault: the peer comes back. Two are this node's own: it was asked for what
it does not keep any more, and what it wrote to its disk is not there; those end it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import grpc.aio

from ...protocol.errors import Fault, RefusedError, RemoteProtocolError
from ...protocol.greeting import NodeIdentity, check_lateral
from ...protocol.messages import Greeting, decode_frame
from ...protocol.round_session import LIMITS
from ..links.link import Read
from ..links.outgoing import Write
from ..links.transport import PASSING, Report, both_ways, linger, tell
from ..security.policy import Security
from .contribution_store import ContributionError
from .lateral_link import LateralLink, LateralLinkEnded
from .lateral_settings import LateralSettings


class LateralServer:
    """For the lateral links of a node, by lane. on_broken is told what ends the node."""

    def __init__(
        self,
        identity: NodeIdentity,
        links: Mapping[int, LateralLink],
        settings: LateralSettings,
        report: Report,
        security: Security,
        *,
        on_broken: Callable[[Exception], None],
    ) -> None:
        self._identity, self._links, self._settings = identity, links, settings
        self._report, self._security, self._on_broken = report, security, on_broken
        self.closing = False  # this node leaves: no stream is served any more

    async def handler(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """What a server does with a stream of the method Rounds (`node.links.transport.listening`: `more`)."""
        read, write = both_ways(context)
        try:
            await self.serve(read, write, context)
        except RemoteProtocolError as error:
            if error.fault not in PASSING:
                self._report(error.fault, f"lateral link: refused the peer at {context.peer()}: {error}")
            await tell(write, error)
            await linger(read)
        except LateralLinkEnded:
            pass
        except RefusedError as error:
            if error.fault not in PASSING:
                self._report(error.fault, f"lateral link: refused by the peer at {context.peer()}: {error}")
            if error.fault is Fault.RESUME:  # asking again would not help
                self._on_broken(error)
        except ConnectionError as error:
            if not self.closing:
                self._report("connection-lost", f"lateral link from {context.peer()}: {error}")
        except ContributionError as error:
            self._on_broken(error)

    async def serve(self, read: Read, write: Write, context: grpc.aio.ServicerContext | None = None) -> None:
        """One connection that a peer opened, to its end. Raises what `LateralLink.attach` does."""
        greeting_timeout_s = self._settings.greeting_timeout_s
        if self.closing:
            raise LateralLinkEnded("this node leaves")
        try:
            async with asyncio.timeout(greeting_timeout_s):  # who says nothing takes nobody's place
                first = await read()
        except TimeoutError:
            raise RemoteProtocolError(Fault.TIMEOUT, f"no greeting within {greeting_timeout_s:g} s") from None
        if first is None:
            return
        if context is not None:
            self._security.admit(context, first)
        greeting = decode_frame(first, LIMITS)
        if not isinstance(greeting, Greeting):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a {type(greeting).__name__} frame before the greeting")
        check_lateral(greeting, self._identity, generation=self._settings.generation())
        link = self._links[greeting.lane]
        link.take_place(greeting)
        frames = [first]

        async def again() -> bytes | None:
            return frames.pop() if frames else await read()

        await link.attach(again, write, speaks_first=False)
