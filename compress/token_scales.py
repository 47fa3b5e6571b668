"""One scale a token, as bytes: bf16 by itself, or a few bits below the largest scale of the tensor.

A vector quantiser divides each token by its scale, and codes what is left. With two bytes of codes a group a bf16 scale
is a third of the message, and most of it says nothing: what is coded are the numbers divided by the *decoded* scale, so
a coarse scale is no error, only a vector whose length is a little off, which the codebook has to cover.

    bf16   2 bytes a token
    log8   1 byte: the largest scale in bf16, once a tensor, and steps of 1/8 octave (9 %) below it, 31.75 octaves deep
    log4   half a byte: steps of 1/2 octave (41 %), 7 octaves deep

The last step of either stands for a token of zeros, and smaller scales than the deepest are coded as that one. Relative
to the largest, and not to a fixed range as an 8-bit float would be, because gradients have any magnitude.

A decoded scale is one fp32 product of the largest and a constant: every device has the same bits. Which step is nearest
may come out differently on another processor; only the one that packs chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .byte_format import CodecError, is_finite
from .float_formats import MAX_SCALE_BITS, MIN_SCALE, MIN_SCALE_BITS, bf16_value

ScaleKind = Literal["bf16", "log8", "log4"]
MAX_SCALE = torch.finfo(torch.bfloat16).max
# Far enough above the smallest normal number that no step below it is subnormal, which some processors flush.
_SMALLEST_TOP, _SMALLEST_TOP_BITS = 2.0**-94, (127 - 94) << 7
_EIGHTHS = tuple(np.float32(2.0 ** (-part / 8)) for part in range(8))  # of an octave, down


def root_mean_squares(x_NW: Tensor) -> Tensor:
    """Of each token (N,), for `TokenScales.rounded`; x_NW: fp32. 0 of zeros, else at least 2^-126; not finite where one
    of the token's numbers is not."""
    peaks_N1 = x_NW.abs().amax(dim=1, keepdim=True)
    parts_NW = x_NW / peaks_N1.clamp(min=MIN_SCALE)  # before squares, which would overflow
    rms_N1 = parts_NW.square().mean(dim=1, keepdim=True).sqrt_().mul_(peaks_N1)
    # A product may have been flushed.
    return rms_N1.clamp_(min=MIN_SCALE).masked_fill_(peaks_N1 == 0, 0.0).squeeze(1)


def whole_tokens(
    values_NW: Tensor, scales_N: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """What was unpacked, as the tensor that it was. Raises CodecError for a token that is not finite in `dtype`."""
    values = values_NW.view(shape).to(device=device, dtype=dtype)
    if not is_finite(values):
        index = int((~values.view(values_NW.shape).isfinite().all(dim=1)).nonzero()[0])
        raise CodecError(f"the payload's token {index} is not finite in {dtype}; its scale is {scales_N[index].item()}")
    return values


class TokenScales(ABC):
    """How N scales lie ahead of the codes. Without state."""

    @abstractmethod
    def byte_count(self, tokens: int) -> int:
        """Exact length of what `pack` returns."""

    @abstractmethod
    def rounded(self, rms_N: Tensor) -> Tensor:
        """The scales (N,), fp32, that the other end will have; 0 for 0, else at least 2^-126. rms_N: fp32, finite."""

    @abstractmethod
    def pack(self, scales_N: Tensor) -> bytes:
        """Of what `rounded` returned."""

    @abstractmethod
    def unpack(self, octets: bytes | memoryview, tokens: int) -> Tensor:
        """(N,), fp32, on the CPU; `octets` has the right length. Raises CodecError for what `pack` cannot have
        written."""


class Bf16Scales(TokenScales):
    def byte_count(self, tokens: int) -> int:
        return 2 * tokens

    def rounded(self, rms_N: Tensor) -> Tensor:
        return rms_N.clamp(MIN_SCALE, MAX_SCALE).to(torch.bfloat16).to(torch.float32).masked_fill_(rms_N == 0, 0.0)

    def pack(self, scales_N: Tensor) -> bytes:
        return scales_N.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()

    def unpack(self, octets: bytes | memoryview, tokens: int) -> Tensor:
        bits = np.frombuffer(octets, "<i2", count=tokens)
        bad = (bits != 0) & ((bits < MIN_SCALE_BITS) | (bits > MAX_SCALE_BITS))
        if bad.any():
            index = int(np.argmax(bad))
            bounds = f"neither 0 nor from {MIN_SCALE} to {MAX_SCALE}"
            raise CodecError(f"rvq payload's scale of token {index} is {bf16_value(int(bits[index]))}, {bounds}")
        return torch.from_numpy(bits.copy()).view(torch.bfloat16).to(torch.float32)


class LogScales(TokenScales):
    """2^bits - 1 steps of `eighths`/8 octave below the largest scale, and one for zero."""

    def __init__(self, bits: Literal[4, 8], eighths: int) -> None:
        self._bits, self._octave = bits, 8 / eighths
        self._zero = 2**bits - 1
        steps = [divmod(step * eighths, 8) for step in range(self._zero)]
        self._factors = torch.tensor([np.ldexp(_EIGHTHS[part], -octaves) for octaves, part in steps] + [0.0])

    def byte_count(self, tokens: int) -> int:
        return 2 + (tokens * self._bits + 7) // 8 if tokens else 0

    def rounded(self, rms_N: Tensor) -> Tensor:
        if not len(rms_N):
            return rms_N
        top = rms_N.max().clamp(_SMALLEST_TOP, MAX_SCALE).to(torch.bfloat16).to(torch.float32)
        return self._factors.to(top.device)[self._steps(top, rms_N).to(torch.int64)] * top

    def _steps(self, top: Tensor, scales_N: Tensor) -> Tensor:
        """The nearest steps (N,), uint8. A scale that was rounded already comes back to its own."""
        below_N = (top.log2() - scales_N.clamp(min=MIN_SCALE).log2()) * self._octave
        return below_N.round_().clamp_(0, self._zero - 1).masked_fill_(scales_N == 0, self._zero).to(torch.uint8)

    def pack(self, scales_N: Tensor) -> bytes:
        if not len(scales_N):
            return b""
        top = scales_N.max().clamp(min=_SMALLEST_TOP)  # the first step is the largest itself; zeros need none
        steps_N = self._steps(top, scales_N).cpu().numpy()
        if self._bits == 4:
            padded_N = np.append(steps_N, np.uint8(0)) if len(steps_N) % 2 else steps_N
            steps_N = padded_N[0::2] | padded_N[1::2] << 4
        return top.to(torch.bfloat16).view(1).view(torch.int16).cpu().numpy().tobytes() + steps_N.tobytes()

    def unpack(self, octets: bytes | memoryview, tokens: int) -> Tensor:
        if not tokens:
            return torch.empty(0)
        word = int(np.frombuffer(octets, "<i2", count=1)[0])
        if not _SMALLEST_TOP_BITS <= word <= MAX_SCALE_BITS:
            bounds = f"outside [{_SMALLEST_TOP}, {MAX_SCALE}]"
            raise CodecError(f"rvq payload's largest scale is {bf16_value(word)}, {bounds}")
        steps_N = np.frombuffer(octets, np.uint8, offset=2)
        if self._bits == 4:
            steps_N = np.stack((steps_N & 15, steps_N >> 4), axis=1).reshape(-1)
            if tokens % 2 and steps_N[tokens]:
                raise CodecError(f"rvq payload has a step {steps_N[tokens]} after its {tokens} scales; 0 fills it up")
        return self._factors[torch.from_numpy(steps_N[:tokens].astype(np.int64))] * bf16_value(word)


def token_scales(kind: ScaleKind) -> TokenScales:
    if kind == "bf16":
        return Bf16Scales()
    return LogScales(8, eighths=1) if kind == "log8" else LogScales(4, eighths=4)
