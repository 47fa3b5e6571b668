"""What a stage works out from the last few tokens: a small causal network beside its anchors, at no bytes.

Both ends of a boundary have all token ids, and know a sequence from its first token on. So whatever a hidden state owes
to its last few tokens need not cross either, however it depends on them:

    context[i] = W2 silu(W1 [C[t_{i-n+1}], ..., C[t_i]])        C (V + 1, e), W1 (h, n e), W2 (D, h)

A stage has one network, and adds what it gives to its anchors: the sender takes it off, the receiver puts its own on
(`compress.anchors`). W2 starts at zero, so at first it knows nothing. Row V of C stands for the places before a
sequence. Each stage learns its own with its own optimizer, W1 and W2 with Muon like the matrices of the model, and
nothing of it is ever sent; this is ours, not MAPL's.

Why not the hashes of pairs (`pairs` of the anchors): a row for each pair learns the text by heart, and what it has
learned of one pair says nothing of another. A network generalises, and has V e + h (n e + D) numbers where the pairs
have N D. Why not attention over the whole sequence: a transformer's own first layers do that, and it costs a stage more
than the few per cent that this does. Gated tables of n-grams (Engram, arXiv 2601.07372) are the nearest published kin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .token_table import UNIT, check_ids, integers

MAX_CONTEXT = 64  # tokens: beyond, the first product costs more than a stage's own layers
_FIRST_STREAM = 2**63  # of the seed's draws: two a stage, apart from the token table's and the anchors'


class Context(nn.Module):
    """(B, T) ids to (B, T, D), from each token and the `tokens - 1` before it."""

    def __init__(
        self, *, vocab_size: int, width: int, tokens: int, embedding: int, hidden: int, seed: int, stage: int
    ) -> None:
        super().__init__()
        self._tokens = tokens
        streams = (_FIRST_STREAM + 2 * stage, _FIRST_STREAM + 2 * stage + 1)
        self.embedding = nn.Parameter(_normal(seed, streams[0], vocab_size + 1, embedding))
        inner = _normal(seed, streams[1], hidden, tokens * embedding) / math.sqrt(tokens * embedding)
        self.layers = nn.ParameterList([inner, torch.zeros(width, hidden)])  # by this name, Muon takes them

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Each row of ids is a sequence from its first token on. Raises ValueError for an id outside the vocabulary."""
        nothing = len(self.embedding) - 1
        check_ids(ids_BT, nothing)
        last_BTN = F.pad(ids_BT, (self._tokens - 1, 0), value=nothing).unfold(1, self._tokens, 1)
        known_BTE = F.embedding(last_BTN, self.embedding).flatten(2)
        return F.silu(known_BTE @ self.inner.mT) @ self.outer.mT

    @property
    def inner(self) -> Tensor:
        return self.layers[0]

    @property
    def outer(self) -> Tensor:
        return self.layers[1]


def _normal(seed: int, stream: int, rows: int, width: int) -> Tensor:
    return torch.from_numpy(integers(seed, stream, 0, rows, width) * UNIT).to(torch.float32)
