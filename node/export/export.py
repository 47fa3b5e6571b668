"""From a run to a directory that transformers loads, whole or not at all.

The directory is made beside the place that it is for, loaded from there, asked for its held-out loss, and only then
renamed: what is there afterwards has been loaded once. Where the text of the run is not on this machine the loss is not
known, and the rest is as good; the tokenizer has to be found, because weights without one are of no use.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.assemble import Assembled
from ..checkpoints.plain_projections import is_plain, model_of_run
from ..config import ConfigError, RunConfig
from ..data import Corpus, DataError, SourceLost, Vocabulary
from ..model.architecture import quiet_transformers
from ..model.initialise import set_constants
from ..model.slices import allocate
from ..preparation import check_device, prepare_corpus
from ..run_corpus import check_trained_on, vocabulary_of_run
from .heldout_loss import heldout_loss, recorded_loss
from .portable_model import MODELING, ExportError, PortableModel, modeling, plain_model, with_boundaries
from .tokenizer_files import portable_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 2 * 10**9  # a file is put together in memory


def export_run(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    lane: int | None = None,
    plain: bool = False,
    config: RunConfig | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model of `run` to `out`, a new or empty directory; returns what was written, for people and scripts.

    plain: without boundaries, and without what a context method has at projections, whether or not they do anything.
    lane, and the rest: as `model_of_run`. Raises ExportError, what that raises, and OSError where `out` cannot be
    written.
    """
    check_out(out)
    taken = model_of_run(run, lane, step=step, config=config, report=report, nearly=plain)
    assembled, settings = taken.found, taken.config
    vocabulary = vocabulary_of_run(run, assembled)
    transformers = quiet_transformers()
    without = plain_model(assembled)
    whole = with_boundaries(assembled, without)
    model = without if plain else whole
    longest = getattr(assembled.architecture, "max_position_embeddings", None)
    tokenizer = portable_tokenizer(vocabulary, assembled.config, longest=longest)
    say_tokens(model, tokenizer)
    final = out.absolute()
    aside = final.with_name(f".{final.name}-{os.getpid()}")
    missing = [directory for directory in final.parents if not directory.exists()]
    try:
        aside.mkdir(parents=True)
        files = _write(model, tokenizer, aside)
        losses = _losses(run, assembled, vocabulary, model, whole, aside, transformers)
        os.rename(aside, final)  # over an empty directory too
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # those that hold nothing
            for directory in missing:
                directory.rmdir()
    angles = not is_plain(settings, assembled.completed)
    return {
        "run": str(run),
        **({"lane": taken.lane} if settings.lanes.count > 1 else {}),
        "step": assembled.completed,
        "out": str(out),
        "architecture": assembled.architecture.model_type,
        "codec": assembled.config.codec.codec,
        "boundaries": model.boundaries,
        "boundaries_left_out": whole.boundaries - model.boundaries,
        **({"context": settings.context.method, "angles_left_out": angles} if settings.context.method else {}),
        "parameters": model.parameters,
        "files": files,
        "held_out": {
            "sequences": assembled.config.evaluation_microbatches * assembled.config.microbatch_size,
            "sequence_length": assembled.config.data.sequence_length,
            "loss_recorded": recorded_loss(settings, run, taken.lane, assembled.completed),
            **losses,
        },
    }


def check_out(out: Path) -> None:
    """Raises ExportError unless there is room for a directory of this name."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "is not empty" if out.is_dir() else "is no directory"
        raise ExportError(f"--out {out} {what}; choose a new one")


def say_tokens(model: PortableModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where a text begins and ends, in the configurations too. Not what pads: an embedding does not train that row."""
    for config in (model.config, model.config.get_text_config()):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id


def _write(model: PortableModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> dict[str, int]:
    """Returns the files with their bytes."""
    from transformers import GenerationConfig

    model.config.save_pretrained(directory)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if model.boundaries:
        shutil.copyfile(MODELING, directory / MODELING.name)
    _write_weights(model.weights, directory)
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}


def _write_weights(weights: dict[str, Tensor], directory: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shapes = {name: tensor.to("meta") for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    for name, of_file in split.filename_to_tensors.items():
        save_file({each: weights[each].contiguous() for each in of_file}, directory / name, metadata={"format": "pt"})
        (directory / name).chmod((directory / "config.json").stat().st_mode)  # the library lets only the owner read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _with_tokenizer(config: RunConfig, vocabulary: Vocabulary) -> RunConfig:
    """Held-out text in the ids of the model, whatever tokenizer would be made of the text here."""
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": vocabulary.path})})


def _losses(
    run: Path,
    assembled: Assembled,
    vocabulary: Vocabulary,
    model: PortableModel,
    whole: PortableModel,
    directory: Path,
    transformers: Any,
) -> dict[str, Any]:
    """Of what is in `directory`, and of the whole function where that is another one. A text that is not here leaves
    them open, and so does another one in its place: its loss would be no neighbour of the one that the run recorded."""
    kind = modeling().ThinpipeForCausalLM if model.boundaries else transformers.AutoModelForCausalLM
    exported: Any = kind.from_pretrained(directory, local_files_only=True)
    config = _with_tokenizer(assembled.config, vocabulary)
    try:
        corpus: Corpus = prepare_corpus(config)
        check_trained_on(corpus, run, assembled, "name the run's own with --set data.source=...")
    except (DataError, SourceLost) as error:
        return {"loss": None, "loss_with_boundaries": None, "reason": str(error)}
    losses: dict[str, Any] = {"loss": heldout_loss(exported.to(usable_device(config)), config, corpus)}
    losses["loss_with_boundaries"] = losses["loss"]
    if whole.boundaries != model.boundaries:
        del exported
        exported = in_memory(whole)
        losses["loss_with_boundaries"] = heldout_loss(exported.to(usable_device(config)), config, corpus)
    return {**losses, "reason": None}


def usable_device(config: RunConfig) -> torch.device:
    """The run's, if this machine has it."""
    try:
        check_device(config)
    except ConfigError:
        return torch.device("cpu")
    return torch.device(config.compute.device)


def in_memory(model: PortableModel) -> Any:
    """The model of transformers whose weights are the given tensors themselves, without a file between."""
    with torch.device("meta"):
        if model.boundaries:
            built: Any = modeling().ThinpipeForCausalLM(model.config)
        else:
            built = quiet_transformers().AutoModelForCausalLM.from_config(model.config)
    decoder = built.decoder if model.boundaries else built
    allocate(built)
    built.load_state_dict(model.weights, assign=True)
    set_constants(decoder, keep=list(decoder.parameters()))
    return built
