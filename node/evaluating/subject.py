"""What is evaluated, whatever it is made of: a directory that transformers loads, or a run with its own boundaries.

Both give the logits of token ids, and say how a text is spelt in ids. Everything that is measured (`text_loss`,
`choices`) asks for no more than that, so that a model before and after its export is measured by the same code.

Code that a directory brings along is run only where the user says so, or where it is the modelling file that this
version of thinpipe writes, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..export.portable_model import MODELING, modeling
from ..model.architecture import first_line, quiet_transformers


class EvaluationError(ValueError):
    """What is to be evaluated, or what it is to be asked, cannot be used; one line names it and the remedy."""


class Subject(Protocol):
    """A language model over token ids.

    begin_id: what a text begins behind, where nothing precedes it. context: the most tokens that `logits` takes. ids:
    how many there are, which may be fewer than its tokenizer has.
    """

    tokenizer: Tokenizer
    begin_id: int
    context: int
    ids: int

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the next token at each place: ids (B, T) int64 -> (B, T, V) float32 or float64. No gradient."""
        ...


class Directory:
    """A causal language model in a directory of Hugging Face's layout, as transformers loads it, in float32."""

    def __init__(self, directory: Path, *, trusted: bool = False, device: str = "cpu") -> None:
        """Raises EvaluationError for what is not there, cannot be loaded, or wants to run code that is not trusted."""
        self._model, words = load_directory(directory, trusted=trusted, device=device)
        self.tokenizer = words.backend_tokenizer
        self.begin_id = next((each for each in (words.bos_token_id, words.eos_token_id) if each is not None), 0)
        self.context = longest_text(self._model)
        self.ids: int = self._model.config.get_text_config(decoder=True).vocab_size

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        return self._model(input_ids=ids_BT.to(self._model.device), use_cache=False).logits.float().cpu()


def check_ids(subject: Subject, ids: Sequence[int] | np.ndarray) -> None:
    """Raises EvaluationError for an id that the model does not have."""
    if len(ids) and (worst := int(np.max(ids))) >= subject.ids:
        raise EvaluationError(
            f"the text has token {worst} ({subject.tokenizer.id_to_token(worst)!r}), but the model's vocabulary ends "
            f"at {subject.ids - 1}; leave it out of the text"
        )


def longest_text(model: Any) -> int:
    """Tokens that a model of transformers takes at once; of one that names no end, as many as anybody has."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20


def check_directory(directory: Path) -> None:
    """Raises EvaluationError for what is no model's directory."""
    if not (directory / "config.json").is_file():
        raise EvaluationError(f"{directory} holds neither run.toml nor config.json; give a run, or a model's directory")


def load_directory(directory: Path, *, trusted: bool, device: str) -> tuple[Any, Any]:
    """The model and the tokenizer in `directory`, as transformers loads them. Raises EvaluationError."""
    check_directory(directory)
    transformers = quiet_transformers()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusted}
    # What an export brings is loaded from here: config.json might name other code than the file beside it.
    ours = not trusted and is_ours(directory)
    kind = modeling().ThinpipeForCausalLM if ours else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(directory, dtype=torch.float32, **options)
        words = transformers.AutoTokenizer.from_pretrained(directory, use_fast=True, **options)
    except Exception as error:  # transformers raises whatever its parts raise
        remedy = "is it a whole directory of Hugging Face's layout?"
        if "trust_remote_code" in str(error):
            remedy = "it brings code of its own: read it, and say --trust-code"
        raise EvaluationError(f"cannot load {directory}: {first_line(error)}; {remedy}") from None
    if not isinstance(getattr(words, "backend_tokenizer", None), Tokenizer):
        raise EvaluationError(f"{directory} has no tokenizer.json; save it there with the tokenizers library")
    return on_device(model, device), words


def on_device(model: Any, device: str) -> Any:
    """The model, ready to be asked there. Raises EvaluationError for a device that is not on this machine."""
    try:
        return model.eval().to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {device} cannot be used: {first_line(error)}; use cpu") from None


def is_ours(directory: Path) -> bool:
    """Whether the code in `directory` is what this version of thinpipe exports, and nothing else."""
    there = sorted(directory.glob("*.py"))
    try:
        return [path.name for path in there] == [MODELING.name] and there[0].read_bytes() == MODELING.read_bytes()
    except OSError:
        return False
