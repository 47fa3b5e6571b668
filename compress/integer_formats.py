"""Blockwise byte formats of small integers: int8, int4, int3 and int2.

int8, int4, int3, int2: the flattened tensor is cut into blocks of 128 (the last may be short); each block is coded with
one bf16 scale s and one small symmetric integer a value, ẑ = s·q, |q| ≤ 127, 7, 3 or 1. Body: all scales, then all
codes. int4 puts two codes in a byte as q + 8, the earlier one in the low nibble; int3 puts eight codes in three bytes,
code i as q + 4 in bits 3i to 3i + 2 of a little-endian number; int2 puts four codes in a byte, code i as q + 2 in bits
2i and 2i + 1. Codes that fill up the last byte or three are zeros. This is the blockwise absmax quantisation of
Dettmers et al. (arXiv 2110.02861) with a uniform grid: no table to look up, and a block's worst error is known. One
scale per tensor would let a single outlier silence everything else. int2 of gradients is the code of TernGrad (Wen et
al., arXiv 1705.07878) in blocks.

Activations (FORWARD) are rounded to nearest even. Gradients (BACKWARD) are rounded stochastically, because rounding
errors that do not average out act as a bias on every weight (Gupta et al., arXiv 1502.02551): q = rint(z/s + u) with u
symmetric on (-1/2, 1/2). u is an odd 16-bit integer times 2^-16, from the key's own generator; it leaves the mean of q
within 2^-16 of z/s (a 2^-16 part of one step: for int8 2^-23 of the block's peak, the precision of fp32 itself),
returns whole numbers unchanged, and is drawn on the CPU, so that all devices agree.

How s is rounded to bf16 differs for the same reason. Stochastic: up, so that |z/s| ≤ 127 and nothing is clipped, which
would be a bias. Nearest: to nearest, which is half as coarse; as bf16 is off by at most one part in 256, the peak's
code is still 127 (126.51 to 127.496 rounds to it), the peak comes back as 127·s, and packing again gives the same
bytes: a tensor loses nothing by crossing twice. s never falls below the smallest normal number 2^-126, so there is no
division by zero, a zero block is exact, and no result depends on whether a processor flushes subnormal numbers. In
int2 the scale is the peak itself: it stops at the largest bf16 number, and larger values are clipped to that.

All arithmetic is single IEEE operations on fp32 (a product or quotient, then rint), so every device has the same bits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .byte_format import CodecError, Direction, Key, LearnedTable, Payload, is_finite
from .feedback import Feedback
from .float_formats import F32_MAX, LARGEST_BF16, MAX_SCALE_BITS, MIN_SCALE, MIN_SCALE_BITS, bf16_value, refusal
from .hadamard import check_block, rotate, rotate_back
from .registry import register_format

# Scales take 1.5 % (int8), 3.0 % (int4), 4.0 % (int3) or 5.9 % (int2) of the bytes. Signal to noise of Gaussian values,
# to nearest: 43.7, 18.6, 11.2, 2.3 dB. int4's, less 6.02 dB for each bit spent, measured against blocks of 32, 64 and
# 512: +0.6, 0.0, +0.7 dB (Gaussian); -0.2, -0.4, +1.3 (Laplace); -1.1, -0.9, +2.5 (Student's t4).
BLOCK = 128
_SCALE_SLACK = 1 + 2**-6  # a rounded-up scale times the peak's code exceeds the block's peak by less than this


class _Blockwise(Feedback):
    """One bf16 scale for every 128 values and one integer in [-peak_code, peak_code] a value.

    centre: the mean of each of the W numbers of a token, over the tensor's tokens, goes ahead in bf16 (2 W bytes a
    tensor), and what is coded is the distance from it. Half of the energy of projected activations is their mean
    (docs/results/loss.md); gradients have none.

    hadamard: each token, or what is left of it without the mean, is rotated before it is coded (`compress.hadamard`),
    and back behind it; the signs come from the key at both ends. It spreads outliers, and costs no byte.

    feedback: what rounding took from a tensor is added to the next one (`compress.feedback`), and gradients too are
    rounded to nearest.
    """

    peak_code: ClassVar[int]

    def __init__(self, centre: bool = False, hadamard: bool = False, feedback: bool = False) -> None:
        self.centre, self.hadamard, self.feedback = centre, hadamard, feedback

    def table(self, width: int) -> LearnedTable | None:
        if self.hadamard:
            check_block(self.id, width)
        return None

    def _check_width(self, shape: tuple[int, ...]) -> None:
        if self.hadamard:
            self.table(shape[-1] if shape else 1)

    def _mean_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * shape[-1] if self.centre and shape and math.prod(shape) else 0

    @classmethod
    @abstractmethod
    def code_bytes(cls, count: int) -> int:
        """Bytes that `count` codes take."""

    @classmethod
    @abstractmethod
    def join(cls, codes: Tensor) -> Tensor:
        """Codes as whole fp32 numbers, a multiple of BLOCK, to the bytes that hold them, on the same device."""

    @classmethod
    @abstractmethod
    def split(cls, octets: np.ndarray) -> np.ndarray:
        """Inverse of `join`: uint8 to int8 codes, which may be out of range, and those that fill up the last group."""

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        self._check_width(shape)
        count = math.prod(shape)
        return self._mean_bytes(shape) + 2 * _blocks(count) + self.code_bytes(count)

    def pack(self, z: Tensor, key: Key) -> Payload:
        self._check_width(tuple(z.shape))
        count, blocks = z.numel(), _blocks(z.numel())
        given = flat = z.detach().to(torch.float32).reshape(-1)
        means = flat.new_empty(0, dtype=torch.bfloat16)
        if self._mean_bytes(tuple(z.shape)):
            tokens = flat.view(-1, z.shape[-1])
            means = tokens.to(torch.float64).mean(dim=0).clamp_(-LARGEST_BF16, LARGEST_BF16).to(torch.bfloat16)
            flat = (tokens - means.to(torch.float32)).view(-1)
        if self.hadamard and count:
            flat = self._rotated(flat.view(-1, z.shape[-1]), key)
        if padding := blocks * BLOCK - count:
            flat = torch.nn.functional.pad(flat, (0, padding))
        rows = flat.view(blocks, BLOCK)
        scratch = rows.abs()
        peaks = scratch.amax(dim=1, keepdim=True)
        if not is_finite(peaks):
            raise refusal(self, z.detach(), flat[:count] if is_finite(given) else given, key)
        if self.peak_code == 1:  # the one scale that may exceed the largest of bf16
            rows, peaks = rows.clamp(-LARGEST_BF16, LARGEST_BF16), peaks.clamp_(max=LARGEST_BF16)
        stochastic = key.direction is Direction.BACKWARD and not self.feedback
        scales = self._scales(peaks, round_up=stochastic)
        torch.div(rows, scales.to(torch.float32), out=scratch)
        if stochastic:
            scratch.add_(_noise(key, scratch.numel()).to(scratch.device, torch.float32).view_as(scratch), alpha=2**-16)
        codes = self.join(scratch.round_().view(-1)).cpu().numpy()[: self.code_bytes(count)]
        words = torch.cat((means, scales.view(-1))).view(torch.int16).cpu().numpy()
        body = b"".join((words.data, codes.data))
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=body)

    def _rotated(self, tokens_NW: Tensor, key: Key) -> Tensor:
        rotated = rotate(tokens_NW, key).view(-1)
        if is_finite(rotated) or not is_finite(tokens_NW):
            return rotated
        # what overflowed is a sum; the error shall name the largest number, and not where the sum came to lie
        flat = tokens_NW.reshape(-1).clone()
        flat[flat.abs().argmax()] = math.inf
        return flat

    def _scales(self, peaks: Tensor, *, round_up: bool) -> Tensor:
        # A product, because CUDA makes one of a division by a number and CPUs do not; its factor is a little too small,
        # so that a scale which bf16 holds exactly is not rounded up past itself.
        exact = peaks * ((1 - 2**-22) / self.peak_code)
        if not round_up:
            return exact.clamp_(min=MIN_SCALE).to(torch.bfloat16)
        bits = (exact.clamp_(min=MIN_SCALE).view(torch.int32) + 0xFFFF) >> 16
        scales = bits.to(torch.int16).view(torch.bfloat16)
        short = scales.to(torch.float32) * self.peak_code < peaks  # the factor was too small: at most one more step
        return (bits + short).to(torch.int16).view(torch.bfloat16)

    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        self.check(payload, shape)
        count, blocks = math.prod(shape), _blocks(math.prod(shape))
        if not count:
            return torch.empty(shape, dtype=dtype, device=device)
        means = self._check_means(payload.body, shape)
        bits = np.frombuffer(payload.body, "<i2", count=blocks, offset=2 * len(means))
        limit = min(torch.finfo(dtype).max, F32_MAX)
        # a rotated number may be √B times as large as those that it is made of
        held = torch.float32 if self.hadamard else dtype
        reach = self._check_scales(bits, held, F32_MAX if self.hadamard else limit)
        codes = np.zeros(blocks * BLOCK, np.int8)
        found = self.split(np.frombuffer(payload.body, np.uint8, offset=2 * (len(means) + blocks)))
        codes[: found.size] = found
        if (lowest := int(codes.min())) < -self.peak_code:  # the pattern that two's complement has to spare
            raise CodecError(
                f"{self.id} payload has code {lowest} at element {codes.argmin()}, below {-self.peak_code}"
            )
        if codes[count:].any():
            index = count + int(np.argmax(codes[count:] != 0))
            raise CodecError(f"{self.id} payload has code {codes[index]} at element {index} of {count}; 0 fills it up")
        scales = torch.from_numpy(bits.copy()).view(torch.bfloat16).to(device, torch.float32).unsqueeze(1)
        values = torch.from_numpy(codes).to(device).view(blocks, BLOCK).to(torch.float32).mul_(scales)
        flat = values.view(-1)[:count]
        if self.hadamard:
            flat = self._rotated_back(flat.view(-1, shape[-1]), dtype, self.needed(key))
        if len(means):
            flat.view(-1, len(means)).add_(means.to(device, torch.float32))
        if len(means) or reach > limit:  # the scale of a peak close to the largest number was rounded beyond it
            flat.clamp_(-limit, limit)
        return flat.view(shape).to(dtype)

    def _rotated_back(self, tokens_NW: Tensor, dtype: torch.dtype, key: Key) -> Tensor:
        back_NW = rotate_back(tokens_NW, key)
        if not is_finite(back_NW.to(dtype)):
            token = int((~back_NW.to(dtype).isfinite().all(dim=1)).nonzero()[0])
            raise CodecError(f"{self.id} payload's token {token} is not finite in {dtype} when it is rotated back")
        return back_NW.view(-1)

    def _check_means(self, body: bytes | memoryview, shape: tuple[int, ...]) -> Tensor:
        bits = np.frombuffer(body, "<i2", count=self._mean_bytes(shape) // 2)
        means = torch.from_numpy(bits.copy()).view(torch.bfloat16)
        if not is_finite(means):
            index = int((~means.isfinite()).int().argmax())
            raise CodecError(f"{self.id} payload's mean of number {index} is {means[index].item()}")
        return means

    def _check_scales(self, bits: np.ndarray, dtype: torch.dtype, limit: float) -> float:
        """The largest magnitude that these scales can give."""
        low, high = int(bits.min()), int(bits.max())
        if low < MIN_SCALE_BITS or high > MAX_SCALE_BITS:
            index = int(np.argmax((bits < MIN_SCALE_BITS) | (bits > MAX_SCALE_BITS)))
            raise CodecError(
                f"{self.id} payload's scale of block {index} is {bf16_value(int(bits[index]))}, "
                f"outside [{MIN_SCALE}, {bf16_value(MAX_SCALE_BITS)}]"
            )
        reach = bf16_value(high) * self.peak_code
        if reach > limit * _SCALE_SLACK:
            raise CodecError(
                f"{self.id} payload's scale of block {bits.argmax()} reaches {reach}, beyond {dtype}'s {limit}"
            )
        return reach


@register_format
class Int8(_Blockwise):
    """1.016 bytes a value; the error is at most 0.4 % of the block's peak (nearest), 0.8 % (stochastic)."""

    id = "int8"
    peak_code = 127

    @classmethod
    def code_bytes(cls, count: int) -> int:
        return count

    @classmethod
    def join(cls, codes: Tensor) -> Tensor:
        return codes.to(torch.int8)

    @classmethod
    def split(cls, octets: np.ndarray) -> np.ndarray:
        return octets.view(np.int8)


@register_format
class Int4(_Blockwise):
    """0.516 bytes a value; the error is at most 7.2 % of the block's peak (nearest), 14.4 % (stochastic)."""

    id = "int4"
    peak_code = 7

    @classmethod
    def code_bytes(cls, count: int) -> int:
        return (count + 1) // 2

    @classmethod
    def join(cls, codes: Tensor) -> Tensor:
        pairs = codes.view(-1, 2)
        return torch.add(pairs[:, 0], pairs[:, 1], alpha=16).add_(8 + 16 * 8).to(torch.uint8)

    @classmethod
    def split(cls, octets: np.ndarray) -> np.ndarray:
        pairs = octets.astype("<u2")
        pairs |= pairs << 4
        pairs &= 0x0F0F
        codes = pairs.view(np.int8)
        codes -= 8
        return codes


@register_format
class Int3(_Blockwise):
    """0.391 bytes a value; the error is at most 16.8 % of the block's peak (nearest), 33.6 % (stochastic)."""

    id = "int3"
    peak_code = 3

    @classmethod
    def code_bytes(cls, count: int) -> int:
        return 3 * -(-count // 8)

    @classmethod
    def join(cls, codes: Tensor) -> Tensor:
        # Sums of eight codes stay below 2^24, whole numbers in fp32. Not a product with (1, 8, 64, ...): a GPU may
        # multiply matrices in TF32, which has 11 bits.
        sums = codes.view(-1, 8)
        for bits in (3, 6, 12):
            sums = torch.add(sums[:, 0::2], sums[:, 1::2], alpha=2**bits)
        return sums.add_(0o4444_4444).to(torch.int32).view(torch.uint8)[:, :3].reshape(-1)

    @classmethod
    def split(cls, octets: np.ndarray) -> np.ndarray:
        groups = np.zeros((octets.size // 3, 8), np.uint8)
        groups[:, :3] = octets.reshape(-1, 3)
        spread = groups.view("<u8")  # 24 bits, then halves 32 bits apart, quarters 16, eighths 8: a byte each
        for bits, mask in ((20, 0x0000_0FFF_0000_0FFF), (10, 0x003F_003F_003F_003F), (5, 0x0707_0707_0707_0707)):
            spread |= spread << np.uint64(bits)
            spread &= np.uint64(mask)
        codes = spread.view(np.int8)
        codes -= 4
        return codes.reshape(-1)


@register_format
class Int2(_Blockwise):
    """0.266 bytes a value; the error is at most half of the block's peak (nearest), all of it (stochastic)."""

    id = "int2"
    peak_code = 1

    @classmethod
    def code_bytes(cls, count: int) -> int:
        return (count + 3) // 4

    @classmethod
    def join(cls, codes: Tensor) -> Tensor:
        pairs = codes.view(-1, 2)
        sums = torch.add(pairs[:, 0], pairs[:, 1], alpha=4).view(-1, 2)
        return torch.add(sums[:, 0], sums[:, 1], alpha=16).add_(0b10_10_10_10).to(torch.uint8)

    @classmethod
    def split(cls, octets: np.ndarray) -> np.ndarray:
        fours = octets.astype("<u4")
        for bits, mask in ((12, 0x000F_000F), (6, 0x0303_0303)):
            fours |= fours << np.uint32(bits)
            fours &= np.uint32(mask)
        codes = fours.view(np.int8)
        codes -= 2
        return codes


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _noise(key: Key, count: int) -> Tensor:
    """`count` (a multiple of 4) odd int16 numbers: symmetric about 0, in steps of 2, from the key alone."""
    raw = key.generator().random_raw(count // 4)
    raw |= np.uint64(0x0001_0001_0001_0001)
    return torch.from_numpy(raw.view(np.int16))
