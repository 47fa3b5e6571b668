"""Which schedule is quickest on given machines and links, by simulation: a depth (`rtt_ratio=auto`), or any order.

It is found once, by who starts a run, before the first step, and the run's settings have what was found. So all nodes
run the same order, and times that differ from machine to machine, or by chance, decide nothing later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...protocol.schedule import RTT_RATIO_MAX, ScheduleError
from ...protocol.sought_schedule import Sought, sought
from ...protocol.stage_orders import PREFIX
from ...sim.links.order_search import best_orders
from ...sim.links.pipeline import Rule, StageTimes, simulate
from ..config import ConfigError, RunConfig
from ..preparation import resolve_architecture
from ..schedule_file import names_a_file, schedule_setting
from .message_sizes import Sizes
from .stage_times import times_calibrated

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 18.0, RTT_RATIO_MAX)
AUTO_WITHIN = 1.003


def resolved_schedule(
    spec: str,
    config: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    *,
    rule: Rule = "duplex",
) -> str:
    """`spec`, or what it stands for. `rtt_ratio=auto`: the least depth that is within 0.3 % of the best, since more
    costs memory, and where a link is the bottleneck time too. `best`: the quickest of all depths of 1f1b and zb and of
    all orders that a search finds (`sim.links.order_search`), holding no more microbatches than zb:rtt_ratio=auto does,
    or than are allowed. Raises ConfigError for what cannot be found."""
    wanted = checked(spec, delay=config.pipeline.delay)
    if not wanted:
        return schedule_setting(spec)
    search = _Search(config, architecture, times, rule)
    return search.best(wanted.in_flight) if wanted.best else search.depth(wanted.plain)


def with_schedule(config: RunConfig, spec: str) -> RunConfig:
    """The run with the schedule that `spec` stands for on this machine. Raises what PLANNED names."""
    checked(spec, delay=config.pipeline.delay)  # before a microbatch is timed
    architecture = resolve_architecture(config)
    times = times_calibrated(config, architecture)
    return with_pipeline(config, schedule=resolved_schedule(spec, config, architecture, times))


def checked(spec: str, *, delay: int = 0) -> Sought | None:
    """What has to be found. delay: of gradients, in steps. Raises ConfigError where that is nonsense."""
    try:
        found = sought(spec)
    except ScheduleError as error:
        raise ConfigError(str(error)) from None
    if delay and ((found and found.best) or names_a_file(spec) or spec.startswith(PREFIX)):
        raise ConfigError(
            f"pipeline.delay = {delay} does not go with schedule '{spec:.40}': steps overlap where one alternates "
            "from a depth on; say gpipe, 1f1b or zb, or zb:rtt_ratio=auto"
        )
    return found


def with_pipeline(config: RunConfig, **changed: Any) -> RunConfig:
    """The same run with another cut, schedule or order of machines. Nothing is checked."""
    return config.model_copy(update={"pipeline": config.pipeline.model_copy(update=changed)})


class _Search:
    """The same machines and links under many schedules."""

    def __init__(
        self, config: RunConfig, architecture: PretrainedConfig, times: Sequence[StageTimes], rule: Rule
    ) -> None:
        self._config, self._times = config, times
        self._rule: Rule = rule
        self._stages, self._microbatches = config.pipeline.stages, config.pipeline.microbatches
        self._boundaries = [Sizes(config, architecture).boundary()] * (self._stages - 1)

    def depth(self, name: str) -> str:
        """The least depth of that kind of schedule that is as good as any."""
        found = list(self._depths(name, None))
        least = min(step_s for _, step_s in found)
        return next(schedule for schedule, step_s in found if step_s <= AUTO_WITHIN * least)

    def best(self, in_flight: int | None) -> str:
        """The quickest of all; of equals one with a name, and of those the least deep."""
        bound = in_flight or self._in_flight(self.depth("zb"))
        found = [*self._depths("1f1b", bound), *self._depths("zb", bound)]
        if self._config.context.in_flight != 2:  # orders are of single microbatches
            orders, step_s = best_orders(
                self._times, self._boundaries, microbatches=self._microbatches, in_flight=bound, rule=self._rule
            )
            found.append((orders.spec, step_s))
        return min(found, key=lambda one: one[1])[0]

    def _depths(self, name: str, bound: int | None) -> Iterator[tuple[str, float]]:
        """Each depth that holds no more than `bound`, and its seconds a step."""
        deepest = 0.0 if bound is None else (bound - 1) / max(1, self._stages - 1) - 1  # that the bound allows
        for ratio in sorted({*RATIOS, max(0.0, min(RTT_RATIO_MAX, math.floor(deepest * 1000) / 1000))}):
            spec = f"{name}:rtt_ratio={ratio:g}" if ratio else name
            if bound is None or self._in_flight(spec) <= bound:
                schedule = with_pipeline(self._config, schedule=spec).training_schedule
                every = (self._times, self._boundaries)
                asked = {"microbatches": self._microbatches, "rule": self._rule, "delay": self._config.pipeline.delay}
                yield spec, simulate(schedule, *every, **asked).step_s

    def _in_flight(self, spec: str) -> int:
        schedule = with_pipeline(self._config, schedule=spec).training_schedule
        return max(schedule.peak_in_flight(stage, self._stages, self._microbatches) for stage in range(self._stages))
