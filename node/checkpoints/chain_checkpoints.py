"""Checkpoints of a whole chain of stages in one process: the files that the nodes of a swarm would write, in the same
places.

So everything that reads checkpoints (an export, an evaluation, a new run from this one) knows no difference. Here all
stages are between the same two steps at the same time: nothing has to be agreed, and going on needs no rollback. They
are written on the thread that computes, which a reference can afford; why not in the background, as nodes do: a second
copy of all stages would have to fit into this one's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RunConfig
from ..preparation import state_digest
from ..stage import Stage
from .kept_tokenizer import keep_tokenizer
from .manifest import CheckpointError, Fingerprint
from .store import HELD_TIMES, CheckpointStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..run_corpus import RunCorpus

Written = Callable[[int, int, int, float], None]  # stage, completed steps, bytes, seconds
Failed = Callable[[int, str], None]  # stage, why


class ChainCheckpoints:
    """Of these stages, all of one lane, whose run's records are in `directory`. config: with that lane's own
    directories."""

    def __init__(
        self, config: RunConfig, architecture: PretrainedConfig, stages: Sequence[Stage], directory: Path
    ) -> None:
        self.every = config.checkpoint.every
        self._generation = 0  # of a swarm that this chain was before, if it was one
        self._stages, self._directory = stages, config.checkpoint.path(directory)
        self._stores = [
            CheckpointStore(
                self._directory,
                stage=stage.index,
                fingerprint=Fingerprint(
                    run=config.run.name,
                    configuration=state_digest(config, architecture, stage.token_table_digest),
                    stages=config.pipeline.stages,
                ),
                keep=config.checkpoint.keep,
            )
            for stage in stages
        ]

    def intact(self, report: Callable[[str], None]) -> set[int]:
        """Completed steps after which every stage has a checkpoint that is what it was; 0 is none of them. What is
        damaged is reported, a line each."""
        return set.intersection(*(set(store.newest_intact(HELD_TIMES * store.keep, report)) for store in self._stores))

    def restore(self, completed: int) -> None:
        """All stages go on from there. Raises CheckpointError, and StateError for a state that is none of theirs."""
        self._generation = max(store.manifest(completed).generation for store in self._stores)
        for stage, store in zip(self._stages, self._stores, strict=True):
            stage.restore(store.load(completed))
            stage.set_generation(self._generation)

    def of_text(self, text: RunCorpus, intact: Iterable[int]) -> RunCorpus:
        """Compare the run's text with what these checkpoints say of theirs, and say it in those that come. Raises
        DataError, and CheckpointError for a tokenizer that cannot be kept beside them."""
        first = self._stores[0]
        text = text.check([first.manifest(completed) for completed in sorted(intact)])
        if text.record:
            digests = {"corpus": text.record.corpus, "tokenizer": text.record.tokenizer}
            first.fingerprint = replace(first.fingerprint, **digests)
            if self.every:
                keep_tokenizer(self._directory, text.corpus.tokenizer_files)
        return text

    def write(self, on_written: Written, on_failed: Failed) -> None:
        """One of each stage, as it is between two steps. What cannot be written is told of, and training goes on."""
        for stage, store in zip(self._stages, self._stores, strict=True):
            began, completed = time.monotonic(), stage.completed
            try:
                size = store.write(stage.snapshot(), generation=self._generation, written_s=time.time())
            except CheckpointError as error:
                on_failed(stage.index, str(error))
                continue
            on_written(stage.index, completed, size, time.monotonic() - began)
