"""What a run's codec begins with when it begins from another run: what that run learned at boundaries that both have.

`codec.safetensors`, beside the first weights (`model.path`), has what is a function of the model: the trained parts of
both halves of each boundary, its table, and what each stage knows of tokens. Momentum, error feedback and codebooks are
not in it: they belong to the earlier run's gradients, and a codebook is made from the first message anyway. Both ends
of a boundary have to begin with the same file, so its digest is a setting that neighbours compare
(`run.origin_codec`), and each node compares its own file with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..compress.codec_interface import Decoder, Encoder
from .checkpoints.kept_boundaries import kept_boundaries
from .config import RunConfig
from .model import ModelError
from .model.stage_cut import layer_ranges

if TYPE_CHECKING:
    from .checkpoints.assemble import Assembled

FILE = "codec.safetensors"


def write_codec_start(found: Assembled, layers: Sequence[range], directory: Path) -> str:
    """Write the file for a run that begins from `found`, whose stages have these layers; returns its hex SHA-256, ""
    where nothing was learned and there is no file."""
    tensors: dict[str, Tensor] = {}
    for stage, known in enumerate(found.tokens):
        tensors |= {f"stage_{stage}.tokens.{name}": tensor for name, tensor in known.items()}
    for state in found.boundaries:
        where = f"boundary_{state.boundary}"
        tensors |= {f"{where}.sender.{name}": tensor for name, tensor in state.sender.items()}
        tensors |= {f"{where}.receiver.{name}": tensor for name, tensor in state.receiver.items()}
        if state.master is not None:
            tensors[f"{where}.table"] = state.master
    if not tensors:
        return ""
    path = directory / FILE
    save_file(tensors, path, metadata={"layers": ",".join(str(len(each)) for each in layers)})
    return _digest(path)


def begin_with(
    config: RunConfig,
    layers: Sequence[range],
    index: int,
    *,
    tokens: nn.Module | None,
    sender: Encoder | None,
    receiver: Decoder | None,
) -> None:
    """Give the codec of stage `index`, of stages with these layers, what the run's origin had learned for it. Nothing
    where the run has no such origin. Raises ModelError for a file that is missing, or is not the one that the run began
    with."""
    if not config.run.origin_codec:
        return
    directory = config.model.path or Path()
    path = directory / FILE
    remedy = f"copy {directory} from the machine where the run was begun"
    try:
        found = _digest(path)
        if found != config.run.origin_codec:
            raise ModelError(
                f"{path} is not what the run began with: its digest is {found[:12]}…, run.origin_codec says "
                f"{config.run.origin_codec[:12]}…; {remedy}"
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            before = layer_ranges([int(count) for count in file.metadata()["layers"].split(",")])
            kept = kept_boundaries(before, layers)
            if tokens is not None and (source := kept.tokens[index]) is not None:
                tokens.load_state_dict(_under(file, f"stage_{source}.tokens."))
            if sender is not None and (old := kept.boundaries[index]) is not None:
                _fill(sender, _under(file, f"boundary_{old}.sender."))
                for table in _under(file, f"boundary_{old}.table").values():
                    sender.load_state_tensors({"master": table}, None)
            if receiver is not None and (old := kept.boundaries[index - 1]) is not None:
                _fill(receiver, _under(file, f"boundary_{old}.receiver."))
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ModelError(f"cannot read {path}: {cause}; {remedy}") from None


@torch.no_grad()
def _fill(half: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(half.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _under(file: Any, prefix: str) -> dict[str, Tensor]:
    """Of an open file, what is called so, and nothing else of it is read."""
    return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118 (no mapping)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
