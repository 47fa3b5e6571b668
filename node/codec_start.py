"""What a run's codec begins with when it begins from another run: what that run learned at boundaries that both have.

`codec.safetensors`, beside the first weights (`model.path`), has what fits the model's hidden states: the trained parts
of both halves of each boundary, its projector, the codebooks of both directions, and what each stage knows of tokens. A
table is there twice, as it was learned and as it was shipped: the new run ships the second one first, so that its first
tensors are coded as the other run would have coded them. Momentum and error feedback are not in it: they are about
gradients of the earlier run's steps. Both ends of a boundary have to begin with the same file, so its digest is a
setting that neighbours compare (`run.origin_codec`), and each node compares its own file with it.

Why the receiver is given no table: each table crosses with the first message anyway, whole and without rounding.
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

from ..compress.byte_format import ByteFormat
from ..compress.codec_interface import Decoder, Encoder
from ..compress.registry import parse_codec
from .boundary.endpoints import DownstreamEndpoint, UpstreamEndpoint
from .checkpoints.kept_boundaries import kept_boundaries
from .config import RunConfig
from .model import ModelError
from .model.stage_cut import layer_ranges
from .stage_costs import stage_layers

if TYPE_CHECKING:
    from .checkpoints.assemble import Assembled, Codebook

FILE = "codec.safetensors"
SHIPPED = "shipped"


def codebooks_kept(one: RunConfig, other: RunConfig, width: int) -> dict[Codebook, bool]:
    """By direction: whether the codebook that run `one` learned there is one for run `other` too. Those directions are
    left out where `other` has none. width: of hidden states; the codec is the same."""
    boundaries = [parse_codec(each.codec.codec, each.codec.forward, each.codec.backward) for each in (one, other)]
    narrow = boundaries[0].codec.wire_width(width)
    pairs: dict[Codebook, list[ByteFormat]] = {
        "activations": [each.forward for each in boundaries],
        "gradients": [each.backward for each in boundaries],
    }
    return {
        direction: formats[1].has_table_of(formats[0], narrow)
        for direction, formats in pairs.items()
        if formats[1].table(narrow)
    }


def write_codec_start(found: Assembled, config: RunConfig, directory: Path) -> str:
    """Write the file for a run of these settings that begins from `found` with the same codec; returns its hex SHA-256,
    "" where nothing was learned and there is no file."""
    tensors: dict[str, Tensor] = {}
    for stage, known in enumerate(found.tokens):
        tensors |= {f"stage_{stage}.tokens.{name}": tensor for name, tensor in known.items()}
    kept = codebooks_kept(found.config, config, found.architecture.hidden_size)
    for state in found.boundaries:
        where = f"boundary_{state.boundary}"
        tensors |= {f"{where}.sender.{name}": tensor for name, tensor in state.sender.items()}
        tensors |= {f"{where}.receiver.{name}": tensor for name, tensor in state.receiver.items()}
        if state.master is not None and state.table is not None:
            tensors |= {f"{where}.table.master": state.master, f"{where}.table.{SHIPPED}": state.table}
        for direction, fits in kept.items():
            book = state.codebooks[direction] if fits else {}
            tensors |= {f"{where}.{direction}.{name}": tensor for name, tensor in book.items()}
    if not tensors:
        return ""
    path = directory / FILE
    layers = ",".join(str(len(each)) for each in stage_layers(found.config, found.architecture))
    tokens = str(found.config.microbatch_size * found.config.lane_tokens)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"layers": layers, "tokens": tokens},
    )
    return _digest(path)


def layers_at_start(config: RunConfig) -> list[range] | None:
    """The layers of the stages that a run's codec was learned by before the run began; None where it begins untrained.
    Raises ModelError for a file that is missing."""
    if not config.run.origin_codec:
        return None
    path = (config.model.path or Path()) / FILE
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _layers(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def begin_with(
    config: RunConfig,
    layers: Sequence[range],
    index: int,
    *,
    tokens: nn.Module | None,
    sender: Encoder | None,
    receiver: Decoder | None,
    below: DownstreamEndpoint | None,
    above: UpstreamEndpoint | None,
) -> None:
    """Give the codec of stage `index`, of stages with these layers, what the run's origin had learned for it. below,
    above: its ends of its two boundaries. Nothing where the run has no such origin. Raises ModelError for a file that
    is missing, or is not the one that the run began with."""
    if not config.run.origin_codec:
        return
    path = (config.model.path or Path()) / FILE
    try:
        found = _digest(path)
        if found != config.run.origin_codec:
            raise ModelError(
                f"{path} is not what the run began with: its digest is {found[:12]}…, run.origin_codec says "
                f"{config.run.origin_codec[:12]}…; {_remedy(path)}"
            )
        with safe_open(path, framework="pt", device="cpu") as file:
            kept = kept_boundaries(_layers(file), layers)
            if tokens is not None and (source := kept.tokens[index]) is not None:
                tokens.load_state_dict(_under(file, f"stage_{source}.tokens."))
            if sender is not None and below and (old := kept.boundaries[index]) is not None:
                _fill(sender, _under(file, f"boundary_{old}.sender."))
                if table := _under(file, f"boundary_{old}.table."):
                    sender.load_state_tensors({"master": table["master"]}, None)
                    assert below.table
                    below.table.begin_with(table[SHIPPED])
                _give(below, _under(file, f"boundary_{old}.activations."), file)
            if receiver is not None and above and (old := kept.boundaries[index - 1]) is not None:
                _fill(receiver, _under(file, f"boundary_{old}.receiver."))
                _give(above, _under(file, f"boundary_{old}.gradients."), file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _layers(file: Any) -> list[range]:
    """Of the stages that learned what an open file has."""
    return layer_ranges([int(count) for count in file.metadata()["layers"].split(",")])


def _unreadable(path: Path, error: OSError | SafetensorError) -> ModelError:
    cause = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return ModelError(f"cannot read {path}: {cause}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"copy {path.parent} from the machine where the run was begun"


@torch.no_grad()
def _fill(half: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(half.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _give(end: DownstreamEndpoint | UpstreamEndpoint, learned: dict[str, Tensor], file: Any) -> None:
    """The codebook of what this end packs. Its format may be in other settings for other microbatches."""
    if not learned:
        return
    assert end.codebook
    shipped = learned.pop(SHIPPED)
    times = end.shape.tokens / int(file.metadata()["tokens"])
    end.codebook.learned_before(learned, shipped, times=times)


def _under(file: Any, prefix: str) -> dict[str, Tensor]:
    """Of an open file, what is called so, and nothing else of it is read."""
    return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118 (no mapping)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
