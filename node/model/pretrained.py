"""Weights that come in: a stage's tensors out of a directory of safetensors, whatever they are called there.

Names in files and names in a model differ: releases of transformers have renamed parts (`embed_out` became `lm_head`),
a base model is saved without its prefix, and a model that also sees keeps its text decoder below `language_model`. The
library's own renamings are used, so that what transformers loads is loaded here. Only the tensors of this stage are
read, and only headers before all of them are known to fit.

What does not fit is refused, never left out: a tensor that is missing, of another shape, coded (float8, int8, packed
integers), or one more than the module has, such as the scales of coded weights. transformers warns of some of these and
goes on; a stage would then train a model that nobody has published.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .architecture import ModelError, first_line, quiet_transformers, was_tied
from .parts import find_parts
from .slices import StageModel, skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors spells them
TEXT_PART = "language_model."  # where wrappers keep their text decoder


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, by the file's own name for it."""

    path: Path
    name: str


def load_checkpoint(model: StageModel, directory: Path, *, tied: bool) -> None:
    """Copy the stage's tensors, and only these, from `directory`/*.safetensors.

    tied: the checkpoint may hold one matrix for embedding and head, under either name. Raises ModelError that names
    what is missing, unreadable, of another shape or coded, before anything is copied.
    """
    twins = {model.parts.head_weight: model.parts.embedding_weight} if tied else {}
    state = model.full_state()
    stored = _fitting(model.causal, state, directory, twins)
    for path in sorted({each.path for each in stored.values()}):
        with _opened(path) as tensors, torch.no_grad():
            for name, target in state.items():
                if stored[name].path == path:
                    target.copy_(tensors.get_tensor(stored[name].name))


def read_tensors(causal: Any, directory: Path, names: Collection[str], *, tied: bool) -> dict[str, Tensor]:
    """These tensors of `directory`/*.safetensors, by their names in the whole model `causal`, which may be on `meta`.
    Raises ModelError as `load_checkpoint` does."""
    parts = find_parts(causal)
    twins = {parts.head_weight: parts.embedding_weight} if tied else {}
    stored = _fitting(causal, causal.state_dict(keep_vars=True), directory, twins)
    found: dict[str, Tensor] = {}
    for name in names:
        with _opened(stored[name].path) as tensors:
            found[name] = tensors.get_tensor(stored[name].name)
    return found


def check_checkpoint(config: PretrainedConfig, directory: Path) -> None:
    """Raise ModelError as `load_checkpoint` would, from the headers of files alone: before processes start."""
    causal = skeleton(config, torch.float32)
    parts = find_parts(causal)
    twins = {parts.head_weight: parts.embedding_weight} if was_tied(config) else {}
    _fitting(causal, causal.state_dict(keep_vars=True), directory, twins)


def _fitting(causal: Any, state: Mapping[str, Tensor], directory: Path, twins: Mapping[str, str]) -> dict[str, _Stored]:
    """Where each tensor of `state` is stored. Raises ModelError unless all are there, and as they have to be."""
    located = _renamed(causal, state, _locate(directory))
    twins = {**twins, **{there: here for here, there in twins.items()}}
    found = {name: located.get(name) or located.get(twins.get(name, name)) for name in state}
    if missing := [name for name, where in found.items() if where is None]:
        raise ModelError(f"the checkpoint {directory} lacks {_some(missing)}; is it of this architecture?")
    stored = {name: where for name, where in found.items() if where is not None}
    modules = {name.rpartition(".")[0] for name in state}
    if more := [name for name in located if name not in state and name.rpartition(".")[0] in modules]:
        raise ModelError(
            f"the checkpoint {directory} has {_some(more)}, which this architecture has not: its weights are "
            "quantised, or of another architecture; give one in bf16, fp16 or fp32 that fits its config.json"
        )
    coded: list[str] = []
    wrong: list[str] = []
    for path in sorted({each.path for each in stored.values()}):
        with _opened(path) as tensors:
            for name, target in state.items():
                if stored[name].path != path:
                    continue
                header = tensors.get_slice(stored[name].name)
                if target.is_floating_point() and header.get_dtype() not in PLAIN_DTYPES:
                    coded.append(f"{name} as {header.get_dtype()}")
                elif list(header.get_shape()) != list(target.shape):
                    wrong.append(f"{name} {list(header.get_shape())}, expected {list(target.shape)}")
    if coded:
        raise ModelError(
            f"the checkpoint {directory} is quantised: it has {_some(coded)}, and a stage trains weights as they are; "
            "give one in bf16, fp16 or fp32"
        )
    if wrong:
        raise ModelError(f"the checkpoint {directory} has {_some(wrong)}; its config.json belongs to other weights")
    return stored


def _renamed(causal: Any, state: Mapping[str, Tensor], located: Mapping[str, Path]) -> dict[str, _Stored]:
    """What is located, by the name that the whole model has for it."""
    quiet_transformers()
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    steps = [step for step in get_model_conversion_mapping(causal) if isinstance(step, WeightRenaming)]
    names = dict(state)
    found: dict[str, _Stored] = {}
    for name, path in located.items():
        plain = name.replace(TEXT_PART, "", 1)
        ours, _ = rename_source_key(plain, steps, [], causal.base_model_prefix, names)
        found[ours] = _Stored(path, name)
    return found


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
        with _opened(path) as tensors:
            located.update(dict.fromkeys(tensors.keys(), path))
    if not located:
        raise ModelError(f"no *.safetensors in {directory}; convert the checkpoint, other formats are not read")
    return located


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Raises ModelError for a file that cannot be read, also while it is."""
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {first_line(error)}; copy the checkpoint again") from error


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
