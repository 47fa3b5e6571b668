"""Matrices that lie the other way round: GPT-2 keeps its weights as (inputs, outputs), where a linear of torch has
(outputs, inputs).

Nothing of the forward pass depends on it, and neither does the direction in which Muon moves a matrix: the matrix sign
of a transpose is the transpose of the matrix sign. How far it moves does, because its rate grows with the ratio of
outputs to inputs. So such a parameter carries a mark, for the optimizer to see.

Why not turn them round on their way in and out: each name in a checkpoint would need a rule, and so would an export.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def mark_transposed(causal: Any) -> None:
    """Mark the weights of such modules. A copy of a parameter has no mark, so this comes when they are in their final
    place."""
    from transformers.pytorch_utils import Conv1D

    for module in causal.modules():
        if isinstance(module, Conv1D):
            module.weight.is_inputs_by_outputs = True  # pyright: ignore[reportAttributeAccessIssue]


def outputs_and_inputs(parameter: Tensor) -> tuple[int, int]:
    """Of the linear map that this matrix is."""
    first, second = parameter.shape
    return (second, first) if getattr(parameter, "is_inputs_by_outputs", False) else (first, second)
