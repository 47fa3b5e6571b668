"""`thinpipe status`: the state of the swarm, from the records of its nodes in the DHT, read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from ...protocol.grid_place import GridPlace, grid
from ...protocol.node_record import NodeState, RunRecord, Seen
from ...protocol.stage_choice import of_place, priority
from ..config import ConfigError
from ..security.policy import Security
from .entry_points import look_around
from .shared_config import short, verified


def find_status(join: Sequence[str], run: str | None, security: Security) -> dict[str, Any]:
    """What `thinpipe status --json` prints. Raises DiscoveryError, and ConfigError where it is not clear which run."""
    notes: list[str] = []
    entry, discovery = look_around(join, notes.append, security)
    try:
        shareable = [
            RunRecord(
                run=rendezvous.response.run,
                configuration=rendezvous.response.configuration,
                toml=rendezvous.response.toml,
            )
            for rendezvous in entry.rendezvous
            if rendezvous.response.run and run in (None, rendezvous.response.run)
        ]
        if not shareable:
            shareable = [each for each in discovery.runs()[0] if run in (None, each.run)]
        names = sorted({f"'{each.run}' {short(each.configuration)}" for each in shareable})
        if len(names) > 1:
            raise ConfigError(f"this DHT has several runs ({', '.join(names)}); choose one with --run")
        if not shareable:
            raise ConfigError(f"no node at {', '.join(join)} knows of {f'run {run!r}' if run else 'a run'}")
        record = shareable[0]
        config = verified(record, ", ".join(join))
        seen, left_out = discovery.read(record.run, record.configuration, config.pipeline.stages, config.lanes.count)
    finally:
        discovery.close()
    places = grid(config.pipeline.stages, config.lanes.count)
    return as_figures(record, places, config.run.steps, seen, left_out, notes)


def as_figures(
    run: RunRecord,
    places: Sequence[GridPlace],
    steps: int,
    seen: Sequence[Seen],
    left_out: Counter[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """stages: for each place the nodes that serve it, or the last one that did; which lane, where there are several."""
    several = any(place.lane for place in places)

    def of(place: GridPlace) -> list[Seen]:
        last = sorted((s for s in seen if s.record.place == place), key=lambda s: (s.age_s, priority(s.record)))
        return of_place(seen, place) or last[:1]

    return {
        "run": run.run,
        "configuration": run.configuration,
        "steps": steps,
        "stages": [
            {**({"lane": place.lane} if several else {}), "stage": place.stage, "nodes": list(map(_node, of(place)))}
            for place in places
        ],
        "left_out": dict(left_out),
        "notes": list(notes),
    }


def _node(seen: Seen) -> dict[str, Any]:
    record = seen.record
    lost = not seen.living and record.state is not NodeState.LEFT
    return {
        "endpoint": record.endpoint,
        "state": "lost" if lost else record.state.value,
        "generation": record.generation,
        "completed_steps": record.completed_steps,
        "committed_steps": record.committed_steps,
        "tokens_per_s": round(record.tokens_per_s, 3),
        "age_s": round(seen.age_s, 3),
        "incarnation": f"{record.incarnation:x}",
    }


COLOURS = {"training": "green", "lost": "red", "left": "dim"}


def status_table(figures: dict[str, Any]) -> Table:
    """The same for people. Endpoints and notes are strangers' words, in which rich would find markup and emoji."""
    left_out = ", ".join(f"{count} {fault}" for fault, count in sorted(figures["left_out"].items()))
    lines = [f"records left out: {left_out}"] if left_out else []
    caption = "\n".join([*lines, *figures["notes"]])
    table = Table(
        title=f"run '{figures['run']}', fingerprint {short(figures['configuration'])}, {figures['steps']} steps",
        caption=Text(caption, style="table.caption") if caption else None,
        box=None,  # eight columns in 80 characters
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    lanes = any("lane" in stage for stage in figures["stages"])
    columns: list[tuple[str, JustifyMethod]] = [
        ("lane-stage" if lanes else "stage", "right"),
        ("endpoint", "left"),
        ("state", "left"),
        ("generation", "right"),
        ("step", "right"),
        ("committed", "right"),
        ("tokens/s", "right"),
        ("age", "right"),
    ]
    for column, justify in columns:
        table.add_column(column, justify=justify, no_wrap=column != "endpoint", overflow="fold")
    for stage in figures["stages"]:
        name = f"{stage['lane']}-{stage['stage']}" if lanes else str(stage["stage"])
        if not stage["nodes"]:
            table.add_row(name, "-", "[red]nobody[/red]", "-", "-", "-", "-", "-")
        for node in stage["nodes"]:
            colour = COLOURS.get(node["state"], "yellow")
            table.add_row(
                name,
                Text(node["endpoint"]),
                f"[{colour}]{node['state']}[/{colour}]",
                str(node["generation"]),
                str(node["completed_steps"]),
                str(node["committed_steps"]),
                f"{node['tokens_per_s']:.0f}" if node["tokens_per_s"] else "-",
                f"{node['age_s']:.0f} s",
            )
    return table
