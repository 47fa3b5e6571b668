"""When lanes average: which rounds are made and used after which step. Pure arithmetic, the same on every node.

A round is *made* when the weights have taken so many steps, and *used* `delay` steps later. Fragments take turns: with
`every=20` and four of them there is a round every 5 steps. Where a run ends, every fragment has a last round that is
used at once, so that all lanes end with the same weights, and one of them is as good to take out as another.
"""

from __future__ import annotations

from dataclasses import dataclass

from .modes import AveragingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """number: from 0, in the order in which rounds are made. fragment: which part of the weights. made, used: steps
    completed by then; of gradients, the step under way included."""

    number: int
    fragment: int
    made: int
    used: int
    last: bool = False  # of its fragment, at the run's end


class RoundPlan:
    """The rounds of a run of `steps`."""

    def __init__(self, mode: AveragingMode, steps: int) -> None:
        self.fragments = mode.fragments
        self._stride, self._delay, self.steps = mode.every // mode.fragments, mode.delay, steps
        self._regular = steps // self._stride  # rounds at even distances, the last ones at the end maybe among them

    def made_at(self, completed: int) -> list[Round]:
        """The rounds that are made once `completed` steps are, in order."""
        regular = completed and completed % self._stride == 0
        rounds = [self._round(completed // self._stride - 1)] if regular and completed <= self.steps else []
        if completed == self.steps:
            had = {each.fragment for each in rounds}
            rest = [fragment for fragment in range(self.fragments) if fragment not in had]
            rounds += [
                Round(number=self._regular + place, fragment=fragment, made=completed, used=completed, last=True)
                for place, fragment in enumerate(rest)
            ]
        return rounds

    def under_way(self, completed: int) -> list[Round]:
        """The rounds made once `completed` steps are, or before, and used later, in order."""
        last = min(completed, self.steps) // self._stride
        first = max(0, completed - self._delay) // self._stride
        return [each for n in range(max(0, first - 1), last) if (each := self._round(n)).made <= completed < each.used]

    def used_at(self, completed: int) -> list[Round]:
        """The rounds that are used once `completed` steps are, in order. Those made before are used before the others
        are made: the same fragment may be among both."""
        before = [each for each in self.under_way(completed - 1) if each.used == completed] if completed else []
        return before + [each for each in self.made_at(completed) if each.used == completed]

    def made_of(self, fragment: int, completed: int) -> int:
        """How many rounds of this fragment were made once `completed` steps are."""
        regular = min(completed, self.steps) // self._stride
        own = (regular - fragment + self.fragments - 1) // self.fragments
        last = completed >= self.steps and not any(each.fragment == fragment for each in self._regular_at_end)
        return own + last

    @property
    def _regular_at_end(self) -> list[Round]:
        return [self._round(self._regular - 1)] if self.steps % self._stride == 0 else []

    def made_by(self, completed: int) -> int:
        """How many rounds are made once `completed` steps are."""
        return self.count if completed >= self.steps else completed // self._stride

    def used_before(self, number: int) -> int:
        """How many rounds a lane has used when it contributes to this one, or to one past the last."""
        if number >= self.count:
            return number
        made = self.round(number).made
        first = max(0, number - self._delay // self._stride - self.fragments - 1)
        return next(
            (n for n in range(first, number) if (each := self.round(n)).used > made or each.made == made), number
        )

    def first_after(self, completed: int) -> int:
        """Number of the first round that whoever goes on after `completed` steps may need."""
        if rounds := self.under_way(completed):
            return rounds[0].number
        return completed // self._stride if completed < self.steps else self.count

    @property
    def count(self) -> int:
        """Rounds of the whole run."""
        return self._regular + self.fragments - (self.steps % self._stride == 0)

    def round(self, number: int) -> Round:
        """That one. Raises IndexError past the last."""
        if not 0 <= number < self.count:
            raise IndexError(f"no round {number}: the run has {self.count}")
        if number < self._regular:
            return self._round(number)
        return next(each for each in self.made_at(self.steps) if each.number == number)

    def _round(self, number: int) -> Round:
        made = (number + 1) * self._stride
        used = min(made + self._delay, self.steps)
        last = made == self.steps
        return Round(number=number, fragment=number % self.fragments, made=made, used=used, last=last)
