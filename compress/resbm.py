"""ResBM: an encoder and a decoder that are trained with the model, around a low-rank identity (arXiv 2604.11947).

    sender    Z = Enc(X) + X[..., :b],    X = H - a[t]
    receiver  Ĥ = Dec(Z) + [Z, 0] + a'[t]

b numbers a token cross the boundary, in either direction. Enc is Linear(D, m) SiLU Linear(m, b) and Dec its mirror,
without biases; they start near zero (standard deviation 0.01), so at first the boundary passes the first b channels and
nothing else, and a gradient flows through them from the first step on. The identity is what makes deep stacks of such
boundaries train: it always means the same b channels, so b is the same at all boundaries of a run.

Enc is trained by the sender's stage, Dec by the receiver's, each with the stage's own optimizer (Muon for the matrices:
they are named `layers`). Nothing has to be synchronised, and the wire needs no token ids. `kind=linear` has one matrix
in the place of each network. Published runs compare ResBM under Muon with dense training under AdamW; here both have
the same optimizer.

`table` and `anchors`, with `pairs` and `context`, are ours and not the paper's: what both ends know of the token ids
(a, a') need not cross (`compress.anchors`). Without them a boundary of so few channels has to carry the tokens, too.

Why not MAPL's projector: a nonlinear encoder may carry more than a subspace holds. Its price is parameters,
2 D m + 2 m b a boundary, and that a sender cannot tell what of H the receiver will have.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anchor_options import AnchorOptions
from .anchors import Kind
from .boundary_function import BoundaryFunction, Half
from .byte_format import CodecError
from .codec_interface import BoundaryContext, Codec, Decoder, Encoder, StageContext, check_table_scale
from .registry import register_codec
from .token_table import UNIT, integers

NetworkKind = Literal["silu", "linear"]
FIRST_STD = 0.01  # of the first weights, as published
_FIRST_STREAM = 2**63 + 2**62  # of the seed's draws: apart from the token table's, the anchors' and the context's
_MOST_MATRICES = 4  # of one boundary


class ResbmEncoder(Encoder):
    def __init__(self, context: BoundaryContext, sizes: list[int]) -> None:
        super().__init__()
        self._tokens = context.tokens
        self._kept = sizes[-1]
        self.layers = _network(context, sizes, first_draw=0)

    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        x_BTD = hidden_BTD if own_BTD is None else hidden_BTD - own_BTD
        return self.layers(x_BTD) + x_BTD[..., : self._kept]


class ResbmDecoder(Decoder):
    def __init__(self, context: BoundaryContext, sizes: list[int]) -> None:
        super().__init__()
        self._tokens = context.tokens
        self._rest = sizes[-1] - sizes[0]
        self.layers = _network(context, sizes, first_draw=_MOST_MATRICES // 2)

    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.layers(z_BTW) + F.pad(z_BTW, (0, self._rest))
        own_BTD = None if self._tokens is None else self._tokens(ids_BT)
        return hidden_BTD if own_BTD is None else hidden_BTD + own_BTD


def _network(context: BoundaryContext, sizes: list[int], *, first_draw: int) -> nn.Sequential:
    """Linear maps of these sizes with SiLU between them, drawn from (seed, boundary)."""
    parts: list[nn.Module] = []
    for draw, (inner, outer) in enumerate(itertools.pairwise(sizes), start=first_draw):
        linear = nn.Linear(inner, outer, bias=False, device="meta")
        stream = _FIRST_STREAM + context.boundary * _MOST_MATRICES + draw
        first = torch.from_numpy(integers(context.seed, stream, 0, outer, inner) * UNIT) * FIRST_STD
        linear.weight = nn.Parameter(first.to(device=context.device, dtype=context.dtype))
        parts += [nn.SiLU(), linear] if parts else [linear]
    return nn.Sequential(*parts)


@register_codec
class ResbmCodec(Codec):
    """`--codec resbm:b=32,kind=silu,mid=auto,table=0,anchors=none`

    b: the numbers a token on the wire, and the channels that the identity passes. kind: `silu` for networks with one
    hidden layer, `linear` for one matrix each. mid: hidden units, `auto` for the larger of 4 b and 64. table: scale of
    the frozen token table that every node generates; 0 for none. anchors, ar, pairs, context, ce, ch: as of `mapl`; as
    published, there are none.
    """

    name = "resbm"
    default_forward, default_backward = "int4", "int4"

    def __init__(
        self,
        b: int = 32,
        kind: NetworkKind = "silu",
        mid: str = "auto",
        anchors: Kind = "none",
        ar: int = 0,
        pairs: int = 0,
        context: int = 0,
        ce: int = 32,
        ch: int = 128,
        table: float = 0.0,
    ) -> None:
        if b < 1:
            raise CodecError(f"codec 'resbm': b={b} has to be at least 1")
        if mid != "auto" and not (mid.isascii() and mid.isdigit() and 1 <= int(mid[:9]) <= 2**20):
            raise CodecError(f"codec 'resbm': mid={mid} has to be auto or from 1 to {2**20}")
        if mid != "auto" and kind == "linear":
            raise CodecError(f"codec 'resbm': mid={mid} beside kind=linear, which has no hidden units; omit it")
        self.kept = b
        self.hidden = [] if kind == "linear" else [max(4 * b, 64) if mid == "auto" else int(mid)]
        self.known = AnchorOptions(
            anchors=anchors, rank=ar or b, pairs=pairs, context=context, context_embedding=ce, context_hidden=ch
        )
        self.looks_back = self.known.looks_back
        self.known.check(self.name)
        check_table_scale(self.name, table)
        self.table_scale = table

    def check(self, width: int) -> None:
        if self.kept > width:
            raise CodecError(f"codec 'resbm': b={self.kept} is above the model's width {width}; lower b")
        self.known.check_width(self.name, width)

    def wire_width(self, width: int) -> int:
        del width
        return self.kept

    def operations_per_token(self, width: int) -> float:
        sizes = [width, *self.hidden, self.kept]
        own = 2.0 * sum(inner * outer for inner, outer in itertools.pairwise(sizes))
        return own + self.known.operations_per_token(width)

    def boundary_function(
        self, *, table: Tensor | None, sender: Mapping[str, Tensor], receiver: Mapping[str, Tensor]
    ) -> BoundaryFunction:
        del table
        return BoundaryFunction(encode=_half(sender), decode=_half(receiver))

    def tokens(self, context: StageContext, table_VD: Tensor | None) -> nn.Module | None:
        return self.known.build(context, table_VD)

    def encoder(self, context: BoundaryContext) -> Encoder:
        return ResbmEncoder(context, [context.width, *self.hidden, self.kept])

    def decoder(self, context: BoundaryContext) -> Decoder:
        return ResbmDecoder(context, [self.kept, *self.hidden, context.width])


def _half(parameters: Mapping[str, Tensor]) -> Half:
    """Of a half's `layers`, whose numbers count the SiLUs between the matrices too."""
    named = {int(name.split(".")[1]): tensor for name, tensor in parameters.items()}
    return Half(matrices=[named[number] for number in sorted(named)], passes=True)
