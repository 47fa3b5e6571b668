"""Words that tables and lines share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 step`, `25 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def plain(text: str) -> str:
    """One line without control characters: what a terminal would obey is drawn as a question mark."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))
