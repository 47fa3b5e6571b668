"""How keys and values cross to the other chunks of a sequence: what every method of that says and does.

Attention of a chunk looks at the keys and values of all earlier tokens, and those are on other machines. In each layer
a node gives, for each segment of its tokens, a *wire tensor* z (B, T, W) and a few exact numbers s (B, N); the others
make keys and values of that again. A byte format packs z, as at a boundary of stages; autograd passes straight through.

A method may replace what makes keys and values in the model (`attach`), before an optimizer is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Rotate = Callable[[Tensor], Tensor]  # keys (B, H, T, D) -> the same with the rotary embedding of their positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShape:
    """What all nodes know of one layer's keys and values from the configuration alone. heads: of keys and values, H;
    head_width: D; segments: how many a lane's tokens are cut into; segment_length: T, tokens."""

    seed: int
    layer: int  # in the whole model
    width: int  # of hidden states
    heads: int
    head_width: int
    segments: int
    segment_length: int
    dtype: torch.dtype


class ContextLayer(ABC):
    """One layer's part on one node."""

    @abstractmethod
    def encode(self, segment: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, T, W) and s (B, N) of this node's `segment`, counted from 0 among its own. Keys have their rotary
        embedding already. Inside the graph."""

    def measures(self) -> dict[str, float]:
        """Figures of the last forward in training, for the records."""
        return {}

    def grams(self) -> tuple[Tensor, ...]:
        """What this node has added up in a step for which `ContextMethod.gathers` says so, float64; in any other, of
        the same shapes."""
        return ()

    def subspaces(self) -> tuple[Tensor, ...]:
        """What is chosen by the sums of `grams` over all lanes, as it is now."""
        return ()

    def choose(self, *grams: Tensor) -> tuple[Tensor, ...]:
        """The subspaces, by those sums. Raises CodecError for sums that are not finite."""
        del grams
        return ()

    def use_subspaces(self, *chosen: Tensor) -> None:
        """From the next step on."""
        del chosen

    @abstractmethod
    def decode(self, z_BTW: Tensor, s_BN: Tensor, rotate: Rotate) -> tuple[Tensor, Tensor]:
        """Keys, with the rotary embedding of their positions, and values, each (B, H, T, D), of a segment of another
        node. Differentiable in z and s, and in nothing else."""


class ContextMethod(ABC):
    """Options of one method, never state. format: the byte format of z, "" for the dtype that it has anyway; backward:
    that of its gradient."""

    name: ClassVar[str]
    format: str = ""
    backward: str = ""

    @property
    @abstractmethod
    def exact_spec(self) -> str:
        """Of the same method where it rounds nothing and does all that it does, at any width, in its first step."""

    @abstractmethod
    def wire_width(self, shape: ContextShape) -> int:
        """W: numbers a token."""

    def width_at(self, step: int, shape: ContextShape) -> int:
        """W in step `step`, and in an evaluation after it."""
        del step
        return self.wire_width(shape)

    def check_steps(self, steps: int) -> None:
        """Raises CodecError for options that do not fit a run of so many steps."""
        del steps

    def check_plain(self, step: int, steps: int) -> None:
        """Raises CodecError where the model that an evaluation after step `step` of so many measures is none of plain
        projections, those of `plain_weights`; it says when there is one."""
        del step, steps

    def plain_weights(self, weights: Mapping[str, Tensor], *, seed: int, step: int) -> dict[str, Tensor]:
        """Of a model's weights, by their names in the whole model, those of the architecture's own projections that
        compute as near to it as any, after step `step`. seed: of the run."""
        del seed, step
        return dict(weights)

    def begin(self, layer: Any, step: int, steps: int) -> None:
        """What `attach` gave, before the first forward of step `step` of so many."""
        del layer, step, steps

    @property
    def gathering_step(self) -> int | None:
        """Behind which lane 0 adds the `grams` of all lanes, in their order, and chooses for all."""
        return None

    def gathers(self, step: int) -> bool:
        """Whether that step is it."""
        return step == self.gathering_step

    def frozen(self, shape: ContextShape) -> Iterable[Tensor]:
        """What all nodes generate for a layer and have to have alike, for a digest that greetings compare."""
        del shape
        return ()

    @abstractmethod
    def scalars(self, shape: ContextShape) -> int:
        """N: exact numbers a sequence and segment."""

    @abstractmethod
    def attach(self, attention: nn.Module, shape: ContextShape) -> ContextLayer:
        """This method's part in one layer; may replace modules of `attention` by others, with their parameters. Raises
        CodecError, by name, for an architecture that it does not fit."""
