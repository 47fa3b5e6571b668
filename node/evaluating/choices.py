"""Questions with choices: which continuation of a context does the model hold most likely?

A question is a context and several continuations, of which one is right. The model answers nothing: each continuation
is scored by the log-probability of its tokens behind the context, and the highest score is the model's choice. Summed
log-probability favours short continuations; divided by the bytes of the continuation it does not. Both are reported, as
tables of zero-shot results do (acc and acc_norm of the Language Model Evaluation Harness, Gao et al. 2021).

As there, spaces at the end of a context count to the continuation, since tokenizers join a space to the word behind it,
and a context that is too long loses its beginning. One difference: a text here always begins behind the token that
texts of training began behind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..model.architecture import first_line
from .subject import EvaluationError, Subject, check_ids

BATCH_TOKENS = 4096  # in one call of the model, padding included


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """answer: the place of the right one in `choices`, from 0. where: its file and line, for people."""

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str = "a question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of questions whose right choice has the highest score, by summed log-probability and by log-probability a
    byte; cut: continuations whose context lost its beginning."""

    questions: int
    right: float
    right_per_byte: float
    cut: int

    def error(self, share: float) -> float:
        """The standard error of a share."""
        return math.sqrt(share * (1 - share) / self.questions)


def read_questions(path: Path) -> list[Question]:
    """The questions in a file of JSON lines. Raises EvaluationError with the number of a line that is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}; check --choices") from None
    found = [_question(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise EvaluationError(
            f'{path} holds no question; write one a line: {{"context": "...", "choices": ["...", "..."], "answer": 0}}'
        )
    return found


def _question(line: bytes, where: str) -> Question:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is not valid JSON: {str(error).splitlines()[0]}; mend or remove it") from None
    if not isinstance(row, dict):
        raise EvaluationError(f"{where} is no object with context, choices and answer; mend or remove it")
    context, choices, answer = (row.get(key) for key in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise EvaluationError(f"{where}: 'context' has to be a text; mend or remove it")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise EvaluationError(
            f"{where}: 'choices' has to be a list of two texts or more, none empty; mend or remove it"
        )
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise EvaluationError(
            f"{where}: 'answer' has to be the place of the right choice, from 0 to {len(choices) - 1}, not "
            f"{json.dumps(answer)[:40]}; mend or remove it"
        )
    for text in (context, *choices):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise EvaluationError(
                f"{where}: {_quoted(text)} has half a surrogate pair, which is no character; mend or remove it"
            ) from None
    return Question(context=context, choices=tuple(choices), answer=answer, where=where)


def _quoted(text: str) -> str:
    """Its beginning, so that spaces and line ends are seen."""
    return json.dumps(text[:40] + ("..." if len(text) > 40 else ""))


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One continuation: ids, of which the last `scored` are its own."""

    ids: list[int]
    scored: int
    cut: bool


def score(subject: Subject, questions: Sequence[Question]) -> Score:
    """Raises EvaluationError for a continuation that is longer than the model's context or has no token, and for a
    model whose scores are not finite."""
    rows = [_row(subject, question, choice) for question in questions for choice in question.choices]
    found = _logprobs(subject, rows)
    if not all(map(math.isfinite, found)):
        raise EvaluationError("the scores are not finite: the model's weights are damaged, or it diverged in training")
    logprobs = iter(found)
    right = right_per_byte = 0
    for question in questions:
        sums = [next(logprobs) for _ in question.choices]
        a_byte = [each / len(choice.encode()) for each, choice in zip(sums, question.choices, strict=True)]
        right += _best(sums) == question.answer
        right_per_byte += _best(a_byte) == question.answer
    count = len(questions)
    return Score(
        questions=count, right=right / count, right_per_byte=right_per_byte / count, cut=sum(row.cut for row in rows)
    )


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _row(subject: Subject, question: Question, choice: str) -> _Row:
    said = f"{question.where}: the choice {_quoted(choice)}"
    before, whole = (_ids(subject, text, question) for text in (question.context.rstrip(), question.context + choice))
    if whole == before:
        raise EvaluationError(
            f"{said} has no token, so it has no score: the tokenizer drops all of it; mend or remove it"
        )
    own = whole[len(before) :] or whole[-1:]  # a continuation that has melted into the last token
    ids = [subject.begin_id, *whole]
    try:
        check_ids(subject, ids)
    except EvaluationError as error:
        raise EvaluationError(f"{question.where}: {error}") from None
    if len(own) > subject.context:
        raise EvaluationError(
            f"{said} has {len(own)} tokens, and the model's context is {subject.context}; shorten or remove it"
        )
    return _Row(ids[-(subject.context + 1) :], len(own), len(ids) > subject.context + 1)


def _ids(subject: Subject, text: str, question: Question) -> list[int]:
    try:
        return subject.tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exception for a character that it has no token for
        raise EvaluationError(
            f"{question.where}: the tokenizer cannot encode {_quoted(text)}: {first_line(error)}; mend or remove it"
        ) from None


def _logprobs(subject: Subject, rows: Sequence[_Row]) -> list[float]:
    """Of each row's own tokens, summed; rows of like length are computed together."""
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    while order:
        longest = len(rows[order[0]].ids) - 1
        count = max(1, BATCH_TOKENS // longest)
        taken, order = order[:count], order[count:]
        ids_BT = torch.zeros(len(taken), longest, dtype=torch.int64)
        for place, number in enumerate(taken):
            inputs = rows[number].ids[:-1]
            ids_BT[place, : len(inputs)] = torch.tensor(inputs)  # what fills a row is behind all that is scored
        logits_BTV = subject.logits(ids_BT)
        for place, number in enumerate(taken):
            row = rows[number]
            end = len(row.ids) - 1
            logits_NV = logits_BTV[place, end - row.scored : end].double()
            targets_N = torch.tensor(row.ids[-row.scored :])
            found[number] = -float(F.cross_entropy(logits_NV, targets_N, reduction="sum"))
    return found
