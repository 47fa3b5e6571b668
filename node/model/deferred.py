"""Matrices whose weight gradients wait: the split of a backward that zero-bubble schedules need (arXiv 2401.10241).

A backward through y = x Wᵀ + b has two products, dx = dy W for whatever lies before it and dW = dyᵀ x for the
optimizer. Only dx is on the way to the stage above. A deferred linear computes it, and puts (dy, x) aside instead of
multiplying them; one pass of plain autograd is then the *input gradient* of a stage, and working off what was put aside
its *weight gradient*. Norms, embeddings and whatever else learns get their gradients in the first pass: they are little
work.

The products are those that autograd would have computed, the same operands in the same order, cast and added up alike,
so a schedule that splits ends in the bits of one that does not (`tests/test_deferred.py`).

Why not two calls of autograd, first for the input alone, then for the weights: the second one would compute the chain
of input gradients again, a third of all work. Why not cutting the graph between its nodes, as
torch.distributed.pipelining does: it finds the cuts by walking autograd's nodes, keeps the gradients at every one, and
sees nothing to cut in a compiled layer, which is one node.

Memory of a microbatch between its two halves: x and dy of each matrix, x once where several share it. Everything else
that the forward kept is freed by the first. On the last stage the head's dy is as large as the logits.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """What one linear's weight gradient is made of: dy (..., N), x (..., K), W (N, K), b (N)."""

    dy: Tensor
    x: Tensor
    weight: Tensor | None  # None: it is frozen
    bias: Tensor | None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of W and b, as autograd computes them: W sees the product in the dtype of its operands, then cast."""
        dy_MN, x_MK = self.dy.reshape(-1, self.dy.shape[-1]), self.x.reshape(-1, self.x.shape[-1])
        dw = None if self.weight is None else dy_MN.t().mm(x_MK).to(self.weight.dtype)
        db = None if self.bias is None else dy_MN.sum(0).to(self.bias.dtype)
        return dw, db


class WeightGradients:
    """The weight gradients that one microbatch still owes. `add_up` once, on the thread that computes."""

    def __init__(self) -> None:
        self._products: list[_Product] = []

    def __len__(self) -> int:
        return len(self._products)

    def nbytes(self) -> int:
        """What is held for them, each tensor once."""
        held = [t.untyped_storage() for product in self._products for t in (product.x, product.dy)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    def append(self, product: _Product) -> None:
        self._products.append(product)

    @torch.no_grad()
    def add_up(self) -> None:
        """Compute them and add them to each parameter's `grad`; frees what they were made of, one after the other."""
        while self._products:
            product = self._products.pop()
            for parameter, gradient in zip((product.weight, product.bias), product.gradients(), strict=True):
                if parameter is None or gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)


class Deferral(threading.local):
    """Says to the deferred linears of one model where their weight gradients go: aside while `putting_aside`, otherwise
    straight into `grad` as ever, so the whole backward is still to be had. Each thread has its own `aside`, since two
    microbatches may be under way; a backward stays on the thread that calls it (`node.model.pull`)."""

    def __init__(self) -> None:
        self.aside: WeightGradients | None = None

    @contextmanager
    def putting_aside(self) -> Iterator[WeightGradients]:
        """For one backward pass of this thread."""
        self.aside = WeightGradients()
        try:
            yield self.aside
        finally:
            self.aside = None


class _Saved(torch.autograd.Function):
    """The identity, which saves its input *before* the product is computed, as autograd's own linear does: a layer that
    is recomputed stops at the last tensor that its backward needs, and so without its last product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return dx


class _Deferred(torch.autograd.Function):
    """F.linear, with a backward that may leave out the weight gradient. `saved` is the node of `_Saved` that has x.

    The weight is not saved: it is the same until the step, and its copy in a lower dtype is cheaper made again than
    kept by every microbatch in flight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferral: Deferral, saved: Any) -> Tensor:
        ctx.parameters, ctx.deferral, ctx.saved = (weight, bias), deferral, saved
        if saved is None:
            ctx.save_for_backward(x)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Of a layer that is recomputed, the input was computed again by now, and only here.
        (x,) = (ctx if ctx.saved is None else ctx.saved).saved_tensors
        of_x, *trained = ctx.needs_input_grad[:3]
        weight = ctx.parameters[0].to(x.dtype)
        dx = dy.reshape(-1, dy.shape[-1]).mm(weight).view(x.shape) if of_x else None
        product = _Product(dy, x, *(p if wanted else None for p, wanted in zip(ctx.parameters, trained, strict=True)))
        aside: WeightGradients | None = ctx.deferral.aside
        if aside is None:
            return dx, *product.gradients(), None, None
        aside.append(product)
        return dx, None, None, None, None


class DeferredLinear(nn.Linear):
    """A linear whose backward asks `deferral` where the weight gradient goes; parameters and names as they were."""

    def __init__(self, linear: nn.Linear, deferral: Deferral) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._deferral = deferral

    def forward(self, input: Tensor) -> Tensor:
        return deferred_product(input, self.weight, self.bias, deferral=self._deferral)


def deferred_product(input: Tensor, weight: Tensor, bias: Tensor | None, *, deferral: Deferral) -> Tensor:
    """F.linear, whose backward asks `deferral` where the weight gradient goes."""
    kind = input.device.type
    # Out here, where autograd sees the cast and casts the gradient back; autocast leaves float64 alone, too.
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(kind))
    if input.requires_grad:
        input = _Saved.apply(input)  # pyright: ignore
    return _Deferred.apply(input, weight, bias, deferral, input.grad_fn)  # pyright: ignore


def defer_linears(model: nn.Module, *, compiled: bool) -> Deferral:
    """Put a `DeferredLinear` in the place of every linear of `model`; subclasses, whose forward is their own, stay, and
    those that say which product they use get this one.

    `compiled`: the layers will be compiled. A compiler traces the backward once, and what that puts aside with it, so
    these stay outside: each breaks the graph around its product, which is a library's kernel either way.
    """
    deferral = Deferral()
    for path, module in list(model.named_modules()):
        if "product" in vars(module):
            vars(module)["product"] = functools.partial(deferred_product, deferral=deferral)
        elif type(module) is nn.Linear:
            deferred = DeferredLinear(module, deferral)
            if compiled:
                deferred.forward = torch.compiler.disable(deferred.forward)  # pyright: ignore
            model.set_submodule(path, deferred)
    return deferral
