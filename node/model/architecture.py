"""From settings to one Hugging Face configuration: presets, local directories, and what is refused at once.

A run names its decoder by a preset or by a directory that holds a `config.json`. Both end as the same object, a
transformers configuration with one attention implementation, no cache and untied embeddings: the embedding lives on the
first machine and the head on the last, so a shared matrix would have to cross every boundary at every step.

Presets are Llama decoders (pre-norm, RoPE, SwiGLU) of the widths of MAPL's experiments (arXiv 2606.05484). The paper
does not print depth and FFN width here; ours give the size in the name with V = 32,000 and untied embeddings, in layer
counts that 4 and 8 stages divide evenly (`tiny` is stated at V = 4,096). `800m` has depth and width of the experiments
with long sequences of Mixtures of Subspaces (arXiv 2606.16384):

| preset | width | layers | heads | FFN   | parameters  |
|--------|-------|--------|-------|-------|-------------|
| tiny   |   256 |      4 |     4 |   688 |     5,261,568 |
| 150m   | 1,024 |      8 |    16 | 2,048 |   149,439,488 |
| 500m   | 1,536 |     16 |    24 | 3,392 |   499,435,008 |
| 800m   | 2,048 |      8 |    32 | 10,880 |  800,098,304 |
| 1b     | 2,048 |     16 |    32 | 6,144 | 1,003,554,816 |
| 8b     | 4,096 |     32 |    64 | 14,336 | 8,047,038,464 |

Of a model that also sees or hears (Gemma 3, Mistral 3), the text decoder is taken: its `text_config`.

Why a refusal and not a warning for dropout and mixtures of experts: dropout draws from a generator whose state depends
on how the model is cut, and a router's auxiliary loss sums over layers that live on other machines. Either would train,
and train something else than the uncut model.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config_sections import ModelSection
from .lean import import_common

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD_DIM = 64
REMEDY = "choose a decoder such as llama, qwen3, gemma3, mistral, gpt_neox, gpt2 or nanochat"
MINIMUM_CONTEXT = 2048  # tokens; RoPE is unbounded, the number only documents what an exported model was meant for


class ModelError(ValueError):
    """A model cannot be built, cut or loaded as asked; the message names the fault, the offender and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Sizes of one Llama decoder; heads are 64 wide."""

    layers: int
    width: int
    ffn_width: int


PRESETS = {
    "tiny": Preset(layers=4, width=256, ffn_width=688),
    "150m": Preset(layers=8, width=1024, ffn_width=2048),
    "500m": Preset(layers=16, width=1536, ffn_width=3392),
    "800m": Preset(layers=8, width=2048, ffn_width=10880),
    "1b": Preset(layers=16, width=2048, ffn_width=6144),
    "8b": Preset(layers=32, width=4096, ffn_width=14336),
}

# What names a mixture of experts in the configurations of transformers; any positive value means that one is there.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
OTHER_HEADS = ("classifier", "summary")  # whose dropout has no part in a language model
# Where a configuration was read from, when, and how its tensors happen to be stored do not change what is computed.
NOT_ARCHITECTURE = frozenset(
    {
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "auto_map",
        "id2label",
        "label2id",
        "problem_type",
        "_tied_in_source",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
    }
)
# Where a configuration says that its weights are coded: transformers' own words, and those of older checkpoints.
QUANTISED_KEYS = ("quantization_config", "compression_config")


def describe(config: PretrainedConfig) -> str:
    """How an architecture is named in messages."""
    return f"architecture '{config.model_type}'"


@functools.cache
def quiet_transformers() -> Any:
    """The transformers package, imported on first use (about 1.5 s) and without its progress bars and advice."""
    import transformers

    import_common()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def resolve_model(settings: ModelSection, *, vocab_size: int | None, sequence_length: int) -> PretrainedConfig:
    """The configuration that all stages of a run build from.

    `vocab_size` is the number of token ids of the corpus (None: no more than the model of `settings.path` has, which
    whoever reads the text sees to), `sequence_length` the tokens of one training sequence. Raises ModelError for an
    unknown preset, an unreadable directory, and sizes that do not fit. What cannot be cut into stages is refused when
    it is built (`slices.skeleton`).
    """
    if settings.pretrained and settings.path is None:
        raise ModelError("model.pretrained needs model.path, a directory with config.json and *.safetensors")
    if settings.path is None:
        if vocab_size is None:
            raise ModelError("a preset's vocabulary is that of the text; say how many ids it has")
        config = _preset_config(settings, vocab_size=vocab_size, sequence_length=sequence_length)
    else:
        config = _local_config(settings, settings.path)
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ModelError(
            f"the corpus has {vocab_size} token ids, the model's vocabulary {config.vocab_size}; "
            f"use the model's own tokenizer (data.tokenizer) or set model.vocab_size = {vocab_size}"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ModelError(
            f"data.sequence_length = {sequence_length}, but the model's context is {context} tokens; "
            f"set data.sequence_length = {context} or less"
        )
    config._attn_implementation = settings.attention
    config.use_cache = False
    return untied(config)


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose embedding and head are separate tensors; `was_tied` still tells how it came."""
    separate = copy.deepcopy(config)
    separate._tied_in_source = was_tied(config)  # pyright: ignore[reportAttributeAccessIssue]
    separate.tie_word_embeddings = False
    return separate


def was_tied(config: PretrainedConfig) -> bool:
    """Whether the source of this configuration tied its head to its embedding, which a caller says once."""
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(config, "_tied_in_source", False))


def architecture_digest(config: PretrainedConfig) -> str:
    """Hex SHA-256 of all that decides what the model computes, attention implementation included.

    Equal for equal architectures wherever they were read from; weights are not part of it.
    """
    tree = {key: value for key, value in config.to_dict().items() if key not in NOT_ARCHITECTURE}
    tree["attention"] = config._attn_implementation
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise ModelError, by name, for dropout and for a mixture of experts."""
    tree = config.to_dict()
    rates = {
        key: value
        for key, value in tree.items()
        if ("dropout" in key or key.endswith(("pdrop", "layerdrop")))
        and not key.startswith(OTHER_HEADS)
        and isinstance(value, int | float)
        and value > 0
    }
    if rates:
        has = ", ".join(f"{key} = {value}" for key, value in rates.items())
        raise ModelError(
            f"{config.model_type} has {has}: dropout draws differently in every cut of the model; "
            f"set {' and '.join(rates)} to 0 in its config.json"
        )
    for key in EXPERT_KEYS:
        count = tree.get(key)
        if isinstance(count, int) and count > 1:
            raise ModelError(
                f"{config.model_type} is a mixture of experts ({key} = {count}), whose routing loss sums over all "
                "stages; choose a dense decoder such as llama or qwen3"
            )


def per_layer_keys(config: PretrainedConfig) -> list[str]:
    """Names of the lists with one entry for each layer (`layer_types`, `no_rope_layers`, ...)."""
    layers = config.num_hidden_layers
    return [
        key
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, list | tuple) and len(value) == layers
    ]


def with_layers(config: PretrainedConfig, layers: range) -> PretrainedConfig:
    """A copy that describes only `layers`, per-layer lists included, so that its layer 0 is `layers.start`."""
    part = copy.deepcopy(config)
    for key in per_layer_keys(config):
        setattr(part, key, getattr(config, key)[layers.start : layers.stop])
    part.num_hidden_layers = len(layers)
    return part


def _preset_config(settings: ModelSection, *, vocab_size: int, sequence_length: int) -> PretrainedConfig:
    preset = PRESETS.get(settings.preset)
    if preset is None:
        raise ModelError(f"unknown model.preset '{settings.preset}'; known: {', '.join(PRESETS)}, or give model.path")
    width = settings.width or preset.width
    if width % HEAD_DIM and (width > HEAD_DIM or width % 2):
        raise ModelError(
            f"model.width = {width} does not divide into heads of {HEAD_DIM}; "
            f"choose a multiple of {HEAD_DIM}, or an even width below it for a single head"
        )
    heads = max(1, width // HEAD_DIM)
    ffn_width = max(16, round(preset.ffn_width * width / preset.width / 16) * 16)
    return quiet_transformers().LlamaConfig(
        vocab_size=settings.vocab_size or vocab_size,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=settings.layers or preset.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(MINIMUM_CONTEXT, sequence_length),
        tie_word_embeddings=False,
        bos_token_id=None,  # the corpus' tokenizer decides, not the architecture
        eos_token_id=None,
    )


def _local_config(settings: ModelSection, directory: Path) -> PretrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.path = {directory} has no config.json; give a directory in Hugging Face's layout")
    transformers = quiet_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its validators raise
        raise ModelError(f"cannot read {directory / 'config.json'}: {first_line(error)}") from error
    config = _text_config(config, transformers)
    for key in QUANTISED_KEYS:
        if (coded := getattr(config, key, None)) is None:
            continue
        if settings.pretrained:
            method = coded.get("quant_method") if isinstance(coded, dict) else getattr(coded, "quant_method", None)
            raise ModelError(
                f"the checkpoint {directory} is quantised ({method or key}), and a stage trains weights as they are; "
                "give one in bf16, fp16 or fp32, or leave model.pretrained out"
            )
        delattr(config, key)  # random weights are not
    if settings.width is not None and settings.width != config.hidden_size:
        raise ModelError(
            f"model.width = {settings.width}, but {directory} is {config.hidden_size} wide; "
            "leave model.width out or edit its config.json"
        )
    if settings.layers is not None:
        if settings.layers > config.num_hidden_layers:
            raise ModelError(
                f"model.layers = {settings.layers}, but {directory} has {config.num_hidden_layers}; "
                f"set model.layers to {config.num_hidden_layers} or fewer (its first ones are taken)"
            )
        config = with_layers(config, range(settings.layers))
    if settings.vocab_size is not None and settings.vocab_size != config.vocab_size:
        if settings.pretrained:
            raise ModelError(
                f"model.vocab_size = {settings.vocab_size}, but the weights in {directory} have {config.vocab_size}; "
                "leave model.vocab_size out or start without model.pretrained"
            )
        config.vocab_size = settings.vocab_size
    return config


def _text_config(config: PretrainedConfig, transformers: Any) -> PretrainedConfig:
    """The part that is a causal language model. Raises ModelError where there is none."""
    whole, tied = config, bool(getattr(config, "tie_word_embeddings", False))
    if getattr(config, "text_config", None) is not None:
        config = config.get_text_config(decoder=True)
        for key in QUANTISED_KEYS:
            if hasattr(whole, key):
                setattr(config, key, getattr(whole, key))
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers")
    if (
        config.model_type not in causal
        or getattr(whole, "is_encoder_decoder", False)
        or not all(isinstance(getattr(config, key, None), int) for key in sizes)
    ):
        raise ModelError(f"{describe(whole)} is not supported: transformers has no text decoder for it; {REMEDY}")
    # An export of ours may carry the note of an earlier untying; a wrapper ties for its text part.
    config._tied_in_source = tied and config is not whole  # pyright: ignore[reportAttributeAccessIssue]
    return config


def first_line(error: Exception) -> str:
    """What an exception of another library says, cut to one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
