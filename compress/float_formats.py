"""Byte formats that send values as they are: fp64, fp32, bf16; and what other formats share with them.

fp64, fp32, bf16: the values, little-endian, in C order, rounded to nearest even.
"""

from __future__ import annotations

import math
import sys
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .byte_format import ByteFormat, CodecError, Key, Payload, is_finite
from .registry import register_format

if sys.byteorder != "little":
    raise ImportError("thinpipe's wire formats are little-endian and are copied as they lie in memory")

MIN_SCALE = 2.0**-126
MIN_SCALE_BITS, MAX_SCALE_BITS = 0x0080, 0x7F7F  # 2^-126 and the largest finite bf16, as int16
F32_MAX = torch.finfo(torch.float32).max
LARGEST_BF16 = torch.finfo(torch.bfloat16).max  # for means and scales


def refusal(fmt: ByteFormat, z: Tensor, sent: Tensor, key: Key) -> CodecError:
    """The error for a tensor `z` whose converted values `sent` are not all finite."""
    index = int((~sent.reshape(-1).isfinite()).nonzero()[0])
    value = z.reshape(-1)[index].item()
    fault = f"overflows {fmt.id}" if math.isfinite(value) else "is not finite"
    return CodecError(f"value {value} at element {index} of {key} {fault}; lower the learning rate or clip")


class _Plain(ByteFormat):
    """Values as they are, in one floating dtype."""

    dtype: ClassVar[torch.dtype]

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def pack(self, z: Tensor, key: Key) -> Payload:
        values = z.detach().to(self.dtype)
        if not is_finite(values):
            raise refusal(self, z.detach(), values, key)
        body = values.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=body)

    def unpack(
        self,
        payload: Payload,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key: Key | None = None,
    ) -> Tensor:
        del key
        self.check(payload, shape)
        octets = torch.empty(len(payload.body), dtype=torch.uint8)
        octets.numpy()[:] = np.frombuffer(payload.body, np.uint8)
        values = octets.view(self.dtype).view(shape).to(device=device, dtype=dtype)
        if not is_finite(values):
            index = int((~values.reshape(-1).isfinite()).nonzero()[0])
            raise CodecError(f"{self.id} payload is not finite in {dtype} at element {index}")
        return values


@register_format
class Fp64(_Plain):
    id = "fp64"
    dtype = torch.float64


@register_format
class Fp32(_Plain):
    id = "fp32"
    dtype = torch.float32


@register_format
class Bf16(_Plain):
    id = "bf16"
    dtype = torch.bfloat16


def bf16_value(bits: int) -> float:
    """The bf16 number with this int16 pattern."""
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item()
