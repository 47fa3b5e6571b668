"""The first weights of a stage, where no checkpoint has them: drawn from (seed, name).

Each matrix has a random stream of its own, seeded by the SHA-256 of the run's seed and the tensor's name in the whole
model. So the weights do not depend on how many stages there are or on who builds first, and a stage touches nobody
else's tensors. The known alternative, one generator that fills the whole model in order, needs every stage to draw (and
hold) everything before its own part.

Matrices and embeddings are N(0, initializer_range²); those that write to the residual stream are divided by
sqrt(2 L), because 2 L of them add up there (GPT-2, Radford et al. 2019, section 2.3). Vectors (norm gains, biases) take
the constant that the architecture itself sets: ones for Llama's norms, zeros for Gemma's, which add one.

A tensor is drawn on the CPU in float32 and cast afterwards, so a float64 run starts where a float32 run does. The last
bit of a draw may differ between processor types, which is harmless here: exactly one stage holds each tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import REMEDY, ModelError, describe

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")
RESIDUAL_OUTPUTS += ("mlp.fc2.weight",)  # nanochat
RESIDUAL_OUTPUTS += ("c_proj.weight",)  # GPT-2


def draw(name: str, shape: Iterable[int], *, seed: int, std: float) -> Tensor:
    """The float32 matrix N(0, std²) that belongs to `name` in a run with this seed."""
    key = hashlib.sha256(f"thinpipe weights\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32) * std


def initialise_random(causal: Any, names: list[tuple[str, nn.Parameter]], *, seed: int, layers: int) -> None:
    """Fill an emptied stage in place. `names` are full names; `layers` counts the whole model's.

    Raises ModelError for a vector that the architecture would draw at random, since that draw depends on the cut.
    """
    std = getattr(causal.config, "initializer_range", None) or 0.02
    vectors = [(name, parameter) for name, parameter in names if parameter.ndim < 2]
    for name, parameter in names:
        if parameter.ndim >= 2:
            scale = 1 / math.sqrt(2 * layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
            with torch.no_grad():
                parameter.copy_(draw(name, parameter.shape, seed=seed, std=std * scale))
    set_constants(causal, keep=[parameter for _, parameter in names if parameter.ndim >= 2])
    refuse_unset(causal)
    for name, parameter in vectors:
        if parameter.numel() and not torch.equal(parameter, parameter.flatten()[0].expand_as(parameter)):
            raise ModelError(f"{causal.config.model_type} draws {name} at random; start it from a checkpoint")


def set_constants(causal: Any, *, keep: list[nn.Parameter]) -> None:
    """Let the architecture set what is not in `keep`: vectors, and buffers that no checkpoint stores.

    Such are the RoPE frequencies. Emptying a module leaves them as uninitialised memory, which would be wrong
    without any error.
    """
    for module in causal.modules():
        module._is_hf_initialized = False
    for parameter in keep:
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    with torch.random.fork_rng(devices=[]):
        causal.initialize_weights()


def mark_unset(tensor: Tensor) -> Tensor:
    """The same tensor, of which `refuse_unset` can tell whether anybody has written to it since."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    tensor._version_unset = tensor._version  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def refuse_unset(causal: Any) -> None:
    """Raises ModelError for a vector or a buffer that nobody has set since it was allocated: neither draw, checkpoint
    nor the architecture. Whatever memory it holds would be trained on."""
    small = [(name, parameter) for name, parameter in causal.named_parameters() if parameter.ndim < 2]
    for name, tensor in (*small, *causal.named_buffers()):
        if tensor.is_floating_point():
            unset = bool(tensor.isnan().any())
        else:
            unset = getattr(tensor, "_version_unset", None) == tensor._version
        if unset:
            raise ModelError(
                f"{describe(causal.config)} cannot be built: neither its code nor a checkpoint sets {name}; start it "
                f"from a checkpoint that has it, or {REMEDY}"
            )
