"""The links by which a node exchanges keys and values with its own stage in the other lanes, in one generation.

Each is a link as that of a boundary (node/links/link.py): messages arrive once and in order over as many connections as
it takes, at the configured rate, counted, and only within the generation. The node of the higher lane dials, at the
address where it dials for averaging; the other one finds the link by the lane in the greeting.

A full mesh: a segment's keys and values cross each thin link once, from who made them, and nobody waits for a third
node to pass them on. A ring would need each node's upload once and not once for each user, but would add up latencies
in every layer; it pays where many chunks share one slow uplink, and then a smaller method pays more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.greeting import NodeIdentity
from ...protocol.messages import Greeting, Limits, decode_frame
from ..config import RunConfig
from ..link_settings import make_context_link
from ..links.link import Link
from ..run_records import Tracer
from .context_parts import ContextParts
from .exchange import ContextKey

if TYPE_CHECKING:
    from .link_transport import LinkTransport

LIMITS = Limits(message_bytes=1)  # of a greeting


def parts_of(
    config: RunConfig,
    lane: int,
    layers: Sequence[int],
    body_bytes: Callable[[ContextKey], int],
    gathering_step: int | None = None,
) -> ContextParts | None:
    """What a stage with these layers exchanges with other lanes; None: lanes hold different sequences."""
    if not config.context.method:
        return None
    return ContextParts(
        layout=config.chunk_layout,
        lane=lane,
        layers=layers,
        microbatches=config.pipeline.microbatches,
        evaluation_microbatches=config.evaluation_microbatches,
        body_bytes=body_bytes,
        gathering_step=gathering_step,
        in_flight=config.in_flight,
    )


def context_links(
    config: RunConfig,
    identity: NodeIdentity,
    parts: ContextParts,
    members: Mapping[int, int],
    *,
    tracer: Tracer,
    sent: Mapping[int, Counter[str]],
) -> dict[int, Link]:
    """By lane, in the generation of `identity`. members: by lane, the only process that may be there; none: any may.
    sent: the accounts to go on with."""
    return {
        lane: make_context_link(
            config,
            identity,
            lane,
            parts.largest_bytes(lane),
            tracer,
            member=members.get(lane),
            sent=sent[lane],
        )
        for lane in range(identity.lanes)
        if lane != identity.lane
    }


def link_for(frame: bytes | None, transport: LinkTransport | None, identity: NodeIdentity) -> Link | None:
    """The link of the present generation, if there is one, for which a stream with this first frame is meant. Raises
    RemoteProtocolError for a frame that is no greeting, and for a lane that does not dial this node."""
    if frame is None:
        return None
    greeting = decode_frame(frame, LIMITS)
    if not isinstance(greeting, Greeting):
        raise RemoteProtocolError(Fault.UNEXPECTED, "the first frame is no greeting")
    if not identity.lane < greeting.lane < identity.lanes:
        ours = f"{identity.lane + 1} to {identity.lanes - 1}" if identity.lane < identity.lanes - 1 else "none"
        raise RemoteProtocolError(
            Fault.LANE,
            f"lane {identity.lane} expects nodes of lanes {ours}, the peer says {greeting.lane}; one of the two dials "
            "an address of the wrong lane",
        )
    links = transport.links if transport else []
    return next((link for link in links if link.session.place.lane == greeting.lane), None)
