"""Keys and values between the chunks of a sequence, on a virtual clock: what a layer's exchange adds to a microbatch.

Each lane does its own work in the order in which a node does it. Forward, in every layer: what comes before attention;
its own segments' keys and values go out; attention among its own segments; then each segment that it needs, in a fixed
order, when it has come; the rest of the layer. Backward is the reverse: the rest of the layer; attention to each
segment of another lane, whose gradient goes back at once; attention among its own; then it stands still until all
gradients of its own keys and values are there. A lane that stands still does nothing else, so what is not hidden behind
attention is lost. Nothing is averaged: what a lane waits for comes from when another one sent it.

With two microbatches in flight a lane computes them in turns, a layer apart, and hands over where it would begin to
wait, forward and backward, whether it would have to or not (`node.context.turns`): so it waits for what the other one
has not hidden.

Two routes:
- `direct`: an owner sends a segment to each lane that needs it, over a link of theirs alone. This is what nodes do.
- `ring`: it goes from lane to neighbouring lane, each passing it on, the way round that takes fewer hops; gradients
  come back along the same way, and each lane adds its own to what it passes on.

Two ways in which links have their rate: each has it for itself, or all of a lane share one interface, once for what
leaves it and once for what comes in. Latency occupies nothing.

Why not a formula, such as bytes over rate less attention's time: what is hidden depends on when which segment comes,
and lanes that compute unlike amounts wait for each other. What is left out: making wire tensors of keys and values and
back, other traffic of the same links, and a bucket's burst.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from .shaper import LinkProfile

Route = Literal["direct", "ring"]
_Key = tuple[int, int, int, int]  # microbatch, layer, segment, which of its paths
_Program = Iterator[float | _Key | None]  # seconds to compute, what to wait for, or that it is another one's turn
_DONE = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenSegment:
    """A segment of another lane. attend_s: seconds of this lane's attention to it, forward."""

    segment: int
    owner: int
    attend_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLayer:
    """What one lane does in one layer, in seconds of the forward pass. own_s: attention among its own segments. gives:
    those, in the order in which they leave; takes: segments of others, in the order in which they are looked at."""

    before_s: float
    own_s: float
    after_s: float
    gives: tuple[int, ...]
    takes: tuple[TakenSegment, ...]

    @property
    def forward_s(self) -> float:
        """With nothing to wait for."""
        return self.before_s + self.own_s + sum(each.attend_s for each in self.takes) + self.after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextWork:
    """One stage in all its lanes, for one microbatch. backward: how many times as long as forward everything takes.
    forward_bytes and backward_bytes: of one segment's keys and values, and of their gradients, framed. other_s: of a
    lane's forward, behind all layers."""

    lanes: tuple[LaneLayer, ...]
    layers: int
    forward_bytes: int
    backward_bytes: int
    backward: float = 2.0
    other_s: float = 0.0

    @property
    def users(self) -> dict[int, tuple[int, ...]]:
        """Of each segment, the other lanes that look at it."""
        found: dict[int, tuple[int, ...]] = {segment: () for lane in self.lanes for segment in lane.gives}
        for number, lane in enumerate(self.lanes):
            for taken in lane.takes:
                found[taken.segment] = (*found.get(taken.segment, ()), number)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextTimes:
    """Of one stage and the microbatches in flight, when all lanes begin at one moment. forward_s, backward_s: until the
    slowest is done with each, in their order. forward_wait_s, backward_wait_s: of each lane, standing still.
    sent_bytes: by sender and receiver, of all."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_wait_s: tuple[float, ...]
    backward_wait_s: tuple[float, ...]
    sent_bytes: Counter[tuple[int, int]]


def paths(owner: int, users: Sequence[int], lanes: int, route: Route) -> list[tuple[int, ...]]:
    """The ways that a segment takes: for each the lanes that it comes to, in order. That of a ring may go through lanes
    that only pass it on."""
    if route == "direct" or not users:
        return [(user,) for user in users]
    hops = {way: max(way * (user - owner) % lanes for user in users) for way in (1, -1)}
    way = min(hops, key=hops.__getitem__)
    return [tuple((owner + way * hop) % lanes for hop in range(1, hops[way] + 1))]


class _Clock:
    """Events in order of time; of equal times, in order of cause."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), event))

    def run(self) -> None:
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()


class _Wires:
    """When each wire is free again, and what went over it."""

    def __init__(self, clock: _Clock, link: LinkProfile, *, interface: bool) -> None:
        self._clock, self._link, self._interface = clock, link, interface
        self._free_s: dict[tuple[object, int], float] = defaultdict(float)
        self.sent_bytes: Counter[tuple[int, int]] = Counter()

    def send(self, sender: int, receiver: int, nbytes: int, arrived: Callable[[], None]) -> None:
        self.sent_bytes[sender, receiver] += nbytes
        rate = self._link.rate_bits_per_s
        bits_s = 0.0 if rate is None else nbytes * 8 / rate
        if not self._interface:
            self._clock.at(self._take((sender, receiver), bits_s) + bits_s + self._link.latency_s, arrived)
            return
        first_bit_s = self._take(("out", sender), bits_s) + self._link.latency_s
        self._clock.at(first_bit_s, lambda: self._clock.at(self._take(("in", receiver), bits_s) + bits_s, arrived))

    def _take(self, wire: tuple[object, int], bits_s: float) -> float:
        """Have the wire for so long, as soon as it is free: when that begins."""
        start_s = max(self._free_s[wire], self._clock.now_s)
        self._free_s[wire] = start_s + bits_s
        return start_s


class _Lanes:
    """One pass of all lanes through a stage's layers, forward or backward, from a common start, of so many microbatches
    in turns."""

    def __init__(self, work: ContextWork, link: LinkProfile, route: Route, *, interface: bool, in_flight: int) -> None:
        self._work, self._users, self._in_flight = work, work.users, in_flight
        self._owner = {segment: number for number, lane in enumerate(work.lanes) for segment in lane.gives}
        self._paths = {
            segment: paths(owner, self._users[segment], len(work.lanes), route)
            for segment, owner in self._owner.items()
        }
        self._clock = _Clock()
        self._wires = _Wires(self._clock, link, interface=interface)
        self._programs: list[list[_Program]] = []  # by lane, of those that are not done: whose turn it is first
        self._here: list[set[_Key]] = [set() for _ in work.lanes]
        self._awaited: list[tuple[_Key, float] | None] = [None for _ in work.lanes]  # since when
        self._gradients: Counter[tuple[int, _Key]] = Counter()  # parts of a sum that a lane has
        self.waited_s = [0.0 for _ in work.lanes]
        self.ended_s: list[list[float]] = [[] for _ in work.lanes]  # by lane, of each microbatch

    @property
    def sent_bytes(self) -> Counter[tuple[int, int]]:
        return self._wires.sent_bytes

    def run(self, program: Callable[[_Lanes, int, int], _Program]) -> Self:
        for lane in range(len(self._work.lanes)):
            self._programs.append([program(self, lane, microbatch) for microbatch in range(self._in_flight)])
            self._clock.at(0.0, partial(self._go_on, lane))
        self._clock.run()
        return self

    def done_s(self) -> tuple[float, ...]:
        """Of each microbatch, until the slowest lane is done with it."""
        return tuple(max(each) for each in zip(*self.ended_s, strict=True))

    def forward(self, lane: int, microbatch: int) -> _Program:
        own = self._work.lanes[lane]
        for layer in range(self._work.layers):
            yield own.before_s
            for segment in own.gives:
                for number in range(len(self._paths[segment])):
                    self._pass_on(lane, 0, (microbatch, layer, segment, number))
            yield own.own_s
            yield None
            for taken in own.takes:
                yield self._key(microbatch, layer, taken.segment, lane)
                yield taken.attend_s
            yield own.after_s
        yield self._work.other_s

    def backward(self, lane: int, microbatch: int) -> _Program:
        own, times = self._work.lanes[lane], self._work.backward
        yield times * self._work.other_s
        for layer in range(self._work.layers):
            yield times * own.after_s
            for taken in own.takes:
                yield times * taken.attend_s
                self._give_back(lane, self._key(microbatch, layer, taken.segment, lane))
            yield times * own.own_s
            yield None
            for segment in own.gives:
                for number in range(len(self._paths[segment])):
                    yield (microbatch, layer, segment, number)
            yield times * own.before_s

    def _key(self, microbatch: int, layer: int, segment: int, user: int) -> _Key:
        number = next(number for number, path in enumerate(self._paths[segment]) if user in path)
        return microbatch, layer, segment, number

    def _pass_on(self, lane: int, hop: int, key: _Key) -> None:
        """Send a segment on from a lane where it is, by the next hop of its path."""
        path = self._paths[key[2]][key[3]]
        if hop == len(path):
            return

        def arrived() -> None:
            self._pass_on(path[hop], hop + 1, key)
            self._has_come(path[hop], key)

        self._wires.send(lane, path[hop], self._work.forward_bytes, arrived)

    def _give_back(self, lane: int, key: _Key) -> None:
        """Send a gradient one hop back, with the last part that this lane adds: its own, and what it is given."""
        path = self._paths[key[2]][key[3]]
        hop = path.index(lane)
        self._gradients[lane, key] += 1
        if self._gradients[lane, key] < (lane in self._users[key[2]]) + (hop + 1 < len(path)):
            return
        receiver = path[hop - 1] if hop else self._owner[key[2]]
        arrived = partial(self._give_back if hop else self._has_come, receiver, key)
        self._wires.send(lane, receiver, self._work.backward_bytes, arrived)

    def _has_come(self, lane: int, key: _Key) -> None:
        self._here[lane].add(key)
        if (awaited := self._awaited[lane]) and awaited[0] == key:
            self._awaited[lane] = None
            self.waited_s[lane] += self._clock.now_s - awaited[1]
            self._go_on(lane)

    def _go_on(self, lane: int) -> None:
        under_way = self._programs[lane]
        while under_way:
            each = next(under_way[0], _DONE)
            if each is None:
                under_way.append(under_way.pop(0))
            elif each == _DONE:
                self.ended_s[lane].append(self._clock.now_s)
                del under_way[0]
            elif not isinstance(each, tuple):
                self._clock.at(self._clock.now_s + each, partial(self._go_on, lane))
                return
            elif each not in self._here[lane]:
                self._awaited[lane] = (each, self._clock.now_s)
                return


def simulate_context(
    work: ContextWork, link: LinkProfile, *, route: Route = "direct", interface: bool = False, in_flight: int = 1
) -> ContextTimes:
    """interface: all links of a lane share the rate, each way. in_flight: microbatches that are computed in turns, 1 or
    2. Raises ValueError for segments that nobody gives."""
    if missing := sorted(work.users.keys() - {segment for lane in work.lanes for segment in lane.gives}):
        raise ValueError(f"segments {missing} are taken, and no lane gives them")
    every = {"interface": interface, "in_flight": in_flight}
    forward = _Lanes(work, link, route, **every).run(_Lanes.forward)
    backward = _Lanes(work, link, route, **every).run(_Lanes.backward)
    return ContextTimes(
        forward_s=forward.done_s(),
        backward_s=backward.done_s(),
        forward_wait_s=tuple(forward.waited_s),
        backward_wait_s=tuple(backward.waited_s),
        sent_bytes=forward.sent_bytes + backward.sent_bytes,
    )
