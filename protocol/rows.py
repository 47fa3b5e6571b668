"""The values of a dictionary's entries as bytes: both ends run these same single IEEE operations, so they agree.

fp64, fp32, bf16: the differences, to nearest even. int8, int4: a bf16 scale s = peak/127 or peak/7 for each
row, to nearest and at least 2^-126 (no division by zero), then a code rint(difference/s) for each value; two int4 codes
share a byte as q + 8, the earlier one in the low nibble, and the spare nibble of an odd count is 8.

Why a scale for each entry, where tensors have one for every 128 values: entries differ in how far they drift, and any
subset of them may travel.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .errors import Fault, RemoteProtocolError

Encoding = Literal["fp64", "fp32", "bf16", "int8", "int4"]
_PLAIN_BYTES: dict[str, int] = {"fp64": 8, "fp32": 4, "bf16": 2}
_LEVELS: dict[str, int] = {"int8": 127, "int4": 7}
_MIN_SCALE, _MIN_SCALE_BITS, _MAX_SCALE_BITS = 2.0**-126, 0x0080, 0x7F7F  # the smallest normal, the largest bf16


def rows_bytes(rows: int, width: int, encoding: Encoding) -> int:
    """Exactly what `encode_rows` makes of (rows, width)."""
    values = rows * width
    if encoding in _PLAIN_BYTES:
        return values * _PLAIN_BYTES[encoding]
    return 2 * rows + (values if encoding == "int8" else (values + 1) // 2)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")  # to nearest even


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode_rows(x: np.ndarray, encoding: Encoding) -> bytes:
    """x: (rows, width). What is too large for the encoding becomes infinite or nan, which decoding refuses."""
    with np.errstate(all="ignore"):
        if encoding in _PLAIN_BYTES:
            return (_to_bf16(x) if encoding == "bf16" else x.astype(f"<f{_PLAIN_BYTES[encoding]}")).tobytes()
        scales = _to_bf16(np.maximum(np.abs(x).max(axis=1) / _LEVELS[encoding], _MIN_SCALE))
        codes = np.rint(x / _from_bf16(scales).astype(x.dtype)[:, None]).astype(np.int8)
    if encoding == "int4":
        nibbles = np.append(codes + 8, [8] * (codes.size % 2)).astype(np.uint8)
        codes = nibbles[::2] | nibbles[1::2] << 4
    return scales.tobytes() + codes.tobytes()


def decode_rows(payload: bytes, encoding: Encoding, shape: tuple[int, ...], dtype: str, name: str) -> np.ndarray:
    """(rows, width) of `dtype`. `payload` has the right length; plain values and products may still not be finite.

    Raises RemoteProtocolError, with the dictionary's `name`, for a scale or code that no encoder makes.
    """
    rows, values = shape[0], shape[0] * shape[1]
    if encoding in _PLAIN_BYTES:
        plain = np.frombuffer(payload, "<u2" if encoding == "bf16" else f"<f{_PLAIN_BYTES[encoding]}")
        return (_from_bf16(plain) if encoding == "bf16" else plain).astype(dtype).reshape(shape)
    scales, codes = np.frombuffer(payload, "<u2", rows), np.frombuffer(payload, np.uint8, offset=2 * rows)
    if encoding == "int4":
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1) - np.uint8(8)
    codes, spare = codes[:values].view(np.int8), codes[values:]
    known = codes.min() >= -_LEVELS[encoding] and not spare.any()
    if not (known and scales.min() >= _MIN_SCALE_BITS and scales.max() <= _MAX_SCALE_BITS):
        raise RemoteProtocolError(Fault.PAYLOAD, f"a delta of '{name}' with a scale or code {encoding} has not")
    return codes.astype(dtype).reshape(shape) * _from_bf16(scales).astype(dtype)[:, None]
