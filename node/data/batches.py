"""Which sequences a lane draws in which microbatch."""

from __future__ import annotations

import numpy as np

from ...protocol.messages import Kind
from ..config import RunConfig
from . import Corpus


def draw(corpus: Corpus, config: RunConfig, kind: Kind, step: int, microbatch: int, lane: int = 0) -> np.ndarray:
    """The ids (B, T+1) of one microbatch of training or held-out text. Lanes take turns at the batches of the text, so
    that none is read twice. Lanes that hold chunks draw the same sequences, and each takes its part of them, as
    `ChunkLayout.take` gives it."""
    layout = config.chunk_layout
    if kind is Kind.EVALUATION:
        return layout.take(corpus.heldout_batch(microbatch, config.microbatch_size), lane, config.ids_before)
    turn = step if layout.chunks > 1 else step * config.lanes.count + lane
    sizes = {"microbatches": config.pipeline.microbatches, "batch_size": config.microbatch_size}
    return layout.take(corpus.batch(turn, microbatch, **sizes), lane, config.ids_before)
