"""What a boundary computes when nothing is rounded, as plain data: for a model that leaves its pipeline.

A trained model includes its boundaries: leave them out, and the layers behind them get hidden states that they have
never seen. So a codec says what its two halves compute, in terms that a file beside the exported weights can repeat
without this package (`node/export/modeling_thinpipe.py`):

    z = encode(h - a)        h' = decode(z) + a'        a, a': what each stage knows of a token (`compress.anchors`)

Why not export the halves' own classes: they learn, ship tables and count, and would bring most of this package along.
What bytes round away is a matter of training, and no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Half:
    """One half, a function of each token by itself: (..., in) to (..., out).

    matrices: (out, in) each, applied one after the other with SiLU between two. passes: what came in is added to what
    comes out, in as many of the first channels as both have.
    """

    matrices: list[Tensor]
    passes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundaryFunction:
    """Both halves: (..., D) to (..., W), and back."""

    encode: Half
    decode: Half
