"""Seconds a step of a recipe on a stated machine and over a stated link: what `thinpipe plan` says of it.

The runs of a comparison are small, and as fast as this machine is; their steps say nothing of the step of a larger
model on better machines. So the seconds come from an emulated machine (`150m@4x66tflops`), at whose width and batch the
codec's messages are sized. Options of a codec are taken as they are: r=32 is an eighth of width 256 and 4 % of 768.

A step is of as many tokens for every recipe, there as in the runs. So each of R lanes has a chain of such machines and
an Rth of the batch, or, where they hold chunks, an Rth of each sequence; and a step lasts as long as it does with what
crosses between lanes.
"""

from __future__ import annotations

from typing import Any

from ...protocol.schedule import ScheduleError
from ...protocol.sought_schedule import plain_schedule
from ..config import ConfigError, RunConfig
from ..config_file import merge, parse_config
from ..measuring.emulated_machine import EmulatedMachine
from ..measuring.plan import PLANNED, planned
from ..preparation import resolve_architecture


def at_pace(machine: str, schedule: str) -> dict[str, Any]:
    """What holds for all recipes: the emulated machine and the shape of a step there. Raises ConfigError."""
    emulated = EmulatedMachine.parse(machine)
    settings = {**emulated.settings(), "pipeline.schedule": plain_schedule(schedule)}
    settings |= {"compute.emulate": machine, "checkpoint.every": 0}  # who computes nothing has no state to keep
    try:
        config = parse_config(merge({}, settings))
        width = resolve_architecture(config).hidden_size
    except (*PLANNED, ScheduleError) as error:
        raise ConfigError(str(error)) from None
    return {
        "machine": machine,
        "stages": emulated.stages,
        "width": width,
        "tokens_per_step": config.tokens_per_step,
        "microbatches": config.pipeline.microbatches,
        "schedule": schedule,
    }


def seconds_a_step(run: RunConfig, link: str, machine: str, schedule: str) -> dict[str, Any]:
    """The figures of a plan that time follows from. run: whose codec, lanes, chunks and delay. Raises ConfigError."""
    emulated, codec = EmulatedMachine.parse(machine), run.codec.model_dump(exclude_none=True)
    settings = {**emulated.settings(), "link.link": link, "pipeline.delay": run.pipeline.delay}
    settings |= {f"codec.{name}": value for name, value in codec.items()}
    if run.lanes.count > 1:
        settings |= {"lanes.count": run.lanes.count, "lanes.average": run.lanes.average}
    if run.context.method:
        context = run.context.model_dump(exclude_none=True)
        settings |= {f"context.{name}": value for name, value in context.items()}
        settings["compute.dtype"] = run.compute.dtype  # in which keys and values cross, if nothing else is said
    else:
        settings |= _part_of_batch(settings, run.lanes.count)
    try:
        figures, _ = planned(parse_config(merge({}, settings)), emulated, None, schedule=schedule, rule="duplex")
    except (*PLANNED, ScheduleError) as error:
        raise ConfigError(str(error)) from None
    if (rounds := figures["lanes"]) is not None:
        slowest = f"averaging of stage {rounds['bottleneck']}"
        figures |= {name: rounds[name] for name in ("step_s", "tokens_per_s")}
        figures |= {"bottleneck": slowest} if rounds["advice"] else {}
    if (chunks := figures["chunks"]) is not None:
        figures["bottleneck"] = chunks["bounded_by"]
    kept = ("step_s", "tokens_per_s", "schedule", "bottleneck", "ratio", "bytes_per_microbatch")
    return {name: figures[name] for name in kept}


def _part_of_batch(settings: dict[str, Any], lanes: int) -> dict[str, Any]:
    """What each lane has of the batch and its microbatches. Raises ConfigError."""
    found: dict[str, Any] = {}
    for name in ("pipeline.batch_size", "pipeline.microbatches"):
        if settings[name] % lanes:
            raise ConfigError(
                f"{lanes} lanes do not divide the {settings[name]} of {name} that a step of --pace has; choose 2, "
                "4 or 8 lanes"
            )
        found[name] = settings[name] // lanes
    return found
