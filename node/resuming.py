"""Whether a run can be gone on with, and what is said of one that was broken off.

Only what all stages have of one step can be gone on from. Without such a checkpoint all stages would begin again at
step 0, with new weights, and write into the old records. That is right within a run, where the others wait for a stage
that came back before its first checkpoint; for a whole run that somebody asks to be resumed it is a fault: the
checkpoints are elsewhere, or are lost.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from ..sim.reports.liveness import liveness
from ..sim.reports.wording import counted
from .checkpoints.kept_tokenizer import COPIES
from .checkpoints.listing import list_checkpoints
from .checkpoints.manifest import CheckpointError
from .config import RunConfig
from .run_directory import LocalRunError


def newest_common(config: RunConfig, out: Path) -> int | None:
    """The newest step of which every stage has a checkpoint, or its neighbour a copy; None if there is none. Looks at
    manifests and lengths alone. Raises CheckpointError."""
    stages = config.pipeline.stages
    found: list[set[int]] = [set() for _ in range(stages)]
    directory = config.checkpoint.path(out)
    for place in (directory, directory / COPIES):
        for row in list_checkpoints(place, run=config.run.name, stages=stages, thorough=False):
            for held in row["stages"]:
                if held["state"] == "ok":
                    found[held["stage"]].add(row["step"])
    return max(set.intersection(*found), default=None)


def check_checkpoints(config: RunConfig, out: Path) -> None:
    """Raises LocalRunError where steps were done and nothing is left to go on from."""
    done = max((stage["completed"] for stage in liveness(out, time.time()).stages), default=0)
    if not done:
        return
    try:
        newest = newest_common(config, out)
    except CheckpointError as error:
        raise LocalRunError(str(error), 2) from None
    if newest is None:
        directory, steps = config.checkpoint.path(out), counted(done, "step")
        raise LocalRunError(
            f"--resume {out}: {steps} done are on record, but {directory} has no checkpoint that all stages have; set "
            "checkpoint.directory to where they are, or begin anew with --overwrite",
            2,
        )


def interrupted(why: str, config: RunConfig, out: Path, *, begun: bool, swarm: bool) -> str:
    """The last line of a run that was ended from outside. begun: its processes had been started. swarm: with
    checkpoints."""
    if not begun:
        return f"{why} before the run began; nothing was changed in {out}"
    done, of, where = liveness(out, time.time()).completed, config.run.steps, shlex.quote(str(out))
    line = f"{why} after {done} of {counted(of, 'step')}; all stages are stopped"
    if not swarm:
        return f"{line}, and one process writes no checkpoints: it begins anew, with --overwrite"
    try:
        newest = newest_common(config, out)
    except CheckpointError:
        newest = None
    if newest is None:
        return f"{line}, and there is no checkpoint yet: it begins anew, with --overwrite"
    return f"{line}; thinpipe up --resume {where} goes on after step {newest}"
