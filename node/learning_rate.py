"""The schedule of learning rates: warm-up, a plateau, and a linear fall to zero at the run's end.

This is WSD (Hu et al., MiniCPM, arXiv 2404.06395). Unlike a cosine, a longer run shares all but the end with a shorter
one: a run that is given more steps before its rates fall computes what it would have computed with so many from the
start. One whose rates have fallen already goes on at the rates that the new length has at that step, so back at the
peak until the new end comes near. Such returns lose little (WSD-S, Wen et al., arXiv 2410.05192), and need no second
warm-up, since the moments of the optimizer are warm.

The lengths that a run had before are settings too (`run.extended`), and the rate is a function of the settings and the
step alone: a stage that is set back to a step before the change, and one process that does all from the start, take the
rates that were taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config_sections import OptimSection


def rate_factor(settings: OptimSection, step: int, total_steps: int) -> float:
    """The factor on all learning rates at `step`, from 0, of a run of `total_steps`: in 0..1.

    Rises as (step + 1) / warmup_steps, stays at 1, and falls linearly over the last `decay_fraction` of the run so that
    it would be 0 at `total_steps`, one step after the last. Where the two overlap, the smaller one holds.
    """
    warmup, decay = settings.warmup_steps, round(settings.decay_fraction * total_steps)
    rise = (step + 1) / warmup if warmup else 1.0
    left = total_steps - step
    fall = left / decay if decay else float(left > 0)
    return max(0.0, min(1.0, rise, fall))


class RateSchedule:
    """That of a run of `total_steps` whose length was changed on the way.

    extended: (after, length) ascending by `after`: the steps before `after` belong to a run of `length`.
    """

    def __init__(self, settings: OptimSection, total_steps: int, extended: Sequence[tuple[int, int]] = ()) -> None:
        self._settings, self._total_steps, self._extended = settings, total_steps, tuple(extended)

    def length(self, step: int) -> int:
        """Steps of the run that `step` belongs to."""
        return next((length for after, length in self._extended if step < after), self._total_steps)

    def factor(self, step: int) -> float:
        """As `rate_factor`."""
        return rate_factor(self._settings, step, self.length(step))

    @property
    def falls_from(self) -> int:
        """The first step of the final fall; the number of steps where there is none."""
        return self._total_steps - round(self._settings.decay_fraction * self._total_steps)
