"""Loss, perplexity and bits a byte of a model on a text.

The text is one row of tokens, cut into windows as long as those of training; a token is predicted from what is before
it in its window. The loss is the mean over tokens, in nats, and its exponential the perplexity. Both depend on the
tokenizer: fewer, longer tokens are harder each. Bits a byte do not: the same sum of nats, in bits, over the bytes of
the text (UTF-8). So models with different tokenizers can be compared by those alone.

Why not windows that overlap, so that every token has much before it: the loss of training has none either, and half
the work would be done twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .subject import EvaluationError

LogitsOf = Callable[[np.ndarray, int], Tensor]  # ids (B, T+1), the batch's number -> logits (B, T, V)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLoss:
    """What a model loses on a text. loss: nats a token."""

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None for a text whose bytes nobody knows."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Windows of ids (B, T+1): inputs and, one further, targets. targets: how many of each row count, (B,); the rest of
    the row, and of the batch, is there to fill it."""

    ids_BS: np.ndarray
    targets_B: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.targets_B.sum())


def windows(documents: Iterable[np.ndarray], *, length: int, begin_id: int, batch_size: int) -> Iterator[Batch]:
    """A text of joined documents in batches of `batch_size` windows of `length` targets; every id is one target, the
    first behind `begin_id`."""
    rows: list[np.ndarray] = []
    counts: list[int] = []
    held = np.array([begin_id], dtype=np.int64)
    for ids in documents:
        held = np.concatenate([held, ids.astype(np.int64)])
        start = 0
        while len(held) - start > length:
            rows.append(held[start : start + length + 1])
            counts.append(length)
            start += length
            if len(rows) == batch_size:
                yield _batch(rows, counts, length, batch_size)
                rows, counts = [], []
        held = held[start:]
    if len(held) > 1:
        rows.append(held)
        counts.append(len(held) - 1)
    if rows:
        yield _batch(rows, counts, length, batch_size)


def _batch(rows: list[np.ndarray], counts: list[int], length: int, batch_size: int) -> Batch:
    ids_BS = np.zeros((batch_size, length + 1), dtype=np.int32)
    targets_B = np.zeros(batch_size, dtype=np.int64)
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids_BS[place, : len(row)] = row
        targets_B[place] = count
    return Batch(ids_BS, targets_B)


def loss_sum(logits_BTV: Tensor, batch: Batch) -> float:
    """Nats of the targets that count. Of a full batch the very sum that the last stage computes in training."""
    targets_BT = torch.from_numpy(batch.ids_BS.astype(np.int64))[:, 1:]
    length = targets_BT.shape[1]
    if batch.tokens == targets_BT.numel():
        return float(F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum"))
    lost_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    counts = torch.arange(length) < torch.from_numpy(batch.targets_B)[:, None]
    return float(lost_BT[counts].double().sum())


def text_loss(logits_of: LogitsOf, batches: Iterable[Batch], bytes_of: Callable[[], int]) -> TextLoss:
    """Over all batches; bytes_of: of the text, asked for once they are read. Raises EvaluationError for an empty text
    and for a model whose loss is not finite."""
    total, tokens = 0.0, 0
    for number, batch in enumerate(batches):
        total += loss_sum(logits_of(batch.ids_BS, number), batch)
        tokens += batch.tokens
    if not tokens:
        raise EvaluationError("the text is empty; give one with --data")
    if not math.isfinite(total):
        raise EvaluationError("the loss is not finite: the model's weights are damaged, or it diverged in training")
    return TextLoss(loss=total / tokens, tokens=tokens, bytes=bytes_of())


def bytes_of_ids(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of the text that these ids spell, special tokens apart. Exact for a byte-level tokenizer, in which a
    character of a token is a byte; of others it is what the tokenizer decodes."""
    numbers = [int(each) for each in ids]
    if type(tokenizer.decoder).__name__ == "ByteLevel":
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return sum(len(tokenizer.id_to_token(each) or "") for each in numbers if each not in special)
    return len(tokenizer.decode(numbers, skip_special_tokens=True).encode())
