"""Mode `gradients`: the sums of gradients of all lanes, before each step of the optimizer.

R lanes are one lane with R times the batch: every lane's optimizer sees the same sum, over R times the tokens, and all
lanes hold the same weights after every step. A learned table's gradient is a part of it in the steps that move it; it
goes as it is, in fp32 or fp64, since it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...compress.byte_format import CodecError, is_finite
from ...compress.registry import parse_format
from ..optim import MissingGradient, NonFiniteGradient
from .averager import Averager, Place
from .fragments import Rows, row_shape
from .modes import Gradients
from .round_plan import Round


class GradientAverager(Averager):
    """parameters: of the stage; those that do not learn are left out. table_gradient: this step's gradient of the
    learned table, whole, where it moves after that step; of `table_shape`. table_moves: whether it does, by step."""

    def __init__(
        self,
        mode: Gradients,
        place: Place,
        *,
        steps: int,
        parameters: list[tuple[str, nn.Parameter]],
        table_gradient: Callable[[], Tensor | None],
        table_shape: tuple[int, ...],
        table_moves: Callable[[int], bool],
    ) -> None:
        super().__init__(mode, place, steps=steps, moved=lambda: None)  # the optimizer will
        self._parameters = [(name, each) for name, each in parameters if each.requires_grad]
        self._format = mode.byte_format()
        self._table_gradient, self._table_shape, self._table_moves = table_gradient, table_shape, table_moves
        self._table_format = parse_format("fp64" if parameters[0][1].dtype is torch.float64 else "fp32")
        self._shape = row_shape(sum(parameter.numel() for _, parameter in self._parameters))

    def contribution_bytes(self, round_: Round) -> int:
        table = self._table_format.body_bytes(self._table_shape) if self._has_table(round_) else 0
        return self._format.body_bytes(self._shape) + table

    def _has_table(self, round_: Round) -> bool:
        return self._table_moves(round_.made - 1)

    def _gradients(self) -> Rows:
        grads = []
        for name, parameter in self._parameters:
            if parameter.grad is None:
                raise MissingGradient(f"parameter '{name}' has no gradient to average; run backward through it first")
            grads.append(parameter.grad.contiguous())
            parameter.grad = grads[-1]
        return Rows(grads)

    def _packed(self, round_: Round) -> bytes:
        key = self._key(round_, self.place.lane)
        try:
            body = bytes(self._format.pack_training(self._gradients().read(), key).body)
        except CodecError as error:
            raise self._named(error, round_) from None
        if not self._has_table(round_):
            return body
        gradient = self._table_gradient()
        assert gradient is not None
        return body + bytes(self._table_format.pack(gradient, self._key(round_, self.place.lane, 1)).body)

    def _named(self, error: CodecError, round_: Round) -> Exception:
        """The optimizer's own word where a gradient is not finite; numbers that only the format cannot hold are its."""
        for name, parameter in self._parameters:
            if parameter.grad is not None and not is_finite(parameter.grad):
                return NonFiniteGradient(
                    f"step {round_.made - 1}: the gradient of '{name}' is not finite; resume from the last checkpoint "
                    "with a lower learning rate or a higher precision"
                )
        return error

    def _check(self, round_: Round, lane: int, contribution: bytes) -> None:
        cut = self._format.body_bytes(self._shape)
        like = torch.empty(0, dtype=self._parameters[0][1].dtype)
        self._unpacked(round_, lane, contribution[:cut], self._format, self._shape, like)
        if self._has_table(round_):
            self._unpacked(round_, lane, contribution[cut:], self._table_format, self._table_shape, like)

    def _apply(self, round_: Round, contributions: Mapping[int, bytes]) -> float:
        cut = self._format.body_bytes(self._shape)
        grads = self._gradients()
        like = self._parameters[0][1]
        bodies = {lane: body[:cut] for lane, body in contributions.items()}
        total = self._mean(round_, bodies, self._format, self._shape, like, divisor=1)
        gradient = self._table_gradient() if self._has_table(round_) else None
        if gradient is not None:
            bodies = {lane: body[cut:] for lane, body in contributions.items()}
            gradient.copy_(self._mean(round_, bodies, self._table_format, tuple(gradient.shape), gradient, divisor=1))
        grads.write(total)
        return torch.linalg.vector_norm(total, dtype=torch.float64).item() / len(contributions)

    def make_room(self) -> None:
        """Gradients to write a round's into, where this lane has computed none."""
        for _, parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _errors_layout(self, completed: int) -> dict[str, Tensor]:
        return self.state_layout(completed)

    def _load_errors(self, errors: Mapping[str, Tensor], completed: int) -> None:
        self.load_state_tensors(errors, completed)

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"error/{name}": tensor for name, tensor in self._format.state_tensors().items()}

    def state_layout(self, completed: int) -> dict[str, Tensor]:
        layout = self._format.state_layout(self._shape, completed)
        return {f"error/{name}": tensor for name, tensor in layout.items()}

    def load_state_tensors(self, state: Mapping[str, Tensor], completed: int) -> None:
        del completed
        self._own.clear()
        self._format.load_state_tensors({name.removeprefix("error/"): tensor for name, tensor in state.items()})
