"""Whether the checkpoints of a run that was broken off are gone, as far as its directory shows.

Stages that are started again agree on the newest step that all of them have, and if there is none on step 0. That is
right where the run was lost before its first checkpoint, and needs nobody. Where the records of all stages say that
checkpoints were written it is a fault, which somebody may be able to mend: a disk that is not mounted, a directory that
was moved. Who starts a stage unattended (`thinpipe supervise`) asks here first. Nothing of it needs torch, because such
a process may stay for days. Whether the checkpoints are of the run's settings is the nodes' own affair.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...sim.reports.top_data import Directory, TopError
from ..config import RunConfig
from .listing import steps_held


def lost_line(config: RunConfig, run: Path, now_s: float) -> str | None:
    """What is wrong, in one line, if all stages of the run in `run` have written checkpoints and none is left that all
    of them have. None also where checkpoints are kept outside of the run's directory, where all steps are done, and
    where the records of some stages are elsewhere. now_s: seconds since 1970. Raises CheckpointError for a directory
    that cannot be listed."""
    stages, directory = config.pipeline.stages, config.checkpoint.path(run)
    if not Path(os.path.abspath(directory)).is_relative_to(os.path.abspath(run)):
        return None  # each machine may have one of its own there
    try:
        swarm = Directory(run).look(now_s)
    except TopError:  # nobody has begun
        return None
    seen = [each.figures for stage, each in swarm.stages.items() if stage < stages]
    written = [figures.committed or 0 for figures in seen]
    if len(seen) < stages or not min(written) or min(figures.completed for figures in seen) >= config.run.steps:
        return None
    held = steps_held(directory, run=config.run.name, stages=stages)
    for step in set.intersection(*map(set, held)):
        if set.intersection(*(of_stage[step] for of_stage in held)):
            return None
    return (
        f"{run}: all stages have written checkpoints, up to step {min(written)}, but {directory} has none that all of "
        "them have; put them back there, or name another directory to begin anew"
    )
