"""What a stage knows of each token before anything arrives: the frozen token table, and anchors that learn.

Token ids reach every stage, so whatever a hidden state owes to its own token alone need not be sent. A sender subtracts
its `anchor` from what it projects, and the receiver adds its own to what it lifts:

    Z = (H - anchor_p) A,    Ĥ = Z Aᵀ + anchor_{p+1},    anchor[i] = table[t_i] + (E[t_i] + F[hash(t_{i-1}, t_i)]) P

* `table` (V, D): frozen, N(0, 1)-like, the same on every node and never sent (`compress.token_table`).
* `E P` (MAPL, arXiv 2606.05484): what this stage learns about tokens. E (V, ra) is trainable and starts at zero, so at
  first both sides know exactly the table; P (ra, D) is frozen with orthonormal rows. The two sides of a boundary learn
  apart and nothing of them crosses the wire. "full" is the V x D table without P: better where there is memory for it.
* `F P` (ours, not the paper's; optional): the same for this token after the one before it. Both ends know that one too,
  so what a hidden state owes to its last two tokens need not cross either. V² rows would be too many, so a hash names
  one of N (the hashing trick, Weinberger et al., arXiv 0902.2206; hash embeddings of n-grams: Byte Latent Transformer,
  Pagnoni et al., arXiv 2412.09871). Pairs that meet in a row share what it learns, most from the one that is seen most.
  It costs N ra (full: N D) numbers a stage, as many for their gradient, twice as many for AdamW, and no byte.

* `context` (ours; optional): what a small network works out from the last few tokens (`compress.context_network`),
  added last.

P needs no care for bits that agree between machines, as the table does: a stage uses it alone, and a checkpoint holds
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .context_network import Context
from .token_table import UNIT, check_ids, check_sizes, integers

Kind = Literal["factorized", "full", "none"]

MAX_PAIRS = 2**24  # rows for pairs: a 32-bit hash fills them evenly to N / 2^32, that is to 0.4 % at this many

_FIRST_ANCHOR_STREAM = 1  # of the seed's draws; 0 is the token table's


def pair_buckets(ids_BT: Tensor, vocab_size: int, buckets: int) -> Tensor:
    """The row (B, T) in [0, buckets), int64, of each token after the one before it in its sequence.

    ids_BT: whole sequences of ids in [0, vocab_size). A first token comes after `vocab_size`, which no token is.
    A function of (vocab_size, the two ids, buckets) alone, for vocabularies below 2^32 and 1 to `MAX_PAIRS` buckets:
    whole numbers that no int64 is too small for, hence the same on every device.
    """
    before_BT = ids_BT.to(torch.int64).roll(1, dims=1)
    before_BT[:, :1] = vocab_size
    hashed_BT = _mix(_mix(before_BT) ^ ids_BT)  # mixed once more than its token, so (a, b) and (b, a) are two pairs
    return hashed_BT * buckets >> 32  # the upper bits of 32, without a division: Lemire, arXiv 1805.10941


def _mix(x: Tensor) -> Tensor:
    """A permutation of the numbers below 2^32 in which each bit depends on all: lowbias32 (C. Wellons, "Prospecting for
    Hash Functions", nullprogram.com/blog/2018/07/31)."""
    x = x ^ x >> 16
    x = x * 0x7FEB_352D & 0xFFFF_FFFF
    x = x ^ x >> 15
    x = x * (0x846C_A68B - 2**32) & 0xFFFF_FFFF  # the same modulo 2^32, and a product that stays within int64
    return x ^ x >> 16


class _Answer:
    """To certain ids, once they were asked for."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT, self.is_known = ids_BT, False
        self.said_BTD: Tensor | None = None

    def say(self, said_BTD: Tensor | None) -> None:
        self.said_BTD, self.is_known = said_BTD, True


class Anchors(nn.Module):
    """What one stage knows of each token: `(weight[t] + pairs[hash]) @ projection + table[t] + context`, each part
    optional.

    Trainable are `weight`, E (V, ra) with a `projection` P (ra, D) or a full (V, D) table without one, and beside it
    `pairs`, F (N, ra or D): the row of a token and the one before it is `pair_buckets`'.
    `table` (V, D) is a buffer that checkpoints leave out and that shares its storage with the tensor given. A move to
    another device or dtype gives each module a copy of its own, so where several share it, make it there first.
    """

    weight: nn.Parameter | None
    pairs: nn.Parameter | None
    projection: Tensor | None
    table: Tensor | None
    context: Context | None

    def __init__(
        self,
        *,
        weight: Tensor | None,
        projection: Tensor | None,
        table: Tensor | None,
        pairs: Tensor | None = None,
        context: Context | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self._once: list[_Answer] = []
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("pairs", None if pairs is None else nn.Parameter(pairs))
        self.register_buffer("projection", projection)
        self.register_buffer("table", None if table is None else table.detach(), persistent=False)

    @contextmanager
    def once(self, ids_BT: Tensor, parts: Sequence[tuple[Tensor, int]] = ()) -> Iterator[None]:
        """Within it, these ids, the very tensor, are answered with the same tensor: a stage adds and subtracts it in
        one graph, where it is computed once, and so is its gradient. Those of two microbatches may be under way.

        `ids_BT` may be parts of sequences, one after the other: then `parts` are the same ids with those before them,
        and how many these are."""
        answer = _Answer(ids_BT)
        if parts:
            known = [self._known(part_BT) for part_BT, _ in parts]
            own = [each[:, before:] for each, (_, before) in zip(known, parts, strict=True) if each is not None]
            answer.say(torch.cat(own, dim=1) if own else None)
        self._once.append(answer)
        try:
            yield
        finally:
            self._once.remove(answer)

    def forward(self, ids_BT: Tensor) -> Tensor | None:
        """Token ids (B, T) to (B, T, D), what to subtract or add; None where this stage knows nothing of any token.

        Each row of ids is a sequence from its first token on, or pairs would be others here than at the neighbour.
        The factorised part gathers rows of E (and F) and multiplies them by P: B T ra D products, no (V, D) between.
        Raises ValueError for an id outside the vocabulary (on a GPU, its own assertion does, without a name).
        """
        answer = next((each for each in self._once if each.ids_BT is ids_BT), None)
        if answer is None:
            return self._known(ids_BT)
        if not answer.is_known:
            answer.say(self._known(ids_BT))
        return answer.said_BTD

    def _known(self, ids_BT: Tensor) -> Tensor | None:
        known_BTD = None if self.weight is None else self._rows(self.weight, ids_BT)
        if self.weight is not None and known_BTD is not None and self.pairs is not None:
            known_BTD = known_BTD + F.embedding(pair_buckets(ids_BT, len(self.weight), len(self.pairs)), self.pairs)
        if known_BTD is not None and self.projection is not None:
            known_BTD = known_BTD @ self.projection
        parts = [
            known_BTD,
            None if self.table is None else self._rows(self.table, ids_BT),
            None if self.context is None else self.context(ids_BT),
        ]
        present = [part_BTD for part_BTD in parts if part_BTD is not None]
        return sum(present[1:], start=present[0]) if present else None

    @torch.no_grad()
    def norm(self) -> float:
        """Root mean square, over the vocabulary, of the length of what was learned of a token by itself: E alone, and
        neither the table nor what was learned of pairs.

        Orthonormal rows of P leave lengths alone, so it is ‖E‖ / sqrt(V), Frobenius, and comparable between the kinds.
        """
        if self.weight is None:
            return 0.0
        # Row by row first: one fp32 norm over 2^26 elements at once was 0.5 % off.
        lengths_V = torch.linalg.vector_norm(self.weight, dim=1).to(torch.float64)
        return lengths_V.square().mean().sqrt().item()

    @staticmethod
    def _rows(table: Tensor, ids_BT: Tensor) -> Tensor:
        check_ids(ids_BT, len(table))
        return F.embedding(ids_BT, table)


def make_anchors(
    kind: Kind,
    *,
    vocab_size: int,
    width: int,
    rank: int,
    seed: int,
    stage: int,
    table: Tensor | None = None,
    pairs: int = 0,
    context: int = 0,
    context_embedding: int = 32,
    context_hidden: int = 128,
) -> Anchors:
    """The anchors of one stage before training: all that is learned is zero, in fp32 on the CPU.

    "factorized" learns `rank` numbers a token (any rank up to `width`, whatever the boundary's own), "full" learns
    `width`, "none" nothing; the last two ignore `rank`. `table` is the run's `token_table` or a checkpoint's embedding.
    `pairs`: rows for pairs of tokens, as wide as those for tokens; 0 for none. `context`: the tokens, its own included,
    that a network of `context_embedding` numbers each and `context_hidden` units looks at; 0 for none.

    Raises ValueError for an unknown kind, a rank outside [1, width], a table of another shape or an integer dtype,
    pairs outside [0, MAX_PAIRS] or beside "none", and a seed, stage or size that cannot be.
    """
    check_sizes(seed, vocab_size, width)
    if not 0 <= stage < 2**62:
        raise ValueError(f"stage {stage} is outside [0, 2**62); stages are counted from 0")
    if table is not None and table.shape != (vocab_size, width):
        raise ValueError(
            f"the token table's shape is {tuple(table.shape)}, but vocabulary and width are ({vocab_size}, {width}); "
            "make it for this model"
        )
    if table is not None and not table.is_floating_point():
        raise ValueError(f"the token table's dtype is {table.dtype}, which is not floating; convert it first")
    if not 0 <= pairs <= MAX_PAIRS:
        raise ValueError(f"pairs={pairs} is outside [0, {MAX_PAIRS}]; 0 learns nothing of pairs of tokens")
    network = None
    if context:
        network = Context(
            vocab_size=vocab_size,
            width=width,
            tokens=context,
            embedding=context_embedding,
            hidden=context_hidden,
            seed=seed,
            stage=stage,
        )
    if kind == "none":
        if pairs:
            raise ValueError(f"pairs={pairs} beside anchors=none, which learn nothing; choose full or factorized ones")
        return Anchors(weight=None, projection=None, table=table, context=network)
    if kind == "full":
        weight, rows = _zeros(vocab_size, width), _zeros(pairs, width)
        return Anchors(weight=weight, pairs=rows, projection=None, table=table, context=network)
    if kind != "factorized":
        raise ValueError(f"unknown anchors '{kind}'; choose {', '.join(get_args(Kind))}")
    if not 1 <= rank <= width:
        raise ValueError(f"anchor rank {rank} is outside [1, {width}], the model's width; choose a rank within")
    return Anchors(
        weight=_zeros(vocab_size, rank),
        pairs=_zeros(pairs, rank),
        projection=_orthonormal_rows(seed, stage, rank, width),
        table=table,
        context=network,
    )


def _zeros(rows: int, width: int) -> Tensor | None:
    return torch.zeros(rows, width, dtype=torch.float32) if rows else None


def _orthonormal_rows(seed: int, stage: int, rank: int, width: int) -> Tensor:
    """P (ra, D) of a stage: the directions of ra random rows, in fp32.

    The signs of a QR decomposition are the library's choice. With R's diagonal made positive the factor is unique, so
    two processors differ by rounding only.
    """
    draws_RD = integers(seed, _FIRST_ANCHOR_STREAM + stage, 0, rank, width) * UNIT
    q_DR, r_RR = torch.linalg.qr(torch.from_numpy(draws_RD).mT)
    signs_R = torch.where(r_RR.diagonal() < 0, -1.0, 1.0)
    return (q_DR * signs_R).mT.to(torch.float32).contiguous()
