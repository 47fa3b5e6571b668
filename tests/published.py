"""Models as others publish them: small, random, saved by transformers, with a tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .conftest import WORDS

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def tokenizer(extra: int = 0) -> Tokenizer:
    """A byte-level BPE of VOCABULARY ids, and some added ones that no text has."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f"def {a}_{b}(x):\n    return {b}(x, 1)\n" for a in WORDS for b in WORDS], trainer)
    assert made.get_vocab_size() == VOCABULARY
    made.add_special_tokens([AddedToken(f"<added {number}>", special=True) for number in range(extra)])
    return made


def wrapped(cls: Any, vision: Any, text: Any, **more: Any) -> Callable[[], Any]:
    """A model that also sees, of which the text part is wanted."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return lambda: cls(text_config=text(**SIZES).to_dict(), vision_config=vision(**small, **more).to_dict())


SHAPES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),  # tied
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=8, sliding_window_pattern=2),
    "nanochat": lambda: transformers.NanoChatConfig(**SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(**SIZES, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),  # tied
    "apertus": lambda: transformers.ApertusConfig(**SIZES),
    "gemma3 that sees": wrapped(
        transformers.Gemma3Config,
        transformers.SiglipVisionConfig,
        lambda **sizes: transformers.Gemma3TextConfig(**sizes, sliding_window=8),
        image_size=28,
        patch_size=14,
    ),
    "mistral3 that sees": wrapped(
        transformers.Mistral3Config,
        transformers.PixtralVisionConfig,
        transformers.MistralConfig,
        image_size=28,
        patch_size=14,
    ),
}


def save(directory: Path, config: Any, *, extra_ids: int = 0) -> Any:
    """The model in `directory`, random and with its tokenizer, as transformers saves both."""
    seeing = getattr(config, "text_config", None) is not None
    auto = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(extra_ids), eos_token="<|endoftext|>")
    fast.save_pretrained(directory)
    return model
