"""The codec that changes nothing: hidden states cross the boundary as they are, and only the byte format is lossy.

With `bf16` it is the dense baseline that every ratio is measured against; with `int8` the blockwise baseline that
hivemind, Petals and SWARM send; with `fp64` it is exact and so the reference for parity tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .codec_interface import BoundaryContext, Codec, Decoder, Encoder, check_table_scale
from .registry import register_codec


class IdentityEncoder(Encoder):
    """Z = H."""

    def encode(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        del ids_BT
        return hidden_BTD


class IdentityDecoder(Decoder):
    """Ĥ = Z."""

    def decode(self, z_BTW: Tensor, ids_BT: Tensor) -> Tensor:
        del ids_BT
        return z_BTW


@register_codec
class IdentityCodec(Codec):
    """`table`: scale of the frozen token table in stage 0's embedding, which helps dense training too; 0 for none."""

    name = "identity"
    default_forward = default_backward = "fp32"  # the usual training dtype: by itself, identity loses nothing

    def __init__(self, table: float = 0.0) -> None:
        check_table_scale(self.name, table)
        self.table_scale = table

    def wire_width(self, width: int) -> int:
        return width

    def boundary_function(
        self, *, table: Tensor | None, sender: Mapping[str, Tensor], receiver: Mapping[str, Tensor]
    ) -> None:
        del table, sender, receiver

    def encoder(self, context: BoundaryContext) -> Encoder:
        del context
        return IdentityEncoder()

    def decoder(self, context: BoundaryContext) -> Decoder:
        del context
        return IdentityDecoder()
