"""An evaluation, as tables for people."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table


def evaluation_tables(found: dict[str, Any]) -> list[Table]:
    """Of what `evaluation.evaluate` found: loss on text, and shares of questions that were answered right."""
    tables = []
    if rows := found["text"]:
        about = f"{rows[0]['tokens']:,} tokens, {rows[0]['bytes']:,} bytes, windows of {found['sequence_length']}"
        table = Table(title=escape(f"{found['data']}: {about}"))
        table.add_column("boundaries" if "step" in found else "model")
        for column in ("loss", "perplexity", "bits/byte"):
            table.add_column(column, justify="right")
        for row in rows:
            bits = row["bits_per_byte"]
            figures = (f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", "-" if bits is None else f"{bits:.4f}")
            table.add_row(row["boundaries"], *figures)
        tables.append(table)
    if choices := found["choices"]:
        table = Table(title=escape(f"{choices['file']}: {choices['questions']:,} questions"))
        table.add_column("score of a choice")
        table.add_column("right", justify="right")
        for words, key in (("log-probability", "right"), ("log-probability a byte", "right_per_byte")):
            table.add_row(words, f"{100 * choices[key]:.1f} ± {100 * choices[f'{key}_error']:.1f} %")
        tables.append(table)
    return tables
