"""What benchmarks/averaging.py measures: rounds of each program at each cap, and rounds in which a peer is lost.

Everything that is no part of a round is outside of what is timed and of whose CPU is counted: drawing the tensors,
looking for a group, comparing what came out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from averaging_crew import Crew
from rich.progress import Progress
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.model.architecture import with_layers
from thinpipe.node.model.slices import skeleton
from thinpipe.node.preparation import resolve_architecture
from thinpipe.sim.links.netns import Network
from thinpipe.sim.links.shaper import LinkProfile

START_S = 90.0  # for imports on a busy machine, and for finding one another
OBSERVED = 5.0  # times the patience that a tool was told to have
LATE_S = 0.3  # between two peers, where they come one after the other
SMALL = [[256, 128], [1000]]  # tensors to try orders of arrival with


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One round. Bytes and packets: sent by each peer. seconds: until the last peer was through; prepared_s: what a
    tool did before, on the slowest peer. cpu_s: mean of a peer."""

    program: str
    cap: str
    peers: int
    seconds: float
    prepared_s: float
    payload_bytes: float
    sent_bytes: list[int]
    sent_packets: list[int]
    cpu_s: float
    members: list[int]
    digests: list[str]
    off: float | None  # of a group's first round


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A round in which the last peer was lost, and the one after. after_s: from the loss until each survivor's round
    was over; said: how, or the error. off: from the survivors' mean; unchanged: the share of numbers that are a
    survivor's own still; digests: all three of those that could be asked."""

    program: str
    how: str
    peers: int
    patience_s: float
    after_s: list[float]
    said: list[str]
    off: list[float]
    unchanged: list[float]
    digests: list[str]
    next_said: list[str]
    next_s: list[float]


class Benchmark:
    """Everything that is measured, in a network of as many nodes as are ever needed."""

    def __init__(
        self,
        given: argparse.Namespace,
        tensors: list[list[int]],
        made: Network,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.given, self._made, self._scratch = given, made, scratch
        self.held: list[Held] = []
        self.lost: list[Lost] = []
        self.by_arrival: dict[str, bool] = {}
        self._shapes = tensors
        self._draws = 0
        self._progress = progress
        rounds = (given.rounds and given.rounds + 1) * len(given.caps) * len(given.programs)
        losses = given.losses * len(given.lost) * len({program.split()[0] for program in given.programs})
        self._task = progress.add_task("", total=len(given.peers) * (rounds + losses))

    def _say(self, what: str, done: int = 0) -> None:
        self._progress.update(self._task, description=what, advance=done)

    def _deadline_s(self, payload_bytes: float) -> float:
        """For one round: ten times what the thinnest link needs, and a busy machine's minute."""
        slowest = min((LinkProfile.parse(cap).rate_bits_per_s or 1e9) for cap in self.given.caps)
        return 60.0 + 10 * payload_bytes * 8 / slowest

    @contextmanager
    def crew(self, tool: str, peers: int, what: str) -> Iterator[Crew]:
        self._made.cap(LinkProfile.parse("none"))
        scratch = self._scratch / f"{what}-{tool}-{peers}".replace(" ", "-")
        crew = Crew(self._made, tool, peers, patience_s=self.given.patience, scratch=scratch)
        try:
            crew.join(START_S)
            yield crew
        finally:
            crew.close()

    def measure(self, tool: str, specs: list[str], peers: int) -> None:
        """All programs of one tool."""
        self._say(f"{tool}, {peers} peers: starting")
        with self.crew(tool, peers, "rounds") as crew:
            for spec in specs:
                self._made.cap(LinkProfile.parse("none"))
                if peers >= 3:
                    self._say(f"{tool} {spec}: order of arrival")
                    self.by_arrival[f"{tool} {spec}"] = self._depends_on_arrival(crew, spec)
                payload = crew.open(spec, self._shapes, START_S)
                off = None
                for cap in self.given.caps:
                    self._made.cap(LinkProfile.parse(cap))
                    for number in range(self.given.rounds + 1):
                        self._say(f"{tool} {spec}, {peers} peers, {cap}")
                        row = self.hold(crew, spec, cap, payload, compare=off is None)
                        off = off if row.off is None else row.off
                        self.held += [replace(row, off=off)] if number else []
                        self._say(f"{tool} {spec}, {peers} peers, {cap}", 1)

    def hold(self, crew: Crew, spec: str, cap: str, payload_bytes: float, *, compare: bool = False) -> Held:
        before, deadline_s = crew.passed(), self._deadline_s(payload_bytes)
        given = crew.all({"do": "give", "draw": self._draw()}, START_S)
        cpu_s, began_s = crew.cpu_s(), time.monotonic()
        held = crew.all({"do": "hold", "late_s": 0.0}, deadline_s)
        cpu_s = crew.cpu_s() - cpu_s
        after = crew.passed()
        checked = crew.all({"do": "check", "lanes": list(range(crew.peers)) if compare else []}, START_S)
        return Held(
            program=f"{crew.tool} {spec}",
            cap=cap,
            peers=crew.peers,
            seconds=max(answer["ended_s"] for answer in held) - began_s,
            prepared_s=max(answer["prepared_s"] for answer in given),
            payload_bytes=payload_bytes,
            sent_bytes=[b[0] - a[0] for a, b in zip(before, after, strict=True)],
            sent_packets=[b[1] - a[1] for a, b in zip(before, after, strict=True)],
            cpu_s=cpu_s / crew.peers,
            members=[answer["members"] for answer in held],
            digests=[answer["digest"] for answer in checked],
            off=max(answer["off"] for answer in checked) if compare else None,
        )

    def _draw(self) -> int:
        self._draws += 1
        return self._draws

    def _depends_on_arrival(self, crew: Crew, spec: str) -> bool:
        """Two groups that begin alike, given the same tensors, in opposite orders."""
        ends: list[list[str]] = []
        for order in (range(crew.peers), range(crew.peers)[::-1]):
            crew.open(spec, SMALL, START_S)
            crew.all({"do": "give", "draw": 0}, START_S)
            for place, lane in enumerate(order):
                crew.tell([lane], {"do": "hold", "late_s": LATE_S * place})
            crew.hear(range(crew.peers), START_S)
            checked = crew.all({"do": "check", "lanes": []}, START_S)
            ends.append([answer["digest"] for answer in checked])
        return ends[0] != ends[1]

    def lose(self, tool: str, spec: str, peers: int, how: str, number: int) -> None:
        """The last peer goes in the middle of a round, and what the others make of it, for a while
        (`OBSERVED`)."""
        self._say(f"{tool} {spec}, {peers} peers: {how}")
        given = self.given
        cap, last, survivors = given.caps[0], peers - 1, list(range(peers - 1))
        with self.crew(tool, peers, f"{how}-{number}") as crew:
            payload = crew.open(spec, self._shapes, START_S)
            self._made.cap(LinkProfile.parse(cap))
            whole_s = self.hold(crew, spec, cap, payload).seconds
            crew.all({"do": "give", "draw": self._draw()}, START_S)
            crew.tell(range(peers), {"do": "hold", "late_s": 0.0})
            time.sleep(whole_s / 2)
            crew.lose(last, unplug=how == "unplug")
            lost_s = time.monotonic()
            observed_s = OBSERVED * given.patience
            held = crew.hear(survivors, observed_s, failing=True)
            crew.tell(survivors, {"do": "check", "lanes": survivors})
            checked = crew.hear(survivors, START_S, failing=True)
            again_s = time.monotonic()
            crew.tell(survivors, {"do": "give", "draw": self._draw()})
            crew.hear(survivors, START_S, failing=True)
            crew.tell(survivors, {"do": "hold", "late_s": 0.0})
            following = crew.hear(survivors, observed_s, failing=True)
        found = [answer for answer in checked if "off" in answer]
        self.lost.append(
            Lost(
                program=f"{tool} {spec}",
                how=how,
                peers=peers,
                patience_s=given.patience,
                after_s=[answer["ended_s"] - lost_s for answer in held],
                said=[said(answer) for answer in held],
                off=[answer["off"] for answer in found],
                unchanged=[answer["unchanged"] for answer in found],
                digests=[answer["digest"] for answer in found],
                next_said=[said(answer) for answer in following],
                next_s=[answer["ended_s"] - again_s for answer in following],
            )
        )
        self._say(f"{tool} {spec}, {peers} peers: {how}", 1)


def said(answer: dict[str, Any]) -> str:
    return answer["error"] if "error" in answer else f"a round of {answer['members']}"


def shapes(preset: str, stages: int) -> list[list[int]]:
    """Of the parameters of an inner stage, where the preset's layers are in so many stages. Raises ModelError, or
    ValueError for more stages than layers."""
    architecture = resolve_architecture(parse_config(merge({}, {"model.preset": preset})))
    if not 1 <= stages <= (layers := architecture.num_hidden_layers):
        raise ValueError(f"{preset} has {layers} layers, for 1 to {layers} stages; {stages} is none of these")
    model = skeleton(with_layers(architecture, range(layers // stages)), torch.float32)
    return [list(parameter.shape) for name, parameter in model.named_parameters() if ".layers." in name]
