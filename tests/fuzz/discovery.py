"""Targets for what comes of strangers in the DHT and at the swarm's rendezvous: records, a run's configuration,
questions and
answers. The first byte says which of them the rest is."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgpack
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.discovery.shared_config import shareable, verified
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.node_record import (
    CONFIGURATION_BYTES_MAX,
    decode_record,
    decode_run,
    encode_record,
    encode_run,
    is_endpoint,
)
from thinpipe.protocol.rendezvous_messages import (
    RendezvousRequest,
    RendezvousResponse,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

from ..builders import node_record
from . import mutators
from .judge import Ends, Finding, Target, check_refusal

RUN = shareable(RunConfig())
RECORD = node_record(run=RUN.run, configuration=RUN.configuration, lane=1, lanes=2)
ADDRESS = "/ip4/192.0.2.7/tcp/7002/p2p/12D3KooWEne5rpnnaQ9ShBh3xgDPS7n64xEjn6Nn7TEMHMmrjvED"
TOLD = RendezvousResponse(
    addresses=(ADDRESS,), run=RUN.run, configuration=RUN.configuration, toml=RUN.toml, incarnation=7
)
INPUT_BYTES_MAX = CONFIGURATION_BYTES_MAX // 4
# A byte can be an empty map of 64 bytes; text is held as it came, and as what its checks make of it.
PEAK_BYTES = 100 * INPUT_BYTES_MAX + 2**20


def _record(raw: bytes) -> None:
    record = decode_record(raw, run=RUN.run, configuration=RUN.configuration, stages=4, lanes=2)
    if not (record.stage < 4 and record.lane < 2 and is_endpoint(record.endpoint) and encode_record(record)):
        raise Finding(f"{record} came through")


def _run(raw: bytes) -> None:
    record = decode_run(raw)
    if verified(record, "a:1").digest() != record.configuration:
        raise Finding(f"{record} was believed")


def _answer(raw: bytes) -> None:
    if not all(map(str.isprintable, decode_response(raw).addresses)):
        raise Finding("an address that cannot be printed came through")


KINDS: list[tuple[Callable[[bytes], object], bytes]] = [
    (_record, encode_record(RECORD)),
    (_run, encode_run(RUN)),
    (decode_request, encode_request(RendezvousRequest(reach="a.example:1", incarnation=5))),
    (_answer, encode_response(TOLD)),
]


def discovered(data: bytes) -> Ends:
    read, _ = KINDS[data[0] % len(KINDS) if data else 0]
    try:
        read(data[1:])
    except (RemoteProtocolError, ConfigError) as error:
        check_refusal(error)
        return Ends(0, 1)
    return Ends(1, 0)


def _mutate(data: bytes, draw: Random) -> bytes:
    try:
        changed = msgpack.packb(mutators.tree(msgpack.unpackb(data[1:], strict_map_key=False), draw))
        assert changed is not None
        return data[:1] + changed
    except Exception:  # it is no msgpack any more, or nothing that can be
        return data[:1] + mutators.damage(data[1:], draw)


DISCOVERY = [
    Target(
        name="discovery",
        run=discovered,
        mutate=_mutate,
        seeds=[bytes([kind]) + seed for kind, (_, seed) in enumerate(KINDS)],
        peak_bytes=PEAK_BYTES,
        input_bytes_max=INPUT_BYTES_MAX,
    )
]
