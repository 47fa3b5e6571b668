"""Text for long runs that every checkout has: the Python source of an installed package, one file a document.

The standard library's source is 3.7M tokens of a small vocabulary. A run of 8M reads it twice, and a recipe that learns
a text by heart looks better in training and worse in what is held out. torch, whose version constraints.txt fixes, has
five times as much, so that no token is seen twice. Files of equal content, and those too short to be code, are left
out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

PACKAGE = "torch"
SHORTEST = 200  # characters


def written(directory: Path) -> Path:
    """`directory`/torch-VERSION.jsonl with a row {"text": ...} for each file, in the order of their names; written if
    it is not there."""
    package = importlib.metadata.distribution(PACKAGE)
    path = directory / f"{PACKAGE}-{package.version.partition('+')[0]}.jsonl"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(file) for file in package.files or () if file.suffix == ".py")
    seen: set[bytes] = set()
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for source in sources:
            text = Path(str(package.locate_file(source))).read_text(encoding="utf-8", errors="replace")
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) >= SHORTEST and digest not in seen:
                seen.add(digest)
                out.write(json.dumps({"text": text}) + "\n")
    os.replace(partial, path)
    return path
