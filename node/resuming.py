"""Whether a run can be gone on with, and what is said of one that was broken off.

Only what all stages have of one step can be gone on from. Without such a checkpoint all stages would begin again at
step 0, with new weights, and write into the old records. That is right within a run, where the others wait for a stage
that came back before its first checkpoint; for a whole run that somebody asks to be resumed it is a fault: the
checkpoints are elsewhere, or are lost. So it is where they were written under other settings: each stage refuses those.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from ..protocol.greeting import TABLE_DIGEST
from ..sim.reports.liveness import liveness
from ..sim.reports.wording import counted
from .checkpoints.listing import other_format, steps_held
from .checkpoints.manifest import CheckpointError
from .config import RunConfig
from .preparation import resolve_architecture, state_digest
from .run_directory import LocalRunError
from .run_lanes import all_lanes

Place = tuple[RunConfig, Path]  # of a lane: its settings, and the directory of its records


def newest_common(config: RunConfig, out: Path, *others: Place) -> int | None:
    """The newest step of which every stage has a checkpoint, or its neighbour a copy, under these settings; None if
    there is none. others: lanes that cannot go on from another step than this one. Looks at manifests and lengths
    alone. Raises CheckpointError for a directory that cannot be listed, where stages have steps in common, but all
    under other settings, and where another version wrote what there is; and what `preparation.BAD_INPUT` names."""
    whose = {"run": config.run.name, "stages": config.pipeline.stages}
    directories = [own.checkpoint.path(place) for own, place in ((config, out), *others)]
    found = [of_stage for directory in directories for of_stage in steps_held(directory, **whose)]
    common = sorted(set.intersection(*map(set, found)), reverse=True)
    wanted = state_digest(config, resolve_architecture(config)) if common else ""
    for step in common:
        alike = set.intersection(*(of_stage[step] for of_stage in found))
        if wanted in map(_settings, alike):
            return step
    if common:
        raise CheckpointError(_of_others([of_stage[common[0]] for of_stage in found], common[0], wanted, directories))
    for directory in directories:
        if told := other_format(directory, **whose):
            raise CheckpointError(told)
    return None


def newest_of_each(config: RunConfig, out: Path) -> list[int | None]:
    """`newest_common` of each lane by itself; where lanes hold chunks, which go back together, of all at once."""
    lanes = all_lanes(config, out)
    units = [lanes] if config.context.method else [[lane] for lane in lanes]
    return [newest_common(*first, *others) for first, *others in units]


def _of_others(found: list[set[str]], step: int, wanted: str, directories: list[Path]) -> str:
    """What is wrong with the checkpoints after that step, which no configuration has in common. found: of the stages in
    the first directory, then of those in the next one."""
    stages = len(found) // len(directories)
    others = {number: each for number, each in enumerate(found) if wanted not in {_settings(one) for one in each}}
    number, there = next(iter(others.items()), (0, set[str]()))
    directory, stage = directories[number // stages], number % stages
    told = f"the checkpoints after {counted(step, 'step')} in {directory} cannot be gone on from"
    if not others:
        return f"{told}: the stages' token tables differ; remove those of the stages that were copied from elsewhere"
    whose = "all" if len(others) == len(found) else f"that of stage {stage}"
    return (
        f"{told}: {whose} of other settings, configuration hash {_settings(min(there))[:12]}… there, {wanted[:12]}… "
        "here; use the run.toml and the version that they were written with, or set checkpoint.directory to this run's"
    )


def _settings(configuration: str) -> str:
    return configuration.partition(TABLE_DIGEST)[0]


def check_checkpoints(config: RunConfig, out: Path) -> None:
    """Raises LocalRunError where steps were done and nothing is left to go on from."""
    done = max((stage["completed"] for stage in liveness(out, time.time()).stages), default=0)
    if not done:
        return
    try:
        newest = newest_of_each(config, out)
    except CheckpointError as error:
        raise LocalRunError(str(error), 2) from None
    if None in newest:
        own, place = all_lanes(config, out)[newest.index(None)]
        directory, steps, whose = own.checkpoint.path(place), counted(done, "step"), "all stages have"
        if config.context.method:
            whose = "all stages of all lanes have"
        raise LocalRunError(
            f"--resume {out}: {steps} done are on record, but {directory} has no checkpoint that {whose}; "
            "set checkpoint.directory to where they are, or begin anew with --overwrite",
            2,
        )


def interrupted(why: str, config: RunConfig, out: Path, *, begun: bool, one_process: bool = False) -> str:
    """The last line of a run that was ended from outside. begun: it had been started."""
    if not begun:
        return f"{why} before the run began; nothing was changed in {out}"
    done, of, where = liveness(out, time.time()).completed, config.run.steps, shlex.quote(str(out))
    line, how = f"{why} after {done} of {counted(of, 'step')}; all stages are stopped", one_process * " --one-process"
    try:
        newest = newest_of_each(config, out)
    except CheckpointError as error:
        return f"{line}; {error}"
    after = [step for step in newest if step is not None]
    if len(after) < len(newest):
        return f"{line}, and there is no checkpoint yet: it begins anew, with --overwrite"
    return f"{line}; thinpipe up --resume {where}{how} goes on after step {min(after)}"
