"""The independent yardstick of invariant 2: one whole Hugging Face model and a training loop as in a textbook.

Written without the package: plain autograd over the whole batch at once, the mean loss, AdamW as in its paper, and a
Muon whose matrix sign comes from a singular value decomposition: the published polynomials are applied to the singular
values as numbers, where `compress.stiefel` multiplies matrices. Everything is float64.

`Projector` is the same for a matrix that is learned on the Stiefel manifold (SPEL): plain formulas and SVDs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# K. Jordan, "Muon" (2024): one quintic, five times.
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
# Amsel et al., "The Polar Express" (arXiv 2505.16932), the listing in its appendix: the first five of its quintics.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a run, under names of their own."""

    steps: int
    muon_rate: float
    adam_rate: float
    momentum: float
    beta1: float
    beta2: float
    weight_decay: float
    warmup: int
    decay: int  # steps at the end over which the rate falls
    clip: float
    polynomials: str
    delay: int = 0  # 1: a step's gradients are those of weights that lack the step before (2BW)
    predict: Literal["none", "momentum", "orthogonal"] = "none"  # what stands for those


def matrix_sign(g: Tensor, polynomials: str) -> Tensor:
    """U p(S) Vᵀ, where p drives the singular values of G / |G| towards 1. |G| is at least 1e-7, as in torch's Muon."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / torch.linalg.vector_norm(s).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS[polynomials]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@dataclass(kw_only=True)
class Projector:
    """A matrix (D, R) that is learned at `rate` times Muon's rate, once in `every` steps (0: never).

    m <- beta m + (1 - beta) g', where g' = g - A (A'g + g'A) / 2 on the Stiefel manifold or g - A A'g along the
    Grassmannian; then A <- polar(A - every rate sign(m)). Without a manifold, g' = g and A <- A - every rate sign(m).
    """

    matrix: Tensor  # a leaf that wants a gradient, and part of the loss
    rate: float
    beta: float
    every: int
    manifold: Literal["stiefel", "grassmann"] | None
    used: Tensor = field(init=False)  # the matrix that the last step's loss was computed with

    def __post_init__(self) -> None:
        self.used = self.matrix.detach().clone()
        self._momentum, self._gathered = torch.zeros_like(self.used), torch.zeros_like(self.used)

    def move(self, g: Tensor, count: int, rate: float) -> None:
        """Step number `count`, from 1; `rate` is Muon's."""
        a = self.used = self.matrix.detach().clone()
        self._gathered += g
        if not self.every or count % self.every:
            return
        g, self._gathered = self._gathered, torch.zeros_like(a)
        if self.manifold == "stiefel":
            g = g - a @ (a.T @ g + g.T @ a) / 2
        elif self.manifold == "grassmann":
            g = g - a @ a.T @ g
        self._momentum = self.beta * self._momentum + (1 - self.beta) * g
        moved = a - rate * self.rate * self.every * matrix_sign(self._momentum, "polar_express")
        with torch.no_grad():
            self.matrix.copy_(moved if self.manifold is None else polar(moved))


def polar(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    return u @ vt


class Late:
    """The weights of the steps to come, where gradients are applied one step late: V[0] = V[1] = W[0], and V[k+2] is
    made of W[k+1], the weights after step k."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._coming = [_copies(leaves), _copies(leaves)]

    def begin(self) -> list[Tensor]:
        """The next step's are in the leaves, until `end`; returned are they."""
        self._master = _copies(self._leaves)
        used = self._coming.pop(0)
        _fill(self._leaves, used)
        return used

    def end(self) -> None:
        _fill(self._leaves, self._master)

    def moved(self, momenta: Sequence[Tensor | None], predict: str) -> None:
        """The leaves were stepped. momenta: of those that a prediction is for; a projector has none, and None."""
        ahead: list[Tensor] = []
        for leaf, before, momentum in zip(_copies(self._leaves), self._master, momenta, strict=True):
            if momentum is None or predict == "none":
                ahead.append(leaf)
            elif predict == "momentum" and momentum.numel():
                size = torch.linalg.matrix_norm(leaf - before) / torch.linalg.matrix_norm(momentum)
                ahead.append(leaf - size * momentum)
            else:
                ahead.append(leaf + (leaf - before))
        self._coming.append(ahead)


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in leaves]


@torch.no_grad()
def _fill(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


def mean_loss(model: Any, ids: Tensor) -> Tensor:
    """ids (batch, T + 1) int64 -> the mean of the cross entropy over all batch x T predictions."""
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def train(
    model: Any,
    batches: Iterable[Tensor],
    recipe: Recipe,
    group_of: Callable[[str], int],
    projectors: Sequence[Projector] = (),
) -> tuple[list[float], list[dict[int, float]]]:
    """Train in place; returns the mean loss of every step and the gradient norm of every step's clipping groups.

    batches: ids (batch, T + 1) int64, one tensor a step. group_of: parameter name -> number of its clipping group.
    projectors: learned beside the parameters, in no group and never clipped.
    """
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses, norms = [], []
    leaves = [*parameters.values(), *(projector.matrix for projector in projectors)]
    late, used = Late(leaves), list[Tensor]()
    for count, ids in enumerate(batches, start=1):
        if recipe.delay:
            used = late.begin()
        loss = mean_loss(model, ids)
        losses.append(loss.item())
        of_leaves = torch.autograd.grad(loss, leaves)
        if recipe.delay:
            late.end()
        gradients = dict(zip(parameters, of_leaves, strict=False))
        squares: dict[int, float] = {}
        for name, g in gradients.items():
            squares[group_of(name)] = squares.get(group_of(name), 0.0) + g.square().sum().item()
        norms.append({group: math.sqrt(square) for group, square in squares.items()})
        rate = min(1.0, count / recipe.warmup, (recipe.steps - count + 1) / recipe.decay)
        for name, p in parameters.items():
            g = gradients[name] * min(1.0, recipe.clip / norms[-1][group_of(name)])
            with torch.no_grad():
                if _is_hidden(name, p):
                    _muon(p, g, first[name], recipe, recipe.muon_rate * rate)
                else:
                    _adamw(p, g, first[name], second[name], recipe, recipe.adam_rate * rate, count)
        for projector, g in zip(projectors, of_leaves[len(parameters) :], strict=True):
            projector.move(g, count, recipe.muon_rate * rate)
        if recipe.delay:
            nothing = torch.empty(0)  # AdamW's own step is along its momentum
            momenta = [first[name] if _is_hidden(name, p) else nothing for name, p in parameters.items()]
            late.moved([*momenta, *(None for _ in projectors)], recipe.predict)
            for projector, matrix in zip(projectors, used[len(parameters) :], strict=True):
                projector.used = matrix
    return losses, norms


def _is_hidden(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and ".layers." in name


def _muon(p: Tensor, g: Tensor, m: Tensor, recipe: Recipe, rate: float) -> None:
    beta = recipe.momentum
    m.copy_(beta * m + (1 - beta) * g)
    direction = matrix_sign(beta * m + (1 - beta) * g, recipe.polynomials)
    out_features, in_features = p.shape
    stretch = math.sqrt(max(1, out_features / in_features))
    p.copy_(p * (1 - rate * recipe.weight_decay) - rate * stretch * direction)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, recipe: Recipe, rate: float, count: int) -> None:
    m.copy_(recipe.beta1 * m + (1 - recipe.beta1) * g)
    v.copy_(recipe.beta2 * v + (1 - recipe.beta2) * g * g)
    m_hat, v_hat = m / (1 - recipe.beta1**count), v / (1 - recipe.beta2**count)
    shrink = 1 - rate * recipe.weight_decay if p.ndim >= 2 else 1.0
    p.copy_(p * shrink - rate * m_hat / (v_hat.sqrt() + 1e-8))
