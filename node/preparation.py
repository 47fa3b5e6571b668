"""From settings to a stage and its data, or to one line that says what cannot work.

Nodes, runs on this machine, benchmarks and plans begin here, so that all refuse the same settings in the same words;
what BAD_INPUT names is for the user to correct. The order is by cost: spellings first, then the model's shape and the
headers of its checkpoint, and only then the weights and the text, which take minutes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..compress.byte_format import CodecError
from ..compress.context_registry import parse_context
from ..compress.registry import parse_codec
from ..protocol.greeting import TABLE_DIGEST
from ..sim.links.shaper import LinkError, LinkProfile
from .addresses import ListenError
from .averaging.modes import parse_averaging
from .config import ConfigError, RunConfig
from .config_sections import DataSection
from .constrained_stage import check_architecture
from .context.chunk_exactness import check_chunks
from .data import Corpus, DataError, Preparing, Vocabulary, open_corpus, open_vocabulary, silently, vocabulary_size
from .links.dialling import NeighbourMismatch
from .measuring.emulated_machine import VOCABULARY, EmulatedMachine
from .measuring.emulated_stage import EmptyCorpus, EmulatedStage
from .model import (
    ModelError,
    architecture_digest,
    check_checkpoint,
    check_sliceable,
    resolve_model,
    skeleton,
    was_tied,
)
from .security.key_directory import KeysError
from .stage import Stage
from .stage_costs import stage_layers

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

BAD_INPUT = (ConfigError, DataError, ModelError, LinkError, ListenError, NeighbourMismatch, KeysError)


COMPILERS = ("g++", "clang++")  # what torch.compile looks for, if CXX names none
C_COMPILERS = ("gcc", "clang", "cc")  # on a GPU, where Triton builds what starts a kernel, if CC names none


def check_device(config: RunConfig) -> None:
    """Raises ConfigError for a device that is not there, or cannot be computed on as `compute` says."""
    try:
        device = torch.device(config.compute.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"compute.device '{config.compute.device}' is unknown; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"compute.device '{device}' is not on this machine, which has {count} of them; use cpu")
    if config.compute.compile and not config.compute.emulate:
        variable, known = ("CXX", COMPILERS) if device.type == "cpu" else ("CC", C_COMPILERS)
        named = os.environ.get(variable)
        if not any(map(shutil.which, (named,) if named else known)):
            raise ConfigError(
                f"compute.compile needs a compiler, and this machine has no {named or ' or '.join(known)}; install "
                f"one (apt-get install g++), name it in {variable}, or leave compute.compile out"
            )


def check_link(config: RunConfig) -> None:
    """Raises ConfigError for a link that is not spelt as links are."""
    try:
        LinkProfile.parse(config.link.link)
    except LinkError as error:
        raise ConfigError(str(error)) from None


def check_codec(config: RunConfig, architecture: PretrainedConfig | None = None) -> None:
    """Raises ConfigError for a codec or byte format that there is not, or that does not fit this model."""
    try:
        boundary = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward)
        codec = boundary.codec
        codec.check_rate(config.optim.muon_lr)
        if architecture is not None:
            codec.check(architecture.hidden_size)
            for fmt in (boundary.forward, boundary.backward):
                fmt.table(codec.wire_width(architecture.hidden_size))
    except CodecError as error:
        raise ConfigError(str(error)) from None
    if codec.constrains and config.model.pretrained:
        raise ConfigError(
            f"codec '{codec.name}' starts from weights of its own: those of {config.model.path} do not lie in its "
            "subspace; train from random weights, or choose codec 'mapl'"
        )
    if codec.table_scale and config.model.pretrained:
        raise ConfigError(
            f"codec '{codec.name}': table={codec.table_scale:g} adds a random table to embeddings that are trained "
            f"already, those of {config.model.path}; say table=0"
        )


def check_lanes(config: RunConfig, *, trains: bool = True) -> None:
    """Raises ConfigError for a way to average, or to share keys and values, that there is not. trains: for so many
    steps, as a run does and a plan does not."""
    if config.lanes.count == 1:
        return
    try:
        parse_averaging(config.lanes.average)
    except CodecError as error:
        raise ConfigError(f"lanes.average: {error}") from None
    if not config.context.method:
        return
    try:
        method = parse_context(config.context.method)
        if trains and not config.compute.emulate:  # which begins with what others come to
            method.check_steps(config.run.steps)
    except CodecError as error:
        raise ConfigError(f"context.method: {error}") from None
    codec = parse_codec(config.codec.codec).codec
    if codec.constrains:
        raise ConfigError(
            f"codec '{codec.name}' does not go with chunks (context.method): what it makes of a model is tried on "
            "whole sequences; choose codec 'mapl'"
        )
    for what, set_, remedy in (
        ("activation_checkpointing", config.compute.activation_checkpointing, "false"),
        ("compile", config.compute.compile, "false"),
    ):
        if set_:
            raise ConfigError(f"compute.{what} does not go with chunks (context.method); set it to {remedy}")


def check_settings(config: RunConfig) -> int:
    """Raise what BAD_INPUT names for settings that cannot work; returns the model's width."""
    check_device(config)
    check_codec(config)
    check_link(config)
    check_lanes(config)
    architecture = resolve_architecture(config)
    check_codec(config, architecture)
    check_model(config, architecture)
    return architecture.hidden_size


def check_model(config: RunConfig, architecture: PretrainedConfig) -> None:
    """Raises ModelError or ConfigError for a model that cannot be cut into these stages, not for this codec, or whose
    checkpoint is of another. Presets are known to be exact; each node tries its own all the same (`prepare`)."""
    check_layers(config, architecture)
    if config.model.path is None or config.compute.emulate:
        return
    check_sliceable(architecture, stage_layers(config, architecture))
    if config.context.method:
        check_chunks(config, architecture)
    if config.model.pretrained:
        check_checkpoint(architecture, config.model.path)


def check_layers(config: RunConfig, architecture: PretrainedConfig) -> None:
    """Raises ModelError or ConfigError for a model that cannot be cut into these stages, or not for this codec."""
    layers = stage_layers(config, architecture)
    codec = parse_codec(config.codec.codec).codec
    try:
        codec.check_layers([len(of_stage) for of_stage in layers])
    except CodecError as error:
        raise ConfigError(str(error)) from None
    if codec.constrains and len(layers) > 1:
        check_architecture(codec, architecture, config.run.seed)


def prepare(config: RunConfig, stage: int, lane: int = 0) -> tuple[Stage, str]:
    """Build stage `stage` of lane `lane`; returns it and the digest that its neighbours must share. Raises what
    BAD_INPUT names."""
    check_device(config)
    check_codec(config)
    check_lanes(config)
    architecture = resolve_architecture(config)
    check_codec(config, architecture)
    check_layers(config, architecture)
    if config.compute.emulate:
        emulated = EmulatedStage(config, architecture, stage, lane)
        return emulated, run_digest(config, architecture)
    check_sliceable(architecture, stage_layers(config, architecture))
    if config.context.method and config.model.path:
        check_chunks(config, architecture)
    if was_tied(architecture) and stage == 0:
        print("embeddings and head are tied in this model; here they live on different machines, so they are untied")
    built = Stage(config, architecture, stage, lane)
    return built, run_digest(config, architecture, built.token_table_digest)


def run_digest(config: RunConfig, architecture: PretrainedConfig, token_table_digest: str = "") -> str:
    """What two neighbours must share: hex SHA-256 of settings and architecture; of the table that each generated."""
    layers = [len(of_stage) for of_stage in stage_layers(config, architecture)]
    told = f"{config.digest()} {architecture_digest(architecture)} {layers}"
    whole = hashlib.sha256(told.encode()).hexdigest()
    return f"{whole}{TABLE_DIGEST}{token_table_digest}" if token_table_digest else whole


def state_digest(config: RunConfig, architecture: PretrainedConfig, token_table_digest: str = "") -> str:
    """What a checkpoint must share with the run that goes on from it: `run_digest`, of a run of any length."""
    return run_digest(config.of_any_length(), architecture, token_table_digest)


def resolve_architecture(config: RunConfig) -> PretrainedConfig:
    """The model's, with the vocabulary of its text, which an emulated run does not read. Raises what BAD_INPUT
    names."""
    settings = config.model
    vocab: int | None
    if config.compute.emulate:
        machine = EmulatedMachine.parse(config.compute.emulate)
        if machine.stages != config.pipeline.stages:
            raise ConfigError(f"compute.emulate {config.compute.emulate}: pipeline.stages is {config.pipeline.stages}")
        vocab = settings.vocab_size or VOCABULARY
    elif _brings_vocabulary(config):
        vocab = None
    else:
        vocab = vocabulary_size(text_settings(config), settings.vocab_size)
    return resolve_model(settings, vocab_size=vocab, sequence_length=config.data.sequence_length)


def model_line(config: RunConfig) -> str:
    """How large the model is, for people; "" for an emulated one, which nobody builds."""
    if config.compute.emulate:
        return ""
    whole = skeleton(resolve_architecture(config), torch.float32)
    count, stages = sum(each.numel() for each in whole.parameters()), config.pipeline.stages
    return f"the model: {count:,} parameters in {stages} stage{'' if stages == 1 else 's'}"


def text_settings(config: RunConfig) -> DataSection:
    """How the text is read and coded: a pretrained model brings its own tokenizer. Raises DataError where it has none:
    ids of another one would lead to rows of its embedding that mean something else."""
    path = config.model.path
    if not config.model.pretrained or path is None or config.data.tokenizer is not None:
        return config.data
    if not (path / "tokenizer.json").is_file():
        raise DataError(
            f"model.pretrained: {path} has no tokenizer.json, and its weights know no other ids; save the model's own "
            "tokenizer there, or name it with data.tokenizer"
        )
    return config.data.model_copy(update={"tokenizer": path})


def _brings_vocabulary(config: RunConfig) -> bool:
    """Whether model and tokenizer come as they are. Published pairs often differ by a few ids that no text has, so then
    the ids of the text count (`data.tokens`), not those of the tokenizer."""
    return config.model.path is not None and text_settings(config).tokenizer is not None


def prepare_corpus(config: RunConfig, report: Preparing = silently, *, kept: Path | None = None) -> Corpus:
    """Open the data as stage 0 does; `report` is told what takes time. kept: the run's own tokenizer, used where the
    settings name none. Raises DataError, also when the held-out set
    asked for is not there, and SourceLost for a streamed dataset that stayed away."""
    if config.compute.emulate:
        return EmptyCorpus(config)
    size, seed = _ids_of_model(config), config.run.seed
    corpus = open_corpus(_with_kept(text_settings(config), kept), vocab_size=size, seed=seed, report=report)
    needed = config.evaluation_microbatches * config.microbatch_size
    if corpus.heldout_sequences < needed:
        raise DataError(
            f"{config.data.source} has {corpus.heldout_sequences} held-out sequences of {config.data.sequence_length} "
            f"tokens, {needed} are wanted; lower data.heldout_sequences or data.sequence_length"
        )
    return corpus


def prepare_vocabulary(config: RunConfig, kept: Path | None = None) -> Vocabulary:
    """The tokenizer that the run's text was coded with: the one that the run has `kept`, or what its settings lead to.
    Raises DataError."""
    if kept is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": kept})})
    return open_vocabulary(text_settings(config), vocab_size=_ids_of_model(config))


def _with_kept(settings: DataSection, kept: Path | None) -> DataSection:
    return settings if settings.tokenizer or not kept else settings.model_copy(update={"tokenizer": kept})


def _ids_of_model(config: RunConfig) -> int:
    if _brings_vocabulary(config):
        return resolve_architecture(config).vocab_size
    return vocabulary_size(text_settings(config), config.model.vocab_size)
