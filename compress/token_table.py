"""The frozen token table: (V, D) numbers like N(0, 1) that every node makes for itself, the same to the bit.

A narrow boundary can carry few of the D dimensions in which tokens differ; the table gives every stage a view of them
in full rank from the first step on. (Not in MAPL, arXiv 2606.05484: it is what Subspace Networks, arXiv 2506.01260, and
this project add.)

Why not send the embedding once: V D numbers to every stage (128 MB of bf16 at V = 32768, D = 2048, seven seconds of a
150 Mb/s link for each hop), and again after every loss of a machine. Why not `torch.randn` under a shared seed: its
values are not promised to agree between a CPU and a GPU, between two processors (log, cos and vector width differ in
the last bits) or between two releases. Neighbours whose tables differ would subtract one thing and add another, without
any error. So the table is made of what is exact everywhere: counter-based integers (Philox, Salmon et al., SC'11; its
raw output is fixed for good by NumPy's NEP 19), integer sums, and one IEEE multiplication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# A value is the sum of 12 lanes of 16 bits, that is, of three 64-bit words, less the mean of such a sum. The variance
# of that is 12 (2^32 - 1) / 12, so with a unit of 2^-16 it is 1 - 2^-32 and a table of scale 1 is not rounded at all.
_WORDS_A_VALUE = 3
_CENTRE = 12 * (2**16 - 1) // 2
UNIT = 2.0**-16  # of `integers`: times this, they are standard deviates
_EVEN_LANES = np.uint64(0x0000_FFFF_0000_FFFF)

_WORDS_A_BLOCK = 4  # Philox 4x64
_SLAB_VALUES = 1 << 15  # scratch of about 2 MB, in a processor's cache; twice as fast as slabs of 2^20
_BEYOND_EVERY_STEP = 2**63  # a counter word in which `boundary.Key.generator` puts a step < 2^63: the two never overlap
_TABLE_STREAM = 0

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


def _table_slabs(seed: int, vocab_size: int, width: int, scale: float) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, fp32 rows), in order, a few at a time. The arguments are checked at the call."""
    check_sizes(seed, vocab_size, width)
    if not 1 / _LARGEST_SCALE <= scale <= _LARGEST_SCALE:
        raise ValueError(f"token table scale {scale} is outside [2^-100, 2^100]; 1.0 is the usual one")
    factor = np.float32(scale * UNIT)  # the product is exact, so this rounds `scale` itself to 24 bits
    height = max(1, _SLAB_VALUES // width)

    def rows(start: int) -> np.ndarray:
        draws = integers(seed, _TABLE_STREAM, start, min(start + height, vocab_size), width)
        return draws.astype(np.float32) * factor  # all are below 2^24, hence fp32 numbers: only the product rounds

    return ((start, rows(start)) for start in range(0, vocab_size, height))


def integers(seed: int, stream: int, start: int, stop: int, width: int) -> np.ndarray:
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


def check_sizes(seed: int, vocab_size: int, width: int) -> None:
    """Raises ValueError, naming what cannot be."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} is outside [0, 2**63); choose a seed within")
    if vocab_size < 1 or width < 1:
        raise ValueError(f"vocabulary {vocab_size} x width {width} holds no token; both are at least 1")


def check_ids(ids_BT: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id outside [0, vocab_size); on a GPU, whose own assertion does without a name, looking
    would make the CPU wait for the device."""
    if ids_BT.device.type == "cpu" and ids_BT.numel():
        low, high = (int(extreme) for extreme in torch.aminmax(ids_BT))
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {vocab_size}; use this model's own tokenizer"
            )
