"""A node's end of discovery: starts the process that holds hivemind.DHT (node/discovery/dht.py), and reads and
writes records.

Everything here blocks, each wait with a deadline; a caller with an event loop calls it in a thread. If the DHT's
process ends, every call raises DiscoveryError. Training can go on without it: neighbours that have met need no
discovery until one is lost.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgpack

from ...protocol.errors import RemoteProtocolError
from ...protocol.node_record import (
    KEPT_S,
    NodeRecord,
    RunRecord,
    Seen,
    decode_run,
    encode_record,
    encode_run,
    read_records,
    renew_every_s,
)
from ...sim.launch.node_launch import node_environment
from .dht import PIPE_BYTES_MAX, READ_S, START_S, STORE_S, write_frame
from .multiaddr import Multiaddr

RUNS_KEY = "thinpipe/runs"
RUN_RENEW_S = 60.0
SLACK_S = 10.0  # beyond what the DHT's process itself waits
STOP_S = 6.0  # of which hivemind takes three
WORDS_BYTES_MAX = 2**20  # of what its process has printed
MODULE = "thinpipe.node.discovery.dht"


class DiscoveryError(RuntimeError):
    """The DHT cannot be started, entered or asked; `str(error)` is one line that says why, with the remedy."""

    def __init__(self, line: str, exit_code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def run_key(run: str) -> str:
    return f"thinpipe/run/{run}"


class Discovery:
    """One member of the DHT. Close it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        complaints: Any,
        peers: Sequence[str],
        listen: Multiaddr,
        announce: Multiaddr | None,
    ) -> None:
        self._process, self._complaints = process, complaints
        self.peers, self._listen, self._announce = tuple(peers), listen, announce
        self.addresses: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._number = 0
        self._unread = bytearray()
        self._words = ""

    @classmethod
    def begin(
        cls,
        peers: Sequence[str],
        *,
        listen: Multiaddr,
        announce: Multiaddr | None = None,
        client: bool = False,
    ) -> Discovery:
        """Begin to enter the DHT of `peers` (none: to begin one); `ready` has to come next.

        client: only to ask, so that nobody relies on this member.
        """
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this)
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={"HIVEMIND_LOGLEVEL": "ERROR", **node_environment()},
            start_new_session=True,  # a Ctrl-C is for the node, which then ends this
        )
        made = cls(process, complaints, peers, listen, announce)
        told = str(announce) if announce else None
        question = {"peers": list(peers), "listen": [str(listen)], "announce": told and [told], "client": client}
        assert process.stdin
        with suppress(OSError):  # it has ended; `ready` says why
            write_frame(process.stdin, question)
        return made

    def ready(self) -> Discovery:
        """Wait until it is entered. Raises DiscoveryError, and is closed then."""
        try:
            self.addresses = tuple(self._answer(0, START_S + SLACK_S))
        except DiscoveryError as error:
            self.close()
            raise _explained(error, self.peers, self._listen) from None
        except BaseException:
            self.close()
            raise
        return self

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self._process.poll() is None

    def again(self, peers: Sequence[str]) -> Discovery:
        """A new one in the place of this, which has ended. Raises DiscoveryError."""
        self.close()
        return Discovery.begin(peers, listen=self._listen, announce=self._announce).ready()

    def close(self) -> None:
        """Leave it, and end its process and daemon. What is asked of it then raises DiscoveryError."""
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._lock:  # who waits for an answer is told first that there will be none
            assert self._process.stdout
            self._process.stdout.close()
            self._last_words()
            self._complaints.close()

    # -- records -----------------------------------------------------------------------------------------------------

    def publish(self, record: NodeRecord, *, lease_s: float) -> bool:
        """Tell all; it is renewed for `lease_s` seconds from now. Whether anybody took it."""
        renew_s = renew_every_s(record.nodes)
        return self._publish(run_key(record.run), encode_record(record), renew_s, lease_s)

    def publish_run(self, record: RunRecord, *, lease_s: float) -> bool:
        return self._publish(RUNS_KEY, encode_run(record), RUN_RENEW_S, lease_s)

    def read(self, run: str, configuration: str, stages: int, lanes: int = 1) -> tuple[list[Seen], Counter[str]]:
        """The records of that run's nodes, and how many others lay there, by fault."""
        found = self._read(run_key(run))
        return read_records(found, run=run, configuration=configuration, stages=stages, lanes=lanes)

    def runs(self) -> tuple[list[RunRecord], Counter[str]]:
        """The runs that are announced here, each once, and how many records were left out, by fault. Two records of one
        fingerprint are of one run: they may differ in what is each machine's own."""
        found: dict[tuple[str, str], RunRecord] = {}
        left_out: Counter[str] = Counter()
        for raw, _ in self._read(RUNS_KEY):
            try:
                record = decode_run(raw)
            except RemoteProtocolError as error:
                left_out[error.fault] += 1
            else:
                found.setdefault((record.run, record.configuration), record)
        return list(found.values()), left_out

    def _publish(self, key: str, value: bytes, renew_s: float, lease_s: float) -> bool:
        question = {"ask": "publish", "key": key, "value": value, "renew_s": renew_s, "kept_s": KEPT_S}
        return bool(self._ask({**question, "lease_s": lease_s}, STORE_S))

    def _read(self, key: str) -> list[tuple[bytes, float]]:
        found = self._ask({"ask": "read", "key": key, "kept_s": KEPT_S}, READ_S)
        return [(raw, age_s) for raw, age_s in found]

    # -- pipes -------------------------------------------------------------------------------------------------------

    def _ask(self, question: dict[str, Any], deadline_s: float) -> Any:
        with self._lock:
            self._number += 1
            self._bound_words()
            try:
                assert self._process.stdin
                write_frame(self._process.stdin, {**question, "number": self._number})
            except (OSError, ValueError):
                raise DiscoveryError(f"the DHT's process has ended{self._last_words()}") from None
            # What it is doing when asked comes first: a renewal.
            return self._answer(self._number, deadline_s + STORE_S + SLACK_S)

    def _answer(self, number: int, deadline_s: float) -> Any:
        until_s = time.monotonic() + deadline_s
        while True:
            answer = self._frame(until_s, deadline_s)
            if answer["number"] != number:  # of a question that nobody waits for any more
                continue
            if "error" in answer:
                raise DiscoveryError(answer["error"])
            return answer["ok"]

    def _frame(self, until_s: float, deadline_s: float) -> dict[str, Any]:
        assert self._process.stdout
        out = self._process.stdout.fileno()
        while True:
            size = int.from_bytes(self._unread[:4], "big") if len(self._unread) >= 4 else PIPE_BYTES_MAX
            if size > PIPE_BYTES_MAX:
                raise DiscoveryError(f"the DHT's process sends {size} bytes, at most {PIPE_BYTES_MAX} are read")
            if len(self._unread) >= 4 + size:
                raw = bytes(self._unread[4 : 4 + size])
                del self._unread[: 4 + size]
                return msgpack.unpackb(raw)
            if not select.select([out], [], [], max(0.0, until_s - time.monotonic()))[0]:
                raise DiscoveryError(f"the DHT's process did not answer within {deadline_s:g} s; is the machine busy?")
            more = os.read(out, 2**16)
            if not more:
                raise DiscoveryError(f"the DHT's process has ended{self._last_words()}")
            self._unread += more

    def _bound_words(self) -> None:
        """A fault that lasts, of the network say, is printed each time, over weeks: all of it is dropped then."""
        if not self._complaints.closed and os.fstat(self._complaints.fileno()).st_size > WORDS_BYTES_MAX:
            self._complaints.seek(0)  # where its process writes on: the file is open once, for both
            self._complaints.truncate()

    def _last_words(self) -> str:
        """What its process said last; known still when this is closed, since it may be asked then."""
        if not self._complaints.closed:
            self._complaints.seek(max(0, self._complaints.seek(0, os.SEEK_END) - 2048))
            lines = [line for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
            self._words = f": {lines[-1].strip()}" if lines else ""
        return self._words


def _explained(error: DiscoveryError, peers: Sequence[str], listen: Multiaddr) -> DiscoveryError:
    """What hivemind says, in words that name the remedy."""
    said = str(error)
    if "local time must be within" in said:
        return DiscoveryError(
            "the clock of this machine is more than 3 s off that of a peer in the DHT; set both by NTP", 2
        )
    if "bootstrap failed" in said or "failed to connect to bootstrap" in said.lower():
        return DiscoveryError(
            f"none of the DHT's peers answers ({', '.join(peers)}); is the one that --join names running, and its "
            "port for the DHT (--dht-port there) reachable from here?"
        )
    if "can't access this node" in said:
        return DiscoveryError(f"a peer of the DHT cannot reach this machine at {listen}; open that port (--dht-port)")
    if "listen" in said.lower() or "address already in use" in said.lower():
        return DiscoveryError(f"the DHT cannot listen at {listen}: {said}; choose another --dht-port", 2)
    return DiscoveryError(f"the DHT cannot be started: {said}")
