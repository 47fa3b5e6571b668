"""What `thinpipe bench` is asked to measure: a grid of cells, and the settings of each.

A cell is one codec, schedule, number of lanes or chunks, and link, on an emulated machine or as fast as this one is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...sim.links.shaper import LinkProfile
from ..codec_words import codec_settings
from ..config import ConfigError, RunConfig
from ..config_file import merge, parse_config
from .emulated_machine import EmulatedMachine

LIMIT_S = 600.0  # of one cell
WINDOW_S = 5.0
UNCAPPED = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchGrid:
    """What is to be measured. paces: see `EmulatedMachine`. free_running: PRESET@STAGES. codecs: CODEC [FORWARD
    [BACKWARD]] each. lanes: numbers of lanes; averages: how several of them average; chunks: numbers of lanes that hold
    parts of the same sequences; contexts: how those share keys and values. settings: of all cells alike."""

    machines: tuple[str, ...] = ()
    free_running: tuple[str, ...] = ()
    codecs: tuple[str, ...]
    links: tuple[str, ...]
    schedules: tuple[str, ...]
    settings: dict[str, Any]
    lanes: tuple[int, ...] = ()
    averages: tuple[str, ...] = ()
    chunks: tuple[int, ...] = ()
    contexts: tuple[str, ...] = ()
    window_s: float = WINDOW_S
    limit_s: float = LIMIT_S

    def cells(self) -> Iterator[PlannedCell]:
        """The uncapped cell of each codec, schedule and number of lanes before those with links, which are compared
        with it. Raises ConfigError."""
        modes = [(machine, True) for machine in self.machines] + [(mode, False) for mode in self.free_running]
        for mode, emulated in modes:
            for codec in self.codecs:
                for schedule in self.schedules:
                    for lanes in self._lanes():
                        for link in (UNCAPPED, *(link for link in self.links if link != UNCAPPED)):
                            yield PlannedCell.of(self, mode, codec, schedule, link, emulated=emulated, lanes=lanes)

    def _lanes(self) -> Iterator[dict[str, Any]]:
        """Settings of each number of lanes and way to average, of those that were given; of chunks, each number and way
        to share keys and values too."""
        for count in self.lanes or (() if self.chunks else (None,)):
            for way in self.averages if count != 1 and self.averages else (None,):
                given = {"lanes.count": count, "lanes.average": way}
                yield {name: value for name, value in given.items() if value is not None}
        for count in self.chunks:
            for way in self.averages or ("gradients",):
                for context in self.contexts or ("full",):
                    yield {"lanes.count": count, "lanes.average": way, "context.method": context}


@dataclass(slots=True, kw_only=True)
class PlannedCell:
    """A cell with its settings; `tree` may still lack the schedule's depth (rtt_ratio=auto) and the steps."""

    mode: str
    emulated: bool
    codec: str
    schedule: str
    link: LinkProfile
    tree: dict[str, Any]
    name: str

    @classmethod
    def of(
        cls,
        grid: BenchGrid,
        mode: str,
        codec: str,
        schedule: str,
        link: str,
        *,
        emulated: bool,
        lanes: dict[str, Any],
    ) -> PlannedCell:
        profile = LinkProfile.parse(link)
        tree: dict[str, Any] = {"checkpoint.every": 0, "link.link": str(profile), **codec_settings(codec)}
        if emulated:
            tree |= {**EmulatedMachine.parse(mode).settings(), "compute.emulate": mode}
        else:
            preset, _, stages = mode.partition("@")
            if not stages.isdigit():
                raise ConfigError(f"--free-running: '{mode}' is not PRESET@STAGES, such as tiny@2")
            tree |= {"model.preset": preset, "pipeline.stages": int(stages)}
        tree |= {**lanes, **grid.settings}
        many = [str(tree[name]) for name in ("lanes.count", "lanes.average", "context.method") if tree.get(name)]
        label = "-".join((mode, codec, schedule, str(profile), *(many if many[:1] != ["1"] else ())))
        return cls(
            mode=mode,
            emulated=emulated,
            codec=codec,
            schedule=schedule,
            link=profile,
            tree=tree,
            name=re.sub(r"[^A-Za-z0-9.=_-]+", "_", label),
        )

    @property
    def title(self) -> str:
        """For people, while it runs."""
        count = self.tree.get("lanes.count", 1)
        context = self.tree.get("context.method")
        kind = f"chunks, {context}" if context else "lanes"
        lanes = "" if count == 1 else f", {count} {kind}, {self.tree.get('lanes.average', 'outer')}"
        return f"{self.codec} over {self.link}, {self.mode}{lanes}"

    def config(self, schedule: str, steps: int) -> RunConfig:
        """Raises ConfigError."""
        tree = {**self.tree, "pipeline.schedule": schedule, "run.steps": steps}
        config = parse_config(merge({}, tree))
        if self.emulated:  # an evaluation is one microbatch: there is nothing to evaluate
            config = parse_config(merge({}, {**tree, "data.heldout_sequences": config.microbatch_size}))
        return config
