"""Which records of the DHT a node keeps and hands on: those that their owners signed, of bounded size and number.

hivemind's own rule is one signature check. On top of it, here:

- A record has the form of ours (`acceptable`), before hivemind parses it.
- What strangers have had kept here is counted, and has a bound (`Held`). What is only read is not counted: who asks
  where its neighbours are must not be told nothing because other records fill its own shelf.
- One bad record of a peer's answer is left out. hivemind drops the whole answer, so that one peer that answers with
  ours and a forged one would hide ours.
- An answer is as fresh as its freshest record. hivemind believes the number beside it, and ends its search at one that
  lies far enough ahead, so that one peer with an empty answer "until the year 9999" would be the only one heard.
"""

from __future__ import annotations

import math
import re
import time
from contextvars import ContextVar
from typing import Any

import msgpack

VALUE_BYTES_MAX = 64 * 1024
KEPT_S_MAX = 600.0
HELD_RECORDS_MAX, HELD_BYTES_MAX = 16384, 64 * 2**20  # of all keys, that strangers can make this process keep
OWNER = re.compile(rb"\[owner:ssh-rsa [A-Za-z0-9+/=]{360,760}\]")  # 2048 to 4096 bits

_reading: ContextVar[bool] = ContextVar("reading", default=False)  # a peer's answer, in this task


class Held:
    """How much strangers have had kept here: (key, subkey) -> (expiration, bytes). Who is in may stay; who comes when
    it is full is turned away."""

    def __init__(self, records_max: int = HELD_RECORDS_MAX, bytes_max: int = HELD_BYTES_MAX) -> None:
        self._records_max, self._bytes_max = records_max, bytes_max
        self._held: dict[tuple[bytes, bytes], tuple[float, int]] = {}
        self._nbytes = 0

    def take(self, place: tuple[bytes, bytes], expires_s: float, nbytes: int, now_s: float) -> bool:
        """Whether there is room; it is taken then."""
        if not self._fits(place, nbytes):
            for old in [old for old, (until_s, _) in self._held.items() if until_s < now_s]:
                self._nbytes -= self._held.pop(old)[1]
            if not self._fits(place, nbytes):
                return False
        before = self._held.get(place, (0.0, 0))
        self._held[place] = (max(expires_s, before[0]), nbytes)
        self._nbytes += nbytes - before[1]
        return True

    def _fits(self, place: tuple[bytes, bytes], nbytes: int) -> bool:
        known = self._held.get(place)
        count = len(self._held) + (known is None)
        return count <= self._records_max and self._nbytes + nbytes - (known[1] if known else 0) <= self._bytes_max


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


def validator(held: Held | None = None) -> Any:
    """hivemind's RSASignatureValidator, for records of our form alone, as many as `held` takes."""
    from hivemind.dht.crypto import RSASignatureValidator

    class SignedRecords(RSASignatureValidator):
        def __init__(self) -> None:
            super().__init__()
            self._here = held or Held()

        def validate(self, record: Any) -> bool:
            subkey = record.subkey or b""
            now_s = time.time()
            try:
                if not acceptable(subkey, self.strip_value(record), record.expiration_time, now_s):
                    return False
                if not super().validate(record):
                    return False
            except Exception:  # a key that is none
                return False
            if _reading.get():
                return True
            return self._here.take((record.key, subkey), record.expiration_time, len(record.value), now_s)

    return SignedRecords()


def read_by_record() -> None:
    """Have hivemind's protocol, in this process, judge a peer's answer record by record (see above).

    It is changed in place: hivemind makes its protocol itself, and names what it says on the wire after the class.
    """
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.utils.timed_storage import ValueWithExpiration

    find, judge = DHTProtocol.call_find, DHTProtocol._validate_dictionary

    async def call_find(self: Any, peer: Any, keys: Any) -> Any:
        before = _reading.set(True)
        try:
            found = await find(self, peer, keys)
        finally:
            _reading.reset(before)
        if found is None:
            return None
        return {key: (_aged(value), nearest) for key, (value, nearest) in found.items()}

    def _aged(answer: Any) -> Any:
        """With the expiration of the freshest record in it; `judge_all` has left none that is not signed."""
        if answer is None:
            return None  # a plain value too: it has no owner, so no rule lets it through
        with answer.value.freeze():
            return ValueWithExpiration(answer.value, max(each.expiration_time for _, each in answer.value.items()))

    def judge_all(self: Any, key: bytes, dictionary: Any) -> bool:
        if not _reading.get():
            return judge(self, key, dictionary)  # of what is to be kept: all of it or nothing
        with dictionary.freeze():
            for subkey, (value, expires_s) in list(dictionary.items()):
                if not self._validate_record(key, self.serializer.dumps(subkey), value, expires_s):
                    del dictionary[subkey]
        return bool(dictionary)

    DHTProtocol.call_find = call_find  # type: ignore[method-assign]
    DHTProtocol._validate_dictionary = judge_all  # type: ignore[method-assign]
