"""The held-out loss of a model of transformers: the same sequences and the same mean as in the run's own evaluations,
without what a wire rounds away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...sim.reports.lanes import lane_path
from ...sim.reports.summary import read_records
from ..config import RunConfig
from ..data import Corpus


@torch.no_grad()
def heldout_loss(model: Any, config: RunConfig, corpus: Corpus) -> float:
    """Mean loss of a token, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for number in range(config.evaluation_microbatches):
        ids_BS = torch.from_numpy(corpus.heldout_batch(number, config.microbatch_size)).to(model.device, torch.int64)
        logits_BTV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum").item()
        tokens += ids_BS[:, 1:].numel()
    return total / tokens


def recorded_loss(config: RunConfig, run: Path, lane: int, completed: int) -> float | None:
    """What that lane of the run found after so many steps, with its wire; where lanes hold chunks, what all found of
    the same sequences. None where one did not look then."""
    lanes = range(config.lanes.count) if config.context.method else [lane]
    found = [_of_lane(lane_path(run, each, config.lanes.count), completed) for each in lanes]
    known = [loss for loss in found if loss is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def _of_lane(place: Path, completed: int) -> float | None:
    found = [
        record["val_loss"]
        for record in read_records(place / "stage-0.jsonl")
        if record["event"] == "evaluation" and record["step"] == completed - 1
    ]
    return found[-1] if found else None
