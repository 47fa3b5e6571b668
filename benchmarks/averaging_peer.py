"""One peer of benchmarks/averaging.py: it holds rounds with one tool, when it is told to, and says what came of them.

Each tool (averaging_thinpipe.py, averaging_hivemind.py, averaging_gloo.py) is a program of its own, since hivemind has
to fork before gRPC and torch have threads. All speak as `serve` does: one JSON line in, one JSON line out.

| `do` | what it does | answers with |
|---|---|---|
| `start` | joins whoever is at `boot` | `address`, for the others |
| `open` | a group that averages tensors of these `shapes` as `spec` says, on ports of its own | `payload_bytes` |
| `give` | draws this peer's contribution to round `draw`; then whatever a tool does before a round | `prepared_s` |
| `hold` | the round, after `late_s` | `ended_s` and how many `members` there were |
| `check` | compares with the float64 mean of what `lanes` drew, if any | `digest`, `off`, the share `unchanged` |

What fails answers with `error`, which is what a user of the tool would see, and the peer goes on listening.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from described import described
from torch import Tensor

SCALE = 1e-3  # of what is averaged: about what a weight moves in a step
SEED = 20261130


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which peer this is. addresses: of all, by lane. patience_s: after which a tool should give up on one. scratch: a
    directory of its own."""

    lane: int
    addresses: list[str]
    patience_s: float
    scratch: Path

    @property
    def lanes(self) -> int:
        return len(self.addresses)


class Tool(ABC):
    """A program that averages. All peers do the same at the same time, but for `hold`, which may begin apart."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def start(self, boot: str) -> str:
        """Join the peers at `boot`, "" for the first one. Returns what the others need to know."""
        del boot
        return ""

    @abstractmethod
    def open(self, spec: str, shapes: list[tuple[int, ...]], group: int) -> float:
        """A new group, in the place of the last one. Returns how many bytes of numbers each peer has to send a round,
        without what wraps them."""

    @abstractmethod
    def give(self, tensors: list[Tensor]) -> None:
        """What this peer contributes to the next round (float32), and whatever the tool does before one."""

    @abstractmethod
    def hold(self) -> int:
        """One round. Returns how many took part."""

    @abstractmethod
    def taken(self) -> list[Tensor]:
        """The mean, as this peer has it now."""

    @abstractmethod
    def close(self) -> None: ...


def drawn(shapes: list[tuple[int, ...]], lane: int, draw: int) -> list[Tensor]:
    """What that lane contributes to round `draw`: normal numbers, the same in every process."""
    generator = torch.Generator().manual_seed(SEED + 1000 * draw + lane)
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.randn(sum(sizes), generator=generator).mul_(SCALE)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


class Peer:
    """A tool and what it was told."""

    def __init__(self, tool: Tool) -> None:
        self.tool = tool
        self._shapes: list[tuple[int, ...]] = []
        self._draw = 0

    def start(self, boot: str) -> dict[str, Any]:
        return {"address": self.tool.start(boot)}

    def open(self, spec: str, shapes: list[list[int]], group: int) -> dict[str, Any]:
        self._shapes = [tuple(shape) for shape in shapes]
        return {"payload_bytes": self.tool.open(spec, self._shapes, group)}

    def give(self, draw: int) -> dict[str, Any]:
        self._draw = draw
        tensors = drawn(self._shapes, self.tool.place.lane, draw)
        began_s = time.monotonic()
        self.tool.give(tensors)
        return {"prepared_s": time.monotonic() - began_s}

    def hold(self, late_s: float) -> dict[str, Any]:
        time.sleep(late_s)
        return {"members": self.tool.hold(), "ended_s": time.monotonic()}

    def check(self, lanes: list[int]) -> dict[str, Any]:
        taken = [tensor.detach().flatten() for tensor in self.tool.taken()]
        digest = xxhash.xxh3_64()
        for tensor in taken:
            digest.update(tensor.numpy().tobytes())
        if not lanes:
            return {"digest": digest.hexdigest()}
        own = self.tool.place.lane
        of_lane = {lane: torch.cat([each.flatten() for each in drawn(self._shapes, lane, self._draw)]) for lane in
                   {*lanes, own}}  # fmt: skip
        mean = torch.stack([of_lane[lane].double() for lane in lanes]).mean(dim=0)
        found = torch.cat(taken)
        off = (found - mean).norm() / mean.norm()
        unchanged = torch.isclose(found, of_lane[own], rtol=0, atol=SCALE * 1e-5)
        return {"digest": digest.hexdigest(), "off": float(off), "unchanged": float(unchanged.double().mean())}


def serve(make: Callable[[Place], Tool]) -> None:
    """The process: read commands until there are no more."""
    parser = described(sys.modules["__main__"].__doc__)
    parser.add_argument("--lane", type=int, required=True)
    parser.add_argument("--addresses", required=True, help="of all peers, with commas between")
    parser.add_argument("--patience", type=float, required=True, help="seconds after which a peer is given up")
    parser.add_argument("--scratch", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch|hivemind")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not print into the answers
    addresses = given.addresses.split(",")
    tool = make(Place(lane=given.lane, addresses=addresses, patience_s=given.patience, scratch=given.scratch))
    peer = Peer(tool)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            said = getattr(peer, command.pop("do"))(**command)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}".strip(), "ended_s": time.monotonic()}
        print(json.dumps(said), file=answers)
    tool.close()
