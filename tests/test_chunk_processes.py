"""Chunks of the same sequences as processes: the bits of the same chunks in one process, over links with a cap, over
TLS, through a choice of subspaces, and with every byte of keys and values in the reports."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from thinpipe.node.one_process import OneProcess
from thinpipe.node.security.key_directory import init, issue
from thinpipe.sim.reports.lanes import is_context
from thinpipe.sim.reports.summary import CONTEXT

from .conftest import TinyConfig
from .real_faults import records
from .real_up import Up, ended
from .test_lane_processes import digests, ends, started

CHUNKS = {
    "run.steps": 6,
    "lanes.count": 2,
    "pipeline.stages": 2,
    "data.sequence_length": 48,
    "lanes.average": "gradients",
    "context.method": "full",
}
GRIDS: dict[str, dict[str, Any]] = {
    "full": {"codec.codec": "mapl:r=8,every=2", "pipeline.schedule": "zb", "context.in_flight": 2},
    "int8, three plain chunks": {
        "lanes.count": 3,
        "pipeline.stages": 1,
        "context.method": "full:format=int8,backward=int8",
        "context.order": "plain",
    },
    "a stage without layers": {"pipeline.cut": "4,0", "context.method": "mos:k=0.25,v=0.5,warm=2"},
    "mixture of subspaces": {
        "context.method": "mos:k=0.25,v=0.5,warm=2,fold=0.34,format=bf16",
        "lanes.average": "outer:every=2",
        "context.in_flight": 2,
        "link.link": "20mbit,5ms",
    },
}
GRIDS["mixture of subspaces in three chunks"] = GRIDS["mixture of subspaces"] | {"lanes.count": 3}


@pytest.mark.parametrize(
    "grid", [*(pytest.param(name, marks=() if name == "mixture of subspaces" else pytest.mark.slow) for name in GRIDS)]
)
def test_processes_are_one_process(up: Up, tiny: TinyConfig, tmp_path: Path, grid: str) -> None:
    config = tiny({**CHUNKS, **GRIDS[grid]})
    process, run = started(up, config, tmp_path)
    summary = ended(process)
    with closing(OneProcess(config)) as same:
        same.train()
    assert ends(run, config) == [[stage.state_sha256() for stage in lane.stages] for lane in same.lanes]
    for lane in same.lanes:
        for stage, expected in enumerate(lane.sent_to_lanes):
            links = records(run / f"lane-{lane.lane}", stage, "end")[-1]["links"]
            sent = [Counter(link["sent_bytes"]) for link in links if link.get("direction") == "context"]
            counted = [rows for name, rows in sorted(expected.items()) if is_context(name)]
            for ours, theirs in zip(sent, counted, strict=True):
                assert [ours[kind] for kind in CONTEXT] == [theirs[kind] for kind in CONTEXT]
                assert ours["framing"] == pytest.approx(theirs["framing"], rel=0.2)  # numbers are shorter or longer
                assert ours["evaluation"] == pytest.approx(theirs["evaluation"], rel=0.02)
    assert summary["context"]["context"] > 0
    assert summary["context"]["context_gradient"] > 0
    assert summary["context"]["bytes"] == sum(summary["context"][kind] for kind in ("context", "context_gradient"))


@pytest.mark.slow
def test_chunks_over_tls(up: Up, tiny: TinyConfig, tmp_path: Path) -> None:
    config, now = tiny({**CHUNKS, "run.steps": 3}), datetime.now(UTC)
    init(config.run.name, tmp_path / "authority", days=2, now=now)
    issue([0, 1], tmp_path / "authority", tmp_path / "keys", lanes=[0, 1], days=1, now=now)
    process, run = started(up, config, tmp_path, "--keys", str(tmp_path / "keys"))
    ended(process)
    assert ends(run, config) == digests(config)
    assert all(records(run / f"lane-{lane}", stage, "start")[0]["tls"] for lane in range(2) for stage in range(2))
