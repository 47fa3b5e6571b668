"""Which records of the DHT a node keeps and hands on: those that their owners signed, of bounded size and number.

hivemind's own rule is one signature check. This module adds:

- A record has the form of ours (`acceptable`), before hivemind parses it.
- Records that strangers store here are counted and bounded (`StoredRecords`). Records that are only read are not
  counted: a node that asks where its neighbours are must get an answer even if other records fill its own store.
- One bad record of a peer's answer is left out. hivemind drops the whole answer, so a peer could hide our record by
  sending a forged one with it.
- An answer is as fresh as its freshest record. hivemind believes the number beside it, and ends its search at one that
  lies far enough ahead, so that one peer with an empty answer "until the year 9999" would be the only one that counts.
- A search gathers records in a dictionary of its own. hivemind merges a peer's answer into what is stored here, and
  takes over what the peer says of it besides, down to things that break the search.
- A peer that appears again and again, under ever nearer names, is asked a few times and not until the search times out
  (`Asked`).
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import msgpack

from ...protocol.node_record import KEPT_S

KEY_BYTES = 20  # SHA-1 of its name
VALUE_BYTES_MAX = 64 * 1024
KEPT_S_MAX = KEPT_S + 10.0  # clocks differ by 3 s at most, and a store takes its time
HELD_RECORDS_MAX, HELD_BYTES_MAX = 16384, 64 * 2**20  # of all keys, that strangers can make this process keep
KEY_BYTES_MAX = 2 * 2**20  # of one key: more than 4 MiB hivemind cannot answer with
RECORD_COST_BYTES = 1024  # its place and its signature, in the books
READ_RECORDS_MAX, READ_BYTES_MAX = 4096, 8 * 2**20  # of a key, that are handed on
NEIGHBOURS_MAX = 20  # a bucket
ASKED_MAX, ASKED_S, ASKED_KEPT = 16, 5.0, 4096  # one peer for one key, in so long; how many of them are known
# 2048 to 4096 bits, with the exponent 65537: with one as long as the modulus a look takes forty times as long.
OWNER = re.compile(rb"\[owner:ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB[A-Za-z0-9+/=]{336,736}\]")

_reading: ContextVar[bool] = ContextVar("reading", default=False)  # a peer's answer, in this task


class StoredRecords:
    """The records stored here for strangers: (key, subkey) -> (expiration, bytes). Stored records stay; when the store
    is full, new ones are refused."""

    def __init__(
        self,
        records_max: int = HELD_RECORDS_MAX,
        bytes_max: int = HELD_BYTES_MAX,
        key_bytes_max: int = KEY_BYTES_MAX,
    ) -> None:
        self._records_max, self._bytes_max, self._key_bytes_max = records_max, bytes_max, key_bytes_max
        self._held: dict[tuple[bytes, bytes], tuple[float, int]] = {}
        self._nbytes, self._of_key = 0, Counter[bytes]()

    def take(self, place: tuple[bytes, bytes], expires_s: float, nbytes: int, now_s: float) -> bool:
        """Whether there is room; it is taken then. A record that expires earlier than the one in its place does not
        replace it."""
        until_s, before = self._held.get(place, (-math.inf, 0))
        if expires_s <= until_s:
            return True
        if not self._fits(place, nbytes - before):
            for old in [old for old, (until_s, _) in self._held.items() if until_s < now_s]:
                self._count(old, -self._held.pop(old)[1])
            before = self._held.get(place, (-math.inf, 0))[1]
            if not self._fits(place, nbytes - before):
                return False
        self._held[place] = (expires_s, nbytes)
        self._count(place, nbytes - before)
        return True

    def _count(self, place: tuple[bytes, bytes], nbytes: int) -> None:
        self._nbytes += nbytes
        self._of_key[place[0]] += nbytes
        if not self._of_key[place[0]]:
            del self._of_key[place[0]]

    def _fits(self, place: tuple[bytes, bytes], more: int) -> bool:
        count = len(self._held) + (place not in self._held)
        in_bytes = self._nbytes + more <= self._bytes_max and self._of_key[place[0]] + more <= self._key_bytes_max
        return count <= self._records_max and in_bytes


class Asked:
    """Which peers were asked for which keys lately: each a few times, under whatever names others tell of it."""

    def __init__(self) -> None:
        self._asked: OrderedDict[tuple[Any, Any], deque[float]] = OrderedDict()

    def may(self, peer: Any, keys: Sequence[Any], now_s: float) -> bool:
        """Whether `peer` is to be asked now; it is noted then."""
        times = [self._asked.setdefault((peer, key), deque(maxlen=ASKED_MAX)) for key in keys]
        for key in keys:
            self._asked.move_to_end((peer, key))
        while len(self._asked) > ASKED_KEPT:
            self._asked.popitem(last=False)
        if any(len(each) == ASKED_MAX and each[0] > now_s - ASKED_S for each in times):
            return False
        for each in times:
            each.append(now_s)
        return True


def acceptable(subkey: bytes, value: bytes, expires_s: float, now_s: float) -> bool:
    """Whether a record has the form of ours, its signature taken off: bytes of bounded size, in the place of one owner,
    for a bounded time. hivemind itself parses whatever it is sent, and waits for ever for a value that it cannot parse.
    """
    if len(value) > VALUE_BYTES_MAX + 16 or len(subkey) > 1024 or not math.isfinite(expires_s):
        return False
    if expires_s > now_s + KEPT_S_MAX:
        return False
    try:
        owner, body = msgpack.unpackb(subkey), msgpack.unpackb(value)
    except Exception:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds, by input
        return False
    return type(owner) is bytes and OWNER.fullmatch(owner) is not None and type(body) is bytes


def validator(held: StoredRecords | None = None) -> Any:
    """hivemind's RSASignatureValidator, for records of our form alone, as many as `held` takes."""
    from hivemind.dht.crypto import RSASignatureValidator

    class SignedRecords(RSASignatureValidator):
        def __init__(self) -> None:
            super().__init__()
            self._here = held or StoredRecords()

        def validate(self, record: Any) -> bool:
            subkey = record.subkey or b""
            now_s = time.time()
            try:
                if len(record.key) != KEY_BYTES:
                    return False
                if not acceptable(subkey, self.strip_value(record), record.expiration_time, now_s):
                    return False
                if not super().validate(record):
                    return False
            except Exception:  # a key that is none
                return False
            if _reading.get():
                return True
            nbytes = len(record.value) + len(subkey) + KEY_BYTES
            return self._here.take((record.key, subkey), record.expiration_time, nbytes, now_s)

    return SignedRecords()


def read_by_record() -> None:
    """Have hivemind, in this process, judge a peer's answer record by record, and hold what it asks and reads to limits
    (see above).

    It is changed in place: hivemind makes its protocol and its searches itself, and names what it says on the wire
    after their classes.
    """
    from hivemind.dht.node import _SearchState
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.timed_storage import ValueWithExpiration

    find, judge, asked = DHTProtocol.call_find, DHTProtocol._validate_dictionary, Asked()

    async def call_find(self: Any, peer: Any, keys: Any) -> Any:
        keys = list(keys)
        if not asked.may(peer, keys, time.monotonic()):
            return {key: (None, {}) for key in keys}
        before = _reading.set(True)
        try:
            found = await find(self, peer, keys)
        finally:
            _reading.reset(before)
        if found is None:
            return None
        return {key: (copied(value), neighbours(peer, nearest)) for key, (value, nearest) in found.items()}

    def copied(answer: Any) -> Any:
        """Its records alone: whatever else the peer says of them is not handed on."""
        return None if answer is None else gathered({}, answer.value)

    def gathered(known: dict[Any, Any], more: Any) -> Any:
        """A dictionary of our own making, as fresh as its freshest record; the freshest ones stay within bounds."""
        with more.freeze():
            for subkey, each in more.items():
                if subkey not in known or known[subkey].expiration_time < each.expiration_time:
                    known[subkey] = each
        made, nbytes = DictionaryDHTValue(), 0
        order = sorted(known.items(), key=lambda item: item[1].expiration_time, reverse=True)
        with made.freeze():
            for subkey, each in order[:READ_RECORDS_MAX]:
                nbytes += len(each.value) + RECORD_COST_BYTES
                if nbytes > READ_BYTES_MAX:
                    break
                made.store(subkey, each.value, each.expiration_time)
        return ValueWithExpiration(made, order[0][1].expiration_time) if order else None

    def neighbours(peer: Any, nearest: dict[Any, Any]) -> dict[Any, Any]:
        """Peers other than the one that answers, each under one name, and at most a bucket of them."""
        names = {other: name for name, other in list(nearest.items())[:NEIGHBOURS_MAX] if other != peer}
        return {name: other for other, name in names.items()}

    def judge_all(self: Any, key: bytes, dictionary: Any) -> bool:
        if not _reading.get():
            return judge(self, key, dictionary)  # of what is to be kept: all of it or nothing
        with dictionary.freeze():
            for number, (subkey, (value, expires_s)) in enumerate(list(dictionary.items())):
                full = number >= READ_RECORDS_MAX
                if full or not self._validate_record(key, self.serializer.dumps(subkey), value, expires_s):
                    del dictionary[subkey]
        return bool(dictionary)

    def add_candidate(self: Any, candidate: Any, source_node_id: Any) -> None:
        """As hivemind's, into a dictionary of the search's own: there it may be the one that is stored here."""
        if self.finished or candidate is None or not isinstance(candidate.value, DictionaryDHTValue):
            return  # a plain value has no owner, so no rule lets it through
        merged = gathered({} if self.binary_value is None else dict(self.binary_value.data), candidate.value)
        if merged is None:
            return
        self.binary_value = merged.value
        if self.expiration_time is None or merged.expiration_time > self.expiration_time:
            self.expiration_time, self.source_node_id = merged.expiration_time, source_node_id
            if self.expiration_time >= self.sufficient_expiration_time:
                self.finish_search()

    DHTProtocol.call_find = call_find  # type: ignore[method-assign]
    DHTProtocol._validate_dictionary = judge_all  # type: ignore[method-assign]
    _SearchState.add_candidate = add_candidate  # type: ignore[method-assign]
