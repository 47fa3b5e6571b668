"""Which sequences a lane draws in which microbatch."""

from __future__ import annotations

import numpy as np

from ...protocol.messages import Kind
from ..config import RunConfig
from . import Corpus


def draw(corpus: Corpus, config: RunConfig, kind: Kind, step: int, microbatch: int, lane: int = 0) -> np.ndarray:
    """The ids (B, T+1) of one microbatch of training or held-out text. Lanes take turns at the batches of the text, so
    that none is read twice."""
    if kind is Kind.EVALUATION:
        return corpus.heldout_batch(microbatch, config.microbatch_size)
    turn = step * config.lanes.count + lane
    return corpus.batch(turn, microbatch, microbatches=config.pipeline.microbatches, batch_size=config.microbatch_size)
