"""A random rotation that costs additions alone: signs drawn from the key, a Hadamard transform, and signs again.

A block of 128 numbers with one scale is coded badly if one of them is large: the grid is made for that one, and the
others fall on few of its points. Multiplied by an orthogonal matrix whose entries are all equal in size, any vector
becomes one of numbers that are about alike: an outlier is spread over all of them, and 128 of them look Gaussian
(QuaRot, arXiv 2404.00456; for what crosses boundaries of a pipeline TAH-Quant, arXiv 2506.01352, whose tiles and
adaptive numbers of bits are not here). A Hadamard matrix is such a matrix with entries ±1/√B, and takes log2(B)
additions a number. The random signs before it are for vectors that the plain transform would concentrate, a constant
one first of all. Those behind it change no size, but turn a channel that is always strong into another direction each
time: each token of each message has signs of its own, so what coding loses has no direction that it always loses. For
gradients that matters more than how much it is (`compress.rvq`).

It helps where the grid has points to waste: int8 and int4, and gradients in any number of bits, whose noise is as large
as the peak says. Rounded to nearest, int3 and int2 keep the outliers and little else, which for a few very large ones
has a smaller squared error than coding all numbers alike.

B is the largest power of two that divides the width; a wider token is cut into blocks of B side by side.

The same bits everywhere: a product with a sign is exact, the factor 1/√B is one product, made first so that sums grow
by √B at most, and each butterfly is one addition or subtraction of two float32 numbers, in a fixed order. A matrix
product would be shorter and leaves the order of its sums to the device. The matrix is symmetric and orthogonal, so the
way back is the same in the other order; rounding of float32 (about 2^-23 of the largest number) is all that a way there
and back costs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .byte_format import CodecError, Key

BLOCK_MIN = 8  # of fewer numbers nothing comes near to Gaussian
_SIGNS = 0x5349474E  # stream of a key's generator


def block_of(width: int) -> int:
    """B: the largest power of two that divides `width`; 0 of 0."""
    return width & -width


def check_block(name: str, width: int) -> None:
    """Raises CodecError for a width that this does nothing for; `name`: of the format."""
    if block_of(width) < BLOCK_MIN:
        raise CodecError(
            f"format '{name}': hadamard=true wants a width that {BLOCK_MIN} divides, not {width}; "
            f"choose {BLOCK_MIN * max(1, -(-width // BLOCK_MIN))} or leave the option out"
        )


def rotate(x_NW: Tensor, key: Key) -> Tensor:
    """Tokens in float32 to rotated ones, which have other memory. Large numbers may overflow."""
    before_NW, behind_NW = _signs(key, x_NW)
    return _transform(x_NW * before_NW, block_of(x_NW.shape[1])).mul_(behind_NW)


def rotate_back(y_NW: Tensor, key: Key) -> Tensor:
    """Inverse of `rotate` with the same key, up to rounding."""
    before_NW, behind_NW = _signs(key, y_NW)
    return _transform(y_NW * behind_NW, block_of(y_NW.shape[1])).mul_(before_NW)


def _signs(key: Key, like_NW: Tensor) -> Tensor:
    """+1 or -1 (2, N, W), float32: a bit each, the lowest of a number first."""
    count = 2 * like_NW.numel()
    raw = key.generator(_SIGNS).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=count, bitorder="little").astype(np.float32)
    return torch.from_numpy(1 - 2 * bits).view(2, *like_NW.shape).to(like_NW.device)


def _transform(x_NW: Tensor, block: int) -> Tensor:
    tokens, width = x_NW.shape
    y_WN = x_NW.t() * (1 / math.sqrt(block))
    y_WN, other_WN = y_WN.contiguous(), x_NW.new_empty(width, tokens)  # tokens innermost: sums of whole rows
    half = 1
    while half < block:
        (low, high), (total, rest) = (
            z_WN.view(width // (2 * half), 2, half, tokens).unbind(1) for z_WN in (y_WN, other_WN)
        )
        torch.add(low, high, out=total)
        torch.sub(low, high, out=rest)
        y_WN, other_WN = other_WN, y_WN
        half *= 2
    return y_WN.t().contiguous()
