"""The backward of an output for a given gradient, at no cost but its own.

`torch.autograd.backward(out, gradient)` imports torch's symbolic shapes, and sympy with them, to compare two shapes:
most of a second in each process that trains. A scalar's backward takes no gradient and imports nothing. So `pull` ends
the graph in a scalar whose own backward hands the given gradient on, the very tensor: the same bits in the same order.
Why not (out * gradient).sum().backward(): a product and a sum of the size of `out`, to throw away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _End(torch.autograd.Function):
    """A zero that depends on `out`, with the gradient of `out` decided beforehand."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del one
        return ctx.gradient, None


def pull(out: Tensor, gradient: Tensor | None) -> None:
    """Add to the leaves' `grad` what `gradient`, of the shape and dtype of `out`, means for them; None: `out` is a
    scalar. All of it on the thread that calls, on a device too, where autograd would have one thread for all backwards:
    one that waits in the middle would keep another from going on. Raises ValueError for another shape."""
    if gradient is not None and gradient.shape != out.shape:
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} for an output of shape {tuple(out.shape)}")
    end: Any = out if gradient is None else _End.apply(out, gradient)
    with torch.autograd.set_multithreading_enabled(False):
        end.backward()
