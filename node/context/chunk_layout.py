"""Which positions of a sequence each lane holds, and whose keys and values it needs.

A sequence is cut into segments of equal length, numbered from its beginning. In *plain* order lane i holds segment i;
attention looks back only, so the last lane then computes the most and the first one the least. In *zigzag* order there
are twice as many segments, and lane i of C holds i and 2C-1-i: every lane has the same number of pairs of a query and a
key that it looks at. That order comes from the context parallelism of Llama 3 (arXiv 2407.21783, 3.3.2), and is the
default.

Between two segments there are three cases: the key's is earlier (all is seen), it is the same (a triangle), it is later
(nothing). So no block of attention ever needs a mask of its own, and what is not seen is neither sent nor computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Order = Literal["zigzag", "plain"]


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Sequences of `sequence_length` tokens over `chunks` lanes. Raises ValueError for a length that they do not
    divide, which says what would do."""

    sequence_length: int
    chunks: int
    order: Order = "zigzag"

    def __post_init__(self) -> None:
        if self.sequence_length % self.segments:
            whole = max(1, round(self.sequence_length / self.segments)) * self.segments
            raise ValueError(
                f"a sequence of {self.sequence_length} tokens is not {self.segments} equal segments, which "
                f"{self.chunks} chunks in {self.order} order need; choose a length such as {whole}"
            )

    @property
    def segments(self) -> int:
        """Of one sequence."""
        return self.chunks * self.segments_per_lane

    @property
    def segments_per_lane(self) -> int:
        return 2 if self.order == "zigzag" and self.chunks > 1 else 1

    @property
    def segment_length(self) -> int:
        """Tokens."""
        return self.sequence_length // self.segments

    @property
    def lane_length(self) -> int:
        """Tokens of one sequence that a lane holds."""
        return self.sequence_length // self.chunks

    def of_lane(self, lane: int) -> tuple[int, ...]:
        """The segments that a lane holds, from the earliest."""
        if self.chunks == 1:  # whichever lane it is has the whole sequence
            return (0,)
        if self.segments_per_lane == 1:
            return (lane,)
        return (lane, self.segments - 1 - lane)

    def owner(self, segment: int) -> int:
        """The lane that holds it."""
        return min(segment, self.segments - 1 - segment) if self.segments_per_lane == 2 else segment

    def positions(self, segment: int) -> range:
        """Of a segment's tokens in the sequence, from 0."""
        return range(segment * self.segment_length, (segment + 1) * self.segment_length)

    def lane_positions(self, lane: int) -> list[int]:
        """Of all that a lane holds, in the order in which it holds it."""
        return [position for segment in self.of_lane(lane) for position in self.positions(segment)]

    def needed_by(self, lane: int) -> tuple[int, ...]:
        """The segments of other lanes that a lane looks at, in the order in which it does: those that their owners send
        first come first, and of these the nearest before its last one."""
        own = self.of_lane(lane)
        needed = [segment for segment in range(own[-1]) if segment not in own]
        return tuple(sorted(needed, key=lambda segment: (self._sent_second(segment), -segment)))

    def _sent_second(self, segment: int) -> bool:
        return segment != self.of_lane(self.owner(segment))[0]

    def users(self, segment: int) -> tuple[int, ...]:
        """The other lanes that look at a segment, in order."""
        return tuple(lane for lane in range(self.chunks) if segment in self.needed_by(lane))

    def _drawn(self, segment: int, history: int) -> range:
        """Of a sequence with one target more, the ids that go with a segment: as far as `history` before it, its
        inputs, and its last target."""
        own = self.positions(segment)
        return range(max(0, own.start - history), own.stop + 1)

    def ids_length(self, lane: int, history: int = 0) -> int:
        """Ids of one sequence that a lane is given."""
        return sum(len(self._drawn(segment, history)) for segment in self.of_lane(lane))

    def take(self, ids_BS: np.ndarray, lane: int, history: int = 0) -> np.ndarray:
        """Of whole sequences with one target more, (B, T+1), what a lane is given, (B, ids_length): for each of its
        segments up to `history` ids before it, its inputs and, one further, its last target."""
        parts = [self._drawn(segment, history) for segment in self.of_lane(lane)]
        return np.concatenate([ids_BS[:, part.start : part.stop] for part in parts], axis=1)

    def apart(self, ids_BS: np.ndarray, lane: int, history: int = 0) -> list[LaneSegment]:
        """What `take` gave, by segment."""
        lengths = [len(self._drawn(segment, history)) for segment in self.of_lane(lane)]
        parts = np.split(ids_BS, np.cumsum(lengths)[:-1], axis=1)
        before = [length - 1 - self.segment_length for length in lengths]
        return [
            LaneSegment(known_BT=part[:, :-1], before=count, targets_BT=part[:, count + 1 :])
            for part, count in zip(parts, before, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSegment:
    """Ids of one segment. known_BT: inputs, with `before` more in front of them; targets_BT: of the inputs."""

    known_BT: np.ndarray
    before: int
    targets_BT: np.ndarray

    @property
    def inputs_BT(self) -> np.ndarray:
        return self.known_BT[:, self.before :]
