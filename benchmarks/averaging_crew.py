"""The peers of benchmarks/averaging.py that run one tool, a process and a network namespace each, told what to do.

Every wait has a deadline and names the peer. CPU seconds are those of all processes on a peer's node, as the kernel has
them: hivemind has four a peer. `lose` ends a peer as a machine ends: all processes on its node at once, by SIGKILL;
before that its cable may be pulled, so that not even its kernel can say that it is gone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from thinpipe.sim.launch.node_launch import node_environment
from thinpipe.sim.links.netns import Network
from thinpipe.sim.links.tc import run

Answer = dict[str, Any]


class PeerFailed(RuntimeError):
    """A peer ended, said nothing in time, or could not do what it was told; one line, with the end of its log."""


class Crew:
    """The peers with this tool on the first `peers` nodes of `made`. patience_s: after which a tool gives a peer up."""

    def __init__(self, made: Network, tool: str, peers: int, *, patience_s: float, scratch: Path) -> None:
        self.made, self.tool, self.peers, self._patience_s = made, tool, peers, patience_s
        self._groups = 0
        self._stuck: dict[int, str] = {}  # peers from which an answer is still due
        self._logs = [scratch / f"peer-{lane}.log" for lane in range(peers)]
        self._answers: list[queue.Queue[str]] = [queue.Queue() for _ in range(peers)]
        self._processes: list[subprocess.Popen[str]] = []
        scratch.mkdir(parents=True)
        program = Path(__file__).with_name(f"averaging_{tool}.py")
        addresses = ",".join(made.addresses[:peers])
        environment = {**node_environment(), "GLOO_SOCKET_IFNAME": "eth0", "PYTHONWARNINGS": "ignore"}
        for lane in range(peers):
            command = [*made.prefix(lane), sys.executable, str(program), "--lane", str(lane), "--addresses", addresses]
            command += ["--patience", str(patience_s), "--scratch", str(scratch / f"peer-{lane}")]
            with self._logs[lane].open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            self._processes.append(process)
            threading.Thread(target=self._listen, args=(lane, process), daemon=True).start()

    def _listen(self, lane: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self._answers[lane].put(line)
        self._answers[lane].put("")

    # -- commands -----------------------------------------------------------------------------------------------------

    def join(self, timeout_s: float) -> None:
        """Peer 0 first: the others need to know where it is."""
        boot = ""
        for lane in range(self.peers):
            self.tell([lane], {"do": "start", "boot": boot})
            (answer,) = self.hear([lane], timeout_s)
            boot = boot or answer["address"]

    def open(self, spec: str, shapes: list[list[int]], timeout_s: float) -> float:
        """A new group. Returns what of payload each peer has to send in a round, in bytes."""
        self._groups += 1
        command = {"do": "open", "spec": spec, "shapes": shapes, "group": self._groups}
        return self.all(command, timeout_s)[0]["payload_bytes"]

    def all(self, command: Answer, timeout_s: float) -> list[Answer]:
        """What all peers answer to the same command, by lane."""
        self.tell(range(self.peers), command)
        return self.hear(range(self.peers), timeout_s)

    def tell(self, lanes: Sequence[int], command: Answer) -> None:
        for lane in set(lanes) - set(self._stuck):
            stdin = self._processes[lane].stdin
            assert stdin
            with suppress(BrokenPipeError):  # whoever listens for its answer will hear that it ended
                stdin.write(json.dumps(command) + "\n")
                stdin.flush()

    def hear(self, lanes: Sequence[int], timeout_s: float, *, failing: bool = False) -> list[Answer]:
        """The next answers. failing: errors are answers, too, and so is that there is none, after which that peer is
        told nothing more. Raises PeerFailed."""
        due_s = time.monotonic() + timeout_s
        answers: list[Answer] = []
        for lane in lanes:
            line = ""
            if lane not in self._stuck:
                try:
                    line = self._answers[lane].get(timeout=max(0.0, due_s - time.monotonic()))
                except queue.Empty:
                    self._stuck[lane] = f"nothing within {timeout_s:.0f} s"
            why = self._stuck.get(lane, "the process ended")
            answer = json.loads(line) if line else {"error": why, "ended_s": time.monotonic()}
            if "error" in answer and not failing:
                raise self._failed(lane, answer["error"])
            answers.append(answer)
        return answers

    def _failed(self, lane: int, why: str) -> PeerFailed:
        tail = self._logs[lane].read_text(errors="replace")[-1500:]
        return PeerFailed(f"{self.tool}, peer {lane} of {self.peers}: {why}\n{tail}")

    # -- what the kernel knows ----------------------------------------------------------------------------------------

    def cpu_s(self) -> float:
        """Of all peers' processes, until now."""
        total = 0.0
        for lane in range(self.peers):
            for pid in self._pids(lane):
                with suppress(psutil.NoSuchProcess):
                    times = psutil.Process(pid).cpu_times()
                    total += times.user + times.system
        return total

    def passed(self) -> list[tuple[int, int]]:
        """Of each peer: bytes that it has sent, and packets."""
        counters = [self.made.counters(lane) for lane in range(self.peers)]
        return [(each.sent_bytes, each.sent_packets) for each in counters]

    def lose(self, lane: int, *, unplug: bool) -> None:
        if unplug:
            self._plug(lane, "down")
        self._kill(lane)

    def _plug(self, lane: int, state: str) -> None:
        run(["ip", "-n", self.made.switch, "link", "set", f"port{lane}", state])

    def _pids(self, lane: int) -> list[int]:
        return list(map(int, run(["ip", "netns", "pids", self.made.nodes[lane]]).split()))

    def _kill(self, lane: int) -> None:
        for pid in self._pids(lane):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End all, and leave the network as it was."""
        for lane, process in enumerate(self._processes):
            self._kill(lane)
            process.wait()
            self._plug(lane, "up")
