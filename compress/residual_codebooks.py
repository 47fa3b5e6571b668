"""Codebooks of grouped residual vector quantisation: coding vectors with a table, and back.

A vector x (D numbers of one group of one token) is coded as one row of each of L codebooks: the row nearest to x, then
the one nearest to what that left, and so on. Every level of every group has K rows of its own; all of them are one
table (L*G*K, D), rows of a group side by side, groups within levels.

Searching is one batched matrix product a level, because |x - c|² is |x|² - 2(x·c - |c|²/2) and |x|² decides nothing.
Which of two rows is nearer may come out differently on another processor, and need not agree: only the encoder chooses.
Decoding adds rows in the order of the levels, single additions in fp32, and is the same everywhere. Why not a joint
search over levels (a beam): it costs a multiple of the time, and the time is what a thin link has to hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = {"cpu": 2**18, "cuda": 2**26}  # values of one block of scores: 1 MiB, which a core's cache holds; 256 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookShape:
    """levels L, groups G, codes K: the shape of the table, but for its width."""

    levels: int
    groups: int
    codes: int

    @property
    def entries(self) -> int:
        return self.levels * self.groups * self.codes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """codes (L, N, G), int64; what each level was given, (N, G, D) each, and what the last one left."""

    codes_LNG: Tensor
    given: list[Tensor]
    left_NGD: Tensor


class Codebooks:
    """One table in use. It is never changed in place."""

    def __init__(self, table: Tensor, grid: CodebookShape) -> None:
        self.table, self.grid, self.width = table, grid, table.shape[-1]
        self._rows = table.view(grid.levels, grid.groups * grid.codes, self.width)
        self._offsets_G = torch.arange(grid.groups, device=table.device) * grid.codes
        self._search: list[Search] = []  # one a level; a decoder never searches

    def decode(self, codes_LNG: Tensor) -> Tensor:
        """(N, G, D): the sum of the rows, first level first."""
        sums = self._look_up(0, codes_LNG[0])
        for level in range(1, self.grid.levels):
            sums += self._look_up(level, codes_LNG[level])
        return sums

    def encode(self, x_NGD: Tensor) -> Coded:
        """The nearest rows, level after level. `x_NGD` is contiguous and finite."""
        if not self._search:
            rows_LGKD = self.table.view(*self._shape_LGK, self.width)
            scratch = Search.scratch_for(self.grid.groups, self.grid.codes, self.table.device)
            self._search = [Search(rows_GKD, scratch) for rows_GKD in rows_LGKD]
        codes, given, left = [], [], x_NGD
        for level, search in enumerate(self._search):
            nearest_NG = search.nearest(left)
            codes.append(nearest_NG)
            given.append(left)
            left = left - self._look_up(level, nearest_NG)
        return Coded(codes_LNG=torch.stack(codes), given=given, left_NGD=left)

    @property
    def _shape_LGK(self) -> tuple[int, int, int]:
        return self.grid.levels, self.grid.groups, self.grid.codes

    def _look_up(self, level: int, codes_NG: Tensor) -> Tensor:
        flat = (codes_NG + self._offsets_G).view(-1)
        return self._rows[level].index_select(0, flat).view(*codes_NG.shape, self.width)


class Search:
    """The nearest of K rows for each of G groups. `scratch` holds one block of scores and may be shared.

    Without it each block's scores would lie in fresh memory, and the kernel takes longer to clear that (1 to 5 µs for
    4 KiB) than the product does.
    """

    def __init__(self, rows_GKD: Tensor, scratch: Tensor | None = None) -> None:
        groups, codes, _ = rows_GKD.shape
        self._columns_GDK = rows_GKD.mT.contiguous()
        self._half_G1K = rows_GKD.square().sum(dim=-1).div_(2).unsqueeze(1)
        self._scratch = self.scratch_for(groups, codes, rows_GKD.device) if scratch is None else scratch

    @staticmethod
    def scratch_for(groups: int, codes: int, device: torch.device) -> Tensor:
        """As many tokens' scores (G, block, K) as a block has."""
        block = max(1, _SCORES.get(device.type, 2**22) // (groups * codes))
        return torch.empty(groups, block, codes, device=device)

    def nearest(self, x_NGD: Tensor) -> Tensor:
        """(N, G): indices of rows; of equally near ones, the first on a CPU."""
        tokens, groups, _ = x_NGD.shape
        block = self._scratch.shape[1]
        nearest_GN = torch.empty(groups, tokens, dtype=torch.int64, device=x_NGD.device)
        for start in range(0, tokens, block):
            x_GND = x_NGD[start : start + block].transpose(0, 1)
            scores_GNK = self._scratch[:, : x_GND.shape[1]]
            torch.baddbmm(self._half_G1K, x_GND, self._columns_GDK, alpha=-1, out=scores_GNK)
            if scores_GNK.device.type == "cpu":  # NumPy's is four times faster
                nearest_GN[:, start : start + block] = torch.from_numpy(scores_GNK.numpy().argmin(axis=-1))
            else:
                nearest_GN[:, start : start + block] = scores_GNK.argmin(dim=-1)
        return nearest_GN.T.contiguous()
