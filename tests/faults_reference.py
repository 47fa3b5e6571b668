"""The run that the deterministic tier disturbs: small, but with projector, anchors and dictionary changes in it."""

from __future__ import annotations

from typing import Any

from .cluster import Ended
from .in_memory import Outcome

STAGES, STEPS = 3, 6
FRAMES = 250  # that it takes undisturbed, or somewhat less
MAPL = {
    "codec.codec": "mapl:r=8,anchors=full,every=2,table=1",
    "codec.forward": "rvq:groups=2,codes=16,delta=robin/4",
    "codec.backward": "rvq:groups=4,codes=8,levels=1,delta=drift/2,encoding=int8",
}
SETTINGS: dict[str, Any] = {
    **MAPL,
    "run.steps": STEPS,
    "run.eval_every": 3,
    "model.width": 32,
    "model.layers": STAGES,
    "data.sequence_length": 16,
    "data.heldout_sequences": 4,
    "pipeline.stages": STAGES,
    "pipeline.batch_size": 4,
    "pipeline.microbatches": 2,
    "checkpoint.every": 1,
}


def assert_equal(ended: Ended, undisturbed: Outcome) -> None:
    """Every loss, the held-out loss and every bit of every stage."""
    assert ended.losses == undisturbed.losses, ended.said
    assert ended.val_losses == [values[-1] for values in undisturbed.val_losses]
    assert ended.state_sha256 == undisturbed.state_sha256, ended.said
