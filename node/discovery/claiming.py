"""How a new node takes a place, a stage of a lane: the rules of `protocol.stage_choice`, carried out over the DHT.

It reads, claims, waits, and reads again. A record whose endpoint refuses connections counts as dead at once, and need
not go stale first. So a place whose node crashed is taken over in seconds. If every place is served, the node waits as
a spare. That costs nothing, and the next lost node is replaced without human help. The spare ends when the run is
complete.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum

from ...protocol.grid_place import GridPlace
from ...protocol.node_record import NodeRecord, NodeState, Seen, stale_after_s
from ...protocol.stage_choice import CLAIM_WAIT_S, choose, finished_lanes, has_started, of_place, rival
from ...sim.reports.lanes import node_name
from ..addresses import split_address
from .client import DiscoveryError

LOOK_AGAIN_S = 2.0
TROUBLE_S = 10.0  # before the DHT is asked again that did not answer
CONNECT_S = 1.5
CLOSED_S = 0.3  # for a port map to find out that nobody is behind it
CONNECT_PROBES_S = (
    1.0  # for all records together, so that a claim is settled within CLAIM_WAIT_S, however many lie there
)
CONNECT_PROBES_AT_ONCE = 32
LISTENING = (NodeState.WAITING, NodeState.TRAINING)


class StageTaken(ValueError):
    """Another node has the place; the message names it."""


class RunFinished(Exception):
    """There is nothing left to do; the message says so."""


class ConnectProbe(Enum):
    """What comes of a connection to an endpoint. SILENCE tells nothing: a machine that is off, or a path that is not
    there."""

    REFUSED = "refused"
    ANSWERED = "answered"
    SILENCE = "silence"


def connect_probe(endpoint: str) -> ConnectProbe:
    """Who takes the connection and closes it at once is a port map whose machine refused it. Raises nothing."""
    host, port = split_address(endpoint)
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(CLOSED_S)
            with suppress(TimeoutError):
                return ConnectProbe.ANSWERED if connection.recv(1) else ConnectProbe.REFUSED
            return ConnectProbe.ANSWERED
    except (ConnectionRefusedError, ConnectionResetError):
        return ConnectProbe.REFUSED
    except (OSError, UnicodeError):
        return ConnectProbe.SILENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What claiming needs of the world. read: enters the DHT again if need be. It and publish raise DiscoveryError."""

    read: Callable[[], list[Seen]]
    publish: Callable[[NodeRecord], object]
    say: Callable[[str], None]
    connect_probe: Callable[[str], ConnectProbe] = connect_probe
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    fits: Callable[[Sequence[GridPlace]], Sequence[GridPlace]] = (
        list  # of places that need a node alike, those for this machine
    )

    def others(self, mine: NodeRecord) -> list[Seen]:
        return [each for each in self.read() if each.record.incarnation != mine.incarnation]

    def without_dead(self, seen: Sequence[Seen], places: Collection[GridPlace]) -> list[Seen]:
        """Those of these places whose endpoint refuses connections are as stale as if nobody had renewed them. Who has
        only claimed, or builds its stage, does not listen yet."""

        def listens(each: Seen) -> bool:
            return each.living and each.record.state in LISTENING and each.record.place in places

        refused = self._refused({each.record.endpoint for each in seen if listens(each)})
        return [
            replace(each, age_s=max(each.age_s, stale_after_s(each.record.nodes)))
            if listens(each) and each.record.endpoint in refused
            else each
            for each in seen
        ]

    def _refused(self, endpoints: Collection[str]) -> set[str]:
        """Which of them refuse a connection, all tried at the same time. One without an answer after CONNECT_PROBES_S
        counts as silent."""
        if not endpoints:
            return set()
        pool = ThreadPoolExecutor(min(len(endpoints), CONNECT_PROBES_AT_ONCE), "connect-probe")
        asked = {pool.submit(self.connect_probe, endpoint): endpoint for endpoint in endpoints}
        known, _ = wait(asked, CONNECT_PROBES_S)
        pool.shutdown(wait=False, cancel_futures=True)
        return {asked[each] for each in known if each.result() is ConnectProbe.REFUSED}

    def still_answering(self, seen: Sequence[Seen], place: GridPlace, mine: NodeRecord) -> Seen | None:
        """The last node of that place, if it still answers: its record may be stale only because it lost the DHT. Where
        a later process has its endpoint, or this one, nobody would answer for it."""
        listened = [each for each in seen if each.record.place == place and each.record.state in LISTENING]
        last = min(listened, key=lambda each: each.age_s, default=None)
        if last is None:
            return None
        endpoint = last.record.endpoint
        later = {mine.endpoint, *(each.record.endpoint for each in seen if each.age_s < last.age_s)}
        return last if endpoint not in later and self.connect_probe(endpoint) is ConnectProbe.ANSWERED else None


def take_place(
    environment: Environment, mine: NodeRecord, place: GridPlace | None, *, steps: int, among: Sequence[GridPlace]
) -> tuple[NodeRecord, bool]:
    """Claim `place` (None: the one of `among` that needs a node most); returns the record with which it is held, and
    whether its lane has begun. Raises StageTaken, and RunFinished."""
    draw = random.Random(mine.incarnation).randrange
    if place is not None:
        _until_free(environment, mine, place, steps)
        return _claim(environment, _at(mine, place))
    while True:
        wanted = _until_needed(environment, mine, among, draw, steps)
        try:
            return _claim(environment, _at(mine, wanted))
        except StageTaken as error:
            environment.say(f"{error}; looks for another one")
        except DiscoveryError as error:
            environment.say(f"warning: {error}; looks for a stage again")
            environment.sleep(TROUBLE_S)


def _at(mine: NodeRecord, place: GridPlace) -> NodeRecord:
    return replace(mine, stage=place.stage, lane=place.lane)


def _name(mine: NodeRecord, place: GridPlace) -> str:
    """For people; which lane, where there are several."""
    return node_name(place.stage, place.lane, mine.lanes)


def _claim(environment: Environment, mine: NodeRecord) -> tuple[NodeRecord, bool]:
    """Claim what `mine` says. Raises StageTaken if somebody's claim is better."""
    mine = replace(mine, state=NodeState.CLAIMING, claimed_at_s=environment.now())
    environment.publish(mine)
    environment.sleep(CLAIM_WAIT_S)
    seen = environment.without_dead(environment.others(mine), (mine.place,))
    if other := rival(seen, mine):
        environment.publish(replace(mine, state=NodeState.LEFT))
        raise StageTaken(
            f"{_name(mine, mine.place)} goes to the node at {other.endpoint} ({other.state}), "
            "whose claim takes precedence"
        )
    mine = replace(mine, state=NodeState.STARTING)
    environment.publish(mine)
    return mine, has_started(seen, mine.place)


def _unfinished(seen: Sequence[Seen], mine: NodeRecord, steps: int, among: Sequence[GridPlace]) -> list[GridPlace]:
    """Those whose lane has steps to do. Raises RunFinished where there are none."""
    done = finished_lanes(seen, steps)
    left = [place for place in among if place.lane not in done]
    if not left:
        whose = "" if len(done) == mine.lanes else f" in lane {', '.join(map(str, sorted(done)))}"
        raise RunFinished(f"run '{mine.run}' is complete: all {steps} steps are done{whose}, so no stage needs a node")
    return left


def _wanted(
    environment: Environment,
    mine: NodeRecord,
    seen: Sequence[Seen],
    places: Sequence[GridPlace],
    draw: Callable[[int], int],
) -> GridPlace | None:
    """The place to take now, if there is one whose last node does not answer."""
    free, told, probed = list(places), seen, False
    while True:
        wanted = choose(told, free, draw, environment.fits)
        if wanted is None:
            if probed:
                return None
            told, probed = environment.without_dead(seen, free), True
        elif environment.still_answering(told, wanted, mine):
            free.remove(wanted)
        else:
            return wanted


def _until_needed(
    environment: Environment, mine: NodeRecord, among: Sequence[GridPlace], draw: Callable[[int], int], steps: int
) -> GridPlace:
    """The place that needs a node most, once there is one."""
    spare, trouble = False, ""
    while True:
        try:
            seen, trouble = environment.others(mine), ""
        except DiscoveryError as error:
            if not trouble:
                environment.say(f"warning: {error}; goes on looking for a stage once the DHT answers")
            trouble = str(error)
            environment.sleep(TROUBLE_S)
            continue
        wanted = _wanted(environment, mine, seen, _unfinished(seen, mine, steps, among), draw)
        if wanted is not None:
            return wanted
        if not spare:
            which = "" if len(among) == mine.nodes else " that this node may serve"
            what = "stages" if mine.lanes == 1 else "places"
            line = f"all {len(among)} {what}{which} are served"
            environment.say(f"{line}; waits as a spare for one that is lost (Ctrl-C ends it)")
            spare = True
        environment.sleep(LOOK_AGAIN_S)


def _until_free(environment: Environment, mine: NodeRecord, place: GridPlace, steps: int) -> None:
    """Wait while it is only a record that holds the place: of a machine that is off, it goes stale. Raises StageTaken
    when the node itself is there, by its port or by a record that it renews."""
    first: dict[int, float] = {}  # by incarnation, when its record was renewed last, at first sight
    while True:
        seen = environment.others(mine)
        _unfinished(seen, mine, steps, [place])
        holder = next(iter(of_place(environment.without_dead(seen, (place,)), place)), None)
        if holder is None:
            if last := environment.still_answering(seen, place, mine):
                raise _served(last)
            return
        record, renewed_s = holder.record, environment.now() - holder.age_s
        answers = record.state in LISTENING and environment.connect_probe(record.endpoint) is ConnectProbe.ANSWERED
        if answers or renewed_s > first.setdefault(record.incarnation, renewed_s) + 1.0:
            raise _served(holder)
        if len(first) == 1 and first[record.incarnation] == renewed_s:
            environment.say(
                f"{_name(mine, place)} was served at {record.endpoint}, which does not answer; "
                "waiting until its record goes stale"
            )
        environment.sleep(LOOK_AGAIN_S)


def _served(holder: Seen) -> StageTaken:
    record = holder.record
    return StageTaken(
        f"{_name(record, record.place)} is served by process {record.incarnation:x} at {record.endpoint} "
        f"({record.state}, {holder.age_s:.0f} s ago); stop that one first, or say --stage auto"
    )
