"""What a stage of a swarm writes into its records: after each step, and at the end of its last generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..sim.reports.summary import dense_bytes_one_way
from .lanes.held_rounds import HeldRounds
from .links.link import Link
from .run_records import Lap, MetricsWriter, peak_rss_bytes, rss_bytes
from .run_totals import RunTotals
from .stage import Stage


class StepRecords:
    """Of one generation. links: all that move tensors in it; boundaries: how many of them join stages; tokens: of a
    step."""

    def __init__(
        self,
        metrics: MetricsWriter,
        stage: Stage,
        totals: RunTotals,
        links: Sequence[Link],
        rounds: HeldRounds | None,
        *,
        generation: int,
        tokens: int,
        boundaries: int,
    ) -> None:
        self._metrics, self._stage, self._totals = metrics, stage, totals
        self._links, self._rounds = links, rounds
        self._generation, self._tokens, self._boundaries = generation, tokens, boundaries

    def step(self, step: int, loss: float, grad_norm: float, lap: Lap, measures: Mapping[str, float]) -> None:
        """measures: of the stage's codecs."""
        spent, seconds = self._totals.step(lap), lap.seconds
        self._metrics.write(
            "step",
            step=step,
            generation=self._generation,
            loss=loss,
            grad_norm=grad_norm,
            tokens=self._tokens,
            seconds=round(seconds, 6),
            cpu_s=round(lap.cpu_s, 6),
            loop_cpu_s=round(lap.thread_cpu_s, 6),
            tokens_per_s=round(self._tokens / seconds, 3),
            sent_bytes={link.name: dict(link.sent) for link in self._links}
            | (self._rounds.sent_bytes() if self._rounds else {}),
            dense_bytes=self._boundaries * dense_bytes_one_way(width=self._stage.width, tokens=self._tokens),
            links=[self._totals.step_record(link, seconds) for link in self._links]
            + (self._rounds.step_records(seconds) if self._rounds else []),
            rss_bytes=rss_bytes(),
            codec=measures,
            dictionaries=self._stage.dictionaries(),
            **spent,
        )

    def end(self, state_sha256: str) -> None:
        """All steps are done, here. state_sha256: of the stage."""
        self._metrics.write(
            "end",
            stage=self._stage.index,
            layers=len(self._stage.layers),
            parameters=self._stage.parameters(),
            steps=self._stage.completed,
            train_s=round(self._totals.train_s, 6),
            cpu_s=round(self._totals.cpu_s, 6),
            **self._totals.watch.total,
            peak_rss_bytes=peak_rss_bytes(),
            state_bytes=self._stage.state_bytes(),
            state_sha256=state_sha256,
            links=[self._totals.record(link) for link in self._links]
            + (self._rounds.records() if self._rounds else []),
        )
