"""The process that holds a node's hivemind.DHT: `python -m thinpipe.node.discovery.dht`, spoken to through its pipes.

hivemind brings a forked process, a daemon of another language (p2pd), an event loop, log handlers and shared tensors
into whoever imports it, and it has to fork before gRPC and torch have threads. Here it has a process of its own, so
that none of that is near training, memory that strangers fill is not the node's, and the node that needs no discovery
never imports it. The node says what to publish and asks what others did; renewing is done here, for as long as the node
confirms them, so a record stays fresh while a node builds its stage, and goes stale when the node hangs.

No process is left behind: when the node's end of the pipe closes, however it died, all of this shuts down. Each child
(hivemind's process, p2pd) asks the kernel to be killed with its parent, for the case that this process is killed.

The pipes carry msgpack, each message after its length in four bytes, with one answer for each question. What comes over
the network has to pass the rules of `node.discovery.dht_admission` before hivemind keeps it or hands it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

import msgpack
import psutil

from ...sim.launch.parent_death import die_with_parent
from .dht_admission import read_by_record, validator

PIPE_BYTES_MAX = 16 * 2**20
START_S, STORE_S, READ_S = 60.0, 15.0, 15.0  # of a busy machine
PEER_S = 2.0  # for one answer of one peer; a peer that has just died is still listed, so a new node waits for it


# -- pipes ----------------------------------------------------------------------------------------------------------


def write_frame(pipe: IO[bytes], value: Any) -> None:
    raw = msgpack.packb(value)
    assert raw is not None
    pipe.write(len(raw).to_bytes(4, "big") + raw)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Any:
    """None at the end."""
    head = pipe.read(4)
    if len(head) < 4 or (size := int.from_bytes(head, "big")) > PIPE_BYTES_MAX:
        return None
    raw = pipe.read(size)
    return msgpack.unpackb(raw) if len(raw) == size else None


# -- hivemind -------------------------------------------------------------------------------------------------------


def start_dht(peers: list[str], listen: list[str], announce: list[str] | None, client: bool) -> tuple[Any, bytes]:
    """hivemind's DHT, ready, and the place in it that is this process's own."""
    import hivemind

    class Dht(hivemind.DHT):
        def run(self) -> None:
            """In the forked process: it goes with this one, and p2pd with it."""
            die_with_parent()
            read_by_record()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            spawn = asyncio.subprocess.create_subprocess_exec
            asyncio.subprocess.create_subprocess_exec = functools.partial(spawn, preexec_fn=die_with_parent)
            super().run()

    rules = validator()
    dht = Dht(
        initial_peers=peers or None,
        start=False,
        record_validators=[rules],
        client_mode=client,
        host_maddrs=listen,
        announce_maddrs=announce,
        startup_timeout=START_S,
        wait_timeout=PEER_S,
        nat_port_map=False,  # nothing is asked of a router, or of machines that nobody named
        auto_nat=False,
        use_relay=False,
        cache_locally=False,  # what is asked is asked for the newest
        cache_nearest=0,
    )
    dht.run_in_background(timeout=START_S)
    return dht, rules.local_public_key


class Service:
    """Answers the node's questions, and renews between them."""

    def __init__(self, dht: Any, place: bytes) -> None:
        self._dht, self._place = dht, place
        self._published: dict[str, dict[str, Any]] = {}

    def due_s(self) -> float:
        """Until something is to be renewed; at most a second, since the DHT's process may die meanwhile."""
        now = time.monotonic()
        return max(0.0, min([1.0, *(each["due_s"] - now for each in self._published.values())]))

    def renew(self) -> None:
        now = time.monotonic()
        for key, each in list(self._published.items()):
            if now > each["until_s"]:
                del self._published[key]
            elif now >= each["due_s"]:
                self._store(key, each)

    def _store(self, key: str, each: dict[str, Any]) -> bool:
        each["due_s"] = time.monotonic() + each["renew_s"]
        future = self._dht.store(
            key, each["value"], time.time() + each["kept_s"], subkey=self._place, return_future=True
        )
        try:
            return bool(future.result(STORE_S))
        except Exception:  # no peer in time, or one that broke; it is renewed soon
            traceback.print_exc()
            return False

    def publish(self, key: str, value: bytes, renew_s: float, kept_s: float, lease_s: float) -> bool:
        """Keep it under `key` for `lease_s` seconds from now; whether somebody took it."""
        each = {"value": value, "renew_s": renew_s, "kept_s": kept_s, "until_s": time.monotonic() + lease_s}
        before = self._published.get(key)
        self._published[key] = each
        if before and before["value"] == value:  # only the lease
            each["due_s"] = before["due_s"]
            return True
        return self._store(key, each)

    def read(self, key: str, kept_s: float) -> list[tuple[bytes, float]]:
        """What lies under `key`, and how many seconds ago each was renewed, the newest first."""
        found = self._dht.get(key, latest=True, return_future=True).result(READ_S)
        if found is None or not isinstance(found.value, dict):
            return []
        now = time.time()
        values = [(each.value, max(0.0, kept_s - (each.expiration_time - now))) for each in found.value.values()]
        values = [(value, age_s) for value, age_s in values if isinstance(value, bytes)]
        return sorted(values, key=lambda each: each[1])

    def addresses(self) -> list[str]:
        return [str(address) for address in self._dht.get_visible_maddrs(latest=True)]


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    first = read_frame(questions)
    if first is None:
        return None
    try:
        dht, place = start_dht(**first)
    except Exception as error:
        traceback.print_exc()
        return write_frame(answers, {"number": 0, "error": f"{type(error).__name__}: {error}"})
    try:
        service = Service(dht, place)
        write_frame(answers, {"number": 0, "ok": service.addresses()})
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(questions, asked), daemon=True).start()
        daemon = _daemon()
        while dht.is_alive() and daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE:
            try:
                question = asked.get(timeout=service.due_s())
            except queue.Empty:
                service.renew()
                continue
            if question is None:
                return None
            write_frame(answers, {"number": question.pop("number"), **_answer(service, question)})
            service.renew()
        print("hivemind's process or its p2pd has ended", file=sys.stderr)
        return None
    except psutil.NoSuchProcess:
        print("p2pd has ended", file=sys.stderr)
        return None
    finally:
        dht.shutdown()


def _daemon() -> psutil.Process:
    """hivemind's p2pd, without which it goes on as if nobody were there. Raises psutil.NoSuchProcess."""
    for each in psutil.Process().children(recursive=True):
        if each.name() == "p2pd":
            return each
    raise psutil.NoSuchProcess(0)


def _listen(questions: IO[bytes], asked: queue.SimpleQueue[Any]) -> None:
    while (question := read_frame(questions)) is not None:
        asked.put(question)
    asked.put(None)


def _answer(service: Service, question: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Callable[..., Any]] = {
        "publish": service.publish,
        "read": service.read,
        "addresses": service.addresses,
    }
    try:
        return {"ok": known[question.pop("ask")](**question)}
    except TimeoutError:  # whose message is empty
        return {"error": f"the DHT did not answer within {READ_S:g} s; is this machine busy, or its network down?"}
    except Exception as error:  # the node is told, and decides
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # That the node is gone is told by the pipe. The kernel's word would come too early: it speaks of the thread that
    # started this process, which ends before the node has said goodbye.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Whatever else is printed here is no answer.
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        _serve(questions, answers)


if __name__ == "__main__":
    main()
