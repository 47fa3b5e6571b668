"""The tokenizer of a run as transformers knows one: the same ids for the same text, and which of them end a document.

The run coded its text without any special token but the one that ends a document, and began each document right behind
it. So that token is the end of a sequence, its padding, and where a text begins. What else a published tokenizer calls
special (`tokenizer_config.json` beside its file) is kept. Of a model that was trained from random weights, what a
tokenizer would put around a text by itself is taken out: the model has never seen it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..data import Vocabulary
from ..data.vocabulary import token_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KEPT = ("bos_token", "unk_token", "pad_token")


def portable_tokenizer(vocabulary: Vocabulary, config: RunConfig, *, longest: int | None) -> PreTrainedTokenizerFast:
    """`longest`: tokens that the model was made for."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = (vocabulary if config.model.pretrained else vocabulary.bare()).tokenizer
    end = tokenizer.id_to_token(vocabulary.end_id)
    special: dict[str, Any] = {"bos_token": end, "pad_token": end, **_published(vocabulary)}
    special["eos_token"] = end
    more = {} if longest is None else {"model_max_length": longest}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special, **more)


def _published(vocabulary: Vocabulary) -> dict[str, str]:
    """What the files beside a tokenizer.json say of it."""
    words = {name: token_in(vocabulary.said, name) for name in _KEPT}
    ids = vocabulary.tokenizer.token_to_id
    kept = {name: word for name, word in words.items() if word and ids(word) is not None}
    template = vocabulary.said.get("chat_template")
    return {**kept, **({"chat_template": template} if isinstance(template, str) else {})}
