"""How many bits each coordinate gets: reverse water-filling with whole bits.

A Gaussian coordinate of variance v that is coded with b bits by its best quantiser (Lloyd, 1957; Max, 1960) comes back
with the mean squared error v·D(b). Of a number of bits for all coordinates together, each next one goes where it takes
off the most: v·(D(b) - D(b+1)). D is convex, so this greedy choice is the best one (Shoham & Gersho, 1988), and what it
comes to is the water of rate-distortion theory (Cover & Thomas, section 10.3.3): coordinates above the water are left
with about the same error each, and those below it get no bits at all. So it chooses the rank, too.

Pure numbers in float64, products and comparisons in a fixed order: whoever has the same variances finds the same bits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

# The positive levels of the best quantiser of a unit normal variable with 2^b levels, and its mean squared error D(b).
# `tests/test_transform.py` finds them again.
LEVELS: tuple[tuple[float, ...], ...] = (
    (),
    (0.7978846,),
    (0.4527800, 1.5104176),
    (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
    (
        0.0658897,
        0.1980518,
        0.3313783,
        0.4666995,
        0.6049336,
        0.7471357,
        0.8945651,
        1.0487833,
        1.2118044,
        1.3863403,
        1.5762281,
        1.7872332,
        2.0287284,
        2.3177394,
        2.6911196,
        3.2607325,
    ),
)
DISTORTIONS = (1.0, 0.3633802, 0.1174818, 0.0345478, 0.0095010, 0.0025047)
MOST_BITS = len(LEVELS) - 1  # of one coordinate


def allocated(variances_W: np.ndarray, bits: int) -> np.ndarray:
    """Bits of each coordinate (W,), int64, `bits` in all; of equal gains the first one's. variances_W: float64, finite,
    at least 0. Raises ValueError for more bits than `MOST_BITS` each."""
    if not 0 <= bits <= MOST_BITS * len(variances_W):
        raise ValueError(f"{bits} bits for {len(variances_W)} coordinates of at most {MOST_BITS} each")
    given_W = np.zeros(len(variances_W), np.int64)
    heap = [(-gain(variance, 0), index) for index, variance in enumerate(variances_W.tolist())]
    heapq.heapify(heap)
    for _ in range(bits):
        _, index = heap[0]
        given_W[index] += 1
        has = int(given_W[index])
        if has < MOST_BITS:
            heapq.heapreplace(heap, (-gain(float(variances_W[index]), has), index))
        else:
            heapq.heappop(heap)
    return given_W


def gain(variance: float, bits: int) -> float:
    """What one more bit takes off the error of a coordinate that has `bits`."""
    return variance * (DISTORTIONS[bits] - DISTORTIONS[bits + 1])


def left_over(variances_W: Sequence[float] | np.ndarray, bits_W: Sequence[int] | np.ndarray) -> float:
    """The mean squared error of all coordinates together that this allocation leaves."""
    return float(sum(v * DISTORTIONS[int(b)] for v, b in zip(variances_W, bits_W, strict=True)))
