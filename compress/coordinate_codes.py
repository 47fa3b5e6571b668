"""Numbers along principal axes as codes of as many bits as each axis is given, and back.

Coordinates with as many bits lie side by side, since the strongest come first; each such run has one set of levels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .bit_allocation import LEVELS, allocated

_LEAST_DEVIATION = 1e-6  # of a token's root mean square: below it there is rounding, and no axis


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Coordinates [first, end) with as many bits each; levels (2^bits,), ascending, and the thresholds between them."""

    first: int
    end: int
    bits: int
    levels: Tensor
    thresholds: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoordinatePlan:
    """What a table in use says: mean (W,), the K axes that get bits, the strongest first, (W, K), their deviations
    (K,). Tokens here are divided by their root mean square."""

    mean_W: Tensor
    axes_WK: Tensor
    deviations_K: Tensor
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, table: Tensor, bits: int) -> CoordinatePlan:
        """table: as `compress.token_moments` makes it, or what became of it on its way; finite. bits: of a token."""
        # What was shipped in few bits may be out of order, or a little below zero.
        deviations_W, order_W = table[1:, -1].clamp(min=0.0).sort(descending=True, stable=True)
        given_W = allocated(deviations_W.to("cpu", torch.float64).square().numpy(), bits)
        kept = int(np.count_nonzero(given_W))
        edges = [0, *(np.flatnonzero(np.diff(given_W[:kept])) + 1).tolist(), kept]
        runs = []
        for first, end in itertools.pairwise(edges):
            half = LEVELS[int(given_W[first])]
            levels = torch.tensor([-level for level in reversed(half)] + list(half), device=table.device)
            thresholds = (levels[1:] + levels[:-1]) / 2
            runs.append(Run(first=first, end=end, bits=int(given_W[first]), levels=levels, thresholds=thresholds))
        return cls(
            mean_W=table[0, :-1].clone(),
            axes_WK=table[1:, :-1][order_W[:kept]].mT.contiguous(),
            deviations_K=deviations_W[:kept].clone(),
            runs=tuple(runs),
        )

    def codes(self, x_NW: Tensor) -> list[Tensor]:
        """Of each run (N, R), uint8: the nearest levels of tokens that the mean was taken off, float32."""
        turned_NK = x_NW @ self.axes_WK
        turned_NK /= self.deviations_K.clamp(min=_LEAST_DEVIATION)
        return [
            torch.bucketize(turned_NK[:, run.first : run.end].contiguous(), run.thresholds).to(torch.uint8)
            for run in self.runs
        ]

    def values(self, codes: list[Tensor]) -> Tensor:
        """(N, W), float32: what `codes` was given, up to rounding."""
        found = [run.levels[code_NR.to(torch.int64)] for code_NR, run in zip(codes, self.runs, strict=True)]
        return (torch.cat(found, dim=1) * self.deviations_K) @ self.axes_WK.mT

    def packed(self, codes: list[Tensor]) -> bytes:
        """Token after token, coordinate after coordinate, the lowest bit first; zeros fill up the last byte."""
        parts = [_bits(code_NR.cpu().numpy(), run.bits) for code_NR, run in zip(codes, self.runs, strict=True)]
        return np.packbits(np.concatenate(parts, axis=1), axis=None, bitorder="little").tobytes()

    def unpacked(self, bits_NB: np.ndarray) -> list[Tensor]:
        """The codes, on the device of the table, of as many bits a token as were given."""
        codes, start = [], 0
        for run in self.runs:
            width = run.end - run.first
            parts_NRB = bits_NB[:, start : start + width * run.bits].reshape(len(bits_NB), width, run.bits)
            code_NR = torch.from_numpy(parts_NRB @ (1 << np.arange(run.bits, dtype=np.uint8)))
            codes.append(code_NR.to(self.mean_W.device))
            start += width * run.bits
        return codes


def _bits(codes_NR: np.ndarray, bits: int) -> np.ndarray:
    """(N, R * bits) of zeros and ones."""
    bits_NRB = codes_NR[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1
    return bits_NRB.reshape(len(codes_NR), codes_NR.shape[1] * bits)
