"""What is printed of a run while it trains: a live progress bar.

On a terminal the bar is redrawn in place; where the output is a file or a pipe, a plain line is written at each tenth
of the run, so that a log stays readable. Both show the same figures, from the same records that stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .figures import StageFigures, together
from .lanes import node_name
from .wording import plain


class RunDisplay:
    """Use as a context manager; call `update` with the figures of all stages. resumes: of a run that goes on, how many
    processes of stage 0 were there before; from which step it goes on is said when the next one knows."""

    def __init__(self, console: Console, *, steps: int, resumes: int | None = None) -> None:
        self._console, self._steps, self._resumes = console, steps, resumes
        self._progress: Progress | None = None
        self._shown = -1
        self._next_line = 0
        self._unsaved_said = False
        self.text = ""

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("starting the stages", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, stages: Sequence[StageFigures]) -> None:
        """As of one poll; stage 0 of the lane that has done least leads. Nothing is shown until all have finished a
        step, but for the first checkpoint that could not be written."""
        for stage in stages:
            if stage.unsaved and not self._unsaved_said:
                self._unsaved_said = True
                name = node_name(stage.stage, stage.lane, stage.lanes)
                self.warn(f"{name}: {stage.unsaved}; training goes on")
        heads = _heads(stages)
        done = min(head.completed for head in heads)
        if self._resumes is not None:
            restored = [head.restored for head in heads if head.restored is not None]
            if any(head.lives <= self._resumes for head in heads) or len(restored) < len(heads):
                return  # what is known is of the processes before
            self._resumes, self._shown = None, min(restored)
            for line in _resumed(restored, self._steps):
                self._console.print(line, highlight=False, soft_wrap=True)
        if any(stage.loss is None for stage in stages) or done == self._shown:
            return
        self._shown = done
        self.text = describe(stages)
        if self._progress:
            self._progress.update(self._task, completed=done, description=self.text)
        elif done >= self._next_line or done == self._steps:
            self._console.print(f"step {done}/{self._steps}  {self.text}", highlight=False, soft_wrap=True)
            self._next_line = done + max(1, self._steps // 10)

    def warn(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(f"warning: {plain(line)}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _heads(stages: Sequence[StageFigures]) -> list[StageFigures]:
    """The first stage of every lane."""
    heads: dict[int, StageFigures] = {}
    for stage in stages:
        heads.setdefault(stage.lane, stage)
    return list(heads.values())


def _resumed(restored: Sequence[int], steps: int) -> list[str]:
    """A line, or one for each lane where they go on from different steps."""
    if len(set(restored)) == 1:
        return [_resumes_after(restored[0], steps)]
    return [f"lane {lane} {_resumes_after(done, steps)}" for lane, done in enumerate(restored)]


def _resumes_after(done: int, steps: int) -> str:
    if not done:
        return f"begins again with step 1 of {steps}: there is no checkpoint that all stages have"
    nothing = "" if done < steps else "; nothing is left to do: more --steps go on"
    return f"resumes after step {done} of {steps}{nothing}"


def describe(stages: Sequence[StageFigures]) -> str:
    """`loss 5.123  1520 tokens/s  1051 bytes/token  ratio 0.97x`, of all processes that a stage has had; of several
    lanes the mean loss, the tokens/s of all together, and what crosses between them."""
    heads = _heads(stages)
    loss = sum(head.loss or 0.0 for head in heads) / len(heads)
    text = f"loss {loss:.3f}  {together(heads):.0f} tokens/s"
    moved, tokens = sum(stage.moved_bytes for stage in stages), sum(head.dense_tokens for head in heads)
    if moved and tokens:
        ratio = sum(stage.dense_bytes for stage in stages) / moved
        text += f"  {moved / tokens:.0f} bytes/token  ratio {ratio:.2f}x"
    if len(heads) > 1:
        text = f"{len(heads)} lanes: {text}"
        if (averaging := sum(stage.averaging_bytes for stage in stages)) and tokens:
            text += f"  averaging {averaging / tokens:.0f} bytes/token"
    return text
