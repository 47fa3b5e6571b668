"""The report of `thinpipe chaos` for people: its content as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .recomputation import LaneVerdict

TIMES = (
    ("fault_to_progress_s", "from a loss to the next new step, s"),
    ("back_to_progress_s", "of that after the replacement is back, s"),
    ("back_to_progress_steps", "the same in steps"),
)


def chaos_tables(found: dict[str, Any]) -> list[Table]:
    """Of what is in chaos.json."""
    return [_faults(found), _lanes(found)] if "recomputed" in found else [_chain(found)]


def _chain(found: dict[str, Any]) -> Table:
    table = Table(title="chaos", show_header=False)
    _begin(table, found)
    table.add_row("steps done again", f"{found['steps_replayed']} of {found['steps']}")
    table.add_row("seconds", f"{found['seconds']:.1f}, undisturbed {found['seconds_undisturbed']:.1f}")
    if found["throughput_share"]:
        table.add_row("throughput, share of the undisturbed", f"{found['throughput_share']:.3f}")
    _times(table, found)
    same = found["losses_equal"] and found["val_loss_equal"]
    table.add_row("losses", "equal, every step" if same else "[red]DIFFERENT")
    states = (
        "equal bit for bit, in every stage" if all(found["state_equal"]) else f"[red]DIFFERENT: {found['state_equal']}"
    )
    table.add_row("state", states)
    return table


def _faults(found: dict[str, Any]) -> Table:
    table = Table(title="faults")
    for name in ("fault", "where", "after step", "second"):
        table.add_column(name, justify="right" if name in ("after step", "second") else "left")
    table.add_column("left out")
    table.add_column("next new step, s", justify="right")
    for each in found["injected"]:
        progress = "-" if each["to_progress_s"] is None else f"{each['to_progress_s']:.1f}"
        out = f"lane {each['lane']}" if each["left_out"] else ""
        table.add_row(each["kind"], each["where"], str(each["step"]), f"{each['seconds']:.1f}", out, progress)
    return table


def _lanes(found: dict[str, Any]) -> Table:
    table = Table(title="chaos", show_header=False)
    _begin(table, found)
    table.add_row("seconds", f"{found['seconds']:.1f}")
    _times(table, found)
    again = found["recomputed"]
    names = ("lane", "ended", "states_equal", "loss", "round", "val_loss_equal", "apart")
    for each in again["lanes"]:
        verdict = LaneVerdict(**{name: each[name] for name in names})
        how = ""
        if each["lane"] in again["followed_to_the_end"]:
            how = ", having followed the others to the end"
        elif each["lane"] in found["away_at_the_end"]:
            how = ": it was away"
        colour = "" if each["equal"] else "[red]"
        table.add_row(f"lane {each['lane']}", f"{colour}{verdict.words()}{how}")
    told = "computed again in one process, with the log of members"
    table.add_row(told, "the same" if again["equal"] else "[red]DIFFERENT")
    return table


def _begin(table: Table, found: dict[str, Any]) -> None:
    table.add_row("faults", ", ".join(f"{count} x {kind}" for kind, count in found["faults"].items()))
    table.add_row("generations", str(found["generations"]))
    table.add_row("processes that woke up replaced and were refused", str(found["fenced"]))


def _times(table: Table, found: dict[str, Any]) -> None:
    for key, name in TIMES:
        if spread := found[key]:
            table.add_row(name, f"median {spread['median']:.2f}, worst {spread['worst']:.2f}")
