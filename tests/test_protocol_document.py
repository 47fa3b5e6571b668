"""docs/protocol.md has the tables of the code as it is, and names every fault."""

import re

import pytest
from thinpipe.protocol.errors import Fault

from .protocol_tables import DOCUMENT, filled, tables


def test_the_tables_are_those_of_the_code() -> None:
    """After a change that is meant: `python -m tests.protocol_tables`."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert filled(document) == document


def test_a_table_that_is_old_or_gone_is_noticed() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for rows in tables().values():
        last = rows[-1][-1]
        assert f"| {last} |\n<!-- end -->" in document
        assert filled(document.replace(f"| {last} |\n<!-- end -->", "| old |\n<!-- end -->")) == document
    for name in tables():
        with pytest.raises(ValueError, match=name):
            filled(document.replace(f"<!-- table: {name} -->", ""))
    with pytest.raises(ValueError, match="no table 'another'"):
        filled(f"{document}<!-- table: another -->\n<!-- end -->\n")


def test_the_text_names_no_fault_that_there_is_not() -> None:
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", text))
    codes = {str(fault) for fault in Fault}
    assert named <= codes
    for code in codes:
        assert f"`{code}`" in text, f"nothing is said of {code}"
