"""The optimizer of one stage: Muon for hidden matrices, AdamW for the rest, one schedule, one clip.

Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) moves a hidden matrix along the matrix sign of its Nesterov
momentum, so every direction in it learns at one speed; embeddings, head, norms and biases are no linear maps between
hidden states and take AdamW (Loshchilov & Hutter, arXiv 1711.05101). The update is what `torch.optim.Muon` and
`torch.optim.AdamW` compute, and is tested against both. The learning rate warms up, stays, and falls to zero at the
run's end (`node/learning_rate.py`).

Why not torch's own classes: their step counters are hidden state, a bfloat16 matrix sign is fixed in theirs, and their
state is keyed by position. Here the step number is an argument and the state is a flat dict of named tensors, so it can
be hashed, written to safetensors and compared between processes. Nothing is fused across parameters (no foreach, no
batched products): the bits of a update depend on the parameter, its gradient and the stage's gradient norm.

Clipping is by the stage's own norm, or by that of the whole model (`optim.clip_norm`): then the sum of squares over all
stages is given to `step`, and `sum_of_squares` is this stage's part of it (`protocol/global_norm.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compress.matrix_sign import msign
from .config_sections import OptimSection
from .learning_rate import RateSchedule
from .model.parts import in_layer
from .model.transposed import outputs_and_inputs

MSIGN_STEPS = 5  # K. Jordan's Muon post; the Polar Express table (compress/matrix_sign.py) reaches 1 ± 0.124 with them
ADAMW_EPSILON = 1e-8  # Kingma & Ba, arXiv 1412.6980, and the default of torch.optim.AdamW


class OptimizerError(RuntimeError):
    """A step cannot be taken, or a state does not fit these parameters."""


class MissingGradient(OptimizerError):
    """A parameter reached the step without a gradient: some part of the stage took no part in the loss."""


class NonFiniteGradient(OptimizerError):
    """A gradient holds NaN or infinity; neither parameters nor state were touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStats:
    """What one step did. `grad_norm` is that by which it was clipped: of the mean gradient per token, before."""

    grad_norm: float
    clip_coefficient: float
    muon_lr: float
    adamw_lr: float


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix inside a decoder layer, or of a codec's own network, as its name tells."""
    return parameter.ndim == 2 and in_layer(name)


def muon_rate_scale(rows: int, columns: int) -> float:
    """sqrt(max(1, rows / columns)) for a weight (out, in): torch's `adjust_lr_fn="original"`, K. Jordan's own choice.

    It keeps the root mean square that an update adds to the layer's *output* equal for tall and square matrices.
    """
    return math.sqrt(max(1.0, rows / columns))


class StageOptimizer:
    """Updates the parameters of one stage in place.

    `named_parameters`: unique names; parameters that do not require a gradient are left alone. `total_steps` is the
    length of the run, for the schedule, and `extended` what it was before (`RateSchedule`). State is allocated here, in
    the dtype and on the device of each parameter.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        settings: OptimSection,
        *,
        total_steps: int,
        extended: Sequence[tuple[int, int]] = (),
    ) -> None:
        names = [name for name, _ in named_parameters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OptimizerError(f"two parameters are called '{twice[0]}'; give each its own name")
        first_name: dict[int, str] = {}
        for name, parameter in named_parameters:
            if (other := first_name.setdefault(id(parameter), name)) != name:
                raise OptimizerError(f"'{other}' and '{name}' are one parameter; pass a tied weight once")
        if total_steps < 1:
            raise OptimizerError(f"a run has at least one step, got total_steps = {total_steps}")
        self._settings = settings
        self._rates = RateSchedule(settings, total_steps, extended)
        self._msign_dtype: torch.dtype = getattr(torch, settings.msign_dtype)
        self._parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self._state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            kinds = ("muon.momentum",) if is_hidden_matrix(name, parameter) else ("adamw.exp_avg", "adamw.exp_avg_sq")
            for kind in kinds:
                self._state[f"{kind}/{name}"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    def learning_rate(self, step: int) -> float:
        """The factor on both learning rates at `step` (the first step is 0): in 0..1."""
        if step < 0:
            raise OptimizerError(f"steps are counted from 0, got {step}")
        return self._rates.factor(step)

    @torch.no_grad()
    def step(self, step: int, tokens: int, sum_of_squares: float | None = None) -> OptimStats:
        """Take step number `step` (from 0) with the gradients in `.grad`, which are *sums* over `tokens` tokens.

        Each gradient is multiplied once, by clip_coefficient / tokens, then used, then dropped (`.grad` is None after).
        sum_of_squares: of the gradients by whose norm these are clipped, which `sum_of_squares` has seen; default:
        of these alone.
        Raises MissingGradient or NonFiniteGradient, both before anything is changed, and OptimizerError for a bad
        `tokens` or `step`.
        """
        if tokens < 1:
            raise OptimizerError(f"step {step}: a step has at least one token, got {tokens}")
        factor = self.learning_rate(step)
        muon_lr, adamw_lr = self._settings.muon_lr * factor, self._settings.adamw_lr * factor
        if sum_of_squares is None:
            sum_of_squares = self.sum_of_squares(step)
        grad_norm = math.sqrt(sum_of_squares) / tokens
        clip = self._settings.clip
        clip_coefficient = clip / grad_norm if clip and grad_norm > clip else 1.0
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            assert grad is not None  # sum_of_squares has seen to it
            grad.mul_(clip_coefficient / tokens)
            if is_hidden_matrix(name, parameter):
                self._step_muon(name, parameter, grad, muon_lr)
            else:
                self._step_adamw(name, parameter, grad, adamw_lr, step + 1)
            parameter.grad = None
        return OptimStats(grad_norm=grad_norm, clip_coefficient=clip_coefficient, muon_lr=muon_lr, adamw_lr=adamw_lr)

    @torch.no_grad()
    def sum_of_squares(self, step: int, others: float = 0.0) -> float:
        """Of all summed gradients of the stage, added to that of other stages. In float64, where squares of float32
        cannot overflow. Raises MissingGradient or NonFiniteGradient."""
        norms: list[Tensor] = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise MissingGradient(
                    f"step {step}: parameter '{name}' has no gradient; run backward through it before the step, "
                    f"or freeze it with requires_grad_(False)"
                )
            norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64))
        # One wait for the device, not one per parameter.
        values: list[float] = torch.stack(norms).tolist() if norms else []
        for name, value in zip(self._parameters, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteGradient(
                    f"step {step}: the gradient of '{name}' is not finite (norm {value}); "
                    f"resume from the last checkpoint with a lower learning rate or a higher precision"
                )
        try:
            total = others + math.fsum(value * value for value in values)  # exact: the order of parameters is no matter
        except OverflowError:
            total = math.inf
        if not math.isfinite(total):  # float64 gradients
            raise NonFiniteGradient(
                f"step {step}: the squares of the gradients add up to more than float64 holds; "
                f"resume from the last checkpoint with a lower learning rate"
            )
        return total

    def _step_muon(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        beta = self._settings.momentum
        momentum = self._state[f"muon.momentum/{name}"].lerp_(grad, 1 - beta)
        nesterov = grad.lerp(momentum, beta)
        update = msign(
            nesterov, steps=MSIGN_STEPS, dtype=self._msign_dtype, coefficients=self._settings.msign_coefficients
        )
        parameter.mul_(1 - lr * self._settings.weight_decay)
        parameter.add_(update, alpha=-lr * muon_rate_scale(*outputs_and_inputs(parameter)))

    def _step_adamw(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float, count: int) -> None:
        beta1, beta2 = self._settings.adamw_beta1, self._settings.adamw_beta2
        exp_avg = self._state[f"adamw.exp_avg/{name}"].lerp_(grad, 1 - beta1)
        exp_avg_sq = self._state[f"adamw.exp_avg_sq/{name}"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if parameter.ndim >= 2:  # a norm's gain or a bias has no scale to be pulled towards zero
            parameter.mul_(1 - lr * self._settings.weight_decay)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**count)).add_(ADAMW_EPSILON)
        parameter.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**count))

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, by `muon.momentum/<name>`, `adamw.exp_avg/<name>` and `adamw.exp_avg_sq/<name>`.

        These are the live tensors, not copies: hash or write them before the next step.
        """
        return dict(self._state)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy a state from `state_tensors` in; what follows is bit-identical to never having stopped.

        Raises OptimizerError, before anything is changed, for a missing or foreign name, another shape or dtype.
        """
        if missing := sorted(self._state.keys() - tensors.keys()):
            raise OptimizerError(f"the optimizer state lacks '{missing[0]}'; load the checkpoint of the same stage")
        if foreign := sorted(tensors.keys() - self._state.keys()):
            raise OptimizerError(f"the optimizer has no '{foreign[0]}'; load the checkpoint of the same stage")
        for name, own in self._state.items():
            given = tensors[name]
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                raise OptimizerError(
                    f"optimizer state '{name}' is {tuple(given.shape)} {given.dtype}, wanted {tuple(own.shape)} "
                    f"{own.dtype}; start from the run.toml of that checkpoint"
                )
        for name, own in self._state.items():
            own.copy_(tensors[name])

    def state_bytes(self) -> int:
        """Bytes of the state: one momentum per Muon parameter, two moments per AdamW parameter."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._state.values())
