"""The options by which a codec's stages know their tokens: checked, and built into `compress.anchors`.

Several methods take them, so that each can be measured with what another one brought: what both ends can work out from
the token ids costs no bytes, whatever it is that crosses the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .anchors import MAX_PAIRS, Anchors, Kind, make_anchors
from .byte_format import CodecError
from .codec_interface import StageContext
from .context_network import MAX_CONTEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorOptions:
    """`anchors`, their rank, `pairs`, `context`, `ce` and `ch`, as `MaplCodec` describes them."""

    anchors: Kind
    rank: int
    pairs: int
    context: int
    context_embedding: int
    context_hidden: int

    @property
    def looks_back(self) -> int:
        """Tokens before its own that what is known of a token depends on."""
        return max(self.context - 1, 1 if self.pairs else 0)

    def check(self, codec: str) -> None:
        """Raises CodecError for what cannot be at any width."""
        for fault, bad, wanted in (
            (f"ar={self.rank}", self.rank < 1, "at least 1, or 0 for the wire's rank"),
            (f"pairs={self.pairs}", not 0 <= self.pairs <= MAX_PAIRS, f"from 0 (none) to {MAX_PAIRS}"),
            (
                f"pairs={self.pairs}",
                self.pairs > 0 and self.anchors == "none",
                "0 beside anchors=none, which learn nothing",
            ),
            (f"context={self.context}", not 0 <= self.context <= MAX_CONTEXT, f"from 0 (none) to {MAX_CONTEXT}"),
            (f"ce={self.context_embedding}", self.context_embedding < 1, "at least 1"),
            (f"ch={self.context_hidden}", self.context_hidden < 1, "at least 1"),
        ):
            if bad:
                raise CodecError(f"codec '{codec}': {fault} has to be {wanted}")

    def check_width(self, codec: str, width: int) -> None:
        """Raises CodecError for a rank that this width has no room for."""
        if self.anchors == "factorized" and self.rank > width:
            raise CodecError(f"codec '{codec}': ar={self.rank} is above the model's width {width}; lower ar")

    def operations_per_token(self, width: int) -> float:
        """Of the context network; the rest is looked up."""
        inner = self.context * self.context_embedding * self.context_hidden
        return 2.0 * (inner + self.context_hidden * width) if self.context else 0.0

    def build(self, context: StageContext, table_VD: Tensor | None) -> Anchors | None:
        """One stage's, in its dtype and on its device; None where nothing is known of any token."""
        if self.anchors == "none" and table_VD is None and not self.context:
            return None
        return make_anchors(
            self.anchors,
            vocab_size=context.vocab_size,
            width=context.width,
            rank=self.rank,
            seed=context.seed,
            stage=context.stage,
            table=table_VD,
            pairs=self.pairs,
            context=self.context,
            context_embedding=self.context_embedding,
            context_hidden=self.context_hidden,
        ).to(device=context.device, dtype=context.dtype)
