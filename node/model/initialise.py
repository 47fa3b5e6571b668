"""The first weights of a stage: drawn from (seed, name), or read from a safetensors checkpoint.

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
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .architecture import ModelError, first_line

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
INDEX = "model.safetensors.index.json"


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


def load_checkpoint(state: dict[str, Tensor], directory: Path, *, tied_to: dict[str, str]) -> None:
    """Copy the named tensors, and only these, from `directory`/*.safetensors into `state` (full name -> tensor).

    `tied_to` maps a name that the checkpoint may leave out to the one that it shared a matrix with.
    Raises ModelError that names what is missing, of another shape or unreadable.
    """
    located = _locate(directory)
    source = {name: name if name in located else tied_to.get(name, name) for name in state}
    missing = [name for name in state if source[name] not in located]
    if missing:
        raise ModelError(f"the checkpoint {directory} lacks {_some(missing)}; is it of this architecture?")
    wrong: list[str] = []
    for path in sorted({located[source[name]] for name in state}):
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                for name, target in state.items():
                    if located[source[name]] != path:
                        continue
                    shape = list(tensors.get_slice(source[name]).get_shape())
                    if shape != list(target.shape):
                        wrong.append(f"{name} {shape}, expected {list(target.shape)}")
                    else:
                        with torch.no_grad():
                            target.copy_(tensors.get_tensor(source[name]))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {first_line(error)}; copy the checkpoint again") from error
    if wrong:
        raise ModelError(f"the checkpoint {directory} has {_some(wrong)}; its config.json belongs to other weights")


def _locate(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = directory / INDEX
    if index.is_file():
        try:
            weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # A file name only: an index must not point outside its own directory.
            return {name: directory / Path(file).name for name, file in weights.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {first_line(error)}; copy the checkpoint again") from error
    located: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as tensors:
                located.update(dict.fromkeys(tensors.keys(), path))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {first_line(error)}; copy the checkpoint again") from error
    if not located:
        raise ModelError(f"no *.safetensors in {directory}; convert the checkpoint, other formats are not read")
    return located


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
