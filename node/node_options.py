"""What a node is told: the run's settings, where it and its neighbours listen, how it is to run, whom it reports to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RunConfig
from .run_records import MetricsWriter, Tracer
from .security.policy import PLAIN, Security
from .worker_thread import Reporter

if TYPE_CHECKING:
    from .discovery.membership import Membership


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where this node listens for the stage above and for higher lanes (None: it has neither), where the stage below
    is, and where its own stage is in each lower lane."""

    listen: str | None
    next: str | None
    lateral: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """How a node runs that is nobody else's business. out: for its records and checkpoints. run: the run's own
    directory, where that is another one because there are lanes. lane: which of them it is in. resume: take the stage's
    place in a run that has begun. data_changed: though the text is another one. security: how it listens and dials.
    membership: of one that finds the others by the DHT, and knows where the stage below is.
    """

    out: Path
    run: Path | None = None
    lane: int = 0
    trace: bool = False
    parent: int | None = None
    resume: bool = False
    data_changed: bool = False
    security: Security = PLAIN
    membership: Membership | None = None

    @property
    def home(self) -> Path:
        """The run's own directory, which has the record of the text."""
        return self.run or self.out


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSetup:
    """A node that hosts stage `stage`, and where what it does is written: records, a trace, and a line for each
    fault."""

    config: RunConfig
    stage: int
    addresses: Addresses
    options: NodeOptions
    metrics: MetricsWriter
    tracer: Tracer
    on_fault: Reporter
