"""A link made from the configuration, with the timeouts and sizes that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..protocol.control_messages import Heartbeat
from ..protocol.copy_transfer import PARTS_AHEAD_LEAST, PARTS_AHEAD_MOST
from ..protocol.greeting import NodeIdentity
from ..protocol.messages import Limits
from ..protocol.round_transfer import ContributionBytes
from ..protocol.schedule import messages_ahead
from ..protocol.session import LinkSession
from ..protocol.step_orders import overlapping_ahead
from ..sim.links.shaper import LinkProfile
from .boundary.endpoints import BoundaryShape
from .config import RunConfig
from .context.context_parts import ContextParts
from .lanes.lateral_links import LateralLinks
from .lanes.lateral_settings import LateralSettings
from .links.control_stream import HEARTBEAT_EVERY_S
from .links.dialling import Where
from .links.link import Link
from .links.outgoing import WINDOW_BANDWIDTH_DELAY_PRODUCTS, chunk_bytes_for, part_bytes_for
from .links.transport import Report
from .run_records import Tracer
from .security.policy import Security
from .stage import Stage

# What a busy machine may take to let an event loop say something: 2 s were seen with eight processes on two cores.
HOLD_UP_S = 6.0


def make_link(
    config: RunConfig,
    identity: NodeIdentity,
    peer: int,
    shape: BoundaryShape,
    tracer: Tracer,
    *,
    member: int | None = None,
    sent: Counter[str] | None = None,
) -> Link:
    """This node's end of the boundary to stage `peer`, which has that shape, in the generation of `identity`.

    member: the only process that may be at the other end. sent: the account to go on with.
    """
    limits = shape.limits
    buffer_bytes = receive_buffer_bytes(config, limits, from_above=peer < identity.stage)
    session = LinkSession(
        identity=identity, peer_stage=peer, limits=limits, receive_buffer_bytes=buffer_bytes, member=member
    )
    return _link(config, session, tracer, sent)


def make_context_link(
    config: RunConfig,
    identity: NodeIdentity,
    lane: int,
    message_bytes: int,
    tracer: Tracer,
    *,
    member: int | None = None,
    sent: Counter[str] | None = None,
) -> Link:
    """This node's end of the link to its own stage in that lane, whose messages have so many bytes at most; the rest as
    above."""
    limits = Limits(message_bytes=message_bytes)
    session = LinkSession(
        identity=identity,
        peer_stage=identity.stage,
        peer_lane=lane,
        limits=limits,
        receive_buffer_bytes=max(config.link.receive_buffer_bytes, 2 * (message_bytes + limits.frame_bytes)),
        member=member,
    )
    return _link(config, session, tracer, sent)


def _link(config: RunConfig, session: LinkSession, tracer: Tracer, sent: Counter[str] | None) -> Link:
    settings = config.link
    return Link(
        session=session,
        profile=LinkProfile.parse(settings.link),
        chunk_bytes=settings.chunk_bytes,
        send_buffer_bytes=settings.send_buffer_bytes,
        uncapped_window_bytes=settings.uncapped_window_bytes,
        seed=config.run.seed,
        tracer=tracer,
        sent=sent,
    )


def receive_buffer_bytes(config: RunConfig, limits: Limits, *, from_above: bool) -> int:
    """What a neighbour may send ahead of need: as much as the settings say, two messages in any case, and of
    activations all that the schedule sends before it wants a gradient."""
    pipeline, messages = config.pipeline, 2
    if from_above:
        ahead = overlapping_ahead if pipeline.delay else messages_ahead
        messages = max(messages, ahead(config.training_schedule, pipeline.stages, pipeline.microbatches))
    return max(config.link.receive_buffer_bytes, messages * (limits.message_bytes + limits.frame_bytes))


def parts_ahead_for(profile: LinkProfile) -> int:
    """Of a copy: what fills the link for a round trip."""
    product = profile.bandwidth_delay_product_bytes() or 0
    wanted = int(WINDOW_BANDWIDTH_DELAY_PRODUCTS * product) // part_bytes_for(profile) + 1
    return max(PARTS_AHEAD_LEAST, min(PARTS_AHEAD_MOST, wanted))


def transfer_s(config: RunConfig, stage: Stage, profile: LinkProfile, parts: ContextParts | None = None) -> float:
    """What a step's bytes take on the wire, at most, and the way there. parts: of keys and values, which go to other
    lanes between the tensors of the boundaries."""
    ports = [port for port in (stage.upstream_endpoint, stage.downstream_endpoint) if port]
    largest = max((port.shape.limits.message_bytes for port in ports), default=0)
    messages = 2 * config.pipeline.microbatches
    way_s = profile.latency_s + profile.jitter_s
    boundaries_s = messages * (profile.serialisation_s(largest) + way_s)
    if parts is None:
        return boundaries_s
    lanes = [parts.step_bytes(lane) for lane in range(config.lanes.count) if lane != parts.lane]
    return boundaries_s + max(profile.serialisation_s(size) + count * way_s for count, size in lanes)


def heartbeat_timeout_s(profile: LinkProfile, chunk_bytes: int | None = None) -> float:
    """Seconds after which a neighbour that says nothing is gone: what the link itself may hold a frame up (a full
    window before it and the way there), two frames lost, and a busy machine. chunk_bytes: `link.chunk_bytes`."""
    rate = profile.rate_bits_per_s
    window_bytes = WINDOW_BANDWIDTH_DELAY_PRODUCTS * (rate or 0) / 8 * 2 * profile.latency_s
    window_bytes += 2 * (chunk_bytes or chunk_bytes_for(profile))
    ahead_s = 0.0 if rate is None else 2 * window_bytes * 8 / rate
    return ahead_s + 2 * (profile.latency_s + profile.jitter_s) + 2 * HEARTBEAT_EVERY_S + HOLD_UP_S


def make_lateral_links(
    config: RunConfig,
    identity: NodeIdentity,
    *,
    addresses: Mapping[int, str | Where],
    directory: Path,
    contribution_bytes: ContributionBytes,
    heartbeat: Callable[[], Heartbeat],
    report: Report,
    security: Security,
    on_held: Callable[[], None],
    **lane: Any,
) -> LateralLinks:
    """The links to this stage in all other lanes; each has the rate of any other link.

    addresses: of the lower lanes. directory: for contributions. lane: what else LateralSettings
    takes. Must be called in an event loop. Raises ContributionError.
    """
    link = config.link
    profile = LinkProfile.parse(link.link)
    settings = LateralSettings(
        contribution_bytes=contribution_bytes,
        profile=profile,
        silence_s=heartbeat_timeout_s(profile, link.chunk_bytes),
        greeting_timeout_s=link.greeting_timeout_s,
        deadline_s=link.replacement_timeout_s,
        heartbeat=heartbeat,
        seed=config.run.seed,
        **lane,
    )
    return LateralLinks(
        identity=identity,
        addresses=addresses,
        directory=directory,
        settings=settings,
        report=report,
        security=security,
        on_held=on_held,
    )
