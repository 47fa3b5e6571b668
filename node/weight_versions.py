"""Weights of two steps at once: what a stage computes with while the gradients of the step before are not applied yet.

With `pipeline.delay = 1` no stage waits for the pipeline to run empty between two steps (2BW: Narayanan et al., arXiv
2006.09503). Step k, at every stage, forward and backward, uses the weights V[k] that were made when step k - 2 was
finished, and its gradients move the *master* one step late:

    W[k+1] = W[k] - update(gradient of step k at V[k])         V[k+2] = W[k+1], or a prediction     V[0] = V[1] = W[0]

So what is computed is a function of the steps alone, and not of how they overlap. What a boundary's learned table is
goes with them: step k's messages are coded with the table as it was when V[k] was made. Codebooks learn from each
message in turn and need no versions: the order of messages is the same however steps overlap.

V[k+2] stands for W[k+2], which nobody has yet. `orthogonal` goes one more step along the optimizer's own last one:
V[k+2] = W[k+1] + (W[k+1] - W[k]), for Muon along the orthogonalised gradient (arXiv 2606.30634 finds Muon to take a
delay best). `momentum` is XPipe's rule (Guan et al., arXiv 1911.04610), along the momentum: of a matrix that Muon moves
the raw one, made as long as its last step; AdamW's own step is along its momentum already.

Modules compute with whichever version is put into their parameters (`param.data`): autograd keeps a parameter itself
and not its numbers, so a backward needs those of its forward in place again. The optimizer has parameters of its own,
the masters. Without prediction V[k+1] *is* the master until the next optimizer step, which then makes its weights in
the memory of V[k]: two copies in all, as in 2BW. With prediction there are three. Why not two modules: twice the
buffers, hooks and compiled layers, for what is a pointer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..compress.codec_interface import Encoder
from ..protocol.step_orders import VERSIONS

Predict = Literal["none", "momentum", "orthogonal"]
OF_NEXT, OF_SECOND, TABLE = "delayed", "predicted", "next"  # how they are called in a state
_MOMENTUM = "muon.momentum/"  # of the optimizer's buffers


class WeightVersions:
    """Of one stage. trained: its parameters by name, those that are frozen too. sender: its half of the boundary below,
    if that has a table that moves."""

    def __init__(self, trained: list[tuple[str, nn.Parameter]], *, predict: Predict, sender: Encoder | None) -> None:
        self._predict, self._sender = predict, sender
        self._moving = {name: parameter for name, parameter in trained if parameter.requires_grad}
        self.masters = [
            (name, _master(parameter)) if name in self._moving else (name, parameter) for name, parameter in trained
        ]
        self._master = {name: master for name, master in self.masters if name in self._moving}
        self._of_step: dict[int, dict[str, Tensor]] = {}
        self._tables: dict[int, Tensor] = {}
        self._in_use: int | Literal["master"] | None = None  # whose weights the parameters have
        first = {name: parameter.data for name, parameter in self._moving.items()}
        self._begin(0, first, self._second(), self._table())

    def use(self, step: int) -> None:
        """Let the modules compute with the weights of that step."""
        if self._in_use != step:
            self._put(self._of_step[step])
            self._in_use = step

    def use_master(self) -> None:
        """Let them compute with all that was learned."""
        if self._in_use != "master":
            self._put({name: master.data for name, master in self._master.items()})
            self._in_use = "master"

    def table(self, step: int) -> Tensor | None:
        """The boundary's table that step's messages are coded with, before it is rounded to be shipped; None: it never
        moves, or there is none."""
        return self._tables.get(step)

    def begin_step(self, step: int) -> None:
        """Before the optimizer step that ends `step`: it finds the gradients, and may change the masters in place."""
        for name, parameter in self._moving.items():
            self._master[name].grad, parameter.grad = parameter.grad, None
        room = self._of_step.pop(step)  # no backward needs it any more
        self._in_use = None
        for name, master in self._master.items():
            room[name].copy_(master.data)
        if self._predict == "none":
            for name, master in self._master.items():
                master.data = room[name]  # where it was is V[step + 1] now
        self._before = room

    def end_step(self, step: int, optimizer: Mapping[str, Tensor]) -> None:
        """After it, and after the table's own step. optimizer: its buffers."""
        before = self._before
        if self._predict == "none":
            self._of_step[step + 2] = self._second()
        else:
            for name, master in self._master.items():
                momentum = optimizer.get(_MOMENTUM + name) if self._predict == "momentum" else None
                ahead(before[name], master.data, momentum)
            self._of_step[step + 2] = before
        self._tables.pop(step, None)
        if (table := self._table()) is not None:
            self._tables[step + 2] = table

    def _second(self) -> dict[str, Tensor]:
        """What the step after the next one begins with, where nothing was predicted."""
        if self._predict == "none":
            return {name: master.data for name, master in self._master.items()}
        return {name: master.data.clone() for name, master in self._master.items()}

    def _table(self) -> Tensor | None:
        return None if self._sender is None else self._sender.master.clone()

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._moving.items():
            parameter.data = weights[name]

    def _begin(self, completed: int, first: dict[str, Tensor], second: dict[str, Tensor], table: Tensor | None) -> None:
        self._of_step = {completed: first, completed + 1: second}
        self._tables = {}
        if table is not None and (newest := self._table()) is not None:
            self._tables = {completed: table, completed + 1: newest}
        self._before = {}
        self._in_use = None
        self.use_master()

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def _kinds(self) -> list[str]:
        """Of the versions that the masters do not tell: of the next step, and where it was predicted of the second."""
        return [OF_NEXT] if self._predict == "none" else [OF_NEXT, OF_SECOND]

    def state_tensors(self, completed: int) -> dict[str, Tensor]:
        """By name, between two steps, what the masters do not tell."""
        return {
            f"{kind}/{name}": tensor
            for step, kind in enumerate(self._kinds, start=completed)
            for name, tensor in self._of_step[step].items()
        }

    def state_layout(self) -> dict[str, Tensor]:
        """What `state_tensors` has after any number of steps, but for the numbers."""
        return {f"{kind}/{name}": master.detach() for kind in self._kinds for name, master in self._master.items()}

    def table_state(self, completed: int) -> dict[str, Tensor]:
        """What the boundary below will publish next, as a part of its codec."""
        return {TABLE: self._tables[completed]} if self._tables else {}

    def table_layout(self) -> dict[str, Tensor]:
        return {TABLE: self._sender.master.to("meta")} if self._sender else {}

    @torch.no_grad()
    def load_state_tensors(self, completed: int, tensors: Mapping[str, Tensor], table: Mapping[str, Tensor]) -> None:
        """Go on from those, once the masters and the table have what they had then."""
        found = [
            {name: _like(tensors[f"{kind}/{name}"], master) for name, master in self._master.items()}
            for kind in self._kinds
        ]
        for parameter in self._moving.values():
            parameter.grad = None
        first, second = found if len(found) == VERSIONS else (found[0], self._second())
        next_table = _like(table[TABLE], self._sender.master) if self._sender else None
        self._begin(completed, first, second, next_table)


@torch.no_grad()
def ahead(before: Tensor, after: Tensor, momentum: Tensor | None) -> None:
    """Make of `before`, in place, where a weight will be after one more step than `after`: as far again in the same
    direction, or, given a raw momentum, as far against that."""
    if momentum is None:
        before.neg_().add_(after, alpha=2)
        return
    moved = torch.linalg.vector_norm(after - before)
    length = torch.linalg.vector_norm(momentum)
    before.copy_(after - momentum * torch.where(length > 0, moved / length, 0.0))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The optimizer's own, with the marks that it looks for."""
    master = nn.Parameter(parameter.detach().clone())
    for mark, value in vars(parameter).items():
        setattr(master, mark, value)
    return master


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy that lies in memory as `like` does: a file's are views at any address."""
    return torch.empty_like(like.detach()).copy_(tensor)
