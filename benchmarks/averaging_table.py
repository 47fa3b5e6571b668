"""The tables of benchmarks/averaging.py, from its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from thinpipe.sim.links.shaper import LinkProfile

BASE = "gloo float32"  # what others are compared with, where it was measured
SHORT = 100  # characters of an error
Row = dict[str, Any]


def rounds_table(rows: list[Row], by_arrival: dict[str, bool]) -> str:
    """A line for each program, cap and number of peers."""
    ratio = f"/ {BASE}"
    heads = [
        "peers",
        "cap",
        "program",
        "MB sent",
        "of payload",
        "s a round",
        "of the link",
        ratio,
        "CPU s",
        ratio,
        "off",
    ]
    lines = _header([*heads, "same bits", "by arrival"])
    cells = {key: [row for row in rows if _cell(row) == key] for key in dict.fromkeys(map(_cell, rows))}
    for (peers, cap, program), held in sorted(cells.items(), key=lambda item: item[0][:2]):
        sent = median(sum(row["sent_bytes"]) / peers for row in held)
        seconds, cpu_s = (median(row[name] for row in held) for name in ("seconds", "cpu_s"))
        base = cells.get((peers, cap, BASE))
        ratios = ["", ""]
        if base:
            ratios = [f"{value / median(r[name] for r in base):.3f}" for name, value in
                      (("seconds", seconds), ("cpu_s", cpu_s))]  # fmt: skip
        rate = LinkProfile.parse(cap).rate_bits_per_s
        share = f"{100 * sent * 8 / (rate * seconds):.0f} %" if rate else ""
        same = all(len(set(row["digests"])) == 1 for row in held)
        arrival = {True: "yes", False: "no", None: ""}[by_arrival.get(program)]
        of_payload, off = sent / held[0]["payload_bytes"], held[0]["off"]
        columns = [peers, cap, program, f"{sent / 1e6:.2f}", f"{of_payload:.3f}", f"{seconds:.2f}", share, ratios[0]]
        columns += [f"{cpu_s:.2f}", ratios[1], f"{off:.1e}", "yes" if same else "no", arrival if peers > 2 else ""]
        lines.append(_line(columns))
    if prepared := [row["prepared_s"] for row in rows if row["program"].startswith("hivemind")]:
        lines += ["", f"hivemind looked for a group before each round, {median(prepared):.2f} s (not in its seconds)."]
    return "\n".join(lines)


def _cell(row: Row) -> tuple[int, str, str]:
    return row["peers"], row["cap"], row["program"]


def lost_table(rows: list[Row]) -> str:
    """A line for each loss; what survivors say alike stands once."""
    heads = ["lost by", "peers", "program", "round ended after", "with", "numbers left as they were"]
    lines = _header([*heads, "off from survivors' mean", "survivors have the same bits", "the next round"])
    for row in rows:
        same = "" if row["peers"] < 3 else "yes" if len(set(row["digests"])) == 1 else "no"
        columns = [row["how"], row["peers"], row["program"], _all(f"{each:.1f} s" for each in row["after_s"])]
        columns += [_all(map(_short, row["said"])), _all(f"{100 * each:.0f} %" for each in row["unchanged"])]
        columns += [_all(f"{each:.1e}" for each in row["off"]), same if row["off"] else ""]
        following = zip(map(_short, row["next_said"]), row["next_s"], strict=True)
        columns.append(_all(f"{said} ({after_s:.1f} s)" for said, after_s in following))
        lines.append(_line(columns))
    return "\n".join(lines)


def _all(parts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(parts))


def _short(said: str) -> str:
    """The beginning of what a tool said, without the paths of its source."""
    plain = re.sub(r"\[/\S+\] ", "", said.splitlines()[0])
    return plain if len(plain) <= SHORT else f"{plain[:SHORT]}..."


def _header(names: list[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(columns: Sequence[object]) -> str:
    return f"| {' | '.join(str(column).replace('|', '/') for column in columns)} |"
