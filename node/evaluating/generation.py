"""Text that a model writes: one token after the other, each drawn from what the model holds likely.

temperature divides the logits: 0 takes the most likely token each time, 1 draws as the model was trained, above that
less likely tokens come more often. top_p then keeps the most likely tokens that together have this probability
(nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751). Nothing else is changed: what a directory's own
generation_config.json says of top_k or penalties is left out, so that equal options mean the same for all models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.plain_projections import model_of_run
from ..export.export import in_memory, say_tokens
from ..export.portable_model import plain_model, with_boundaries
from ..export.tokenizer_files import portable_tokenizer
from ..model.architecture import quiet_transformers
from ..run_corpus import vocabulary_of_run
from .subject import EvaluationError, check_directory, load_directory, longest_text, on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """max_tokens: at most so many; fewer where the model ends its text. seed: of the draws."""

    max_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def check(self, text: str) -> None:
        """Raises EvaluationError for what no token can be drawn by, and for an empty text."""
        if self.max_tokens < 1:
            raise EvaluationError(f"--max-tokens {self.max_tokens} has to be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EvaluationError(f"--temperature {self.temperature:g} has to be 0, for the most likely text, or above")
        if not 0 < self.top_p <= 1:
            raise EvaluationError(f"--top-p {self.top_p:g} has to be above 0 and at most 1")
        if not text:
            raise EvaluationError(
                "there is no text to go on with; give some, such as thinpipe generate RUN 'def main('"
            )

    def check_fits(self, model: Any, words: Any, text: str) -> None:
        """Raises EvaluationError for a text that the model cannot go on with."""
        ids = words(text).input_ids
        if not ids:
            raise EvaluationError("the text has no token that the model's tokenizer knows; say it in other words")
        longest = longest_text(model)
        if len(ids) + self.max_tokens > longest:
            raise EvaluationError(
                f"the text has {len(ids)} tokens and {self.max_tokens} are wanted, but the model's context is "
                f"{longest}; shorten the text or lower --max-tokens"
            )
        known = model.config.get_text_config(decoder=True).vocab_size
        if max(ids) >= known:
            raise EvaluationError(
                f"the text has token {max(ids)}, but the model's vocabulary ends at {known - 1}; say it in other words"
            )


def generate(model: Any, words: Any, text: str, sampling: Sampling, write: Callable[[str], None]) -> None:
    """Go on with `text`: `write` gets what comes after it, in parts, as soon as they are whole words or lines. model,
    words: of transformers; `sampling` has been checked."""
    ids_BT = torch.tensor([words(text).input_ids], dtype=torch.int64)
    transformers = quiet_transformers()
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    end = getattr(model.generation_config, "eos_token_id", None)
    end = words.eos_token_id if end is None else end
    config = transformers.GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
        bos_token_id=words.bos_token_id,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    torch.manual_seed(sampling.seed)
    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=torch.ones_like(ids_BT).to(model.device),
        generation_config=config,
        streamer=_streamer(transformers, words, write),
    )


def load(
    target: Path,
    *,
    step: int | None,
    trusted: bool,
    device: str,
    report: Callable[[str], None],
    lane: int | None = None,
) -> tuple[Any, Any]:
    """The model and tokenizer of a run, as its export would have them but in memory, or of a directory. Raises
    EvaluationError, ExportError and what `checkpoints.assemble` names."""
    if not (target / "run.toml").is_file():
        check_directory(target)
        for option, given in (("--step", step), ("--lane", lane)):
            if given is not None:
                raise EvaluationError(f"{option} goes with a run, and {target} has no run.toml; omit it")
        return load_directory(target, trusted=trusted, device=device)
    assembled = model_of_run(target, lane, step=step, report=report).found
    longest = getattr(assembled.architecture, "max_position_embeddings", None)
    words = portable_tokenizer(vocabulary_of_run(target, assembled), assembled.config, longest=longest)
    whole = with_boundaries(assembled, plain_model(assembled))
    say_tokens(whole, words)
    return on_device(in_memory(whole), device), words


def _streamer(transformers: Any, words: Any, write: Callable[[str], None]) -> Any:
    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            write(text)

    return Streamer(words, skip_prompt=True, skip_special_tokens=True)
