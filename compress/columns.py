"""The largest columns as a byte format: one choice of k channels for all tokens of a tensor. `columns:k=16`.

A tensor (..., W) is N tokens of W numbers. The sender keeps the k columns with the largest norm over the N tokens.
Body: W bits, one for each column and set for those that cross (column i is bit i % 8 of byte i // 8, spare bits 0),
then N k values in bf16, in the order of tokens and, within one, of columns. The other columns are 0. A tensor without
tokens has an empty body.

This is the column mask of "Beyond Top-K" (structured sparsification for pipelines): where some channels are large in
all tokens one choice does for all of them, and it costs W bits a tensor where `topk` pays k ceil(log2(W)) bits a token.
What it drops is dropped for every token, and mostly in every microbatch: this is a bias. `mask` has none, and a far
larger variance.

Norms are of the numbers as they are sent, in bf16, summed in float64, and compared without the last 24 of 53 bits, in
which devices and numbers of threads may differ. Of equal norms the lower column is kept. So a tensor that crosses twice
loses nothing more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .byte_format import CodecError, Key, Payload
from .feedback import Feedback
from .float_formats import Bf16
from .kept_values import KeepsSome, largest
from .registry import register_format


@register_format
class Columns(Feedback, KeepsSome):
    """`columns:k=16`: 2 k bytes a token, and W / 8 a tensor.

    k: columns that cross. feedback: what was lost of a tensor is added to the next one (`compress.feedback`).
    """

    id = "columns"

    def __init__(self, k: int = 16, feedback: bool = False) -> None:
        super().__init__(k)
        self.feedback = feedback
        self._values = Bf16()
        self._values.id = self.id

    def body_bytes(self, shape: tuple[int, ...]) -> int:
        tokens, width = self.tokens(shape)
        return _bitmap_bytes(tokens, width) + self._values.body_bytes((tokens, self.k))

    def pack(self, z: Tensor, key: Key) -> Payload:
        tokens, width = self.tokens(tuple(z.shape))
        sent_NW = self.rounded(z, torch.bfloat16, key)
        squares_W = sent_NW.to(torch.float64).square_().sum(dim=0)
        columns_K = largest((squares_W.view(torch.int64) >> 24).unsqueeze(0), self.k).squeeze(0)
        values = self._values.pack(sent_NW[:, columns_K], key).body
        bits_W = np.zeros(width if tokens else 0, np.uint8)
        if tokens:
            bits_W[columns_K.cpu().numpy()] = 1
        bitmap = np.packbits(bits_W, bitorder="little").tobytes()
        return Payload(codec=self.id, header={"shape": list(z.shape)}, body=bitmap + values)

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
        tokens, width = self.tokens(shape)
        cut = _bitmap_bytes(tokens, width)
        if not tokens:
            return torch.empty(shape, dtype=dtype, device=device)
        bits = np.unpackbits(np.frombuffer(payload.body, np.uint8, count=cut), bitorder="little")
        (columns_K,) = np.nonzero(bits)
        if len(columns_K) != self.k or columns_K[-1] >= width:
            inside = int(bits[:width].sum())
            raise CodecError(
                f"columns payload's bitmap has {inside} of {width} columns and {len(columns_K) - inside} spare bits "
                f"set; it takes {self.k} and 0"
            )
        kept = Payload(codec=self.id, header={"shape": [tokens, self.k]}, body=payload.body[cut:])
        values_NK = self._values.unpack(kept, shape=(tokens, self.k), dtype=dtype)
        return self.spread(values_NK, torch.from_numpy(columns_K), shape, dtype, device)


def _bitmap_bytes(tokens: int, width: int) -> int:
    return (width + 7) // 8 if tokens else 0
