"""`thinpipe node --join`: from nothing but an address to a node that serves a stage.

In this order: ask at the rendezvous addresses; enter the DHT; learn the run's configuration and check it; claim a
place; find out whether the run has begun. Then `node.node_process` runs the stage as it always does. The DHT's process
is started before torch is imported here, since both take seconds.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...protocol.grid_place import GridPlace, grid
from ...protocol.node_record import NodeRecord, NodeState, RunRecord, Seen
from ...protocol.stage_choice import fitting
from ..addresses import ListenError, check_listen, is_loopback
from ..config import ConfigError, RunConfig
from ..config_file import dump_config, load_config, merge, parse_config
from ..config_sections import LinkSection
from ..run_lanes import check_lane, check_text_stays, of_lane
from ..security.key_directory import KeysError
from ..security.policy import Security, choose
from .claiming import LOOK_AGAIN_S, Environment, take_place
from .client import Discovery, DiscoveryError
from .entry_points import EntryPoints, ask_all_rendezvous, choose_for, place
from .multiaddr import Multiaddr
from .shared_config import agreed, short

if TYPE_CHECKING:
    from .membership import Membership

LEASE_S = 3600.0  # of a claim and of a start: they end with the process
RUN_LOOKS = 4  # for a run in the DHT, before nobody is believed to know of one


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """What the user said. stage, lane: None for the one that needs a node most. run: a name, if the DHT has several.
    speed: of this machine, in the unit of pipeline.speeds."""

    join: tuple[str, ...]
    stage: int | None
    lane: int | None = None
    listen: str | None = None
    announce: str | None = None
    dht_port: int | None = None
    config: Path | None = None
    run: str | None = None
    out: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    keys: Path | None = None
    insecure: bool = False
    speed: float | None = None
    data_changed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinResult:
    """What `node.node_process` needs to know. run: the run's directory here; out: that of the lane in it. resume: the
    lane has begun."""

    config: RunConfig
    stage: int
    lane: int
    listen: str
    run: Path
    out: Path
    resume: bool
    membership: Membership
    security: Security


def say(line: str) -> None:
    print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)


def join(options: JoinOptions) -> JoinResult:
    """Raises DiscoveryError, ConfigError, ListenError, KeysError, StageTaken, RunFinished."""
    security = choose_for(options.join, options.keys, insecure=options.insecure, listen=options.listen)
    if security.warning:
        say(f"warning: {security.warning}")
    entry = ask_all_rendezvous(options.join, say, security, wait_s=_wait_s(options))
    source = entry.source_host()
    default = "127.0.0.1:0" if Multiaddr(host=source, port=1).loopback else "0.0.0.0:0"
    here = place(options.listen or default, options.announce, options.dht_port, free_port, source)
    check_listen(here.listen)
    if line := _only_here(here.endpoint, entry.peers):
        say(f"warning: {line}")
    choose(options.keys, insecure=options.insecure, listen=here.listen)
    discovery = Discovery.begin(entry.peers, listen=here.dht_listen, announce=here.dht_announce)
    member = Member(discovery, options.join, security)
    try:
        # torch and transformers, while the DHT starts
        from ..preparation import check_codec, check_device, check_lanes, check_link
        from .membership import Membership

        discovery.ready()
        config, run = _settle(options, entry, discovery)
        check_device(config)
        check_codec(config)
        check_link(config)
        check_lanes(config)
        check_text_stays(config, data_changed=options.data_changed)
        among = _may_serve(options, config, security)
        home = _room(options.out or Path("runs") / config.run.name, config)
        held, has_started = _hold(options, config, run, here.endpoint, among, member)
        config, out = of_lane(config, home, held.lane)
        _writable(out)
        has_started = has_started or any(config.checkpoint.path(out).glob(f"stage-{held.stage}/step-*"))
        how = "which has begun: takes the stage's place there" if has_started else "which has not begun"
        where = "" if held.lanes == 1 else f" in lane {held.lane} of {held.lanes}"
        say(
            f"joins run '{run.run}' (fingerprint {short(run.configuration)}) as stage {held.stage} of {held.stages}"
            f"{where} at {held.endpoint}, {how}; records in {out}"
        )
        rendezvous = tuple(rendezvous.address for rendezvous in entry.rendezvous)
        return JoinResult(
            config=config,
            stage=held.stage,
            lane=held.lane,
            listen=here.listen,
            run=home,
            out=out,
            resume=has_started,
            membership=Membership(
                discovery=member.discovery, record=held, run=run, rendezvous=rendezvous, security=security
            ),
            security=security,
        )
    except BaseException:
        member.discovery.close()
        raise


def _wait_s(options: JoinOptions) -> float:
    """How long to wait for a rendezvous: link.connect_timeout_s, as far as it is known before the run's settings are.
    Raises ConfigError."""
    own = load_config(options.config).link.connect_timeout_s if options.config else LinkSection().connect_timeout_s
    said = {"link.connect_timeout_s": options.overrides.get("link.connect_timeout_s", own)}
    return parse_config(merge({}, said)).link.connect_timeout_s


def _only_here(endpoint: str, peers: Sequence[str]) -> str:
    """What to say of an endpoint that only this machine reaches, where members of the DHT may be on others; else
    nothing."""
    others = any(not peer.loopback for peer in map(Multiaddr.parse, peers) if peer)
    if not (others and is_loopback(endpoint)):
        return ""
    return (
        f"this node is announced at {endpoint}, where no other machine reaches it; if nodes are to run on others, give "
        "an address of this machine that they reach: --listen host:port, or --announce"
    )


@dataclass(slots=True)
class Member:
    """Who waits for a stage, perhaps for days: `discovery` is another one once the first has ended."""

    discovery: Discovery
    join: tuple[str, ...]
    security: Security

    def read(self, run: RunRecord, stages: int, lanes: int = 1) -> list[Seen]:
        """The records of the run's nodes; enters the DHT again if need be. Raises DiscoveryError."""
        if not self.discovery.alive:
            peers = list(self.discovery.peers)
            with suppress(DiscoveryError):  # who was there at first may be gone
                peers += ask_all_rendezvous(self.join, lambda _: None, self.security).peers
            self.discovery = self.discovery.again(list(dict.fromkeys(peers)))
            say("this node is in the DHT again")
        return self.discovery.read(run.run, run.configuration, stages, lanes)[0]


def _may_serve(options: JoinOptions, config: RunConfig, security: Security) -> list[GridPlace]:
    """The places that this node may take, by what it was told and by its certificate. Raises ConfigError, KeysError."""
    stages, lanes = config.pipeline.stages, config.lanes.count
    if options.stage is not None and options.stage >= stages:
        raise ConfigError(f"--stage {options.stage}: the run has {stages} stages, so 0 to {stages - 1}")
    if options.lane is not None:
        check_lane(config, options.lane)
    among = [
        place
        for place in grid(stages, lanes)
        if options.stage in (None, place.stage) and options.lane in (None, place.lane)
    ]
    if security.keys is None:
        return among
    choose(options.keys, insecure=False, run=config.run.name, places=among if len(among) == 1 else ())
    said = security.keys.said
    allowed = [place for place in among if said.serves(config.run.name, place)]
    if not allowed:
        which = f"of the {stages} stages of this run" if len(among) == stages else "of the places that it may take"
        raise KeysError(f"{security.keys.directory}: its certificate, for {said}, is for none {which}")
    return allowed


def _hold(
    options: JoinOptions, config: RunConfig, run: RunRecord, endpoint: str, among: list[GridPlace], member: Member
) -> tuple[NodeRecord, bool]:
    """The record with which a place is held, and whether its lane has begun. Raises StageTaken, RunFinished."""
    stages, lanes = config.pipeline.stages, config.lanes.count
    mine = NodeRecord(
        run=run.run,
        configuration=run.configuration,
        stage=options.stage or 0,
        stages=stages,
        lane=options.lane or 0,
        lanes=lanes,
        endpoint=endpoint,
        state=NodeState.CLAIMING,
        incarnation=secrets.randbits(63),
        claimed_at_s=time.time(),
    )
    world = Environment(
        read=lambda: member.read(run, stages, lanes),
        publish=lambda record: member.discovery.publish(record, lease_s=LEASE_S),
        say=say,
        fits=lambda wanted: fitting(wanted, config.pipeline.speeds, options.speed),
    )
    lane = 0 if lanes == 1 else options.lane
    explicit = None if options.stage is None or lane is None else GridPlace(options.stage, lane)
    return take_place(world, mine, explicit, steps=config.run.steps, among=among)


def _settle(options: JoinOptions, entry: EntryPoints, discovery: Discovery) -> tuple[RunConfig, RunRecord]:
    """The run's configuration: by the rendezvous addresses, or by the DHT. Raises ConfigError."""
    shareable = {
        (rendezvous.response.run, rendezvous.response.configuration): rendezvous
        for rendezvous in entry.rendezvous
        if rendezvous.response.run and options.run in (None, rendezvous.response.run)
    }
    if len(shareable) > 1:
        lines = [f"{rendezvous.address}: '{run}' {short(digest)}" for (run, digest), rendezvous in shareable.items()]
        raise ConfigError(
            f"the --join addresses announce different runs ({'; '.join(lines)}); join one of them, "
            "or choose a run with --run"
        )
    where = ", ".join(options.join)
    record = None
    for (run, digest), rendezvous in shareable.items():
        record, where = RunRecord(run=run, configuration=digest, toml=rendezvous.response.toml), rendezvous.address
    if record is None:
        record = _from_dht(options, discovery)
    return agreed(record, where, options.config, options.overrides)


def _from_dht(options: JoinOptions, discovery: Discovery) -> RunRecord | None:
    mine = load_config(options.config) if options.config else None
    name = options.run or (mine.run.name if mine else None)
    for look in range(1 if options.config else RUN_LOOKS):
        if look:
            time.sleep(LOOK_AGAIN_S)
        runs = [run for run in discovery.runs()[0] if name in (None, run.run)]
        if mine and len(runs) > 1:
            runs = [run for run in runs if run.configuration == mine.digest()] or runs
        if len(runs) == 1:
            return runs[0]
        if runs:
            lines = ", ".join(f"'{run.run}' {short(run.configuration)}" for run in runs[:8])
            raise ConfigError(f"this DHT has several runs ({lines}); choose one with --run or --config")
    return None


def _room(out: Path, config: RunConfig) -> Path:
    """The directory for this node's records, with the run's configuration in it. Raises ConfigError."""
    _writable(out)
    path = out / "run.toml"
    if path.exists():
        before = load_config(path)
        if before.digest() == config.digest() and before.run.name == config.run.name:
            return out
        if before.of_any_length().digest() != config.of_any_length().digest() or before.run.name != config.run.name:
            raise ConfigError(
                f"{path} is of another run ('{before.run.name}', fingerprint {short(before.digest())}; this is "
                f"'{config.run.name}', {short(config.digest())}); choose another --out"
            )  # the same but for its length: that run, which was given more steps
    fresh = path.with_name(f".run-{os.getpid()}.toml")  # another node may be about to write the same
    fresh.write_text(dump_config(config), encoding="utf-8")
    with suppress(FileNotFoundError):
        fresh.replace(path)
    return out


def _writable(out: Path) -> None:
    from ..run_directory import LocalRunError, writable

    try:
        writable(out)
    except LocalRunError as error:
        raise ConfigError(str(error)) from None


def free_port(host: str, options: int | None) -> int:
    """`wish` if it can be listened on, else any that can. Raises ListenError."""
    reason = ""
    for port in (options, 0) if options else (0,):
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(found[0], found[1]) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(found[4])
                return int(probe.getsockname()[1])
        except OSError as error:
            reason = str(error.strerror)
        except UnicodeError:  # of a name that is none, such as a..b
            reason = "no machine is known by that name"
    raise ListenError(f"cannot listen at {host}: {reason}; choose another --listen")
