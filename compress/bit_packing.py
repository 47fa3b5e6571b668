"""Fixed-width bit packing: token ids and codebook indices in ceil(log2(limit)) bits each, with nothing between them.

Value i fills bits [i * width, (i + 1) * width) of a stream whose bit b is bit b % 8 of byte b // 8 (little-endian both
ways); the bits after the last value are zero. Packing is two NumPy calls over a (count, width) bit matrix. Unpacking
does not go back through that matrix (25 ns a value) but reads, for each value, the 64-bit window that starts at its
first byte, shifts and masks (7 ns). Widths of 8, 16 and 32 bits are plain little-endian numbers and are copied. Why not
an entropy code: here every length is known from the configuration and checked before anything is allocated, and no
value depends on the ones before it.
"""

from __future__ import annotations

import numpy as np

from .byte_format import CodecError

MAX_WIDTH = 32
_PLAIN = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4")}


def bit_width(limit: int) -> int:
    """Bits that hold any value in [0, limit): ceil(log2(limit)), at least 1."""
    return max(1, (limit - 1).bit_length())


def packed_bytes(count: int, width: int) -> int:
    """Exact length of `pack_bits` for `count` values."""
    return (count * width + 7) // 8


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Integers of any shape, in C order, to ceil(count * width / 8) bytes; `width` is 1 to 32 bits.

    Raises CodecError for a value that does not fit, naming its index.
    """
    _check_width(width)
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.kind not in "iu":
        raise CodecError(f"pack_bits wants integers, got {flat.dtype}")
    if not flat.size:
        return b""
    if int(flat.min()) < 0 or int(flat.max()) >> width:
        index = int(np.argmax((flat < 0) | (flat > 2**width - 1)))
        raise CodecError(f"value {flat[index]} at index {index} does not fit {width} bits")
    if width in _PLAIN:
        return flat.astype(_PLAIN[width]).tobytes()
    octets = flat.astype("<u4").view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_bits(data: bytes | memoryview, width: int, count: int, limit: int) -> np.ndarray:
    """`count` values in [0, limit) as int64, shape (count,).

    Raises CodecError for a wrong length (before anything is allocated), for padding bits that are set, and for a value
    outside the limit, naming its index.
    """
    _check_width(width)
    if len(data) != packed_bytes(count, width):
        raise CodecError(f"{count} values of {width} bits take {packed_bytes(count, width)} bytes, got {len(data)}")
    if not count:
        return np.empty(0, np.int64)
    if padding := -count * width % 8:
        spare = data[-1] >> (8 - padding)
        if spare:
            raise CodecError(f"the {padding} padding bits after {count} values of {width} bits are {spare:#b}, not 0")
    if width in _PLAIN:
        values = np.frombuffer(data, _PLAIN[width]).astype(np.int64)
    else:
        padded = np.frombuffer(b"".join((data, bytes(7))), np.uint8)  # so that the last window ends inside the buffer
        windows = np.ndarray((len(data),), dtype="<u8", buffer=padded, strides=(1,))
        position = np.arange(count, dtype=np.int64) * width
        shift = (position & 7).astype(np.uint64)
        values = ((windows[position >> 3] >> shift) & np.uint64(2**width - 1)).astype(np.int64)
    if int(values.max()) >= limit:
        index = int(np.argmax(values >= limit))
        raise CodecError(f"value {values[index]} at index {index} is not below the limit of {limit}")
    return values


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width must be 1 to {MAX_WIDTH} bits, got {width}")
