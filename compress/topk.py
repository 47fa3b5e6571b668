"""Top-k as a byte format: of each token the k numbers of largest magnitude, and where they were. `topk:k=16`.

Body, for N tokens of W numbers: N k values in the order of tokens and, within one, of places, in bf16; then their
places, ceil(log2(W)) bits each, packed (`compress.bit_packing`). `values=int8` or `values=int4` codes the values as
those formats do (`compress.integer_formats`), with the rounding of the direction. All that is not kept is 0 at the
other end.

This is the sparsification that is usual for gradients of weights (Aji & Heafield, arXiv 1704.05021), applied to what
crosses a boundary. There it is a baseline more than a recommendation: hidden states have no few large numbers that
carry most of them, the indices of small k cost half as much as the values, and dropping is a bias (Bian et al., arXiv
2301.02654, and Rudakov et al., arXiv 2401.07788, measured both directions). Why k of each token and not of the whole
tensor: the length is known beforehand, and no token is left without anything.

Magnitudes are compared as they are sent, rounded to bf16, and of equal ones the lower place is kept. So every device
chooses alike, and a tensor that crosses twice loses nothing more. (Values in int8 or int4 are compared in float32:
their rounding is not known before they are chosen.) The order within a token is no information, so it is fixed:
places ascend, and a payload where they do not is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .bit_packing import bit_width, pack_bits, packed_bytes, unpack_bits
from .byte_format import ByteFormat, CodecError, Direction, Key, Payload
from .feedback import Feedback
from .float_formats import Bf16
from .integer_formats import Int4, Int8
from .kept_values import KeepsSome, largest
from .registry import register_format

_VALUES: dict[str, type[ByteFormat]] = {"bf16": Bf16, "int8": Int8, "int4": Int4}


@register_format
class TopK(Feedback, KeepsSome):
    """`topk:k=16,values=bf16`: 2 k + k ceil(log2(W)) / 8 bytes a token.

    k: numbers of a token that are kept. values: their byte format, `bf16`, `int8` or `int4`. feedback: what was lost of
    a tensor is added to the next one (`compress.feedback`), and values are rounded to nearest both ways.
    """

    id = "topk"

    def __init__(self, k: int = 16, values: Literal["bf16", "int8", "int4"] = "bf16", feedback: bool = False) -> None:
        super().__init__(k)
        self.feedback = feedback
        self._values = _VALUES[values]()
        self._values.id = self.id  # whose payload it is a part of, in errors
        self._compared = torch.bfloat16 if values == "bf16" else torch.float32

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        tokens, width = self.tokens(shape)
        return self._values.body_bytes((tokens * self.k,)) + packed_bytes(tokens * self.k, bit_width(width))

    def pack(self, z: Tensor, key: Key) -> Payload:
        sent_NW = self.rounded(z, self._compared, key)
        # of a number that is at least 0, a larger pattern is a larger number
        patterns_NW = sent_NW.abs().view(torch.int16 if sent_NW.dtype is torch.bfloat16 else torch.int32)
        places_NK = largest(patterns_NW.to(torch.int64), self.k)
        coded = replace(key, direction=Direction.FORWARD) if self.feedback else key  # to nearest
        values = self._values.pack(sent_NW.gather(1, places_NK).view(-1), coded).body
        places = pack_bits(places_NK.cpu().numpy(), bit_width(z.shape[-1]))
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=b"".join((values, places)))

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
        tokens, width = self.tokens(shape)
        count = tokens * self.k
        cut = self._values.body_bytes((count,))
        places_NK = self._places(payload.body[cut:], tokens, width)
        kept = Payload(codec=self.id, header={"shape": [count]}, body=payload.body[:cut])
        values = self._values.unpack(kept, shape=(count,), dtype=dtype, key=key)
        return self.spread(values.view(tokens, self.k), torch.from_numpy(places_NK), shape, dtype, device)

    def _places(self, octets: bytes | memoryview, tokens: int, width: int) -> np.ndarray:
        try:
            places_NK = unpack_bits(octets, bit_width(width), tokens * self.k, width).reshape(tokens, self.k)
        except CodecError as error:
            raise CodecError(f"topk payload's places: {error}") from None
        descents = np.diff(places_NK, axis=1) <= 0
        if descents.any():
            token, kept = (int(i) for i in np.argwhere(descents)[0])
            raise CodecError(
                f"topk payload's places of token {token} do not ascend: "
                f"{places_NK[token, kept]}, then {places_NK[token, kept + 1]}"
            )
        return places_NK
