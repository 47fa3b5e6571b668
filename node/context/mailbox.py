"""Parts of keys and values between lanes that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from ...protocol.messages import Message
from ..run_records import Stopwatch
from .context_parts import message_of
from .exchange import ContextKey

Sent = Callable[[int, Message], None]
DEADLINE_S = 600.0  # what a lane may compute until another one has its part; a lane that fails is known at once


class Mailbox:
    """All parts that are under way in this process. A lane that fails ends the waiting of all others."""

    def __init__(self, *, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._parts: dict[tuple[int, int, ContextKey], dict[int, bytes]] = {}  # (stage, to, what) -> from -> part
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def of(
        self, stage: int, lane: int, on_sent: Sent = lambda _, __: None, watch: Stopwatch | None = None
    ) -> LaneMailbox:
        """The transport of a node. on_sent: is given all that it sends, and to which lane, on its own thread. watch: of
        the work in which it waits for what it receives."""
        return LaneMailbox(self, stage, lane, on_sent, watch)

    def fail(self, error: BaseException) -> None:
        """A lane has failed; the first one that says so is who is told of."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def put(self, stage: int, lane: int, to: int, key: ContextKey, body: bytes) -> None:
        with self._changed:
            self._parts.setdefault((stage, to, key), {})[lane] = body
            self._changed.notify_all()

    def get(self, stage: int, lane: int, by: int, key: ContextKey) -> bytes:
        """Raises TimeoutError, and RuntimeError where another lane has failed."""
        place = (stage, by, key)
        with self._changed:
            there = self._changed.wait_for(
                lambda: self.failure is not None or lane in self._parts.get(place, {}), self._deadline_s
            )
            if self.failure is not None:
                raise RuntimeError(f"lane {by} waits in vain for {key}: another lane has failed") from self.failure
            if not there:
                raise TimeoutError(f"lane {by} waited {self._deadline_s:g} s for {key}, from lane {lane}")
            body = self._parts[place].pop(lane)
            if not self._parts[place]:
                del self._parts[place]
            return body


@dataclass(frozen=True, slots=True)
class LaneMailbox:
    """The `ContextTransport` of one node."""

    mailbox: Mailbox
    stage: int
    lane: int
    on_sent: Sent
    watch: Stopwatch | None

    def send(self, lane: int, key: ContextKey, body: bytes) -> None:
        self.on_sent(lane, message_of(key, body))
        self.mailbox.put(self.stage, self.lane, lane, key, body)

    def receive(self, lane: int, key: ContextKey) -> bytes:
        with self.watch.waiting_within("compute") if self.watch else nullcontext():
            return self.mailbox.get(self.stage, lane, self.lane, key)
