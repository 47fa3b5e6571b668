"""Two ends of a boundary whose codecs need dictionaries, with everything of a node but its tensors' meaning.

The upper end owns a projector, which changes once in some steps, and a forward codebook, which changes with each
activation; the lower end owns a backward codebook, which changes with each gradient. What they learn is invented, but
all of it depends on all that was decoded before, so a single wrong bit shows in every later state. An `End` takes and
makes messages; it knows nothing of links, and what it does is a function of its state, the step and the microbatch.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from thinpipe.protocol.dictionary import Publisher, Replica
from thinpipe.protocol.dictionary_delta import (
    Delta,
    DictionarySpec,
    Version,
    decode_delta,
    encode_delta,
    join_deltas,
    joined_bytes_max,
    split_deltas,
)
from thinpipe.protocol.dictionary_selection import Policy, budget, select
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.messages import Kind, Message

ROWS = 5  # of the tensor in a message; each becomes the number of the nearest entry of each dictionary
# What one change may leave of a row's greatest distance to the master: half a step, where a step is a bf16 number.
LEFT = {"fp64": 2**-23, "fp32": 2**-23, "bf16": 2**-8, "int8": 0.5 / 127 * 1.01, "int4": 0.5 / 7 * 1.01}


@functools.cache
def noises(seed: int) -> np.ndarray:
    """From integers, so the same everywhere and for good."""
    raw = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(2**16)
    return (raw >> np.uint64(40)).astype(np.float64) / 2**22 - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A dictionary, the messages that bring its changes, and how these choose their entries.

    every: steps between two changes, which come with microbatch 0; 0: a change with each message.
    """

    spec: DictionarySpec
    kind: Kind
    every: int = 0
    policy: Policy = "full"
    divisor: int = 1

    def due(self, step: int, microbatch: int) -> bool:
        return not self.every or (microbatch == 0 and step % self.every == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What both ends know from their configuration."""

    seed: int
    microbatches: int
    plans: tuple[Plan, ...]

    def of(self, kind: Kind) -> tuple[Plan, ...]:
        """Of the dictionaries that a tensor of this kind is coded with."""
        kind = Kind.ACTIVATION if kind is Kind.EVALUATION else kind
        return tuple(plan for plan in self.plans if plan.kind is kind)

    @property
    def message_bytes_max(self) -> int:
        return joined_bytes_max(plan.spec for plan in self.plans) + 2 * ROWS * len(self.plans)

    def noise(self, what: str, step: int, microbatch: int, shape: tuple[int, ...]) -> np.ndarray:
        """Between -2 and 2, from nothing but its arguments."""
        numbers = noises(self.seed)
        start = zlib.crc32(f"{what} {step} {microbatch}".encode()) % (len(numbers) - math.prod(shape))
        return numbers[start : start + math.prod(shape)].reshape(shape)

    def draw(self, plan: Plan, step: int, microbatch: int) -> np.random.Philox:
        key = np.array([self.seed, plan.kind], np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, microbatch, step, 0], np.uint64))


@dataclass(frozen=True, slots=True)
class Held:
    """A table as both ends know it."""

    version: Version
    digest: bytes
    table: np.ndarray

    @classmethod
    def of(cls, end: Publisher | Replica) -> Held:
        assert end.version is not None
        return cls(end.version, end.digest, end.table)

    @property
    def bits(self) -> tuple[Version, bytes, bytes]:
        return self.version, self.digest, self.table.tobytes()

    def state(self) -> dict[str, Any]:
        return {"version": list(self.version), "digest": self.digest.hex(), "table": self.table}


def republished(spec: DictionarySpec, generation: int, held: Held | None) -> tuple[Publisher, Delta | None]:
    """A publisher that has just shipped this table, as of the same place in the training, in `generation`; and how."""
    publisher = Publisher(spec, generation)
    if held is None:
        return publisher, None
    return publisher, publisher.publish(held.table, step=held.version.step, microbatch=held.version.microbatch)


def read(spec: DictionarySpec, generation: int, state: dict[str, Any] | None) -> Held | None:
    """What a checkpoint says of a dictionary."""
    if state is None:
        return None
    reader = Replica(spec, generation)
    reader.load_state(state)
    return Held.of(reader)


def nearest(tensor: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The number of the entry that is nearest to each row."""
    x = tensor[:, : table.shape[1]].astype(np.float64)
    return ((x[:, None] - table.astype(np.float64)[None]) ** 2).sum(axis=2).argmin(axis=1).astype("<u2")


class Owner:
    """A dictionary where it is learned: the master, what was shipped, how much its entries are used."""

    def __init__(self, run: Run, plan: Plan, generation: int, state: dict[str, Any] | None) -> None:
        self.run, self.plan, spec = run, plan, plan.spec
        self.publisher, _ = republished(spec, generation, read(spec, generation, state and state["shipped"]))
        if state is None:
            self.master = run.noise(spec.name, 0, 0, (spec.entries, spec.width)).astype(spec.dtype)
            self.usage = np.ones(spec.entries)
        else:
            self.master, self.usage = state["master"].copy(), state["usage"].copy()

    def state(self) -> dict[str, Any]:
        shipped = self.publisher.state() if self.publisher.version else None
        return {"shipped": shipped, "master": self.master.copy(), "usage": self.usage.copy()}

    def publish(self, step: int, microbatch: int) -> bytes:
        """The change that this message brings; none where the dictionary rests."""
        plan, publisher, spec = self.plan, self.publisher, self.plan.spec
        if publisher.version and not plan.due(step, microbatch):
            return b""
        entries, before = None, None
        if publisher.version:
            before = np.abs(self.master - publisher.shipped)
            entries = select(
                plan.policy,
                plan.divisor,
                entries=spec.entries,
                cursor=step * self.run.microbatches + microbatch,
                draw=self.run.draw(plan, step, microbatch),
                drift=self.master - publisher.shipped,
                usage=self.usage,
            )
        delta = publisher.publish(self.master, step=step, microbatch=microbatch, entries=entries)
        self._check(delta, before)
        raw = encode_delta(delta)
        assert len(raw) <= spec.delta_bytes_max
        return raw

    def _check(self, delta: Delta, before: np.ndarray | None) -> None:
        """What rounding left out is less than one step, and of the chosen entries only: none was lost earlier."""
        left = np.abs(self.master - self.publisher.shipped)
        if before is None:
            assert delta.snapshot
            assert not left.any()
            return
        covered = np.zeros(len(left), bool)
        covered[slice(None) if delta.indices is None else delta.indices] = True
        assert covered.sum() == budget(self.plan.policy, self.plan.divisor, self.plan.spec.entries)
        ulp = np.spacing(np.abs(self.master).max())
        assert np.all(left[covered].max(axis=1) <= LEFT[delta.encoding] * before[covered].max(axis=1) + ulp)
        assert np.array_equal(left[~covered], before[~covered])

    def code(self, tensor: np.ndarray) -> np.ndarray:
        """Of each row the nearest entry of what the peer holds."""
        return nearest(tensor, self.publisher.shipped)

    def learn(self, tensor: np.ndarray, codes: np.ndarray) -> None:
        """Entries follow what was coded with them, and all wander."""
        hit = np.bincount(codes, minlength=len(self.usage))
        self.usage = 0.8 * self.usage + hit
        pull = np.zeros(self.master.shape)
        np.add.at(pull, codes, tensor[:, : self.plan.spec.width] - self.master[codes])
        wander = self.run.noise("wander", len(tensor), int(1e6 * abs(tensor[0, 0])), self.master.shape)
        self.master = (self.master + 0.2 * pull + 0.03 * wander).astype(self.plan.spec.dtype)


@dataclass(frozen=True, slots=True)
class Sent:
    """A message, and what its sender knows the receiver will have of it."""

    message: Message
    tensor: np.ndarray
    meant: bytes
    tables: dict[str, tuple[Version, bytes, bytes]]


def codes_in(message: Message) -> np.ndarray:
    """(dictionaries, ROWS)."""
    return np.frombuffer(bytes(message.body), "<u2").reshape(-1, ROWS)


class End:
    """One stage's half of the boundary, in one generation. `state`: of a checkpoint; None: a fresh start."""

    def __init__(self, run: Run, side: int, generation: int = 0, state: dict[str, Any] | None = None) -> None:
        self.run, self.side, self.generation = run, side, generation
        self.sends = (Kind.ACTIVATION, Kind.GRADIENT)[side]
        state = state or {"completed": 0, "weights": np.zeros(ROWS), "owners": {}, "replicas": {}}
        self.completed: int = state["completed"]
        self.weights: np.ndarray = state["weights"].copy()
        self.owners, self.replicas = {}, {}
        self.history: dict[str, list[Held]] = {}  # of each replica, all that it was in this generation
        for plan in run.plans:
            name, spec = plan.spec.name, plan.spec
            if plan.kind is self.sends:
                self.owners[name] = Owner(run, plan, generation, state["owners"].get(name))
            else:
                replica = Replica(spec, generation)
                _, delta = republished(spec, generation, read(spec, generation, state["replicas"].get(name)))
                if delta is not None:
                    replica.apply(delta)
                self.replicas[name] = replica
                self.history[name] = [] if delta is None else [Held.of(replica)]
        self.has_started = 0  # microbatches of the step under way that were sent
        self.inbox: deque[tuple[int, int, np.ndarray]] = deque()
        self.decoded: dict[tuple[Kind, int, int], bytes] = {}
        self._own = self._own_state()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        owners = {name: owner.state() for name, owner in self.owners.items()}
        return {"completed": self.completed, "weights": self.weights.copy(), "owners": owners}

    def state(self) -> dict[str, Any]:
        """As of the last completed step, whatever was decoded ahead since or sent of the next one."""
        replicas = {}
        for name, history in self.history.items():
            known = [held for held in history if held.version.step < self.completed]
            replicas[name] = known[-1].state() if known else None
        return {**self._own, "replicas": replicas}

    # -- sending ------------------------------------------------------------------------------------------------------

    def work(self) -> Sent | None:
        """What this end does next, if it can do anything now: the upper one sends a microbatch or ends its step, the
        lower one answers a microbatch."""
        if self.side == 0:
            if self.has_started < self.run.microbatches:
                shift = self.weights.mean()
                return self._send(self.completed, self.has_started, shift)
            if len(self.inbox) == self.run.microbatches:
                for step, _, decoded in self.inbox:
                    assert step == self.completed
                    self.weights = 0.9 * self.weights + 0.1 * decoded.astype(np.float64).mean(axis=1)
                self.inbox.clear()
                self._complete()
            return None
        if not self.inbox:
            return None
        step, microbatch, decoded = self.inbox.popleft()
        assert (step, microbatch) == (self.completed, self.has_started)
        self.weights = 0.9 * self.weights + 0.1 * decoded.astype(np.float64).mean(axis=1)
        sent = self._send(step, microbatch, self.weights.mean())
        if self.has_started == self.run.microbatches:
            self._complete()
        return sent

    def _complete(self) -> None:
        self.completed, self.has_started = self.completed + 1, 0
        self._own = self._own_state()

    def _send(self, step: int, microbatch: int, shift: float) -> Sent:
        tensor = self._tensor(self.sends, step, microbatch) + shift
        deltas = [owner.publish(step, microbatch) for owner in self.owners.values()]
        sent = self._coded(self.sends, step, microbatch, tensor, join_deltas(filter(None, deltas)))
        for owner, codes in zip(self.owners.values(), codes_in(sent.message), strict=True):
            owner.learn(tensor, codes)
        self.has_started += 1
        return sent

    def evaluate(self, number: int) -> Sent | None:
        """An evaluation tensor: it is coded with what the peer has, teaches nothing and changes nothing."""
        if self.side or any(owner.publisher.version is None for owner in self.owners.values()):
            return None
        return self._coded(Kind.EVALUATION, self.completed, number, self._tensor(Kind.EVALUATION, 0, number), b"")

    def _tensor(self, kind: Kind, step: int, microbatch: int) -> np.ndarray:
        return self.run.noise(kind.name, step, microbatch, (ROWS, 8))

    def _coded(self, kind: Kind, step: int, microbatch: int, tensor: np.ndarray, dictionary: bytes) -> Sent:
        codes = {name: owner.code(tensor) for name, owner in self.owners.items()}
        held = {name: Held.of(owner.publisher) for name, owner in self.owners.items()}
        message = Message(
            kind=kind,
            step=step,
            microbatch=microbatch,
            codec="nearest",
            codec_header={name: [*each.version, each.digest] for name, each in held.items()},
            dictionary=dictionary,
            body=b"".join(each.tobytes() for each in codes.values()),
        )
        meant = b"".join(held[name].table[codes[name]].tobytes() for name in codes)
        return Sent(message, tensor, meant, {name: each.bits for name, each in held.items()})

    # -- receiving ----------------------------------------------------------------------------------------------------

    def take(self, message: Message) -> bytes:
        """The decoded tensor, as bits. Raises RemoteProtocolError, and then nothing has changed."""
        plans = self.run.of(message.kind)
        before = {plan.spec.name: self.replicas[plan.spec.name].state() for plan in plans}
        try:
            for plan in plans:
                self._follow(plan, message)
        except RemoteProtocolError:
            for name, state in before.items():
                self.replicas[name].load_state(state)
            raise
        codes = codes_in(message)
        rows = [self.replicas[plan.spec.name].table[of] for plan, of in zip(plans, codes, strict=True)]
        decoded = b"".join(each.tobytes() for each in rows)
        if message.kind is Kind.EVALUATION:
            return decoded
        for plan in plans:
            self.history[plan.spec.name].append(Held.of(self.replicas[plan.spec.name]))
        self.decoded[message.kind, message.step, message.microbatch] = decoded
        self.inbox.append((message.step, message.microbatch, np.concatenate(rows, axis=1)))
        return decoded

    def _follow(self, plan: Plan, message: Message) -> None:
        replica, name = self.replicas[plan.spec.name], plan.spec.name
        names = [plan.spec.name for plan in self.run.of(message.kind)]
        raw = split_deltas(message.dictionary, names).get(name)
        *numbers, digest = message.codec_header[name]
        if raw is None:
            replica.check(Version(*numbers), digest)
            return
        delta = decode_delta(raw, plan.spec)
        due = replica.version is None or plan.due(message.step, message.microbatch)
        if message.kind is not plan.kind or not due:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a change of '{name}' where none is due")
        if delta.version[1:] != (message.step, message.microbatch, 0):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a change of '{name}' to {delta.version} out of its place")
        if (delta.version, delta.digest) != (Version(*numbers), digest):
            raise RemoteProtocolError(Fault.PAYLOAD, f"a tensor coded with another version of '{name}' than it brings")
        replica.apply(delta)


def undisturbed(run: Run) -> Iterator[tuple[End, End]]:
    """Both ends after each step of a run on which nothing is lost, without any link between them."""
    ends = End(run, 0), End(run, 1)
    while True:
        yield ends
        target = ends[0].completed + 1
        while ends[0].completed < target:
            for here, there in (ends, ends[::-1]):
                if sent := here.work():
                    assert there.take(sent.message) == sent.meant


def content(state: dict[str, Any]) -> Any:
    """A checkpoint's bits, named by their place in the training and not by the generation in which they were
    written."""

    def table(held: dict[str, Any] | None) -> Any:
        return held and (held["version"][1:], held["table"].tobytes())

    owners = {
        name: (table(each["shipped"]), each["master"].tobytes(), each["usage"].tobytes())
        for name, each in state["owners"].items()
    }
    replicas = {name: table(held) for name, held in state["replicas"].items()}
    return state["completed"], state["weights"].tobytes(), owners, replicas
