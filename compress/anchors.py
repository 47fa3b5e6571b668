"""What a stage knows of each token before anything arrives: the frozen token table, and anchors that learn.

Token ids reach every stage, so whatever a hidden state owes to its own token alone need not be sent. A sender subtracts
its `anchor` from what it projects, and the receiver adds its own to what it lifts:

    Z = (H - anchor_p) A,    Ĥ = Z Aᵀ + anchor_{p+1},    anchor[i] = table[t_i] + (E[t_i] + F[hash(t_{i-1}, t_i)]) P

* `table` (V, D): frozen, N(0, 1)-like, the same on every node and never sent, because each generates it from the seed.
  A narrow boundary can carry few of the D dimensions in which tokens differ; the table gives every stage a view of them
  in full rank from the first step on. (Not in the paper below: it is what this project adds.)
* `E P` (MAPL, arXiv 2606.05484): what this stage learns about tokens. E (V, ra) is trainable and starts at zero, so at
  first both sides know exactly the table; P (ra, D) is frozen with orthonormal rows. The two sides of a boundary learn
  apart and nothing of them crosses the wire. "full" is the V x D table without P: better where there is memory for it.
* `F P` (ours, not the paper's; optional): the same for this token after the one before it. Both ends know that one too,
  so what a hidden state owes to its last two tokens need not cross either. V² rows would be too many, so a hash names
  one of N (the hashing trick, Weinberger et al., arXiv 0902.2206; hash embeddings of n-grams: Byte Latent Transformer,
  Pagnoni et al., arXiv 2412.09871). Pairs that meet in a row share what it learns, most from the one that is seen most.
  It costs N ra (full: N D) numbers a stage, as many for their gradient, twice as many for AdamW, and no byte.

Why not send the embedding once: V D numbers to every stage (128 MB of bf16 at V = 32768, D = 2048, seven seconds of a
150 Mb/s link for each hop), and again after every loss of a machine. Why not `torch.randn` under a shared seed: its
values are not promised to agree between a CPU and a GPU, between two processors (log, cos and vector width differ in
the last bits) or between two releases. Neighbours whose tables differ would subtract one thing and add another, without
any error. So the table is made of what is exact everywhere: counter-based integers (Philox, Salmon et al., SC'11; its
raw output is fixed for good by NumPy's NEP 19), integer sums, and one IEEE multiplication. P needs no such care: a
stage uses it alone, and a checkpoint holds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["factorized", "full", "none"]

# A value is the sum of 12 lanes of 16 bits, that is, of three 64-bit words, less the mean of such a sum. The variance
# of that is 12 (2^32 - 1) / 12, so with a unit of 2^-16 it is 1 - 2^-32 and a table of scale 1 is not rounded at all.
_WORDS_A_VALUE = 3
_CENTRE = 12 * (2**16 - 1) // 2
_UNIT = 2.0**-16
_EVEN_LANES = np.uint64(0x0000_FFFF_0000_FFFF)

_WORDS_A_BLOCK = 4  # Philox 4x64
_SLAB_VALUES = 1 << 15  # scratch of about 2 MB, in a processor's cache; twice as fast as slabs of 2^20
_BEYOND_EVERY_STEP = 2**63  # a counter word in which `boundary.Key.generator` puts a step < 2^63: the two never overlap
_TABLE_STREAM, _FIRST_ANCHOR_STREAM = 0, 1

MAX_PAIRS = 2**24  # rows for pairs: a 32-bit hash fills them evenly to N / 2^32, that is to 0.4 % at this many

_LARGEST_SCALE = 2.0**100  # keeps every value a normal fp32 number, whatever a processor does with subnormal ones


def token_table(
    seed: int,
    vocab_size: int,
    width: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The frozen token table (V, D) of a run: bit-identical on every processor, a function of the arguments alone.

    Row t depends on (seed, t, width, scale) only, so vocabularies of different sizes share their rows. The values are
    fp32 numbers; float64 holds the same ones, a narrower dtype rounds them to nearest.

    How far from a Gaussian (Irwin-Hall of 12 uniform lanes): mean 0, variance scale² (1 - 2^-32), symmetric, all values
    independent, excess kurtosis -0.1, distribution function within 0.0023 of the normal one, and |value| < 6 scale
    (values beyond 4 scale are 3.7 times rarer than in a Gaussian, one in 58,600).

    Raises ValueError for a seed outside [0, 2^63), a size below 1, a scale outside [2^-100, 2^100] or an integer dtype.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"a token table holds floating-point values, got dtype {dtype}; choose torch.float32")
    slabs = _table_slabs(seed, vocab_size, width, scale)
    table_VD = torch.empty((vocab_size, width), dtype=dtype, device="cpu")
    for start, rows in slabs:
        table_VD[start : start + len(rows)] = torch.from_numpy(rows)
    return table_VD.to(device)


def table_digest(seed: int, vocab_size: int, width: int, scale: float = 1.0) -> str:
    """SHA-256, in hexadecimal, of the table's fp32 values, little-endian, row by row: for neighbours to compare.

    The table itself is not kept in memory. Raises ValueError as `token_table` does.
    """
    digest = hashlib.sha256()
    for _, rows in _table_slabs(seed, vocab_size, width, scale):
        digest.update(rows.astype("<f4", copy=False).data)
    return digest.hexdigest()


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


class Anchors(nn.Module):
    """What one stage knows of each token: `table[t] + (weight[t] + pairs[hash]) @ projection`, each part optional.

    Trainable are `weight`, E (V, ra) with a `projection` P (ra, D) or a full (V, D) table without one, and beside it
    `pairs`, F (N, ra or D): the row of a token and the one before it is `pair_buckets`'.
    `table` (V, D) is a buffer that checkpoints leave out and that shares its storage with the tensor given. A move to
    another device or dtype gives each module a copy of its own, so where several share it, make it there first.
    """

    weight: nn.Parameter | None
    pairs: nn.Parameter | None
    projection: Tensor | None
    table: Tensor | None

    def __init__(
        self, *, weight: Tensor | None, projection: Tensor | None, table: Tensor | None, pairs: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("pairs", None if pairs is None else nn.Parameter(pairs))
        self.register_buffer("projection", projection)
        self.register_buffer("table", None if table is None else table.detach(), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor | None:
        """Token ids (B, T) to (B, T, D), what to subtract or add; None where this stage knows nothing of any token.

        Each row of ids is a sequence from its first token on, or pairs would be others here than at the neighbour.
        The factorised part gathers rows of E (and F) and multiplies them by P: B T ra D products, no (V, D) between.
        Raises ValueError for an id outside the vocabulary (on a GPU, its own assertion does, without a name).
        """
        known_BTD = None if self.weight is None else self._rows(self.weight, ids_BT)
        if self.weight is not None and known_BTD is not None and self.pairs is not None:
            known_BTD = known_BTD + F.embedding(pair_buckets(ids_BT, len(self.weight), len(self.pairs)), self.pairs)
        if known_BTD is not None and self.projection is not None:
            known_BTD = known_BTD @ self.projection
        if self.table is None:
            return known_BTD
        given_BTD = self._rows(self.table, ids_BT)
        return given_BTD if known_BTD is None else given_BTD + known_BTD

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
        if ids_BT.device.type == "cpu" and ids_BT.numel():  # elsewhere, looking would make the CPU wait for the device
            low, high = (int(extreme) for extreme in torch.aminmax(ids_BT))
            if low < 0 or high >= len(table):
                bad = low if low < 0 else high
                raise ValueError(
                    f"token id {bad} is outside the vocabulary of {len(table)}; use this model's own tokenizer"
                )
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
) -> Anchors:
    """The anchors of one stage before training: all that is learned is zero, in fp32 on the CPU.

    "factorized" learns `rank` numbers a token (any rank up to `width`, whatever the boundary's own), "full" learns
    `width`, "none" nothing; the last two ignore `rank`. `table` is the run's `token_table` or a checkpoint's embedding.
    `pairs`: rows for pairs of tokens, as wide as those for tokens; 0 for none.

    Raises ValueError for an unknown kind, a rank outside [1, width], a table of another shape or an integer dtype,
    pairs outside [0, MAX_PAIRS] or beside "none", and a seed, stage or size that cannot be.
    """
    _check_sizes(seed, vocab_size, width)
    if table is not None and table.shape != (vocab_size, width):
        raise ValueError(
            f"the token table's shape is {tuple(table.shape)}, but vocabulary and width are ({vocab_size}, {width}); "
            "make it for this model"
        )
    if table is not None and not table.is_floating_point():
        raise ValueError(f"the token table's dtype is {table.dtype}, which is not floating; convert it first")
    if not 0 <= pairs <= MAX_PAIRS:
        raise ValueError(f"pairs={pairs} is outside [0, {MAX_PAIRS}]; 0 learns nothing of pairs of tokens")
    if kind == "none":
        if pairs:
            raise ValueError(f"pairs={pairs} beside anchors=none, which learn nothing; choose full or factorized ones")
        return Anchors(weight=None, projection=None, table=table)
    if kind == "full":
        return Anchors(weight=_zeros(vocab_size, width), pairs=_zeros(pairs, width), projection=None, table=table)
    if kind != "factorized":
        raise ValueError(f"unknown anchors '{kind}'; choose {', '.join(get_args(Kind))}")
    if not 1 <= rank <= width:
        raise ValueError(f"anchor rank {rank} is outside [1, {width}], the model's width; choose a rank within")
    if not 0 <= stage < 2**63:
        raise ValueError(f"stage {stage} is outside [0, 2**63); stages are counted from 0")
    return Anchors(
        weight=_zeros(vocab_size, rank),
        pairs=_zeros(pairs, rank),
        projection=_orthonormal_rows(seed, stage, rank, width),
        table=table,
    )


def _zeros(rows: int, width: int) -> Tensor | None:
    return torch.zeros(rows, width, dtype=torch.float32) if rows else None


def _orthonormal_rows(seed: int, stage: int, rank: int, width: int) -> Tensor:
    """P (ra, D) of a stage: the directions of ra random rows, in fp32.

    The signs of a QR decomposition are the library's choice. With R's diagonal made positive the factor is unique, so
    two processors differ by rounding only.
    """
    draws_RD = _integers(seed, _FIRST_ANCHOR_STREAM + stage, 0, rank, width) * _UNIT
    q_DR, r_RR = torch.linalg.qr(torch.from_numpy(draws_RD).mT)
    signs_R = torch.where(r_RR.diagonal() < 0, -1.0, 1.0)
    return (q_DR * signs_R).mT.to(torch.float32).contiguous()


def _table_slabs(seed: int, vocab_size: int, width: int, scale: float) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, fp32 rows), in order, a few at a time. The arguments are checked at the call."""
    _check_sizes(seed, vocab_size, width)
    if not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(f"token table scale {scale} is outside [2^-100, 2^100]; 1.0 is the usual one")
    factor = np.float32(scale * _UNIT)  # the product is exact, so this rounds `scale` itself to 24 bits
    height = max(1, _SLAB_VALUES // width)

    def rows(start: int) -> np.ndarray:
        integers = _integers(seed, _TABLE_STREAM, start, min(start + height, vocab_size), width)
        return integers.astype(np.float32) * factor  # all are below 2^24, hence fp32 numbers: only the product rounds

    return ((start, rows(start)) for start in range(0, vocab_size, height))


def _integers(seed: int, stream: int, start: int, stop: int, width: int) -> np.ndarray:
    """Rows `start` to `stop` (int32) of the endless table of this seed, stream and width: 2^16 times standard deviates.

    Each row begins at a Philox block of its own, each width has its own counter word (or wide rows would repeat narrow
    ones). Value d of a row sums the four 16-bit lanes of its words d, d + D and
    d + 2 D.
    """
    words = _WORDS_A_VALUE * width
    blocks = -(-words // _WORDS_A_BLOCK)
    generator = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64),
        counter=np.array([start * blocks, width, _BEYOND_EVERY_STEP, 0], dtype=np.uint64),
    )
    raw = generator.random_raw((stop - start) * blocks * _WORDS_A_BLOCK).reshape(stop - start, -1)[:, :words]
    pairs = raw & _EVEN_LANES  # two lanes to a word, 32 bits apart: room for all the carries of twelve
    raw >>= np.uint64(16)
    raw &= _EVEN_LANES
    pairs += raw
    sums = pairs.reshape(-1, _WORDS_A_VALUE, width).sum(axis=1)
    sums = (sums & np.uint64(0xFFFF_FFFF)) + (sums >> np.uint64(32))
    return sums.astype(np.int32) - np.int32(_CENTRE)


def _check_sizes(seed: int, vocab_size: int, width: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} is outside [0, 2**63); choose a seed within")
    if vocab_size < 1 or width < 1:
        raise ValueError(f"vocabulary {vocab_size} x width {width} holds no token; both are at least 1")
