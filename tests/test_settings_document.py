"""docs/settings.md says of every setting what the code says of it."""

import pytest
from thinpipe.node.config_file import known_keys

from .settings_document import DOCUMENT, filled, tables


def test_the_tables_are_those_of_the_code() -> None:
    """After a change that is meant: `python -m tests.settings_document`."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert filled(document) == document, "run python -m tests.settings_document"
    assert all(f"| `{key}` |" in document for key in known_keys())


def test_a_table_that_is_old_or_gone_is_noticed() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert filled(document.replace("| `run.steps` |", "| `run.stepps` |")) == document
    for name in tables():
        with pytest.raises(ValueError, match=name):
            filled(document.replace(f"<!-- settings: {name} -->", ""))
    with pytest.raises(ValueError, match="no section 'another'"):
        filled(f"{document}<!-- settings: another -->\n<!-- end -->\n")
