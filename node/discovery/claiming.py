"""How a new node takes a stage: the rules of `protocol.stage_choice`, carried out over the DHT.

It reads, claims, waits, and reads again. A record whose endpoint refuses connections counts as dead at once, and need
not go stale first. So a stage that crashed is taken over in seconds. If every stage is served, the node waits as a
spare. That costs nothing, and the next lost node is replaced without human help. The spare ends when the run is
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

from ...protocol.node_record import NodeRecord, NodeState, Seen, stale_after_s
from ...protocol.stage_choice import CLAIM_WAIT_S, choose, has_started, is_finished, of_stage, rival
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
    """Another node has the stage; the message names it."""


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
    fits: Callable[[Sequence[int]], Sequence[int]] = list  # of stages that need a node alike, those for this machine

    def others(self, mine: NodeRecord) -> list[Seen]:
        return [each for each in self.read() if each.record.incarnation != mine.incarnation]

    def without_dead(self, seen: Sequence[Seen], stages: Collection[int]) -> list[Seen]:
        """Those of these stages whose endpoint refuses connections are as stale as if nobody had renewed them. Who has
        only claimed, or builds its stage, does not listen yet."""

        def listens(each: Seen) -> bool:
            return each.living and each.record.state in LISTENING and each.record.stage in stages

        refused = self._refused({each.record.endpoint for each in seen if listens(each)})
        return [
            replace(each, age_s=max(each.age_s, stale_after_s(each.record.stages)))
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

    def still_answering(self, seen: Sequence[Seen], stage: int, mine: NodeRecord) -> Seen | None:
        """The stage's last node, if it still answers: its record may be stale only because it lost the DHT. Where a
        later process has its endpoint, or this one, nobody would answer for it."""
        listened = [each for each in seen if each.record.stage == stage and each.record.state in LISTENING]
        last = min(listened, key=lambda each: each.age_s, default=None)
        if last is None:
            return None
        endpoint = last.record.endpoint
        later = {mine.endpoint, *(each.record.endpoint for each in seen if each.age_s < last.age_s)}
        return last if endpoint not in later and self.connect_probe(endpoint) is ConnectProbe.ANSWERED else None


def take_stage(
    environment: Environment, mine: NodeRecord, stage: int | None, *, steps: int, among: Collection[int]
) -> tuple[NodeRecord, bool]:
    """Claim `stage` (None: the one of `among` that needs a node most); returns the record with which it is held, and
    whether the run has begun. Raises StageTaken, and RunFinished."""
    draw = random.Random(mine.incarnation).randrange
    if stage is not None:
        _until_free(environment, mine, stage, steps)
        return _claim(environment, replace(mine, stage=stage))
    while True:
        wanted = _until_needed(environment, mine, among, draw, steps)
        try:
            return _claim(environment, replace(mine, stage=wanted))
        except StageTaken as error:
            environment.say(f"{error}; looks for another one")
        except DiscoveryError as error:
            environment.say(f"warning: {error}; looks for a stage again")
            environment.sleep(TROUBLE_S)


def _claim(environment: Environment, mine: NodeRecord) -> tuple[NodeRecord, bool]:
    """Claim what `mine` says. Raises StageTaken if somebody's claim is better."""
    mine = replace(mine, state=NodeState.CLAIMING, claimed_at_s=environment.now())
    environment.publish(mine)
    environment.sleep(CLAIM_WAIT_S)
    seen = environment.without_dead(environment.others(mine), (mine.stage,))
    if other := rival(seen, mine):
        environment.publish(replace(mine, state=NodeState.LEFT))
        raise StageTaken(
            f"stage {mine.stage} goes to the node at {other.endpoint} ({other.state}), whose claim takes precedence"
        )
    mine = replace(mine, state=NodeState.STARTING)
    environment.publish(mine)
    return mine, has_started(seen, mine.stage)


def _still_on(seen: Sequence[Seen], mine: NodeRecord, steps: int) -> None:
    if is_finished(seen, steps):
        raise RunFinished(f"run '{mine.run}' is complete: all {steps} steps are done, so no stage needs a node")


def _wanted(
    environment: Environment,
    mine: NodeRecord,
    seen: Sequence[Seen],
    stages: Collection[int],
    draw: Callable[[int], int],
) -> int | None:
    """The stage to take now, if there is one whose last node does not answer."""
    free, told, probed = list(stages), seen, False
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
    environment: Environment, mine: NodeRecord, among: Collection[int], draw: Callable[[int], int], steps: int
) -> int:
    """The stage that needs a node most, once there is one."""
    mine_to_serve = [stage for stage in range(mine.stages) if stage in among]
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
        _still_on(seen, mine, steps)
        wanted = _wanted(environment, mine, seen, mine_to_serve, draw)
        if wanted is not None:
            return wanted
        if not spare:
            which = "" if len(mine_to_serve) == mine.stages else " that this node's certificate is for"
            line = f"all {len(mine_to_serve)} stages{which} are served"
            environment.say(f"{line}; waits as a spare for one that is lost (Ctrl-C ends it)")
            spare = True
        environment.sleep(LOOK_AGAIN_S)


def _until_free(environment: Environment, mine: NodeRecord, stage: int, steps: int) -> None:
    """Wait while it is only a record that holds the stage: of a machine that is off, it goes stale. Raises StageTaken
    when the node itself is there, by its port or by a record that it renews."""
    first: dict[int, float] = {}  # by incarnation, when its record was renewed last, at first sight
    while True:
        seen = environment.others(mine)
        _still_on(seen, mine, steps)
        holder = next(iter(of_stage(environment.without_dead(seen, (stage,)), stage)), None)
        if holder is None:
            if last := environment.still_answering(seen, stage, mine):
                raise _served(last)
            return
        record, renewed_s = holder.record, environment.now() - holder.age_s
        answers = record.state in LISTENING and environment.connect_probe(record.endpoint) is ConnectProbe.ANSWERED
        if answers or renewed_s > first.setdefault(record.incarnation, renewed_s) + 1.0:
            raise _served(holder)
        if len(first) == 1 and first[record.incarnation] == renewed_s:
            environment.say(
                f"stage {stage} was served at {record.endpoint}, which does not answer; "
                "waiting until its record goes stale"
            )
        environment.sleep(LOOK_AGAIN_S)


def _served(holder: Seen) -> StageTaken:
    record = holder.record
    return StageTaken(
        f"stage {record.stage} is served by process {record.incarnation:x} at {record.endpoint} ({record.state}, "
        f"{holder.age_s:.0f} s ago); stop that one first, or say --stage auto"
    )
