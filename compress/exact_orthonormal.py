"""A random matrix with orthonormal columns that every machine computes to the same bits, so that it is never sent.

A QR decomposition of random numbers is the usual way, and its last bits belong to the library and the processor
(`stiefel.random_orthonormal`). Here the first R unit vectors go through rounds of plane rotations: a round pairs the D
coordinates at random and turns each pair by an angle of its own. Permutations come from sorting raw Philox words (fixed
for good by NumPy's NEP 19). An angle is (1 - t², 2 t) / (1 + t²) for a random t, and a rotation four products and two
sums: each is one IEEE operation in float64, which no machine rounds differently. 4 log2(D) rounds mix every coordinate
into every other one several times over. The same rounds also turn a matrix that is given (`ExactRotation`).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_ROUNDS_A_DOUBLING = 4


class ExactRotation:
    """A random rotation Q of `rows` dimensions, of (seed, stream), as rounds of plane rotations."""

    def __init__(self, seed: int, stream: int, rows: int) -> None:
        draw = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        half = rows // 2
        self._rounds: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for _ in range(_ROUNDS_A_DOUBLING * max(1, math.ceil(math.log2(rows)))):
            order = np.argsort(draw.random_raw(rows), kind="stable")
            t = ((draw.random_raw(half) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1)[:, None]
            square = t * t
            cosine, sine = (1 - square) / (1 + square), (t + t) / (1 + square)
            self._rounds.append((order[:half], order[half : 2 * half], cosine, sine))

    def turn(self, matrix: np.ndarray) -> None:
        """Q X in the place of X (rows, columns), float64."""
        for one, other, cosine, sine in self._rounds:
            upper, lower = matrix[one], matrix[other]
            matrix[one] = cosine * upper - sine * lower
            matrix[other] = sine * upper + cosine * lower

    def turn_back(self, matrix: np.ndarray) -> None:
        """Qᵀ X in the place of X (rows, columns), float64."""
        for one, other, cosine, sine in reversed(self._rounds):
            upper, lower = matrix[one], matrix[other]
            matrix[one] = cosine * upper + sine * lower
            matrix[other] = cosine * lower - sine * upper


@functools.lru_cache(maxsize=8)
def exact_orthonormal(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """(rows, columns), float64, on the CPU. Do not change it: it is shared. Raises ValueError for more columns than
    rows."""
    if not 1 <= columns <= rows:
        raise ValueError(f"no {columns} orthonormal columns in {rows} dimensions; choose from 1 to {rows}")
    matrix = np.eye(rows, columns)
    ExactRotation(seed, stream, rows).turn(matrix)
    return torch.from_numpy(matrix)
