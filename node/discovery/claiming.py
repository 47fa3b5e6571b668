"""A node that comes takes a stage: the rules of `protocol.claims`, carried out over the DHT.

Reads, claims, waits, reads again. A record whose endpoint refuses connections is dead at once, and need not go stale
first: so a stage that crashed is taken over in seconds. Where every stage is served, the node waits as a spare: it
costs nothing, and the next loss is mended without anybody being woken; it ends when the run is through.
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

from ...protocol.claims import SETTLE_S, begun, choose, of_stage, rival, through
from ...protocol.records import NodeRecord, Seen, State, stale_after_s
from ..addresses import split_address
from .client import DiscoveryError

LOOK_AGAIN_S = 2.0
TROUBLE_S = 10.0  # before the DHT is asked again that did not answer
CONNECT_S = 1.5
CLOSED_S = 0.3  # for a port map to find out that nobody is behind it
KNOCKING_S = 1.0  # for all records together, so that a claim is settled within SETTLE_S, however many lie there
KNOCKS_AT_ONCE = 32
LISTENING = (State.WAITING, State.TRAINING)


class StageTaken(ValueError):
    """Another node has the stage; the message names it."""


class RunThrough(Exception):
    """There is nothing left to do; the message says so."""


class Knock(Enum):
    """What comes of a connection to an endpoint. SILENCE tells nothing: a machine that is off, or a path that is not
    there."""

    REFUSED = "refused"
    ANSWERED = "answered"
    SILENCE = "silence"


def knock(endpoint: str) -> Knock:
    """Who takes the connection and closes it at once is a port map whose machine refused it. Raises nothing."""
    host, port = split_address(endpoint)
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(CLOSED_S)
            with suppress(TimeoutError):
                return Knock.ANSWERED if connection.recv(1) else Knock.REFUSED
            return Knock.ANSWERED
    except (ConnectionRefusedError, ConnectionResetError):
        return Knock.REFUSED
    except (OSError, UnicodeError):
        return Knock.SILENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What claiming needs of the world. read: enters the DHT again if need be. It and publish raise DiscoveryError."""

    read: Callable[[], list[Seen]]
    publish: Callable[[NodeRecord], object]
    say: Callable[[str], None]
    knock: Callable[[str], Knock] = knock
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

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
        """Which of them refuse, knocked at side by side: what is not known after KNOCKING_S is silent."""
        if not endpoints:
            return set()
        pool = ThreadPoolExecutor(min(len(endpoints), KNOCKS_AT_ONCE), "knock")
        asked = {pool.submit(self.knock, endpoint): endpoint for endpoint in endpoints}
        known, _ = wait(asked, KNOCKING_S)
        pool.shutdown(wait=False, cancel_futures=True)
        return {asked[each] for each in known if each.result() is Knock.REFUSED}

    def lingering(self, seen: Sequence[Seen], stage: int, mine: NodeRecord) -> Seen | None:
        """The stage's last node, if it still answers: its record may be stale only because it lost the DHT. Where a
        later process has its endpoint, or this one, nobody would answer for it."""
        listened = [each for each in seen if each.record.stage == stage and each.record.state in LISTENING]
        last = min(listened, key=lambda each: each.age_s, default=None)
        if last is None:
            return None
        endpoint = last.record.endpoint
        later = {mine.endpoint, *(each.record.endpoint for each in seen if each.age_s < last.age_s)}
        return last if endpoint not in later and self.knock(endpoint) is Knock.ANSWERED else None


def take_stage(
    world: World, mine: NodeRecord, stage: int | None, *, steps: int, among: Collection[int]
) -> tuple[NodeRecord, bool]:
    """Claim `stage` (None: the one of `among` that needs a node most); returns the record with which it is held, and
    whether the run has begun. Raises StageTaken, and RunThrough."""
    draw = random.Random(mine.incarnation).randrange
    if stage is not None:
        _until_free(world, mine, stage, steps)
        return _claim(world, replace(mine, stage=stage))
    while True:
        wanted = _until_needed(world, mine, among, draw, steps)
        try:
            return _claim(world, replace(mine, stage=wanted))
        except StageTaken as error:
            world.say(f"{error}; looks for another one")
        except DiscoveryError as error:
            world.say(f"warning: {error}; looks for a stage again")
            world.sleep(TROUBLE_S)


def _claim(world: World, mine: NodeRecord) -> tuple[NodeRecord, bool]:
    """Claim what `mine` says. Raises StageTaken if somebody's claim is better."""
    mine = replace(mine, state=State.CLAIMING, claimed_at_s=world.now())
    world.publish(mine)
    world.sleep(SETTLE_S)
    seen = world.without_dead(world.others(mine), (mine.stage,))
    if other := rival(seen, mine):
        world.publish(replace(mine, state=State.LEFT))
        raise StageTaken(
            f"stage {mine.stage} goes to the node at {other.endpoint} ({other.state}), whose claim is better"
        )
    mine = replace(mine, state=State.STARTING)
    world.publish(mine)
    return mine, begun(seen, mine.stage)


def _still_on(seen: Sequence[Seen], mine: NodeRecord, steps: int) -> None:
    if through(seen, steps):
        raise RunThrough(f"run '{mine.run}' is through: all {steps} steps are done, so no stage needs a node")


def _wanted(
    world: World, mine: NodeRecord, seen: Sequence[Seen], stages: Collection[int], draw: Callable[[int], int]
) -> int | None:
    """The stage to take now, if there is one whose last node does not answer."""
    free, told, knocked = list(stages), seen, False
    while True:
        wanted = choose(told, free, draw)
        if wanted is None:
            if knocked:
                return None
            told, knocked = world.without_dead(seen, free), True
        elif world.lingering(told, wanted, mine):
            free.remove(wanted)
        else:
            return wanted


def _until_needed(
    world: World, mine: NodeRecord, among: Collection[int], draw: Callable[[int], int], steps: int
) -> int:
    """The stage that needs a node most, once there is one."""
    mine_to_serve = [stage for stage in range(mine.stages) if stage in among]
    spare, trouble = False, ""
    while True:
        try:
            seen, trouble = world.others(mine), ""
        except DiscoveryError as error:
            if not trouble:
                world.say(f"warning: {error}; goes on looking for a stage once the DHT answers")
            trouble = str(error)
            world.sleep(TROUBLE_S)
            continue
        _still_on(seen, mine, steps)
        wanted = _wanted(world, mine, seen, mine_to_serve, draw)
        if wanted is not None:
            return wanted
        if not spare:
            which = "" if len(mine_to_serve) == mine.stages else " that this node's certificate is for"
            line = f"all {len(mine_to_serve)} stages{which} are served"
            world.say(f"{line}; waits as a spare for one that is lost (Ctrl-C ends it)")
            spare = True
        world.sleep(LOOK_AGAIN_S)


def _until_free(world: World, mine: NodeRecord, stage: int, steps: int) -> None:
    """Wait while it is only a record that holds the stage: of a machine that is off, it goes stale. Raises StageTaken
    when the node itself is there, by its port or by a record that it renews."""
    first: dict[int, float] = {}  # by incarnation, when its record was renewed last, at first sight
    while True:
        seen = world.others(mine)
        _still_on(seen, mine, steps)
        holder = next(iter(of_stage(world.without_dead(seen, (stage,)), stage)), None)
        if holder is None:
            if last := world.lingering(seen, stage, mine):
                raise _served(last)
            return
        record, renewed_s = holder.record, world.now() - holder.age_s
        answers = record.state in LISTENING and world.knock(record.endpoint) is Knock.ANSWERED
        if answers or renewed_s > first.setdefault(record.incarnation, renewed_s) + 1.0:
            raise _served(holder)
        if len(first) == 1 and first[record.incarnation] == renewed_s:
            world.say(
                f"stage {stage} was served at {record.endpoint}, which is silent; waits for its record to go stale"
            )
        world.sleep(LOOK_AGAIN_S)


def _served(holder: Seen) -> StageTaken:
    record = holder.record
    return StageTaken(
        f"stage {record.stage} is served by process {record.incarnation:x} at {record.endpoint} ({record.state}, "
        f"{holder.age_s:.0f} s ago); stop that one first, or say --stage auto"
    )
