"""The views of a node's records that its settings ask for: Prometheus and TensorBoard.

A view must not end a run: one that fails (a full disk) is left out from then on, and that is reported once. Only a
fault that can be corrected before anything was built ends the node: an address for the figures that is in use. A node
that takes the place of a lost one goes on without them then, since the lost one may be asleep with its port.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from ...sim.reports.figures import StageFigures
from ...sim.reports.lanes import node_name
from ...sim.reports.metrics_address import MetricsAddress, MetricsAddressError
from ..config_sections import WatchSection


class View(Protocol):
    """Sees each record after it was written."""

    def take(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Watching:
    """The views of one stage, in one of so many lanes. replaces: it takes a lost one's place. Raises
    MetricsAddressError."""

    def __init__(
        self,
        settings: WatchSection,
        out: Path,
        *,
        stage: int,
        lane: int = 0,
        lanes: int = 1,
        replaces: bool = False,
    ) -> None:
        self._stage, self._lane, self._lanes = stage, lane, lanes
        self._views: list[View] = []
        if settings.prometheus:
            self._serve(settings.prometheus, replaces)
        if settings.tensorboard:
            self._write(out / "tensorboard" / f"stage-{stage}")

    def _serve(self, address: str, replaces: bool) -> None:
        from .prometheus_server import Exporter

        try:
            figures = StageFigures(self._stage, lane=self._lane, lanes=self._lanes)
            exporter = Exporter(figures, MetricsAddress.parse(address))
        except MetricsAddressError as error:
            if not replaces:
                raise
            self._say(f"{error}; goes on without")
            return
        name = node_name(self._stage, self._lane, self._lanes)
        print(f"{name} serves its figures at http://{exporter.endpoint}/metrics", flush=True)
        self._views.append(exporter)

    def _write(self, directory: Path) -> None:
        from .tensorboard_events import Events

        try:
            self._views.append(Events(directory, stage=self._stage))
        except OSError as error:
            self._say(f"no events for TensorBoard in {directory}: {error.strerror}; goes on without")

    def take(self, record: dict[str, Any]) -> None:
        """A record was written."""
        for view in tuple(self._views):
            try:
                view.take(record)
            except Exception as error:
                self._views.remove(view)
                self._say(f"{type(view).__name__} is left out from now on: {error!r}")

    def close(self) -> None:
        for view in self._views:
            try:
                view.close()
            except Exception as error:
                self._say(f"{type(view).__name__}: {error!r}")

    def _say(self, line: str) -> None:
        print(f"{node_name(self._stage, self._lane, self._lanes)}: warning: {line}", file=sys.stderr, flush=True)
