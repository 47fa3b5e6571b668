"""A learned table as autograd sees it: a leaf for each version of it, and the gradient that they collect together.

A half computes with the table that it was given last, and a step's backwards belong to the one that its forwards
used. Where steps overlap (`pipeline.delay = 1`) the next step's table comes while the present step still has backwards
to do, so the leaf before the newest one collects until its step ends. What was collected is put by at each step's end,
whether steps overlap or not: so sums are made in one order, and a state taken between two steps can go on with it.
"""

from __future__ import annotations

from torch import Tensor


class TableLeaves:
    """learned: whether the table wants a gradient."""

    def __init__(self, *, learned: bool) -> None:
        self._learned = learned
        self.table: Tensor | None = None  # in use
        self._before: Tensor | None = None  # of a step that may have backwards to do
        self._gathered: Tensor | None = None

    def use(self, table: Tensor) -> None:
        """From now on forwards take this one, which nobody else holds."""
        if self._before is not None:
            self._put_by(self._before)
        self._before, self.table = self.table, table.requires_grad_(self._learned)

    def end_step(self) -> None:
        """All backwards of the step are done, and none of the next one."""
        for leaf in self._leaves:
            self._put_by(leaf)
        self._before = None

    def take(self) -> Tensor | None:
        """What was collected since the last call, if anything was."""
        for leaf in self._leaves:
            self._put_by(leaf)
        gathered, self._gathered = self._gathered, None
        return gathered

    @property
    def gathered(self) -> Tensor | None:
        """What `take` would give, and what is left where it is."""
        whole = self._gathered
        for leaf in self._leaves:
            if leaf.grad is not None:
                whole = leaf.grad if whole is None else whole + leaf.grad
        return whole

    def go_on(self, table: Tensor | None, gathered: Tensor | None) -> None:
        """With the table in use, and what was `gathered` of its gradient; nothing else is left."""
        self.table = self._before = None
        self._gathered = gathered
        if table is not None:
            self.use(table)

    @property
    def _leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self._before, self.table) if leaf is not None]

    def _put_by(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            self._gathered = leaf.grad if self._gathered is None else self._gathered + leaf.grad
            leaf.grad = None
