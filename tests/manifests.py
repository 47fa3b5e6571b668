"""Manifests of checkpoints as others could have written them: other fields, with the right digest of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def resealed(path: Path, **fields: Any) -> None:
    """Another content of some fields."""
    tree = json.loads(path.read_bytes())
    _write(path, tree | fields)


def as_format_1(path: Path) -> None:
    """As one was written before copies took a tokenizer along."""
    tree = json.loads(path.read_bytes())
    del tree["beside"]
    _write(path, tree | {"format": 1})


def _write(path: Path, tree: dict[str, Any]) -> None:
    tree.pop("manifest_sha256", None)
    tree["manifest_sha256"] = hashlib.sha256(_rendered(tree)).hexdigest()
    path.write_bytes(_rendered(tree))


def _rendered(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()
