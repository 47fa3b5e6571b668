"""One evaluation, as `thinpipe eval` does it: of a run's checkpoint or of a directory, on text and on questions.

A run is measured twice on text: with its boundaries as they were trained, rounded by the wire, and without the
rounding, as an export computes. Questions are put to the model without it, since their texts have other lengths than
the messages of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoints.plain_projections import model_of_run
from ..config_sections import DataSection
from ..data import open_documents, read_vocabulary
from ..preparation import prepare_corpus
from ..run_corpus import check_trained_on, vocabulary_of_run
from .chain import Chain
from .choices import read_questions, score
from .subject import Directory, EvaluationError, Subject, check_directory, check_ids
from .text_loss import Batch, LogitsOf, TextLoss, bytes_of_ids, text_loss, windows

if TYPE_CHECKING:
    from ..data import Vocabulary

LENGTH = 1024  # tokens in a window of a directory's model, if its context has as many
BATCH_TOKENS = 4096  # of a directory's model
Progress = Callable[[int], None]  # windows so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure. data: the text, by the names that data.source has; None: the run's held-out part. choices: a
    file of questions. step: of a run's checkpoint; None: the newest. lane: of a run, as `run_lanes.chosen_lane`.
    length: of windows; None: as trained."""

    data: str | None = None
    text_field: str = "text"
    choices: Path | None = None
    step: int | None = None
    lane: int | None = None
    length: int | None = None
    trusted: bool = False
    device: str = "cpu"


def evaluate(target: Path, asked: Asked, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure the run or the directory `target`. Returns what `--json` prints; `report` gets a line of what is damaged.

    Raises EvaluationError and what `checkpoints.assemble` and `preparation.BAD_INPUT` name.
    """
    questions = read_questions(asked.choices) if asked.choices else None
    if (target / "run.toml").is_file():
        if asked.device != "cpu" or asked.trusted:
            raise EvaluationError(f"{target} is a run; --device and --trust-code are for a directory of transformers")
        subject, found = _run(target, asked, report)
    else:
        subject, found = _directory(target, asked, with_text=questions is None or asked.data is not None)
    if questions is not None:
        scored = score(subject, questions)
        found["choices"] = {
            "file": str(asked.choices),
            "questions": scored.questions,
            "right": scored.right,
            "right_error": scored.error(scored.right),
            "right_per_byte": scored.right_per_byte,
            "right_per_byte_error": scored.error(scored.right_per_byte),
            "cut": scored.cut,
        }
    return found


def _run(run: Path, asked: Asked, report: Callable[[str], None]) -> tuple[Subject, dict[str, Any]]:
    taken = model_of_run(run, asked.lane, step=asked.step, report=report)
    assembled, config, lane = taken.found, taken.found.config, taken.lane
    vocabulary = vocabulary_of_run(run, assembled)
    chain = Chain(assembled, vocabulary.tokenizer, begin_id=vocabulary.end_id, lane=lane)
    length = config.data.sequence_length
    if asked.length not in (None, length):
        raise EvaluationError(f"--sequence-length {asked.length}: messages of this run are of {length} tokens; omit it")
    if asked.data is None:
        own = config.data.model_copy(update={"tokenizer": vocabulary.path})  # whatever would be made of the text here
        corpus = prepare_corpus(config.model_copy(update={"data": own}))
        check_trained_on(corpus, run, assembled, "put the run's own there, or say which one to measure on with --data")
        batches = [
            _whole(corpus.heldout_batch(number, config.microbatch_size))
            for number in range(config.evaluation_microbatches)
        ]
        name = f"the held-out part of {corpus.name}"

        def rows() -> Iterator[Batch]:
            yield from batches

        def size() -> int:
            return sum(bytes_of_ids(vocabulary.tokenizer, row) for each in batches for row in each.ids_BS[:, 1:])
    else:
        text = _Text(config.data.model_copy(update=_source(asked)), vocabulary, chain)
        name, size = text.name, text.bytes

        def rows() -> Iterator[Batch]:
            return windows(text, length=length, begin_id=vocabulary.end_id, batch_size=config.microbatch_size)

    def exact(ids_BS: np.ndarray, _: int) -> torch.Tensor:
        return chain.logits(torch.from_numpy(ids_BS.astype(np.int64))[:, :-1])

    measured: list[tuple[str, LogitsOf]] = [("without rounding", exact)]
    if chain.silent:
        places = ", ".join(map(str, chain.silent))
        report(
            f"nothing has been sent yet over what the conversion made (boundary {places}), so what rounding costs is "
            "not known; thinpipe up --resume takes the first step"
        )
    elif config.pipeline.stages > 1:
        measured.insert(0, ("as trained, rounded", chain.rounded_logits))
    results = [_result(words, text_loss(logits_of, rows(), size)) for words, logits_of in measured]
    of_lane = {"lane": lane} if config.lanes.count > 1 else {}
    return chain, _found(run, name, length, results) | {"step": assembled.completed, **of_lane}


def _directory(directory: Path, asked: Asked, *, with_text: bool) -> tuple[Subject, dict[str, Any]]:
    check_directory(directory)
    for option, given in (("--step", asked.step), ("--lane", asked.lane)):
        if given is not None:
            raise EvaluationError(f"{option} goes with a run, and {directory} has no run.toml; omit it")
    if with_text and asked.data is None:
        raise EvaluationError(f"{directory} is no run and has no held-out text of its own; give one with --data")
    subject = Directory(directory, trusted=asked.trusted, device=asked.device)
    if asked.data is None:
        return subject, _found(directory, None, None, [])
    length = asked.length or min(LENGTH, subject.context)
    if length > subject.context:
        raise EvaluationError(f"--sequence-length {length} is above the model's context of {subject.context}; lower it")
    text = _Text(DataSection(**_source(asked)), read_vocabulary(directory), subject)
    batches = windows(text, length=length, begin_id=subject.begin_id, batch_size=max(1, BATCH_TOKENS // length))

    def logits_of(ids_BS: np.ndarray, _: int) -> torch.Tensor:
        return subject.logits(torch.from_numpy(ids_BS.astype(np.int64))[:, :-1])

    return subject, _found(
        directory, text.name, length, [_result("as loaded", text_loss(logits_of, batches, text.bytes))]
    )


def _source(asked: Asked) -> dict[str, Any]:
    return {"source": asked.data, "text_field": asked.text_field, "format": "auto"}


class _Text:
    """Documents as ids, again and again, each ended as those of training; and the bytes of what was read last."""

    def __init__(self, settings: DataSection, vocabulary: Vocabulary, subject: Subject) -> None:
        self.name, self._read = open_documents(settings)
        self._vocabulary, self._subject = vocabulary, subject
        self._bytes = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self._bytes = 0
        for text in self._read():
            self._bytes += len(text.encode("utf-8", "surrogatepass"))
            (ids,) = self._vocabulary.encode([text])
            check_ids(self._subject, ids)
            yield ids

    def bytes(self) -> int:
        return self._bytes


def _whole(ids_BS: np.ndarray) -> Batch:
    return Batch(ids_BS, np.full(len(ids_BS), ids_BS.shape[1] - 1))


def _result(words: str, measured: TextLoss) -> dict[str, Any]:
    return {
        "boundaries": words,
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
    }


def _found(target: Path, data: str | None, length: int | None, results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"model": str(target), "data": data, "sequence_length": length, "text": list(results), "choices": None}
