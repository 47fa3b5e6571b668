"""An evaluation, as tables for people."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table


def evaluation_tables(found: dict[str, Any]) -> list[str | Table]:
    """Of what `evaluation.evaluate` found, lines and tables: loss on text, and shares of questions answered right."""
    shown: list[str | Table] = []
    of_run = "step" in found
    if rows := found["text"]:
        after = f" after step {found['step']}" if of_run else ""
        if "lane" in found:
            after = f", lane {found['lane']},{after}"
        about = f"{rows[0]['tokens']:,} tokens, {rows[0]['bytes']:,} bytes, windows of {found['sequence_length']}"
        table = Table("boundaries" if of_run else "model")
        for column in ("loss", "perplexity", "bits/byte"):
            table.add_column(column, justify="right")
        for row in rows:
            bits = row["bits_per_byte"]
            figures = (f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", "-" if bits is None else f"{bits:.4f}")
            table.add_row(row["boundaries"], *figures)
        shown += [escape(f"{found['model']}{after} on {found['data']}: {about}"), table]
    if choices := found["choices"]:
        table = Table("score of a choice")
        table.add_column("right", justify="right")
        for words, key in (("log-probability", "right"), ("log-probability a byte", "right_per_byte")):
            table.add_row(words, f"{100 * choices[key]:.1f} ± {100 * choices[f'{key}_error']:.1f} %")
        cut = f"; {choices['cut']:,} choices are behind a context that was too long" if choices["cut"] else ""
        shown += [escape(f"{choices['file']}: {choices['questions']:,} questions{cut}"), table]
    return shown
