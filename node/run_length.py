"""A run that is given another number of steps when it goes on: what may be given, what is written down, what is said.

The length of a run is a setting that all its nodes compare, and the rates near the end follow from it
(`node.learning_rate`). So a new length is written into run.toml before any node starts, with the step from which it
holds. Checkpoints leave the length out of what they have in common with their run (`RunConfig.of_any_length`), so those
of the earlier length are taken.
"""

from __future__ import annotations

from pathlib import Path

from .config import ConfigError, RunConfig
from .learning_rate import RateSchedule
from .resuming import newest_of_each


def steps_done(config: RunConfig, out: Path) -> int:
    """After how many steps the run in `out` can go on, by the manifests of its checkpoints and of neighbours' copies; 0
    without any that all stages have; of the lane that has done most, since what a lane does again is as it was. Raises
    what `resuming.newest_of_each` does."""
    return max(newest or 0 for newest in newest_of_each(config, out))


def with_length(config: RunConfig, done: int, steps: int) -> RunConfig:
    """The settings of the run when it has `steps` from the end of step `done` on. Raises ConfigError for fewer than are
    done, and for none that is left to do."""
    if steps < done:
        raise ConfigError(f"{done} steps are done, and {steps} are fewer; give more than {done}")
    if steps == done:
        raise ConfigError(f"all {done} steps are done, and {steps} are no more; give more than {done}")
    if steps == config.run.steps:
        return config
    if config.lanes.count > 1:  # rounds are planned for a length, and the last ones were held at its end
        raise ConfigError(
            f"a run of {config.lanes.count} lanes keeps its {config.run.steps} steps; begin a new one from it, "
            "thinpipe up --from RUN"
        )
    before = _rates(config)
    kept = [(after, length) for after, length in config.run.extended if after < done]
    extended = (*kept, (done, before.length(done - 1))) if done else ()
    changed = RateSchedule(config.optim, steps, extended)
    plain = RateSchedule(config.optim, steps)
    if all(plain.factor(step) == changed.factor(step) for step in range(done)):
        extended = ()  # the same run as if it had been as long from the start
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "extended": extended})})


def length_line(before: RunConfig, now: RunConfig) -> str | None:
    """What becomes of the learning rates, in one line; None where the length is what it was."""
    if now.run.steps == before.run.steps:
        return None
    rates = _rates(now)
    falls = rates.falls_from
    end = f"they fall from step {falls + 1} to step {now.run.steps}" if falls < now.run.steps else "they do not fall"
    told = f"{now.run.steps} steps instead of {before.run.steps}: learning rates"
    if not now.run.extended:
        return f"{told} are those of a run that had so many from the start; {end}"
    done = now.run.extended[-1][0]
    last, first = rates.factor(done - 1), rates.factor(done)
    return f"{told} were {last:.2g} of their peak in step {done} and are {first:.2g} of it in step {done + 1}; {end}"


def _rates(config: RunConfig) -> RateSchedule:
    return RateSchedule(config.optim, config.run.steps, config.run.extended)
