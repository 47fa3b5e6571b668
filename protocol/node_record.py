"""Records in a distributed hash table (DHT): what a node announces of itself, and the configuration of a run.

A node's record says which stage it serves, where it listens, and how many steps it has done. It is written under the
run's key, in a place of the node's own that nobody else can sign for. It is renewed well before it goes stale, so its
age shows whether its node is alive. Stale records stay for a while: they show a new node that the run has begun, and
which stage lost its node first.

Anybody may write into the table, so nothing that is read is trusted. A record that is malformed or of another run,
configuration or version is left out and counted by its fault, never an error: one stranger must not keep a swarm from
finding itself. Why not JSON: no difference between 1 and 1.0, and no bound on depth before it is parsed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

from .control_messages import LISTED_MAX, STEP_MAX
from .errors import Fault, RemoteProtocolError
from .grid_place import LANES_MAX, GridPlace
from .messages import PROTOCOL_VERSION
from .strict_msgpack import Check, number, pack, real, text, unpack

RECORD_BYTES_MAX = 1024
CONFIGURATION_BYTES_MAX = 64 * 1024
ENDPOINT_CHARACTERS_MAX = 261  # a name of 253, brackets, a colon, a port
RENEW_EVERY_S = 5.0  # of small swarms: each renewal reads the whole key from several nodes on its way
RENEWALS_MISSED = 4  # before a record is stale
KEPT_S = 300.0  # that a record stays in the table after its last renewal

_LABEL = r"[A-Za-z0-9_-]{1,63}"  # of a name; what is longer, or empty, resolvers do not take
_ENDPOINT = re.compile(rf"(?P<host>\[[0-9A-Fa-f:.%]+\]|{_LABEL}(?:\.{_LABEL})*):(?P<port>[0-9]{{1,5}})")
_RUN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class NodeState(StrEnum):
    """What a node does. It begins to listen between STARTING and WAITING."""

    CLAIMING = "claiming"  # says that it would take the stage, and looks who else does
    STARTING = "starting"  # has the stage, and builds it
    WAITING = "waiting"  # for a neighbour, or for a new generation
    TRAINING = "training"
    LEFT = "left"  # has ended in order: the run is complete, or was stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """One node's own words: which stage it serves, of so many, and in which lane. configuration: the run's fingerprint.
    endpoint: host:port where it is reached.

    completed_steps: of its generation; committed_steps: in its newest checkpoint. claimed_at_s: Unix time, on its own
    clock.
    """

    run: str
    configuration: str
    stage: int
    stages: int
    endpoint: str
    state: NodeState
    incarnation: int
    claimed_at_s: float
    generation: int = 0
    completed_steps: int = 0
    committed_steps: int = 0
    tokens_per_s: float = 0.0
    lane: int = 0
    lanes: int = 1

    @property
    def place(self) -> GridPlace:
        return GridPlace(self.stage, self.lane)

    @property
    def nodes(self) -> int:
        """How many the run has."""
        return self.stages * self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run: its name, its fingerprint, and the settings that have it, as TOML."""

    run: str
    configuration: str
    toml: str


def is_endpoint(value: object) -> bool:
    """Whether it is host:port, as short and as plain as one is."""
    if type(value) is not str or len(value) > ENDPOINT_CHARACTERS_MAX:
        return False
    found = _ENDPOINT.fullmatch(value)
    return found is not None and 0 < int(found["port"]) < 2**16


def _matching(pattern: re.Pattern[str]) -> Check:
    return lambda value: type(value) is str and pattern.fullmatch(value) is not None


_STEPS = number(0, STEP_MAX)
RUN_SCHEMA: dict[str, Check] = {
    "version": number(0, 2**32),
    "run": _matching(_RUN),
    "configuration": _matching(_DIGEST),
    "toml": text(CONFIGURATION_BYTES_MAX, lines=True),
}
NODE_SCHEMA: dict[str, Check] = {
    "version": number(0, 2**32),
    "run": _matching(_RUN),
    "configuration": _matching(_DIGEST),
    "stage": number(0, LISTED_MAX),
    "stages": number(1, LISTED_MAX + 1),
    "endpoint": is_endpoint,
    "state": lambda value: type(value) is str and value in set(NodeState),
    "incarnation": number(0, 2**64),
    "claimed_at_s": real(0.0, 1e11),
    "generation": _STEPS,
    "completed_steps": _STEPS,
    "committed_steps": _STEPS,
    "tokens_per_s": real(0.0, 1e12),
    "lane": number(0, LANES_MAX),
    "lanes": number(1, LANES_MAX + 1),
}


def encode_record(record: NodeRecord) -> bytes:
    """Raises LocalProtocolError for one that nobody would take."""
    values = {"version": PROTOCOL_VERSION, **asdict(record), "state": record.state.value}
    return pack("node record", NODE_SCHEMA, values, bytes_max=RECORD_BYTES_MAX)


def decode_record(raw: bytes, *, run: str, configuration: str, stages: int, lanes: int = 1) -> NodeRecord:
    """A record of that run. Raises RemoteProtocolError: malformed, oversized, or whose it is instead."""
    values = unpack("node record", NODE_SCHEMA, raw, bytes_max=RECORD_BYTES_MAX)
    for fault, name, expected in (
        (Fault.PROTOCOL_VERSION, "version", PROTOCOL_VERSION),
        (Fault.RUN_ID, "run", run),
        (Fault.CONFIGURATION, "configuration", configuration),
        (Fault.STAGE, "stages", stages),
        (Fault.LANE, "lanes", lanes),
    ):
        if values[name] != expected:
            raise RemoteProtocolError(fault, f"a node record whose {name} is {values[name]}, and not {expected}")
    if values["stage"] >= stages:
        raise RemoteProtocolError(Fault.STAGE, f"a node record of stage {values['stage']}, of {stages}")
    if values["lane"] >= lanes:
        raise RemoteProtocolError(Fault.LANE, f"a node record of lane {values['lane']}, of {lanes}")
    del values["version"]
    return NodeRecord(**{**values, "state": NodeState(values["state"])})


def encode_run(record: RunRecord) -> bytes:
    """Raises LocalProtocolError for one that nobody would take."""
    values = {"version": PROTOCOL_VERSION, **asdict(record)}
    return pack("run record", RUN_SCHEMA, values, bytes_max=CONFIGURATION_BYTES_MAX)


def decode_run(raw: bytes) -> RunRecord:
    """Raises RemoteProtocolError."""
    values = unpack("run record", RUN_SCHEMA, raw, bytes_max=CONFIGURATION_BYTES_MAX)
    if values.pop("version") != PROTOCOL_VERSION:
        raise RemoteProtocolError(Fault.PROTOCOL_VERSION, "a run record of another version of thinpipe")
    return RunRecord(**values)


def renew_every_s(nodes: int) -> float:
    """How often a node of a swarm of so many renews its record: what a renewal reads grows with the swarm, and so
    does the number of those who renew."""
    return RENEW_EVERY_S * max(1.0, nodes / 16)


def stale_after_s(nodes: int) -> float:
    """The age at which a record no longer says that its node lives."""
    return RENEWALS_MISSED * renew_every_s(nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A record as somebody reads it. age_s: since it was renewed."""

    record: NodeRecord
    age_s: float

    @property
    def living(self) -> bool:
        """Whether its node is there, by its record."""
        return self.record.state is not NodeState.LEFT and self.age_s < stale_after_s(self.record.nodes)


def read_records(
    found: Iterable[tuple[bytes, float]], *, run: str, configuration: str, stages: int, lanes: int = 1
) -> tuple[list[Seen], Counter[str]]:
    """The records of a run among what lies under its key, (bytes, age in seconds) each; and how many were left out, by
    fault."""
    seen: list[Seen] = []
    left_out: Counter[str] = Counter()
    for raw, age_s in found:
        try:
            record = decode_record(raw, run=run, configuration=configuration, stages=stages, lanes=lanes)
        except RemoteProtocolError as error:
            left_out[error.fault] += 1
        else:
            seen.append(Seen(record=record, age_s=max(0.0, age_s)))
    return seen, left_out
