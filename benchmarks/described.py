"""A command line that says of itself what the first line of its module says."""

from __future__ import annotations

import argparse
from typing import Any


def described(documentation: str | None, **options: Any) -> argparse.ArgumentParser:
    """documentation: the module's `__doc__`; options: as argparse takes them."""
    return argparse.ArgumentParser(description=(documentation or "").partition("\n")[0], **options)
