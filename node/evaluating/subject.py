"""What is evaluated, whatever it is made of: a directory that transformers loads, or a run with its own boundaries.

Both give the logits of token ids, and say how a text is spelt in ids. Everything that is measured (`text_loss`,
`choices`) asks for no more than that, so that a model before and after its export is measured by the same code.

Code that a directory brings along is run only where the user says so, or where it is the modelling file that this
version of thinpipe writes, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..model.architecture import ModelError, first_line, quiet_transformers


class EvaluationError(ValueError):
    """What is to be evaluated, or what it is to be asked, cannot be used; one line names it and the remedy."""


class Subject(Protocol):
    """A language model over token ids.

    begin_id: what a text begins behind, where nothing precedes it. context: the most tokens that `logits` takes.
    """

    tokenizer: Tokenizer
    begin_id: int
    context: int

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the next token at each place: ids (B, T) int64 -> (B, T, V) float32 or float64. No gradient."""
        ...


class Directory:
    """A causal language model in a directory of Hugging Face's layout, as transformers loads it, in float32."""

    def __init__(self, directory: Path, *, trusted: bool = False, device: str = "cpu") -> None:
        """Raises EvaluationError for what is not there, cannot be loaded, or wants to run code that is not trusted."""
        self.model, self.words = load_directory(directory, trusted=trusted, device=device)
        self.tokenizer = self.words.backend_tokenizer
        self.begin_id = next(
            (each for each in (self.words.bos_token_id, self.words.eos_token_id) if each is not None), 0
        )
        sizes = self.model.config.get_text_config(decoder=True)
        self.context = getattr(sizes, "max_position_embeddings", None) or 2**20
        self._device = device

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        return self.model(input_ids=ids_BT.to(self._device), use_cache=False).logits.float().cpu()


def load_directory(directory: Path, *, trusted: bool, device: str) -> tuple[Any, Any]:
    """The model and the tokenizer in `directory`, as transformers loads them. Raises EvaluationError."""
    if not (directory / "config.json").is_file():
        raise EvaluationError(f"{directory} holds neither run.toml nor config.json; give a run, or a model's directory")
    transformers = quiet_transformers()
    options = {"local_files_only": True, "trust_remote_code": trusted or is_ours(directory)}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        words = transformers.AutoTokenizer.from_pretrained(directory, use_fast=True, **options)
    except Exception as error:  # transformers raises whatever its parts raise
        remedy = "is it a whole directory of Hugging Face's layout?"
        if "trust_remote_code" in str(error):
            remedy = "it brings code of its own: read it, and say --trust-code"
        raise EvaluationError(f"cannot load {directory}: {first_line(error)}; {remedy}") from None
    if not isinstance(getattr(words, "backend_tokenizer", None), Tokenizer):
        raise EvaluationError(f"{directory} has no tokenizer.json; save it there with the tokenizers library")
    return model.eval().to(device), words


def is_ours(directory: Path) -> bool:
    """Whether the code in `directory` is what this version of thinpipe exports, and nothing else."""
    del directory
    return False


__all__ = ["Directory", "EvaluationError", "ModelError", "Subject", "is_ours", "load_directory"]
