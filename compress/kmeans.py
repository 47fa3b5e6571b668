"""Learning the codebooks of residual vector quantisation: k-means that follows a moving distribution.

Each row is the mean of what was coded with it, under an exponential moving average of counts and sums (van den Oord et
al., arXiv 1711.00937, appendix A.1). No Laplace smoothing: it keeps a count of zero from being divided by, and here no
count gets there, since a row that is hardly used any more is revived (Dhariwal et al., arXiv 2005.00341, section 3.1)
from what this microbatch had left at its level. Why not a codebook trained by gradient: it needs a loss, a rate and a
momentum of its own, all of them in every checkpoint, and follows a drifting distribution no better.

The average forgets faster at first, decay_n = min(decay, (1 + n) / (10 + n)) at the n-th microbatch since the start
(TensorFlow's ExponentialMovingAverage with num_updates): a young model changes within tens of microbatches, and a
codebook that remembers a hundred of them codes what no longer comes (measured: docs/decisions.md).

The start is k-means++ (Arthur & Vassilvitskii, SODA 2007), level after level, then a few Lloyd iterations: seeds drawn
evenly leave several rows in one cluster and none in another, which Lloyd iterations do not repair.

Everything here lies on the CPU and is added up there, because a GPU's atomic additions have no fixed order. Whatever is
drawn comes from the tensor's own key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .byte_format import CodecError, Key, check_layout
from .residual_codebooks import CodebookShape, Coded, Search

LLOYD = 8  # iterations of the start
SAMPLE = (4096, 8)  # tokens that the start looks at: so many, or so many for each code if that is more
# A row is dead below this part of an even share of the tokens, and comes back with that part: unless it finds use, it
# is dead again after ln(0.1 / 0.02) / -ln(decay) microbatches, 160 at the usual decay.
DEAD, REVIVED = 0.02, 0.1
_UPDATES_MAX = 2**24 - 1.0  # fp32 counts no further, and no decay below 1 - 2^-20 would notice
_START, _REVIVE = 0x52565130, 0x52565131  # streams of a key's generator


def young_decay(decay: float, updates: float) -> float:
    """That of a moving average after so many updates, which forgets faster at first."""
    return min(decay, (1 + updates) / (10 + updates))


class Learner:
    """counts (L, G, K) and sums (L, G, K, D), fp32 on the CPU; the master is their quotient. updates (1,): how many
    microbatches came after the start."""

    def __init__(self, grid: CodebookShape, decay: float) -> None:
        self.grid, self.decay = grid, decay
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.grid.levels, self.grid.groups, self.grid.codes)
        self.sums = torch.zeros(*self.counts.shape, 0)
        self.updates = torch.zeros(1)
        self._forget_measures()

    @property
    def has_started(self) -> bool:
        return self.sums.shape[-1] > 0

    @property
    def blank(self) -> bool:
        """Nothing but zeros was seen so far."""
        return not bool(self.counts.any())

    @property
    def master(self) -> Tensor:
        """(L*G*K, D)"""
        counts = self.counts.unsqueeze(-1)
        return torch.where(counts > 0, self.sums / counts, 0.0).view(self.grid.entries, self.sums.shape[-1])

    def start(self, x_NGD: Tensor, key: Key) -> None:
        """k-means from nothing, of tokens that are not zero. Without any, all rows are zero, and the next one starts.

        Counts are those of the whole microbatch, of which only a sample is looked at.
        """
        grid, (tokens, _, width) = self.grid, x_NGD.shape
        self.reset()
        self.sums = torch.zeros(*self.counts.shape, width)
        if not tokens:
            return
        draw = key.generator(_START)
        size = min(tokens, max(SAMPLE[0], SAMPLE[1] * grid.codes))
        sample = np.argsort(draw.random_raw(tokens), kind="stable")[:size]
        left_NGD = x_NGD[torch.from_numpy(sample)]
        scratch = Search.scratch_for(grid.groups, grid.codes, x_NGD.device)
        for level in range(grid.levels):
            rows_GKD = _spread(left_NGD, grid.codes, draw)
            for _ in range(LLOYD):
                codes_NG = Search(rows_GKD, scratch).nearest(left_NGD)
                counts_GK, sums_GKD = _gathered(left_NGD, codes_NG, grid.codes)
                # A row that nothing is coded with stays where it is, with the count of one that was revived.
                unused_GK1 = counts_GK.unsqueeze(-1) == 0
                rows_GKD = torch.where(unused_GK1, rows_GKD, sums_GKD / counts_GK.unsqueeze(-1))
                whole_GK = counts_GK.mul(tokens / size)
                whole_GK[counts_GK == 0] = REVIVED * tokens / grid.codes
                self.counts[level], self.sums[level] = whole_GK, whole_GK.unsqueeze(-1) * rows_GKD
            left_NGD = left_NGD - self._rows(level, Search(rows_GKD, scratch).nearest(left_NGD))

    def _rows(self, level: int, codes_NG: Tensor) -> Tensor:
        rows_GKD = self.sums[level] / self.counts[level].unsqueeze(-1)
        return rows_GKD[torch.arange(self.grid.groups), codes_NG]

    def follow(self, coded: Coded, scales_N: Tensor, key: Key) -> None:
        """One microbatch, as it was coded with the table in use. Tokens whose scale is zero teach nothing."""
        some_N = scales_N != 0
        if not bool(some_N.any()):
            return
        energies_N = scales_N.to(torch.float64).square()
        parts = [energies_N @ x.square().sum(dim=(1, 2)).to(torch.float64) for x in (coded.given[0], coded.left_NGD)]
        self._energy += torch.stack(parts).cpu()
        given, codes_LNG = coded.given, coded.codes_LNG
        if not bool(some_N.all()):
            given, codes_LNG = [x_NGD[some_N] for x_NGD in given], codes_LNG[:, some_N]
        given, codes_LNG = [x_NGD.cpu() for x_NGD in given], codes_LNG.cpu()
        decay = self._next_decay()
        for level, x_NGD in enumerate(given):
            counts_GK, sums_GKD = _gathered(x_NGD, codes_LNG[level], self.grid.codes)
            self.counts[level] = decay * self.counts[level] + (1 - decay) * counts_GK
            self.sums[level] = decay * self.sums[level] + (1 - decay) * sums_GKD
            self._used[level] += counts_GK
        self._revived += self._revive(given, key)

    def _next_decay(self) -> float:
        count = self.updates.item()
        self.updates = torch.tensor([min(count + 1, _UPDATES_MAX)])
        return young_decay(self.decay, count)

    def _revive(self, given: list[Tensor], key: Key) -> int:
        tokens = given[0].shape[0]
        share = tokens / self.grid.codes
        level, group, code = (self.counts < DEAD * share).nonzero(as_tuple=True)
        if not len(level):
            return 0
        drawn = key.generator(_REVIVE).random_raw(len(level)) % np.uint64(tokens)
        rows = torch.stack(given)[level, torch.from_numpy(drawn.astype(np.int64)), group]
        self.counts[level, group, code] = REVIVED * share
        self.sums[level, group, code] = REVIVED * share * rows
        return len(level)

    def measures(self) -> dict[str, float]:
        """Since the last call: for each level the share of its codes that were used and their perplexity (at most K),
        means over groups; rows revived; and the relative error of what was learned from (root of energies)."""
        figures = {}
        for level, used_GK in enumerate(self._used, start=1):
            shares_GK = used_GK / used_GK.sum(dim=1, keepdim=True).clamp(min=1)
            figures[f"usage_{level}"] = (used_GK > 0).double().mean().item()
            figures[f"perplexity_{level}"] = torch.special.entr(shares_GK).sum(dim=1).exp().mean().item()
        whole, lost = self._energy.tolist()
        figures["revived"] = float(self._revived)
        figures["reconstruction_error"] = math.sqrt(lost / whole) if whole else 0.0
        self._forget_measures()
        return figures

    def _forget_measures(self) -> None:
        self._used = torch.zeros(self.counts.shape, dtype=torch.float64)
        self._energy = torch.zeros(2, dtype=torch.float64)  # of tokens, and of what coding left of them
        self._revived = 0

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "sums": self.sums, "updates": self.updates}

    def layout(self, width: int) -> dict[str, Tensor]:
        """What `state` has once it has begun, as meta tensors."""
        counts = self.counts.to("meta")
        return {"counts": counts, "sums": counts.new_empty(*counts.shape, width), "updates": counts.new_empty(1)}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raises CodecError for tensors that cannot be a learner's."""
        width = state["sums"].shape[-1] if "sums" in state and state["sums"].ndim else 0
        check_layout("a codebook", state, self.layout(max(1, width)))
        for name in ("counts", "updates"):
            if bool((state[name] < 0).any()):
                raise CodecError(f"the state of a codebook: '{name}' has a count below 0")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`. Raises CodecError, and changes nothing, for tensors that cannot be a learner's."""
        self.check(state)
        self.reset()
        for name in self.state():
            copied = state[name].to("cpu", copy=True, memory_format=torch.contiguous_format)
            setattr(self, name, copied)


def _gathered(x_NGD: Tensor, codes_NG: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How often each code was used (G, K), and the sums of what was coded with it (G, K, D)."""
    _, groups, width = x_NGD.shape
    flat = (codes_NG + torch.arange(groups) * codes).view(-1)
    counts = torch.bincount(flat, minlength=groups * codes).to(torch.float32)
    sums = torch.zeros(groups * codes, width).index_add_(0, flat, x_NGD.reshape(-1, width))
    return counts.view(groups, codes), sums.view(groups, codes, width)


def _spread(x_NGD: Tensor, codes: int, draw: np.random.Philox) -> Tensor:
    """k-means++ seeds (G, K, D): each token is drawn in proportion to its squared distance to the seeds before it."""
    x_GND = x_NGD.transpose(0, 1).contiguous()
    groups, tokens, _ = x_GND.shape
    every = torch.arange(groups)
    token_G = torch.from_numpy((draw.random_raw(groups) % np.uint64(tokens)).astype(np.int64))
    far_GN = torch.full((groups, tokens), torch.inf)
    seeds = []
    for _ in range(codes):
        seed_GD = x_GND[every, token_G]
        seeds.append(seed_GD)
        far_GN = torch.minimum(far_GN, (x_GND - seed_GD.unsqueeze(1)).square().sum(dim=-1))
        reach_GN = far_GN.to(torch.float64).cumsum(dim=1)
        part_G = torch.from_numpy((draw.random_raw(groups) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        below_G1 = (part_G * reach_GN[:, -1]).unsqueeze(1)
        token_G = (reach_GN <= below_G1).sum(dim=1).clamp_(max=tokens - 1)
    return torch.stack(seeds, dim=1)
