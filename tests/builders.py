"""What many tests need one of: who a node is to its neighbour, and what it says of itself in the DHT."""

from __future__ import annotations

from typing import Any

from thinpipe.protocol.greeting import NodeIdentity
from thinpipe.protocol.node_record import NodeRecord, NodeState


def identity(stage: int, stages: int = 2, **other: Any) -> NodeIdentity:
    """Of the process that serves `stage`; two of the same arguments are the same process."""
    known = {"run_id": "r", "configuration": "c", "incarnation": 100 + stage}
    return NodeIdentity(stage=stage, stages=stages, **{**known, **other})


def node_record(**other: Any) -> NodeRecord:
    """Of the second of four stages, which trains."""
    return NodeRecord(
        **{
            "run": "demo",
            "configuration": "d1" * 32,
            "stage": 1,
            "stages": 4,
            "endpoint": "192.0.2.7:7001",
            "state": NodeState.TRAINING,
            "incarnation": 7,
            "claimed_at_s": 1.7e9,
            "generation": 2,
            "completed_steps": 40,
            "committed_steps": 30,
            "tokens_per_s": 1234.5,
            **other,
        }
    )
