"""One end of a link between two stages, with nothing around it: for tests of links, streams and who may open them."""

from __future__ import annotations

from thinpipe.node.links.link import Link
from thinpipe.node.run_records import Tracer
from thinpipe.protocol.messages import Limits
from thinpipe.protocol.session import LinkSession
from thinpipe.sim.links.shaper import LinkProfile

from .builders import identity


def make_link(
    stage: int,
    profile: str = "none",
    *,
    run: str = "r",
    message_bytes: int = 2**20,
    receive_buffer_bytes: int = 8 * 2**20,
) -> Link:
    """Of stage 0 or 1; the other one is its peer."""
    limits = Limits(message_bytes=message_bytes)
    return Link(
        session=LinkSession(
            identity=identity(stage, run_id=run),
            peer_stage=1 - stage,
            limits=limits,
            receive_buffer_bytes=receive_buffer_bytes,
        ),
        profile=LinkProfile.parse(profile),
        chunk_bytes=128 * 1024,
        send_buffer_bytes=64 * 2**20,
        uncapped_window_bytes=4 * 2**20,
        seed=1,
        tracer=Tracer(stage=stage, enabled=False),
    )
